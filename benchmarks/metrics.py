"""What metrics cost: all that is done for them, a change of the router and a job of a worker.

On a busy router a read takes as many frames as it may: here transactions of one row, the smallest.
Counting the kinds of messages and the jobs of each subscription is done for the metrics alone, so
it is part of the cost. No server and no clock but the processor's.
"""

import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from operator import attrgetter
from statistics import median
from types import SimpleNamespace
from typing import Any, Final

from benchmarks.report import Result
from cdc.metrics import Metrics as RouterMetrics
from cdc.pipeline import READ_FRAMES, Committed
from cdc.wire.messages import Begin, Commit, Insert
from conductor.contract import JobSpec
from conductor.metrics import Metrics
from conductor.store.jobs import Finished
from conductor.worker.instruments import Instruments

KINDS: Final = (Begin, Insert, Commit)
CHANGES: Final = READ_FRAMES // len(KINDS)
JOBS: Final = 500
ROUNDS: Final = 300
BUDGET: Final = "≤ 1 µs"


async def measure(runs: int, scale: float) -> list[Result]:
    """Time what the router and a worker do for their metrics."""
    rounds = max(round(ROUNDS * scale), 1)
    busy, idle, job = route(CHANGES), route(1), work()
    changes = [_time_us(busy, rounds) / CHANGES for _ in range(runs)]
    alone = [_time_us(idle, rounds) for _ in range(runs)]
    jobs = [_time_us(job, rounds) / JOBS for _ in range(runs)]
    note = f"reads of {CHANGES} transactions of one row; {median(alone):.1f} µs for one alone"
    return [
        Result("metrics of the router, a change", note, median(changes), "µs", BUDGET),
        Result("metrics of a worker, a job", f"{JOBS} a settle", median(jobs), "µs", BUDGET),
    ]


def route(changes: int) -> Callable[[], None]:
    """Return what a read and a commit of so many transactions report."""
    metrics = RouterMetrics("", "bench")
    specs = [JobSpec(b"head", b"", 0, b"{}") for _ in range(changes)]
    frames = KINDS * changes
    head_of = attrgetter("head")

    def report() -> None:
        kinds: Counter[type] = Counter()
        for kind in frames:
            kinds[kind] += 1
        metrics.read(kinds, 200 * changes, 0)
        heads: Counter[bytes] = Counter()
        heads.update(map(head_of, specs))
        metrics.committed(Committed(heads, 0, 0.005, 1, 1))

    return report


def work() -> Callable[[], None]:
    """Return what a worker reports of the jobs of one settle."""
    instruments = Instruments(Metrics(), "bench", ["task"], 100)
    run: Any = SimpleNamespace(
        info=SimpleNamespace(task="task"),
        job=SimpleNamespace(waited_s=0.01, claimed_s=1.0),
        started_s=1.1,
        ended_s=1.2,
    )
    executions = [run] * JOBS
    day = timedelta(days=1)
    outcomes = [Finished(n, 1, "task", "completed", None, day, stepped=False) for n in range(JOBS)]

    def report() -> None:
        instruments.settle.observe(0.005)
        instruments.claim.observe(0.005)
        instruments.count_runs(executions)
        instruments.count_outcomes(outcomes)
        instruments.busy.set(50)

    return report


def _time_us(report: Callable[[], None], rounds: int) -> float:
    started_s = time.process_time()
    for _ in range(rounds):
        report()
    return 1e6 * (time.process_time() - started_s) / rounds
