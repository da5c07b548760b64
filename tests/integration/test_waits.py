from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from conductor import (
    Conductor,
    Context,
    JobHandle,
    Orchestrator,
    SyncContext,
    WaitTimeout,
    define_event,
    define_task,
)
from conductor.durable import Run
from conductor.errors import JobFailed
from conductor.metrics import Metrics
from conductor.retry import RetryPolicy
from conductor.store.steps import StoredStep
from tests.integration.conftest import Queue
from tests.integration.workers import Workshop

pytestmark = pytest.mark.anyio

AT_ONCE = RetryPolicy(initial_s=0, max_s=0, jitter=0)


class Paid(BaseModel):
    order: int
    amount: int = 0
    note: str = ""


wait = define_task("wait", payload=int, returns=Any)
paid = define_event("order.paid", payload=Paid)


class Till:
    """An application with one task that waits."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.conductor = Conductor(queue.database.dsn, tasks=[wait], events=[paid])

    async def start(self, *orders: int) -> list[JobHandle[Any]]:
        """Invoke, and return when all wait."""
        handles = await self.conductor.invoke_many(wait, orders)
        await self.waiting(len(orders))
        return handles

    async def waiting(self, count: int) -> None:
        await self.queue.until(
            "select count(*) = %s from conductor.jobs where state = 'waiting'", count
        )

    async def pay(self, order: int, **rest: Any) -> None:
        await self.conductor.emit(paid, Paid(order=order, **rest))


@pytest.fixture
async def till(queue: Queue) -> AsyncIterator[Till]:
    till = Till(queue)
    yield till
    await till.conductor.close()


async def test_an_event_wakes_who_waits_for_it(till: Till) -> None:
    @till.conductor.task(wait)
    async def handler(event: Any, ctx: Context[None]) -> Any:
        got = await ctx.wait_for_event("paid", paid, match={"order": event.payload})
        return [got.order, got.amount]

    async with Orchestrator(till.conductor, slots=1):
        one, two = await till.start(1, 2)
        await till.pay(3)
        await till.pay(2, amount=20)
        assert await two.result(timeout_s=60) == [2, 20]
        await till.waiting(1)
        await till.pay(1, amount=10)
        assert await one.result(timeout_s=60) == [1, 10]
    assert await till.queue.value("select count(*) from conductor.wakeups") == 0


async def test_a_filter_and_no_fields(till: Till) -> None:
    @till.conductor.task(wait)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        return (await ctx.wait_for_event("paid", paid, when="event.amount > 5")).order

    async with Orchestrator(till.conductor):
        (one,) = await till.start(0)
        await till.pay(1, amount=5)
        await till.pay(2, amount=6)
        assert await one.result(timeout_s=60) == 2


async def test_a_filter_that_fails_ends_the_wait(till: Till) -> None:
    @till.conductor.task(wait)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        await ctx.wait_for_event("paid", paid, when="int(event.note) > 5")

    async with Orchestrator(till.conductor):
        (one,) = await till.start(0)
        await till.pay(1, note="x")
        with pytest.raises(JobFailed, match="FilterFailed"):
            await one.result(timeout_s=60)


async def test_a_wait_can_end_without_an_event(till: Till) -> None:
    @till.conductor.task(wait)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        try:
            await ctx.wait_for_event("paid", paid, match={"order": 1}, timeout=0.3)
        except WaitTimeout:
            await ctx.sleep("on", 3600)
            return "too late"

    async with Orchestrator(till.conductor):
        handle = await till.conductor.invoke(wait, 0)
        state = "select state = 'scheduled' from conductor.job where id = %s"
        await till.queue.until(state, handle.id)
        await till.pay(1)
        await till.queue.pass_by(hours=1)
        assert await handle.result(timeout_s=60) == "too late"


async def test_what_was_emitted_before_does_not_match(till: Till) -> None:
    @till.conductor.task(wait)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        return (await ctx.wait_for_event("paid", paid, match={"order": 1})).amount

    await till.queue.rows("insert into conductor.queues values ('conductor.internal', true)")
    await till.pay(1, amount=1)  # committed, and not dispatched yet
    async with Orchestrator(till.conductor):
        (one,) = await till.start(1)
        await till.pay(1, amount=2)
        await till.queue.rows("update conductor.queues set paused = false")
        assert await one.result(timeout_s=60) == 2


async def test_nothing_is_lost_between_subscribing_and_waiting(till: Till) -> None:
    @till.conductor.task(wait)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        payment = await ctx.subscribe("paid", paid, match={"order": 1})
        await ctx.step("ask", lambda: till.pay(1, amount=9), returns=None)
        await ctx.sleep("a little", 0.3)
        return (await payment.wait(timeout=60)).amount

    async with Orchestrator(till.conductor):
        handle = await till.conductor.invoke(wait, 0)
        assert await handle.result(timeout_s=60) == 9


async def test_a_subscription_can_run_out(till: Till) -> None:
    @till.conductor.task(wait)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        payment = await ctx.subscribe("paid", paid)
        try:
            await payment.wait(timeout=0.2)
        except WaitTimeout:
            await ctx.step("pay", lambda: till.pay(1), returns=None)
            await ctx.sleep("a little", 0.5)
            return "late"

    async with Orchestrator(till.conductor):
        handle = await till.conductor.invoke(wait, 0)
        assert await handle.result(timeout_s=60) == "late"


async def test_the_first_of_two_waits(till: Till) -> None:
    refused = define_event("order.refused", payload=Paid)
    till.conductor.events[refused.name] = refused

    @till.conductor.task(wait)
    async def handler(event: Any, ctx: Context[None]) -> Any:
        match = {"order": event.payload}
        first = await ctx.wait_for_any(
            "first",
            ctx.wait_for_event("paid", paid, match=match),
            ctx.wait_for_event("refused", refused, match=match),
        )
        await ctx.sleep("a little", 0.2)
        return [first[0], first[1].amount]

    async with Orchestrator(till.conductor):
        one, two = await till.start(1, 2)
        await till.conductor.emit(refused, Paid(order=1, amount=4))
        await till.pay(2, amount=5)
        assert await one.result(timeout_s=60) == [1, 4]
        assert await two.result(timeout_s=60) == [0, 5]


async def test_a_thread_waits(till: Till) -> None:
    @till.conductor.task(wait)
    def handler(event: Any, ctx: SyncContext[None]) -> Any:
        return ctx.wait_for_event("paid", paid, match={"order": event.payload}).amount

    async with Orchestrator(till.conductor, slots=1):
        one, two = await till.start(1, 2)
        await till.pay(2, amount=2)
        await till.pay(1, amount=1)
        assert [await one.result(60), await two.result(60)] == [1, 2]


async def test_waits_and_events_race(till: Till) -> None:
    """Each job asks for its event just before it waits: none may be lost, none taken twice."""

    @till.conductor.task(wait, retry=AT_ONCE)
    async def handler(event: Any, ctx: Context[None]) -> Any:
        order = event.payload
        payment = await ctx.subscribe("paid", paid, match={"order": order})
        await ctx.step("ask", lambda: asked.put(order), returns=None)
        got = [(await payment.wait(timeout=60)).amount]
        again = await ctx.wait_for_event("again", paid, match={"order": -order}, timeout=60)
        return [*got, again.amount]

    asked: asyncio.Queue[int] = asyncio.Queue()

    async def answer() -> None:
        while True:
            order = await asked.get()
            await till.pay(order, amount=order)

    async def remind() -> None:
        reminded: set[str] = set()
        while True:
            waiting = await till.queue.column(
                "select matched from conductor.steps where name = 'again' and outcome is null"
            )
            for matched in set(waiting) - reminded:  # once: there is no second chance
                reminded.add(matched)
                await till.pay(int(matched[1:-1]), amount=-1)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group, Orchestrator(till.conductor, slots=20):
        tasks = [group.create_task(work()) for work in (answer, answer, answer, remind)]
        handles = await till.conductor.invoke_many(wait, range(1, 201))
        results = [await handle.result(timeout_s=60) for handle in handles]
        for task in tasks:
            task.cancel()
    assert results == [[n, -1] for n in range(1, 201)]
    assert await till.queue.value("select count(*) from conductor.steps") == 0


@pytest.mark.pg(18)
async def test_events_and_timeouts_race_for_one_step(till: Till) -> None:
    """What each job saw first it sees in every later run, and it saw no more than one of them."""
    jobs, timeout_s = 300, 0.6

    @till.conductor.task(wait, retry=AT_ONCE)
    async def handler(event: Any, ctx: Context[None]) -> Any:
        order = event.payload
        payment = await ctx.subscribe("paid", paid, match={"order": order})
        await ctx.step("ask", lambda: asked.put_nowait(order), returns=None)

        async def look() -> str:
            try:
                return f"paid {(await payment.wait(timeout=timeout_s)).amount}"
            except WaitTimeout:
                return "late"

        first = await look()
        seen = await ctx.step("seen", lambda: first, returns=str)
        await ctx.sleep("a little", 0.1 + order % 7 / 10)
        return [first, seen]

    asked: asyncio.Queue[int] = asyncio.Queue()
    rng = random.Random(7)

    async def pay_about_then(order: int) -> None:
        if order % 10 == 0:  # on a machine of any speed some are late, and some are not
            return
        await asyncio.sleep(timeout_s * rng.uniform(0.5, 1.5) if order % 10 > 1 else 0)
        for amount in (1, 2):  # the second finds nobody, or who has not given up yet
            await till.pay(order, amount=amount)

    async with asyncio.TaskGroup() as group, Orchestrator(till.conductor, slots=50):
        handles = await till.conductor.invoke_many(wait, range(jobs))
        for _ in range(jobs):
            group.create_task(pay_about_then(await asked.get()))
        results = [await handle.result(timeout_s=60) for handle in handles]
    assert all(first == seen for first, seen in results)
    counts = Counter(first for first, _ in results)
    assert counts.keys() <= {"paid 1", "paid 2", "late"}
    assert counts["late"]
    assert counts["paid 1"]
    await till.queue.until("select count(*) = 0 from conductor.jobs")
    await till.queue.until("select count(*) = 0 from conductor.wakeups")
    assert await till.queue.value("select count(*) from conductor.steps") == 0


async def test_what_comes_before_a_job_gives_up_counts(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: it comes when the run has seen that it is too late, and not written so yet."""
    give_up = Run.give_up

    async def hesitate(run: Run, step: StoredStep, **options: Any) -> StoredStep:
        job = run.info.id
        await till.queue.rows(
            "insert into conductor.wakeups (job, step, outcome, result)"
            " values (%s, 'paid', 'completed', '{\"order\": 1, \"amount\": 5}')",
            job,
        )
        await till.queue.rows("select conductor.wake(array[%s::bigint])", job)
        return await give_up(run, step, **options)

    monkeypatch.setattr(Run, "give_up", hesitate)

    @till.conductor.task(wait)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        return (await ctx.wait_for_event("paid", paid, timeout=0.1)).amount

    async with Orchestrator(till.conductor):
        handle = await till.conductor.invoke(wait, 0)
        assert await handle.result(timeout_s=60) == 5


@pytest.mark.parametrize("woken_while", ["running", "waiting"])
async def test_parking_sees_what_came_meanwhile(queue: Queue, woken_while: str) -> None:
    """By hand: what comes for a running job is found when it is put away."""
    workshop = Workshop(queue, Metrics())
    reached, go = asyncio.Event(), asyncio.Event()

    async def handler(_event: Any, ctx: Any) -> Any:
        payment = await ctx.subscribe("paid", paid)
        if ctx.job.fence == 1 and woken_while == "running":
            reached.set()
            await go.wait()
        return (await payment.wait()).order

    from tests.integration.workers import task  # noqa: PLC0415

    job = await workshop.invoke()
    async with workshop.worker([task(handler)]):
        if woken_while == "running":
            await reached.wait()
        else:
            await queue.until("select state = 'waiting' from conductor.job where id = %s", job)
        await queue.rows(
            "insert into conductor.wakeups (job, step, outcome, result)"
            " values (%s, 'paid', 'completed', '{\"order\": 5}')",
            job,
        )
        await queue.until("select count(*) = 0 from conductor.wakeups")
        go.set()
        row = await workshop.ended(job)
    await workshop.client.close()
    assert (row["result"], row["fence"]) == (5, 2)
