from __future__ import annotations

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import generate_latest

from conductor.metrics import Metrics
from conductor.scheduler import Scheduler
from tests.integration.conftest import Queue, eventually

pytestmark = pytest.mark.anyio

SCHEDULE = """
insert into conductor.schedules (
    app, task, name, queue, version, rank, expression, timezone, next_at)
values ('shop', %s, %s, 'default', 'v1', -2, %s, %s, date_trunc('minute', now()) - %s)
returning id
"""


async def schedule(
    queue: Queue,
    task: str,
    *,
    ago: timedelta = timedelta(),
    expression: str = "* * * * *",
    timezone: str = "UTC",
) -> int:
    number: int = await queue.value(SCHEDULE, task, f"{task} each", expression, timezone, ago)
    return number


def scheduler(queue: Queue, metrics: Metrics | None = None, hints: list[str] | None = None) -> Any:
    told: list[str] = [] if hints is None else hints
    return Scheduler(queue.connections, metrics or Metrics(), told.append)


async def test_a_due_schedule_makes_one_job(queue: Queue, metrics: Metrics) -> None:
    await schedule(queue, "report")
    hints: list[str] = []
    assert await scheduler(queue, metrics, hints).tick() == 0
    (job,) = await queue.rows("select * from conductor.jobs")
    (row,) = await queue.rows("select * from conductor.schedules")
    assert (job["trigger"], job["queue"], job["task"]) == ("cron", "default", "report")
    assert (job["app"], job["version"], job["rank"], job["state"]) == ("shop", "v1", -2, "ready")
    assert job["payload"]["schedule"] == "report each"
    assert datetime.fromisoformat(job["payload"]["scheduled_at"]) == row["last_at"]
    assert row["last_at"].second == 0
    assert row["next_at"] > datetime.now(UTC)
    assert hints == ["default"]
    shown = generate_latest(metrics.registry).decode()
    assert 'jobs_enqueued_total{queue="default",task="report",trigger="cron"} 1.0' in shown


async def test_what_is_not_due_waits_at_most_a_second(queue: Queue) -> None:
    assert await scheduler(queue).tick() == 1.0
    await schedule(queue, "report", ago=timedelta(days=-1))
    assert await scheduler(queue).tick() == 1.0
    await queue.rows("update conductor.schedules set next_at = now() + interval '0.9 seconds'")
    assert 0 < await scheduler(queue).tick() <= 0.9
    assert await queue.value("select count(*) from conductor.jobs") == 0


async def test_after_a_downtime_only_the_latest_instant_fires(
    queue: Queue, metrics: Metrics
) -> None:
    await schedule(queue, "report", ago=timedelta(minutes=90))
    await scheduler(queue, metrics).tick()
    (job,) = await queue.rows("select * from conductor.jobs")
    late = datetime.now(UTC) - datetime.fromisoformat(job["payload"]["scheduled_at"])
    assert late < timedelta(minutes=2)
    missed = await queue.value("select missed from conductor.schedules")
    assert 90 <= missed <= 91
    assert f"conductor_cron_missed_total {missed}.0" in generate_latest(metrics.registry).decode()


async def test_many_processes_fire_each_instant_once(queue: Queue) -> None:
    for number in range(300):
        await schedule(queue, f"task-{number}")
    ticks = [scheduler(queue) for _ in range(8)]
    await asyncio.gather(*(tick.tick() for tick in ticks * 4))
    fired = await queue.rows("select task, payload from conductor.jobs")
    counts = Counter((row["task"], json.dumps(row["payload"])) for row in fired)
    assert len(counts) >= 300  # more when a minute began meanwhile
    assert set(counts.values()) == {1}


async def test_a_firing_that_is_rolled_back_fires_again(queue: Queue) -> None:
    await schedule(queue, "report")
    await queue.rows("alter table conductor.jobs add constraint full_disk check (false)")
    with pytest.raises(Exception, match="full_disk"):
        await scheduler(queue).tick()
    await queue.rows("alter table conductor.jobs drop constraint full_disk")
    await scheduler(queue).tick()
    assert await queue.value("select count(*) from conductor.jobs") == 1


async def test_a_schedule_that_cannot_be_read_stops_no_other(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    await schedule(queue, "lost", timezone="Mars/Olympus", ago=timedelta(hours=1))
    await schedule(queue, "report")
    one = scheduler(queue)
    await one.tick()
    assert await queue.column("select task from conductor.jobs") == ["report"]
    assert "schedule lost each of task lost cannot be fired here" in caplog.text
    assert max([await one.tick(), await one.tick()]) > 0  # one may fire: a minute may begin here


async def test_it_runs_until_it_is_stopped(queue: Queue) -> None:
    one = scheduler(queue)
    running = asyncio.create_task(one.run())
    await schedule(queue, "report")
    await queue.until("select count(*) > 0 from conductor.jobs")
    one.stop()
    await asyncio.wait_for(running, 60)


async def test_it_outlives_lost_connections(queue: Queue, metrics: Metrics) -> None:
    await queue.rows(
        "create function conductor.die() returns trigger language plpgsql as"
        " $$ begin perform pg_terminate_backend(pg_backend_pid()); return new; end $$"
    )
    await queue.rows(
        "create trigger die before insert on conductor.jobs"
        " for each row execute function conductor.die()"
    )
    await schedule(queue, "report")
    one = scheduler(queue, metrics)
    running = asyncio.create_task(one.run())

    async def has_lost_two() -> bool:
        count = metrics.registry.get_sample_value
        return (count("conductor_reconnects_total", {"part": "scheduler"}) or 0) >= 2

    await eventually(has_lost_two)
    await queue.rows("drop trigger die on conductor.jobs")
    await queue.until("select count(*) > 0 from conductor.jobs")
    one.stop()
    await asyncio.wait_for(running, 60)
