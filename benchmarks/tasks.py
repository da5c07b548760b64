"""The tasks that are measured. One orchestrator each, so that a worker runs only what is asked."""

import os
import time
from datetime import datetime

from pydantic import BaseModel

from conductor import (
    Conductor,
    Context,
    Insert,
    Invocation,
    OnChange,
    Orchestrator,
    TableRow,
    define_task,
)


class Registration(BaseModel):
    """The payload of a no-op job."""

    user_id: int
    email: str


class Row(TableRow, table="bench.rows"):
    """A row of seven columns."""

    id: int
    customer: int
    status: str
    amount: str
    note: str | None
    active: bool
    created_at: datetime


noop_task = define_task("noop", payload=Registration, queue="bench")
two_steps_task = define_task("two-steps", payload=Registration, returns=int, queue="bench")
late_task = define_task("late", payload=None, returns=float)
dsn = os.environ.get("CONDUCTOR_DSN", "")
conductor = Conductor(dsn, tasks=[noop_task, two_steps_task, late_task], app="bench")


@conductor.task(noop_task)
async def noop(event: Invocation[Registration], ctx: Context[None]) -> None:
    """Do nothing."""


@conductor.task(two_steps_task)
async def two_steps(event: Invocation[Registration], ctx: Context[None]) -> int:
    """Keep two results, one after the other."""
    first = await ctx.step("first", lambda: event.payload.user_id, returns=int)
    return await ctx.step("second", lambda: first + 1, returns=int)


@conductor.task("capture", OnChange(Row, "insert"), queue="captured")
async def capture(event: Insert[Row], ctx: Context[None]) -> None:
    """Never run: what is measured is that its jobs are there."""


@conductor.task(late_task, OnChange(Row, "insert"))
async def late(event: Insert[Row], _ctx: Context[None]) -> float:
    """Return how long ago the change was committed, in seconds."""
    return time.time() - event.commit_time.timestamp()


jobs = Orchestrator(conductor, tasks=[noop])
durable = Orchestrator(conductor, tasks=[two_steps], slots=1_000)
routing = Orchestrator(conductor, tasks=[capture])
latency = Orchestrator(conductor, tasks=[late])
