"""What subscriptions want of the source's publications, and why some of them cannot have it.

Pure. Nothing is accepted that would make an application's write fail (updates of a table without
usable replica identity), or that the WAL does not hold.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Final

from cdc.catalog import Table, TableName
from cdc.errors import CdcError, ColumnUnknown, ReplicaIdentityMissing, TableUnknown
from conductor.matching import ChangeFilter, Subscription

EVERY_PUBLICATION: Final = -1
"""Carried: whatever the publications are."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A subscription, whether it has begun to route, and whether it is to end.

    One that has begun needs its table published, unless it is to end anyway.
    """

    subscription: Subscription
    started: bool = False
    retired: bool = False

    @property
    def filter(self) -> ChangeFilter:
        """Which changes it wants. The publication is about tables, so about nothing else."""
        if not isinstance(self.subscription.filter, ChangeFilter):
            raise TypeError(f"subscription {self.subscription.id} is not about changes")
        return self.subscription.filter

    @property
    def table(self) -> TableName:
        """Schema and table."""
        return (self.filter.schema, self.filter.table)

    @property
    def is_insert_only(self) -> bool:
        """Whether it wants neither updates nor deletes: an identity of the rows is not needed."""
        return self.filter.is_insert_only


@dataclass(frozen=True, slots=True)
class Past:
    """What the queue knows about the tables from before.

    `named`: those that a subscription has ever named. No other is taken out: somebody else put it
    in, perhaps for a subscriber of theirs. `interrupted`: captured ones whose gap is open already;
    putting them back is no news. `memberships`: how captured ones were published when last seen
    (see `Publication.memberships`); `insert_memberships`: those of the insert-only publication.
    `applied`: by which membership what operators narrow was published, and with which condition
    ("" for none). `carried`: the OID of the insert-only publication with which a stream was started
    (so every later one is), or `EVERY_PUBLICATION`.
    """

    named: Collection[TableName] = ()
    interrupted: Collection[TableName] = ()
    memberships: Mapping[TableName, int] = field(default_factory=dict)
    insert_memberships: Mapping[TableName, int] = field(default_factory=dict)
    applied: Mapping[TableName, tuple[int, str]] = field(default_factory=dict)
    carried: int | None = None

    @property
    def is_blank(self) -> bool:
        """Whether there is no slot yet: of what operators narrow nothing can be remembered."""
        return self.carried == EVERY_PUBLICATION

    def carries(self, oid: int) -> bool:
        """Whether the stream carries the insert-only publication of that OID."""
        return self.carried in {oid, EVERY_PUBLICATION}


NO_PAST: Final = Past()


def why_missing(name: TableName, tables: Mapping[TableName, Table]) -> str | None:
    """Return what there is instead of a table ("" for nothing); None when it can be published."""
    table = tables.get(name)
    return "" if table is None else table.why_not_publishable


def refusal_of(
    wanted: Wanted, tables: Mapping[TableName, Table], known_names: Collection[str]
) -> CdcError | None:
    """Say why a subscription cannot begin; None when it can.

    Args:
        wanted: the subscription.
        tables: those of the wanted tables that exist.
        known_names: `schema.table` of every table there is, to name the nearest.
    """
    name = dotted(wanted.table)
    table = tables.get(wanted.table)
    if table is None:
        near = get_close_matches(name, known_names, n=3, cutoff=0.5)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        return TableUnknown(f"there is no table {name}{meant}")
    if problem := table.why_not_publishable:
        return TableUnknown(f"{name} cannot be captured: {problem}")
    if unknown := sorted(_columns(wanted.filter) - set(table.columns)):
        near = get_close_matches(unknown[0], table.columns, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        return ColumnUnknown(f"table {name} has no column {unknown[0]}{meant}")
    return _identity_refusal(wanted, table)


def _identity_refusal(wanted: Wanted, table: Table) -> CdcError | None:
    name = dotted(table.key)
    if not table.has_usable_identity and not wanted.is_insert_only:
        where = ", ".join(table.leaves_without_identity) or name
        return ReplicaIdentityMissing(
            f"updates and deletes of {name} would fail once published: "
            f"no usable replica identity on {where}",
            hint=f"add a primary key, or: alter table {where} replica identity full; "
            "or subscribe to inserts (and truncates) alone, which need none",
        )
    if wanted.filter.changed is not None and table.replica_identity != "f":
        return ReplicaIdentityMissing(
            f"`changed` needs the whole old row of {name}, which the WAL does not hold",
            hint=f"alter table {name} replica identity full (every update then logs the old row)",
        )
    return None


def _columns(wanted: ChangeFilter) -> set[str]:
    return {*(wanted.columns or ()), *(wanted.changed or ())}


def dotted(table: TableName) -> str:
    """Return `schema.table`."""
    return f"{table[0]}.{table[1]}"
