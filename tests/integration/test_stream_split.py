"""Any split of the byte stream gives the same messages.

A relay stands between a real walsender and the source. It passes the server's bytes on in pieces of
any size, each only when the one before has been read, so that every read of the source ends where
the test wants it to: in the header of a frame, in a value, between two frames. libpq puts the
frames together, as it does when the network cuts them.
"""

import asyncio
import fcntl
import socket
import struct
import tempfile
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from cdc.source import ReplicationStream
from cdc.transactions import TransactionReader
from cdc.wire.frames import XLogData, parse_frame
from cdc.wire.messages import Commit, LogicalMessage
from tests.integration.sidecar import query
from tests.servers import ScratchDatabase, dsn_for

PORT = 5432
LAST = b"the last message"
TRAFFIC = (
    "insert into t select g, repeat('x', 3 * g) from generate_series(1, 40) g",
    """begin; update t set id = -id, body = null where id < 9; savepoint a; delete from t;
    rollback to a; delete from t where id < -5; commit""",
    "insert into t values (100, repeat('é', 3000))",
    "select pg_logical_emit_message(false, 'app', repeat('y', 300))",
    "truncate t",
    f"select pg_logical_emit_message(true, 'app', '{LAST.decode()}')",
)


@asynccontextmanager
async def relay(dsn: str, sizes: list[int]) -> AsyncIterator[str]:
    """Give the DSN of a relay to a server, which cuts what that says into pieces."""
    server = conninfo_to_dict(dsn)
    host, port = str(server.get("host") or server["hostaddr"]), int(server.get("port") or PORT)
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        if host.startswith("/"):
            opening = asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            opening = asyncio.open_connection(host, port)
        from_server, to_server = await opening
        try:
            await asyncio.gather(cut(from_server, writer, cycle(sizes)), pass_on(reader, to_server))
        except ConnectionError:
            pass  # one of them is gone
        finally:
            to_server.close()
            writer.close()

    with tempfile.TemporaryDirectory(prefix="relay-") as folder:
        path = Path(folder) / f".s.PGSQL.{PORT}"
        listener = await asyncio.start_unix_server(serve, path)
        try:
            yield dsn_for(dsn, host=folder, hostaddr="", port=str(PORT))
        finally:
            listener.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def cut(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sizes: Iterator[int]
) -> None:
    peer: socket.socket = writer.get_extra_info("socket")
    while data := await reader.read(1 << 16):
        while data:
            size = next(sizes)
            writer.write(data[:size])
            data = data[size:]
            while unread(peer):  # noqa: ASYNC110 - the kernel is asked
                await asyncio.sleep(0)
    writer.write_eof()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.write_eof()


def unread(peer: socket.socket) -> int:
    """How many bytes the other end has not read (with what the kernel adds to them)."""
    return int(struct.unpack("i", fcntl.ioctl(peer, termios.TIOCOUTQ, b"\0\0\0\0"))[0])


async def read_all(
    database: ScratchDatabase, dsn: str, limit: int, limit_bytes: int
) -> tuple[list[bytes], int]:
    """Return the payloads up to the last message's commit, and in how many reads they came."""
    stream = await ReplicationStream.open(dsn, application_name="test")
    try:
        await stream.start(database.name, ["p"])
        payloads: list[bytes] = []
        reads = 0
        while not (len(payloads) > 1 and LAST in payloads[-2]):
            reads += 1
            frames = map(parse_frame, await stream.read(limit, limit_bytes))
            payloads += [frame.payload for frame in frames if isinstance(frame, XLogData)]
    finally:
        await stream.close()
    return payloads, reads


async def prepare(database: ScratchDatabase) -> list[bytes]:
    query(database.dsn, "create table t (id int primary key, body text)")
    query(database.dsn, "alter table t alter body set storage external, replica identity full")
    query(database.dsn, "create publication p for table t")
    stream = await ReplicationStream.open(database.source_dsn, application_name="test")
    await stream.create_slot(database.name)
    await stream.close()
    for statement in TRAFFIC:
        query(database.dsn, statement)
    payloads, _ = await read_all(database, database.source_dsn, 1 << 20, 1 << 30)
    return payloads


def test_any_split_of_the_byte_stream_gives_the_same_messages(database: ScratchDatabase) -> None:
    whole = asyncio.run(prepare(database))
    assert b"".join(payload[:1] for payload in whole).count(b"C") == len(TRAFFIC) - 1
    reads_seen = []

    @given(
        st.lists(st.integers(1, 700), min_size=1, max_size=30) | st.just([7]),
        st.integers(1, 60),
        st.integers(1, 4000),
    )
    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def split(sizes: list[int], limit: int, limit_bytes: int) -> None:
        async def run() -> tuple[list[bytes], int]:
            async with relay(database.source_dsn, sizes) as dsn:
                return await read_all(database, dsn, limit, limit_bytes)

        payloads, reads = asyncio.run(run())
        assert payloads == whole
        assert transactions(payloads) == transactions(whole)
        reads_seen.append(reads)

    split()
    assert max(reads_seen) > len(whole)  # some ended in a frame


def transactions(payloads: list[bytes]) -> list[tuple[int, int, object]]:
    reader = TransactionReader(0)
    events = [(reader.feed(payload), reader.commit_lsn, reader.ordinal) for payload in payloads]
    assert isinstance(events[-1][0], Commit)
    assert isinstance(events[-2][0], LogicalMessage)
    return [(lsn, ordinal, event) for event, lsn, ordinal in events]
