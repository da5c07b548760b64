"""Jobs finish on the version of the handler that they began with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from conductor import Conductor, Context, Orchestrator, define_event, define_task
from conductor.errors import DefinitionInvalid
from tests.integration.conftest import Queue

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
        assert await old.result(timeout_s=20) == [f"{first}"] * 3
        assert await new.result(timeout_s=20) == ["2"] * 3


async def test_a_job_waits_for_a_worker_with_its_version(releases: Releases) -> None:
    old = await releases.begin(await releases.make("1"), 1)
    newer = await releases.make("2")
    async with Orchestrator(newer):
        await newer.emit(go, 1)
        given_back = "select state = 'scheduled' and attempt = 0 from conductor.job where id = %s"
        await releases.queue.until(given_back, old.id)
        async with Orchestrator(await releases.make("1")):
            assert await old.result(timeout_s=20) == ["1"] * 3


async def test_a_version_has_one_handler(releases: Releases) -> None:
    with pytest.raises(DefinitionInvalid, match="a handler already"):
        await releases.make("1", "2", "1")
