"""The application whose processes the monitoring test watches.

Run with `conductor worker tests.e2e.monitored:orchestrator`.
"""

import os

from pydantic import BaseModel

from conductor import (
    Conductor,
    Context,
    Cron,
    Emitted,
    Insert,
    Invocation,
    OnChange,
    OnEvent,
    Orchestrator,
    RetryPolicy,
    TableRow,
    Tick,
    define_event,
    define_task,
)

TABLE = "create table public.notes (id bigint generated always as identity primary key, text text)"


class Note(TableRow, table="public.notes"):
    """A row of the captured table."""

    id: int
    text: str


class Greeting(BaseModel):
    """Whom to greet."""

    name: str


greeting = define_task("greet", queue="mail", payload=Greeting)
noted = define_event("note.made", payload=Greeting)
conductor = Conductor(
    os.environ.get("CONDUCTOR_DSN", ""), tasks=[greeting], events=[noted], app="monitored"
)


@conductor.task(greeting, retry=RetryPolicy(initial_s=0.1), max_attempts=2)
async def greet(event: Invocation[Greeting], ctx: Context) -> None:
    """Greet everybody but Nobody; in two steps."""
    await ctx.step("look up", lambda: event.payload.name)
    if event.payload.name == "Nobody":
        raise LookupError("there is nobody of that name")


@conductor.task("index-note", OnChange(Note, "insert"))
async def index_note(event: Insert[Note], ctx: Context) -> None:
    """Do nothing with a change."""


@conductor.task("thank", OnEvent(noted))
async def thank(event: Emitted[Greeting], ctx: Context) -> None:
    """Do nothing with an event."""


@conductor.task("tick", Cron("* * * * *"))
async def tick(event: Tick, ctx: Context) -> None:
    """Do nothing every minute."""


orchestrator = Orchestrator(conductor, tasks=[greet, index_note, thank, tick])
