"""How handlers are left: what they clean up, wait for at their end, and have not awaited yet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conductor.errors import JobCancelled
from conductor.metrics import Metrics
from tests.integration.conftest import Queue
from tests.integration.test_context import Tally, finish
from tests.integration.workers import Workshop, task

pytestmark = pytest.mark.anyio


@pytest.fixture
def workshop(queue: Queue, metrics: Metrics) -> Workshop:
    return Workshop(queue, metrics)


async def cancel_at(workshop: Workshop, began: asyncio.Event, handler: Any) -> dict[str, Any]:
    job = await workshop.invoke()
    async with workshop.worker([task(handler)]):
        await asyncio.wait_for(began.wait(), 60)
        await workshop.queue.value("select conductor.cancel(%s)", job)
        return await workshop.ended(job)


async def test_a_cancelled_handler_cannot_wait_for_what_it_cleans_up(workshop: Workshop) -> None:
    """The wait hung for ever, in its slot; the child would be cancelled with the job."""
    began, refused = asyncio.Event(), list[str]()

    async def handler(_event: Any, ctx: Any) -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            with pytest.raises(JobCancelled, match="nothing can be waited for"):
                await ctx.sleep("nap", 60)
            with pytest.raises(JobCancelled, match="'undo'"):
                await ctx.invoke("undo", task(handler), {})
            refused.append("both")

    row = await cancel_at(workshop, began, handler)
    assert (row["state"], refused) == ("cancelled", ["both"])
    assert await workshop.queue.value("select count(*) from conductor.jobs") == 0


async def test_a_handler_out_of_time_cannot_wait_for_what_it_cleans_up(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await ctx.sleep("nap", 60)

    row = await finish(workshop, handler, timeout_s=0.1, max_attempts=1)
    assert (row["state"], row["error"]["type"]) == ("failed", "JobTimedOut")


async def test_a_wait_beside_the_handler_ends_with_it_when_cancelled(workshop: Workshop) -> None:
    began = asyncio.Event()

    async def handler(_event: Any, ctx: Any) -> None:
        beside = asyncio.create_task(ctx.sleep("beside", 60))
        try:
            await ctx.step("work", began.set)
            await ctx.step("long", asyncio.Event().wait)
        finally:
            await beside

    row = await cancel_at(workshop, began, handler)
    assert row["state"] == "cancelled"


async def test_a_wait_beside_the_handler_ends_with_its_run(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> str:
        beside = asyncio.create_task(ctx.sleep("beside", 0.1))
        try:
            await ctx.sleep("nap", 0.05)
        finally:
            await beside
        return "done"

    row = await finish(workshop, handler)
    assert (row["result"], row["attempt"]) == ("done", 0)


async def test_an_error_that_the_handler_has_not_seen_yet_is_tried_again(
    workshop: Workshop,
) -> None:
    tally = Tally()

    def flaky() -> str:
        tally.ran["flaky"] += 1
        if tally.ran["flaky"] == 1:
            raise ValueError("not yet")
        return "at last"

    async def handler(_event: Any, ctx: Any) -> Any:
        beside = asyncio.create_task(ctx.step("beside", flaky))
        await asyncio.wait([beside])
        await ctx.step("work", tally.step("work"))
        return await beside

    row = await finish(workshop, handler, max_attempts=2)
    assert (row["result"], row["attempt"]) == ("at last", 1)
    assert tally.ran == {"flaky": 2, "work": 1}


async def test_an_error_that_the_handler_has_seen_beside_it_is_kept(workshop: Workshop) -> None:
    tally = Tally()

    def broken() -> None:
        tally.ran["broken"] += 1
        raise ValueError("for good")

    async def handler(_event: Any, ctx: Any) -> str:
        beside = asyncio.create_task(ctx.step("beside", broken))
        try:
            await beside
        except ValueError:
            await ctx.sleep("nap", 0.05)
        return "gone on"

    row = await finish(workshop, handler)
    assert (row["result"], tally.ran) == ("gone on", {"broken": 1})


async def test_a_step_that_lost_the_race_is_not_begun_again(workshop: Workshop) -> None:
    began: list[str] = []

    async def run(name: str, lasts: bool) -> str:
        began.append(name)
        if lasts:
            await asyncio.Event().wait()
        return name

    async def handler(_event: Any, ctx: Any) -> Any:
        first = await ctx.wait_for_any(
            "first",
            ctx.step("slow", lambda: run("slow", True)),
            ctx.step("fast", lambda: run("fast", False)),
        )
        await ctx.sleep("nap", 0.05)
        return first

    row = await finish(workshop, handler)
    assert (row["result"], row["fence"]) == ([1, "fast"], 2)
    assert began == ["slow", "fast"]
