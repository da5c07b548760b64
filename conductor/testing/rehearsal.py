"""Running one handler with no database.

The real context runs on steps kept in memory. What other tasks would return, what events and
changes would bring, is given beforehand; sleeps and deadlines pass at once. At every suspension
the handler runs again from the top, as it would: one whose replay goes another way fails here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from inspect import isawaitable
from typing import Any, Final, overload

from orjson import dumps, loads
from typing_extensions import TypeVar

from conductor.arguments import check_type
from conductor.batch_context import BatchContext
from conductor.codec import INVALID, Codec, explain
from conductor.context import Context
from conductor.definitions import EventDefinition, Task, TaskDefinition
from conductor.durable import Run, Services, is_over
from conductor.errors import AnswerInvalid, FilterFailed, StillWaiting, Unanswered
from conductor.events import Change
from conductor.failures import describe
from conductor.filters import compile_stored
from conductor.job import JobHandle, JobInfo
from conductor.matching import event_topic, matched_values
from conductor.replay import failed
from conductor.store.steps import Call, NewJob, ScheduleCall, StepWrite, StoredStep, Wanted, Write
from conductor.sync_context import SyncContext
from conductor.testing.changes import EPOCH, envelope
from conductor.triggers import OnChange
from conductor.worker.execution import call_blocking

P = TypeVar("P")
R = TypeVar("R")

_ANY: Final[Codec[Any]] = Codec(Any)


class Rehearsal:
    """Runs the handler of one job with no database; see the package.

    Run again, it goes on from the steps that are stored, as the next attempt of that job would.
    ``deps`` is what handlers find in ``ctx.deps``, ``connection`` what the function of a
    ``ctx.transaction`` gets.
    """

    def __init__(self, deps: Any = None, connection: Any = None) -> None:
        self.deps, self.connection = deps, connection
        self.steps: dict[str, StoredStep] = {}
        """What the handler has stored, by name."""
        self.runs = 0
        self.now = EPOCH
        self._answers: dict[str, tuple[TaskDefinition[Any, Any], Any]] = {}
        self._messages: list[_Message] = []
        self._wanted: dict[str, Wanted] = {}
        self._made: list[tuple[str, NewJob]] = []
        self._cancelled: list[int] = []
        self._schedules: dict[tuple[str, str], bytes] = {}
        self._fault: Exception | None = None

    # --- before the run ----------------------------------------------------------------------

    @overload
    def answer(
        self, task: TaskDefinition[P, R] | Task[P, R], result: Callable[[P], R | Awaitable[R]]
    ) -> None: ...
    @overload
    def answer(
        self, task: TaskDefinition[P, R] | Task[P, R], result: R | BaseException
    ) -> None: ...
    def answer(self, task: TaskDefinition[Any, Any] | Task[Any, Any], result: Any) -> None:
        """Say what a task returns when it is invoked: a result, an error, a function of payloads.

        An error is what the child fails with: the handler sees ChildFailed.
        """
        definition = task.definition if isinstance(task, Task) else task
        self._answers[definition.name] = (definition, result)

    @overload
    def bring(self, source: EventDefinition[P], message: P) -> None: ...
    @overload
    def bring(self, source: OnChange[Any], message: Change[Any]) -> None: ...
    def bring(self, source: EventDefinition[Any] | OnChange[Any], message: Any) -> None:
        """Bring an event or a change, to all steps that wait for it when it comes.

        It comes when the handler next waits or sleeps, after those that were brought before it, and
        is kept for as long as nobody waits for it. Filters decide as they would.
        """
        if isinstance(source, EventDefinition):
            document = source.encode_payload(message)
            event = loads(document)
            arrived = _Message(event_topic(source.name), event, {"event": event}, document)
        else:
            check_type("what is brought", message, (Change,), "inserted(Users(id=7))")
            arrived = _changed(source, envelope(message))
        self._messages.append(arrived)

    def given(self, name: str, result: Any, *, kind: str = "step") -> None:
        """Let a step (``kind`` "transaction": of that kind) be done already, with this result.

        An error is what it has failed with, and raises again.
        """
        if isinstance(result, Exception):
            kind, document = failed(kind), describe(result)
        else:
            document = _ANY.encode(result)
        self.steps[name] = StoredStep(name, None, kind, document, None, due=False)

    # --- the run -----------------------------------------------------------------------------

    async def run(self, task: Task[Any, R], event: Any, *, attempt: int = 0, **job: Any) -> R:
        """Run the handler with an event until it returns; return its result, or raise its error.

        ``event`` is what the handler gets: ``Invocation(payload)``, ``inserted(row)``, …; ``job``
        are fields of `JobInfo`. The handler of a batch gets a sequence of events. The result passes
        the task's declared type. Raises StillWaiting, and Unanswered and AnswerInvalid even when
        the handler catches them.
        """
        check_type("what is rehearsed", task, (Task,), "what @conductor.task has returned")
        if task.batch is not None:
            self.runs += 1
            jobs = [
                _job(task, attempt, self.runs, {"id": n, **job}) for n in range(1, len(event) + 1)
            ]
            value = await _perform_batch(task, event, BatchContext(jobs, self.deps))
        else:
            value = await self._perform(task, event, attempt, job)
        result: R = task.definition.decode_result(task.encode_result(value))
        return result

    async def _perform(
        self, task: Task[Any, Any], event: Any, attempt: int, job: dict[str, Any]
    ) -> Any:
        """Run the handler again and again until it ends; return what it returns."""
        services = Services(_Log(self), _Transactions(self.connection), _Port())
        while True:
            self.runs += 1
            run = _Run(_job(task, attempt, self.runs, job), services)
            run.awaitable = task.awaitable
            try:
                return await run.perform(task, event, self.deps)
            except _Suspended as suspended:
                self._pass(suspended)
            finally:
                if self._fault is not None:  # the test's: not for the handler to get over
                    fault, self._fault = self._fault, None
                    raise fault from fault.__cause__

    def _pass(self, suspended: _Suspended) -> None:
        """Let something come, or time pass until the first of what the handler waits for."""
        if self._deliver():
            return
        if suspended.wake_at is None:
            waiting = [step.name for step in self.steps.values() if not is_over(step)]
            raise StillWaiting(f"the handler waits for {', '.join(map(repr, waiting))}")
        self.now = max(self.now, suspended.wake_at)
        for step in self.steps.values():
            step.due = step.wake_at is not None and step.wake_at <= self.now

    def _deliver(self) -> bool:
        """Let the first message come that a step waits for; return whether there is one."""
        for message in self._messages:
            found = [
                (step, how) for step in self.steps.values() if (how := self._meet(step, message))
            ]
            if found:
                for step, how in found:
                    step.outcome, step.result = how
                self._messages.remove(message)
                return True
        return False

    def _meet(self, step: StoredStep, message: _Message) -> tuple[str, bytes] | None:
        """Return what a message makes of a step; None: nothing."""
        wanted = self._wanted.get(step.name)
        if wanted is None or step.outcome is not None or wanted.topic != message.topic:
            return None
        if matched_values(wanted.fields, message.row) != wanted.matched:
            return None
        condition = loads(wanted.condition) if wanted.condition else {}
        when = [condition.get("when"), message.when]
        try:
            fits = all(compile_stored(each).matches(message.values) for each in when if each)
        except FilterFailed as error:
            return "failed", dumps({"type": "FilterFailed", "message": str(error)})
        return ("completed", message.document) if fits else None

    # --- after the run -----------------------------------------------------------------------

    def invoked(self, task: TaskDefinition[P, Any] | Task[P, Any]) -> list[P]:
        """Return the payloads that a task was invoked or started with, in order."""
        definition = task.definition if isinstance(task, Task) else task
        return [
            definition.decode_payload(made.payload)
            for _, made in self._made
            if made.task == definition.name
        ]

    def emitted(self, event: EventDefinition[P]) -> list[P]:
        """Return the payloads that an event was emitted with, in order."""
        found = (loads(made.payload) for kind, made in self._made if kind == "emit")
        return [
            event.decode_payload(dumps(message["payload"]))
            for message in found
            if message["event"] == event.name
        ]

    def scheduled(self, task: TaskDefinition[P, Any] | Task[P, Any]) -> dict[str, P]:
        """Return the schedules that a task has got: the payload of its jobs, by name."""
        definition = task.definition if isinstance(task, Task) else task
        return {
            name: definition.decode_payload(payload)
            for (owner, name), payload in self._schedules.items()
            if owner == definition.name
        }

    @property
    def cancelled(self) -> list[int]:
        """The ids of the jobs whose end the handler asked for."""
        return list(self._cancelled)

    # --- what the steps do -------------------------------------------------------------------

    async def write(self, write: Write) -> StoredStep:
        """Keep a step, and do what it asks for."""
        step = self.steps.get(write.name)
        if step is None:
            step = self.steps[write.name] = self._new(write)
            if isinstance(write, Call):
                await self._call(write, step)
            elif isinstance(write, ScheduleCall):
                self._schedule(write, step)
        elif isinstance(write, Call) and step.outcome is None:
            step.outcome = write.outcome
        if isinstance(write, Call) and write.cancels is not None:
            self._cancelled.append(write.cancels)
        return step

    def _schedule(self, call: ScheduleCall, step: StoredStep) -> None:
        step.outcome = "completed"
        if call.plan is not None:
            self._schedules[call.task, call.schedule] = call.plan.payload
        else:
            self._schedules.pop((call.task, call.schedule), None)

    def _new(self, write: Write) -> StoredStep:
        if isinstance(write, ScheduleCall):
            return StoredStep(write.name, write.position, write.kind, None, None, due=False)
        wake_at = write.wake_at
        if write.delay_s is not None:
            wake_at = self.now + timedelta(seconds=write.delay_s)
        due = wake_at is not None and wake_at <= self.now
        return StoredStep(write.name, write.position, write.kind, write.result, wake_at, due)

    async def _call(self, call: Call, step: StoredStep) -> None:
        step.outcome = call.outcome
        if call.makes is not None:
            self._made.append((call.kind, call.makes))
            step.child = len(self._made)
            if call.kind == "invoke":
                await self._answer(call.makes, step)
        if call.wants is not None:
            self._wanted[call.name] = call.wants

    async def _answer(self, made: NewJob, step: StoredStep) -> None:
        if made.task not in self._answers:
            self._fault = Unanswered(f"task {made.task!r} is invoked")
            raise self._fault
        definition, result = self._answers[made.task]
        try:
            value = await _answered(result, definition.decode_payload(made.payload))
        except Exception as error:  # noqa: BLE001 - it is the child's
            description = {"type": type(error).__name__, "message": str(error)}
            step.outcome, step.result = "failed", dumps(description)
        else:
            step.outcome, step.result = "completed", self._encoded(definition, value)

    def _encoded(self, definition: TaskDefinition[Any, Any], value: Any) -> bytes:
        """Return a child's result as JSON text. Raises AnswerInvalid."""
        try:
            return definition.returns.encode_stored(value)
        except INVALID as error:
            why, _ = explain(error)
            self._fault = AnswerInvalid(f"the answer of task {definition.name!r}: {why}")
            raise self._fault from error


@dataclass(frozen=True, slots=True)
class _Message:
    """An event or a change that was brought. ``values``: what a filter sees; ``when``: its own."""

    topic: str
    row: Any
    values: dict[str, Any]
    document: bytes
    when: str | None = None


def _changed(source: OnChange[Any], document: bytes) -> _Message:
    """Return a change that was brought to who waits for those of a trigger."""
    change, wanted = loads(document), source.filter
    op, changed = change["op"], change.get("changed")
    row = change.get("new") or change.get("old")
    values = {"new": None, "old": None, "changed": [], **change}
    fits = op in wanted.operations and not (
        op == "update"
        and wanted.changed
        and changed is not None
        and not set(changed) & set(wanted.changed)
    )
    return _Message(source.topic if fits else "", row, values, document, wanted.when)


async def _answered(result: Any, payload: Any) -> Any:
    """Return what a child returns, or raise what it fails with."""
    if isinstance(result, BaseException):
        raise result
    if callable(result):
        result = result(payload)
    return await result if isawaitable(result) else result


class _Suspended(Exception):  # noqa: N818 - not an error
    """The run has ended in a durable wait."""

    def __init__(self, wake_at: datetime | None) -> None:
        super().__init__()
        self.wake_at = wake_at


class _Run(Run):
    """A run of a rehearsal."""

    __slots__ = ("_suspended", "_task")

    async def perform(self, task: Task[Any, Any], event: Any, deps: Any) -> Any:
        """Run the handler. Raises _Suspended."""
        self._suspended: _Suspended | None = None
        if task.is_sync:
            context = SyncContext(self, deps, asyncio.get_running_loop())
            try:
                return await asyncio.to_thread(call_blocking, task.handler, event, context)
            finally:
                if context.suspension is not None:
                    raise _Suspended(context.suspension.step.wake_at) from None
        self._task = asyncio.ensure_future(task.handler(event, Context(self, deps)))
        self.path = self._task
        try:
            return await self._task
        finally:
            self.end()
            if self._suspended is not None:  # whatever the handler has made of it
                raise self._suspended from None

    def abandon(self) -> None:
        """End the run here, though nobody else can have taken its job."""
        self.cancelled = self.leaving = True
        self._task.cancel()

    def suspend(self, wake_at: datetime | None, *, waits: bool) -> None:  # noqa: ARG002 - time tells
        """End the run here."""
        self._suspended = _Suspended(wake_at)
        self.cancelled = self.leaving = True
        self._task.cancel()
        self.let_go()


async def _perform_batch(task: Task[Any, Any], events: Any, context: BatchContext[Any]) -> Any:
    if task.is_sync:
        return await asyncio.to_thread(call_blocking, task.handler, events, context)
    return await task.handler(events, context)


class _Log:
    """The steps of a rehearsal, as a run asks for them."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal

    async def load(self, job: int) -> list[StoredStep]:  # noqa: ARG002 - there is one
        return list(self._rehearsal.steps.values())

    async def load_settled(self, job: int) -> list[StoredStep]:
        return await self.load(job)

    async def write(self, step: Write) -> StoredStep:
        return await self._rehearsal.write(step)


class _Transactions:
    """Transactions on whatever connection the test gives."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def run(self, step: StepWrite, work: Callable[[Any], Awaitable[bytes]]) -> bytes:
        step.result = await work(self._connection)
        return step.result

    def run_blocking(self, step: StepWrite, work: Callable[[Any], bytes]) -> bytes:
        step.result = work(self._connection)
        return step.result


class _Port:
    """Started jobs of a rehearsal never run."""

    async def job_result(self, handle: JobHandle[Any], timeout_s: float | None) -> Any:  # noqa: ARG002
        raise StillWaiting(
            f"a job of task {handle.task!r} that was started is never run",
            hint="Use ctx.invoke for what the handler waits for: it can be answered.",
        )

    async def cancel(self, job: int, reason: str | None = None) -> bool:  # noqa: ARG002
        return True

    async def refetch(self, change: Any) -> None:
        """Leave a change as the test gave it."""

    async def source_position(self, source: str) -> str | None:  # noqa: ARG002
        return None


def _job(task: Task[Any, Any], attempt: int, fence: int, fields: dict[str, Any]) -> JobInfo:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    values: dict[str, Any] = {
        "id": 1,
        "trigger": "invoke",
        "crashes": 0,
        "priority": task.priority,
        "key": None,
        "run_at": at,
        "created_at": at,
        "metadata": None,
        "app": None,
        "version": task.version,
        "idempotency_key": "job:1",
        **fields,
    }
    return JobInfo(task=task.name, queue=task.queue, attempt=attempt, fence=fence + 1, **values)
