"""The pump between a hand-fed stream and a real queue: moments that traffic seldom hits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cdc.metrics import Metrics
from cdc.pending import PENDING_LIMIT_BYTES
from cdc.pipeline import Pipeline
from cdc.sink import Sink
from cdc.wire.messages import Begin, Column, Commit, Insert, Message, Relation
from conductor.matching import Subscription
from tests.integration.sidecar import eventually, query, value
from tests.servers import ScratchDatabase
from tests.unit.cdc.pgoutput_encoder import encode

SLOT = "pump"
OID = 16385
RELATION = Relation(OID, "shop", "users", "d", (Column("id", 20, -1, is_key=True),))


class FedStream:
    """A stream whose frames the test puts in."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.flushed_lsn = 0

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.frames.put_nowait(b"w" + bytes(24) + encode(message))

    async def read(self, limit: int, limit_bytes: int) -> list[bytes]:  # noqa: ARG002 - protocol
        await asyncio.sleep(0)
        frames = [await self.frames.get()]
        while not self.frames.empty() and len(frames) < limit:
            frames.append(self.frames.get_nowait())
        return frames

    async def send_status(
        self,
        write_lsn: int,  # noqa: ARG002 - the pump's protocol
        flush_lsn: int,
        apply_lsn: int,  # noqa: ARG002 - the same
        *,
        reply_requested: bool = False,  # noqa: ARG002 - the same
    ) -> None:
        self.flushed_lsn = flush_lsn


class Book:
    """One subscription that routes from the beginning."""

    def __init__(self) -> None:
        self.revision = 0
        self.version: str | None = None

    @property
    def stamped(self) -> list[tuple[Subscription, int | None, int | None]]:
        definition = {"schema": "shop", "table": "users", "operations": ["insert"]}
        row: dict[str, Any] = {
            "id": 1,
            "app": "shop",
            "task": "seen",
            "trigger": "change",
            "queue": "default",
            "version": self.version,
            "rank": 0,
            "source": "default",
            "kind": "change",
            "definition": definition,
        }
        return [(Subscription.from_row(row), 0, None)]

    async def refresh(self) -> None: ...


@asynccontextmanager
async def pumping(
    database: ScratchDatabase, stream: FedStream, book: Book
) -> AsyncIterator[Pipeline]:
    query(
        database.dsn,
        "insert into conductor.progress (slot, state) values (%s, 'streaming')"
        " on conflict do nothing",
        SLOT,
    )
    sink = await Sink.open(database.dsn, SLOT, leader="test:1")
    pipeline = Pipeline(
        slot=SLOT,
        stream=stream,
        sink=sink,
        subscriptions=book,
        metrics=Metrics("test", SLOT),
        status_every_s=0.05,
    )
    task = asyncio.create_task(pipeline.run())
    try:
        yield pipeline
    finally:
        pipeline.stop()
        await task
        await sink.close()


def transaction(lsn: int, *ids: int) -> list[Message]:
    rows = [Insert(OID, [b"%d" % i]) for i in ids]
    return [Begin(lsn, 0, 1), RELATION, *rows, Commit(0, lsn, lsn + 8, 0)]


def count(database: ScratchDatabase) -> int:
    return int(value(database.dsn, "select count(*) from conductor.jobs"))


async def test_a_commit_that_comes_alone_ends_a_large_transaction(
    migrated: ScratchDatabase,
) -> None:
    stream, rows = FedStream(), 0
    async with pumping(migrated, stream, Book()) as pipeline:
        stream.send(Begin(0x100, 0, 1), RELATION)
        while not pipeline._sink.is_open or pipeline._pending.routed.specs:
            stream.send(*[Insert(OID, [b"1" * 1000])] * 100)
            rows += 100
            await eventually(stream.frames.empty, "the reader")
        stream.send(Commit(0, 0x100, 0x108, 0))
        await eventually(lambda: count(migrated) == rows, "the commit")
        await eventually(lambda: stream.flushed_lsn == 0x108, "its acknowledgement")


async def test_the_end_of_a_burst_is_acknowledged(migrated: ScratchDatabase) -> None:
    stream = FedStream()
    async with pumping(migrated, stream, Book()):
        stream.send(*transaction(0x100, 1, 2))
        await eventually(lambda: stream.flushed_lsn == 0x108, "the acknowledgement")
        assert count(migrated) == 2


async def test_a_stop_inside_a_transaction_leaves_it_to_the_next_leader(
    migrated: ScratchDatabase,
) -> None:
    stream = FedStream()
    async with pumping(migrated, stream, Book()) as pipeline:
        stream.send(*transaction(0x100, 1), Begin(0x200, 0, 2), Insert(OID, [b"2"]))
        await eventually(lambda: pipeline._reader.commit_lsn == 0x200, "the open transaction")
    assert count(migrated) == 1
    assert value(migrated.dsn, "select routed_lsn::text from conductor.progress") == "0/108"
    again = FedStream()
    async with pumping(migrated, again, Book()):
        again.send(*transaction(0x100, 1), *transaction(0x200, 2))
        await eventually(lambda: count(migrated) == 2, "the second transaction")
    ids = query(migrated.dsn, "select payload -> 'new' ->> 'id' as id from conductor.jobs")
    assert [row["id"] for row in ids] == ["1", "2"]


async def test_jobs_carry_the_version_registered_last(migrated: ScratchDatabase) -> None:
    stream, book = FedStream(), Book()
    async with pumping(migrated, stream, book):
        stream.send(*transaction(0x100, 1))
        await eventually(lambda: count(migrated) == 1, "the first job")
        book.version, book.revision = "2", 1
        stream.send(*transaction(0x200, 2))
        await eventually(lambda: count(migrated) == 2, "the second job")
    rows = query(migrated.dsn, "select version from conductor.jobs order by id")
    assert [row["version"] for row in rows] == [None, "2"]


async def test_a_broken_row_is_set_aside_and_the_rest_goes_on(migrated: ScratchDatabase) -> None:
    stream = FedStream()
    async with pumping(migrated, stream, Book()):
        begin, relation, row, commit = transaction(0x100, 1)
        stream.send(begin, relation)
        stream.frames.put_nowait(b"w" + bytes(24) + encode(row)[:-1])
        stream.send(row, commit)
        await eventually(lambda: count(migrated) == 1, "the good row")
    letters = query(
        migrated.dsn, "select commit_lsn::text, ordinal, raw from conductor.dead_letters"
    )
    assert [(r["commit_lsn"], r["ordinal"], r["raw"]) for r in letters] == [
        ("0/100", 0, encode(row)[:-1])
    ]


async def test_dead_letters_are_written_before_they_fill_the_memory(
    migrated: ScratchDatabase,
) -> None:
    stream = FedStream()
    broken = b"w" + bytes(24) + encode(Insert(OID, [b"1" * 1000]))[:-1]
    rows = 2 * PENDING_LIMIT_BYTES // len(broken)
    async with pumping(migrated, stream, Book()) as pipeline:
        stream.send(Begin(0x100, 0, 1), RELATION)
        for _ in range(rows):
            stream.frames.put_nowait(broken)
        await eventually(lambda: pipeline._sink.is_open, "the first piece")
        stream.send(Insert(OID, [b"{"]), Insert(OID, [b"7"]), Commit(0, 0x100, 0x108, 0))
        await eventually(lambda: count(migrated) == 1, "the good row")
    letters = value(migrated.dsn, "select count(*) from conductor.dead_letters")
    assert letters == rows + 1  # and the one that the queue refused, beside the earlier piece
