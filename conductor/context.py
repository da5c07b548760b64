"""What a handler is given besides its event: steps, children, waits, its job, a logger.

Handlers replay from the top: after a crash, a retry or a durable wait the handler runs again, and
what a finished step returned is read instead of computed. Code between steps runs again;
``finally`` blocks run at every suspension, and what they await of the context raises then.

The worker makes contexts; what they do goes through a `conductor.durable.Run`. This module must not
settle jobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from datetime import datetime, timedelta
from inspect import isawaitable, iscoroutine
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

from typing_extensions import TypeForm, TypeVar, Unpack

from conductor import calls, tracing
from conductor.base_context import BaseContext, Timeout, aware, lasting, raise_if_cancelled
from conductor.calls import ChildOptions, Expected, Match, ScheduleOptions
from conductor.definitions import EventDefinition, Task, TaskDefinition
from conductor.durable import Deadline, Gather, gathering, is_over
from conductor.errors import FenceLost
from conductor.job import JobHandle
from conductor.replay import UNSET, decode_step, encode_step, inside, step_codec
from conductor.triggers import Cron, OnChange

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from conductor.store.steps import StoredStep

D = TypeVar("D", default=Any)
T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")


class Context(BaseContext[D]):
    """The context of an ``async def`` handler. ``deps`` is what the conductor was given.

    async def welcome(event: Invocation[User], ctx: Context[Deps]) -> None:
        receipt = await ctx.step("charge", lambda: charge(event.payload), returns=Receipt)
        await ctx.sleep("cool down", timedelta(days=3))
        await ctx.step("mail", lambda: ctx.deps.mailer.send(receipt))
    """

    __slots__ = ()

    @overload
    async def step(
        self, name: str, fn: Callable[[], Awaitable[Any]], *, returns: TypeForm[T]
    ) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[[], Any], *, returns: TypeForm[T]) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[[], Awaitable[T]]) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[[], T]) -> T: ...
    async def step(self, name: str, fn: Callable[[], Any], *, returns: Any = UNSET) -> Any:
        """Run ``fn`` once for all runs of this job and return its result.

        The result is stored as JSON of the type ``returns``, else of fn's annotated return type,
        else of JSON types only; the first run too returns what reading it back gives. An exception
        of ``fn`` passes through; when the handler goes on from it, it is stored and raised again
        in every later run. ``name`` is unique in the handler. Raises ResultInvalid, StepNameReused,
        StepOrderChanged, StepFailed.
        """
        run = self._run
        codec = step_codec(fn, returns)
        run.enter()
        try:
            place, stored = await run.reach(name, "step")
            if stored is not None:
                await asyncio.sleep(0)
                return decode_step(codec, name, stored.result)
            with run.noting(name, place, "step"), tracing.step(name, "step"):
                with inside(f"step {name!r}"):
                    value = fn()
                    if isawaitable(value):
                        value = await value
                document = encode_step(codec, name, value)
                await run.write(run.result(name, place, "step", document))
            return decode_step(codec, name, document)
        except FenceLost:
            await run.hold()
        finally:
            run.leave()

    async def sleep(self, name: str, duration: float | timedelta) -> None:
        """Sleep durably for a duration (seconds, or a timedelta) from the first time it is reached.

        The job holds no slot meanwhile; the handler then runs again from the top.
        """
        await self._settled(self._run.sleep(name, lasting(duration)))

    async def sleep_until(self, name: str, instant: datetime) -> None:
        """Sleep durably until an instant (with a time zone) of the database's clock."""
        await self._settled(self._run.sleep(name, Deadline(instant=aware(instant))))

    async def checkpoint(self) -> None:
        """Let other jobs run; raises JobCancelled when this one is to stop."""
        await self._run.stay()
        await asyncio.sleep(0)
        raise_if_cancelled(self._run)

    # --- children and events -----------------------------------------------------------------

    @overload
    async def invoke(
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
    async def invoke(
        self,
        name: str,
        task: TaskDefinition[None, R] | Task[None, R],
        payload: None = ...,
        *,
        timeout: Timeout = ...,
        cancel_on_timeout: bool = ...,
        **options: Unpack[ChildOptions],
    ) -> R: ...
    async def invoke(
        self,
        name: str,
        task: TaskDefinition[Any, Any] | Task[Any, Any],
        payload: Any = None,
        *,
        timeout: Timeout = None,
        cancel_on_timeout: bool = False,
        **options: Unpack[ChildOptions],
    ) -> Any:
        """Run another task as a child of this job, wait for its end and return its result.

        The job holds no slot meanwhile. A run that comes again waits for the same child. When this
        job fails or is cancelled, so is the child. After ``timeout`` the wait ends and the child
        goes on, unless ``cancel_on_timeout``. Raises ChildFailed, ChildCancelled, ChildTimeout,
        PayloadInvalid.

            receipt = await ctx.invoke("charge", charge, Charge(order=7), timeout=60)
        """
        run, job = self._run, calls.child(self._run.info, task, payload, options)
        step = await self._settled(
            run.invoke(name, job, Deadline.after(timeout), cancel_on_timeout=cancel_on_timeout)
        )
        return calls.child_result(task, step)

    @overload
    async def start(
        self,
        name: str,
        task: TaskDefinition[P, R] | Task[P, R],
        payload: P,
        **options: Unpack[ChildOptions],
    ) -> JobHandle[R]: ...
    @overload
    async def start(
        self,
        name: str,
        task: TaskDefinition[None, R] | Task[None, R],
        payload: None = ...,
        **options: Unpack[ChildOptions],
    ) -> JobHandle[R]: ...
    async def start(
        self,
        name: str,
        task: TaskDefinition[Any, Any] | Task[Any, Any],
        payload: Any = None,
        **options: Unpack[ChildOptions],
    ) -> JobHandle[Any]:
        """Enqueue another task once and go on. It does not end with this job.

        Raises PayloadInvalid.
        """
        job = calls.child(self._run.info, task, payload, options)
        return self._handle(task, await self._settled(self._run.make(name, "start", job)))

    @overload
    async def emit(self, name: str, event: EventDefinition[P], payload: P) -> None: ...
    @overload
    async def emit(self, name: str, event: EventDefinition[None], payload: None = ...) -> None: ...
    async def emit(self, name: str, event: EventDefinition[Any], payload: Any = None) -> None:
        """Emit an event, once. Raises PayloadInvalid."""
        job = calls.emission(self._run.info, event, payload)
        await self._settled(self._run.make(name, "emit", job))

    async def cancel(self, job: JobHandle[Any] | int) -> None:
        """Ask, once, for the end of a job. One that has ended already is left alone."""
        number = job if isinstance(job, int) else job.id
        await self._settled(self._run.cancel(f"cancel {number}", number))

    # --- schedules ---------------------------------------------------------------------------

    async def schedule(
        self,
        name: str,
        task: TaskDefinition[P, Any] | Task[P, Any],
        cron: Cron,
        payload: P,
        **options: Unpack[ScheduleOptions],
    ) -> None:
        """Invoke a task on a schedule from now on, until `unschedule`: as `Conductor.schedule`.

        Once, as a step; the schedule outlives this job. Its jobs carry this job's metadata unless
        given others. Raises PayloadInvalid, OptionInvalid.

            await ctx.schedule("remind 7", remind, Cron("0 9 * * *"), Remind(order=7))
        """
        options.setdefault("metadata", tracing.without_context(self._run.info.metadata))
        plan = calls.plan(task, cron, payload, options)
        name = calls.check_schedule_name(name)
        await self._settled(self._run.schedule(name, task.name, plan))

    async def unschedule(self, name: str, task: TaskDefinition[Any, Any] | Task[Any, Any]) -> None:
        """End, once, a schedule that `schedule` has begun, here or elsewhere."""
        name = calls.check_schedule_name(name)
        await self._settled(self._run.schedule(name, task.name, None))

    # --- waiting -----------------------------------------------------------------------------

    async def wait_for_event(
        self,
        name: str,
        event: EventDefinition[P],
        *,
        match: Match | None = None,
        when: str | None = None,
        timeout: Timeout = None,
    ) -> P:
        """Wait for an event that is emitted from now on; return its payload.

        ``match`` names fields of the payload and their values; it is looked up, so that many jobs
        may wait for one event each. ``when`` is a CEL filter as that of OnEvent. The job holds no
        slot meanwhile. Raises WaitTimeout, FilterInvalid, UnknownField, FilterFailed.

            paid = await ctx.wait_for_event("paid", order_paid, match={"order": 7}, timeout=3600)
        """
        expected: Expected = calls.expected_event(event, match, when)
        payload: P = await self._expect(name, expected, timeout)
        return payload

    async def wait_for_change(
        self,
        name: str,
        change: OnChange[T],
        *,
        match: Match | None = None,
        timeout: Timeout = None,
    ) -> T:
        """Wait for a change of a table that is committed from now on; return it.

        ``match`` names columns of the new row (of a delete: the old one) and their values: as in
        Python, a numeric with its scale (``"9.50"``).
        The tables that a task waits for are named with it: ``@conductor.task(…, waits=[Payments])``
        has them captured. Raises WaitTimeout, FilterFailed, UnknownColumn.

            inserted = OnChange(Payments, "insert")
            payment = await ctx.wait_for_change("paid", inserted, match={"order": 7})
        """
        found: T = await self._expect(name, calls.expected_change(change, match), timeout)
        return found

    @overload
    async def subscribe(
        self,
        name: str,
        source: EventDefinition[P],
        *,
        match: Match | None = ...,
        when: str | None = ...,
    ) -> Subscribed[P]: ...
    @overload
    async def subscribe(
        self, name: str, source: OnChange[T], *, match: Match | None = ...
    ) -> Subscribed[T]: ...
    async def subscribe(
        self,
        name: str,
        source: EventDefinition[Any] | OnChange[Any],
        *,
        match: Match | None = None,
        when: str | None = None,
    ) -> Subscribed[Any]:
        """Note, durably, that an event or a change is waited for, and go on: act, then ``wait``.

        What comes between is not lost. Arguments as for `wait_for_event` and `wait_for_change`.

            paid = await ctx.subscribe("paid", order_paid, match={"order": 7})
            await ctx.step("ask", lambda: ask_for_payment(7))
            payment = await paid.wait(timeout=3600)
        """
        expected = (
            calls.expected_event(source, match, when)
            if isinstance(source, EventDefinition)
            else calls.expected_change(source, match)
        )
        run = self._run
        operation = run.expect(name, expected.kind, expected.wanted, Deadline())
        return Subscribed(self, expected, await self._durable(operation))

    async def _expect(self, name: str, expected: Expected, timeout: Timeout) -> Any:
        run = self._run
        operation = run.expect(name, expected.kind, expected.wanted, Deadline.after(timeout))
        return expected.read(await self._settled(operation))

    # --- several at once ---------------------------------------------------------------------

    @overload
    async def gather(self, a: Awaitable[T1], b: Awaitable[T2], /) -> tuple[T1, T2]: ...
    @overload
    async def gather(
        self, a: Awaitable[T1], b: Awaitable[T2], c: Awaitable[T3], /
    ) -> tuple[T1, T2, T3]: ...
    @overload
    async def gather(
        self, a: Awaitable[T1], b: Awaitable[T2], c: Awaitable[T3], d: Awaitable[T4], /
    ) -> tuple[T1, T2, T3, T4]: ...
    @overload
    async def gather(
        self,
        a: Awaitable[T1],
        b: Awaitable[T2],
        c: Awaitable[T3],
        d: Awaitable[T4],
        e: Awaitable[T5],
        /,
    ) -> tuple[T1, T2, T3, T4, T5]: ...
    @overload
    async def gather(self, *awaitables: Awaitable[T]) -> tuple[T, ...]: ...
    async def gather(self, *awaitables: Awaitable[Any]) -> tuple[Any, ...]:
        """Do steps, children and waits side by side; return their results in order.

        When all have ended, the first error in that order is raised. Their order among each other
        is free, but the names must be the same in every run, also after one that was interrupted
        in it. Raises StepOrderChanged.

            a, b = await ctx.gather(
                ctx.invoke("a", pack, Pack(order=7)), ctx.step("b", lambda: notify(7))
            )
        """
        run = self._run
        try:
            gather = await self._durable(run.gather())
        except BaseException:
            _dismiss(awaitables)
            raise
        tasks = _begun(awaitables, gather)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                run.adopt(tasks)
                await run.failed_in(gather)
                raise result
        await self._durable(run.gathered(gather))
        return tuple(results)

    @overload
    async def wait_for_any(
        self, name: str, a: Awaitable[T1], b: Awaitable[T2], /
    ) -> tuple[Literal[0], T1] | tuple[Literal[1], T2]: ...
    @overload
    async def wait_for_any(
        self, name: str, a: Awaitable[T1], b: Awaitable[T2], c: Awaitable[T3], /
    ) -> tuple[Literal[0], T1] | tuple[Literal[1], T2] | tuple[Literal[2], T3]: ...
    @overload
    async def wait_for_any(self, name: str, /, *awaitables: Awaitable[T]) -> tuple[int, T]: ...
    async def wait_for_any(self, name: str, /, *awaitables: Awaitable[Any]) -> tuple[int, Any]:
        """Wait until the first of several has ended; return its place and its result.

        Which one it was is kept under ``name``: every later run sees the same, and begins it alone.
        The others are not waited for any more; a child among them goes on. Its error is raised.

            match await ctx.wait_for_any("first", paid.wait(), ctx.sleep("a day", 86_400)):
                case (0, payment): ...
        """
        run = self._run
        try:
            place, stored = await self._durable(run.reach(name, "any"))
        except BaseException:
            _dismiss(awaitables)
            raise
        first = None if stored is None else int(stored.result or 0)
        if first is not None:  # the others would begin again what they have not ended
            _dismiss(other for n, other in enumerate(awaitables) if n != first)
            awaitables = awaitables[first : first + 1]
        tasks = _begun(awaitables, None)  # how far the others come is not the gather's business
        try:
            if first is not None:
                return first, await tasks[0]
            first = await _first(tasks)
            await self._durable(run.write(run.result(name, place, "any", str(first).encode())))
            return first, await tasks[first]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            run.adopt(tasks)

    # --- transactions ------------------------------------------------------------------------

    @overload
    async def transaction(
        self,
        name: str,
        fn: Callable[[AsyncConnection[Any]], Awaitable[Any]],
        *,
        returns: TypeForm[T],
    ) -> T: ...
    @overload
    async def transaction(
        self, name: str, fn: Callable[[AsyncConnection[Any]], Awaitable[T]]
    ) -> T: ...
    async def transaction(
        self,
        name: str,
        fn: Callable[[AsyncConnection[Any]], Awaitable[Any]],
        *,
        returns: Any = UNSET,
    ) -> Any:
        """Run ``fn`` on a connection to the queue database; what it writes commits with the step.

        Exactly once: both are there, or neither. ``fn`` must neither commit nor reach a step; what
        it returns is stored as that of `step`. A transaction that is idle for some seconds is ended
        by the server. Raises StepMisplaced.

            await ctx.transaction(
                "take", lambda db: db.execute("update stock set left = left - 1"), returns=None
            )
        """
        run = self._run
        codec = step_codec(fn, returns)
        run.enter()
        try:
            place, stored = await run.reach(name, "transaction")
            if stored is None:

                async def work(connection: AsyncConnection[Any]) -> bytes:
                    value = await fn(connection)
                    return encode_step(codec, name, None if codec.is_none else value)

                with run.noting(name, place, "transaction"), tracing.step(name, "transaction"):
                    document: bytes | None = await run.transact(name, place, work)
            else:
                document = stored.result
            return decode_step(codec, name, document)
        except FenceLost:
            await run.hold()
        finally:
            run.leave()

    # --- the way of all of them --------------------------------------------------------------

    async def _settled(self, operation: Coroutine[Any, Any, StoredStep]) -> StoredStep:
        """Do an operation of the run and wait until what it came to is over."""
        run = self._run
        run.enter()
        try:
            step = await operation
            if not is_over(step):
                await run.park(step)
        except FenceLost:
            await run.hold()
        else:
            return step
        finally:
            run.leave()

    async def _durable(self, operation: Coroutine[Any, Any, T]) -> T:
        """Do an operation of the run."""
        run = self._run
        run.enter()
        try:
            return await operation
        except FenceLost:
            await run.hold()
        finally:
            run.leave()


class Subscribed(Generic[T]):
    """What `Context.subscribe` waits for. `wait` for it at most once."""

    __slots__ = ("_context", "_expected", "_step")

    def __init__(self, context: Context[Any], expected: Expected, step: StoredStep) -> None:
        self._context, self._expected, self._step = context, expected, step

    async def wait(self, timeout: Timeout = None) -> T:
        """Return what has come, or wait for it. Raises WaitTimeout, FilterFailed."""
        context = self._context
        operation = context._run.expire(self._step, Deadline.after(timeout))  # noqa: SLF001 - its own
        found: T = self._expected.read(await context._settled(operation))  # noqa: SLF001
        return found


def _begun(
    awaitables: Sequence[Awaitable[Any]], gather: Gather | None
) -> list[asyncio.Future[Any]]:
    """Start what runs side by side, as steps of a gather."""
    token = gathering.set(gather)
    try:
        return [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    finally:
        gathering.reset(token)


def _dismiss(awaitables: Iterable[Awaitable[Any]]) -> None:
    """Close what is never awaited."""
    for awaitable in awaitables:
        if iscoroutine(awaitable):
            awaitable.close()


async def _first(tasks: Sequence[asyncio.Future[Any]]) -> int:
    """Return the place of the first that has ended."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return next(place for place, task in enumerate(tasks) if task.done())
