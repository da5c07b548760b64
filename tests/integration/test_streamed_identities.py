"""One log, read by protocols 1, 2 and 4: what comes is told apart alike, and read alike.

The streams themselves, without a router: a slot for each protocol, and a reader for each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
import pytest

from cdc.errors import UndecodableMessage
from cdc.metrics import Metrics
from cdc.source import ReplicationStream
from cdc.spool import SpoolMemory
from cdc.streaming import StreamedStream
from cdc.transactions import TransactionReader
from cdc.wire.frames import XLOG_DATA, XLOG_DATA_HEADER_SIZE
from cdc.wire.messages import Delete, Insert, LogicalMessage, Update
from tests.integration.sidecar import query, value
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio

EVENT: Final = "select pg_logical_emit_message(true, 'conductor.emit', %s)"
MANY: Final = "insert into t select i, 'body' from generate_series(%s::int, %s) i"
END: Final = 1_000_000


@dataclass
class Found:
    """What one protocol gives."""

    changes: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    uncertain: set[tuple[int, int]] = field(default_factory=set)


@asynccontextmanager
async def slots(database: ScratchDatabase) -> AsyncIterator[dict[str, ReplicationStream]]:
    """A stream of each protocol, not started yet, with a slot of its own."""
    query(
        database.admin_dsn, f"alter database {database.name} set logical_decoding_work_mem = '64kB'"
    )
    query(database.dsn, "create table t (id bigint primary key, body text)")
    query(database.dsn, "create publication p for table t")
    newest = int(value(database.dsn, "show server_version_num")) >= 160000
    streams: dict[str, ReplicationStream] = {}
    async with AsyncExitStack() as stack:
        for mode in ("off", "on", "parallel")[: 3 if newest else 2]:
            stream = await ReplicationStream.open(database.source_dsn, application_name="test")
            stack.push_async_callback(stream.close)
            await stream.create_slot(f"{database.name}_{mode}", temporary=True)
            streams[mode] = stream
        yield streams


async def read(database: ScratchDatabase, mode: str, stream: ReplicationStream) -> Found:
    """Read from the slot's beginning to the row `END`."""
    await stream.start(f"{database.name}_{mode}", ["p"], streaming=mode)
    metrics, memory = Metrics("test", "m"), SpoolMemory(10_000)
    source = stream if mode == "off" else StreamedStream(stream, metrics, memory)
    reader, found = TransactionReader(0), Found()
    while not (found.changes and found.changes[-1][-1] == b"%d" % END):
        for frame in await source.read(1000, 1 << 20):
            if frame[0] == XLOG_DATA:
                take(reader, frame[XLOG_DATA_HEADER_SIZE:], found)
    return found


def take(reader: TransactionReader, payload: bytes, found: Found) -> None:
    try:
        event = reader.feed(payload)
    except UndecodableMessage as error:
        found.uncertain.add((error.commit_lsn, error.ordinal))
        return
    if isinstance(event, Insert | Update | Delete):
        shape = reader.relations.get(event.relation_oid)
        row = event.old if isinstance(event, Delete) else event.new
        assert len(row) == len(shape.column_names), "a row is read by another description"
        found.changes.append((reader.commit_lsn, reader.ordinal, shape.column_names, row[0]))
    elif isinstance(event, LogicalMessage) and event.prefix == "conductor.emit":
        found.events.append((reader.commit_lsn, reader.message_ordinal, event.content))


async def test_rows_and_events_are_told_apart_alike(database: ScratchDatabase) -> None:
    async with slots(database) as streams:
        with psycopg.connect(database.dsn) as connection:
            for number in range(20):
                first = number * 10_000
                connection.execute(EVENT, (f"before {number}",))
                connection.execute("savepoint a")
                connection.execute(EVENT, (f"perhaps {number}",))
                connection.execute(MANY, (first, first + 3000))
                connection.execute("rollback to a")
                connection.execute(EVENT, (f"after {number}",))
                connection.execute(MANY, (first, first + 10))
                connection.execute(EVENT, (f"certain {number}",))
                connection.execute("delete from t where id < 100")
                if number % 5 == 4:
                    connection.commit()
        query(database.dsn, "insert into t values (%s)", END)
        found = {mode: await read(database, mode, stream) for mode, stream in streams.items()}
    whole = found.pop("off")
    assert (len(whole.changes), len(whole.events)) == (20 * 11 + 11 + 1, 60)
    identities = [identity[:2] for identity in [*whole.changes, *whole.events]]
    assert len(set(identities)) == len(identities)
    for pieces in found.values():
        assert pieces.changes == whole.changes
        assert set(pieces.events) < set(whole.events)
        missing = {event[:2] for event in set(whole.events) - set(pieces.events)}
        assert missing < pieces.uncertain  # those, and what was rolled back
        assert len(pieces.events) >= 20


async def test_a_table_that_is_described_anew_while_a_transaction_is_open(
    database: ScratchDatabase,
) -> None:
    """A column list waits for no writer, so shapes change in between."""
    async with slots(database) as streams:
        with psycopg.connect(database.dsn) as connection:
            connection.execute(MANY, (1, 3000))
            query(database.dsn, "alter publication p set table t (id)")
            query(database.dsn, "insert into t values (5000, 'x')")
            connection.commit()
        query(database.dsn, "insert into t values (%s, 'x')", END)
        found = {mode: await read(database, mode, stream) for mode, stream in streams.items()}
    for changes in (of.changes for of in found.values()):
        assert len(changes) == 3002
        assert changes[-1][2] == ("id",)
