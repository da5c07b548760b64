"""What a handler is given: one class for each reason why a task runs.

`Invocation`, `Emitted`, `Change` (with a subclass for each operation), `Transaction` and `Tick` can
be told apart with ``match``. All are immutable by convention. Pure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Never

from pydantic import JsonValue
from typing_extensions import TypeIs, TypeVar

from conductor.errors import ColumnNotCaptured, RowAbsent
from conductor.rows import TableName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from conductor.definitions import EventDefinition
    from conductor.matching import Operation

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True, default=Any)
Row_co = TypeVar("Row_co", covariant=True, default=dict[str, JsonValue])


@dataclass(slots=True)
class Invocation(Generic[P_co]):
    """The task was invoked, with this payload."""

    payload: P_co


@dataclass(slots=True)
class Emitted(Generic[P_co]):
    """A custom event was emitted."""

    name: str
    payload: P_co


@dataclass(slots=True)
class Tick:
    """A schedule fired. ``scheduled_at`` is the instant it stands for, in UTC."""

    schedule: str
    scheduled_at: datetime


def is_event(event: object, definition: EventDefinition[P]) -> TypeIs[Emitted[P]]:
    """Return whether ``event`` is an emitted one of this definition; checkers narrow by it.

    if is_event(event, user_created):
        event.payload.email
    """
    return isinstance(event, Emitted) and event.name == definition.name


@dataclass(slots=True)
class Lacking:
    """What `new` of a change lacks of its row, for a trigger that has it read again.

    ``read`` makes a row of values by column; ``gone``: the row was not found. ``source``: where its
    table is.
    """

    columns: tuple[str, ...]
    values: dict[str, Any]
    read: Callable[[dict[str, Any], bool], Any]
    source: str = "default"


class Change(ABC, Generic[Row_co]):
    """One committed change of a captured table.

    ``commit_time`` is the source's; ``commit_lsn`` (``0/16B3748``) orders transactions of one
    source. Columns the change does not carry raise when they are read, see `conductor.rows`.

    ``refetched``: some columns of `new` were read from the table when this run began, and may be
    newer than the change (see `OnChange`). ``gone``: they were to be, and the row was not there.
    """

    __slots__ = (
        "_changed",
        "_new",
        "_old",
        "commit_lsn",
        "commit_time",
        "gone",
        "lacking",
        "refetched",
        "schema",
        "table",
    )

    def __init__(
        self,
        *,
        schema: str,
        table: str,
        commit_time: datetime,
        commit_lsn: str,
        new: Row_co | None = None,
        old: Row_co | None = None,
        changed: frozenset[str] | None = None,
        lacking: Lacking | None = None,
    ) -> None:
        self.schema = schema
        self.table = table
        self.commit_time = commit_time
        self.commit_lsn = commit_lsn
        self._new = new
        self._old = old
        self._changed = changed
        self.lacking = lacking
        self.refetched = False
        self.gone = False

    def complete(self, found: dict[str, Any] | None) -> None:
        """Take the columns that were lacking, as they are now; None: the row is not there."""
        lacking, self.lacking = self.lacking, None
        if lacking is not None:
            self.refetched, self.gone = found is not None, found is None
            self._new = lacking.read({**lacking.values, **(found or {})}, self.gone)

    @property
    @abstractmethod
    def op(self) -> Operation:
        """The operation: insert, update, delete or truncate."""

    @property
    def new(self) -> Row_co:
        """The row after the change. Raises RowAbsent for a delete and a truncate."""
        return self._row("new", self._new)

    @property
    def old(self) -> Row_co:
        """The row before the change; its key alone unless the table has REPLICA IDENTITY FULL.

        Raises RowAbsent for an insert and a truncate.
        """
        return self._row("old", self._old)

    @property
    def changed(self) -> frozenset[str]:
        """The columns an update changed; needs REPLICA IDENTITY FULL, else ColumnNotCaptured.

        Empty for other operations.
        """
        return frozenset()

    def _row(self, which: str, row: Row_co | None) -> Row_co:
        if row is None:
            raise self._absent(which)
        return row

    def _absent(self, which: str) -> RowAbsent:
        return RowAbsent(f"{self.op} of {self.schema}.{self.table} has no {which} row")

    def __repr__(self) -> str:
        """Return where the change is from; rows may be secret and are left out."""
        return f"{type(self).__name__}({self.schema}.{self.table} at {self.commit_lsn})"


Change_co = TypeVar("Change_co", bound=Change[Any], covariant=True, default=Change[Any])


class Insert(Change[Row_co]):
    """A row was inserted."""

    __slots__ = ()

    @property
    def op(self) -> Literal["insert"]:
        """The operation."""
        return "insert"

    @property
    def old(self) -> Never:
        """An insert has none: raises RowAbsent."""
        raise self._absent("old")


class Update(Change[Row_co]):
    """A row was updated."""

    __slots__ = ()

    @property
    def op(self) -> Literal["update"]:
        """The operation."""
        return "update"

    @property
    def changed(self) -> frozenset[str]:
        """The columns that differ. Raises ColumnNotCaptured without REPLICA IDENTITY FULL."""
        if self._changed is None:
            raise ColumnNotCaptured(
                f"which columns of {self.schema}.{self.table} changed is not known",
                hint=f"alter table {TableName(self.schema, self.table)} replica identity full",
            )
        return self._changed


class Delete(Change[Row_co]):
    """A row was deleted."""

    __slots__ = ()

    @property
    def op(self) -> Literal["delete"]:
        """The operation."""
        return "delete"

    @property
    def new(self) -> Never:
        """A delete has none: raises RowAbsent."""
        raise self._absent("new")


class Truncate(Change[Row_co]):
    """The table was truncated."""

    __slots__ = ("cascade", "restart_identity")

    def __init__(
        self,
        *,
        schema: str,
        table: str,
        commit_time: datetime,
        commit_lsn: str,
        cascade: bool = False,
        restart_identity: bool = False,
    ) -> None:
        super().__init__(schema=schema, table=table, commit_time=commit_time, commit_lsn=commit_lsn)
        self.cascade = cascade
        self.restart_identity = restart_identity

    @property
    def op(self) -> Literal["truncate"]:
        """The operation."""
        return "truncate"

    @property
    def new(self) -> Never:
        """A truncate has none: raises RowAbsent."""
        raise self._absent("new")

    @property
    def old(self) -> Never:
        """A truncate has none: raises RowAbsent."""
        raise self._absent("old")


@dataclass(slots=True)
class Transaction(Generic[Change_co]):
    """The changes of one table that one committed transaction made, in order, as far as wanted.

    A transaction beyond 10,000 changes or 4 MiB of them comes in parts, a job each: ``part`` counts
    from 0, and ``is_last`` tells the one that completes it.
    """

    changes: tuple[Change_co, ...]
    part: int = 0
    is_last: bool = True

    @property
    def commit_time(self) -> datetime:
        """When it was committed, by the source's clock."""
        return self.changes[0].commit_time

    @property
    def commit_lsn(self) -> str:
        """Its position (``0/16B3748``), which orders transactions of one source."""
        return self.changes[0].commit_lsn

    def __iter__(self) -> Iterator[Change_co]:
        """Iterate over the changes."""
        return iter(self.changes)

    def __len__(self) -> int:
        """Return how many changes there are."""
        return len(self.changes)
