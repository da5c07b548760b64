from __future__ import annotations

import pytest

from conductor.sql import load
from conductor.store.operations import OperationStore
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio

QUERIES = load("operations")
BACKLOG = """
insert into conductor.jobs (queue, task, rank, payload, run_at)
select 'busy', 'task-' || n %% 3, n %% 5, '{}', '2026-01-01'::timestamptz + n * interval '1 second'
from generate_series(1, 30000) n
"""


async def fill(queue: Queue) -> None:
    await queue.rows("insert into conductor.queues (name) values ('busy'), ('idle')")
    await queue.rows("analyze conductor.jobs")  # empty, as it mostly is when it is analysed
    await queue.rows(BACKLOG, *())
    await queue.rows(
        "insert into conductor.jobs (queue, task, payload, state) values"
        " ('idle', 'nap', '{}', 'scheduled'), ('idle', 'nap', '{}', 'running'),"
        " ('idle', 'nap', '{}', 'suspect')"
    )


async def test_counts_are_bounded(queue: Queue) -> None:
    await fill(queue)
    async with queue.connections.lend() as connection:
        counts = await OperationStore(connection).count_jobs(10_001)
    assert sorted(counts) == [
        ("busy", "ready", 10_001),
        ("idle", "ready", 0),
        ("idle", "running", 1),
        ("idle", "scheduled", 1),
        ("idle", "suspect", 1),
    ]


async def test_the_oldest_is_found_whatever_its_rank_and_task(queue: Queue) -> None:
    await fill(queue)
    await queue.rows(
        "insert into conductor.jobs (queue, task, rank, payload, run_at) values"
        " ('idle', 'z', 7, '{}', '2025-01-01T00:00:00Z'), ('idle', 'a', 0, '{}', '2026-01-01')"
    )
    async with queue.connections.lend() as connection:
        oldest = await OperationStore(connection).oldest_due((), 10)
    assert oldest["idle"] == 1735689600.0
    assert set(oldest) == {"busy", "idle"}


@pytest.mark.parametrize(
    "task, expected",
    [("task-1", True), ("task-9", False), ("nap", True)],
)
async def test_unfinished_jobs_are_those_of_the_tasks(
    queue: Queue, task: str, expected: bool
) -> None:
    await fill(queue)
    async with queue.connections.lend() as connection:
        store = OperationStore(connection)
        pairs = [("busy", task), ("idle", task)]
        assert await store.has_unfinished(pairs) is expected


@pytest.mark.parametrize(
    "state, come, expected",
    [
        ("scheduled", "run_at = now() - interval '1 second'", True),
        ("waiting", "run_at = now() - interval '1 second'", True),
        ("scheduled", "run_at = now() + interval '1 hour'", False),
        ("waiting", "run_at = 'infinity'", False),
    ],
)
async def test_a_job_whose_time_has_come_is_unfinished(
    queue: Queue, state: str, come: str, expected: bool
) -> None:
    await queue.rows(
        "insert into conductor.jobs (queue, task, payload, state) values ('busy', 'x', '{}', %s)",
        state,
    )
    await queue.rows(f"update conductor.jobs set {come}")
    async with queue.connections.lend() as connection:
        store = OperationStore(connection)
        assert await store.has_unfinished([("busy", "x")]) is expected
        assert not await store.has_unfinished([("busy", "y"), ("idle", "x")])


async def test_a_job_that_something_has_come_for_is_unfinished(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.jobs (queue, task, payload, state, run_at) values"
        " ('busy', 'x', '{}', 'waiting', 'infinity'), ('busy', 'y', '{}', 'waiting', 'infinity')"
    )
    await queue.rows(
        "insert into conductor.wakeups (job, outcome)"
        " select id, 'completed' from conductor.jobs where task = 'x'"
    )
    async with queue.connections.lend() as connection:
        store = OperationStore(connection)
        assert await store.has_unfinished([("busy", "x")])
        assert not await store.has_unfinished([("busy", "y")])


async def test_a_due_schedule_is_unfinished(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.schedules (app, task, name, queue, expression, timezone, next_at)"
        " values ('', 'x', 'soon', 'busy', '* * * * *', 'UTC', now()),"
        " ('', 'y', 'later', 'busy', '* * * * *', 'UTC', now() + interval '1 hour')"
    )
    async with queue.connections.lend() as connection:
        store = OperationStore(connection)
        assert await store.has_unfinished([("busy", "x")])
        assert not await store.has_unfinished([("busy", "y")])


async def test_an_event_to_dispatch_is_unfinished(queue: Queue) -> None:
    async with queue.connections.lend() as connection:
        store = OperationStore(connection)
        assert not await store.has_unfinished([("busy", "x")])
        await queue.rows("select conductor.emit('x', 'null')")
        assert await store.has_unfinished([("busy", "x")])


@pytest.mark.parametrize(
    "name, values",
    [
        ("count_jobs", {"bound": 10_001}),
        ("oldest_due", {"dead": [1], "bound": 10_001}),
        ("has_unfinished", {"queues": ["busy"], "tasks": ["task-9"]}),
        ("list_jobs", {"queue": None, "task": None, "state": None, "limit": 50}),
        ("show_job", {"id": 1}),
    ],
)
async def test_no_backlog_makes_a_question_slow(
    queue: Queue, name: str, values: dict[str, object]
) -> None:
    await fill(queue)
    async with queue.connections.lend() as connection:
        cursor = await connection.execute(b"explain (analyze) " + QUERIES[name], values)
        plan = "\n".join([line async for (line,) in cursor])
    assert "Seq Scan on jobs" not in plan
    assert "JIT" not in plan
