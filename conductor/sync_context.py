"""What a ``def`` handler is given: the context of `conductor.context` for code that blocks.

The handler runs in a thread; what is durable is done by the event loop, which the thread waits for.
A sleep or a wait leaves the handler by raising. This module must not settle jobs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, overload

from typing_extensions import TypeForm, TypeVar, Unpack

from conductor import calls, tracing
from conductor.base_context import BaseContext, Timeout, aware, lasting, raise_if_cancelled
from conductor.calls import ChildOptions, Expected, Match, ScheduleOptions
from conductor.definitions import EventDefinition, Task, TaskDefinition
from conductor.durable import Deadline, Run, is_over
from conductor.errors import FenceLost
from conductor.job import JobHandle
from conductor.replay import UNSET, decode_step, encode_step, inside, step_codec
from conductor.transactions import CommitUnknown
from conductor.triggers import Cron, OnChange

if TYPE_CHECKING:
    from psycopg import Connection

    from conductor.store.steps import StoredStep

D = TypeVar("D", default=Any)
T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")


class Suspension(BaseException):
    """Unwinds the thread of a sync handler that sleeps, or waits for something."""

    def __init__(self, step: StoredStep) -> None:
        super().__init__()
        self.step = step


class SyncContext(BaseContext[D]):
    """The context of a ``def`` handler, which runs in a thread.

    A thread cannot be stopped: when the job is cancelled or out of time a flag is set and what the
    handler still writes is refused; call `checkpoint` in long loops.
    """

    __slots__ = ("_loop", "suspension")

    def __init__(self, run: Run, deps: D, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(run, deps)
        self._loop = loop
        self.suspension: Suspension | None = None
        """Once the handler is being left: what it is left by."""

    @overload
    def step(self, name: str, fn: Callable[[], Any], *, returns: TypeForm[T]) -> T: ...
    @overload
    def step(self, name: str, fn: Callable[[], T]) -> T: ...
    def step(self, name: str, fn: Callable[[], Any], *, returns: Any = UNSET) -> Any:
        """Like `Context.step`, in this thread."""
        self._stay()
        run = self._run
        codec = step_codec(fn, returns)
        place, stored = self._await(run.reach(name, "step"))
        if stored is not None:
            return decode_step(codec, name, stored.result)
        with run.noting(name, place, "step"), tracing.step(name, "step"):
            with inside(f"step {name!r}"):
                value = fn()
            document = encode_step(codec, name, value)
            self._await(run.write(run.result(name, place, "step", document)))
        return decode_step(codec, name, document)

    def sleep(self, name: str, duration: float | timedelta) -> None:
        """Like `Context.sleep`; leaves the handler by raising, so keep no resource open."""
        self._settled(self._run.sleep(name, lasting(duration)))

    def sleep_until(self, name: str, instant: datetime) -> None:
        """Like `Context.sleep_until`; leaves the handler by raising."""
        self._settled(self._run.sleep(name, Deadline(instant=aware(instant))))

    def checkpoint(self) -> None:
        """Raise JobCancelled when the job is to stop."""
        self._stay()

    @overload
    def invoke(
        self,
        name: str,
        task: TaskDefinition[P, R] | Task[P, R],
        payload: P,
        *,
        timeout: Timeout = ...,
        cancel_on_timeout: bool = ...,
        **options: Unpack[ChildOptions],
    ) -> R: ...
    @overload
    def invoke(
        self,
        name: str,
        task: TaskDefinition[None, R] | Task[None, R],
        payload: None = ...,
        *,
        timeout: Timeout = ...,
        cancel_on_timeout: bool = ...,
        **options: Unpack[ChildOptions],
    ) -> R: ...
    def invoke(
        self,
        name: str,
        task: TaskDefinition[Any, Any] | Task[Any, Any],
        payload: Any = None,
        *,
        timeout: Timeout = None,
        cancel_on_timeout: bool = False,
        **options: Unpack[ChildOptions],
    ) -> Any:
        """Like `Context.invoke`; leaves the handler by raising, so keep no resource open."""
        run, job = self._run, calls.child(self._run.info, task, payload, options)
        step = self._settled(
            run.invoke(name, job, Deadline.after(timeout), cancel_on_timeout=cancel_on_timeout)
        )
        return calls.child_result(task, step)

    @overload
    def start(
        self,
        name: str,
        task: TaskDefinition[P, R] | Task[P, R],
        payload: P,
        **options: Unpack[ChildOptions],
    ) -> JobHandle[R]: ...
    @overload
    def start(
        self,
        name: str,
        task: TaskDefinition[None, R] | Task[None, R],
        payload: None = ...,
        **options: Unpack[ChildOptions],
    ) -> JobHandle[R]: ...
    def start(
        self,
        name: str,
        task: TaskDefinition[Any, Any] | Task[Any, Any],
        payload: Any = None,
        **options: Unpack[ChildOptions],
    ) -> JobHandle[Any]:
        """Like `Context.start`; the handle is for code of the event loop."""
        job = calls.child(self._run.info, task, payload, options)
        return self._handle(task, self._settled(self._run.make(name, "start", job)))

    @overload
    def emit(self, name: str, event: EventDefinition[P], payload: P) -> None: ...
    @overload
    def emit(self, name: str, event: EventDefinition[None], payload: None = ...) -> None: ...
    def emit(self, name: str, event: EventDefinition[Any], payload: Any = None) -> None:
        """Like `Context.emit`."""
        job = calls.emission(self._run.info, event, payload)
        self._settled(self._run.make(name, "emit", job))

    def cancel(self, job: JobHandle[Any] | int) -> None:
        """Like `Context.cancel`."""
        number = job if isinstance(job, int) else job.id
        self._settled(self._run.cancel(f"cancel {number}", number))

    def schedule(
        self,
        name: str,
        task: TaskDefinition[P, Any] | Task[P, Any],
        cron: Cron,
        payload: P,
        **options: Unpack[ScheduleOptions],
    ) -> None:
        """Like `Context.schedule`."""
        options.setdefault("metadata", tracing.without_context(self._run.info.metadata))
        plan = calls.plan(task, cron, payload, options)
        name = calls.check_schedule_name(name)
        self._settled(self._run.schedule(name, task.name, plan))

    def unschedule(self, name: str, task: TaskDefinition[Any, Any] | Task[Any, Any]) -> None:
        """Like `Context.unschedule`."""
        name = calls.check_schedule_name(name)
        self._settled(self._run.schedule(name, task.name, None))

    def wait_for_event(
        self,
        name: str,
        event: EventDefinition[P],
        *,
        match: Match | None = None,
        when: str | None = None,
        timeout: Timeout = None,
    ) -> P:
        """Like `Context.wait_for_event`; leaves the handler by raising."""
        payload: P = self._expect(name, calls.expected_event(event, match, when), timeout)
        return payload

    def wait_for_change(
        self,
        name: str,
        change: OnChange[T],
        *,
        match: Match | None = None,
        timeout: Timeout = None,
    ) -> T:
        """Like `Context.wait_for_change`; leaves the handler by raising."""
        found: T = self._expect(name, calls.expected_change(change, match), timeout)
        return found

    def _expect(self, name: str, expected: Expected, timeout: Timeout) -> Any:
        run = self._run
        operation = run.expect(name, expected.kind, expected.wanted, Deadline.after(timeout))
        return expected.read(self._settled(operation))

    @overload
    def transaction(
        self, name: str, fn: Callable[[Connection[Any]], Any], *, returns: TypeForm[T]
    ) -> T: ...
    @overload
    def transaction(self, name: str, fn: Callable[[Connection[Any]], T]) -> T: ...
    def transaction(
        self, name: str, fn: Callable[[Connection[Any]], Any], *, returns: Any = UNSET
    ) -> Any:
        """Like `Context.transaction`, in this thread."""
        self._stay()
        run, codec = self._run, step_codec(fn, returns)
        place, stored = self._await(run.reach(name, "transaction"))
        if stored is not None:
            return decode_step(codec, name, stored.result)

        def work(connection: Connection[Any]) -> bytes:
            value = fn(connection)
            return encode_step(codec, name, None if codec.is_none else value)

        with run.noting(name, place, "transaction"), tracing.step(name, "transaction"):
            try:
                document: bytes | None = run.transact_blocking(name, place, work)
            except CommitUnknown as unknown:
                document = self._await(run.find_committed(name, unknown))
            except FenceLost:
                self._loop.call_soon_threadsafe(run.abandon)
                raise
        return decode_step(codec, name, document)

    def _settled(self, operation: Coroutine[Any, Any, StoredStep]) -> StoredStep:
        try:
            self._stay()
        except BaseException:
            operation.close()
            raise
        step: StoredStep = self._await(operation)
        if not is_over(step):
            self.suspension = Suspension(step)
            raise self.suspension
        return step

    def _stay(self) -> None:
        """Raise what the handler is being left by: a ``finally`` of it must begin nothing more."""
        if self.suspension is not None:
            raise Suspension(self.suspension.step)
        raise_if_cancelled(self._run)

    def _await(self, operation: Any) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(operation, self._loop).result()
        except concurrent.futures.CancelledError as error:  # the run is being left
            raise_if_cancelled(self._run)
            raise RuntimeError("the event loop has cancelled what this thread waits for") from error
