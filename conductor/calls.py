"""What a context's calls mean: jobs to make, messages to wait for, and what comes of them.

Between the typed methods of `conductor.context` and the steps of `conductor.durable`, for
asynchronous and synchronous handlers alike. Does nothing by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypedDict
from weakref import WeakKeyDictionary

from orjson import loads
from pydantic_core import to_json

from conductor.arguments import check_type
from conductor.codec import Codec
from conductor.contract import DISPATCH_TASK, INTERNAL_QUEUE, event_envelope
from conductor.definitions import EventDefinition, Task, TaskDefinition
from conductor.enqueue import (
    check_option,
    check_ordered,
    check_priority,
    duration_s,
    metadata_text,
)
from conductor.errors import (
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    FilterFailed,
    OptionInvalid,
    UnknownColumn,
    UnknownField,
    UnknownName,
    WaitTimeout,
    WaitUnavailable,
    check_options,
)
from conductor.matching import event_topic, match_key
from conductor.store.schedules import SchedulePlan
from conductor.store.steps import NewJob, Wanted
from conductor.texts import flaw_of
from conductor.tracing import without_context
from conductor.triggers import Cron, OnChange, OnEvent

if TYPE_CHECKING:
    from conductor.job import JobInfo
    from conductor.store.steps import StoredStep

Match = Mapping[str, Any]
"""Fields of an event's payload, or columns of a row, and the values they must have (as JSON)."""

_SCHEDULE_NAME_LENGTH: Final = 150
_MEMBERS: Final[WeakKeyDictionary[Codec[Any], frozenset[str]]] = WeakKeyDictionary()
_NO_TASK: Final[TaskDefinition[Any, Any]] = TaskDefinition("wait", "wait", Codec(Any), Codec(None))


class ChildOptions(TypedDict, total=False):
    """Options of a child job: as those of `Conductor.invoke`."""

    delay: timedelta | float
    priority: int
    key: str | None
    metadata: dict[str, Any] | None


class ScheduleOptions(TypedDict, total=False):
    """Options of a schedule's jobs."""

    priority: int
    metadata: dict[str, Any] | None


def definition_of(task: TaskDefinition[Any, Any] | Task[Any, Any]) -> TaskDefinition[Any, Any]:
    """Return the definition of a task that is bound or not. Raises DefinitionInvalid."""
    check_type("the task", task, (TaskDefinition, Task), "ctx.invoke(name, send_email, …)")
    return task.definition if isinstance(task, Task) else task


def child(
    parent: JobInfo,
    task: TaskDefinition[Any, Any] | Task[Any, Any],
    payload: Any,
    options: ChildOptions,
) -> NewJob:
    """Return the job to be made of a task. It carries its parent's metadata unless given others.

    Raises PayloadInvalid and OptionInvalid.
    """
    check_options(options, ChildOptions.__annotations__)
    definition = definition_of(task)
    rank = _rank(task, options.get("priority"))
    delay, key = options.get("delay") or 0.0, options.get("key")
    check_option("key", key)
    if definition.ordered:
        check_ordered(definition.name, [key], delayed=bool(delay), priority=-rank)
    inherited = without_context(parent.metadata)
    metadata = options.get("metadata", inherited)
    return NewJob(
        queue=definition.queue,
        task=definition.name,
        payload=definition.encode_payload(payload),
        rank=rank,
        key=key,
        ordered=definition.ordered,
        metadata=None if metadata is None else metadata_text(metadata),
        after_s=duration_s("delay", delay),
    )


def child_result(task: TaskDefinition[Any, Any] | Task[Any, Any], step: StoredStep) -> Any:
    """Return the result of the job that a step awaited.

    Raises ChildFailed, ChildCancelled, ChildTimeout or ResultInvalid.
    """
    child = step.child or 0
    match step.outcome:
        case "completed":
            return definition_of(task).decode_result(step.result)
        case "failed":
            raise ChildFailed(child, loads(step.result or b"{}"))
        case "cancelled":
            reason = loads(step.result or b"{}").get("message", "no reason")
            raise ChildCancelled(f"job {child} of step {step.name!r} was cancelled: {reason}")
        case _:
            raise ChildTimeout(f"job {child} of step {step.name!r} has not ended in time")


def _rank(task: TaskDefinition[Any, Any] | Task[Any, Any], priority: int | None) -> int:
    bound = task.priority if isinstance(task, Task) else 0
    priority = bound if priority is None else priority
    check_priority(priority)
    return -priority


def plan(
    task: TaskDefinition[Any, Any] | Task[Any, Any],
    cron: Cron,
    payload: Any,
    options: ScheduleOptions,
) -> SchedulePlan:
    """Return what is stored of a schedule that is made at run time.

    Raises PayloadInvalid and OptionInvalid.
    """
    if not isinstance(cron, Cron):
        raise OptionInvalid(f"{cron!r} says not when", hint='Such as Cron("0 9 * * 1-5").')
    definition = definition_of(task)
    if definition.ordered:
        raise OptionInvalid(
            f"task {definition.name!r} is ordered by key, and a schedule has none",
            hint="Schedule another task, which invokes this one with a key.",
        )
    metadata = options.get("metadata")
    return SchedulePlan(
        queue=definition.queue,
        rank=_rank(task, options.get("priority")),
        expression=cron.expression,
        timezone=cron.timezone,
        payload=definition.encode_payload(payload),
        metadata=None if metadata is None else to_json(metadata),
    )


def check_schedule_name(name: Any) -> str:
    """Return the name if a schedule may have it. Raises OptionInvalid."""
    if not isinstance(name, str) or not 0 < len(name) <= _SCHEDULE_NAME_LENGTH or flaw_of(name):
        raise OptionInvalid(
            f"{name!r} cannot be the name of a schedule",
            hint=f"1 to {_SCHEDULE_NAME_LENGTH} characters.",
        )
    return name


def emission(parent: JobInfo, event: EventDefinition[Any], payload: Any) -> NewJob:
    """Return the dispatch job of an event. Raises PayloadInvalid, DefinitionInvalid."""
    check_type("the event", event, (EventDefinition,), "ctx.emit(name, user_created, …)")
    inherited = without_context(parent.metadata)
    return NewJob(
        queue=INTERNAL_QUEUE,
        task=DISPATCH_TASK,
        trigger="event",
        payload=event_envelope(event.name, event.encode_payload(payload)),
        metadata=None if inherited is None else to_json(inherited),
    )


@dataclass(frozen=True, slots=True)
class Expected:
    """An event or a change that a step waits for. ``kind`` is the step's."""

    kind: str
    source: EventDefinition[Any] | OnChange[Any]
    wanted: Wanted

    def read(self, step: StoredStep) -> Any:
        """Return what has come: an event's payload, or a change. Raises what the wait came to."""
        document = _message(step)
        if isinstance(self.source, EventDefinition):
            return self.source.decode_payload(document)
        return self.source.decode(_NO_TASK, loads(document))


def _message(step: StoredStep) -> bytes:
    """Return what a step has waited for.

    Raises WaitTimeout, FilterFailed for its filter, or WaitUnavailable.
    """
    match step.outcome:
        case "completed":
            return step.result or b"null"
        case "failed":
            error = loads(step.result or b"{}")
            raise FilterFailed(f"wait {step.name!r}: {error.get('message', 'no reason')}")
        case "unavailable":
            raise WaitUnavailable(
                f"wait {step.name!r}: its table is in another database than the queue"
            )
        case _:
            raise WaitTimeout(f"what {step.name!r} waits for has not come in time")


def expected_event(event: EventDefinition[Any], match: Match | None, when: str | None) -> Expected:
    """Return what a wait for an event stores. Raises FilterInvalid, UnknownField, OptionInvalid."""
    trigger = OnEvent(event, when=when)
    _check_names(match, _members(event.payload), UnknownField, f"of event {event.name!r}")
    fields, matched = _match_key(match)
    condition = None if when is None else to_json({"when": trigger.filter.when})
    wanted = Wanted(
        topic=event_topic(event.name), fields=fields, matched=matched, condition=condition
    )
    return Expected("event", event, wanted)


def expected_change(change: OnChange[Any], match: Match | None) -> Expected:
    """Return what a wait for a change stores. Raises UnknownColumn, OptionInvalid."""
    check_type("the change", change, (OnChange,), 'OnChange(Payments, "insert")')
    captured = change.filter.columns
    _check_names(match, captured, UnknownColumn, f"among what is captured of {change.table}")
    fields, matched = _match_key({name: _as_sent(value) for name, value in (match or {}).items()})
    wanted = Wanted(topic=change.topic, fields=fields, matched=matched, source=change.source)
    return Expected("change", change, wanted)


def _check_names(
    match: Match | None, known: Collection[str] | None, error: type[UnknownName], where: str
) -> None:
    """Raise for a name that nothing which comes will ever have; known: None when that is open."""
    if known is not None:
        for name in sorted(set(match or ()).difference(known)):
            raise error(name, known, where=where)


def _members(payload: Codec[Any]) -> frozenset[str] | None:
    """Return the fields of a payload; its schema takes longer than all else of a wait."""
    known = _MEMBERS.get(payload)
    if known is None:
        known = payload.members()
        if known is not None:
            _MEMBERS[payload] = known
    return known


def _as_sent(value: Any) -> Any:
    """Return an instant as the router sends it: in UTC, with the digits that PostgreSQL shows.

    >>> _as_sent(datetime(2026, 3, 1, 12, 0, 0, 500_000, tzinfo=UTC))
    '2026-03-01T12:00:00.5+00:00'
    """
    if not isinstance(value, datetime):
        return value
    instant = value if value.tzinfo is None else value.astimezone(UTC)
    if not instant.microsecond:
        return instant.isoformat()
    whole, _, offset = instant.isoformat().partition(".")
    return f"{whole}.{offset[:6].rstrip('0')}{offset[6:]}"


def _match_key(match: Match | None) -> tuple[str, str]:
    if match is None:
        return "", ""
    try:
        values: dict[str, Any] = loads(to_json(dict(match)))
    except ValueError as error:
        raise OptionInvalid(f"match holds what is not JSON: {error}") from error
    return match_key(values)
