"""No-op jobs a second of one worker process, against the least that a queue in Python can be.

The worker validates a pydantic payload, runs a handler, and settles into the history, all fenced.
The raw loop claims a batch with SKIP LOCKED and deletes it, and looks at nothing. Both commit
durably; runs are interleaved. The worker's pace is read from the history's own timestamps.
"""

import time
from statistics import median

import psycopg

from benchmarks.report import Result, rate
from benchmarks.stand import Stand
from benchmarks.statements import STATEMENTS

JOBS = 100_000
RAW_BATCH = 500


async def measure(stand: Stand, runs: int, scale: float) -> list[Result]:
    """Measure both in turn; `scale` makes the backlog smaller."""
    jobs = round(JOBS * scale)
    ours: list[float] = []
    raw: list[float] = []
    for _ in range(runs):
        raw.append(await run_raw(stand, jobs))
        ours.append(await run_worker(stand, jobs))
    numbers = f"{rate(ours, 'jobs/s')}; raw loop {rate(raw, 'jobs/s')}"
    return [
        Result("no-op jobs of one worker process", numbers, median(ours), "jobs/s", "≥ 30,000"),
        Result("the same, against the raw loop", numbers, median(ours) / median(raw), "ratio"),
    ]


async def run_worker(stand: Stand, jobs: int) -> float:
    """Drain a backlog by a worker process; return its jobs a second."""
    await stand.run("empty_queue")
    await stand.run("enqueue", count=jobs)
    await stand.run("analyze_jobs")
    async with stand.worker("jobs"):
        await stand.wait_for("is_idle")
    return float(await stand.run("read_pace"))


async def run_raw(stand: Stand, jobs: int) -> float:
    """Drain an equal backlog by claim and delete; return its jobs a second."""
    await stand.run("empty_raw")
    await stand.run("enqueue_raw", count=jobs)
    await stand.run("analyze_raw")
    claim, delete = STATEMENTS["claim_raw"], STATEMENTS["delete_raw"]
    done = 0
    with psycopg.connect(stand.dsn, autocommit=True) as connection:
        started = time.monotonic()
        while rows := connection.execute(claim, {"limit": RAW_BATCH}).fetchall():
            connection.execute(delete, {"ids": [row[0] for row in rows]})
            done += len(rows)
        return done / (time.monotonic() - started)
