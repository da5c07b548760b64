"""Batches on a real queue: gathered by size or time, each job settled by its own end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from conductor import Batch, BatchContext, BatchFailed, Conductor, Invocation, define_task
from conductor.definitions import Task
from conductor.errors import NonRetryable, StepMisplaced
from conductor.metrics import Metrics
from conductor.retry import RetryPolicy
from tests.integration.conftest import Queue
from tests.integration.workers import AT_ONCE, Workshop

pytestmark = pytest.mark.anyio

work = define_task("work", payload=int)
Events = Sequence[Invocation[int]]
NEVER = RetryPolicy(initial_s=3600, max_s=3600, jitter=0)


def batched(handler: Any, batch: Batch, **options: Any) -> Task[Any, Any]:
    options = {"retry": AT_ONCE, **options}
    return Conductor("").task(work, batch=batch, **options)(handler)


@pytest.fixture
def workshop(queue: Queue, metrics: Metrics) -> Workshop:
    return Workshop(queue, metrics)


def numbers(events: Events) -> list[int]:
    return [event.payload for event in events]


async def test_a_batch_is_full_or_has_waited(workshop: Workshop) -> None:
    ran: list[list[int]] = []

    async def handler(events: Events, ctx: BatchContext[Any]) -> None:
        assert [job.id for job in ctx.jobs] == [jobs[n] for n in numbers(events)]
        ran.append(numbers(events))

    jobs = await workshop.invoke_many(range(25))
    async with workshop.worker([batched(handler, Batch(size=10, wait_s=0.2))]):
        await workshop.drained()
    assert ran == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    rows = await workshop.queue.rows("select * from conductor.history")
    assert {(row["outcome"], row["attempt"], row["fence"]) for row in rows} == {("completed", 0, 1)}


async def test_jobs_that_hold_every_slot_wait_for_nobody(workshop: Workshop) -> None:
    ran: list[int] = []

    async def handler(events: Events, _ctx: BatchContext[Any]) -> None:
        ran.append(len(events))

    await workshop.invoke_many(range(9))
    async with workshop.worker([batched(handler, Batch(size=100, wait_s=3600))], slots=3):
        await workshop.drained()
    assert ran == [3, 3, 3]


async def test_the_jobs_that_failed_are_tried_again_without_the_others(workshop: Workshop) -> None:
    ran: list[list[int]] = []

    async def handler(events: Events, ctx: BatchContext[Any]) -> None:
        ran.append(numbers(events))
        bad = {
            place: NonRetryable("for good") if event.payload == 4 else ValueError("not yet")
            for place, event in enumerate(events)
            if event.payload % 2 == 0 and ctx.jobs[place].attempt == 0
        }
        if bad:
            raise BatchFailed(bad)

    await workshop.invoke_many(range(5))
    async with workshop.worker([batched(handler, Batch(size=5, wait_s=0.05))]):
        await workshop.drained()
    assert ran[0] == [0, 1, 2, 3, 4]
    assert sorted(n for batch in ran[1:] for n in batch) == [0, 2]
    rows = await workshop.queue.rows(
        "select payload, outcome::text, attempt, error ->> 'type' as error"
        " from conductor.history order by payload::text"
    )
    assert [tuple(row.values()) for row in rows] == [
        (0, "completed", 1, None),
        (1, "completed", 0, None),
        (2, "completed", 1, None),
        (3, "completed", 0, None),
        (4, "failed", 1, "NonRetryable"),
    ]


@pytest.mark.parametrize("error", [ValueError("all of it"), BatchFailed({7: ValueError("nobody")})])
async def test_another_error_fails_them_all(workshop: Workshop, error: Exception) -> None:
    async def handler(_events: Events, _ctx: BatchContext[Any]) -> None:
        raise error

    await workshop.invoke_many(range(3))
    async with workshop.worker([batched(handler, Batch(size=3), max_attempts=2)]):
        await workshop.drained()
    rows = await workshop.queue.rows("select * from conductor.history")
    assert {(row["outcome"], row["attempt"]) for row in rows} == {("failed", 2)}
    assert {row["error"]["type"] for row in rows} == {type(error).__name__}


async def test_a_payload_that_cannot_be_read_fails_alone(workshop: Workshop) -> None:
    ran: list[list[int]] = []

    async def handler(events: Events, _ctx: BatchContext[Any]) -> None:
        ran.append(numbers(events))

    jobs = await workshop.invoke_many([1, "no number", 3])
    async with workshop.worker([batched(handler, Batch(size=3))]):
        await workshop.drained()
    assert ran == [[1, 3]]
    assert (await workshop.job(jobs[1]))["error"]["type"] == "PayloadInvalid"


async def test_a_batch_has_no_steps_and_says_so(workshop: Workshop) -> None:
    async def handler(_events: Events, ctx: Any) -> None:
        await ctx.step("a", lambda: 1)

    job = await workshop.invoke(1)
    async with workshop.worker([batched(handler, Batch(size=1))]):
        row = await workshop.ended(job)
    assert (row["state"], row["attempt"]) == ("failed", 1)
    assert row["error"]["type"] == StepMisplaced.__name__
    assert "a batch has no step" in row["error"]["message"]


async def test_blocking_handlers_take_batches_in_a_thread(workshop: Workshop) -> None:
    threads: set[str] = set()

    def handler(_events: Events, _ctx: BatchContext[Any]) -> None:
        threads.add(threading.current_thread().name)

    await workshop.invoke_many(range(4))
    async with workshop.worker([batched(handler, Batch(size=2))]):
        await workshop.drained()
    assert all(name.startswith("conductor-default") for name in threads)


async def test_a_batch_that_takes_too_long_fails(workshop: Workshop) -> None:
    async def handler(_events: Events, _ctx: BatchContext[Any]) -> None:
        await asyncio.sleep(3600)

    await workshop.invoke_many(range(2))
    bound = batched(handler, Batch(size=2), timeout_s=0.05, max_attempts=1)
    async with workshop.worker([bound]):
        await workshop.drained()
    rows = await workshop.queue.rows("select * from conductor.history")
    assert [row["error"]["type"] for row in rows] == ["JobTimedOut"] * 2


async def test_a_job_is_cancelled_while_it_waits_for_its_batch(workshop: Workshop) -> None:
    ran: list[list[int]] = []

    async def handler(events: Events, _ctx: BatchContext[Any]) -> None:
        ran.append(numbers(events))

    first, _ = await workshop.invoke_many(range(2))
    async with workshop.worker([batched(handler, Batch(size=3, wait_s=3600))]):
        await workshop.queue.until(
            "select count(*) = 2 from conductor.jobs where state = 'running'"
        )
        assert await workshop.client.cancel(first)
        assert (await workshop.ended(first))["state"] == "cancelled"
        await workshop.invoke_many([2, 3])
        await workshop.drained()
    assert [sorted(batch) for batch in ran] == [[1, 2, 3]]


async def test_a_job_that_is_cancelled_in_its_batch_ends_with_it(workshop: Workshop) -> None:
    release = asyncio.Event()

    async def handler(_events: Events, _ctx: BatchContext[Any]) -> None:
        await release.wait()
        raise BatchFailed({0: ValueError("not yet"), 2: ValueError("not yet")})

    first, second, third = await workshop.invoke_many(range(3))
    async with workshop.worker([batched(handler, Batch(size=3), retry=NEVER)]) as worker:
        await workshop.queue.until(
            "select count(*) = 3 from conductor.jobs where state = 'running'"
        )
        for job in (first, second):
            assert await workshop.client.cancel(job)
        member: Any = worker._slots.running[first]
        while member.cancel_reason is None:  # noqa: ASYNC110 - what the upkeep does has no event
            await asyncio.sleep(0.01)
        release.set()
        await workshop.queue.until("select count(*) = 2 from conductor.history")
        assert await workshop.queue.value("select id from conductor.jobs") == third
    assert (await workshop.job(first))["state"] == "cancelled"
    assert (await workshop.job(second))["state"] == "completed"


async def test_a_worker_that_stops_gives_its_batches_back(workshop: Workshop) -> None:
    started = asyncio.Event()

    async def handler(events: Events, _ctx: BatchContext[Any]) -> None:
        started.set()
        await asyncio.sleep(3600)

    await workshop.invoke_many(range(5))  # three run, two wait for their batch
    bound = batched(handler, Batch(size=3, wait_s=3600))
    async with workshop.worker([bound], drain_timeout_s=0.1):
        await started.wait()
        await workshop.queue.until(
            "select count(*) = 5 from conductor.jobs where state = 'running'"
        )
    rows = await workshop.queue.rows("select * from conductor.jobs")
    assert [(row["state"], row["attempt"]) for row in rows] == [("ready", 0)] * 5


async def test_a_suspect_makes_a_batch_of_its_own(workshop: Workshop) -> None:
    ran: list[list[int]] = []

    async def handler(events: Events, _ctx: BatchContext[Any]) -> None:
        ran.append(numbers(events))

    await workshop.invoke(0, state="suspect", crashes=1)
    await workshop.invoke_many([1, 2])
    async with workshop.worker([batched(handler, Batch(size=2, wait_s=3600))]):
        await workshop.drained()
    assert sorted(ran) == [[0], [1, 2]]
