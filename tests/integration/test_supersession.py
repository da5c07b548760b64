"""A schema that becomes too new for workers that run: they finish, and end with a clear message."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from conductor.migrations import known_migrations
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio

LATER = """
insert into conductor.migrations (number, name, checksum, workers_from)
values (9999, 'later', 'x', %s)
"""
APPLICATION = """
import asyncio, os, psycopg
from conductor import Conductor, Orchestrator, define_task

slow = define_task("slow", returns=str)
conductor = Conductor(os.environ["CONDUCTOR_DSN"], tasks=[slow])

@conductor.task(slow)
async def run(event, ctx):
    await ctx.step("begin", lambda: None)
    while not await is_released():
        await asyncio.sleep(0.05)
    await ctx.step("end", lambda: None)
    return "finished"

async def is_released():
    async with await psycopg.AsyncConnection.connect(conductor.dsn) as connection:
        cursor = await connection.execute("select to_regclass('public.released') is not null")
        return (await cursor.fetchone())[0]

orchestrator = Orchestrator(conductor)
"""

Start = Callable[[], Coroutine[Any, Any, asyncio.subprocess.Process]]


@pytest.fixture
async def start(queue: Queue, tmp_path: Path) -> AsyncIterator[Start]:
    """A function that starts a worker process."""
    (tmp_path / "superseded.py").write_text(APPLICATION)
    started: list[asyncio.subprocess.Process] = []

    async def start() -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "conductor", "worker", "superseded:orchestrator"),
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "CONDUCTOR_DSN": queue.database.dsn,
                "CONDUCTOR_METRICS_PORT": "-1",
            },
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def invoke(queue: Queue) -> int:
    job: int = await queue.value("select conductor.invoke('slow', 'null')")
    return job


async def ended(process: asyncio.subprocess.Process) -> list[str]:
    _, said = await asyncio.wait_for(process.communicate(), 60)
    return said.decode().splitlines()


async def test_a_worker_older_than_the_schema_finishes_and_ends(queue: Queue, start: Start) -> None:
    process = await start()
    await queue.until("select count(*) = 1 from conductor.workers")
    first = await invoke(queue)
    await queue.until("select count(*) = 1 from conductor.steps")
    await queue.rows(LATER, None)
    await queue.until("select bool_and(draining) from conductor.workers")
    second = await invoke(queue)
    await queue.rows("create table released ()")
    said = await ended(process)
    assert process.returncode == 78
    known = f"{len(known_migrations()):04}"
    error, hint = said[-2:]
    assert error == (
        "error: the database has migration 9999_later, which workers of this version cannot use"
        f" (they know {known})"
    )
    assert hint.startswith("hint: Start workers of the version that brought the migration")
    states = await queue.rows("select id, state, result, crashes from conductor.job order by id")
    assert [tuple(row.values()) for row in states] == [
        (first, "completed", "finished", 0),
        (second, "ready", None, 0),
    ]
    assert await queue.value("select count(*) from conductor.workers") == 0

    again = await start()  # by its supervisor
    assert (await ended(again))[-2] == error
    assert again.returncode == 78


async def test_a_worker_goes_on_when_the_migration_says_so(queue: Queue, start: Start) -> None:
    await queue.rows("create table released ()")
    await start()
    await queue.until("select count(*) = 1 from conductor.workers")
    await queue.rows(LATER, len(known_migrations()))
    looks = "select count(*) > 0 from pg_stat_activity where query like %s and state_change > %s"
    now = await queue.value("select clock_timestamp()")
    await queue.until(looks, "select number, name from conductor.migrations%", now)
    job = await invoke(queue)
    await queue.until("select state = 'completed' from conductor.job where id = %s", job)
    await start()  # another one begins
    await queue.until("select count(*) = 2 from conductor.workers")
    assert not await queue.value("select bool_or(draining) from conductor.workers")
