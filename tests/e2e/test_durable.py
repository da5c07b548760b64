"""Workflows whose workers are killed: each effect once, nothing lost, nothing settled twice."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conductor.errors import DatabaseUnavailable
from conductor.migrations import migrate
from tests.e2e.durable_worker import PHASES, TABLES, Go, Phase, create, go, work
from tests.e2e.worker_processes import Workers
from tests.integration.conftest import Queue, eventually
from tests.integration.sidecar import drop_slot, running
from tests.servers import ScratchDatabase, StartServer
from tools.localpg import PostgresServer
from tools.localpg.server import StopMode

pytestmark = [pytest.mark.anyio, pytest.mark.pg(18), pytest.mark.timeout(600)]

SCHEMA = Path(__file__).parents[2] / "examples" / "fulfilment" / "schema.sql"
ORDERS = 60


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
    crashes = [row["crashes"] for row in ended]
    if phase == "in a child":  # whose parent may still be about to wait for it, in that process
        assert crashes in ([0, 1], [1, 1])
    elif phase != "waiting":
        assert sum(crashes) == 1
    for table in ("jobs", "steps", "wakeups"):
        assert await queue.value(f"select count(*) from conductor.{table}") == 0


class Shop:
    """The example at work on a server of its own, and what is done to it."""

    def __init__(self, server: PostgresServer, queue: Queue, workers: Workers) -> None:
        self.server, self.queue, self.workers = server, queue, workers
        self._random = random.Random(7)

    async def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Ask, again when the server is away: nothing that is asked here is harmed by that."""
        while True:
            try:
                return await self.queue.rows(query, *values)
            except (DatabaseUnavailable, psycopg.OperationalError):
                await asyncio.sleep(0.1)

    async def until(self, condition: str, *values: Any) -> None:
        """Wait until a condition is true: an expression, or a query."""

        async def check() -> bool:
            (row,) = await self.rows(f"select ({condition}) as holds", *values)
            return bool(row["holds"])

        await eventually(check, within_s=90)

    async def place(self) -> None:
        """Place orders and pay for them, later."""
        pay = "insert into payments (order_id, amount)"
        for order in range(1, ORDERS + 1):
            insert = "insert into orders values (%s, 'lamp', 1) on conflict do nothing"
            await self.rows(insert, order)
            await asyncio.sleep(self._random.uniform(0.0, 0.2))
            if order > 5:
                await self.rows(f"{pay} values (%s, 9)", order - 5)
        unpaid = "from conductor.steps s where s.topic is not null and s.outcome is null"
        open_ = f"select exists (select {unpaid}) or count(*) < {ORDERS} as more from reservations"
        while (await self.rows(open_))[0]["more"]:
            await self.rows(f"{pay} select (s.matched::jsonb ->> 0)::bigint, 9 {unpaid}")
            await asyncio.sleep(0.3)

    async def kill(self) -> None:
        """Kill a worker."""
        await eventually(lambda: asyncio.sleep(0, bool(self.workers.processes)))
        self._random.choice(self.workers.processes).kill()

    async def freeze(self) -> None:
        """Stop a worker until the other takes it for dead, and let it go on."""
        await eventually(lambda: asyncio.sleep(0, len(self.workers.processes) == 2))
        both = "select count(*) = 2 from conductor.workers where renewals > 0 and pid = any (%s)"
        await self.until(both, [process.pid for process in self.workers.processes])
        frozen = self._random.choice(self.workers.processes)
        lives = "exists (select from conductor.workers where pid = %s and renewals >= 0)"
        frozen.send_signal(signal.SIGSTOP)
        await self.until(f"not {lives}", frozen.pid)
        frozen.send_signal(signal.SIGCONT)
        await self.until(lives, frozen.pid)  # under another id

    async def restart(self) -> None:
        """Restart the server, which does not say goodbye."""
        await asyncio.to_thread(self.server.restart, StopMode.IMMEDIATE)


async def test_the_example_survives_whatever_happens_to_it(start_server: StartServer) -> None:
    server = start_server(durable=True)
    dsn = server.dsn()
    migrate(dsn)
    database = ScratchDatabase("postgres", dsn, dsn, dsn)
    queue, workers = Queue(database), Workers("examples.fulfilment", dsn, 2)
    shop = Shop(server, queue, workers)
    await queue.rows(SCHEMA.read_text())
    await queue.rows("insert into stock values ('lamp', 1000)")
    async with running(database), workers.running():
        stamped = "select count(*) = 2 from conductor.activations where start_lsn is not null"
        await shop.until(stamped)
        placing = asyncio.create_task(shop.place())
        for number, harm in enumerate((shop.kill, shop.restart, shop.freeze, shop.kill), 1):
            await shop.until("select count(*) >= %s from reservations", 8 * number)
            await harm()
        await placing
        await shop.until("select count(*) = 0 from conductor.jobs")
    drop_slot(database)
    await judge(queue)
    await queue.close()


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
    twice = "select count(*) - count(distinct id) from conductor.history"
    assert await queue.value(twice) == 0
