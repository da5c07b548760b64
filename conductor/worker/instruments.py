"""What a worker counts and times, with the instruments of each task kept at hand."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from conductor.metrics import (
    BUSY_SLOTS,
    CLAIM,
    DURATION,
    FENCED,
    FINISHED,
    LEASES_LOST,
    RECONNECTS,
    RETRIED,
    SETTLE,
    SLOTS,
    STARTED,
    STEPS,
    SUSPENDED,
    WAIT,
    Metrics,
)
from conductor.store.jobs import Finished

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from conductor.store.jobs import Outcome
    from conductor.worker.execution import Execution

_ENDINGS: Final = ("completed", "failed", "cancelled")


class _TaskInstruments:
    """The instruments of one task."""

    def __init__(self, metrics: Metrics, queue: str, task: str) -> None:
        self.started = metrics.get(STARTED, queue, task)
        self.retried = metrics.get(RETRIED, queue, task)
        self.suspended = metrics.get(SUSPENDED, queue, task)
        self.wait = metrics.get(WAIT, queue, task)
        self.duration = metrics.get(DURATION, queue, task)
        self.ended = {e: metrics.get(FINISHED, queue, task, e) for e in _ENDINGS}


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

    def count_runs(self, executions: Sequence[Execution]) -> None:
        """Count and time runs that have ended."""
        for task, count in Counter(e.info.task for e in executions).items():
            self._tasks[task].started.inc(count)
        for execution in executions:
            job = execution.job
            instruments = self._tasks[execution.info.task]
            instruments.wait.observe(max(job.waited_s + execution.started_s - job.claimed_s, 0.0))
            instruments.duration.observe(execution.ended_s - execution.started_s)

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
