"""A worker while somebody holds a snapshot: dead rows pile up, and nothing may remove them.

The tables are analysed in between, as autovacuum would do: that is what turns a plan bad. The pace
comes from the worker's own metrics, and the backlog is kept full all the time.
"""

import asyncio
import re
import time
import urllib.request

import psycopg

from benchmarks.report import Result
from benchmarks.stand import Stand
from benchmarks.statements import STATEMENTS

BACKLOG = 60_000
WINDOW_S = 10.0
WARM_UP_S = 2.0
ANALYZE_EVERY_S = 10.0
FINISHED = re.compile(r"^conductor_jobs_finished_total\{.*\} (\S+)$", re.MULTILINE)


async def measure(stand: Stand, seconds: float) -> list[Result]:
    """Hold a snapshot for so long; compare the last ten seconds with the first."""
    await stand.run("empty_queue")
    await stand.run("enqueue", count=BACKLOG)
    samples: list[tuple[float, float]] = []
    async with await psycopg.AsyncConnection.connect(stand.dsn) as holder:
        await holder.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        await hold_snapshot(holder)
        async with stand.worker("jobs") as metrics:
            samples = await watch(stand, metrics, seconds)
    first, last = pace(samples[0], samples), pace(samples[-1], samples, backwards=True)
    name = f"no-op jobs under a snapshot held for {seconds:.0f} s, last 10 s against first"
    numbers = f"{first:,.0f} then {last:,.0f} jobs/s"
    return [Result(name, numbers, last / first, "ratio", "≥ 0.70 at 90 s")]


async def hold_snapshot(connection: psycopg.AsyncConnection) -> None:
    """Take a snapshot; it lasts until the connection's transaction ends."""
    await connection.execute(STATEMENTS["hold_snapshot"])


async def watch(stand: Stand, metrics: str, seconds: float) -> list[tuple[float, float]]:
    """Sample (time, jobs finished) twice a second, and keep the backlog full."""
    enqueued, analyzed_at = float(BACKLOG), time.monotonic()
    samples: list[tuple[float, float]] = []
    while not samples or samples[-1][0] - samples[0][0] < seconds:
        finished = await asyncio.to_thread(read_finished, metrics)
        if finished:
            samples.append((time.monotonic(), finished))
        missing = int(BACKLOG - (enqueued - finished))
        if missing > BACKLOG // 4:
            await stand.run("enqueue", count=missing)
            enqueued += missing
        if time.monotonic() - analyzed_at > ANALYZE_EVERY_S:
            await stand.run("analyze_jobs")
            analyzed_at = time.monotonic()
        await asyncio.sleep(0.25)
    return [sample for sample in samples if sample[0] - samples[0][0] >= WARM_UP_S]


def pace(
    edge: tuple[float, float], samples: list[tuple[float, float]], *, backwards: bool = False
) -> float:
    """Jobs a second in the window at one edge of the samples."""
    within = [s for s in samples if abs(s[0] - edge[0]) <= WINDOW_S]
    (t1, n1), (t2, n2) = (within[0], edge) if backwards else (edge, within[-1])
    return (n2 - n1) / (t2 - t1)


def read_finished(metrics: str) -> float:
    """How many jobs the worker has finished; 0 while it does not answer yet."""
    try:
        with urllib.request.urlopen(metrics, timeout=5) as response:  # noqa: S310 - loopback
            text = response.read().decode()
    except OSError:
        return 0.0
    return sum(float(count) for count in FINISHED.findall(text))
