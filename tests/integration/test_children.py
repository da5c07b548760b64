from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from conductor import (
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    Conductor,
    Context,
    Emitted,
    Invocation,
    NonRetryable,
    OnEvent,
    Orchestrator,
    SyncContext,
    define_event,
    define_task,
)
from conductor.errors import JobFailed
from conductor.retry import RetryPolicy
from conductor.worker import claiming
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio

AT_ONCE = RetryPolicy(initial_s=0, max_s=0, jitter=0)


class Pack(BaseModel):
    order: int


class Packed(BaseModel):
    box: str


class Started(BaseModel):
    order: int


pack = define_task("pack", payload=Pack, returns=Packed)
other = define_task("other", payload=Pack, returns=Packed, queue="other")
parent = define_task("parent", payload=dict[str, Any], returns=Any)
order_started = define_event("order.started", payload=Started)


class Shop:
    """An application with a parent and a child whose handlers a test gives."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.conductor = Conductor(
            queue.database.dsn, tasks=[pack, other, parent], events=[order_started]
        )
        self.ran: Counter[str] = Counter()

    def children(self, work: Callable[[Pack, Any], Awaitable[Packed]] | None = None) -> None:
        async def packing(event: Invocation[Pack], ctx: Context[None]) -> Packed:
            self.ran["pack"] += 1
            if work is not None:
                return await work(event.payload, ctx)
            return Packed(box=f"box {event.payload.order}")

        for definition in (pack, other):
            self.conductor.task(definition, max_attempts=2, retry=AT_ONCE)(packing)

    def parent(self, handler: Callable[[Any, Any], Any], **options: Any) -> None:
        self.conductor.task(parent, retry=AT_ONCE, **options)(handler)

    async def run(self, payload: dict[str, Any] | None = None, **options: Any) -> Any:
        async with Orchestrator(self.conductor, **options):
            handle = await self.conductor.invoke(parent, payload or {})
            return await handle.result(timeout_s=60)


@pytest.fixture
async def shop(queue: Queue) -> AsyncIterator[Shop]:
    shop = Shop(queue)
    yield shop
    await shop.conductor.close()


@pytest.mark.parametrize("task", [pack, other], ids=["same queue", "another queue"])
async def test_a_child_is_awaited_without_a_slot(shop: Shop, task: Any) -> None:
    shop.children()

    async def handler(event: Any, ctx: Context[None]) -> Any:
        shop.ran["parent"] += 1
        first = await ctx.invoke("one", task, Pack(order=1))
        second = await ctx.invoke("two", task, Pack(order=2))
        return [first.box, second.box]

    shop.parent(handler)
    assert await shop.run(slots=1) == ["box 1", "box 2"]
    assert shop.ran == {"pack": 2, "parent": 3}
    rows = await shop.queue.rows("select * from conductor.history order by id")
    assert [row["parent"] for row in rows] == [None, rows[0]["id"], rows[0]["id"]]
    assert await shop.queue.value("select count(*) from conductor.steps") == 0
    assert await shop.queue.value("select count(*) from conductor.wakeups") == 0


async def test_a_child_of_another_queue_and_its_parent_wait_for_no_poll(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHORTEST_POLL_S", "LONGEST_POLL_S"):  # only hints can end this pause
        monkeypatch.setattr(claiming, name, 3600.0)
    shop.children()

    async def handler(_event: Any, ctx: Context[None]) -> str:
        return (await ctx.invoke("one", other, Pack(order=1))).box

    shop.parent(handler)
    async with Orchestrator(shop.conductor):
        await shop.queue.until(
            "select exists (select from pg_stat_activity where query = 'listen conductor_jobs')"
        )
        for _ in range(3):
            handle = await shop.conductor.invoke(parent, {}, hint=True)
            assert await handle.result(timeout_s=60) == "box 1"


async def test_a_waiting_job_has_its_state(shop: Shop) -> None:
    go = asyncio.Event()

    async def work(payload: Pack, _ctx: Any) -> Packed:
        await go.wait()
        return Packed(box="at last")

    shop.children(work)

    async def handler(_event: Any, ctx: Context[None]) -> str:
        return (await ctx.invoke("one", pack, Pack(order=1))).box

    shop.parent(handler)
    async with Orchestrator(shop.conductor):
        handle = await shop.conductor.invoke(parent, {})
        state = "select state = 'waiting' from conductor.job where id = %s"
        await shop.queue.until(state, handle.id)
        job = (await shop.queue.rows("select * from conductor.job where id = %s", handle.id))[0]
        assert (job["worker"], job["attempt"]) == (None, 0)
        go.set()
        assert await handle.result(timeout_s=60) == "at last"


async def test_a_failed_child_can_be_caught(shop: Shop) -> None:
    async def work(_payload: Pack, _ctx: Any) -> Packed:
        raise ValueError("no box")

    shop.children(work)

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        try:
            await ctx.invoke("one", pack, Pack(order=1))
        except ChildFailed as error:
            return [error.error["type"], error.error["message"]]

    shop.parent(handler)
    assert await shop.run() == ["ValueError", "no box"]
    assert shop.ran["pack"] == 2


async def test_a_failed_child_fails_its_parent_at_once(shop: Shop) -> None:
    async def work(_payload: Pack, _ctx: Any) -> Packed:
        raise NonRetryable("no box")

    shop.children(work)

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        await ctx.invoke("one", pack, Pack(order=1))

    shop.parent(handler)
    with pytest.raises(JobFailed, match="ChildFailed"):
        await shop.run()
    assert shop.ran["pack"] == 1


async def test_a_cancelled_child_can_be_caught(shop: Shop) -> None:
    async def work(_payload: Pack, ctx: Any) -> Packed:
        await shop.conductor.cancel(ctx.job.id, "not needed")
        await asyncio.sleep(60)
        return Packed(box="")

    shop.children(work)

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        try:
            await ctx.invoke("one", pack, Pack(order=1))
        except ChildCancelled as error:
            return str(error)

    shop.parent(handler)
    assert "not needed" in await shop.run()


@pytest.mark.parametrize("cancels", [True, False])
async def test_a_late_child_can_be_given_up(shop: Shop, cancels: bool) -> None:
    async def work(_payload: Pack, ctx: Any) -> Packed:
        await ctx.sleep("long", 3600)
        return Packed(box="")

    shop.children(work)

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        try:
            await ctx.invoke("one", pack, Pack(order=1), timeout=0.3, cancel_on_timeout=cancels)
        except ChildTimeout:
            await ctx.sleep("a little", 0.2)
            return "gone on"

    shop.parent(handler)
    assert await shop.run() == "gone on"
    child = "select state from conductor.job where task = 'pack'"
    if cancels:
        await shop.queue.until(f"select ({child}) = 'cancelled'")
    else:
        assert await shop.queue.value(child) in {"scheduled", "ready"}  # asleep, or not yet


async def test_a_retried_parent_awaits_the_same_child(shop: Shop) -> None:
    shop.children()

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        box = (await ctx.invoke("one", pack, Pack(order=1))).box
        if not ctx.job.attempt:
            raise ValueError("after the child")
        return box

    shop.parent(handler)
    assert await shop.run() == "box 1"
    assert shop.ran["pack"] == 1


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_child_ends_with_its_parent(shop: Shop, how: str) -> None:
    there = "select exists (select from conductor.jobs where task = 'pack')"

    async def work(_payload: Pack, ctx: Any) -> Packed:
        await ctx.sleep("long", 3600)
        return Packed(box="")

    shop.children(work)

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        if how == "cancelled":
            await ctx.invoke("one", pack, Pack(order=1))
        waiting = asyncio.ensure_future(ctx.invoke("two", pack, Pack(order=2)))
        await ctx.step("wait for it", lambda: shop.queue.until(there), returns=None)
        waiting.cancel()
        raise NonRetryable("no more")

    shop.parent(handler)
    async with Orchestrator(shop.conductor):
        handle = await shop.conductor.invoke(parent, {})
        if how == "cancelled":
            await shop.queue.until(
                "select count(*) = 2 from conductor.jobs where state in ('waiting', 'scheduled')"
            )
            assert await handle.cancel("changed my mind")
        cancelled = "select from conductor.history where task = 'pack' and outcome = 'cancelled'"
        await shop.queue.until(f"select exists ({cancelled})")
    assert await shop.queue.value("select state from conductor.job where task = 'parent'") == how


async def test_children_and_steps_side_by_side(shop: Shop) -> None:
    shop.children()

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        first, second, third = await ctx.gather(
            ctx.invoke("one", pack, Pack(order=1)),
            ctx.invoke("two", pack, Pack(order=2)),
            ctx.step("three", lambda: shop.ran.update(["three"]), returns=None),
        )
        await ctx.step("after", lambda: shop.ran.update(["after"]), returns=None)
        if not ctx.job.attempt:
            raise ValueError("again")
        return [first.box, second.box, third]

    shop.parent(handler)
    assert await shop.run() == ["box 1", "box 2", None]
    assert shop.ran == {"pack": 2, "three": 1, "after": 1}


async def test_many_children(shop: Shop) -> None:
    shop.children()

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        packed = await ctx.gather(
            *(ctx.invoke(f"pack {n}", pack, Pack(order=n)) for n in range(300))
        )
        return [one.box for one in packed]

    shop.parent(handler)
    assert await shop.run() == [f"box {n}" for n in range(300)]
    assert shop.ran["pack"] == 300


async def test_a_gather_raises_its_first_error_when_all_have_ended(shop: Shop) -> None:
    shop.children()

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        def fail() -> None:
            raise NonRetryable("in the step")

        await ctx.gather(ctx.invoke("one", pack, Pack(order=1)), ctx.step("two", fail))

    shop.parent(handler)
    with pytest.raises(JobFailed, match="in the step"):
        await shop.run()
    assert shop.ran["pack"] == 1


async def test_a_gather_has_the_same_names_in_every_run(shop: Shop) -> None:
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        names = ["a", "b"] if not ctx.job.attempt else ["a", "c"]
        await ctx.gather(*(ctx.step(name, lambda: 1) for name in names))
        raise ValueError("again")

    shop.parent(handler)
    with pytest.raises(JobFailed, match=r"StepOrderChanged: .*: b, c"):
        await shop.run()


async def test_the_first_of_several(shop: Shop) -> None:
    async def work(payload: Pack, ctx: Any) -> Packed:
        if payload.order == 2:
            await ctx.sleep("long", 3600)
        return Packed(box=f"box {payload.order}")

    shop.children(work)

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        match await ctx.wait_for_any(
            "first",
            ctx.invoke("two", pack, Pack(order=2)),
            ctx.invoke("one", pack, Pack(order=1)),
            ctx.sleep("a while", 3600),
        ):
            case (1, packed):
                box = packed.box
            case (place, _):
                box = f"place {place}"
        await ctx.sleep("a little", 0.2)
        return box

    shop.parent(handler)
    assert await shop.run() == "box 1"


async def test_a_started_job_goes_on_alone(shop: Shop) -> None:
    shop.children()
    handles: list[Any] = []

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        handle = await ctx.start("one", pack, Pack(order=1), delay=0.2, key="k")
        handles.append(handle)
        if not ctx.job.attempt:
            raise ValueError("again")
        return handle.id

    shop.parent(handler)
    async with Orchestrator(shop.conductor):
        job = await (await shop.conductor.invoke(parent, {}, metadata={"trace": "t"})).result(60)
        assert {handle.id for handle in handles} == {job}
        assert await handles[0].result(timeout_s=60) == Packed(box="box 1")
    row = (await shop.queue.rows("select * from conductor.history where id = %s", job))[0]
    assert (row["parent"], row["key"], row["metadata"]) == (None, "k", {"trace": "t"})
    assert shop.ran["pack"] == 1


async def test_a_started_job_can_be_cancelled(shop: Shop) -> None:
    shop.children()

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        handle = await ctx.start("one", pack, Pack(order=1), delay=3600)
        await ctx.cancel(handle)

    shop.parent(handler)
    async with Orchestrator(shop.conductor):
        await (await shop.conductor.invoke(parent, {})).result(60)
        cancelled = "select from conductor.history where task = 'pack' and outcome = 'cancelled'"
        await shop.queue.until(f"select exists ({cancelled})")


async def test_an_event_is_emitted_once(shop: Shop) -> None:
    got: list[int] = []

    @shop.conductor.task("listen", OnEvent(order_started))
    async def listen(event: Emitted[Started], ctx: Context[None]) -> None:
        got.append(event.payload.order)
        assert ctx.metadata == {"trace": "t"}

    async def handler(_event: Any, ctx: Context[None]) -> Any:
        await ctx.emit("tell", order_started, Started(order=7))
        if not ctx.job.attempt:
            raise ValueError("again")

    shop.parent(handler)
    async with Orchestrator(shop.conductor) as orchestrator:
        await (await shop.conductor.invoke(parent, {}, metadata={"trace": "t"})).result(60)
        await orchestrator.drain()
    assert got == [7]


async def test_a_thread_awaits_a_child(shop: Shop) -> None:
    shop.children()

    def handler(_event: Any, ctx: SyncContext[None]) -> Any:
        packed = ctx.invoke("one", pack, Pack(order=1))
        ctx.emit("tell", order_started, Started(order=7))
        handle = ctx.start("two", pack, Pack(order=2), delay=3600)
        ctx.cancel(handle)
        return packed.box

    shop.parent(handler)
    assert await shop.run() == "box 1"
