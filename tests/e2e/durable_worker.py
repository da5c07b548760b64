"""A worker in a process of its own that kills itself once, in the phase that its job says.

``python -m tests.e2e.durable_worker DSN``. The phases are those of `PHASES`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Annotated, Any, Final

import psycopg
from pydantic import BaseModel, PlainSerializer

from conductor import Conductor, Context, Invocation, Orchestrator, define_event, define_task

PHASES: Final = (
    "claimed",
    "in a step",
    "between steps",
    "in a transaction",
    "in a child",
    "settling",
)


class Phase(BaseModel):
    """In which phase to die."""

    name: str


class Go(BaseModel):
    """What a job waits for."""

    job: int


def die(phase: str, now: str) -> None:
    """Kill this process if it is time, and no process has died of it yet."""
    if phase != now:
        return
    with psycopg.connect(sys.argv[1], autocommit=True) as connection:
        cursor = connection.execute(
            "insert into deaths values (%s) on conflict do nothing", [phase]
        )
    if cursor.rowcount:
        os.kill(os.getpid(), signal.SIGKILL)


def _settle(result: str) -> str:
    die(result, "settling")
    return result


Result = Annotated[str, PlainSerializer(_settle)]

work = define_task("work", payload=Phase, returns=Result)
child = define_task("child", payload=Phase, returns=int)
go = define_event("go", payload=Go)


async def handler(event: Invocation[Phase], ctx: Context) -> str:
    """Go through every phase."""
    phase = event.payload.name

    async def book(db: Any) -> None:
        await db.execute("insert into effects values (%s)", [ctx.job.id])
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


def create(dsn: str) -> Conductor[None]:
    """Return the application."""
    conductor = Conductor(dsn, tasks=[work, child], events=[go])
    conductor.task(work)(handler)
    conductor.task(child)(child_handler)
    return conductor


if __name__ == "__main__":
    asyncio.run(Orchestrator(create(sys.argv[1])).run())
