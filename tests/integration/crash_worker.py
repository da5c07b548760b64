"""A worker in a process of its own, for tests that kill it.

``python -m`` this with a DSN and with the seconds after which a worker that stands still is dead.
Its task ``work`` obeys its payload: ``{"do": "return" | "wait" | "die" | "freeze" | "step"}``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
from typing import Any

from conductor.client import Conductor
from conductor.lease import Leases
from conductor.metrics import Metrics
from conductor.worker import Worker
from tests.integration.workers import task


async def work(event: Any, ctx: Any) -> str:
    match event.payload["do"]:
        case "wait":
            await asyncio.sleep(3600)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "step":
            await ctx.step("pid", os.getpid)
            await asyncio.sleep(3600)
        case "freeze":  # holds the interpreter's lock until it is killed
            re.match(r"(a+)+$", "a" * 64 + "b")
    return f"by {os.getpid()}"


async def main(dsn: str, dead_after_s: float) -> None:
    logging.basicConfig(level=logging.INFO)
    with Leases(dsn, dead_after_s=dead_after_s) as leases:
        worker = Worker(
            dsn,
            "default",
            {"work": task(work)},
            leases=leases,
            metrics=Metrics(),
            port=Conductor(dsn),
            slots=20,
        )
        await worker.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
