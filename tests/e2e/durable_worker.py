"""A worker in a process of its own that does to itself, once, what its job says.

``python -m tests.e2e.durable_worker DSN``. `work` dies in one of the `PHASES`; `rest` waits in one
of the `WAITS`; `fault` and `freeze` come to harm in other ways. Leases are
short, so that others soon go on.
Effects of transactions are rows of ``effects``; of what was done without one, of ``traces``.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from typing import Annotated, Any, Final

import psycopg
from pydantic import BaseModel, PlainSerializer

from conductor import (
    Conductor,
    Context,
    Invocation,
    OnChange,
    Orchestrator,
    RetryPolicy,
    SyncContext,
    TableRow,
    define_event,
    define_task,
)

PHASES: Final = (
    "claimed",
    "in a step",
    "between steps",
    "in a transaction",
    "in a child",
    "settling",
)
WAITS: Final = ("event", "change", "child", "sleep")

DEAD_AFTER_S: Final = 3.0
NAP_S: Final = 4.0
PAUSE_S: Final = 2.5 * DEAD_AFTER_S  # of a process that is frozen

TABLES: Final = """
create table deaths (phase text primary key);
create table effects (job bigint, name text);
create table traces (job bigint, name text, pid int);
create table signals (id bigint generated always as identity primary key, job bigint);
"""


class Phase(BaseModel):
    """In which phase to die."""

    name: str


class Go(BaseModel):
    """What a job waits for."""

    job: int


class Signals(TableRow, table="public.signals"):
    """Rows that jobs wait for."""

    id: int
    job: int


def is_first(name: str) -> bool:
    """Return whether nobody has come by here before."""
    with psycopg.connect(sys.argv[1], autocommit=True) as connection:
        cursor = connection.execute("insert into deaths values (%s) on conflict do nothing", [name])
    return cursor.rowcount == 1


def die(phase: str, now: str) -> None:
    """Kill this process if it is time, and no process has died of it yet."""
    if phase == now and is_first(phase):
        os.kill(os.getpid(), signal.SIGKILL)


def hold_the_lock() -> None:
    """Keep the interpreter for so long that others take this process for dead."""
    ctypes.PyDLL(None).usleep(int(PAUSE_S * 1e6))  # unlike CDLL it does not let go of it


def trace(job: int, name: str) -> int:
    """Note that something was done here, outside any transaction."""
    with psycopg.connect(sys.argv[1], autocommit=True) as connection:
        connection.execute("insert into traces values (%s, %s, %s)", [job, name, os.getpid()])
    return os.getpid()


def _settle(result: str) -> str:
    die(result, "settling")
    return result


Result = Annotated[str, PlainSerializer(_settle)]

work = define_task("work", payload=Phase, returns=Result)
child = define_task("child", payload=Phase, returns=int)
rest = define_task("rest", payload=str, returns=str)
lull = define_task("lull", returns=str)
fault = define_task("fault", payload=str, returns=int)
freeze = define_task("freeze", returns=int)
go = define_event("go", payload=Go)
signalled = OnChange(Signals, "insert")


async def handler(event: Invocation[Phase], ctx: Context) -> str:
    """Go through every phase."""
    phase = event.payload.name

    async def book(db: Any) -> None:
        await db.execute("insert into effects values (%s, 'book')", [ctx.job.id])
        die(phase, "in a transaction")

    die(phase, "claimed")
    await ctx.step("one", lambda: die(phase, "in a step"), returns=None)
    die(phase, "between steps")
    await ctx.transaction("book", book)
    await ctx.wait_for_event("go", go, match={"job": ctx.job.id})
    number = await ctx.invoke("child", child, event.payload)
    assert number == 7
    return phase


async def child_handler(event: Invocation[Phase], _ctx: Context) -> int:
    """Die, or return a number."""
    die(event.payload.name, "in a child")
    return 7


async def resting(event: Invocation[str], ctx: Context) -> str:
    """Do something, wait, do something more."""
    job = ctx.job.id

    async def note(db: Any, name: str) -> None:
        await db.execute("insert into effects values (%s, %s)", [job, name])

    await ctx.step("trace", lambda: trace(job, "before"))
    await ctx.transaction("before", lambda db: note(db, "before"))
    match event.payload:
        case "event":
            await ctx.wait_for_event("go", go, match={"job": job})
        case "change":
            await ctx.wait_for_change("signal", signalled, match={"job": job})
        case "child":
            await ctx.invoke("lull", lull)
        case "sleep":
            await ctx.sleep("nap", NAP_S)
    await ctx.transaction("after", lambda db: note(db, "after"))
    return event.payload


async def lulled(_event: Invocation[None], ctx: Context) -> str:
    """Wait for an event that is for the parent."""
    await ctx.wait_for_event("go", go, match={"job": ctx.job.parent})
    return "lulled"


async def faulty(event: Invocation[str], ctx: Context) -> int:
    """Come to harm the first time (``poison``: every time); return who has done the last step."""
    job = ctx.job.id
    await ctx.step("before", lambda: trace(job, "before"))
    match event.payload:
        case "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        case "linger":  # until somebody has done to this process what it is to do
            first = is_first(f"linger {job}")
            while first and not await _is_over(job):  # noqa: ASYNC110 - other processes say so
                await asyncio.sleep(0.05)

    async def book(db: Any) -> None:
        await db.execute("insert into effects values (%s, 'book')", [job])

    await ctx.transaction("book", book)
    return await ctx.step("after", lambda: trace(job, "after"))


def freezing(_event: Invocation[None], ctx: SyncContext) -> int:
    """Freeze the process the first time, and go on at once where it stood."""
    job = ctx.job.id
    ctx.step("before", lambda: trace(job, "before"))
    if is_first(f"freeze {job}"):
        hold_the_lock()

    def book(db: Any) -> None:
        db.execute("insert into effects values (%s, 'book')", [job])

    ctx.transaction("book", book)
    return ctx.step("after", lambda: trace(job, "after"))


async def _is_over(job: int) -> bool:
    async with await psycopg.AsyncConnection.connect(sys.argv[1]) as connection:
        cursor = await connection.execute("select from deaths where phase = %s", [f"over {job}"])
        return await cursor.fetchone() is not None


def create(dsn: str) -> Conductor[None]:
    """Return the application."""
    conductor = Conductor(dsn, tasks=[work, child, rest, lull, fault, freeze], events=[go])
    at_once = RetryPolicy(initial_s=0.1, max_s=0.5)
    conductor.task(work)(handler)
    conductor.task(child)(child_handler)
    conductor.task(rest, waits=[signalled], retry=at_once, max_attempts=50)(resting)
    conductor.task(lull)(lulled)
    conductor.task(fault, retry=at_once)(faulty)
    conductor.task(freeze, retry=at_once)(freezing)
    return conductor


if __name__ == "__main__":
    asyncio.run(Orchestrator(create(sys.argv[1]), dead_after_s=DEAD_AFTER_S).run())
