"""The durable side of one run of a job: its steps, what they make, and what it waits for.

Every operation comes to a step by name: what an earlier run has stored is returned, else it is
written first. What is not over yet is returned as it stands; the context then parks the run
(`conductor.parking`). Deadlines are decided on the step's row: what has come before the run has
given up counts, what comes later does not.

The worker says how a run is suspended and abandoned. This module must not settle jobs.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

from pydantic_core import from_json, to_json

from conductor import tracing
from conductor.enqueue import duration_s
from conductor.errors import (
    FenceLost,
    StepMisplaced,
    StepOrderChanged,
    WaitUndeclared,
)
from conductor.failures import describe, restore
from conductor.parking import Parkable
from conductor.replay import Replay, check_step_name, enclosing, failed, member_of
from conductor.store.steps import (
    Call,
    NewJob,
    ScheduleCall,
    StepWrite,
    StoredStep,
    Wanted,
    Write,
)
from conductor.transactions import CommitUnknown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    from psycopg import AsyncConnection, Connection

    from conductor.job import JobInfo, JobPort
    from conductor.store.schedules import SchedulePlan

TIMED_OUT: Final = "timed out"
DONE: Final = "completed"


@dataclass(frozen=True, slots=True)
class Gather:
    """A `ctx.gather`: its place, None beside the sequential path, and the names reached in it."""

    place: int | None
    names: set[str]


@dataclass(slots=True)
class _Failure:
    """What a step has failed with, and the task that was told so; None: a thread's handler."""

    task: asyncio.Future[Any] | None
    step: StepWrite
    error: Exception


gathering: ContextVar[Gather | None] = ContextVar("gathering", default=None)
"""The gather that what runs now is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """Until when to wait: ``delay_s`` from the first time, or ``instant``."""

    delay_s: float | None = None
    instant: datetime | None = None

    @classmethod
    def after(cls, timeout: float | timedelta | None) -> Deadline:
        """Return the deadline of a timeout; None: there is none. Raises OptionInvalid."""
        return cls(delay_s=None if timeout is None else duration_s("timeout", timeout))


class StepLog(Protocol):
    """Where steps are kept: `conductor.checkpoints`, or what a test puts in its place."""

    async def load(self, job: int) -> list[StoredStep]:
        """Return what earlier runs of a job have written."""

    async def load_settled(self, job: int) -> list[StoredStep]:
        """Return a job's steps once no transaction that writes one is under way."""

    async def write(self, step: Write) -> StoredStep:
        """Write a step; return it as stored. Raises FenceLost."""


class TransactionRunner(Protocol):
    """What runs transactions: `conductor.transactions`, or what a test puts in its place."""

    async def run(
        self, step: StepWrite, work: Callable[[AsyncConnection[Any]], Awaitable[bytes]]
    ) -> bytes:
        """Do the work and write the step with what it returns."""

    def run_blocking(self, step: StepWrite, work: Callable[[Connection[Any]], bytes]) -> bytes:
        """Likewise, in a thread."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the runs of a worker share. ``port``: what handles of started jobs go through."""

    checkpoints: StepLog
    transactions: TransactionRunner
    port: JobPort


class Run(Parkable):
    """The durable side of one run of a job, shared with its context. The worker's, not the user's.

    The worker says how to `suspend` a run and how to `abandon` one whose job turned out to be
    another worker's.
    """

    __slots__ = (
        "_failures",
        "_kept",
        "_replay",
        "awaitable",
        "path",
        "services",
        "stepped",
    )

    def __init__(self, info: JobInfo, services: Services) -> None:
        super().__init__(info)
        self.services = services
        self.path: asyncio.Task[Any] | None = None  # the sequential path; None: a thread's
        self.stepped = info.fence > 1  # it may have steps
        self.awaitable: frozenset[str] = frozenset()  # topics of changes that are captured for it
        self._replay: Replay | None = None
        self._failures: list[_Failure] = []
        self._kept: list[Exception] = []

    @abstractmethod
    def abandon(self) -> None:
        """End the run here and write nothing."""

    # --- steps -------------------------------------------------------------------------------

    async def reach(
        self, name: str, kind: str, *, is_derived: bool = False
    ) -> tuple[int | None, StoredStep | None]:
        """Come to a step: return its position and what an earlier run stored."""
        await self.stay()
        if not is_derived:
            check_step_name(name)
        if around := enclosing.get():
            raise StepMisplaced(f"{kind} {name!r} was reached inside {around}")
        sequential, gather = self._is_sequential(), gathering.get()
        replay = await self._replayed()
        position, stored = replay.reach(name, kind, sequential=sequential)
        await self._keep_failures()
        if gather is not None and not sequential:
            gather.names.add(name)
            position = None if gather.place is None else member_of(gather.place)
        if stored is not None and stored.kind == failed(kind):
            error = restore(name, stored.result or b"{}")
            self._kept.append(error)
            raise error
        return position, stored

    # --- steps that fail ---------------------------------------------------------------------

    @contextmanager
    def noting(self, name: str, position: int | None, kind: str) -> Iterator[None]:
        """Take note of the error that a step ends with: should the handler go on, it is kept."""
        try:
            yield
        except FenceLost:
            raise
        except Exception as error:
            if not self.cancelled:  # else it comes of that, and the attempt ends here
                step = self.result(name, position, failed(kind), describe(error))
                self._failures.append(_Failure(self._current(), step, error))
            raise

    def adopt(self, tasks: Collection[asyncio.Future[Any]]) -> None:
        """Take over what tasks have failed with: it is raised in this one."""
        for failure in self._failures:
            if failure.task in tasks:
                failure.task = self._current()

    def is_kept(self, error: BaseException) -> bool:
        """Return whether an error is kept: the handler comes to it in every run."""
        return any(error is kept for kept in self._kept)

    async def _keep_failures(self) -> None:
        """Keep the errors that the handler has gone on from, as this await of it shows."""
        if not self._failures:
            return
        task, sequential = self._current(), self._is_sequential()
        for failure in list(self._failures):
            if failure.task is task or (sequential and _is_seen(failure.task, task)):
                self._failures.remove(failure)
                step = failure.step
                if (await self.write(step)).kind != step.kind:
                    raise StepOrderChanged(f"{step.name!r} has failed, but not in an earlier run")
                self._kept.append(failure.error)

    def _current(self) -> asyncio.Future[Any] | None:
        return None if self.path is None else asyncio.current_task()

    # --- gathering ---------------------------------------------------------------------------

    async def gather(self) -> Gather:
        """Come to a gather: it takes a place."""
        await self.stay()
        if around := enclosing.get():
            raise StepMisplaced(f"a gather was reached inside {around}")
        replay = await self._replayed()
        return Gather(replay.take_place() if self._is_sequential() else None, set())

    async def gathered(self, gather: Gather) -> None:
        """Keep the names of a gather, or compare them with those of the runs before."""
        if gather.place is None:
            return
        replay = await self._replayed()
        name = replay.end_gather(gather.place, gather.names)
        if name is not None:
            names = to_json(sorted(gather.names))
            await self.write(self.result(name, gather.place, "gather", names))

    async def failed_in(self, gather: Gather) -> None:
        """Take note that a gather has raised an error."""
        if gather.place is not None:
            (await self._replayed()).fail_gather(gather.place)

    def _is_sequential(self) -> bool:
        return self.path is None or asyncio.current_task() is self.path

    # --- reading and writing -----------------------------------------------------------------

    async def _replayed(self) -> Replay:
        replay = self._replay
        if replay is None:
            stored = (
                await self.services.checkpoints.load(self.info.id) if self.info.fence > 1 else []
            )
            replay = self._begin(stored)
            await self.stay()
        self.stepped = True
        return replay

    def _begin(self, stored: list[StoredStep]) -> Replay:
        """Replay what is stored; a concurrent step may have begun that already."""
        if self._replay is None:
            self._replay = Replay(stored)
        return self._replay

    async def write(self, step: Write) -> StoredStep:
        """Write a step; return it as stored. Does not return when the job is no longer ours."""
        try:
            return await self.services.checkpoints.write(step)
        except FenceLost:
            self.abandon()
            raise

    def result(self, name: str, place: int | None, kind: str, document: bytes) -> StepWrite:
        """Return the step that holds a result."""
        return StepWrite(self.info.id, self.info.fence, name, place, kind, document)

    async def transact(
        self,
        name: str,
        place: int | None,
        work: Callable[[AsyncConnection[Any]], Awaitable[bytes]],
    ) -> bytes | None:
        """Do work in a transaction that writes the step as well; return the step's result."""
        try:
            return await self.services.transactions.run(self._transaction(name, place), work)
        except FenceLost:
            self.abandon()
            raise
        except CommitUnknown as unknown:
            return await self.find_committed(name, unknown)

    def transact_blocking(
        self, name: str, place: int | None, work: Callable[[Connection[Any]], bytes]
    ) -> bytes:
        """Like `transact`, in a thread. Raises CommitUnknown."""
        return self.services.transactions.run_blocking(self._transaction(name, place), work)

    def _transaction(self, name: str, place: int | None) -> StepWrite:
        return self.result(name, place, "transaction", b"null")

    async def find_committed(self, name: str, unknown: CommitUnknown) -> bytes | None:
        """Return the result of a step whose commit got no answer; raise when it is not there."""
        steps = await self.services.checkpoints.load_settled(self.info.id)
        for step in steps:
            if step.name == name:
                return step.result
        raise unknown.cause

    async def sleep(self, name: str, until: Deadline, *, is_derived: bool = False) -> StoredStep:
        """Come to a sleep; it is over when it `is_over`."""
        place, stored = await self.reach(name, "sleep", is_derived=is_derived)
        if stored is not None:
            return stored
        job, fence = self.info.id, self.info.fence
        delay_s, wake_at = until.delay_s, until.instant
        with tracing.step(name, "sleep"):
            return await self.write(
                StepWrite(job, fence, name, place, "sleep", delay_s=delay_s, wake_at=wake_at)
            )

    async def make(self, name: str, kind: str, job: NewJob) -> StoredStep:
        """Come to a step that makes a job and does not wait for it."""
        place, stored = await self.reach(name, kind)
        return stored or await self._call(name, place, kind, makes=job, outcome=DONE)

    async def cancel(self, name: str, job: int) -> StoredStep:
        """Come to a step that asks for the end of a job."""
        place, stored = await self.reach(name, "cancel")
        return stored or await self._call(name, place, "cancel", cancels=job, outcome=DONE)

    async def schedule(self, schedule: str, task: str, plan: SchedulePlan | None) -> StoredStep:
        """Come to a step that begins a schedule, or (without a plan) ends it."""
        kind = "unschedule" if plan is None else "schedule"
        name, info = f"{kind} {schedule} of {task}", self.info  # its name is unique in the task
        place, stored = await self.reach(name, kind, is_derived=True)
        return stored or await self.write(
            ScheduleCall(
                job=info.id,
                fence=info.fence,
                name=name,
                position=place,
                kind=kind,
                schedule=schedule,
                task=task,
                plan=plan,
            )
        )

    async def invoke(
        self, name: str, job: NewJob, deadline: Deadline, *, cancel_on_timeout: bool
    ) -> StoredStep:
        """Come to a step that makes a job and waits for its end."""
        place, stored = await self.reach(name, "invoke")
        if stored is None:
            self.check_waits(name)  # the child would be cancelled with this job
            stored = await self._call(name, place, "invoke", makes=job, delay_s=deadline.delay_s)
        if stored.outcome is None and stored.due:
            cancels = stored.child if cancel_on_timeout else None
            stored = await self.give_up(stored, cancels=cancels)
        return stored

    async def expect(self, name: str, kind: str, wanted: Wanted, deadline: Deadline) -> StoredStep:
        """Come to a step that waits for an event or a change, from now on."""
        if kind == "change" and wanted.topic not in self.awaitable:
            raise WaitUndeclared(f"wait {name!r} is for a change that its task does not name")
        place, stored = await self.reach(name, kind)
        if stored is None:
            if kind == "change":
                wanted.seen_lsn = await self.services.port.source_position(wanted.source)
            stored = await self._call(name, place, kind, wants=wanted, delay_s=deadline.delay_s)
        if stored.outcome is None and stored.due:
            stored = await self.give_up(stored)
        return stored

    async def expire(self, expected: StoredStep, deadline: Deadline) -> StoredStep:
        """Bound the wait for a step that was written without a deadline."""
        if deadline.delay_s is None:
            return expected
        name = f"{expected.name} (timeout)"
        bound = await self.sleep(name, deadline, is_derived=True)  # reached in every run
        if expected.outcome is not None:
            return expected
        if is_over(bound):
            return await self.give_up(expected)
        expected.wake_at = bound.wake_at
        return expected

    async def give_up(self, step: StoredStep, *, cancels: int | None = None) -> StoredStep:
        """Stop waiting for a step, unless what it waits for has come: return what counts."""
        return await self._call(
            step.name, step.position, step.kind, outcome=TIMED_OUT, cancels=cancels
        )

    async def _call(
        self,
        name: str,
        place: int | None,
        kind: str,
        *,
        makes: NewJob | None = None,
        **rest: Any,
    ) -> StoredStep:
        info = self.info
        call = Call(job=info.id, fence=info.fence, name=name, position=place, kind=kind, **rest)
        call.makes = makes
        if makes is not None and tracing.find_tracer() is not None:
            return await self._send(call, makes)
        with tracing.step(name, kind):
            return await self.write(call)

    async def _send(self, call: Call, job: NewJob) -> StoredStep:
        """Write a step that makes a job, which carries the trace on."""
        metadata = None if job.metadata is None else from_json(job.metadata)
        with tracing.sending(job.queue, job.task, [job.payload], metadata, call.name) as sending:
            carried = sending.metadata
            call.makes = replace(job, metadata=None if carried is None else to_json(carried))
            step = await self.write(call)
            sending.sent(step.child)
        return step


def _is_seen(failed: asyncio.Future[Any] | None, by: asyncio.Future[Any] | None) -> bool:
    """Return whether a task's error has reached the path, which goes on from it.

    Until somebody has asked for it, the future wants to log it. A task group asks at once, and
    cancels the path.
    """
    if failed is None or not failed.done() or failed._log_traceback:  # noqa: SLF001 - no other tells
        return False
    return not isinstance(by, asyncio.Task) or not by.cancelling()


def is_over(step: StoredStep) -> bool:
    """Return whether a step need not be waited for (any more)."""
    if step.kind == "sleep":
        return step.due or step.wake_at is None
    return step.outcome is not None
