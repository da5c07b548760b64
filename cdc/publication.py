"""The publications: what the subscriptions need of them, what they have, and how to get there.

`plan` is a pure comparison, `apply_plan` runs its statements, `PublicationKeeper` does both. Whole
tables are published, with all operations and partitions as their root; projection and filters are
the router's. Nothing is published that could make an application's write fail: the updates of a
table without usable replica identity are not, its inserts are by the second publication
(`insert_only`). Nothing of schema `conductor` ever is.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import psycopg

from cdc import publication_queries, queries
from cdc.catalog import (
    Publication,
    Table,
    TableName,
    publication_names,
    read_publications,
    read_table_names,
    read_tables,
)
from cdc.connection import Connection, one_line, source_error
from cdc.errors import (
    CdcError,
    PrivilegeMissing,
    PublicationDrift,
    PublicationError,
    PublicationForeign,
    PublicationMissing,
    TableMissing,
)
from cdc.insert_only import NO_INSERT_PLAN, InsertPlan, plan_inserts
from cdc.narrowing import WHOLE_TABLES, Definitions, Narrowing, part_of, settle
from cdc.wanted import NO_PAST, Past, Wanted, dotted, refusal_of, why_missing

_TRY_LATER: Final = ("55P03", "40P01", "42710", "42704", "XX000")
"""A lock not had in time, or another sidecar that was faster: the next look will tell."""

_WRONG: Final = ("42", "0A", "22")
"""A condition that is not SQL, or not of the table, or not allowed there."""


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
    inserts: InsertPlan = NO_INSERT_PLAN  # what becomes of the second publication

    @property
    def statements(self) -> Sequence[queries.Statement]:
        """The statements, in order; one a table, so that one that is locked stops no other."""
        name, definitions = self.publication, self.inserts.main_definitions
        created = [publication_queries.create_publication(name)] if self.create else []
        added = [
            publication_queries.add_table(name, table, part_of(definitions, table))
            for table in self.add
        ]
        dropped = [publication_queries.drop_tables(name, [table]) for table in self.drop]
        restored = [publication_queries.restore_publication(name)] if self.restore else []
        restored += [
            publication_queries.move_table(table, name, name, part_of(definitions, table))
            for table in self.whole
        ]
        return [*created, *restored, *added, *dropped, *self.inserts.statements]

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
    past: Past = NO_PAST,
    inserts: Publication | None = None,
    *,
    is_carried: bool = False,
    narrowing: Narrowing = WHOLE_TABLES,
    trusts: bool = True,
) -> Plan:
    """Compare our publications with what is wanted of them.

    Args:
        publication: its name.
        wanted: the subscriptions that route, or should.
        actual: the publication as it is; None when there is none.
        tables: those of the wanted tables that exist.
        known_names: `schema.table` of every table there is, to name the nearest.
        past: what was before.
        inserts: the second publication as it is; None when there is none.
        is_carried: the stream carries the second publication.
        narrowing: what operators chose to leave out of tables.
        trusts: see `settle`.

    Raises:
        PublicationError: a publication cannot be used at all.
    """
    _refuse_unusable(actual, inserts)
    actual = settle(actual, narrowing.in_main(tables), past.applied, trusts=trusts)
    inserts = settle(inserts, narrowing.in_inserts(tables), past.applied, trusts=trusts)
    refused = _refused(wanted, tables, known_names, narrowing)
    accepted = [w for w in wanted if w.subscription.id not in refused]
    names = publication_names(publication)
    second = plan_inserts(
        names, accepted, actual, inserts, tables, past, is_carried=is_carried, narrowing=narrowing
    )
    all_needed = {w.table for w in accepted if why_missing(w.table, tables) is None}
    needed = all_needed - second.tables
    published = _published(actual, needed)
    missing = _missing(wanted, tables)
    captured = {w.table for w in wanted if w.started and not w.retired}
    captured -= missing.keys() | second.captured | set(past.interrupted)
    return Plan(
        publication=publication,
        create=actual is None,
        add=tuple(sorted(needed - published.union(second.to_main))),
        drop=_idle(actual, inserts, all_needed, second, past),
        restore=actual is not None and not actual.publishes_all,
        whole=() if actual is None else actual.to_mend(needed),
        refused=refused,
        drift=(*_drift(publication, captured, actual, published, past), *second.drift),
        misfit=tuple(_misfit(wanted, actual)),
        missing=missing,
        inserts=second,
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
            await _execute(connection, statement)
        except psycopg.errors.InsufficientPrivilege as error:
            obstacle = PrivilegeMissing(
                f"the publication cannot be changed: {one_line(error)}",
                hint=f"let the owner run: {statement.as_string(connection)}",
            )
            if plan.create and number == 0:
                raise obstacle from error
        except psycopg.Error as error:
            if error.sqlstate in _TRY_LATER:
                continue
            if (error.sqlstate or "")[:2] not in _WRONG:
                raise source_error(error) from error
            obstacle = PublicationError(
                f"the publication cannot be changed: {one_line(error)}",
                hint=f"is CDC_ROW_FILTERS right? {statement.as_string(connection)}",
            )
    return obstacle


async def _execute(connection: Connection, statement: queries.Statement) -> None:
    """Run a statement, or several in one transaction: all of them or none."""
    try:
        await connection.execute(statement)
    finally:
        if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
            await connection.rollback()


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What the publications carry after a look at them, and what they cannot carry.

    `published` has the tables of both; `inserts` those of the second, whose OID is `inserts_oid`
    (None: there is none). `needs_inserts`: a table is for it. `captured_inserts`: what has begun
    through it.
    """

    published: Mapping[TableName, int]  # wanted and published tables: their OIDs
    refused: Mapping[int, CdcError]  # by subscription id
    obstacle: CdcError | None = None  # why it could not be changed as planned
    loss: CdcError | None = None  # what was captured no longer, and was tolerated
    missing: Mapping[TableName, TableMissing] = field(default_factory=dict)  # captured, and gone
    memberships: Mapping[TableName, int] = field(default_factory=dict)  # of the published ones
    inserts: frozenset[TableName] = frozenset()
    inserts_oid: int | None = None
    needs_inserts: bool = False
    insert_memberships: Mapping[TableName, int] = field(default_factory=dict)
    captured_inserts: frozenset[TableName] = frozenset()
    applied: Mapping[TableName, tuple[int, str]] = field(default_factory=dict)


def _carries_none(_: int) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class PublicationKeeper:
    """Looks at the publications and brings them to what is wanted, as far as it may.

    Args:
        name: the main publication; the second one is named after it.
        connection: an ordinary connection to the source database.
        manage: off: change nothing, only say which statements are missing.
        tolerate_missing: go on without a captured table that is gone.
        narrowing: what operators chose to leave out of tables.
    """

    name: str
    connection: Connection
    manage: bool = True
    tolerate_missing: bool = False
    narrowing: Narrowing = WHOLE_TABLES

    async def reconcile(
        self,
        wanted: Sequence[Wanted],
        *,
        past: Past = NO_PAST,
        tolerate_drift: bool = False,
        carries: Callable[[int], bool] = _carries_none,
    ) -> Reconciled:
        """Compare, change, and look again.

        Args:
            wanted: the subscriptions that route, or should.
            past: what was before.
            carries: whether the stream carries a second publication of that OID.
            tolerate_drift: put right what somebody else changed (its gap is recorded already).

        Raises:
            PublicationMissing, PublicationDrift, TableMissing: what was captured is captured no
                longer, or would not be captured whole.
            PublicationError, PrivilegeMissing: there is no publication that could be used.
        """
        change, found, tables = await self._compare(wanted, past, carries)
        loss = change.loss or change.refusal
        if loss is not None and not tolerate_drift:
            raise loss
        if change.missing and not self.tolerate_missing:
            raise next(iter(change.missing.values()))
        self._refuse_foreign(wanted, change, found.get(self.name))
        obstacle = await self._apply(change) or self.narrowing.why_unfit(tables)
        if change.statements:
            found = await read_publications(self.connection, publication_names(self.name))
        needed = {w.table for w in wanted if w.subscription.id not in change.refused}
        needed = {table for table in needed - change.missing.keys() if table in tables}
        main, second = self._settled(found, tables)
        inserts = _insert_only(second, needed)
        whole = _whole(main, needed) & needed
        captured = change.inserts.captured & inserts
        return Reconciled(
            published={t: tables[t].oid for t in whole | inserts},
            refused=change.refused,
            obstacle=obstacle,
            loss=loss,
            missing=change.missing,
            memberships={} if main is None else main.memberships(whole),
            inserts=inserts - whole,
            inserts_oid=None if second is None else second.oid,
            needs_inserts=change.inserts.is_needed or bool(inserts - whole),
            insert_memberships={} if second is None else second.memberships(inserts - whole),
            captured_inserts=captured,
            applied=self._applied(found, tables, past),
        )

    def _by_publication(
        self, found: Mapping[str, Publication], tables: Mapping[TableName, Table]
    ) -> list[tuple[Publication | None, Definitions]]:
        main, second = (found.get(name) for name in publication_names(self.name))
        return [
            (main, self.narrowing.in_main(tables)),
            (second, self.narrowing.in_inserts(tables)),
        ]

    def _settled(
        self, found: Mapping[str, Publication], tables: Mapping[TableName, Table]
    ) -> list[Publication | None]:
        pairs = self._by_publication(found, tables)
        return [settle(publication, definitions, {}) for publication, definitions in pairs]

    def _applied(
        self, found: Mapping[str, Publication], tables: Mapping[TableName, Table], past: Past
    ) -> dict[TableName, tuple[int, str]]:
        """Return by which membership tables are narrowed, and with which condition."""
        applied = {}
        for publication, definitions in self._by_publication(found, tables):
            settled = settle(publication, definitions, past.applied)
            if publication is None or settled is None:
                continue
            for table in publication.tables:
                key = table.key
                if key in settled.outdated_tables and key in past.applied:
                    applied[key] = past.applied[key]
                elif key in definitions and key not in settled.outdated_tables:
                    applied[key] = (table.membership, definitions[key].condition or "")
        return applied

    async def plan(self, wanted: Sequence[Wanted], *, past: Past = NO_PAST) -> Plan:
        """Compare, and change nothing (raises PublicationError as `reconcile` does)."""
        change, _, _ = await self._compare(wanted, past, past.carries)
        return change

    async def _compare(
        self, wanted: Sequence[Wanted], past: Past, carries: Callable[[int], bool]
    ) -> tuple[Plan, Mapping[str, Publication], Mapping[TableName, Table]]:
        names = {w.table for w in wanted}
        tables = await read_tables(self.connection, names)
        known = () if len(tables) == len(names) else await read_table_names(self.connection)
        found = await read_publications(self.connection, publication_names(self.name))
        main, second = (found.get(name) for name in publication_names(self.name))
        is_carried = second is not None and carries(second.oid)
        change = plan(
            self.name,
            wanted,
            main,
            tables,
            known,
            past,
            second,
            is_carried=is_carried,
            narrowing=self.narrowing,
            # before there is a slot nothing is remembered: define it anew, if that is ours to do
            trusts=not (self.manage and past.is_blank),
        )
        return change, found, tables

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


def _refuse_unusable(*publications: Publication | None) -> None:
    for found in publications:
        if found is not None and (problem := _unusable(found)):
            raise PublicationError(
                f"publication {found.name!r} {problem}",
                hint="let cdc create one of its own: choose another CDC_PUBLICATION, or drop this "
                "one",
            )


def _refused(
    wanted: Sequence[Wanted],
    tables: Mapping[TableName, Table],
    known_names: Collection[str],
    narrowing: Narrowing,
) -> dict[int, CdcError]:
    """Return why subscriptions cannot begin, by their ids."""
    refused = {}
    for w in wanted:
        refusal = refusal_of(w, tables, known_names)
        refusal = refusal or narrowing.refusal_of(w, tables.get(w.table))
        if refusal is not None and not w.started:
            refused[w.subscription.id] = refusal
    return refused


def _idle(
    actual: Publication | None,
    inserts: Publication | None,
    needed: Collection[TableName],
    second: InsertPlan,
    past: Past,
) -> tuple[TableName, ...]:
    """Return what the main publication has for nobody, or what the second one has as well."""
    if actual is None:
        return ()
    idle = (actual.table_names - set(needed)).intersection(past.named)
    in_both = set() if inserts is None else second.tables & inserts.table_names
    return tuple(sorted(idle | (actual.table_names & in_both)))


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


def _insert_only(second: Publication | None, needed: Collection[TableName]) -> frozenset[TableName]:
    """Return what the second publication publishes, of which it leaves nothing out."""
    if second is None or not second.publishes_inserts or not second.via_root:
        return frozenset()
    return (second.table_names - second.partial_tables).intersection(needed)


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
    drift = [f"table {dotted(t)} is not in it" for t in sorted(set(captured) - set(published))]
    for table in actual.tables:
        if table.key in captured and table.has_row_filter:
            drift.append(f"table {dotted(table.key)} has a row filter")
        if table.key in captured and table.has_column_list:
            drift.append(f"table {dotted(table.key)} has a column list")
    now = actual.memberships(set(captured) - actual.partial_tables)
    drift += [
        f"table {dotted(t)} was taken out of it and put back"
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
        if w.started and not w.retired and why_missing(w.table, tables) is not None:
            tasks.setdefault(w.table, set()).add(w.subscription.task)
    return {
        table: TableMissing(table, sorted(tasks[table]), why_missing(table, tables))
        for table in sorted(tasks)
    }
