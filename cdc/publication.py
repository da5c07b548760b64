"""The publication: what the subscriptions need of it, what it has, and how to get there.

`plan` is a pure comparison, `apply_plan` runs its statements, `PublicationKeeper` does both. Whole
tables are published, with all operations and partitions as their root; projection and filters are
the router's. Nothing is published that could make an application's write fail (a table without
usable replica identity), and nothing of schema `conductor` ever is.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Final

import psycopg

from cdc import publication_queries, queries
from cdc.catalog import (
    Publication,
    Table,
    TableName,
    read_publication,
    read_table_names,
    read_tables,
)
from cdc.connection import Connection, one_line, source_error
from cdc.errors import (
    CdcError,
    ColumnUnknown,
    PrivilegeMissing,
    PublicationDrift,
    PublicationError,
    PublicationForeign,
    PublicationMissing,
    ReplicaIdentityMissing,
    TableMissing,
    TableUnknown,
)
from conductor.matching import ChangeFilter, Subscription

_TRY_LATER: Final = ("55P03", "40P01", "42710", "42704", "XX000")
"""A lock not had in time, or another sidecar that was faster: the next look will tell."""


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


@dataclass(frozen=True, slots=True)
class Past:
    """What the queue knows about the tables from before.

    `named`: those that a subscription has ever named. No other is taken out: somebody else put it
    in, perhaps for a subscriber of theirs. `interrupted`: captured ones whose gap is open already;
    putting them back is no news. `memberships`: how captured ones were published when last seen
    (see `Publication.memberships`).
    """

    named: Collection[TableName] = ()
    interrupted: Collection[TableName] = ()
    memberships: Mapping[TableName, int] = field(default_factory=dict)


_NO_PAST: Final = Past()


@dataclass(frozen=True, slots=True)
class Plan:
    """The way from the publication as it is to what the subscriptions need."""

    publication: str
    create: bool
    add: tuple[TableName, ...]
    drop: tuple[TableName, ...]
    restore: bool = False  # its options
    whole: tuple[TableName, ...] = ()  # published in part: with a filter or a list of columns
    refused: Mapping[int, CdcError] = field(default_factory=dict)  # by subscription id
    drift: tuple[str, ...] = ()  # what was captured, and is no longer as it must be
    misfit: tuple[str, ...] = ()  # what it leaves out, and nothing was captured through it yet
    missing: Mapping[TableName, TableMissing] = field(default_factory=dict)  # captured, and gone

    @property
    def statements(self) -> Sequence[queries.Statement]:
        """The statements, in order; one a table, so that one that is locked stops no other."""
        name = self.publication
        created = [publication_queries.create_publication(name)] if self.create else []
        added = [publication_queries.add_tables(name, [table]) for table in self.add]
        dropped = [publication_queries.drop_tables(name, [table]) for table in self.drop]
        restored = [publication_queries.restore_publication(name)] if self.restore else []
        for table in self.whole:
            restored.append(publication_queries.drop_tables(name, [table]))
            restored.append(publication_queries.add_tables(name, [table]))
        return created + restored + added + dropped

    @property
    def loss(self) -> CdcError | None:
        """Say as an error what was captured, and is captured no longer; None when nothing was."""
        if not self.drift:
            return None
        kind = PublicationMissing if self.create else PublicationDrift
        return kind(f"publication {self.publication!r} was changed: {'; '.join(self.drift)}")

    @property
    def refusal(self) -> CdcError | None:
        """Say as an error why nothing must begin through this publication; None when it may."""
        if not self.misfit:
            return None
        return PublicationDrift(
            f"publication {self.publication!r} was made by somebody else: {'; '.join(self.misfit)}",
            hint="nothing is lost yet: `cdc apply` makes it what subscriptions need, or choose "
            "another CDC_PUBLICATION",
        )


def plan(
    publication: str,
    wanted: Sequence[Wanted],
    actual: Publication | None,
    tables: Mapping[TableName, Table],
    known_names: Collection[str] = (),
    past: Past = _NO_PAST,
) -> Plan:
    """Compare the publication with what is wanted of it.

    Args:
        publication: its name.
        wanted: the subscriptions that route, or should.
        actual: the publication as it is; None when there is none.
        tables: those of the wanted tables that exist.
        known_names: `schema.table` of every table there is, to name the nearest.
        past: what was before.

    Raises:
        PublicationError: the publication cannot be used at all.
    """
    if actual is not None and (problem := _unusable(actual)):
        raise PublicationError(
            f"publication {publication!r} {problem}",
            hint="let cdc create one of its own: choose another CDC_PUBLICATION, or drop this one",
        )
    refused = {
        w.subscription.id: refusal
        for w in wanted
        if not w.started and (refusal := _refusal(w, tables, known_names))
    }
    accepted = [w for w in wanted if w.subscription.id not in refused]
    needed = {w.table for w in accepted if _why_missing(w.table, tables) is None}
    published = _published(actual, needed)
    missing = _missing(wanted, tables)
    captured = {w.table for w in wanted if w.started and not w.retired} - missing.keys()
    partial = set() if actual is None else actual.partial_tables & needed
    idle = set() if actual is None else (actual.table_names - needed).intersection(past.named)
    return Plan(
        publication=publication,
        create=actual is None,
        add=tuple(sorted(needed - published)),
        drop=tuple(sorted(idle)),
        restore=actual is not None and not actual.publishes_all,
        whole=tuple(sorted(partial)),
        refused=refused,
        drift=tuple(_drift(publication, captured - set(past.interrupted), actual, published, past)),
        misfit=tuple(_misfit(wanted, actual)),
        missing=missing,
    )


async def apply_plan(connection: Connection, plan: Plan) -> CdcError | None:
    """Run a plan's statements, each for itself; return why one of them could not be, if so.

    What fails for a lock that was not had in time is left for the next look.

    Raises:
        PrivilegeMissing: there is no publication, and the role may not create it.
        SourceUnavailable: the connection was lost.
    """
    obstacle: CdcError | None = None
    for number, statement in enumerate(plan.statements):
        try:
            await connection.execute(statement)
        except psycopg.errors.InsufficientPrivilege as error:
            obstacle = PrivilegeMissing(
                f"the publication cannot be changed: {one_line(error)}",
                hint=f"let the owner run: {statement.as_string(connection)}",
            )
            if plan.create and number == 0:
                raise obstacle from error
        except psycopg.Error as error:
            if error.sqlstate not in _TRY_LATER:
                raise source_error(error) from error
    return obstacle


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What the publication carries after a look at it, and what it cannot carry."""

    published: Mapping[TableName, int]  # wanted and published tables: their OIDs
    refused: Mapping[int, CdcError]  # by subscription id
    obstacle: CdcError | None = None  # why it could not be changed as planned
    loss: CdcError | None = None  # what was captured no longer, and was tolerated
    missing: Mapping[TableName, TableMissing] = field(default_factory=dict)  # captured, and gone
    memberships: Mapping[TableName, int] = field(default_factory=dict)  # of the published ones


@dataclass(frozen=True, slots=True)
class PublicationKeeper:
    """Looks at the publication and brings it to what is wanted, as far as it may.

    Args:
        name: the publication.
        connection: an ordinary connection to the source database.
        manage: off: change nothing, only say which statements are missing.
        tolerate_missing: go on without a captured table that is gone.
    """

    name: str
    connection: Connection
    manage: bool = True
    tolerate_missing: bool = False

    async def reconcile(
        self,
        wanted: Sequence[Wanted],
        *,
        past: Past = _NO_PAST,
        tolerate_drift: bool = False,
    ) -> Reconciled:
        """Compare, change, and look again.

        Args:
            wanted: the subscriptions that route, or should.
            past: what was before.
            tolerate_drift: put right what somebody else changed (its gap is recorded already).

        Raises:
            PublicationMissing, PublicationDrift, TableMissing: what was captured is captured no
                longer, or would not be captured whole.
            PublicationError, PrivilegeMissing: there is no publication that could be used.
        """
        change, actual, tables = await self._compare(wanted, past)
        loss = change.loss or change.refusal
        if loss is not None and not tolerate_drift:
            raise loss
        if change.missing and not self.tolerate_missing:
            raise next(iter(change.missing.values()))
        self._refuse_foreign(wanted, change, actual)
        obstacle = await self._apply(change)
        if change.statements:
            actual = await read_publication(self.connection, self.name)
        needed = {w.table for w in wanted if w.subscription.id not in change.refused}
        whole = _whole(actual, needed) - change.missing.keys()
        published = {t: tables[t].oid for t in whole if t in tables}
        memberships = {} if actual is None else actual.memberships(published)
        return Reconciled(published, change.refused, obstacle, loss, change.missing, memberships)

    async def plan(self, wanted: Sequence[Wanted], *, past: Past = _NO_PAST) -> Plan:
        """Compare, and change nothing (raises PublicationError as `reconcile` does)."""
        change, _, _ = await self._compare(wanted, past)
        return change

    async def _compare(
        self, wanted: Sequence[Wanted], past: Past
    ) -> tuple[Plan, Publication | None, Mapping[TableName, Table]]:
        names = {w.table for w in wanted}
        tables = await read_tables(self.connection, names)
        known = () if len(tables) == len(names) else await read_table_names(self.connection)
        actual = await read_publication(self.connection, self.name)
        change = plan(self.name, wanted, actual, tables, known, past)
        return change, actual, tables

    def _refuse_foreign(
        self, wanted: Sequence[Wanted], change: Plan, actual: Publication | None
    ) -> None:
        """Refuse to begin with a publication of somebody else that cannot be changed as it must."""
        if actual is None or actual.owned or not self.manage or not change.statements:
            return
        if any(w.started for w in wanted):  # what is captured goes on: the obstacle is told
            return
        statements = "; ".join(s.as_string(self.connection) for s in change.statements)
        raise PublicationForeign(
            f"publication {self.name!r} belongs to another role, and lacks: {statements}"
        )

    async def _apply(self, change: Plan) -> CdcError | None:
        if self.manage or not change.statements:
            return await apply_plan(self.connection, change)
        statements = "; ".join(s.as_string(self.connection) for s in change.statements)
        obstacle = PublicationError(
            f"publication {self.name!r} is not as the subscriptions need it, "
            "and CDC_MANAGE_PUBLICATION is off",
            hint=f"run `cdc apply` with CDC_ADMIN_DSN, or let its owner run: {statements}",
        )
        if change.create:
            raise obstacle
        return obstacle


def _unusable(actual: Publication) -> str | None:
    if actual.all_tables:
        return "is FOR ALL TABLES, which makes updates of tables without a key fail"
    if "conductor" in actual.schemas or any(t.schema == "conductor" for t in actual.tables):
        return "publishes the queue itself (schema conductor)"
    return None


def _published(actual: Publication | None, needed: Collection[TableName]) -> set[TableName]:
    if actual is None:
        return set()
    by_schema = {table for table in needed if table[0] in actual.schemas}
    return set(actual.table_names) | by_schema


def _whole(actual: Publication | None, needed: Collection[TableName]) -> set[TableName]:
    """Return what it publishes without leaving anything out."""
    if actual is None or not actual.publishes_all:
        return set()
    return _published(actual, needed) - actual.partial_tables


def _drift(
    name: str,
    captured: Collection[TableName],
    actual: Publication | None,
    published: Collection[TableName],
    past: Past,
) -> list[str]:
    """Say what is missing from what was captured already: changes of it are being lost."""
    if not captured:
        return []
    if actual is None:
        return [f"publication {name} is gone"]
    drift = [f"table {_dotted(t)} is not in it" for t in sorted(set(captured) - set(published))]
    for table in actual.tables:
        if table.key in captured and table.has_row_filter:
            drift.append(f"table {_dotted(table.key)} has a row filter")
        if table.key in captured and table.has_column_list:
            drift.append(f"table {_dotted(table.key)} has a column list")
    now = actual.memberships(set(captured) - actual.partial_tables)
    drift += [
        f"table {_dotted(t)} was taken out of it and put back"
        for t in sorted(now)
        if past.memberships.get(t, now[t]) != now[t]
    ]
    return drift + _left_out(actual)


def _misfit(wanted: Sequence[Wanted], actual: Publication | None) -> list[str]:
    """Say what a publication leaves out through which nothing has been captured yet.

    Once something was, that is drift. What only has to end needs nothing of it.
    """
    if actual is None or any(w.started for w in wanted):
        return []
    return _left_out(actual)


def _left_out(actual: Publication) -> list[str]:
    """Say what it publishes of no table."""
    left_out = []
    if not actual.all_operations:
        left_out.append("it does not publish every operation")
    if not actual.via_root:
        left_out.append("publish_via_partition_root is off")
    return left_out


def _missing(
    wanted: Sequence[Wanted], tables: Mapping[TableName, Table]
) -> dict[TableName, TableMissing]:
    """Return an error for each captured table that is gone, or cannot be captured any more."""
    tasks: dict[TableName, set[str]] = {}
    for w in wanted:
        if w.started and not w.retired and _why_missing(w.table, tables) is not None:
            tasks.setdefault(w.table, set()).add(w.subscription.task)
    return {
        table: TableMissing(table, sorted(tasks[table]), _why_missing(table, tables))
        for table in sorted(tasks)
    }


def _why_missing(name: TableName, tables: Mapping[TableName, Table]) -> str | None:
    """Return what there is instead of a table ("" for nothing); None when it can be published."""
    table = tables.get(name)
    return "" if table is None else table.why_not_publishable


def _refusal(
    wanted: Wanted, tables: Mapping[TableName, Table], known_names: Collection[str]
) -> CdcError | None:
    """Say why a subscription cannot begin; None when it can."""
    name = _dotted(wanted.table)
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
    return _identity_refusal(wanted.filter, table)


def _identity_refusal(wanted: ChangeFilter, table: Table) -> CdcError | None:
    name = _dotted(table.key)
    if not table.has_usable_identity:
        where = ", ".join(table.leaves_without_identity) or name
        return ReplicaIdentityMissing(
            f"updates and deletes of {name} would fail once published: "
            f"no usable replica identity on {where}",
            hint=f"add a primary key, or: alter table {where} replica identity full",
        )
    if wanted.changed is not None and table.replica_identity != "f":
        return ReplicaIdentityMissing(
            f"`changed` needs the whole old row of {name}, which the WAL does not hold",
            hint=f"alter table {name} replica identity full (every update then logs the old row)",
        )
    return None


def _columns(wanted: ChangeFilter) -> set[str]:
    return {*(wanted.columns or ()), *(wanted.changed or ())}


def _dotted(table: TableName) -> str:
    return f"{table[0]}.{table[1]}"
