"""What an application declares against what the database has: every difference, with its fix.

A row model is compared with its table (columns, null, types, labels of enums), a generated module
with what would be generated now, a trigger with what its table allows (see `conductor.catalog`).
Pure: facts in, findings out.
"""

from __future__ import annotations

import ast
import inspect
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, Literal, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel, TypeAdapter, ValidationError

from conductor.annotations import class_of, members
from conductor.catalog import TableFacts, check_schema, refusals
from conductor.codegen.facts import Attribute, Catalog, Table, Type
from conductor.definitions import Task
from conductor.errors import ConductorError, UnknownColumn, UnknownTable
from conductor.rows import DEFAULT_SOURCE, column_names, is_adopted, row_model, table_name
from conductor.triggers import OnChange
from conductor.types import Range

_AGAIN: Final = "generate the row models again, or correct the model"
_PLAIN: Final = frozenset({
    bool, bytes, date, datetime, Decimal, dict, float, int, list, Range, set, str, time, timedelta,
    tuple, UUID,
})  # fmt: skip
_TEXT: Final = frozenset({str})
_NUMBERS: Final = frozenset({Decimal, float, int})
_HOLD: Final[Mapping[str, frozenset[type]]] = {
    "bool": frozenset({bool}),
    "bytea": frozenset({bytes, str}),
    "date": frozenset({date, str}),
    "float4": _NUMBERS,
    "float8": _NUMBERS,
    "int2": _NUMBERS,
    "int4": _NUMBERS,
    "int8": _NUMBERS,
    "numeric": _NUMBERS | _TEXT,
    "oid": _NUMBERS,
    "time": frozenset({time, str}),
    "timestamp": frozenset({datetime, str}),
    "timestamptz": frozenset({datetime, str}),
    "timetz": frozenset({time, str}),
    "uuid": frozenset({UUID, str}),
}
_SEQUENCES: Final = frozenset({list, set, tuple})
_VECTORS: Final = frozenset({"halfvec", "vector"})  # pgvector's


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference. ``fix`` says what would end it.

    ``column``, ``task`` and ``defined_at`` (its handler's ``file:line``) where it has them.
    """

    table: str
    problem: str
    fix: str
    column: str | None = None
    task: str | None = None
    defined_at: str | None = None

    def __str__(self) -> str:
        """Return it in one line."""
        return " ".join(f"{self.table}: {self.problem} (fix: {self.fix})".split())

    def to_json(self) -> dict[str, str | None]:
        """Return it as JSON."""
        return asdict(self)


def compare_models(
    models: Iterable[type[BaseModel]], catalog: Catalog, known: Iterable[str]
) -> Iterator[Finding]:
    """Yield how row models differ from their tables. ``known`` are the names of all tables."""
    for given in models:
        model, name = row_model(given), table_name(given)
        table = catalog.table(name)
        if table is None:
            missing = UnknownTable(str(name), known)
            fix = "write the table's name as it is, or create the table"
            yield Finding(str(name), f"model {model.__name__}: {missing}", fix)
        else:
            yield from _compare_model(model, table, catalog, adopted=is_adopted(given))


def compare_triggers(
    tasks: Iterable[Task[Any, Any]],
    facts: Mapping[tuple[str, str], TableFacts],
    known: Iterable[str],
) -> Iterator[Finding]:
    """Yield what hinders tasks from getting the changes they want."""
    for task in tasks:
        for trigger in (*task.triggers, *task.all_waits):
            if isinstance(trigger, OnChange) and trigger.source == DEFAULT_SOURCE:
                for error in _refusals(task, trigger, facts, known):
                    column = error.name if isinstance(error, UnknownColumn) else None
                    yield Finding(
                        table=str(trigger.table),
                        problem=str(error),
                        fix=error.hint,
                        column=column,
                        task=task.name,
                        defined_at=task.defined_at,
                    )


def _refusals(
    task: Task[Any, Any],
    trigger: OnChange[Any],
    facts: Mapping[tuple[str, str], TableFacts],
    known: Iterable[str],
) -> Iterator[ConductorError]:
    table = facts.get((trigger.table.schema, trigger.table.table))
    is_wait = trigger in task.all_waits
    wanted = trigger.filter if is_wait else trigger.filter_of(task.definition)
    try:
        check_schema(task.name, wanted)
    except ConductorError as error:
        yield error
        return
    if table is None:
        yield UnknownTable(str(trigger.table), known, where=f"(task {task.name!r})")
    else:
        yield from refusals(task.name, wanted, table, refetch=trigger.refetch)


def compare_module(name: str, source: str) -> Finding | None:
    """Return how a generated module differs from what its command would print now, if it does."""
    module = sys.modules[name]
    present = inspect.getsource(module)
    if ast.dump(ast.parse(present)) == ast.dump(ast.parse(source)):
        return None
    then, now = _classes(present), _classes(source)
    changed = [found for found in then.keys() | now.keys() if then.get(found) != now.get(found)]
    what = ", ".join(sorted(changed)) or "names or comments"
    return Finding(
        name,
        f"the module is not what the database gives now: {what}",
        f"{module.__generated_by__} > {module.__file__}",
    )


def generated_schemas(name: str) -> list[str] | None:
    """Return the schemas that a generated module is of; None when it is not a generated one."""
    command = getattr(sys.modules[name], "__generated_by__", None)
    return None if command is None else shlex.split(command)[-1].split(",")


def _classes(source: str) -> dict[str, str]:
    return {
        node.name: ast.dump(node)
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _compare_model(
    model: type[BaseModel], table: Table, catalog: Catalog, *, adopted: bool
) -> Iterator[Finding]:
    columns = {column.name: column for column in table.columns}
    for field, name in column_names(model).items():
        column = columns.get(name)
        if column is None:
            missing = UnknownColumn(name, columns, where=f"of model {model.__name__}")
            yield Finding(str(table.name), str(missing), _AGAIN, name)
        elif column.generated and adopted:
            pass  # another generator writes it into every model
        elif column.generated:
            problem = f"column {name!r} of model {model.__name__} is generated: no change has it"
            yield Finding(str(table.name), problem, "leave it out of the model", name)
        else:
            yield from _compare_field(model, field, column, table, catalog)


def _compare_field(
    model: type[BaseModel], field: str, column: Attribute, table: Table, catalog: Catalog
) -> Iterator[Finding]:
    info = model.model_fields[field]
    where, name = str(table.name), column.name
    annotation = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    if not _forbids_null(column, catalog) and not _takes_none(annotation):
        yield Finding(
            where,
            f"column {name!r} may be null, and model {model.__name__} does not allow it",
            f"{field}: … | None, or alter table {where} alter column {name} set not null",
            name,
        )
    for problem in _differences(annotation, column.type, catalog, model.__name__):
        yield Finding(where, f"column {name!r}{problem}", _AGAIN, name)


def _differences(annotation: Any, oid: int, catalog: Catalog, model: str) -> Iterator[str]:
    """Yield what the values of a type, or their elements, have and an annotation does not take."""
    known = _base_type(oid, catalog)
    classes = set(_classes_of(annotation))
    labels = _labels_of(annotation)
    if known.kind == "e" and labels is not None:
        lacking = ", ".join(repr(label) for label in known.labels if label not in labels)
        if lacking:
            of = f"of type {known.schema}.{known.name}"
            yield f": model {model} lacks the labels {lacking} {of}"
    elif not _can_hold(known, set(_plain_classes(classes))):
        shown = " or ".join(sorted(each.__name__ for each in classes))
        yield f" is {known.name}, which {shown} of model {model} is not"
    elif known.element and known.name not in _HOLD:
        element = _element_of(annotation)
        if element is not None:
            for problem in _differences(element, known.element, catalog, model):
                yield f" has elements, and each{problem}" if problem[0] == " " else problem


def _plain_classes(classes: set[type]) -> Iterator[type]:
    """Yield the classes that values of the database may be read as: of an enum those of its own."""
    for each in classes:
        if issubclass(each, Enum):
            yield from (type(member.value) for member in each)
        else:
            yield each


def _labels_of(annotation: Any) -> set[Any] | None:
    """Return the values that enums and literals list; None if others are taken as well."""
    labels: set[Any] = set()
    for member in members(annotation):
        if get_origin(member) is Literal:
            labels.update(get_args(member))
        elif inspect.isclass(member) and issubclass(member, Enum):
            labels.update(each.value for each in member)
        elif member is not type(None):
            return None
    return labels


def _element_of(annotation: Any) -> Any:
    """Return what elements of a sequence are, however deep it is nested; None: not written down."""
    lists = [member for member in members(annotation) if get_origin(member) in _SEQUENCES]
    if len(lists) != 1:
        return None
    arguments = [each for each in get_args(lists[0]) if each is not ...]
    if len(arguments) != 1:
        return None
    nested = any(get_origin(member) in _SEQUENCES for member in members(arguments[0]))
    return _element_of(arguments[0]) if nested else arguments[0]


def _base_type(oid: int, catalog: Catalog) -> Type:
    found = catalog.types[oid]
    return _base_type(found.base, catalog) if found.kind == "d" else found


def _forbids_null(column: Attribute, catalog: Catalog) -> bool:
    found = catalog.types[column.type]
    while found.kind == "d" and not found.not_null:
        found = catalog.types[found.base]
    return column.not_null or (found.kind == "d" and found.not_null)


def _takes_none(annotation: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(None)
    except ValidationError:
        return False
    return True


def _classes_of(annotation: Any) -> Iterator[type]:
    """Yield the classes that a value may be of, as far as they are written down."""
    for member in members(annotation):
        found = class_of(member)
        if get_origin(member) is Literal:
            yield from {type(value) for value in get_args(member)} - {type(None)}
        elif found is Any or not inspect.isclass(found):
            yield object  # not written down: anything
        elif found is not type(None):
            yield found


def _can_hold(known: Type, classes: set[type]) -> bool:
    """Return whether one of the classes reads a type's values; true for what is not plain."""
    if not classes or not classes <= _PLAIN:
        return True
    if known.element and known.name not in _HOLD:
        return bool(classes & _SEQUENCES)
    if known.kind in {"r", "m"}:
        return bool(classes & {Range, str, *(_SEQUENCES if known.kind == "m" else ())})
    if known.is_builtin and known.name in {"json", "jsonb"}:
        return True
    if known.name in _VECTORS and not known.is_builtin:
        return bool(classes & {list, str})
    if known.is_builtin and known.name in _HOLD:
        return bool(classes & _HOLD[known.name])
    return str in classes
