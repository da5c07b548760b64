"""Workflows whose workers are killed: each effect once, nothing lost, nothing settled twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from examples.fulfilment.workflow import create as create_fulfilment
from tests.e2e.durable_worker import PHASES, TABLES, Go, Phase, create, go, work
from tests.e2e.worker_processes import Workers
from tests.integration.conftest import Queue, eventually
from tests.integration.sidecar import drop_slot, running
from tests.servers import ScratchDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.pg(18), pytest.mark.timeout(240)]

SCHEMA = Path(__file__).parents[2] / "examples" / "fulfilment" / "schema.sql"
ORDERS = 60
KILLS = 4


@pytest.fixture
async def queue(migrated: ScratchDatabase) -> AsyncIterator[Queue]:
    queue = Queue(migrated)
    yield queue
    await queue.close()


@pytest.mark.parametrize("phase", [*PHASES, "waiting"])
async def test_a_worker_is_killed_in_each_phase(queue: Queue, phase: str) -> None:
    await queue.rows(TABLES)
    client = create(queue.database.dsn)
    workers = Workers("tests.e2e.durable_worker", queue.database.dsn, 1)
    async with workers.running():
        handle = await client.invoke(work, Phase(name=phase))
        waiting = "select state = 'waiting' from conductor.job where id = %s"
        await queue.until(waiting, handle.id, within_s=60)
        if phase == "waiting":
            workers.processes[0].kill()
            await eventually(lambda: asyncio.sleep(0, workers.started == 2))
        await client.emit(go, Go(job=handle.id))
        assert await handle.result(timeout_s=60) == phase
    await client.close()
    assert await queue.column("select job from effects") == [handle.id]
    ended = await queue.rows("select task, crashes, outcome from conductor.history order by id")
    assert [(row["task"], row["outcome"]) for row in ended] == [
        ("work", "completed"),
        ("child", "completed"),
    ]
    if phase != "waiting":
        assert sum(row["crashes"] for row in ended) == 1
    for table in ("jobs", "steps", "wakeups"):
        assert await queue.value(f"select count(*) from conductor.{table}") == 0


async def place(queue: Queue, rng: random.Random) -> None:
    """Place orders and pay for them, later."""
    for order in range(1, ORDERS + 1):
        await queue.rows("insert into orders values (%s, 'lamp', 1)", order)
        await asyncio.sleep(rng.uniform(0.0, 0.2))
        if order > 5:
            await queue.rows("insert into payments (order_id, amount) values (%s, 9)", order - 5)
    paid = "exists (select from conductor.steps s where s.topic is not null and s.outcome is null)"
    while await queue.value(f"select {paid} or count(*) < {ORDERS} from reservations"):
        await queue.rows(
            "insert into payments (order_id, amount)"
            " select (s.matched::jsonb ->> 0)::bigint, 9 from conductor.steps s"
            " where s.topic is not null and s.outcome is null"
        )
        await asyncio.sleep(0.3)


async def test_the_example_survives_the_kills_of_its_workers(queue: Queue) -> None:
    rng = random.Random(7)
    await queue.rows(SCHEMA.read_text())
    await queue.rows("insert into stock values ('lamp', 1000)")
    client = create_fulfilment(queue.database.dsn)
    workers = Workers("examples.fulfilment", queue.database.dsn, 2)
    async with running(queue.database), workers.running():
        await queue.until(
            "select count(*) = 2 from conductor.activations where start_lsn is not null",
            within_s=60,
        )
        placing = asyncio.create_task(place(queue, rng))
        for _ in range(KILLS):
            await asyncio.sleep(rng.uniform(1.0, 4.0))
            if workers.processes:
                rng.choice(workers.processes).kill()
        await placing
        await queue.until("select count(*) = 0 from conductor.jobs", within_s=90)
    await client.close()
    drop_slot(queue.database)
    await judge(queue)


async def judge(queue: Queue) -> None:
    """Compare what the workflow did with what it had to do."""
    assert await queue.value("select units_left from stock") == 1000 - ORDERS
    every = list(range(1, ORDERS + 1))
    for table in ("reservations", "parcels"):
        assert await queue.column(f"select order_id from {table} order by 1") == every
    mails = await queue.rows("select order_id, count(*) as sent from mails group by 1 order by 1")
    assert [(row["order_id"], row["sent"]) for row in mails] == [(n, 2) for n in every]
    outcomes: list[dict[str, Any]] = await queue.rows(
        "select task, outcome, count(*) as jobs from conductor.history group by 1, 2 order by 1"
    )
    assert [(row["task"], row["outcome"], row["jobs"]) for row in outcomes] == [
        ("fulfil", "completed", ORDERS),
        ("send-mail", "completed", 2 * ORDERS),
        ("weigh", "completed", ORDERS),
    ]
    assert await queue.value("select count(*) from conductor.steps") == 0
