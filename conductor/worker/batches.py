"""Batches: jobs of one task that are gathered, run by one call of its handler, and settled each.

A job that waits for its batch holds its slot; so a batch is full when it has its size or nobody can
join it any more, and it does not wait longer than its task says. How each job ends is its own: the
handler says which have failed (BatchFailed), a payload that cannot be read fails alone. This module
must not settle anything: it returns what is to be settled.
"""

from __future__ import annotations

import asyncio
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from conductor.batch_context import BatchContext
from conductor.errors import BatchFailed, JobTimedOut, TriggerMissing
from conductor.worker import outcomes
from conductor.worker.execution import (
    UNKNOWN_DELAY_S,
    Interruption,
    call_blocking,
    fail,
    has_others,
    read_event,
    retrieve,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conductor.definitions import Task
    from conductor.job import JobInfo
    from conductor.store.jobs import ClaimedJob, Outcome
    from conductor.worker.execution import Surroundings

Ends = list["Outcome | None"]


class Gathering:
    """Jobs that wait until their batch is full or has waited long enough."""

    def __init__(self, task: Task[Any, Any], start: Callable[[Gathering], None]) -> None:
        assert task.batch is not None  # noqa: S101 - asked before
        self.task = task
        self.jobs: list[ClaimedJob] = []
        self._size = task.batch.size
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(task.batch.wait_s, start, self)

    def add(self, job: ClaimedJob) -> bool:
        """Let a job join; true when nobody else fits in."""
        self.jobs.append(job)
        return len(self.jobs) >= self._size

    def close(self) -> None:
        """Wait no longer."""
        self._timer.cancel()


class Member:
    """One job of a batch that runs, where the worker keeps what runs."""

    __slots__ = ("batch", "cancel_reason", "info", "job")

    def __init__(self, job: ClaimedJob, batch: BatchRun) -> None:
        self.job, self.info, self.batch = job, job.info, batch
        self.cancel_reason: str | None = None

    @property
    def started_s(self) -> float:
        """When its batch has started, by the monotonic clock."""
        return self.batch.started_s

    @property
    def ended_s(self) -> float:
        """When its batch has ended."""
        return self.batch.ended_s

    def interrupt(self, interruption: Interruption, reason: str = "") -> None:
        """Stop the batch; but a job that is cancelled cannot be stopped without the others.

        It ends with its batch, and is not tried again.
        """
        if interruption is Interruption.CANCELLED:
            self.cancel_reason = reason
        else:
            self.batch.interrupt(interruption)

    def abandon(self) -> None:
        """Stop the batch, whose jobs are no longer this worker's, and write nothing."""
        self.batch.interrupt(Interruption.ABANDONED)


class BatchRun:
    """One call of a batch's handler. ``started_s``, ``ended_s``: by the monotonic clock."""

    def __init__(
        self, task: Task[Any, Any], jobs: Sequence[ClaimedJob], surroundings: Surroundings
    ) -> None:
        self.task = task
        self.members = [Member(job, self) for job in jobs]
        self.handle: asyncio.Task[None] | None = None
        self.thread: asyncio.Future[Any] | None = None
        self.interruption: Interruption | None = None
        self.started_s = self.ended_s = monotonic()
        self._surroundings = surroundings
        self._context: BatchContext[Any] | None = None
        self._begun = False

    def interrupt(self, interruption: Interruption) -> None:
        """Stop the run. The first interruption counts, but abandoning goes above all."""
        if self.interruption is not None and interruption is not Interruption.ABANDONED:
            return
        self.interruption = interruption
        if self._context is not None:
            self._context.cancelled = True
        if self._begun and self.handle is not None:
            self.handle.cancel()

    async def outcomes(self) -> Ends:
        """Run the handler; return what becomes of each member, in their order."""
        ends: Ends = [None] * len(self.members)
        events: list[Any] = []
        places: list[int] = []
        try:
            self._begun = self.interruption is None
            events, places = await self._read(ends)
            if events and self.interruption is None:
                failures = await self._run(events, [self.members[place].info for place in places])
            else:
                failures = {}
        except BaseException as error:  # noqa: BLE001 - the handler's, whatever it is
            failures = dict.fromkeys(range(len(places)), error)
        finally:
            self.ended_s = monotonic()
            self.handle = None  # what follows is the worker's, not to be cancelled
        if self.interruption is not None:
            return [end or self._interrupted(m) for m, end in zip(self.members, ends, strict=True)]
        for number, place in enumerate(places):
            ends[place] = self._end(self.members[place], failures.get(number))
        return ends

    async def _read(self, ends: Ends) -> tuple[list[Any], list[int]]:
        """Return the events that can be read, and whose they are; the others have failed."""
        read = await asyncio.gather(
            *(
                read_event(self.task, member.job, self._surroundings.services)
                for member in self.members
            ),
            return_exceptions=True,
        )
        events, places = [], []
        for place, (member, event) in enumerate(zip(self.members, read, strict=True)):
            if isinstance(event, BaseException):
                ends[place] = await self._unread(member.info, event)
            else:
                events.append(event)
                places.append(place)
        return events, places

    async def _unread(self, info: JobInfo, error: BaseException) -> Outcome:
        if isinstance(error, TriggerMissing) and await has_others(
            self.task, info, self._surroundings
        ):
            return outcomes.given_back(info, delay_s=UNKNOWN_DELAY_S)
        return self._failed(info, error)

    async def _run(
        self, events: Sequence[Any], jobs: Sequence[JobInfo]
    ) -> dict[int, BaseException]:
        """Call the handler; return which events have failed."""
        task = self.task
        context = self._context = BatchContext(jobs, self._surroundings.deps)
        timer = None
        if task.timeout_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(task.timeout_s, self.interrupt, Interruption.TIMED_OUT)
        try:
            if task.is_sync:
                call = partial(call_blocking, task.handler, events, context)
                self.thread = asyncio.wrap_future(self._surroundings.threads.submit(call))
                self.thread.add_done_callback(retrieve)
                value = await asyncio.shield(self.thread)
            else:
                value = await task.handler(events, context)
            task.encode_result(value)
        except BatchFailed as failed:
            if not failed.failures.keys() <= set(range(len(events))):
                raise
            return dict(failed.failures)
        finally:
            if timer is not None:
                timer.cancel()
        return {}

    def _interrupted(self, member: Member) -> Outcome | None:
        match self.interruption:
            case Interruption.TIMED_OUT:
                late = JobTimedOut(f"its batch ran longer than {self.task.timeout_s:g} s")
                return self._failed(member.info, late)
            case Interruption.RETURNED:
                return outcomes.given_back(member.info)
            case _:
                return None

    def _end(self, member: Member, error: BaseException | None) -> Outcome:
        info = member.info
        if error is None:
            return outcomes.completed(self.task, info, None, stepped=info.fence > 1)
        if member.cancel_reason is not None:
            return outcomes.cancelled(self.task, info, member.cancel_reason, stepped=info.fence > 1)
        return self._failed(info, error)

    def _failed(self, info: JobInfo, error: BaseException) -> Outcome:
        return fail(self.task, info, error, stepped=info.fence > 1)
