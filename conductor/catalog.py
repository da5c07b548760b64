"""Tables as the database's catalog describes them, and whether their changes can be captured.

Decided at registration, so that a table the stream could not name the rows of is never published
and a misspelt column is found before anything runs. Pure: facts in, an error or nothing out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from conductor import filters
from conductor.errors import ConductorError, FilterInvalid, RegistrationRefused, UnknownColumn
from conductor.filter_types import Kinds, check_operands, kinds_of_type
from conductor.filters import Filter
from conductor.matching import ChangeFilter

_KINDS: Final = {"v": "a view", "m": "a materialised view", "f": "a foreign table"}
_SYSTEM_SCHEMAS: Final = {"pg_catalog", "information_schema", "pg_toast"}
_FULL_COST: Final = (
    "every UPDATE and DELETE then writes the whole old row to the WAL, not only its key"
)


@dataclass(frozen=True, slots=True)
class Part:
    """A table, or one partition of it: what identifies its rows in the WAL.

    ``identity`` is ``pg_class.relreplident``: d(efault: the primary key), i(ndex), f(ull),
    n(othing). ``has_key``: the index it names exists, is valid and not deferrable. ``quoted`` is
    its name as SQL.
    """

    quoted: str
    identity: str
    has_key: bool
    key: tuple[str, ...] = ()  # the columns of that index

    @property
    def is_full(self) -> bool:
        """Whether an UPDATE or DELETE carries the whole old row."""
        return self.identity == "f"

    @property
    def is_usable(self) -> bool:
        """Whether the server accepts an UPDATE or DELETE once the table is published."""
        return self.is_full or self.has_key


@dataclass(frozen=True, slots=True)
class TableFacts:
    """One table a trigger names: ``parts`` holds itself first, then its lowest partitions.

    ``columns`` are those that the WAL holds, ``generated`` the others. ``key`` finds a row: the
    primary key's columns, else those of the replica identity's index. ``types`` are the OIDs of
    the columns' types, of a domain that of what it is over, 0 when that is a domain again.
    """

    kind: str  # pg_class.relkind
    persistence: str  # pg_class.relpersistence
    columns: tuple[str, ...]
    parts: tuple[Part, ...]
    generated: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, Kinds]:
        """What the router sends for each column, as far as a filter can tell."""
        found = {column: kinds_of_type(oid) for column, oid in self.types.items()}
        return {column: kinds for column, kinds in found.items() if kinds is not None}


def check_change(
    task: str, change: ChangeFilter, table: TableFacts, *, refetch: bool = False
) -> None:
    """Raise RegistrationRefused or UnknownColumn unless ``table`` gives what ``change`` wants."""
    for error in refusals(task, change, table, refetch=refetch):
        raise error


def refusals(
    task: str, change: ChangeFilter, table: TableFacts, *, refetch: bool = False
) -> Iterator[ConductorError]:
    """Yield every reason why ``table`` does not give what ``change`` wants.

    ``refetch``: jobs read its rows again.
    """
    where = f"task {task!r}: table {change.schema}.{change.table}"
    yield from _kind_refusals(where, table)
    when = None if change.when is None else filters.compile(change.when)
    read = when.references.row_columns if when is not None else frozenset()
    named = (*(change.columns or ()), *(change.changed or ()), *change.key)
    wanted = dict.fromkeys((*named, *sorted(read)))
    for column in wanted:
        if column in table.generated:
            yield RegistrationRefused(
                f"{where}: column {column!r} is generated, and the WAL does not hold it",
                hint="Leave it out, and compute it from the columns it is made of.",
            )
        elif column not in table.columns:
            yield UnknownColumn(
                column, table.columns, where=f"of {change.schema}.{change.table} (task {task!r})"
            )
    if change.changed is not None:
        yield from _full_refusals(where, "`changed`", table.parts)
    if when is not None:
        yield from _filter_refusals(where, when, change, table)
    if change.ordered or change.coalesce_s is not None:
        yield from _key_refusals(where, change, table.parts)
    if change.coalesce_s is not None and change.key:
        yield from _coalescing_refusals(where, change, table)
    if not change.is_insert_only:
        yield from _usable_refusals(where, table.parts)
    if refetch:
        yield from _refetch_refusals(where, change, table)


def _refetch_refusals(
    where: str, change: ChangeFilter, table: TableFacts
) -> Iterator[ConductorError]:
    if not table.key:
        yield RegistrationRefused(
            f"{where} has no key to read a row again by (refetch)",
            hint="Add a primary key, or leave refetch out.",
        )
    lacking = [c for c in table.key if change.columns is not None and c not in change.columns]
    if lacking:
        yield RegistrationRefused(
            f"{where}: to read a row again (refetch) a change must carry its key, and"
            f" {', '.join(map(repr, lacking))} is not captured",
            hint="Add it to the trigger's columns or to the row model.",
        )


def check_schema(task: str, change: ChangeFilter) -> None:
    """Raise RegistrationRefused for the queue's own tables, and for the server's.

    Each job would make jobs; and no publication takes a system catalogue.
    """
    if change.schema in _SYSTEM_SCHEMAS:
        raise RegistrationRefused(
            f"task {task!r}: tables of schema {change.schema} cannot be captured",
            hint="Subscribe to the application's tables.",
        )
    if change.schema == "conductor":
        raise RegistrationRefused(
            f"task {task!r}: tables of schema conductor cannot be captured",
            hint="Subscribe to the application's tables; jobs are in the view conductor.job.",
        )


def _kind_refusals(where: str, table: TableFacts) -> Iterator[ConductorError]:
    if table.kind in _KINDS:
        yield RegistrationRefused(
            f"{where} is {_KINDS[table.kind]}; only tables have changes",
            hint="Subscribe to the tables it reads.",
        )
    elif table.persistence != "p":
        kind = "temporary" if table.persistence == "t" else "unlogged"
        yield RegistrationRefused(
            f"{where} is {kind}: its changes are not in the WAL",
            hint=f"alter table {table.parts[0].quoted} set logged;"
            if kind == "unlogged"
            else "Subscribe to a permanent table.",
        )


def _filter_refusals(
    where: str, when: Filter, change: ChangeFilter, table: TableFacts
) -> Iterator[ConductorError]:
    """Refuse a filter that fits no column, or reads what the WAL does not hold of an old row."""
    read, parts = when.references, table.parts
    try:
        check_operands(when, table.kinds)
    except FilterInvalid as error:
        yield RegistrationRefused(f"{where}: {error}", hint=error.hint)
    if "update" in change.operations:
        for name, is_read in (("changed", read.reads_changed), ("old", "old" in read.names)):
            if is_read:
                yield from _full_refusals(where, f"the filter's `{name}`", parts)
    elif "delete" in change.operations:
        for column in sorted(read.columns["old"]):
            lacking = [part for part in parts if column not in part.key]
            yield from _full_refusals(where, f"the filter's `old.{column}`", lacking)


def _key_refusals(
    where: str, change: ChangeFilter, parts: tuple[Part, ...]
) -> Iterator[ConductorError]:
    """Refuse a key that the WAL does not hold of a row, or that is all of it."""
    if not change.key:
        if any(part.is_full or not part.has_key for part in parts):
            yield RegistrationRefused(
                f"{where}: its replica identity is no key, so that its jobs have none",
                hint='Name the columns: OnChange(…, key=("id",)).',
            )
    elif "delete" in change.operations:
        for column in change.key:
            lacking = [part for part in parts if column not in part.key]
            yield from _full_refusals(where, f"key {column!r} of a delete", lacking)


def _coalescing_refusals(
    where: str, change: ChangeFilter, table: TableFacts
) -> Iterator[ConductorError]:
    """Refuse a key that several rows can share: the change of one would take that of another."""
    named = set(change.key)
    identities = [table.key, *(part.key for part in table.parts[:1])]
    if not any(identity and named.issuperset(identity) for identity in identities):
        of = ", ".join(map(repr, table.key)) or "nothing: it has no key"
        yield RegistrationRefused(
            f"{where}: changes that coalesce are those of one row, and rows with the same"
            f" {', '.join(map(repr, change.key))} can be several; a row is told by {of}",
            hint="Name the row's key too, or leave `key` or `coalesce_s` out."
            if table.key
            else "Give the table a primary key, or leave `coalesce_s` out.",
        )


def _full_refusals(where: str, reader: str, parts: Iterable[Part]) -> Iterator[ConductorError]:
    lacking = [part for part in parts if not part.is_full]
    if lacking:
        yield RegistrationRefused(
            f"{where}: {reader} needs the old row, which the WAL holds only under"
            f" REPLICA IDENTITY FULL",
            hint=f"{_statements(lacking, 'full')} ({_FULL_COST})",
        )


def _usable_refusals(where: str, parts: Iterable[Part]) -> Iterator[ConductorError]:
    lacking = [part for part in parts if not part.is_usable]
    if lacking:
        yield RegistrationRefused(
            f"{where} has no usable replica identity: once published, the application's own"
            f" UPDATE and DELETE would fail",
            hint=f"Add a primary key, or {_statements(lacking, 'full')} ({_FULL_COST})."
            " Or subscribe to inserts (and truncates) alone: they need none.",
        )


def _statements(parts: list[Part], identity: str) -> str:
    return " ".join(f"alter table {part.quoted} replica identity {identity};" for part in parts)
