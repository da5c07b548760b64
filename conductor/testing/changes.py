"""Changes of tables for tests: rows in, the events that a handler gets out. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from orjson import dumps
from typing_extensions import TypeVar

from conductor.errors import ColumnNotCaptured, RowAbsent
from conductor.events import Change, Delete, Insert, Truncate, Update
from conductor.rows import TableRow, column_names, table_name

ModelT = TypeVar("ModelT", bound=TableRow)

EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""When changes are committed unless a test says otherwise."""


def inserted(row: ModelT, *, at: datetime = EPOCH) -> Insert[ModelT]:
    """Return the change that a row's insertion is.

    event = inserted(Users(id=1, email="a@example.com"))
    """
    return Insert(new=row, **_source(type(row), at))


def updated(
    new: ModelT,
    old: ModelT | None = None,
    *,
    changed: Iterable[str] | None = None,
    at: datetime = EPOCH,
) -> Update[ModelT]:
    """Return the change that a row's update is.

    With ``old`` (as under REPLICA IDENTITY FULL) the changed columns are those that differ, unless
    they are given.
    """
    if changed is None and old is not None:
        changed = [
            column
            for field, column in column_names(type(new)).items()
            if getattr(new, field) != getattr(old, field)
        ]
    return Update(
        new=new,
        old=old,
        changed=None if changed is None else frozenset(changed),
        **_source(type(new), at),
    )


def deleted(old: ModelT, *, at: datetime = EPOCH) -> Delete[ModelT]:
    """Return the change that a row's deletion is."""
    return Delete(old=old, **_source(type(old), at))


def truncated(
    model: type[ModelT], *, cascade: bool = False, at: datetime = EPOCH
) -> Truncate[ModelT]:
    """Return the change that a table's truncation is."""
    return Truncate(cascade=cascade, **_source(model, at))


def envelope(change: Change[Any]) -> bytes:
    """Return a change as a job's payload holds it (see `conductor.contract`)."""
    document: dict[str, Any] = {
        "op": change.op,
        "schema": change.schema,
        "table": change.table,
        "commit_time": change.commit_time.isoformat(),
        "commit_lsn": change.commit_lsn,
    }
    for which in ("new", "old"):
        try:
            row = getattr(change, which)
        except RowAbsent:
            continue
        is_model = isinstance(row, TableRow)
        document[which] = row.model_dump(mode="json", by_alias=True) if is_model else dict(row)
    if isinstance(change, Truncate):
        document |= {"cascade": change.cascade, "restart_identity": change.restart_identity}
    try:
        document["changed"] = sorted(change.changed)
    except ColumnNotCaptured:
        return dumps(document)
    return dumps(document)


def _source(model: type[TableRow], at: datetime) -> dict[str, Any]:
    table = table_name(model)
    return {
        "schema": table.schema,
        "table": table.table,
        "commit_time": at,
        "commit_lsn": "0/16B3748",
    }
