"""One run of one job: decode, call the handler, turn its end into an outcome.

A run is interrupted by cancelling its task (async) or by setting a flag (sync: a thread cannot be
stopped, so its outcome is written at once and its slot stays busy until the thread returns). This
module must not settle anything: it returns what is to be settled.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import Enum
from functools import partial
from inspect import iscoroutine
from random import random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from conductor.context import Context
from conductor.durable import Run, Services
from conductor.errors import JobTimedOut, PayloadInvalid, TriggerMissing
from conductor.events import Change
from conductor.sync_context import Suspension, SyncContext
from conductor.worker import outcomes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from conductor.definitions import Task
    from conductor.job import JobInfo
    from conductor.store.jobs import ClaimedJob, Outcome
    from conductor.worker.threads import Threads


UNKNOWN_DELAY_S: Final = 1.0
"""How long a job of another version of the handler is left to other workers."""

_LOG: Final = logging.getLogger("conductor.worker")


class Interruption(Enum):
    """Why a run is stopped before its handler returns."""

    CANCELLED = "cancelled"  # by request
    TIMED_OUT = "timed out"
    SUSPENDED = "suspended"  # every open await is a durable wait
    ABANDONED = "abandoned"  # the job is no longer this worker's: nothing is written
    RETURNED = "returned"  # the worker stops: the job runs elsewhere


_ENDINGS: Final = (Interruption.CANCELLED, Interruption.TIMED_OUT)
"""What the handler may still clean up after, with steps: the job or its attempt ends here."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all runs of a worker share.

    ``is_offered``: whether the version that a job was routed for works, or is the newest.
    """

    tasks: Mapping[str, Task[Any, Any]]
    services: Services
    threads: Threads
    deps: Any
    is_offered: Callable[[JobInfo], Awaitable[bool]]


class Execution(Run):
    """One run. ``started_s``, ``ended_s``: by the monotonic clock."""

    __slots__ = (
        "_begun",
        "_reason",
        "_surroundings",
        "_waits",
        "_wake_at",
        "ended_s",
        "handle",
        "interruption",
        "is_known",
        "job",
        "started_s",
        "task",
        "thread",
    )

    def __init__(self, job: ClaimedJob, surroundings: Surroundings) -> None:
        super().__init__(job.info, surroundings.services)
        self.job = job
        newest = surroundings.tasks[job.info.task]
        variant = newest.variant(job.info.code)
        self.task = variant or newest
        self.is_known = variant is not None  # else another worker has it: claims leave it alone
        self.awaitable = self.task.awaitable
        self.handle: asyncio.Task[None] | None = None
        self.thread: asyncio.Future[Any] | None = None
        self.interruption: Interruption | None = None
        self.started_s = self.ended_s = monotonic()
        self._surroundings = surroundings
        self._begun = False  # a task that is cancelled before it has begun never runs
        self._reason = ""
        self._wake_at: datetime | None = None
        self._waits = False

    async def outcome(self) -> Outcome | None:
        """Run the handler; return what becomes of the job, None when it is no longer ours."""
        task, info = self.task, self.info
        if self.cancelled:
            return self._interrupted()
        if not self.is_known:
            _LOG.warning("job %s of task %s began with version %s", info.id, task.name, info.code)
            return outcomes.given_back(info, delay_s=UNKNOWN_DELAY_S)
        self._begun = True
        timer = None
        if task.timeout_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(task.timeout_s, self.interrupt, Interruption.TIMED_OUT)
        try:
            event = await read_event(task, self.job, self.services)
            if task.is_sync:
                value = await self._in_thread(event)
            else:
                self.path = self.handle
                value = await task.handler(event, Context(self, self._surroundings.deps))
            if self.interruption is None or self.interruption is Interruption.CANCELLED:
                document = task.encode_result(value)
                return outcomes.completed(task, info, document, stepped=self.stepped)
            return self._interrupted()
        except Suspension as suspension:
            step = suspension.step
            return outcomes.suspended(info, step.wake_at, waits=step.kind != "sleep")
        except BaseException as error:  # noqa: BLE001 - the handler's, whatever it is
            return await self._raised(error)
        finally:
            self.ended_s = monotonic()
            self.handle = None  # what follows is the worker's, not to be cancelled
            self.end()
            if timer is not None:
                timer.cancel()

    def interrupt(self, interruption: Interruption, reason: str = "") -> None:
        """Stop the run. The first interruption counts, but abandoning goes above all."""
        if self.interruption is not None and interruption is not Interruption.ABANDONED:
            return
        self.interruption, self._reason = interruption, reason
        self.cancelled = True
        self.leaving = interruption not in _ENDINGS
        if self._begun and self.handle is not None:
            self.handle.cancel()
        self.let_go()

    def abandon(self) -> None:
        """Stop the run and write nothing: the job is no longer this worker's."""
        self.interrupt(Interruption.ABANDONED)

    def suspend(self, wake_at: datetime | None, *, waits: bool) -> None:
        """Stop the run: it goes on at ``wake_at``, or (``waits``) when something comes."""
        self._wake_at, self._waits = wake_at, waits
        self.interrupt(Interruption.SUSPENDED)

    async def _in_thread(self, event: Any) -> Any:
        loop = asyncio.get_running_loop()
        context = SyncContext(self, self._surroundings.deps, loop)
        call = partial(call_blocking, self.task.handler, event, context)
        future = self._surroundings.threads.submit(call)
        self.thread = asyncio.wrap_future(future)
        self.thread.add_done_callback(retrieve)
        try:
            return await asyncio.shield(self.thread)
        finally:  # a handler that has kept it back, or raised another error, is put away too
            if context.suspension is not None and self.interruption is None:
                raise context.suspension

    async def _raised(self, error: BaseException) -> Outcome | None:
        """Return what becomes of a run that has raised, unless it was interrupted."""
        if isinstance(error, TriggerMissing) and await has_others(
            self.task, self.info, self._surroundings
        ):
            return outcomes.given_back(self.info, delay_s=UNKNOWN_DELAY_S)
        return self._failed(error) if self.interruption is None else self._interrupted()

    def _failed(self, error: BaseException) -> Outcome:
        is_kept = self.is_kept(error)
        return fail(self.task, self.info, error, stepped=self.stepped, is_kept=is_kept)

    def _interrupted(self) -> Outcome | None:
        info = self.info
        match self.interruption:
            case Interruption.CANCELLED:
                return outcomes.cancelled(self.task, info, self._reason, stepped=self.stepped)
            case Interruption.TIMED_OUT:
                return self._failed(JobTimedOut(f"ran longer than {self.task.timeout_s:g} s"))
            case Interruption.RETURNED:
                return outcomes.given_back(info)
            case Interruption.SUSPENDED:
                return outcomes.suspended(info, self._wake_at, waits=self._waits)
            case _:
                return None


def fail(
    task: Task[Any, Any],
    info: JobInfo,
    error: BaseException,
    *,
    stepped: bool,
    is_kept: bool = False,
) -> Outcome:
    """Return what becomes of a job whose handler has failed, and log it, without what it said."""
    kind = type(error).__name__
    _LOG.warning("job %s of task %s: attempt %s: %s", info.id, task.name, info.attempt + 1, kind)
    jitter = random()  # noqa: S311 - jitter is no secret
    return outcomes.failed(task, info, error, stepped=stepped, is_kept=is_kept, randomness=jitter)


async def has_others(task: Task[Any, Any], job: JobInfo, surroundings: Surroundings) -> bool:
    """Return whether the version that the job was routed for is another, to be waited for."""
    try:
        return (
            job.version is not None
            and job.version != task.version
            and await surroundings.is_offered(job)
        )
    except asyncio.CancelledError:  # interrupted meanwhile
        return False


async def read_event(task: Task[Any, Any], job: ClaimedJob, services: Services) -> Any:
    """Return what the handler gets, with what its trigger wants read again."""
    if job.unreadable:
        raise PayloadInvalid(f"metadata of job {job.info.id}: {job.unreadable}")
    event = task.decode(job.info.trigger, job.payload, job.info)
    if isinstance(event, Change) and event.lacking is not None:
        await services.port.refetch(event)
    return event


def call_blocking(handler: Callable[[Any, Any], Any], event: Any, context: Any) -> Any:
    """Call a sync handler. What ends generators and coroutines must not pass through a future."""
    try:
        value = handler(event, context)
        if not iscoroutine(value):
            return value
        value.close()
        raise TypeError("the handler is def and gives a coroutine: make it async def")
    except (StopIteration, GeneratorExit) as error:
        raise RuntimeError(f"the handler raised {type(error).__name__}") from error


def retrieve(future: asyncio.Future[Any]) -> None:
    """Take the error of a thread whose run has been interrupted: nobody else does."""
    if not future.cancelled():
        future.exception()
