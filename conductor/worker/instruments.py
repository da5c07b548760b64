"""What a worker counts and times, with the instruments of each task kept at hand."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from conductor.metrics import (
    BUSY_SLOTS,
    CLAIM,
    DURATION,
    FENCED,
    FINISHED,
    LEASES_LOST,
    OUTCOMES,
    RECONNECTS,
    RETRIED,
    SETTLE,
    SLOTS,
    STARTED,
    STEPS,
    SUSPENDED,
    WAIT,
    Metrics,
    observe_all,
)
from conductor.store.jobs import Finished

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from conductor.store.jobs import Outcome
    from conductor.worker.batches import Member
    from conductor.worker.execution import Execution


class _TaskInstruments:
    """The instruments of one task."""

    def __init__(self, metrics: Metrics, queue: str, task: str) -> None:
        self.started = metrics.get(STARTED, queue, task)
        self.retried = metrics.get(RETRIED, queue, task)
        self.suspended = metrics.get(SUSPENDED, queue, task)
        self.wait = metrics.get(WAIT, queue, task)
        self.duration = metrics.get(DURATION, queue, task)
        self.ended = {e: metrics.get(FINISHED, queue, task, e) for e in OUTCOMES}


class Instruments:
    """The instruments of one worker."""

    def __init__(self, metrics: Metrics, queue: str, tasks: Iterable[str], slots: int) -> None:
        self._tasks = {task: _TaskInstruments(metrics, queue, task) for task in tasks}
        self.reconnected = metrics.get(RECONNECTS, "worker").inc  # for a lost connection
        self.fenced = metrics.get(FENCED, queue)
        self.leases_lost = metrics.get(LEASES_LOST, queue)
        self.claim = metrics.get(CLAIM, queue)
        self.settle = metrics.get(SETTLE, queue)
        self.steps = metrics.get(STEPS, queue)
        self.busy = metrics.get(BUSY_SLOTS, queue)
        metrics.get(SLOTS, queue).set(slots)

    def count_runs(self, executions: Sequence[Execution | Member]) -> None:
        """Count and time runs that have ended."""
        by_task: dict[str, list[Execution | Member]] = {}
        for execution in executions:
            by_task.setdefault(execution.info.task, []).append(execution)
        for task, runs in by_task.items():
            instruments = self._tasks[task]
            instruments.started.inc(len(runs))
            observe_all(instruments.wait, [_waited_s(run) for run in runs])
            observe_all(instruments.duration, [run.ended_s - run.started_s for run in runs])

    def count_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Count what was settled."""
        finished = [o for o in outcomes if isinstance(o, Finished)]
        for (task, ending), count in Counter((o.task, o.ending) for o in finished).items():
            self._tasks[task].ended[ending].inc(count)
        for outcome in outcomes:
            if isinstance(outcome, Finished) or outcome.task not in self._tasks:
                continue
            instruments = self._tasks[outcome.task]
            if outcome.failures:
                instruments.retried.inc()
            elif outcome.wake_at is not None:
                instruments.suspended.inc()


def _waited_s(run: Execution | Member) -> float:
    """Return how long a job could have run before it did."""
    waited_s = run.job.waited_s + run.started_s - run.job.claimed_s
    return max(waited_s, 0.0)  # clocks of two hosts
