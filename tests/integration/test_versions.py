"""Jobs finish on the version of the handler that they began with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from conductor import (
    Conductor,
    Context,
    Invocable,
    OnEvent,
    Orchestrator,
    define_event,
    define_task,
)
from conductor.errors import DefinitionInvalid
from conductor.metrics import Metrics
from tests.integration.conftest import Queue
from tests.integration.workers import Workshop, task

pytestmark = pytest.mark.anyio

work = define_task("work", payload=int, returns=list[str])
go = define_event("go", payload=int)


class Releases:
    """Applications that have the handlers of these versions, the last for new jobs."""

    def __init__(self, queue: Queue, stack: AsyncExitStack) -> None:
        self.queue, self._stack = queue, stack

    async def make(self, *versions: str | None) -> Conductor[None]:
        conductor = Conductor(self.queue.database.dsn, tasks=[work], events=[go])
        self._stack.push_async_callback(conductor.close)
        for version in versions:
            options: dict[str, Any] = {} if version is None else {"version": version}
            conductor.task(work, **options)(self._handler(version))
        return conductor

    def _handler(self, version: str | None) -> Any:
        async def handler(event: Any, ctx: Context[None]) -> list[str]:
            began = await ctx.step(f"begin {version}", lambda: f"{version}", returns=str)
            await ctx.wait_for_event("go", go, match=None, when=f"event == {event.payload}")
            return [began, f"{version}", f"{ctx.job.code}"]

        return handler

    async def begin(self, conductor: Conductor[None], number: int) -> Any:
        async with Orchestrator(conductor):
            handle = await conductor.invoke(work, number)
            state = "select state = 'waiting' from conductor.job where id = %s"
            await self.queue.until(state, handle.id)
        return handle


@pytest.fixture
async def releases(queue: Queue) -> AsyncIterator[Releases]:
    async with AsyncExitStack() as stack:
        yield Releases(queue, stack)


@pytest.mark.parametrize("first", ["1", None])
async def test_old_jobs_finish_on_old_code(releases: Releases, first: str | None) -> None:
    old = await releases.begin(await releases.make(first), 1)
    newer = await releases.make(first, "2")
    new = await releases.begin(newer, 2)
    async with Orchestrator(newer):
        await newer.emit(go, 2)
        await newer.emit(go, 1)
        assert await old.result(timeout_s=60) == [f"{first}"] * 3
        assert await new.result(timeout_s=60) == ["2"] * 3


async def test_a_job_waits_for_a_worker_with_its_version(releases: Releases) -> None:
    old = await releases.begin(await releases.make("1"), 1)
    newer = await releases.make("2")
    async with Orchestrator(newer):
        await newer.emit(go, 1)
        await releases.queue.until(
            "select state = 'ready' from conductor.job where id = %s", old.id
        )
        young = await newer.invoke(work, 2)  # what stands behind it is not kept
        state = "select state = 'waiting' from conductor.job where id = %s"
        await releases.queue.until(state, young.id)
        assert await releases.queue.value(
            "select state = 'ready' and fence = 1 from conductor.job where id = %s", old.id
        )
        async with Orchestrator(await releases.make("1")):
            assert await old.result(timeout_s=60) == ["1"] * 3


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_job_keeps_its_version_once_it_has_taken_a_step(
    queue: Queue, has_begun: bool
) -> None:
    """One that was claimed and never started, or died before its first step, runs on any."""
    workshop = Workshop(queue, Metrics())

    async def handler(_event: Any, ctx: Any) -> Any:
        return ctx.job.code

    job = await workshop.invoke(fence=3, code="2")
    if has_begun:
        await queue.rows("insert into conductor.steps (job, name) values (%s, 'one')", job)
    async with workshop.worker([task(handler, code="1")]):
        if has_begun:
            await workshop.ended(await workshop.invoke())  # what stands behind it
            left = "select state = 'ready' and code = '2' and fence = 3 from conductor.jobs"
            assert await queue.value(left)
        else:
            row = await workshop.ended(job)
            assert (row["result"], row["code"]) == ("1", "1")
    await workshop.client.close()


async def test_versions_of_a_task_by_name(queue: Queue) -> None:
    conductor = Conductor(queue.database.dsn)

    async def handler(_event: Any, _ctx: Context[None]) -> None: ...

    conductor.task("note", OnEvent(go), version="1")(handler)
    newest = conductor.task("note", OnEvent(go), version="2")(handler)
    assert newest.codes == {"1", "2"}
    with pytest.raises(DefinitionInvalid, match="defined twice"):
        conductor.task("note", OnEvent(go), version="3", queue="other")(handler)


async def test_a_version_has_one_handler(releases: Releases) -> None:
    with pytest.raises(DefinitionInvalid, match="a handler already"):
        await releases.make("1", "2", "1")


LEFT_ALONE = """
select count(*) = 1 from conductor.jobs
where task = 'note' and fence > 0 and state <> 'running' and attempt = 0
"""


async def test_a_job_of_a_trigger_that_is_missing_is_left_to_its_version(queue: Queue) -> None:
    ran: list[str | None] = []

    def application(version: str, *triggers: Any) -> Conductor[None]:
        conductor = Conductor(queue.database.dsn, events=[go], version=version)

        @conductor.task("note", *triggers)
        async def handler(_event: Any, ctx: Context[None]) -> None:
            ran.append(f"{ctx.job.version} by {version}")

        return conductor

    old, new = application("1", Invocable()), application("2", Invocable(), OnEvent(go))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(old.close)
        stack.push_async_callback(new.close)
        one = await stack.enter_async_context(Orchestrator(old))
        two = Orchestrator(new)
        await two.start()
        for number in range(40):
            await new.emit(go, number)
        await queue.until("select count(*) = 40 from conductor.history where task = 'note'")
        assert ran == ["2 by 2"] * 40
        await two.stop()
        assert one.is_started
        await new.emit(go, 0)  # the newest version may be about to come
        await queue.until(LEFT_ALONE)
        two = await stack.enter_async_context(Orchestrator(new))
        await queue.until("select count(*) = 41 from conductor.history where task = 'note'")
        assert ran == ["2 by 2"] * 41
        await two.stop()
        await new.emit(go, 0)
        await queue.until(LEFT_ALONE)
        await stack.enter_async_context(Orchestrator(old))  # a rollback: nobody is left who could
        await queue.until("select count(*) = 42 from conductor.history where task = 'note'")
    (failed,) = await queue.rows("select error from conductor.history where outcome = 'failed'")
    assert failed["error"]["type"] == "TriggerMissing"


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled", "crashed"])
async def test_history_keeps_the_version(queue: Queue, how: str) -> None:
    workshop = Workshop(queue, Metrics())

    async def handler(_event: Any, ctx: Any) -> None:
        await ctx.step("begin", lambda: None)
        if how == "failed":
            raise ValueError(how)
        if how == "cancelled":
            await ctx.sleep("long", 3600)

    job = await workshop.invoke()
    if how == "crashed":
        await queue.rows(
            "with dead as (insert into conductor.workers (app, queue, tasks, host, pid, slots,"
            " renewals) values ('a', 'default', '{work}', 'h', 1, 1, -1) returning id)"
            " update conductor.jobs set state = 'running', code = '1', crashes = 2,"
            " worker = dead.id from dead"
        )
    async with workshop.worker([task(handler, code="1", max_attempts=1)]):
        if how == "cancelled":
            await queue.until("select state = 'scheduled' from conductor.jobs")
            await queue.value("select conductor.cancel(%s)", job)
        row = await workshop.ended(job)
    await workshop.client.close()
    assert (row["state"], row["code"]) == ("failed" if how == "crashed" else how, "1")
