from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from conductor import Conductor, Cron, Orchestrator, define_task
from conductor.connections import Connections
from conductor.metrics import Metrics
from conductor.testing import travel
from tests.integration.conftest import Queue
from tests.integration.workers import Workshop, task

pytestmark = pytest.mark.anyio


async def test_a_sleep_of_days_is_over(queue: Queue) -> None:
    workshop = Workshop(queue, Metrics())

    async def handler(_event: Any, ctx: Any) -> str:
        await ctx.sleep("three days", timedelta(days=3))
        return "rested"

    job = await workshop.invoke()
    connections = Connections(queue.database.dsn, 1, "travel")
    async with workshop.worker([task(handler)]), connections.lend() as connection:
        asleep = "select state = 'scheduled' from conductor.job where id = %s"
        await queue.until(asleep, job)
        await travel(connection, timedelta(days=2))
        assert await queue.value(asleep, job)
        await travel(connection, timedelta(days=1, seconds=5))
        row = await workshop.ended(job)
    await connections.close()
    await workshop.client.close()
    assert row["result"] == "rested"


async def test_a_schedule_comes_and_a_dedupe_key_is_free_again(queue: Queue) -> None:
    app, ran = Conductor(queue.database.dsn), list[str]()
    remind = define_task("remind")

    @app.task(remind)
    async def reminding(_event: Any, _ctx: Any) -> None:
        ran.append("invoked")

    @app.task("yearly", Cron("0 0 1 1 *"))
    async def yearly(_event: Any, _ctx: Any) -> None:
        ran.append("yearly")

    orchestrator = Orchestrator(app)
    async with app, orchestrator, queue.connections.lend() as connection:
        for status in ("enqueued", "dropped"):
            handle = await app.invoke(remind, dedupe_key="milk", dedupe_for=timedelta(days=2))
            assert handle.status == status
            await orchestrator.drain()
        assert ran == ["invoked"]
        await travel(connection, timedelta(days=366))
        assert (await app.invoke(remind, dedupe_key="milk")).status == "enqueued"
        await orchestrator.drain()
        assert sorted(ran) == ["invoked", "invoked", "yearly"]
