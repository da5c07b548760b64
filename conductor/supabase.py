"""Models that the Supabase CLI writes for Python, made to read what the router sends.

`supabase gen types --lang=python` prints a pydantic model for each table (and view, and composite
type), every field with its column as alias, and names no table. Its types are those of PostgREST:
bytea, json and composites have another form there. `adapt` gives a subclass of a model that reads
changes, so that an instance is one of the model's own class. Pure.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Iterator
from datetime import date, datetime, time
from importlib import import_module
from inspect import getmembers, isclass
from types import ModuleType, UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Json, JsonValue
from pydantic.errors import PydanticUserError

from conductor.errors import DefinitionInvalid, UnknownName
from conductor.types import (
    Array,
    Bytea,
    Column,
    Composite,
    Date,
    JsonText,
    Timestamptz,
    Timetz,
)

ModelT = TypeVar("ModelT", bound=BaseModel)

_TYPES: Final[dict[Any, Any]] = {
    bytes: Bytea,
    datetime: Timestamptz,
    date: Date,
    time: Timetz,
}
_RENAME: Final = "Rename the field in that file, such as class_, and leave its alias as it is."
_JSON: Final[Any] = Json
_UNIONS: Final = frozenset({Union, UnionType})


class UnknownModel(UnknownName):
    """No such model in the module."""

    noun = "model"
    hint = "Models are the classes that the Supabase CLI has written, such as PublicMovies."


def class_name(*parts: str) -> str:
    """Return the class name that the Supabase CLI gives to a schema's table.

    >>> class_name("public", "victory-road")
    'PublicVictoryRoad'
    """
    words = (word for part in parts for word in re.split(r"[^a-zA-Z0-9]", part) if word)
    return "".join(word[0].upper() + word[1:] for word in words)


def models_of(module: ModuleType) -> dict[str, type[BaseModel]]:
    """Return the models that a module defines, by name. Raises DefinitionInvalid without any."""
    found = {
        name: member
        for name, member in getmembers(module, isclass)
        if issubclass(member, BaseModel) and member.__module__ == module.__name__
    }
    if not found:
        raise DefinitionInvalid(
            f"module {module.__name__} defines no models",
            hint="It is what `supabase gen types --lang=python` prints.",
        )
    return found


def load(module: ModuleType | str) -> dict[str, type[BaseModel]]:
    """Return the models of a module, or import the module of a name first.

    Raises DefinitionInvalid, by column, for a field that Python or pydantic cannot take: the
    Supabase CLI writes column names as they are, be it a keyword or with an underscore in front.
    """
    if isinstance(module, ModuleType):
        return models_of(module)
    try:
        return models_of(import_module(module))
    except SyntaxError as error:
        line = (error.text or "").strip()
        where = f"column {_column_of(line) or repr(line)} in line {error.lineno}"
        raise DefinitionInvalid(f"{module} is not Python: {where}", hint=_RENAME) from error
    except PydanticUserError as error:
        raise DefinitionInvalid(f"{module}: {error.message}", hint=_RENAME) from error
    except ModuleNotFoundError as error:
        raise DefinitionInvalid(f"cannot import {module!r}: {error}") from error


def _column_of(line: str) -> str | None:
    alias = re.search(r'alias="([^"]*)"', line)
    return None if alias is None else repr(alias[1])


def undefined_names(model: type[BaseModel]) -> dict[str, list[str]]:
    """Return the names in a model's annotations that its module does not define, by column."""
    known = vars(_module_of(model)).keys() | vars(builtins).keys()
    found: dict[str, list[str]] = {}
    for field, annotation in model.__annotations__.items():
        if isinstance(annotation, str):
            names = [n.id for n in ast.walk(ast.parse(annotation)) if isinstance(n, ast.Name)]
            missing = sorted(set(names) - known)
            if missing:
                info = model.__pydantic_fields__.get(field)
                found[(info.alias if info is not None else None) or field] = missing
    return found


def check_model(model: type[BaseModel]) -> None:
    """Raise DefinitionInvalid, by column, for a model that has undefined names."""
    undefined = undefined_names(model)
    if undefined:
        columns = (f"{column!r} ({', '.join(names)})" for column, names in undefined.items())
        first = next(iter(undefined.values()))[0]
        raise DefinitionInvalid(
            f"model {model.__name__} has names that are not defined: column {', '.join(columns)}",
            hint=f"Say what they are before, such as {model.__module__}.{first} = str: the router"
            " sends types that have no JSON of their own as text.",
        )
    module = _module_of(model)
    model.model_rebuild(_types_namespace=vars(module))
    for field, info in model.model_fields.items():
        for table in _models_in(info.annotation):
            if hasattr(module, f"{table.__name__}Insert"):
                raise DefinitionInvalid(
                    f"model {model.__name__}: column {info.alias or field!r} is a row of a table"
                    f" ({table.__name__}), which comes as text, and the module does not say in"
                    " which order",
                    hint=f"Write {field}: Optional[str] in that file, and keep its alias.",
                )


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that values of an annotation are of."""
    if isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def adapt(
    model: type[BaseModel], base: type[ModelT], *, as_text: bool = False, **options: Any
) -> type[ModelT]:
    """Return a subclass of ``base`` and of the model that reads the router's values.

    ``as_text``: a composite, in which json is text and any attribute may be null, whatever the CLI
    says. ``options`` are the class's own.
    """
    check_model(model)
    hints = get_type_hints(model, vars(_module_of(model)), include_extras=True)
    annotations: dict[str, Any] = {}
    for field, info in model.model_fields.items():
        annotation = _retyped(hints[field], as_text=as_text)
        if as_text:
            annotation = Union[annotation, None]  # noqa: UP007 - at run time
        annotations[field] = Annotated[annotation, Column(info.alias or field)]
    namespace = {
        "__annotations__": annotations,
        "__module__": model.__module__,
        "__qualname__": model.__qualname__,
        "__doc__": model.__doc__,
    }
    kind: Any = type(base)
    adapted: type[ModelT] = kind(model.__name__, (base, model), namespace, **options)
    return adapted


def _retyped(annotation: Any, *, as_text: bool) -> Any:
    """Return the annotation that reads the router's values; its json is decoded already."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated and any(each is _JSON or type(each) is _JSON for each in arguments):
        return JsonText if as_text else JsonValue
    if annotation is JsonValue:
        return JsonText if as_text else JsonValue
    if origin in _UNIONS:
        return Union[tuple(_retyped(each, as_text=as_text) for each in arguments)]  # noqa: UP007
    if origin is list:
        return Array[_retyped(arguments[0], as_text=as_text)]  # type: ignore[misc]  # at run time
    if isclass(annotation) and issubclass(annotation, BaseModel):
        return adapt(annotation, Composite, as_text=True)
    return _TYPES.get(annotation, annotation) if isclass(annotation) else annotation


def _module_of(model: type[BaseModel]) -> ModuleType:
    return sys.modules[model.__module__]
