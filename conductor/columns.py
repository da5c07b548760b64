"""The columns that a trigger names: as text, or by a function that reads them of a row.

Such a function is called once, with a stand-in for the row: what it reads are the columns. Nothing
else can be done with one, so that a condition written there is an error and not a surprise. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Never, TypeAlias

from pydantic import BaseModel, JsonValue
from typing_extensions import TypeVar

from conductor.errors import ConductorError, DefinitionInvalid, UnknownColumn
from conductor.rows import column_names, source_name
from conductor.texts import flaw_of

RowT = TypeVar("RowT", default=dict[str, JsonValue])

Columns: TypeAlias = Callable[[RowT], object] | Sequence[str]
"""Columns of a row model: their names, or a function that reads them: ``lambda u: u.id``."""

_HINT: Final = "Such as columns=lambda u: (u.id, u.email) or columns=('id', 'email')."


class _Accessor:
    """Stands for a row while an accessor function is called: an attribute is its column."""

    __slots__ = ("_model",)

    def __init__(self, model: type[BaseModel]) -> None:
        self._model = model

    def __getattr__(self, name: str) -> _Named:
        return _Named(_column(self._model, name))


class _Named:
    """A column that an accessor has read. It has no value: nothing can be asked of it."""

    __slots__ = ("column",)

    def __init__(self, column: str) -> None:
        self.column = column

    def __bool__(self) -> Never:
        raise TypeError(f"column {self.column!r} is not a condition")

    def __eq__(self, other: object) -> Never:
        raise TypeError(f"column {self.column!r} cannot be compared")

    __ge__ = __gt__ = __le__ = __lt__ = __eq__
    __hash__ = None  # type: ignore[assignment]  # as of whatever cannot be compared

    def __str__(self) -> Never:
        raise TypeError(f"column {self.column!r} has no value, so no text")

    def __getattr__(self, name: str) -> Never:
        raise TypeError(f"column {self.column!r} has no value, so no {name!r}")


def _column(model: type[BaseModel], name: str) -> str:
    columns = column_names(model)
    if name in columns:
        return columns[name]
    if name in columns.values():
        return name
    raise UnknownColumn(name, [*columns, *columns.values()], where=f"of {source_name(model)}")


def resolve_columns(
    model: type[BaseModel] | None, columns: Columns[Any] | str | None
) -> tuple[str, ...] | None:
    """Return column names for what a trigger was given (None: none was).

    Raises UnknownColumn for one the model does not have; without a model, names are taken as they
    are and checked against the live catalog at registration.
    """
    if columns is None:
        return None
    if callable(columns):
        if model is None:
            raise DefinitionInvalid("an accessor function needs a row model; name the columns")
        found: Any = _read(columns, model)
    else:
        found = columns
    given: tuple[Any, ...] = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    names = [each.column if isinstance(each, _Named) else each for each in given]
    if not names or not all(isinstance(name, str) and not flaw_of(name) for name in names):
        raise DefinitionInvalid("columns must be given by name or by an accessor", hint=_HINT)
    return tuple(dict.fromkeys(n if model is None else _column(model, n) for n in names))


def _read(accessor: Callable[[Any], object], model: type[BaseModel]) -> object:
    """Return what an accessor function names. Raises DefinitionInvalid, with its place."""
    try:
        return accessor(_Accessor(model))
    except ConductorError:
        raise
    except Exception as error:
        code = getattr(accessor, "__code__", None)
        where = "" if code is None else f" at {code.co_filename}:{code.co_firstlineno}"
        raise DefinitionInvalid(
            f"the accessor{where} does not name columns of {source_name(model)}: {error}",
            hint=f"{_HINT} A condition on values is when=.",
        ) from error
