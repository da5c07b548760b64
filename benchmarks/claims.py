"""How long a claim takes when few jobs are pending, and when a million are.

Claims of ten jobs by the worker's own statement, one after the other, from where the last one ended
and now and then from the beginning, as a worker looks. What was claimed is settled, and as many
jobs are put in, so that as many stay pending.
"""

import time
from datetime import timedelta
from statistics import median
from typing import Final

import psycopg

from benchmarks.report import Result
from benchmarks.stand import Stand
from benchmarks.statements import STATEMENTS
from conductor.store.jobs import Claim, Finished, JobStore
from conductor.store.leases import WorkerRow, WorkerStore
from conductor.store.sessions import connect
from conductor.worker.claiming import Cursors, Scan

FEW: Final = 1_000
MANY: Final = 1_000_000
CLAIMS: Final = 300
FULL_EVERY: Final = 20
BATCH: Final = 10
WORKER: Final = WorkerRow("bench", None, "bench", ["noop"], "bench", 0, BATCH)


async def measure(stand: Stand, runs: int, scale: float) -> list[Result]:
    """Measure both in turn; `scale` makes the many and the claims fewer."""
    many, claims = max(round(MANY * scale), FEW), max(round(CLAIMS * scale), 2 * FULL_EVERY)
    times_ms: dict[tuple[int, Scan], list[float]] = {}
    for _ in range(runs):
        for pending in (FEW, many):
            for scan, found_ms in (await claim_from(stand, pending, claims)).items():
                times_ms.setdefault((pending, scan), []).append(median(found_ms))
    few_ms, many_ms = (median(times_ms[n, Scan.CURSOR]) for n in (FEW, many))
    few_full_ms, many_full_ms = (median(times_ms[n, Scan.FULL]) for n in (FEW, many))
    numbers = (
        f"{many_ms:.2f} ms a claim of {BATCH}, {few_ms:.2f} ms with {FEW:,}; "
        f"from the beginning {many_full_ms:.2f} ms, {few_full_ms:.2f} ms"
    )
    name = f"claim with {many:,} jobs pending, against {FEW:,}"
    return [Result(name, numbers, many_ms / few_ms, "ratio", "≤ 2")]


async def claim_from(stand: Stand, pending: int, claims: int) -> dict[Scan, list[float]]:
    """Claim from so many jobs; return the milliseconds of each claim, by how it looked."""
    await stand.run("empty_queue")
    await stand.run("enqueue", count=pending)
    await stand.run("analyze_jobs")
    times_ms: dict[Scan, list[float]] = {Scan.CURSOR: [], Scan.FULL: []}
    async with await connect(stand.dsn, "bench claims") as connection:
        worker = await WorkerStore(connection).register(WORKER)
        store, cursors = JobStore(connection), Cursors(WORKER.tasks)
        for number in range(claims):
            scan = Scan.FULL if number % FULL_EVERY == 0 else Scan.CURSOR
            claim = Claim("bench", WORKER.tasks, cursors.ranges(scan), BATCH)
            started_s = time.perf_counter()
            jobs = (await store.exchange(worker, [], claim)).jobs
            times_ms[scan].append(1e3 * (time.perf_counter() - started_s))
            if len(jobs) != BATCH:
                raise RuntimeError(f"a claim of {BATCH} got {len(jobs)}")
            cursors.advance(jobs, more=True)
            day = timedelta(days=1)
            ended = [
                Finished(j.info.id, j.info.fence, "noop", "completed", None, day, stepped=False)
                for j in jobs
            ]
            await store.exchange(worker, ended, None)
            await stand.run("enqueue", count=BATCH)
        await retire(connection, worker)
    return times_ms


async def retire(connection: psycopg.AsyncConnection, worker: int) -> None:
    """Take the worker out."""
    await connection.execute(STATEMENTS["retire"], {"worker": worker})
