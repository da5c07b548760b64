"""The sink on a real server: jobs and position together, or neither."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import psycopg
import pytest

from cdc.errors import FenceLost, QueueUnavailable
from cdc.routing import DeadLetter
from cdc.sink import Batch, Sink, Stamp
from conductor.contract import JobSpec, encode_head, encode_position
from conductor.migrations import migrate
from tests.servers import ScratchDatabase, StartServer

pytestmark = pytest.mark.anyio

SLOT = "orders"
HEAD = encode_head(
    queue="mail",
    task="welcome",
    app="shop",
    version=None,
    trigger="change",
    rank=-3,
    subscription=9,
)


def job(ordinal: int, payload: bytes = b'{"op": "insert"}', commit_lsn: int = 0x100) -> JobSpec:
    return JobSpec(HEAD, encode_position(1, commit_lsn), ordinal, payload)


@pytest.fixture
def query(migrated: ScratchDatabase) -> Callable[..., list[tuple[Any, ...]]]:
    def run(statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(migrated.dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    run("insert into conductor.progress (slot, state) values (%s, 'streaming')", SLOT)
    return run


@pytest.fixture
async def sinks(
    migrated: ScratchDatabase, query: Callable[..., object]
) -> AsyncIterator[Callable[[], Any]]:
    async with AsyncExitStack() as stack:

        async def open_sink() -> Sink:
            sink = await Sink.open(migrated.dsn, SLOT, leader="test:1")
            stack.push_async_callback(sink.close)
            return sink

        yield open_sink


async def test_jobs_and_position_commit_together(sinks: Any, query: Any) -> None:
    sink = await sinks()
    await sink.write(Batch([job(0), job(1)], end_lsn=0x200))
    rows = query(
        "select queue, task, app, version, trigger::text, rank, subscription, source_generation,"
        " source_lsn::text, source_ordinal, payload, state::text from conductor.jobs order by id"
    )
    shared = ("mail", "welcome", "shop", None, "change", -3, 9, 1, "0/100")
    assert rows == [(*shared, n, {"op": "insert"}, "ready") for n in (0, 1)]
    assert query("select routed_lsn::text from conductor.progress") == [("0/200",)]


async def test_a_job_is_due_when_the_database_says_so(sinks: Any, query: Any) -> None:
    sink = await sinks()
    await sink.write(Batch([job(0)], end_lsn=0x200))
    assert query("select run_at between created_at - interval '1 s' and now() from conductor.jobs")


async def test_a_piece_of_a_transaction_is_invisible_until_its_end(sinks: Any, query: Any) -> None:
    sink = await sinks()
    await sink.write(Batch([job(0)]))
    assert sink.is_open
    assert query("select count(*) from conductor.jobs") == [(0,)]
    await sink.write(Batch([job(1)], end_lsn=0x200))
    assert query("select count(*) from conductor.jobs") == [(2,)]


async def test_an_abandoned_piece_leaves_nothing(sinks: Any, query: Any) -> None:
    sink = await sinks()
    await sink.write(Batch([job(0)]))
    await sink.abandon_open()
    await sink.write(Batch([job(7)], end_lsn=0x200))
    assert query("select source_ordinal from conductor.jobs") == [(7,)]


async def test_only_durable_positions_are_acknowledged(sinks: Any, query: Any) -> None:
    sink = await sinks()
    await sink.write(Batch([job(0)], end_lsn=0x200))
    assert not sink.is_durable
    assert query("select acknowledged_lsn::text from conductor.progress") == [("0/0",)]
    await sink.persist_acknowledged(0x300)
    assert sink.is_durable
    assert query("select routed_lsn::text, acknowledged_lsn::text from conductor.progress") == [
        ("0/200", "0/300")
    ]


async def test_a_new_leader_stores_what_it_may_acknowledge(sinks: Any, query: Any) -> None:
    sink = await sinks()
    await sink.write(Batch([job(0)], end_lsn=0x200))
    assert query("select acknowledged_lsn::text from conductor.progress") == [("0/0",)]
    heir = await sinks()
    assert heir.position.acknowledged_lsn == heir.position.routed_lsn == 0x200


async def test_an_earlier_leader_can_write_nothing(sinks: Any, query: Any) -> None:
    old = await sinks()
    new = await sinks()
    with pytest.raises((FenceLost, QueueUnavailable)):
        await old.write(Batch([job(0)], end_lsn=0x200))
    await new.write(Batch([job(1)], end_lsn=0x300))
    assert query("select source_ordinal from conductor.jobs") == [(1,)]


async def test_a_changed_position_is_noticed(sinks: Any, query: Any) -> None:
    sink = await sinks()
    query("update conductor.progress set routed_lsn = '0/150'")
    with pytest.raises(FenceLost):
        await sink.write(Batch([job(0)], end_lsn=0x200))
    await sink.close()
    assert query("select count(*) from conductor.jobs") == [(0,)]


async def test_takeover_ends_a_leader_that_is_paused_inside_its_transaction(
    sinks: Any, query: Any
) -> None:
    old = await sinks()
    await old.write(Batch([job(0)]))  # its transaction stays open, its client does nothing more
    new = await sinks()
    assert new.position.epoch == old.position.epoch + 1
    assert query(
        "select count(*) from pg_stat_activity where pid = %s",
        old._connection.info.backend_pid,
    ) == [(0,)]


async def test_a_foreign_backend_with_the_stored_pid_is_left_alone(
    sinks: Any, query: Any, migrated: ScratchDatabase
) -> None:
    with psycopg.connect(migrated.dsn, application_name="somebody else") as bystander:
        query("update conductor.progress set sink_pid = %s", bystander.info.backend_pid)
        await sinks()
        assert bystander.execute("select 1").fetchone() == (1,)


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_job_that_the_database_refuses_is_set_aside(
    sinks: Any, query: Any, pieces: int
) -> None:
    sink = await sinks()
    if pieces == 2:
        await sink.write(Batch([job(100)]))
    specs = [job(n, b"{broken" if n == 5 else b"{}") for n in range(9)]
    await sink.write(Batch(specs, end_lsn=0x200))
    stored = [n for (n,) in query("select source_ordinal from conductor.jobs order by 1")]
    assert stored == [0, 1, 2, 3, 4, 6, 7, 8, *([100] if pieces == 2 else [])]
    letters = query(
        "select slot, generation, commit_lsn::text, ordinal, subscription, raw, error"
        " from conductor.dead_letters"
    )
    assert [row[:6] for row in letters] == [(SLOT, 1, "0/100", 5, 9, b"{broken")]
    assert "json" in letters[0][6]


async def test_json_too_deep_for_the_queue_is_set_aside(sinks: Any, query: Any) -> None:
    sink = await sinks()
    deep = b"[" * 200_000 + b"]" * 200_000
    await sink.write(Batch([job(0), job(1, deep), job(2)], end_lsn=0x200))
    assert query("select source_ordinal from conductor.jobs order by 1") == [(0,), (2,)]
    assert query("select ordinal, raw from conductor.dead_letters") == [(1, deep)]


async def test_a_new_leader_makes_durable_what_it_may_acknowledge(
    start_server: StartServer,
) -> None:
    server = start_server(settings={"wal_writer_delay": "10s", "synchronous_commit": "off"})
    migrate(server.dsn())

    def flushed(lsn: str) -> bool:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            row = connection.execute("select pg_current_wal_flush_lsn() >= %s::pg_lsn", [lsn])
            return row.fetchone() == (True,)

    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            "insert into conductor.progress (slot, state, routed_lsn)"
            " values (%s, 'streaming', '0/200')",
            [SLOT],
        )
        (lsn,) = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone() or ("",)
    assert not flushed(lsn)
    sink = await Sink.open(server.dsn(), SLOT, leader="test:1")
    assert sink.position.acknowledged_lsn == 0x200
    assert flushed(lsn)
    await sink.close()


async def test_dead_letters_and_stamps_commit_with_the_position(sinks: Any, query: Any) -> None:
    ids = [
        row[0]
        for trigger in ("a", "b")
        for row in query(
            "insert into conductor.subscriptions (app, task, trigger, kind, queue, definition)"
            " values ('shop', 'welcome', %s, 'change', 'mail', '{}') returning id",
            trigger,
        )
    ]
    sink = await sinks()
    letter = DeadLetter(0x180, 4, None, {"schema": "shop"}, "no UTF-8", b"\xff")
    await sink.write(
        Batch([], [letter], [Stamp(0x180, tuple(ids), ()), Stamp(0x190, (), (ids[1],))], 0x200)
    )
    assert query("select commit_lsn::text, ordinal, relation, raw from conductor.dead_letters") == [
        ("0/180", 4, {"schema": "shop"}, b"\xff")
    ]
    assert query(
        "select subscription, start_lsn::text, end_lsn::text from conductor.activations order by 1"
    ) == [(ids[0], "0/180", None), (ids[1], "0/180", "0/190")]


async def test_a_stamp_is_never_moved(sinks: Any, query: Any) -> None:
    [(subscription,)] = query(
        "insert into conductor.subscriptions (app, task, trigger, kind, queue, definition)"
        " values ('shop', 'welcome', 't', 'change', 'mail', '{}') returning id"
    )
    sink = await sinks()
    await sink.write(Batch(stamps=[Stamp(0x180, (subscription,), ())], end_lsn=0x200))
    await sink.write(Batch(stamps=[Stamp(0x280, (subscription,), ())], end_lsn=0x300))
    assert query("select start_lsn::text from conductor.activations") == [("0/180",)]


async def test_a_lost_connection_is_reported_as_the_queues(sinks: Any, query: Any) -> None:
    sink = await sinks()
    query("select pg_terminate_backend(%s)", sink._connection.info.backend_pid)
    with pytest.raises(QueueUnavailable):
        await sink.write(Batch([job(0)], end_lsn=0x200))


async def test_without_a_progress_row_nobody_leads(migrated: ScratchDatabase) -> None:
    with pytest.raises(FenceLost, match="no progress row"):
        await Sink.open(migrated.dsn, "unknown", leader="test:1")
