from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest

from conductor import maintenance as module
from conductor.connections import Connections
from conductor.maintenance import Maintenance, partition_name
from conductor.metrics import Metrics
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio

PARTITIONS = """
select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'conductor.history'::regclass and c.relname <> 'history_default' order by 1
"""
FINISHED = """
insert into conductor.history (id, run_at, created_at, finished_at, expires_on, fence, rank,
    attempt, crashes, outcome, trigger, queue, task, payload)
select n, now(), now(), now(), %s::date, 1, 0, 0, 0, 'completed', 'invoke', 'default', 't', '{}'
from generate_series(1, %s::int) n
"""


def today() -> date:
    return datetime.now(UTC).date()


def day(ahead: int) -> date:
    return today() + timedelta(days=ahead)


async def maintain(queue: Queue) -> None:
    await Maintenance(queue.connections, Metrics()).tick()


async def test_partitions_are_made_ahead(queue: Queue) -> None:
    await maintain(queue)
    partitions = await queue.column(PARTITIONS)
    assert partitions[0] in {partition_name(day(0)), partition_name(day(1))}
    assert len(partitions) == 15
    await queue.rows(FINISHED, day(8), 1)
    assert await queue.value(f"select count(*) from conductor.{partition_name(day(8))}") == 1


async def test_running_again_changes_nothing(queue: Queue) -> None:
    await maintain(queue)
    before = await queue.column(PARTITIONS)
    await maintain(queue)
    assert await queue.column(PARTITIONS) == before


async def test_the_longest_retention_decides_how_many(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.tasks (app, name, queue, max_attempts, retention)"
        " values ('shop', 't', 'default', 5, '30 days')"
    )
    await maintain(queue)
    assert len(await queue.column(PARTITIONS)) == 38


async def test_a_day_that_has_come_is_forgotten(queue: Queue) -> None:
    for ahead in (-1, 0, 1):
        name = partition_name(day(ahead))
        await queue.rows(
            f"create table conductor.{name} partition of conductor.history"
            f" for values from ('{day(ahead)}') to ('{day(ahead + 1)}')"
        )
        await queue.rows(FINISHED, day(ahead), 1)
    await maintain(queue)
    assert await queue.column("select expires_on from conductor.history") == [day(1)]
    assert partition_name(day(0)) not in await queue.column(PARTITIONS)


async def test_a_day_the_default_partition_holds_is_left_to_it(queue: Queue) -> None:
    await queue.rows(FINISHED, day(3), 2)
    await maintain(queue)
    partitions = await queue.column(PARTITIONS)
    assert partition_name(day(3)) not in partitions
    assert partition_name(day(4)) in partitions
    assert await queue.value("select count(*) from conductor.history") == 2


async def test_the_default_partition_is_purged_in_batches(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 10)
    await queue.rows(FINISHED, day(0), 25)
    await queue.rows(FINISHED, day(200), 1)
    await queue.rows(FINISHED, date.max, 1)
    await maintain(queue)
    left = await queue.column("select expires_on from conductor.history_default order by 1")
    assert left == [day(200), date.max]


async def test_a_settle_goes_on_while_partitions_are_made(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_TIMEOUT_S", 0.05)
    async with queue.connections.lend() as settling, settling.transaction():
        await settling.execute(FINISHED.encode(), (date.max, 1))
        await asyncio.wait_for(maintain(queue), 60)  # cannot have the default partition's lock
        assert await queue.column(PARTITIONS) == []
        await asyncio.wait_for(settling.execute(FINISHED.encode(), (date.max, 1)), 60)
    await maintain(queue)
    assert len(await queue.column(PARTITIONS)) == 15


async def test_processes_that_maintain_together_do_not_disturb_each_other(queue: Queue) -> None:
    await queue.rows(FINISHED, day(0), 100)
    await asyncio.gather(*(maintain(queue) for _ in range(6)))
    await maintain(queue)
    assert len(await queue.column(PARTITIONS)) == 15
    assert await queue.value("select count(*) from conductor.history") == 0


async def test_expired_deduplication_keys_are_forgotten(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.dedupe_keys (task, key, job, expires_at) values"
        " ('t', 'old', 1, now() - interval '1 second'), ('t', 'new', 2, now() + interval '1 hour')"
    )
    await maintain(queue)
    assert await queue.column("select key from conductor.dedupe_keys") == ["new"]


async def test_steps_of_jobs_that_are_gone_are_forgotten(queue: Queue) -> None:
    job = await queue.value(
        "insert into conductor.jobs (queue, task, payload) values ('q', 't', '{}') returning id"
    )
    await queue.rows(
        "insert into conductor.steps (job, name, position) values (%s, 'a', 1), (999, 'a', 1)",
        job,
    )
    await maintain(queue)
    assert await queue.column("select job from conductor.steps") == [job]


async def test_without_ownership_it_purges_and_says_so(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    await queue.rows(FINISHED, day(0), 1)
    role = f"{queue.database.name}_worker"
    with psycopg.connect(queue.database.admin_dsn, autocommit=True) as admin:
        admin.execute(f"create role {role}")
        admin.execute(f"grant usage on schema conductor to {role}")
        admin.execute(f"grant all on all tables in schema conductor to {role}")
        admin.execute(f"grant execute on all functions in schema conductor to {role}")
        try:
            connections = Connections(queue.database.admin_dsn, 1, "test")
            async with connections.lend() as connection:
                await connection.execute(f"set role {role}".encode())
                await Maintenance(connections, Metrics()).maintain(connection)
            await connections.close()
        finally:
            admin.execute(f"drop owned by {role}")
            admin.execute(f"drop role {role}")
    assert "history is not partitioned by this role" in caplog.text
    assert await queue.value("select count(*) from conductor.history") == 0


async def test_a_maintainer_that_stands_still_holds_nobody_up(queue: Queue) -> None:
    """As a frozen process does in the middle: its connection lives on, with all its locks."""
    locked = asyncio.Event()

    async def stand_still(_store: object) -> None:
        locked.set()
        await asyncio.Event().wait()

    async with queue.connections.lend() as connection:
        frozen = asyncio.ensure_future(module._alone(connection, stand_still))
        await locked.wait()
        await queue.until(
            "select not exists (select from pg_locks where locktype = 'advisory' and pid = %s)",
            connection.info.backend_pid,
        )
        frozen.cancel()
        with pytest.raises((psycopg.Error, asyncio.CancelledError)):
            await frozen
