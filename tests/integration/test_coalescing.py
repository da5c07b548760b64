"""Changes of a row that come together are one job, in the sink's transaction."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg
import pytest

from cdc import job_queries
from cdc.letters import redrive_letters
from cdc.sink import Batch, Sink
from conductor import Conductor, Context, OnChange, Orchestrator
from conductor.contract import JobSpec, encode_head, encode_position
from tests.integration.conftest import Queue
from tests.integration.sidecar import drop_slot, running, settings_for

pytestmark = pytest.mark.anyio

HEAD = encode_head(
    queue="default", task="seen", app="a", version=None, trigger="change", rank=0, subscription=1
)
HOUR_US = 3_600_000_000

Write = Callable[..., Awaitable[None]]


def job(ordinal: int, key: str, op: str = "update", **options: Any) -> JobSpec:
    payload = f'{{"op":"{op}","new":{{"n":{ordinal}}}}}'.encode()
    options = {"coalesce_us": HOUR_US, **options}
    return JobSpec(HEAD, encode_position(1, 0x100), ordinal, payload, key, **options)


@pytest.fixture
async def write(queue: Queue) -> AsyncIterator[Write]:
    """Write jobs, a transaction a call."""
    await queue.rows("insert into conductor.progress (slot, state) values ('s', 'streaming')")
    sink = await Sink.open(queue.database.dsn, "s", leader="test")

    async def write(*specs: JobSpec) -> None:
        await sink.write(Batch(list(specs), end_lsn=sink.routed_lsn + 8))

    yield write
    await sink.close()


async def shown(queue: Queue) -> list[tuple[Any, ...]]:
    rows = await queue.rows(
        "select key, state::text, payload #>> '{new,n}' as n, source_ordinal, fence"
        " from conductor.jobs order by id"
    )
    return [tuple(row.values()) for row in rows]


async def test_changes_of_one_key_are_one_job(queue: Queue, write: Write) -> None:
    await write(job(0, "a"), job(1, "b"), job(2, "a"))
    await write(job(3, "b"), job(4, "c"))
    assert await shown(queue) == [
        ("b", "scheduled", "3", 3, 0),
        ("a", "scheduled", "2", 2, 0),
        ("c", "scheduled", "4", 4, 0),
    ]
    assert await queue.value(
        "select bool_and(run_at between now() + interval '59 min' and now() + interval '1 h')"
        " from conductor.jobs"
    )


async def test_a_job_that_has_begun_takes_nothing_in(queue: Queue, write: Write) -> None:
    await write(job(0, "a"))
    await queue.rows("update conductor.jobs set state = 'running', fence = 1")
    await write(job(1, "a"))
    await queue.rows("update conductor.jobs set state = 'scheduled' where fence = 1")  # a retry
    await write(job(2, "a"))
    assert await shown(queue) == [("a", "scheduled", "0", 0, 1), ("a", "scheduled", "2", 2, 0)]


async def test_nobody_waits_for_a_job_that_is_locked(queue: Queue, write: Write) -> None:
    await write(job(0, "a"))
    with psycopg.connect(queue.database.dsn) as claimer:
        claimer.execute("select from conductor.jobs for update")
        await write(job(1, "a"))
    await write(job(2, "a"))
    assert [row[2] for row in await shown(queue)] == ["0", "2"]


async def test_an_earlier_change_does_not_undo_a_later_one(queue: Queue, write: Write) -> None:
    await write(job(5, "a"))
    await write(job(3, "a"))
    assert [row[2] for row in await shown(queue)] == ["5", "3"]


async def test_other_jobs_are_left_alone(queue: Queue, write: Write) -> None:
    plain = JobSpec(HEAD, encode_position(1, 0x100), 0, b'{"op":"update","new":{"n":0}}')
    await write(plain, job(1, "a"), job(2, "a", ordered=True, coalesce_us=0))
    await write(job(3, "a"))
    assert await shown(queue) == [
        (None, "ready", "0", 0, 0),
        ("a", "scheduled", "3", 3, 0),
        ("a", "parked", "2", 2, 0),
    ]


async def test_ordered_jobs_coalesce_while_they_wait_for_their_turn(
    queue: Queue, write: Write
) -> None:
    await write(job(0, "a", ordered=True))
    await queue.rows("select conductor.offer_heads('default', 10)")
    await write(job(1, "a", ordered=True))
    assert await shown(queue) == [("a", "scheduled", "1", 1, 0)]
    await queue.rows("update conductor.jobs set state = 'running', fence = 1")
    for ordinal in (2, 3):
        await write(job(ordinal, "a", ordered=True))
        await queue.rows("select conductor.offer_heads('default', 10)")
    assert await shown(queue) == [("a", "running", "1", 1, 1), ("a", "parked", "3", 3, 0)]


async def test_a_refused_job_is_a_letter_and_comes_back_as_what_it_was(
    queue: Queue, write: Write
) -> None:
    definition = {"schema": "public", "table": "t", "operations": ["update"], "coalesce_s": 3600}
    await queue.rows(
        "insert into conductor.subscriptions (app, task, trigger, kind, queue, definition)"
        " values ('a', 'seen', 'change', 'change', 'default', %s)",
        json.dumps(definition),
    )
    bad = job(1, "a")
    bad.payload = b"{no json"
    await write(job(0, "b"), bad)
    assert await queue.value("select relation from conductor.dead_letters") == {"key": "a"}
    await write(job(0, "a", "insert"))
    fixed = psycopg.types.json.Json({"op": "update", "new": {}, "unchanged": ["n"]})
    await queue.rows("update conductor.dead_letters set raw = convert_to(%s::text, 'utf8')", fixed)
    (outcome,) = await redrive_letters(settings_for(queue.database, slot="s"), None)
    assert outcome.result == "routed"
    assert [row[:3] for row in await shown(queue)] == [
        ("b", "scheduled", "0"),
        ("a", "scheduled", None),  # it went into that of before, and took no value from it
    ]
    assert await queue.value("select bool_and(coalescing) from conductor.jobs")


async def test_the_latest_of_two_pending_jobs_takes_a_change_in(queue: Queue, write: Write) -> None:
    await write(job(5, "a"))
    await write(job(3, "a"))  # routed late
    await write(job(6, "a"))
    assert [row[2] for row in await shown(queue)] == ["6", "3"]


async def test_a_value_that_may_be_an_old_one_is_not_taken(queue: Queue, write: Write) -> None:
    first, second = job(0, "a", "insert"), job(1, "a", fills=False)
    first.payload = b'{"op":"insert","new":{"n":0,"big":"old"}}'
    second.payload = b'{"op":"update","new":{"n":1},"unchanged":["big"]}'
    await write(first)
    await write(second)
    assert await queue.column("select payload from conductor.jobs") == [
        {"op": "insert", "new": {"n": 1}, "unchanged": ["big"]}
    ]


@pytest.mark.parametrize("statistics", ["empty", "common"])
async def test_pending_jobs_are_found_by_their_keys(queue: Queue, statistics: str) -> None:
    """Whatever the server believes: it scans neither the table nor its primary key."""
    rows = (
        "insert into conductor.jobs (queue, task, trigger, payload, subscription, key, coalescing,"
        " state, source_lsn, source_ordinal) select 'q', 't', 'change', '{}', 1, 'k' || n % 20,"
        " true, 'scheduled', '0/1', n from generate_series(1, 20000) n"
    )
    many = {
        "subscriptions": [1] * 500,
        "keys": [f"key-{n}" for n in range(500)],
        "lsns": ["0/1"] * 500,
        "ordinals": [0] * 500,
    }
    with psycopg.connect(queue.database.dsn) as connection:
        if statistics == "common":
            connection.execute(rows)
        connection.execute("analyze conductor.jobs")
        if statistics == "empty":
            connection.execute(rows)
        explain = psycopg.sql.SQL("explain ") + job_queries.COALESCING_JOBS
        plan = "\n".join(line for (line,) in connection.execute(explain, many).fetchall())
    assert " jobs_coalescing " in plan
    assert "jobs_pkey" not in plan


@pytest.mark.parametrize("ordered", [False, True])
async def test_bursts_of_a_row_are_few_jobs_and_no_value_is_lost(
    queue: Queue, ordered: bool
) -> None:
    app = Conductor(queue.database.dsn)
    seen: list[Any] = []

    @app.task("follow", OnChange("public.pages", coalesce_s=0.5), ordered=ordered)
    async def follow(event: Any, _ctx: Context[None]) -> None:
        body = len(event.new["body"]) if event.op == "insert" else None
        seen.append((event.op, event.new["views"], body))

    await queue.rows("create table pages (id bigint primary key, views int, body text)")
    await queue.rows("alter table pages alter column body set storage external")
    orchestrator = Orchestrator(app)
    async with app, running(queue.database):
        await orchestrator.start(wait_captured_s=30)
        # No update touches the body: it is not in the WAL.
        await queue.rows(
            "do $$ begin insert into pages values (1, 0, repeat('x', 100000));"
            " for n in 1 .. 50 loop update pages set views = n; end loop; end $$"
        )
        for views in range(51, 100):
            await queue.rows("update pages set views = %s", views)
        await queue.until("select count(*) > 0 from conductor.history")
        done = "select count(*) = 0 from conductor.jobs"
        await queue.until(done)
        await orchestrator.stop()
    drop_slot(queue.database)
    assert len(seen) <= 50  # the first 51 changes are one job, on a machine of any speed
    assert seen[0][0] == "insert"
    assert seen[0][1] >= 50
    assert seen[0][2] == 100_000
    assert seen[-1][1] == 99
