"""Two versions of an application: ``python -m tests.e2e.versioned_worker DSN 1|2``.

Version 2 reads other columns of new orders, has a task that 1 lacks, hears of deleted orders, and
lacks a task that 1 has. What it has begun, each version finishes itself.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final

from conductor import (
    Change,
    Conductor,
    Context,
    Insert,
    OnChange,
    Orchestrator,
    TableRow,
    define_event,
)

TABLES: Final = """
create table orders (id bigint primary key, item text, note text);
create table seen (task text, id bigint, routed_for text, code text, run_by text);
"""

DEAD_AFTER_S: Final = 3.0

go = define_event("go", payload=int)


class Orders(TableRow, table="public.orders"):
    """Rows that come and go."""

    id: int
    item: str
    note: str | None


async def note(task: str, order: int, ctx: Context, version: str) -> None:
    """Note, once, that a version has handled an order."""
    values = [task, order, ctx.job.version, ctx.job.code, version]

    async def work(db: Any) -> None:
        await db.execute("insert into seen values (%s, %s, %s, %s, %s)", values)

    await ctx.transaction("note", work)


def create(dsn: str, version: str) -> Conductor[None]:
    """Return the application as this version has it."""
    conductor = Conductor(dsn, app="shop", version=version, events=[go])

    async def pack(event: Change[Orders], ctx: Context) -> None:
        order = event.new.id if isinstance(event, Insert) else event.old.id
        await note(f"pack {event.op}", order, ctx, version)

    async def slow(event: Insert[Orders], ctx: Context) -> None:
        begun = await ctx.step("begin", lambda: version, returns=str)
        if event.new.id <= 3:
            await ctx.wait_for_event("go", go)
        await note(f"slow {begun}", event.new.id, ctx, version)

    async def lone(event: Insert[Orders], ctx: Context) -> None:
        await note(ctx.job.task, event.new.id, ctx, version)

    inserted = OnChange(Orders, "insert", columns=("id", "item") if version == "1" else ("id",))
    if version == "1":
        conductor.task("pack", inserted)(pack)
        conductor.task("old", OnChange(Orders, "insert"))(lone)
    else:
        conductor.task("pack", inserted, OnChange(Orders, "delete"))(pack)
        conductor.task("new", OnChange(Orders, "insert"))(lone)
    conductor.task("slow", OnChange(Orders, "insert", columns=("id",)), version=version)(slow)
    return conductor


if __name__ == "__main__":
    dsn, version = sys.argv[1:]
    app = create(dsn, version)
    asyncio.run(Orchestrator(app, dead_after_s=DEAD_AFTER_S).run(wait_captured_s=60))
