"""Jobs that wait for a row: an orchestrator and a sidecar on one database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from conductor import Conductor, Context, JobHandle, OnChange, Orchestrator, TableRow, define_task
from conductor.errors import JobFailed, WaitUnavailable
from tests.integration.conftest import Queue
from tests.integration.sidecar import drop_slot, running

pytestmark = pytest.mark.anyio


class Payments(TableRow, table="public.payments"):
    id: int
    order_id: int
    amount: int


settle = define_task("settle", payload=int, returns=Any)
large_payment = OnChange(Payments, "insert", when="new.amount > 0")


class Office:
    """An application whose task waits for payments."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.conductor = Conductor(queue.database.dsn, tasks=[settle])

    @asynccontextmanager
    async def open(self) -> AsyncIterator[AsyncExitStack]:
        """Run a sidecar, which can be closed alone, and an orchestrator."""
        create = (
            "create table payments (id bigint generated always as identity primary key,"
            " order_id bigint, amount int)"
        )
        await self.queue.rows(create)
        async with AsyncExitStack() as sidecar:
            await sidecar.enter_async_context(running(self.queue.database))
            orchestrator = Orchestrator(self.conductor)
            await orchestrator.start(wait_captured_s=30)
            yield sidecar
            await orchestrator.stop()
        drop_slot(self.queue.database)
        await self.conductor.close()

    async def wait(self, *orders: int) -> list[JobHandle[Any]]:
        handles = await self.conductor.invoke_many(settle, orders)
        await self.queue.until(
            "select count(*) = %s from conductor.jobs where state = 'waiting'", len(orders)
        )
        return handles

    async def pay(self, order: int, amount: int = 1) -> None:
        await self.queue.rows(
            "insert into payments (order_id, amount) values (%s, %s)", order, amount
        )


async def test_a_change_wakes_who_waits_for_it(queue: Queue) -> None:
    office = Office(queue)

    @office.conductor.task(settle, waits=[large_payment])
    async def handler(event: Any, ctx: Context[None]) -> Any:
        change = await ctx.wait_for_change(
            "paid", large_payment, match={"order_id": event.payload}, timeout=60
        )
        return [change.op, change.new.order_id, change.new.amount]

    async with office.open():
        one, two, three = await office.wait(1, 2, 3)
        await office.pay(4, 40)
        await office.pay(2, 0)  # the filter says no
        await office.pay(2, 20)
        await office.pay(2, 21)
        assert await two.result(timeout_s=60) == ["insert", 2, 20]
        await queue.rows("insert into payments (order_id, amount) values (1, 10), (3, 30)")
        assert await one.result(timeout_s=60) == ["insert", 1, 10]
        assert await three.result(timeout_s=60) == ["insert", 3, 30]
    assert await queue.value("select count(*) from conductor.jobs") == 0


async def test_what_was_committed_before_does_not_match(queue: Queue) -> None:
    office = Office(queue)

    @office.conductor.task(settle, waits=[large_payment])
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        payment = await ctx.wait_for_change("paid", large_payment, match={"order_id": 1})
        return payment.new.amount

    async with office.open() as sidecar:
        await sidecar.aclose()
        await office.pay(1, 5)  # committed, and not routed yet
        (handle,) = await office.wait(1)
        async with running(queue.database):
            await office.pay(1, 6)
            assert await handle.result(timeout_s=60) == 6


async def test_nothing_is_lost_between_subscribing_and_waiting(queue: Queue) -> None:
    office = Office(queue)

    @office.conductor.task(settle, waits=[large_payment])
    async def handler(event: Any, ctx: Context[None]) -> Any:
        order = event.payload
        payment = await ctx.subscribe("paid", large_payment, match={"order_id": order})
        await ctx.step("ask", lambda: office.pay(order, order), returns=None)
        return (await payment.wait(timeout=60)).new.amount

    async with office.open():
        handles = await office.conductor.invoke_many(settle, range(1, 51))
        results = [await handle.result(timeout_s=60) for handle in handles]
    assert results == list(range(1, 51))


async def test_a_change_must_be_named_with_the_task(queue: Queue) -> None:
    office = Office(queue)

    @office.conductor.task(settle)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        await ctx.wait_for_change("paid", large_payment)

    async with office.open():
        handle = await office.conductor.invoke(settle, 1)
        with pytest.raises(JobFailed, match="WaitUndeclared"):
            await handle.result(timeout_s=60)


async def test_a_wait_for_a_change_elsewhere_is_refused(queue: Queue) -> None:
    """The sidecar has come after the workers: registration could not know."""
    office = Office(queue)

    @office.conductor.task(settle, waits=[large_payment])
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        try:
            await ctx.wait_for_change("paid", large_payment)
        except WaitUnavailable as error:
            return error.hint

    async with office.open():
        (waiting,) = await office.wait(1)
        await queue.rows("update conductor.progress set database = 'elsewhere'")
        refused = await office.conductor.invoke(settle, 2)
        assert "emit an event" in await refused.result(timeout_s=60)
        await waiting.cancel()
        await queue.rows("update conductor.progress set database = current_database()")
    assert await queue.value("select count(*) from conductor.steps") == 0


class Readings(TableRow, table="public.readings"):
    id: int
    at: datetime
    day: date
    level: float
    price: Decimal
    meter: UUID


METER = UUID("8a3f0c6e-4f2b-4d8e-9a51-0d7a3c1b2e4f")


@pytest.mark.parametrize(
    "match",
    [
        {"at": datetime(2026, 3, 1, 12, tzinfo=timezone(timedelta(hours=2)))},
        {"at": datetime(2026, 3, 1, 10, tzinfo=UTC), "day": date(2026, 3, 1)},
        {"level": 4.0, "price": Decimal("9.50"), "meter": METER},
        {"level": 4, "price": "9.50", "meter": str(METER)},
    ],
)
async def test_values_match_as_python_has_them(queue: Queue, match: dict[str, Any]) -> None:
    read = OnChange(Readings, "insert")
    conductor = Conductor(queue.database.dsn, tasks=[settle])
    await queue.rows(
        "create table readings (id int primary key, at timestamptz, day date, level float8,"
        " price numeric(8, 2), meter uuid)"
    )

    @conductor.task(settle, waits=[read])
    async def handler(_event: Any, ctx: Context[None]) -> int:
        return (await ctx.wait_for_change("read", read, match=match, timeout=30)).new.id

    async with running(queue.database):
        orchestrator = Orchestrator(conductor)
        await orchestrator.start(wait_captured_s=30)
        handle = await conductor.invoke(settle, 1)
        await queue.until("select count(*) = 1 from conductor.jobs where state = 'waiting'")
        insert = "insert into readings values (%s, '2026-03-01 10:00+00', '2026-03-01', 4, 9.5, %s)"
        await queue.rows(insert, 3, METER)
        assert await handle.result(timeout_s=60) == 3
        await orchestrator.stop()
    drop_slot(queue.database)
    await conductor.close()
