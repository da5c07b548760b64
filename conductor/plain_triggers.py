"""Why a task runs, other than for a change: invoked, on a schedule, on a custom event.

Each trigger is checked when it is made and reads its jobs' payloads (`conductor.contract`). Pure.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic

from pydantic_core import to_json
from typing_extensions import TypeVar, override

from conductor import filters
from conductor.arguments import check_type, declares
from conductor.cron import check
from conductor.definitions import (
    EventDefinition,
    TaskDefinition,
    Trigger,
    check_option_text,
    payload_invalid,
)
from conductor.errors import DefinitionInvalid, UnknownField
from conductor.events import Emitted, Invocation, Tick
from conductor.filter_types import Kinds, certain, check_operands, kinds_of
from conductor.matching import EventFilter

P = TypeVar("P")


class Invocable(Trigger[Invocation[Any]]):
    """The task can be invoked. A task declared without triggers is."""

    kind = "invoke"

    @property
    @override
    def name(self) -> str:
        """``invoke``."""
        return "invoke"

    @property
    @override
    def claims(self) -> frozenset[str]:
        """Invocations of the task."""
        return frozenset({"invoke"})

    @override
    def gives(self, task: TaskDefinition[Any, Any]) -> tuple[Any, ...]:
        """An invocation with the task's payload."""
        event: Any = Invocation
        return (event[task.payload.form],)

    @override
    def accepts(self, envelope: dict[str, Any]) -> bool:
        """Return True: the payload of an invocation is the application's own."""
        return True

    @override
    def decode(self, task: TaskDefinition[Any, Any], envelope: bytes) -> Invocation[Any]:
        """Read the payload (JSON text) as the task declares it."""
        return Invocation(task.decode_payload(envelope))


class Cron(Trigger[Tick]):
    """The task runs on a schedule: five fields, in the local time of an IANA zone.

    Raises CronInvalid for an expression that cannot be read or never fires, and for an unknown
    zone. ``name`` tells schedules of one task apart and stays when the expression changes.

        Cron("0 9 * * 1-5", tz="Europe/Berlin")
    """

    kind = "cron"

    @declares
    def __init__(self, expression: str, tz: str = "UTC", name: str | None = None) -> None:
        for what, text in (("cron expression", expression), ("time zone", tz)):
            check_type(what, text, (str,), 'Cron("0 9 * * *", tz="Europe/Berlin")')
        check_type("name of schedule", name, (str, type(None)), 'name="morning"')
        check(expression, tz)
        check_option_text("name of schedule", name)
        self.expression = " ".join(expression.split())
        self.timezone = tz
        self._name = name or f"{self.expression} {tz}"

    @property
    @override
    def name(self) -> str:
        """The schedule's name: given, or expression and zone."""
        return self._name

    @property
    @override
    def claims(self) -> frozenset[str]:
        """Firings of this schedule."""
        return frozenset({f"cron:{self._name}"})

    @override
    def gives(self, task: TaskDefinition[Any, Any]) -> tuple[Any, ...]:
        """A tick."""
        return (Tick,)

    @override
    def accepts(self, envelope: dict[str, Any]) -> bool:
        """Return whether the job is a firing of this schedule."""
        return bool(envelope.get("schedule") == self._name)

    @override
    def decode(self, task: TaskDefinition[Any, Any], envelope: dict[str, Any]) -> Tick:
        """Read ``{"schedule", "scheduled_at"}``."""
        try:
            return Tick(self._name, datetime.fromisoformat(envelope["scheduled_at"]))
        except (KeyError, TypeError, ValueError) as error:
            raise payload_invalid(f"firing of {self._name!r} of {task.name!r}", error) from error


class OnEvent(Trigger[Emitted[P]], Generic[P]):
    """The task runs for every emitted event of a definition.

    ``when`` keeps only those for which a CEL expression over ``event``, the payload, is true.
    Raises FilterInvalid, and UnknownField for one that the payload does not have.

        OnEvent(user_created, when='event.email.endsWith("@example.com")')
    """

    kind = "event"

    @declares
    def __init__(self, event: EventDefinition[P], *, when: str | None = None) -> None:
        if not isinstance(event, EventDefinition):
            raise DefinitionInvalid(
                f"OnEvent takes an event definition, not {event!r}",
                hint='Such as OnEvent(define_event("user.created", payload=UserCreated)).',
            )
        self.event = event
        if when is not None:
            _check_event_filter(event, filters.compile(when))
        self.filter = EventFilter(event.name, when)

    @property
    @override
    def name(self) -> str:
        """``event:`` and the event's name."""
        return f"event:{self.event.name}"

    @property
    @override
    def claims(self) -> frozenset[str]:
        """Emissions of the event."""
        return frozenset({self.name})

    @override
    def gives(self, task: TaskDefinition[Any, Any]) -> tuple[Any, ...]:
        """An emitted event with its payload."""
        event: Any = Emitted
        return (event[self.event.payload.form],)

    @override
    def accepts(self, envelope: dict[str, Any]) -> bool:
        """Return whether the job stands for this event."""
        return bool(envelope.get("event") == self.event.name)

    @override
    def decode(self, task: TaskDefinition[Any, Any], envelope: dict[str, Any]) -> Emitted[P]:
        """Read ``{"event", "payload"}``."""
        payload = self.event.decode_payload(to_json(envelope.get("payload")))
        return Emitted(self.event.name, payload)


def _check_event_filter(event: EventDefinition[Any], when: filters.Filter) -> None:
    filters.check_names(when, filters.EVENT_NAMES)
    known = event.payload.members()
    for field in sorted(when.references.columns["event"]):
        if known is not None and field not in known:
            raise UnknownField(
                field, known, where=f"of event {event.name!r} in filter {when.source!r}"
            )
    if event.payload.validates:
        check_operands(when, _kinds(event))


def _kinds(event: EventDefinition[Any]) -> dict[str, Kinds]:
    """Return what fields of a payload may be: as it is sent here, or from SQL, as it is read."""
    read, sent = (kinds_of(event.payload.schema(mode)) for mode in ("validation", "serialization"))
    both = {name: read[name] | sent[name] for name in read.keys() & sent.keys()}
    return certain(event.payload.form, both)
