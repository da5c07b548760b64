"""What the source database says about itself: server, slot, tables, publication.

Plain facts as frozen values; judging them is the work of `publication`, `slots` and `check`.
Every function runs one statement on an ordinary autocommit connection and changes nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Self

from cdc import operator_queries, publication_queries, queries
from cdc.connection import Connection, source_errors
from cdc.errors import SourceUnavailable
from cdc.lsn import Lsn
from cdc.wire.messages import Type
from cdc.wire.wal2json import CatalogColumn, CatalogRequest, CatalogTable

TableName = tuple[str, str]
"""Schema and table."""

MINIMUM_VERSION: Final = 150000
_NAME_BYTES: Final = 63  # of an identifier: what is more is cut off
_KINDS: Final = {
    "v": "a view",
    "m": "a materialised view",
    "f": "a foreign table",
    "S": "a sequence",
}


@dataclass(frozen=True, slots=True)
class Server:
    """The source server, and what our role may do there."""

    version_number: int  # 150018 is 15.18
    version: str
    wal_level: str
    max_replication_slots: int
    used_replication_slots: int
    max_slot_wal_keep_bytes: int  # negative: unlimited
    synchronized_standby_slots: str | None
    in_recovery: bool
    database: str
    encoding: str
    role: str
    is_superuser: bool
    can_replicate: bool
    can_create: bool  # publications, in this database
    can_read_settings: bool = False  # those that are hidden from ordinary roles, like the next
    output_plugin_libraries: str | None = None  # which plugins may be used; None: any, or hidden
    synchronous_standby_names: str = ""
    physical_slots: int = 0  # of standbys, as a rule


@dataclass(frozen=True, slots=True)
class Slot:
    """One row of pg_replication_slots."""

    name: str
    plugin: str | None
    slot_type: str
    database: str | None
    temporary: bool
    two_phase: bool
    active_pid: int | None
    restart_lsn: Lsn | None
    confirmed_flush_lsn: Lsn | None
    wal_status: str | None  # reserved, extended, unreserved, lost
    safe_wal_bytes: int | None  # until it is lost; None: unlimited
    invalidation_reason: str | None  # from PostgreSQL 17
    failover: bool
    retained_bytes: int | None
    waits_for_standbys: bool = False  # its walsender does, at this moment

    @property
    def is_lost(self) -> bool:
        """Whether the server has given up what the slot needs."""
        return self.wal_status == "lost" or self.invalidation_reason is not None


@dataclass(frozen=True, slots=True)
class Table:
    """A relation of the source database, as far as publishing it is concerned."""

    schema: str
    name: str
    oid: int
    kind: str  # pg_class.relkind
    persistence: str  # p: permanent, u: unlogged, t: temporary
    replica_identity: str  # d: primary key, f: full, i: an index, n: nothing
    has_identity_index: bool
    owned: bool
    columns: tuple[str, ...]
    ancestors: tuple[str, ...]  # of a partition, the root first
    leaves_without_identity: tuple[str, ...]  # of a partitioned table
    identity_columns: tuple[str, ...] = ()  # of its index; none under the full identity

    @property
    def key(self) -> TableName:
        """Schema and name."""
        return (self.schema, self.name)

    @property
    def has_usable_identity(self) -> bool:
        """Whether UPDATE and DELETE go on working, on every partition, once it is published."""
        own = self.replica_identity == "f" or self.has_identity_index
        return own and not self.leaves_without_identity

    @property
    def why_not_publishable(self) -> str | None:
        """Why nothing of this relation can be in a publication; None when it can."""
        if self.schema in {"pg_catalog", "information_schema", "conductor"}:
            return f"schema {self.schema} is never published"
        if self.kind in _KINDS:
            return f"it is {_KINDS[self.kind]}"
        if self.persistence != "p":
            return "it is not a permanent (logged) table"
        return None


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table that the publication names."""

    schema: str
    name: str
    has_row_filter: bool
    has_column_list: bool
    membership: int = 0  # the OID of its row in pg_publication_rel: another one when put back
    columns: tuple[str, ...] | None = None  # of its list
    is_outdated: bool = False  # published otherwise than the operator's settings say

    @property
    def key(self) -> TableName:
        """Schema and name."""
        return (self.schema, self.name)


@dataclass(frozen=True, slots=True)
class Publication:
    """The publication as it is."""

    name: str
    all_tables: bool
    all_operations: bool
    via_root: bool
    owned: bool
    schemas: tuple[str, ...]
    tables: tuple[PublishedTable, ...]
    schema_memberships: tuple[int, ...] = ()  # as of a table, in pg_publication_namespace
    oid: int = 0
    publishes_inserts: bool = True  # and truncates
    publishes_updates: bool = True  # or deletes

    @property
    def table_names(self) -> frozenset[TableName]:
        """What it publishes, table by table."""
        return frozenset(table.key for table in self.tables)

    @property
    def partial_tables(self) -> frozenset[TableName]:
        """Of which it leaves out rows or columns."""
        return frozenset(
            table.key for table in self.tables if table.has_row_filter or table.has_column_list
        )

    @property
    def outdated_tables(self) -> frozenset[TableName]:
        """Those to be published anew, as the operator's settings say."""
        return frozenset(table.key for table in self.tables if table.is_outdated)

    def published(self, tables: Collection[TableName]) -> frozenset[TableName]:
        """Return which of these it publishes, by themselves or with their schema."""
        named = self.table_names
        return frozenset(t for t in tables if t in named or t[0] in self.schemas)

    def to_mend(self, tables: Collection[TableName]) -> tuple[TableName, ...]:
        """Return which of these are published in part, or otherwise than they should be."""
        return tuple(sorted((self.partial_tables | self.outdated_tables).intersection(tables)))

    def memberships(self, tables: Collection[TableName]) -> dict[TableName, int]:
        """Return by which row of the catalog it publishes each of these, as far as it does."""
        by_schema = dict(zip(self.schemas, self.schema_memberships, strict=False))
        by_table = {table.key: table.membership for table in self.tables}
        found = {table: by_table.get(table, by_schema.get(table[0])) for table in tables}
        return {table: membership for table, membership in found.items() if membership}

    @property
    def publishes_all(self) -> bool:
        """Whether every operation of every partition is published, as its root."""
        return self.all_operations and self.via_root

    @property
    def is_insert_only(self) -> bool:
        """Whether it publishes inserts and truncates, as of the root, and no update or delete."""
        return self.publishes_inserts and self.via_root and not self.publishes_updates


@dataclass(frozen=True, slots=True)
class OtherPublication:
    """A publication that is not ours, as far as it meets what is."""

    name: str
    all_tables: bool
    publishes_queue: bool  # schema conductor
    partial_tables: tuple[str, ...]  # ours, of which it leaves out rows or columns


@dataclass(frozen=True, slots=True)
class SlotStatistics:
    """What decoding has spilt to disk and streamed (pg_stat_replication_slots), since its reset."""

    spilled_transactions: int
    spilled_bytes: int
    streamed_transactions: int
    streamed_bytes: int

    @classmethod
    def of(cls, row: dict[str, Any] | None) -> Self | None:
        """Read the row; None when the server keeps none for the slot."""
        if row is None:
            return None
        return cls(row["spill_txns"], row["spill_bytes"], row["stream_txns"], row["stream_bytes"])


async def read_server(connection: Connection) -> Server:
    """Read the server's settings and our role's rights."""
    row = await _row(connection, queries.SERVER, {})
    if row is None:
        raise SourceUnavailable("the source database did not describe itself")
    return Server(**row)


async def read_slot(connection: Connection, slot: str) -> Slot | None:
    """Read a slot, of whatever kind and database; None when there is none of that name."""
    row = await _row(connection, queries.SLOT, {"slot": slot})
    return None if row is None else _slot(row)


def _slot(row: dict[str, Any]) -> Slot:
    return Slot(
        name=row["slot_name"],
        plugin=row["plugin"],
        slot_type=row["slot_type"],
        database=row["database"],
        temporary=row["temporary"],
        two_phase=row["two_phase"],
        active_pid=row["active_pid"],
        restart_lsn=_lsn(row["restart_lsn"]),
        confirmed_flush_lsn=_lsn(row["confirmed_flush_lsn"]),
        wal_status=row["wal_status"],
        safe_wal_bytes=row["safe_wal_size"],
        invalidation_reason=row["invalidation_reason"],
        failover=row["failover"],
        retained_bytes=None if row["retained_bytes"] is None else int(row["retained_bytes"]),
        waits_for_standbys=row["waits_for_standbys"],
    )


async def read_slots(connection: Connection) -> list[Slot]:
    """Read every logical slot of the server, by name."""
    return [_slot(row) for row in await _rows(connection, operator_queries.SLOTS, {})]


async def read_slot_statistics(connection: Connection, slot: str) -> SlotStatistics | None:
    """Read what the server has counted for a slot."""
    return SlotStatistics.of(await _row(connection, queries.SLOT_STATISTICS, {"slot": slot}))


async def read_server_lsn(connection: Connection) -> Lsn:
    """Read up to where the server's WAL is flushed (on a standby: replayed)."""
    row = await _row(connection, queries.SERVER_LSN, {})
    return Lsn.parse(row["lsn"]) if row and row["lsn"] else Lsn(0)


async def read_tables(
    connection: Connection, names: Collection[TableName]
) -> dict[TableName, Table]:
    """Read those of the named relations that exist."""
    wanted = sorted(names)
    parameters = {"schemas": [schema for schema, _ in wanted], "names": [n for _, n in wanted]}
    tables = {}
    for row in await _rows(connection, publication_queries.TABLES, parameters):
        lists = {
            key: tuple(row[key])
            for key in ("columns", "ancestors", "leaves_without_identity", "identity_columns")
        }
        table = Table(**{**row, **lists})
        tables[table.key] = table
    return tables


async def read_table_names(connection: Connection) -> list[str]:
    """Read the names of all tables that could be published, for a nearest match."""
    return [row["name"] for row in await _rows(connection, publication_queries.TABLE_NAMES, {})]


def insert_only_name(publication: str) -> str:
    """Return the name of the second publication, for tables without usable replica identity.

    >>> insert_only_name("conductor")
    'conductor_inserts'
    """
    ending = "_inserts"
    room = _NAME_BYTES - len(ending)
    return publication.encode()[:room].decode(errors="ignore") + ending


def publication_names(publication: str) -> tuple[str, str]:
    """Return the names of both our publications."""
    return publication, insert_only_name(publication)


async def read_publications(
    connection: Connection, publications: Collection[str]
) -> dict[str, Publication]:
    """Read those of the named publications that exist, with their tables.

    The tables of all of them are read at one moment: one that is moved is in one of them.
    """
    names = {"publications": list(publications)}
    rows = await _rows(connection, publication_queries.PUBLICATIONS, names)
    tables: dict[str, list[PublishedTable]] = {row["name"]: [] for row in rows}
    for row in await _rows(connection, publication_queries.PUBLICATION_TABLES, names):
        columns = None if row["columns"] is None else tuple(row["columns"])
        name = row.pop("publication")
        tables.setdefault(name, []).append(PublishedTable(**{**row, "columns": columns}))
    return {
        row["name"]: Publication(
            **{
                **row,
                "schemas": tuple(row["schemas"]),
                "schema_memberships": tuple(row["schema_memberships"]),
            },
            tables=tuple(tables[row["name"]]),
        )
        for row in rows
    }


async def read_other_publications(
    connection: Connection, publication: str, tables: Collection[TableName]
) -> list[OtherPublication]:
    """Read every publication but our two, compared with the tables that ours capture."""
    names = sorted(tables)
    parameters = {
        "publications": list(publication_names(publication)),
        "schemas": [schema for schema, _ in names],
        "names": [name for _, name in names],
    }
    return [
        OtherPublication(**{**row, "partial_tables": tuple(row["partial_tables"])})
        for row in await _rows(connection, operator_queries.OTHER_PUBLICATIONS, parameters)
    ]


@dataclass(frozen=True, slots=True)
class Shape:
    """The answer to a `CatalogRequest`."""

    table: CatalogTable | None
    types: tuple[Type, ...]


async def read_shape(connection: Connection, publication: str, request: CatalogRequest) -> Shape:
    """Read a table as it is published, and the base types of its columns and of those asked for."""
    schema, name = request.table
    publications = list(publication_names(publication))
    parameters = {"schema": schema, "name": name, "publications": publications}
    row = await _row(connection, publication_queries.TABLE_SHAPE, parameters)
    table = None
    if row is not None:
        columns = tuple(CatalogColumn(**column) for column in row["columns"])
        generated = frozenset(row["own_generated"])
        table = CatalogTable(**{**row, "columns": columns, "own_generated": generated})
    oids = request.type_oids.union(() if table is None else (c.type_oid for c in table.columns))
    types = await _rows(connection, publication_queries.BASE_TYPES, {"oids": sorted(oids)})
    return Shape(table, tuple(Type(**learnt) for learnt in types))


async def _rows(
    connection: Connection, query: queries.Statement, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    with source_errors():
        cursor = await connection.execute(query, parameters)
        return await cursor.fetchall()


async def _row(
    connection: Connection, query: queries.Statement, parameters: dict[str, Any]
) -> dict[str, Any] | None:
    rows = await _rows(connection, query, parameters)
    return rows[0] if rows else None


def _lsn(text: str | None) -> Lsn | None:
    return None if text is None else Lsn.parse(text)
