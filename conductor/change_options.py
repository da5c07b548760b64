"""The options of a trigger of changes: their types, and what was given, checked. Pure.

Raises DefinitionInvalid for what cannot be meant.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypedDict, get_args

from pydantic import BaseModel

from conductor.arguments import check_type
from conductor.columns import Columns, RowT
from conductor.errors import DefinitionInvalid, did_you_mean
from conductor.matching import Group, Operation
from conductor.rows import TableRow, column_names, is_adopted, table_name
from conductor.supabase import check_model

MAX_COALESCE_S: Final = 86_400
_ROW_OPERATIONS: Final[tuple[Operation, ...]] = ("insert", "update", "delete")


class GroupOptions(TypedDict, Generic[RowT], total=False):
    """Options of a trigger of transactions; see `conductor.triggers.OnChange`."""

    columns: Columns[RowT] | None
    source: str
    when: str | None


class GroupUpdateOptions(GroupOptions[RowT], total=False):
    """Those of one that fires on updates too."""

    changed: Columns[RowT] | None


class DeleteOptions(GroupOptions[RowT], total=False):
    """Options of a trigger of deletes."""

    key: Columns[RowT] | None
    coalesce_s: float | None


class InsertOptions(DeleteOptions[RowT], total=False):
    """Options of a trigger of rows that are there afterwards."""

    refetch: bool


class UpdateOptions(InsertOptions[RowT], total=False):
    """Options of a trigger of updates, and maybe others."""

    changed: Columns[RowT] | None


def model_of(row: Any) -> type[BaseModel] | None:
    """Return the row model that a trigger was given; None for a table by name."""
    if isinstance(row, str):
        return None
    if isinstance(row, type) and issubclass(row, TableRow):
        table_name(row)
        return row
    if is_adopted(row):
        adopted: type[BaseModel] = row
        check_model(adopted)
        return adopted
    raise DefinitionInvalid(
        f"OnChange takes a row model or 'schema.table', not {row!r}",
        hint='Row models are classes such as Users(TableRow, table="public.users"), or the models'
        " of a module that Database.from_supabase has taken.",
    )


def operations_of(operations: tuple[Any, ...]) -> frozenset[Operation]:
    """Return the operations that a trigger was given, or else those on rows."""
    known: tuple[str, ...] = get_args(Operation)
    for operation in operations:
        if operation not in known:
            meant = did_you_mean(operation.lower(), known) if isinstance(operation, str) else ""
            raise DefinitionInvalid(
                f"{operation!r} is not an operation{meant}", hint=f"One of {', '.join(known)}."
            )
    wanted: Any = operations or _ROW_OPERATIONS
    return frozenset(wanted)


def coalesce_s_of(
    coalesce_s: float | None, operations: frozenset[Operation], group: Group | None
) -> float | None:
    """Return for how long changes coalesce, if they can."""
    if coalesce_s is None:
        return None
    if group is not None:
        raise DefinitionInvalid("changes go into the job of a transaction, or coalesce: not both")
    check_type("coalesce_s", coalesce_s, (int, float), "coalesce_s=5")
    if not 0 < coalesce_s <= MAX_COALESCE_S:
        raise DefinitionInvalid(f"coalesce_s is not between 0 and {MAX_COALESCE_S} seconds")
    if "truncate" in operations:
        raise DefinitionInvalid("coalesce_s is about rows, and a truncate has none")
    return coalesce_s


def all_columns(model: type[BaseModel] | None) -> tuple[str, ...] | None:
    """Return what is captured when a trigger does not say: the fields of a row model.

    A model of another generator has fields for generated columns, which the WAL does not hold.
    """
    return None if model is None or is_adopted(model) else tuple(column_names(model).values())
