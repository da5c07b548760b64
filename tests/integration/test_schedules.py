"""Schedules that jobs and clients make while an application runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from conductor import (
    Conductor,
    Context,
    Cron,
    Invocation,
    Orchestrator,
    SyncConductor,
    SyncContext,
    calls,
    define_task,
)
from conductor.connections import Connections
from conductor.errors import CronInvalid, JobFailed, OptionInvalid, PayloadInvalid, UnknownTask
from conductor.metrics import Metrics
from conductor.registration import Registration, register
from conductor.scheduler import Scheduler
from conductor.store.sessions import connect
from conductor.store.steps import ScheduleCall, StepStore
from conductor.testing import travel
from tests.integration.conftest import Queue
from tests.integration.workers import AT_ONCE

pytestmark = pytest.mark.anyio


class Remind(BaseModel):
    order: int


remind = define_task("remind", payload=Remind, returns=int)
setup = define_task("setup", payload=dict[str, Any], returns=Any)
ROWS = "select * from conductor.schedules order by task, name"
MINUTELY = Cron("* * * * *")
YEARLY = Cron("0 0 1 1 *")  # where it counts how often: a minute may begin at any time


class Diary:
    """An application that reminds, and whose time a test moves."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.conductor = Conductor(queue.database.dsn, tasks=[remind, setup], version="7")
        self.reminded: list[tuple[int, dict[str, Any]]] = []

        @self.conductor.task(remind, priority=3)
        async def handler(event: Invocation[Remind], ctx: Context[None]) -> int:
            self.reminded.append((event.payload.order, ctx.metadata))
            return event.payload.order

    async def pass_by(self, **time: float) -> None:
        """Let time pass for what is stored, and fire what is due."""
        connections = Connections(self.queue.database.dsn, 1, "travel")
        async with connections.lend() as connection:
            await travel(connection, timedelta(**time))
        await connections.close()
        await self.tick()

    async def tick(self) -> None:
        scheduler = Scheduler(self.queue.connections, Metrics(), lambda _: None)
        async with asyncio.timeout(60):
            while await scheduler.tick() == 0:
                pass

    async def schedules(self) -> list[tuple[str, str]]:
        return [(row["name"], row["expression"]) for row in await self.queue.rows(ROWS)]

    async def register(self) -> None:
        tasks = tuple(self.conductor.tasks.values())
        await register(self.queue.connections, Registration("default", "7", tasks))


@pytest.fixture
async def diary(queue: Queue) -> AsyncIterator[Diary]:
    diary = Diary(queue)
    yield diary
    await diary.conductor.close()


async def test_a_job_schedules_once_whatever_happens_to_it(diary: Diary) -> None:
    @diary.conductor.task(setup, retry=AT_ONCE)
    async def handler(event: Any, ctx: Context[None]) -> str:
        if event.payload["do"] == "end":
            await ctx.unschedule("remind 7", remind)
            return "ended"
        await ctx.schedule("remind 7", remind, Cron("0 9 * * *"), Remind(order=7), priority=1)
        if not ctx.job.attempt:
            await diary.queue.rows("delete from conductor.schedules")  # by somebody else
            raise ValueError("again")
        return "begun"

    async with Orchestrator(diary.conductor):
        first = await diary.conductor.invoke(setup, {"do": "begin"})
        assert await first.result(timeout_s=60) == "begun"
        assert await diary.schedules() == []  # the second attempt did not schedule again
        other = await diary.conductor.invoke(setup, {"do": "begin"}, metadata={"who": "me"})
        assert await other.result(timeout_s=60) == "begun"
        assert await diary.schedules() == []
        await diary.conductor.schedule("remind 7", remind, MINUTELY, Remind(order=7))
        last = await diary.conductor.invoke(setup, {"do": "end"})
        assert await last.result(timeout_s=60) == "ended"
        assert await diary.schedules() == []


async def test_its_jobs_are_invocations_with_the_payload(diary: Diary) -> None:
    @diary.conductor.task(setup)
    async def handler(_event: Any, ctx: Context[None]) -> None:
        await ctx.schedule("remind 7", remind, YEARLY, Remind(order=7))

    async with Orchestrator(diary.conductor):
        made = await diary.conductor.invoke(setup, {}, metadata={"who": "me"})
        await made.result(timeout_s=60)
    await diary.tick()
    (row,) = await diary.queue.rows(ROWS)
    assert (row["app"], row["is_planned"], row["last_at"]) == ("", True, None)
    assert row["next_at"].second == 0
    assert await diary.queue.value("select count(*) from conductor.jobs") == 0
    for _ in range(2):
        await diary.pass_by(days=366)
    jobs = await diary.queue.rows("select * from conductor.jobs order by id")
    assert [(job["trigger"], job["app"], job["version"]) for job in jobs] == [
        ("invoke", "default", "7")
    ] * 2
    assert jobs[0]["metadata"]["who"] == "me"
    assert jobs[0]["metadata"]["schedule"] == "remind 7"
    assert datetime.fromisoformat(jobs[0]["metadata"]["scheduled_at"]).second == 0
    async with Orchestrator(diary.conductor):
        await diary.queue.until("select count(*) = 0 from conductor.jobs where task = 'remind'")
    assert [order for order, _ in diary.reminded] == [7, 7]


async def test_scheduling_again_replaces_and_an_equal_one_goes_on(diary: Diary) -> None:
    await diary.register()
    conductor, rows = diary.conductor, diary.queue.rows
    daily = Cron("0 9 * * *", tz="Europe/Berlin")
    await conductor.schedule("a", remind, daily, Remind(order=1))
    await diary.tick()
    (planned,) = await rows(ROWS)
    await conductor.schedule("a", remind, daily, Remind(order=2), priority=-1)
    (again,) = await rows(ROWS)
    assert (again["next_at"], again["is_planned"]) == (planned["next_at"], True)
    assert (again["payload"], again["rank"]) == ({"order": 2}, 1)
    await conductor.schedule("a", remind, Cron("0 10 * * *"), Remind(order=2))
    (other,) = await rows(ROWS)
    assert (other["is_planned"], other["rank"]) == (False, -3)
    await diary.tick()
    (other,) = await rows(ROWS)
    assert (other["next_at"].hour, other["timezone"]) == (10, "UTC")
    assert await conductor.unschedule("a", remind)
    assert not await conductor.unschedule("a", remind)


async def test_a_schedule_rests_while_nobody_has_its_task(diary: Diary) -> None:
    await diary.conductor.schedule("a", remind, YEARLY, Remind(order=1))
    await diary.pass_by(days=5 * 366)
    assert await diary.queue.value("select count(*) from conductor.jobs") == 0
    await diary.register()
    await diary.tick()
    assert await diary.queue.value("select count(*) from conductor.jobs") == 1
    assert (await diary.queue.rows(ROWS))[0]["missed"] >= 4


async def test_registration_leaves_it_alone(diary: Diary) -> None:
    await diary.register()
    await diary.conductor.schedule("0 9 * * * UTC", remind, MINUTELY, Remind(order=1))
    other = Conductor(diary.queue.database.dsn, tasks=[remind])

    @other.task(remind, Cron("0 9 * * *"))
    async def handler(_event: Any, _ctx: Context[None]) -> int:
        return 0

    await register(diary.queue.connections, Registration("default", "8", (handler,)))
    assert sorted(await diary.schedules()) == [
        ("0 9 * * * UTC", "* * * * *"),
        ("0 9 * * * UTC", "0 9 * * *"),
    ]
    await diary.register()
    assert await diary.schedules() == [("0 9 * * * UTC", "* * * * *")]


async def test_in_the_callers_transaction_and_from_synchronous_code(diary: Diary) -> None:
    import psycopg  # noqa: PLC0415

    payload = Remind(order=1)
    async with await psycopg.AsyncConnection.connect(diary.queue.database.dsn) as connection:
        await diary.conductor.schedule("a", remind, MINUTELY, payload, connection=connection)
        await connection.rollback()
        await diary.conductor.schedule("b", remind, MINUTELY, payload, connection=connection)
    assert await diary.schedules() == [("b", "* * * * *")]

    def block() -> None:
        with (
            SyncConductor(Conductor(diary.queue.database.dsn, tasks=[remind])) as client,
            psycopg.connect(diary.queue.database.dsn) as connection,
        ):
            client.schedule("c", remind, MINUTELY, payload)
            client.schedule("d", remind, MINUTELY, payload, connection=connection)
            assert client.unschedule("b", remind)
            assert not client.unschedule("b", remind, connection=connection)

    await asyncio.to_thread(block)
    assert await diary.schedules() == [("c", "* * * * *"), ("d", "* * * * *")]


async def test_a_thread_schedules(diary: Diary) -> None:
    @diary.conductor.task(setup)
    def handler(_event: Any, ctx: SyncContext[None]) -> None:
        ctx.schedule("a", remind, MINUTELY, Remind(order=1))
        ctx.schedule("b", remind, MINUTELY, Remind(order=1))
        ctx.unschedule("a", remind)

    async with Orchestrator(diary.conductor):
        handle = await diary.conductor.invoke(setup, {})
        await handle.result(timeout_s=60)
    assert await diary.schedules() == [("b", "* * * * *")]


async def test_what_cannot_be_scheduled_says_why(diary: Diary) -> None:
    schedule: Any = diary.conductor.schedule
    with pytest.raises(PayloadInvalid):
        await schedule("a", remind, MINUTELY, {"order": "x"})
    with pytest.raises(OptionInvalid, match="says not when"):
        await schedule("a", remind, "* * * * *", Remind(order=1))
    with pytest.raises(OptionInvalid, match="cannot be the name of a schedule"):
        await schedule("", remind, MINUTELY, Remind(order=1))
    with pytest.raises(OptionInvalid, match="cannot be the name of a schedule"):
        await schedule("\ud800", remind, MINUTELY, Remind(order=1))
    with pytest.raises(OptionInvalid, match="priority"):
        await schedule("a", remind, MINUTELY, Remind(order=1), priority=40_000)
    with pytest.raises(UnknownTask):
        await schedule("a", define_task("other"), MINUTELY, None)
    with pytest.raises(CronInvalid):
        await schedule("a", remind, Cron("0 0 30 2 *"), Remind(order=1))

    @diary.conductor.task(setup, max_attempts=1)
    async def handler(_event: Any, ctx: Context[None]) -> None:
        await ctx.schedule("a", remind, MINUTELY, Remind(order=1))
        await ctx.schedule("a", remind, MINUTELY, Remind(order=1))

    async with Orchestrator(diary.conductor):
        handle = await diary.conductor.invoke(setup, {})
        with pytest.raises(JobFailed, match="StepNameReused"):
            await handle.result(timeout_s=60)


async def test_jobs_that_schedule_the_same_name_at_once(diary: Diary) -> None:
    @diary.conductor.task(setup)
    async def handler(event: Any, ctx: Context[None]) -> None:
        await ctx.schedule("a", remind, MINUTELY, Remind(order=event.payload["n"]))
        if event.payload["n"] % 2:
            await ctx.unschedule("a", remind)

    async with Orchestrator(diary.conductor, slots=50):
        handles = await diary.conductor.invoke_many(setup, [{"n": n} for n in range(60)])
        for handle in handles:
            await handle.result(timeout_s=60)
    assert len(await diary.schedules()) <= 1


async def test_a_write_that_is_sent_again_schedules_once(diary: Diary) -> None:
    job = await diary.queue.value(
        "insert into conductor.jobs (queue, task, payload, state, worker, fence)"
        " values ('default', 'setup', '{}', 'running', 5, 1) returning id"
    )
    call = ScheduleCall(
        job=job,
        fence=1,
        name="schedule a",
        position=0,
        kind="schedule",
        schedule="a",
        task="remind",
        plan=calls.plan(remind, MINUTELY, Remind(order=1), {}),
    )
    async with await connect(diary.queue.database.dsn, "test") as connection:
        store = StepStore(connection)
        first = await store.write(5, [call])
        await diary.queue.rows("delete from conductor.schedules")
        again = await store.write(5, [call])
        call.fence = 2
        assert await store.write(5, [call]) == {}
    assert first == again
    assert await diary.schedules() == []
