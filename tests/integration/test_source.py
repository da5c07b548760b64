"""The replication stream against a real walsender."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest

from cdc.connection import connect_queue, connect_source, queue_errors
from cdc.errors import (
    CdcError,
    ConfigError,
    PrivilegeMissing,
    PublicationMissing,
    SlotBusy,
    SlotForeign,
    SlotMissing,
    SourceUnavailable,
)
from cdc.queries import SESSION_SETTINGS
from cdc.source import ReplicationStream
from cdc.wire.frames import XLogData, parse_frame
from cdc.wire.messages import Commit, Insert
from cdc.wire.pgoutput import decode
from tests.integration.sidecar import eventually, query, slot_row, value
from tests.servers import NewDatabase, ScratchDatabase, dsn_for

pytestmark = pytest.mark.anyio


async def open_stream(database: ScratchDatabase) -> ReplicationStream:
    return await ReplicationStream.open(database.source_dsn, application_name="test")


@asynccontextmanager
async def streaming(database: ScratchDatabase) -> AsyncIterator[ReplicationStream]:
    """A stream of table `t`, from its creation on."""
    query(database.dsn, "create table t (id bigint primary key, body text)")
    query(database.dsn, "create publication p for table t")
    stream = await open_stream(database)
    try:
        await stream.create_slot(database.name)
        await stream.start(database.name, ["p"])
        yield stream
    finally:
        await stream.close()


async def read_inserts(stream: ReplicationStream, count: int) -> list[Insert]:
    inserts: list[Insert] = []
    while len(inserts) < count:
        inserts += inserts_of(await stream.read())
    return inserts


def inserts_of(frames: list[bytes]) -> list[Insert]:
    parsed = [frame for raw in frames if isinstance(frame := parse_frame(raw), XLogData)]
    messages = [decode(frame.payload) for frame in parsed]
    return [message for message in messages if isinstance(message, Insert)]


async def test_reads_what_was_committed_in_order(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        query(database.dsn, "insert into t select g, 'x' from generate_series(1, 5000) g")
        inserts = await read_inserts(stream, 5000)
    assert [insert.new[0] for insert in inserts] == [b"%d" % n for n in range(1, 5001)]


async def test_a_read_keeps_its_limits(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        query(
            database.dsn, "insert into t select g, repeat('x', 900) from generate_series(1, 500) g"
        )
        assert len(await stream.read(limit=3)) <= 3
        sizes = [sum(map(len, await stream.read(limit_bytes=2000))) for _ in range(20)]
    assert all(size < 3000 for size in sizes)


async def test_reads_a_value_larger_than_any_buffer(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        query(database.dsn, "insert into t values (1, repeat('0123456789', 2000000))")
        (insert,) = await read_inserts(stream, 1)
    assert insert.new[1] == b"0123456789" * 2_000_000


async def test_a_cancelled_read_loses_nothing(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_inserts(stream, 1), 0.1)
        query(database.dsn, "insert into t values (1, 'x')")
        assert len(await read_inserts(stream, 1)) == 1


async def test_silence_is_counted_while_a_read_waits(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        reading = asyncio.create_task(read_inserts(stream, 1))
        await eventually(lambda: stream.silence_s > 0.05, "a waiting read")
        stream.abort(SourceUnavailable("the watchdog says so"))
        with pytest.raises(SourceUnavailable, match="watchdog"):
            await reading
        assert stream.silence_s == 0


async def test_a_probe_is_answered(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        await eventually(lambda: slot_row(database)["active_pid"], "streaming")  # type: ignore[index]  # it exists
        await stream.probe()
        async with asyncio.timeout(20):  # the server asks by itself after half a minute
            while not any(frame[:1] == b"k" for frame in await stream.read()):
                pass


async def test_a_status_moves_the_slot_and_finish_frees_it(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        query(database.dsn, "insert into t values (1, 'x')")
        frames: list[bytes] = []
        while not (ends := [m.end_lsn for m in map(_message, frames) if isinstance(m, Commit)]):
            frames += await stream.read()
        await stream.send_status(ends[0], ends[0], ends[0])
        await stream.finish()
        await eventually(lambda: slot_row(database)["active_pid"] is None, "a free slot")  # type: ignore[index]  # it exists
    confirmed = value(
        database.dsn,
        "select confirmed_flush_lsn - '0/0' from pg_replication_slots where slot_name = %s",
        database.name,
    )
    assert confirmed == ends[0]


def _message(frame: bytes) -> object:
    parsed = parse_frame(frame)
    return decode(parsed.payload) if isinstance(parsed, XLogData) else None


async def test_a_busy_slot_can_be_had_later_on_the_same_connection(
    database: ScratchDatabase,
) -> None:
    async with streaming(database) as leader:
        standby = await open_stream(database)
        with pytest.raises(SlotBusy, match="active"):
            await standby.start(database.name, ["p"])
        await leader.close()
        await eventually(lambda: slot_row(database)["active_pid"] is None, "a free slot")  # type: ignore[index]  # it exists
        await standby.start(database.name, ["p"])
        await standby.close()


async def test_a_slot_of_another_database_is_foreign(new_database: NewDatabase) -> None:
    ours, other = new_database(), new_database()
    async with streaming(other):
        pass
    await eventually(lambda: slot_row(other)["active_pid"] is None, "a free slot")  # type: ignore[index]  # it exists
    stream = await open_stream(ours)
    with pytest.raises(SlotForeign, match="database"):
        await stream.start(other.name, ["p"])
    await stream.close()


async def test_a_missing_slot_has_a_name(database: ScratchDatabase) -> None:
    stream = await open_stream(database)
    with pytest.raises(SlotMissing, match="does not exist"):
        await stream.start(database.name, ["p"])
    await stream.close()


async def test_a_lost_connection_is_unavailability(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        query(database.admin_dsn, f"select pg_terminate_backend({stream.backend_pid})")
        with pytest.raises(SourceUnavailable):
            await read_inserts(stream, 1)


@pytest.mark.pg(15)
async def test_a_dropped_publication_is_named(database: ScratchDatabase) -> None:
    async with streaming(database) as stream:
        query(database.dsn, "drop publication p")
        query(database.dsn, "insert into t values (1, 'x')")
        with pytest.raises(PublicationMissing, match="publication"):
            await read_inserts(stream, 1)


async def test_identifies_the_server(database: ScratchDatabase) -> None:
    stream = await open_stream(database)
    system = await stream.identify()
    assert system.database == database.name
    assert await stream.timeline_history(system.timeline) == []
    await stream.close()


WRONG = {
    "datestyle": "German",
    "timezone": "Asia/Tokyo",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "-4",
    "bytea_output": "escape",
    "quote_all_identifiers": "on",
    "search_path": "public",
    "client_encoding": "LATIN1",
    "default_transaction_isolation": "serializable",
    "statement_timeout": "3s",
}


def spoil(database: ScratchDatabase) -> None:
    """Set everything that changes how values are rendered wrongly, for the whole database."""
    for name, wrong in WRONG.items():
        query(database.dsn, f"alter database \"{database.name}\" set {name} = '{wrong}'")


async def test_no_setting_of_the_database_changes_the_stream(database: ScratchDatabase) -> None:
    query(
        database.dsn,
        "create table t (id int primary key, a date, b timestamptz, c interval, d bytea, e float8,"
        " f text)",
    )
    query(database.dsn, "create publication p for table t")
    spoil(database)
    stream = await open_stream(database)
    await stream.create_slot(database.name)
    await stream.start(database.name, ["p"])
    query(
        database.dsn,
        "insert into t values (1, '2024-12-31', '2024-12-31 23:00+00', '1 mon 2 days', '\\x00ff',"
        " 0.1::float8 + 0.2::float8, U&'\\00e9\\20ac')",
    )
    (insert,) = await read_inserts(stream, 1)
    await stream.close()
    assert insert.new[1:] == [
        b"2024-12-31",
        b"2024-12-31 23:00:00+00",
        b"1 mon 2 days",
        b"\\x00ff",
        b"0.30000000000000004",
        "é€".encode(),
    ]


async def test_every_session_setting_is_ours(database: ScratchDatabase) -> None:
    spoil(database)
    connection = await connect_source(database.source_dsn, application_name="test")
    for name, expected in SESSION_SETTINGS:
        cursor = await connection.execute("select current_setting(%s) as value", [name])
        row = await cursor.fetchone()
        assert row is not None
        assert row["value"].replace(" ", "") == expected.replace(" ", ""), name
    await connection.close()


async def test_a_role_without_replication_is_told_so(database: ScratchDatabase) -> None:
    with pytest.raises(PrivilegeMissing):
        await ReplicationStream.open(database.dsn, application_name="test")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dbname": "nonesuch"}, ConfigError),
        ({"user": "nonesuch", "password": "hunter2"}, ConfigError),
        ({"host": "127.0.0.1", "port": "1", "password": "hunter2"}, SourceUnavailable),
    ],
)
async def test_a_wrong_dsn_is_named_without_its_password(
    database: ScratchDatabase, changes: dict[str, str], expected: type[CdcError]
) -> None:
    with pytest.raises(expected) as caught:
        await connect_source(dsn_for(database.source_dsn, **changes), application_name="test")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_an_error_of_the_queue_quotes_neither_statement_nor_row(
    database: ScratchDatabase,
) -> None:
    connection = await connect_queue(database.source_dsn, application_name="test")
    await connection.execute("create temp table t (secret text primary key)")
    for statement in (
        "select secret, nonesuch from t",
        "insert into t values ('hunter2'), ('hunter2')",
        "drop table pg_class",
    ):
        with pytest.raises(CdcError) as caught, queue_errors():
            await connection.execute(statement)
        assert "LINE" not in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)
    await connection.execute("create temp view v as select * from t")
    with pytest.raises(CdcError, match="DETAIL: view v depends on table t"), queue_errors():
        await connection.execute("drop table t")
    await connection.close()


async def test_the_walsender_keeps_our_timeout(database: ScratchDatabase) -> None:
    stream = await ReplicationStream.open(
        database.source_dsn, application_name="timeout", wal_sender_timeout_s=17
    )
    cursor = await stream._connection.execute("show wal_sender_timeout")
    row = await cursor.fetchone()
    assert row == {"wal_sender_timeout": "17s"}
    await stream.close()


def test_the_driver_is_the_fast_one() -> None:
    assert psycopg.pq.__impl__ in {"binary", "c"}
