"""The second publication: inserts and truncates of tables without usable replica identity.

The application's updates and deletes of such a table would fail once they were published; its
inserts and truncates never do. So a table whose subscriptions want nothing else is published here,
and a table is in exactly one of our publications. Pure: `publication` runs what is planned.

PostgreSQL documentation, "Logical Replication", "Publication": a table in a publication of updates
or deletes must have a replica identity; INSERT needs none.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from psycopg.sql import Composed

from cdc import publication_queries, queries
from cdc.catalog import Publication, Table, TableName
from cdc.narrowing import WHOLE_TABLES, Definitions, Narrowing, part_of
from cdc.wanted import Past, Wanted, dotted


@dataclass(frozen=True, slots=True)
class InsertPlan:
    """What becomes of the second publication, and which tables are its own."""

    publication: str
    main: str
    tables: frozenset[TableName] = frozenset()  # published by it, or to be
    captured: frozenset[TableName] = frozenset()  # begun to be captured through it
    is_needed: bool = False
    create: bool = False
    restore: bool = False  # its options
    whole: tuple[TableName, ...] = ()  # published in part: with a filter or a list of columns
    add: tuple[TableName, ...] = ()
    drop: tuple[TableName, ...] = ()
    from_main: tuple[TableName, ...] = ()
    to_main: tuple[TableName, ...] = ()
    drift: tuple[str, ...] = ()
    definitions: Definitions = field(default_factory=dict)  # of what is not published whole
    main_definitions: Definitions = field(default_factory=dict)  # in the main publication

    @property
    def statements(self) -> Sequence[queries.Statement]:
        """The statements, in order; for when the main publication is there."""
        name = self.publication
        created = [publication_queries.create_insert_only(name)] if self.create else []
        restored = [publication_queries.restore_insert_only(name)] if self.restore else []
        restored += [self._move(table, name, name) for table in self.whole]
        moved = [self._move(table, self.main, name) for table in self.from_main]
        moved += [self._move(table, name, self.main) for table in self.to_main]
        added = [
            publication_queries.add_table(name, table, part_of(self.definitions, table))
            for table in self.add
        ]
        dropped = [publication_queries.drop_tables(name, [table]) for table in self.drop]
        return created + restored + moved + added + dropped

    def _move(self, table: TableName, source: str, target: str) -> Composed:
        definitions = self.main_definitions if target == self.main else self.definitions
        part = part_of(definitions, table)
        return publication_queries.move_table(table, source, target, part)


NO_INSERT_PLAN: Final = InsertPlan("", "")


def plan_inserts(
    names: tuple[str, str],
    wanted: Sequence[Wanted],
    main: Publication | None,
    inserts: Publication | None,
    tables: Mapping[TableName, Table],
    past: Past,
    *,
    is_carried: bool,
    narrowing: Narrowing = WHOLE_TABLES,
) -> InsertPlan:
    """Compare the second publication with what is wanted of it.

    Args:
        names: of the main publication and of the second one.
        wanted: the subscriptions that route, or may.
        main: the main publication as it is.
        inserts: the second one as it is.
        tables: those of the wanted tables that exist.
        past: what was before.
        is_carried: the stream carries the second publication: without that, no published table is
            moved to it.
        narrowing: what operators chose to leave out.
    """
    needed = {w.table for w in wanted if _is_publishable(w.table, tables)}
    candidates = _candidates(wanted, tables, main, narrowing) & needed
    in_main = frozenset[TableName]() if main is None else main.table_names
    in_inserts = frozenset[TableName]() if inserts is None else inserts.table_names
    # Also what has not begun: its mark may be in the log already, unstamped.
    own = candidates if is_carried else candidates - (in_main - in_inserts)
    others = needed - own
    in_both = frozenset[TableName]() if main is None else main.published(others & in_inserts)
    idle = (in_inserts - needed).intersection(past.named)
    captured = _captured(wanted, own, in_main, in_inserts) & needed
    return InsertPlan(
        publication=names[1],
        main=names[0],
        tables=own,
        captured=captured,
        is_needed=bool(candidates),
        create=inserts is None and bool(candidates),
        restore=inserts is not None and bool(own) and not inserts.is_insert_only,
        whole=() if inserts is None else inserts.to_mend(own),
        add=tuple(sorted(own - in_inserts - in_main)),
        drop=tuple(sorted(idle | in_both)),
        from_main=tuple(sorted(own & in_main - in_inserts)),
        to_main=tuple(sorted(others & in_inserts - in_both)),
        drift=tuple(_drift(names[1], captured.difference(past.interrupted), inserts, past)),
        definitions=narrowing.in_inserts(tables),
        main_definitions=narrowing.in_main(tables),
    )


def _is_publishable(name: TableName, tables: Mapping[TableName, Table]) -> bool:
    return name in tables and tables[name].why_not_publishable is None


def _candidates(
    wanted: Sequence[Wanted],
    tables: Mapping[TableName, Table],
    main: Publication | None,
    narrowing: Narrowing,
) -> frozenset[TableName]:
    """Return the tables that need no identity, and have none, or whose rows are to be filtered."""
    schemas = () if main is None else main.schemas
    greedy = {w.table for w in wanted if not w.is_insert_only}
    return frozenset(
        w.table
        for w in wanted
        if w.table not in greedy
        and w.table in tables
        and (w.table in narrowing.row_filters or not tables[w.table].has_usable_identity)
        and w.table[0] not in schemas
    )


def _captured(
    wanted: Sequence[Wanted],
    own: Collection[TableName],
    in_main: Collection[TableName],
    in_inserts: Collection[TableName],
) -> frozenset[TableName]:
    begun = [w for w in wanted if w.started and not w.retired]
    greedy = {w.table for w in begun if not w.is_insert_only}
    return frozenset(
        w.table
        for w in begun
        if w.table not in greedy
        and (w.table in in_inserts or (w.table in own and w.table not in in_main))
    )


def _drift(
    name: str,
    captured: Collection[TableName],
    inserts: Publication | None,
    past: Past,
) -> list[str]:
    """Say what is missing from what was captured through it: changes of it are being lost."""
    if not captured:
        return []
    if inserts is None:
        return [f"publication {name} is gone"]
    absent = sorted(set(captured) - inserts.table_names)
    drift = [f"table {dotted(t)} is not in {name}" for t in absent]
    drift += [
        f"table {dotted(t)} has a row filter or a column list in {name}"
        for t in sorted(inserts.partial_tables.intersection(captured))
    ]
    now = inserts.memberships(set(captured) - inserts.partial_tables)
    drift += [
        f"table {dotted(t)} was taken out of {name} and put back"
        for t in sorted(now)
        if past.insert_memberships.get(t, now[t]) != now[t]
    ]
    if not inserts.publishes_inserts:
        drift.append(f"{name} does not publish inserts and truncates")
    if not inserts.via_root:
        drift.append(f"publish_via_partition_root is off for {name}")
    return drift
