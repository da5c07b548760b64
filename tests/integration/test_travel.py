from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

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
