"""A worker in a process of its own, for tests that kill it: ``python -m`` this with a DSN.

Its task ``note`` is ordered; each run writes when it began and, with its end, when it ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from typing import Any

from conductor import Conductor, Context, Invocation, Orchestrator, RetryPolicy, define_task

note = define_task("note", payload=int, ordered=True)
AT_ONCE = RetryPolicy(initial_s=0, max_s=0, jitter=0)


def application(dsn: str) -> Conductor[None]:
    """The application, with its handler."""
    conductor = Conductor(dsn, tasks=[note])

    @conductor.task(note, retry=AT_ONCE, max_attempts=50)
    async def write(event: Invocation[int], ctx: Context[None]) -> None:
        number = event.payload

        async def enter(connection: Any) -> None:
            await connection.execute(
                "insert into began (key, number, pid) values (%s, %s, %s)",
                [ctx.job.key, number, os.getpid()],
            )

        async def leave(connection: Any) -> None:
            await connection.execute(
                "insert into ended (key, number) values (%s, %s)", [ctx.job.key, number]
            )

        await ctx.transaction("enter", enter, returns=None)
        await asyncio.sleep(random.random() / 100)
        if random.random() < 0.1:
            raise RuntimeError("for once")
        if number % 10 == 3:  # in every run of it: a replay takes the same steps
            await ctx.sleep("nap", 0.01)
        await ctx.transaction("leave", leave, returns=None)

    return conductor


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(Orchestrator(application(sys.argv[1]), slots=8).run())
