"""Row models of captured tables, and reading them from a change.

A row model is a pydantic model that names its table. A change may carry a part of a row only: then
the fields it carries are validated one by one and reading another one raises an error that says
why. Model validators run on complete rows only. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import getmembers, isclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, JsonValue, PrivateAttr
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaValidator, core_schema, to_json
from typing_extensions import TypeVar

from conductor import supabase
from conductor.arguments import check_type
from conductor.codec import QuietSchema
from conductor.errors import (
    ColumnNotCaptured,
    ColumnUnchanged,
    DefinitionInvalid,
    UnknownColumn,
    UnknownTable,
    did_you_mean,
)
from conductor.filter_types import Kinds, certain, kinds_of
from conductor.texts import flaw_of

_IDENTIFIER: Final = r'(?:[^\W\d][\w$]*|"(?:[^"]|"")+")'
_TABLE: Final = re.compile(rf"({_IDENTIFIER})\.({_IDENTIFIER})")


@dataclass(frozen=True, slots=True)
class TableName:
    """A table and its schema, as the catalog spells them."""

    schema: str
    table: str

    def __str__(self) -> str:
        """Return ``schema.table``, quoted where SQL needs it.

        >>> str(TableName("public", "Odd name"))
        'public."Odd name"'
        """
        return ".".join(
            part
            if re.fullmatch(r"[a-z_][a-z0-9_$]*", part)
            else '"' + part.replace('"', '""') + '"'
            for part in (self.schema, self.table)
        )

    @classmethod
    def parse(cls, text: str) -> TableName:
        """Read ``schema.table`` as SQL does: unquoted parts are lower case.

        >>> TableName.parse("public.Users")
        TableName(schema='public', table='users')
        """
        match = _TABLE.fullmatch(text)
        if match is None or flaw_of(text):
            raise DefinitionInvalid(
                f"{text!r} does not name a table",
                hint="Write schema.table, such as 'public.users'; quote odd names as in SQL.",
            )
        return cls(*map(_identifier, match.groups()))


def _identifier(text: str) -> str:
    return text[1:-1].replace('""', '"') if text.startswith('"') else text.lower()


class TableRow(BaseModel):
    """A row of a table. Subclass it with the table's name; a field's alias is its column's name.

        class UserContact(TableRow, table="public.users"):
            id: int
            email: str

    A model with fewer fields than the table has columns is a projection: changes carry no more.
    """

    model_config = ConfigDict(
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
        ser_json_inf_nan="strings",
    )
    __table_name__: ClassVar[TableName | None] = None
    _unchanged: frozenset[str] = PrivateAttr(default=frozenset())
    _gone: bool = PrivateAttr(default=False)

    def __init_subclass__(cls, *, table: str | None = None, **options: Any) -> None:
        """Take the table's name."""
        for name in options.keys() - ConfigDict.__annotations__.keys():
            meant = did_you_mean(name, ["table", *ConfigDict.__annotations__])
            raise DefinitionInvalid(f"row model {cls.__name__} has no option {name!r}{meant}")
        super().__init_subclass__(**options)
        if table is not None:
            check_type(f"table of row model {cls.__name__}", table, (str,), 'table="public.users"')
            cls.__table_name__ = TableName.parse(table)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """See that a column of a method's name (``json``, ``copy``) is not read as the method."""
        super().__pydantic_init_subclass__(**options)
        for field in cls.model_fields:
            if hasattr(TableRow, field) and not isinstance(vars(cls).get(field), _Hidden):
                setattr(cls, field, _Hidden(cls, field))

    if not TYPE_CHECKING:  # a checker must still refuse unknown attributes

        def __getattr__(self, name: str) -> Any:
            """Say why a column is not there."""
            if name in column_names(type(self)):
                raise _lacks(self, name)
            return super().__getattr__(name)


class _Hidden:
    """Stands before an attribute of every model that has the name of a column.

    A row's own value comes first. Without one it is the column that is missing; the class itself
    has its attribute as before.
    """

    def __init__(self, model: type[TableRow], field: str) -> None:
        self._model = model
        self._field = field

    def __get__(self, row: TableRow | None, model: type[TableRow]) -> Any:
        if row is None:
            return getattr(super(self._model, model), self._field)
        raise _lacks(row, self._field)


def _lacks(row: TableRow, field: str) -> ColumnNotCaptured:
    column = column_names(type(row))[field]
    return absent(table_name(type(row)), column, row._unchanged, gone=row._gone)  # noqa: SLF001


ModelT = TypeVar("ModelT", bound=BaseModel)


class PlainRow(dict[str, JsonValue]):
    """A row of a table without a model: column name to JSON value.

    Indexing a column that the change does not carry raises ColumnNotCaptured, not KeyError.
    """

    __slots__ = ("_gone", "_table", "_unchanged")

    def __init__(
        self,
        values: Mapping[str, JsonValue],
        table: TableName,
        unchanged: frozenset[str],
        *,
        gone: bool = False,
    ) -> None:
        super().__init__(values)
        self._table = table
        self._unchanged = unchanged
        self._gone = gone

    def __missing__(self, column: str) -> JsonValue:
        """Say why a column is not there."""
        raise absent(self._table, column, self._unchanged, gone=self._gone)


def absent(
    table: TableName, column: str, unchanged: Iterable[str], *, gone: bool = False
) -> ColumnNotCaptured:
    """Return the error for reading a column that a change of this table does not carry.

    ``gone``: the row was to be read again, and was not there any more.
    """
    then = "; the row was gone when it was to be read again" if gone else ""
    hint = "Look at `event.gone` first." if gone else None
    if column in unchanged:
        return ColumnUnchanged(
            f"column {column!r} of {table} was not touched by this update, and its value is "
            f"stored out of line: the WAL does not repeat it{then}",
            hint=hint,
        )
    return ColumnNotCaptured(
        f"column {column!r} of {table} is not captured by this change{then}", hint=hint
    )


DEFAULT_SOURCE: Final = "default"
"""The source database that is not named: where a single sidecar streams from."""

_SOURCES: dict[type[BaseModel], str] = {}


def source_of(model: type[BaseModel] | None) -> str:
    """Return the name of the source database that a row model's table is in."""
    return DEFAULT_SOURCE if model is None else _SOURCES.get(model, DEFAULT_SOURCE)


def table_name(model: type[BaseModel]) -> TableName:
    """Return the table of a row model. Raises DefinitionInvalid when nothing names one."""
    found = row_model(model).__table_name__
    if found is None:
        raise DefinitionInvalid(
            f"row model {model.__name__} names no table",
            hint=f'Write class {model.__name__}(TableRow, table="schema.table").',
        )
    return found


_ADOPTED: dict[type[BaseModel], type[TableRow] | None] = {}  # None: its table is not known yet


def adopt(model: type[BaseModel], table: TableName | None) -> None:
    """Take a model that another generator wrote as a row model, once its table is known."""
    _ADOPTED[model] = None if table is None else supabase.adapt(model, TableRow, table=str(table))


def is_adopted(model: Any) -> bool:
    """Return whether a class is a model of another generator that `adopt` has taken."""
    return isinstance(model, type) and model in _ADOPTED


def is_unresolved(model: type[BaseModel] | None) -> bool:
    """Return whether the table of an adopted model is not known yet."""
    return model is not None and is_adopted(model) and _ADOPTED[model] is None


def row_model(model: type[BaseModel]) -> type[TableRow]:
    """Return the class that reads rows of a model: itself, or what an adopted one has become."""
    if issubclass(model, TableRow):
        return model
    adopted = _ADOPTED.get(model)
    if adopted is None:
        raise DefinitionInvalid(
            f"the table of model {model.__name__} is not known",
            hint=f'Say Database.from_supabase(module, tables={{"{model.__name__}": "public.…"}}).',
        )
    return adopted


def source_name(model: type[BaseModel]) -> str:
    """Return how messages call the table of a model."""
    return f"model {model.__name__}" if is_unresolved(model) else str(table_name(model))


@cache
def column_names(model: type[BaseModel]) -> dict[str, str]:
    """Return the model's field names with the names of their columns, in order."""
    names: dict[str, str] = {}
    for field, info in model.model_fields.items():
        alias = info.validation_alias if isinstance(info.validation_alias, str) else info.alias
        names[field] = alias or field
    return names


@cache
def column_kinds(model: type[BaseModel]) -> dict[str, Kinds]:
    """Return what the router sends for a model's columns, as far as the model is certain of it."""
    if is_unresolved(model):  # the types of another generator
        return {}
    try:
        found = row_model(model)
        return certain(found, kinds_of(found.model_json_schema(schema_generator=QuietSchema)))
    except (NameError, PydanticUserError, ValueError):
        return {}


@cache
def _columns(model: type[TableRow]) -> frozenset[str]:
    return frozenset(column_names(model).values())


RowModelT = TypeVar("RowModelT", bound=TableRow)


def read_row(
    model: type[RowModelT],
    values: dict[str, Any],
    unchanged: frozenset[str],
    *,
    gone: bool = False,
) -> RowModelT:
    """Validate what a change carries of a row. Raises pydantic's ValidationError.

    A row with all the model's columns is validated as a whole, a part of one field by field.
    """
    data = to_json(values)
    if _columns(model) <= values.keys():
        return model.model_validate_json(data)
    row = model.__new__(model)
    fields = _part_validator(model).validate_json(data)
    private = {name: info.get_default() for name, info in model.__private_attributes__.items()}
    object.__setattr__(row, "__dict__", fields)
    object.__setattr__(row, "__pydantic_fields_set__", set(fields))
    object.__setattr__(row, "__pydantic_extra__", None)
    private |= {"_unchanged": unchanged, "_gone": gone}
    object.__setattr__(row, "__pydantic_private__", private)
    return row


@cache
def _part_validator(model: type[TableRow]) -> SchemaValidator:
    """Return a validator of the model's fields alone, each optional, from its core schema."""
    model.model_rebuild()
    schema: Any = model.__pydantic_core_schema__
    definitions: list[Any] = []
    config: Any = None
    while schema["type"] != "model-fields":
        definitions += schema.get("definitions", ())
        config = schema.get("config", config)
        if schema["type"] == "definition-ref":
            wanted = schema["schema_ref"]
            schema = next(known for known in definitions if known.get("ref") == wanted)
        else:
            schema = schema["schema"]
    fields = {
        name: core_schema.typed_dict_field(
            _without_default(field["schema"]),
            required=False,
            validation_alias=field.get("validation_alias"),
        )
        for name, field in schema["fields"].items()
    }
    part: Any = core_schema.typed_dict_schema(fields, config=config, extra_behavior="ignore")
    return SchemaValidator(
        core_schema.definitions_schema(part, definitions) if definitions else part, config
    )


def _without_default(schema: Any) -> Any:
    """Return a field's schema so that an absent value stays absent."""
    if schema["type"] == "default":
        return _without_default(schema["schema"])
    if schema["type"].startswith("function-") and "schema" in schema:
        return {**schema, "schema": _without_default(schema["schema"])}
    return schema


@dataclass(frozen=True, slots=True)
class Database:
    """The tables an application knows, with their columns: what names are checked against.

    ``models`` are the row models they were taken from; ``is_partial``: there may be tables that
    are not known yet. ``source`` names the database where it is not the only one that changes come
    from: that of the sidecar with this ``CDC_SOURCE``.
    """

    tables: Mapping[str, frozenset[str]]
    models: tuple[type[BaseModel], ...] = ()
    is_partial: bool = False
    source: str = DEFAULT_SOURCE

    @classmethod
    def from_module(cls, module: ModuleType, *, source: str = DEFAULT_SOURCE) -> Database:
        """Take the row models that a module defines, such as a generated one.

        Raises DefinitionInvalid when it has none.

            database = Database.from_module(database_types)
        """
        check_type("module", module, (ModuleType,), "Database.from_module(database_types)")
        models = [
            member
            for _, member in getmembers(module, isclass)
            if issubclass(member, TableRow) and member.__table_name__ is not None
        ]
        if not models:
            raise DefinitionInvalid(
                f"module {module.__name__} defines no row models",
                hint='Row models are classes such as Users(TableRow, table="public.users").',
            )
        return cls._of(models, source)

    @classmethod
    def from_supabase(
        cls,
        module: ModuleType | str,
        tables: Mapping[str, str] | None = None,
        *,
        source: str = DEFAULT_SOURCE,
    ) -> Database:
        """Take the models that ``supabase gen types --lang=python`` prints.

        ``module`` is the imported module, or its name: then a file that Python cannot read is
        reported by column. Its classes name no table: ``tables`` says ``schema.table`` by class
        name, and what it leaves out is found in the live catalog at registration. Triggers take
        the classes as they are; rows are read as the router sends them. Raises DefinitionInvalid,
        UnknownModel.

            database = Database.from_supabase(database_types, {"PublicMovies": "public.movies"})
        """
        check_type("module", module, (ModuleType, str), "Database.from_supabase(database_types)")
        models = supabase.load(module)
        named = {name: TableName.parse(table) for name, table in (tables or {}).items()}
        for name in named:
            if name not in models:
                raise supabase.UnknownModel(name, models)
        for name, model in models.items():
            adopt(model, named.get(name))
        found = cls._of([models[name] for name in named], source)
        _SOURCES.update(dict.fromkeys(models.values(), source))
        is_partial = len(named) < len(models)
        return cls(found.tables, tuple(models.values()), is_partial=is_partial, source=source)

    @classmethod
    def _of(cls, models: Sequence[type[BaseModel]], source: str) -> Database:
        check_type("source", source, (str,), 'source="billing"')
        _SOURCES.update(dict.fromkeys(models, source))
        tables: dict[str, frozenset[str]] = {}
        for model in models:
            name = str(table_name(model))
            known = tables.get(name, frozenset())
            tables[name] = known | frozenset(column_names(model).values())
        return cls(tables, tuple(models), source=source)

    def check(self, table: TableName, columns: Iterable[str] = ()) -> None:
        """Raise UnknownTable or UnknownColumn for a name this database does not have."""
        known = self.tables.get(str(table))
        if known is None and self.is_partial:
            return
        if known is None:
            raise UnknownTable(str(table), self.tables)
        for column in columns:
            if column not in known:
                raise UnknownColumn(column, known, where=f"of {table}")
