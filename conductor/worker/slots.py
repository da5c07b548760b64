"""A worker's slots: what runs, what waits to run here, and what has ended and is to be settled.

Jobs are claimed ahead into a buffer, as many as the slots have lately worked off in a tenth of a
second, so that fast jobs are claimed in large batches and slow ones are left to other workers.
This module must not talk to the database.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from conductor.tracing import find_tracer
from conductor.worker.batches import BatchRun, Gathering, Member
from conductor.worker.execution import Execution, Interruption
from conductor.worker.outcomes import cancelled, given_back
from conductor.worker.spans import traced, traced_together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from opentelemetry.trace import Tracer

    from conductor.definitions import Task
    from conductor.store.jobs import ClaimedJob, Outcome
    from conductor.worker.execution import Surroundings

AHEAD_S: Final = 0.1
MAX_AHEAD: Final = 2000
_SAMPLE_S: Final = 0.02


class Slots:
    """Runs up to ``limit`` jobs at once, in the order they were taken.

    Args:
        twice_crashed: the process' jobs that two processes have died with; kept up to date.
        wake: called when something has ended.
    """

    def __init__(
        self,
        limit: int,
        surroundings: Surroundings,
        *,
        twice_crashed: set[int],
        wake: Callable[[], None],
    ) -> None:
        self.limit = limit
        self.running: dict[int, Execution | Member] = {}
        self.buffer: deque[ClaimedJob] = deque()
        self.outcomes: deque[Outcome] = deque()
        self.ended: list[Execution | Member] = []  # since they were last counted
        self.busy = 0
        self._surroundings, self._twice_crashed, self._wake = surroundings, twice_crashed, wake
        self._rate = 0.0  # ended a second
        self._count, self._counted, self._counted_s = 0, 0, monotonic()
        self._gathering: dict[tuple[str, str | None], Gathering] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits to run here."""
        return not (self.running or self.buffer or self._gathering)

    def room(self) -> int:
        """Return how many jobs to claim; none until half of what was claimed ahead is used up."""
        ahead = min(int(self._measured_rate() * AHEAD_S), MAX_AHEAD)
        missing = self.limit - self.busy + ahead - len(self.buffer)
        return missing if len(self.buffer) <= ahead // 2 and missing > 0 else 0

    def take(self, jobs: Iterable[ClaimedJob], *, first: bool = False) -> None:
        """Run these jobs, as soon as slots are free; ``first``: before those that wait."""
        if first:
            self.buffer.extendleft(jobs)
        else:
            self.buffer.extend(jobs)
        self._start()

    def known(self) -> set[int]:
        """Return the jobs that run, wait to run or wait to be settled here."""
        waiting = {job.info.id for job in (*self.buffer, *self._gathered())}
        return waiting.union(self.running, (outcome.id for outcome in self.outcomes))

    def refuse(self, jobs: Iterable[ClaimedJob]) -> None:
        """Give back jobs that came too late."""
        for job in jobs:
            self._settle(given_back(job.info))

    def next_outcomes(self, limit: int) -> list[Outcome]:
        """Return up to ``limit`` outcomes, oldest first; they are the caller's now."""
        outcomes = self.outcomes
        if len(outcomes) <= limit:
            self.outcomes = deque()
            return list(outcomes)
        return [outcomes.popleft() for _ in range(limit)]

    def cancel(self, job: int, fence: int, reason: str) -> None:
        """Cancel a job that runs or waits here under this fence."""
        execution = self.running.get(job)
        if execution is not None and execution.info.fence == fence:
            execution.interrupt(Interruption.CANCELLED, reason)
            return
        for waiting in (*self.buffer, *self._gathered()):
            info = waiting.info
            if info.id == job and info.fence == fence:
                self._remove(waiting)
                self._settle(
                    cancelled(self._surroundings.tasks[info.task], info, reason, stepped=True)
                )
                return

    def return_buffer(self) -> None:
        """Give back what has not started."""
        waiting, self.buffer = self.buffer, deque()
        waiting.extend(self._dissolve())
        self.refuse(waiting)

    def return_running(self) -> None:
        """Stop what runs and give it back."""
        for execution in list(self.running.values()):
            execution.interrupt(Interruption.RETURNED)

    def return_stuck(self) -> None:
        """Give back what has not stopped when told to."""
        for execution in list(self.running.values()):
            info = execution.info
            execution.abandon()
            self.running.pop(info.id)
            self._settle(given_back(info))

    def abandon(self) -> None:
        """Stop everything and write nothing: none of it is this worker's any more."""
        waiting = (*self.buffer, *self._dissolve())
        self._twice_crashed -= {*self.running, *(job.info.id for job in waiting)}
        self.buffer.clear()
        self.outcomes.clear()
        for execution in list(self.running.values()):
            execution.abandon()
        self.running.clear()

    def _start(self) -> None:
        buffer, running, loop = self.buffer, self.running, asyncio.get_running_loop()
        tracer = find_tracer() if buffer else None
        while buffer and self.busy < self.limit:
            job = buffer.popleft()
            if self._surroundings.tasks[job.info.task].batch is not None and self._gather(job):
                continue
            execution = Execution(job, self._surroundings)
            running[execution.info.id] = execution
            self.busy += 1
            execution.handle = loop.create_task(self._occupy(execution, tracer))
        if self._gathering and sum(1 for _ in self._gathered()) >= self.limit:
            for gathering in list(self._gathering.values()):
                self._start_batch(gathering)  # they hold every slot: nobody can join them

    async def _occupy(self, execution: Execution, tracer: Tracer | None) -> None:
        """Hold a slot for one run, and while a thread of it still runs."""
        outcome = None
        try:
            run = execution.outcome() if tracer is None else traced(execution, tracer)
            outcome = await run
        finally:
            self._end(execution, outcome)
            thread = execution.thread
            if thread is not None and not thread.done():
                self._wake()
                await asyncio.wait([thread])
            self.busy -= 1
            self._count += 1
            if self.buffer:
                self._start()
            self._wake()

    # --- batches -----------------------------------------------------------------------------

    def _gather(self, job: ClaimedJob) -> bool:
        """Let a job join a batch, in a slot of its own; false when its handler takes none."""
        task = self._surroundings.tasks[job.info.task].variant(job.info.code)
        if task is None or task.batch is None:
            return False
        self.busy += 1
        if job.info.crashes:  # alone, as it was claimed
            self._run_batch(task, [job])
            return True
        place = task.name, task.code
        gathering = self._gathering.get(place)
        if gathering is None:
            gathering = self._gathering[place] = Gathering(task, self._start_batch)
        if gathering.add(job):
            self._start_batch(gathering)
        return True

    def _gathered(self) -> Iterable[ClaimedJob]:
        return (job for gathering in self._gathering.values() for job in gathering.jobs)

    def _remove(self, waiting: ClaimedJob) -> None:
        """Take out a job that waits to run."""
        for gathering in self._gathering.values():
            if waiting in gathering.jobs:
                gathering.jobs.remove(waiting)
                self.busy -= 1
                return
        self.buffer.remove(waiting)

    def _dissolve(self) -> list[ClaimedJob]:
        """Return the jobs that wait for their batches, which will not run."""
        jobs = list(self._gathered())
        for gathering in self._gathering.values():
            gathering.close()
        self._gathering.clear()
        self.busy -= len(jobs)
        return jobs

    def _start_batch(self, gathering: Gathering) -> None:
        gathering.close()
        del self._gathering[gathering.task.name, gathering.task.code]
        if gathering.jobs:
            self._run_batch(gathering.task, gathering.jobs)

    def _run_batch(self, task: Task[Any, Any], jobs: Sequence[ClaimedJob]) -> None:
        run = BatchRun(task, jobs, self._surroundings)
        self.running.update((member.info.id, member) for member in run.members)
        tracer = find_tracer()
        run.handle = asyncio.get_running_loop().create_task(self._occupy_together(run, tracer))

    async def _occupy_together(self, run: BatchRun, tracer: Tracer | None) -> None:
        """Hold the slots of a batch for its run, and while a thread of it still runs."""
        ends: Sequence[Outcome | None] = [None] * len(run.members)
        try:
            ends = await (run.outcomes() if tracer is None else traced_together(run, tracer))
        finally:
            for member, outcome in zip(run.members, ends, strict=True):
                self._end(member, outcome)
            if run.thread is not None and not run.thread.done():
                self._wake()
                await asyncio.wait([run.thread])
            self.busy -= len(run.members)
            self._count += len(run.members)
            if self.buffer:
                self._start()
            self._wake()

    def _end(self, execution: Execution | Member, outcome: Outcome | None) -> None:
        self.ended.append(execution)
        job = execution.info.id
        if self.running.get(job) is execution:
            del self.running[job]
            if outcome is not None:
                self.outcomes.append(outcome)
        if self._twice_crashed:
            self._twice_crashed.discard(job)

    def _settle(self, outcome: Outcome) -> None:
        self._twice_crashed.discard(outcome.id)
        self.outcomes.append(outcome)
        self._wake()

    def _measured_rate(self) -> float:
        now = monotonic()
        passed_s = now - self._counted_s
        if passed_s >= _SAMPLE_S:
            latest = (self._count - self._counted) / passed_s
            self._rate += (latest - self._rate) / 2
            self._counted, self._counted_s = self._count, now
        return self._rate
