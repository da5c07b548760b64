"""What a handler is given besides its event: steps, durable sleep, its job, a logger.

Handlers replay from the top: after a crash, a retry or a durable wait the handler runs again, and
what a finished step returned is read instead of computed. Code between steps runs again;
``finally`` blocks run at every suspension. A durable wait parks on a future that never resolves;
the job is put away once every open await of its context is a durable wait.

The worker makes contexts and supplies the `Checkpoints`. This module must not settle jobs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from inspect import isawaitable
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, get_type_hints, overload

from pydantic import JsonValue
from typing_extensions import TypeForm, TypeVar

from conductor.codec import INVALID, Codec, explain
from conductor.errors import (
    FenceLost,
    JobCancelled,
    ResultInvalid,
    StepNameReused,
    StepOrderChanged,
)
from conductor.store.jobs import StepWrite, StoredStep

if TYPE_CHECKING:
    from conductor.checkpoints import Checkpoints
    from conductor.job import JobInfo

D = TypeVar("D", default=Any)
T = TypeVar("T")

_LOG: Final = logging.getLogger("conductor.job")
_JSON: Final[Codec[Any]] = Codec(JsonValue)
_UNSET: Final[Any] = object()
_QUIET_ROUNDS: Final = 32  # turns of the event loop without an await of the context


class Replay:
    """The steps of one run against those of the runs before. Pure.

    On the handler's sequential path (its own task or thread) each step has a place; beside it
    (``gather``, task groups) only its name counts. Raises StepNameReused, StepOrderChanged.
    """

    __slots__ = ("_by_name", "_by_place", "_names", "_next")

    def __init__(self, stored: list[StoredStep]) -> None:
        self._by_name = {step.name: step for step in stored}
        self._by_place = {step.position: step for step in stored if step.position is not None}
        self._names: set[str] = set()
        self._next = 0

    def reach(
        self, name: str, kind: str, *, sequential: bool
    ) -> tuple[int | None, StoredStep | None]:
        """Take note that the handler has come to a step; return its place and what is stored."""
        if name in self._names:
            raise StepNameReused(f"step {name!r} is used twice in one run")
        self._names.add(name)
        place: int | None = None
        if sequential:
            place, self._next = self._next, self._next + 1
            self._check_place(name, place)
        stored = self._by_name.get(name)
        if stored is not None and stored.kind != kind:
            raise StepOrderChanged(f"{name!r} was a {stored.kind} in an earlier run, now a {kind}")
        return place, stored

    def _check_place(self, name: str, place: int) -> None:
        there = self._by_place.get(place)
        before = self._by_name.get(name)
        if there is not None and there.name != name:
            raise StepOrderChanged(
                f"step {place + 1} is {name!r}, but was {there.name!r} in an earlier run"
            )
        if before is not None and before.position is not None and before.position != place:
            raise StepOrderChanged(
                f"{name!r} is step {place + 1}, but was step {before.position + 1}"
                " in an earlier run"
            )


_CODECS: Final[dict[CodeType, Codec[Any]]] = {}  # by function; as many as there are in the source


def _annotated_codec(fn: Callable[[], Any], code: CodeType) -> Codec[Any]:
    codec = _CODECS.get(code)
    if codec is None:
        try:
            form = get_type_hints(fn)["return"]
        except NameError as error:
            raise TypeError(
                f"cannot read the return annotation ({error}): give `returns`"
            ) from error
        codec = _CODECS[code] = Codec(form)
    return codec


def _codec(fn: Callable[[], Any], returns: Any) -> Codec[Any]:
    """Return how a step's result is stored: by ``returns``, else fn's annotation, else as JSON."""
    if returns is not _UNSET:
        return Codec(returns)
    code: CodeType | None = getattr(fn, "__code__", None)
    if code is None or "return" not in getattr(fn, "__annotations__", ()):
        return _JSON
    return _annotated_codec(fn, code)


def _encode(codec: Codec[Any], name: str, value: Any) -> bytes:
    try:
        return codec.encode(value)
    except INVALID as error:
        why, errors = explain(error)
        hint = "Give `returns`, or annotate what the function returns." if codec is _JSON else None
        raise ResultInvalid(f"result of step {name!r}: {why}", errors, hint=hint) from error


def _decode(codec: Codec[Any], name: str, document: bytes | None) -> Any:
    try:
        return codec.decode(b"null" if document is None else document)
    except INVALID as error:
        why, errors = explain(error)
        raise ResultInvalid(f"stored result of step {name!r}: {why}", errors) from error


def _seconds(duration: float | timedelta) -> float:
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)


class Run:
    """The durable side of one run of a job, shared with its context. The worker's, not the user's.

    The worker says how to `suspend` a run (called with the earliest wake-up once only durable waits
    are open) and how to `abandon` one whose job turned out to be another worker's.
    """

    __slots__ = (
        "_checking",
        "_checkpoints",
        "_held",
        "_open",
        "_parked",
        "_replay",
        "_rounds",
        "cancelled",
        "info",
        "path",
        "stepped",
    )

    def __init__(self, info: JobInfo, checkpoints: Checkpoints) -> None:
        self.info = info
        self.path: asyncio.Task[Any] | None = None  # the sequential path; None: a thread's
        self.stepped = info.fence > 1  # it may have steps
        self.cancelled = False
        self._checkpoints = checkpoints
        self._replay: Replay | None = None
        self._open = 0  # awaits of the context, parked ones included
        self._parked: list[datetime] = []
        self._held: set[asyncio.Task[Any]] = set()
        self._checking = False
        self._rounds = 0

    def suspend(self, wake_at: datetime) -> None:
        """End the run here; it goes on at ``wake_at``."""
        raise NotImplementedError

    def abandon(self) -> None:
        """End the run here and write nothing."""
        raise NotImplementedError

    async def reach(self, name: str, kind: str) -> tuple[int | None, StoredStep | None]:
        """Come to a step: return its place and what an earlier run stored."""
        sequential = self.path is None or asyncio.current_task() is self.path
        replay = self._replay
        if replay is None:
            stored = await self._checkpoints.load(self.info.id) if self.info.fence > 1 else []
            replay = self._begin(stored)
        self.stepped = True
        return replay.reach(name, kind, sequential=sequential)

    def _begin(self, stored: list[StoredStep]) -> Replay:
        """Replay what is stored; a concurrent step may have begun that already."""
        if self._replay is None:
            self._replay = Replay(stored)
        return self._replay

    async def write(self, step: StepWrite) -> datetime | None:
        """Write a step; return its wake-up. Does not return when the job is no longer ours."""
        try:
            return await self._checkpoints.write(step)
        except FenceLost:
            self.abandon()
            raise

    async def sleep(self, name: str, delay_s: float | None, wake_at: datetime | None) -> datetime:
        """Come to a sleep: return at once when it is over, else say until when it lasts."""
        place, stored = await self.reach(name, "sleep")
        if stored is not None:
            instant = stored.wake_at
            if stored.due or instant is None:
                raise _SleepOver
            return instant
        step = StepWrite(
            self.info.id, self.info.fence, name, place, "sleep", delay_s=delay_s, wake_at=wake_at
        )
        written = await self.write(step)
        if written is None or (delay_s is not None and delay_s <= 0):
            raise _SleepOver
        return written

    def enter(self) -> None:
        """An await of the context begins."""
        self._open += 1
        self._rounds = _QUIET_ROUNDS

    def leave(self) -> None:
        """An await of the context ends."""
        self._open -= 1
        self._rounds = _QUIET_ROUNDS
        if self._parked and not self.cancelled:
            self._check_later()

    async def park(self, wake_at: datetime) -> NoReturn:
        """Wait until the worker puts the job away."""
        self._parked.append(wake_at)
        self._check_later()
        try:
            await self.hold()
        finally:
            self._parked.remove(wake_at)

    async def hold(self) -> NoReturn:
        """Wait to be cancelled, by the worker or with the end of the run."""
        task = asyncio.current_task()
        if task is not None:
            self._held.add(task)
        while True:
            await asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """The run is over: so are the tasks of the handler that wait for something of it."""
        for task in self._held:
            task.cancel()
        self._held.clear()

    def _check_later(self) -> None:
        """See whether only durable waits are open, once the handler has come to rest.

        What has just returned to it may open another await some turns of the event loop later.
        """
        if not self._checking:
            self._checking = True
            self._check()

    def _check(self) -> None:
        if self._rounds:
            self._rounds -= 1
            asyncio.get_running_loop().call_soon(self._check)
            return
        self._checking = False
        if self._parked and self._open == len(self._parked):
            self.suspend(min(self._parked))


class _SleepOver(Exception):  # noqa: N818 - not an error: the sleep has ended
    """The sleep has ended."""


class _BaseContext(Generic[D]):
    """What both kinds of handlers have."""

    __slots__ = ("_logger", "_run", "deps")

    def __init__(self, run: Run, deps: D) -> None:
        self._run = run
        self.deps = deps
        self._logger: logging.LoggerAdapter[logging.Logger] | None = None

    @property
    def job(self) -> JobInfo:
        """The job and which run of it this is."""
        return self._run.info

    @property
    def cancelled(self) -> bool:
        """Whether the job is to stop: cancelled, out of time, or no longer this worker's."""
        return self._run.cancelled

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that adds the job's id, task and attempt to every record."""
        if self._logger is None:
            job = self._run.info
            extra = {"job": job.id, "task": job.task, "attempt": job.attempt}
            self._logger = logging.LoggerAdapter(_LOG, extra)
        return self._logger


class Context(_BaseContext[D]):
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
    async def step(self, name: str, fn: Callable[[], Any], *, returns: Any = _UNSET) -> Any:
        """Run ``fn`` once for all runs of this job and return its result.

        The result is stored as JSON of the type ``returns``, else of fn's annotated return type,
        else of JSON types only; the first run too returns what reading it back gives. An exception
        of ``fn`` passes through and nothing is stored. ``name`` is unique in the handler. Raises
        ResultInvalid, StepNameReused, StepOrderChanged.
        """
        run = self._run
        codec = _codec(fn, returns)
        run.enter()
        try:
            place, stored = await run.reach(name, "step")
            if stored is not None:
                await asyncio.sleep(0)
                return _decode(codec, name, stored.result)
            value = fn()
            if isawaitable(value):
                value = await value
            document = _encode(codec, name, value)
            await run.write(StepWrite(run.info.id, run.info.fence, name, place, "step", document))
            return _decode(codec, name, document)
        except FenceLost:
            await run.hold()
        finally:
            run.leave()

    async def sleep(self, name: str, duration: float | timedelta) -> None:
        """Sleep durably for a duration (seconds, or a timedelta) from the first time it is reached.

        The job holds no slot meanwhile; the handler then runs again from the top.
        """
        await self._sleep(name, _seconds(duration), None)

    async def sleep_until(self, name: str, instant: datetime) -> None:
        """Sleep durably until an instant (with a time zone) of the database's clock."""
        await self._sleep(name, None, _aware(instant))

    async def checkpoint(self) -> None:
        """Let other jobs run; raises JobCancelled when this one is to stop."""
        await asyncio.sleep(0)
        _raise_if_cancelled(self._run)

    async def _sleep(self, name: str, delay_s: float | None, instant: datetime | None) -> None:
        run = self._run
        run.enter()
        try:
            await run.park(await run.sleep(name, delay_s, instant))
        except _SleepOver:
            return
        except FenceLost:
            await run.hold()
        finally:
            run.leave()


class Suspension(BaseException):
    """Unwinds the thread of a sync handler that goes to sleep."""

    def __init__(self, wake_at: datetime) -> None:
        super().__init__()
        self.wake_at = wake_at


class SyncContext(_BaseContext[D]):
    """The context of a ``def`` handler, which runs in a thread.

    A thread cannot be stopped: when the job is cancelled or out of time a flag is set and what the
    handler still writes is refused; call `checkpoint` in long loops.
    """

    __slots__ = ("_loop",)

    def __init__(self, run: Run, deps: D, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(run, deps)
        self._loop = loop

    @overload
    def step(self, name: str, fn: Callable[[], Any], *, returns: TypeForm[T]) -> T: ...
    @overload
    def step(self, name: str, fn: Callable[[], T]) -> T: ...
    def step(self, name: str, fn: Callable[[], Any], *, returns: Any = _UNSET) -> Any:
        """Like `Context.step`, in this thread."""
        _raise_if_cancelled(self._run)
        run = self._run
        codec = _codec(fn, returns)
        place, stored = self._await(run.reach(name, "step"))
        if stored is not None:
            return _decode(codec, name, stored.result)
        document = _encode(codec, name, fn())
        self._await(
            run.write(StepWrite(run.info.id, run.info.fence, name, place, "step", document))
        )
        return _decode(codec, name, document)

    def sleep(self, name: str, duration: float | timedelta) -> None:
        """Like `Context.sleep`; leaves the handler by raising, so keep no resource open."""
        self._sleep(name, _seconds(duration), None)

    def sleep_until(self, name: str, instant: datetime) -> None:
        """Like `Context.sleep_until`; leaves the handler by raising."""
        self._sleep(name, None, _aware(instant))

    def checkpoint(self) -> None:
        """Raise JobCancelled when the job is to stop."""
        _raise_if_cancelled(self._run)

    def _sleep(self, name: str, delay_s: float | None, instant: datetime | None) -> None:
        _raise_if_cancelled(self._run)
        try:
            wake_at = self._await(self._run.sleep(name, delay_s, instant))
        except _SleepOver:
            return
        raise Suspension(wake_at)

    def _await(self, operation: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(operation, self._loop).result()


def _aware(instant: datetime) -> datetime:
    if instant.tzinfo is None:
        raise ValueError("an instant needs a time zone: use datetime.now(UTC) and the like")
    return instant


def _raise_if_cancelled(run: Run) -> None:
    if run.cancelled:
        raise JobCancelled(f"job {run.info.id} is to stop")
