"""No-op jobs a second against PgQueuer (over asyncpg), another queue in Python on PostgreSQL.

One worker process each, equal payloads, validated by pydantic, durable commits, tables of its own
kind; interleaved. Its pace is read from its own log, ours from our history. PgQueuer is in the
extra `bench`, which `make bench` installs; without it nothing is measured.
"""

import importlib.util
import sys
from importlib.metadata import version
from statistics import median
from typing import Final

from benchmarks.report import Result, rate
from benchmarks.stand import Stand
from benchmarks.worker import run_worker

JOBS: Final = 50_000
MODULE: Final = "benchmarks.peer_worker"


async def measure(stand: Stand, runs: int, scale: float) -> list[Result]:
    """Measure both in turn; `scale` makes the backlog smaller."""
    if importlib.util.find_spec("pgqueuer") is None:
        print("peer: PgQueuer is not installed; `make bench` installs it", file=sys.stderr)
        return []
    jobs = round(JOBS * scale)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(runs):
        theirs.append(await run_peer(stand, jobs))
        ours.append(await run_worker(stand, jobs))
    name = f"no-op jobs of one worker process, against PgQueuer {version('pgqueuer')}"
    numbers = f"{rate(ours, 'jobs/s')}; PgQueuer {rate(theirs, 'jobs/s')}"
    return [Result(name, numbers, median(ours) / median(theirs), "ratio", "≥ 1.5")]


async def run_peer(stand: Stand, jobs: int) -> float:
    """Drain an equal backlog by PgQueuer; return its jobs a second."""
    await stand.python(MODULE, stand.dsn, "--enqueue", str(jobs))
    await stand.run("analyze_peer")
    await stand.python(MODULE, stand.dsn)
    return float(await stand.run("read_peer_pace"))
