"""Subscriptions, and which of them an event or a table concerns.

Shared by the router (changes and events read from the WAL) and the dispatcher (events emitted
through the queue), so that both paths match alike. Pure: rows and payloads in, decisions out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2s
from typing import Any, Final, Literal

from orjson import OPT_SORT_KEYS, JSONEncodeError, dumps, loads

from conductor.contract import encode_head
from conductor.filters import FilterFailed, compile_stored

Operation = Literal["insert", "update", "delete", "truncate"]
Group = Literal["transaction"]
_EXACT: Final = 2.0**53  # below it a float is every integer
OPERATIONS: Final[tuple[Operation, ...]] = ("insert", "update", "delete", "truncate")
_IDENTITY_FREE: Final[frozenset[Operation]] = frozenset({"insert", "truncate"})


@dataclass(frozen=True, slots=True)
class ChangeFilter:
    """Which changes of one table a subscription wants, and which columns of them."""

    schema: str
    table: str
    operations: frozenset[Operation]
    columns: tuple[str, ...] | None = None  # None: every column
    changed: tuple[str, ...] | None = None  # updates only when one of these differs
    when: str | None = None  # CEL
    waits: bool = False  # for jobs that wait: a change makes no job, it wakes those
    group: Group | None = None  # transaction: all changes of one together make a job
    key: tuple[str, ...] = ()  # the columns that are the key of its jobs; (): those of the row's
    ordered: bool = False  # its jobs stand in the lanes of their keys
    coalesce_s: float | None = None  # how long a job waits for later changes of its key

    @property
    def is_insert_only(self) -> bool:
        """Whether it wants inserts and truncates alone: they need no replica identity."""
        return self.operations <= _IDENTITY_FREE

    @property
    def coalesce_us(self) -> int:
        """``coalesce_s`` in microseconds; 0: its changes do not coalesce."""
        return round((self.coalesce_s or 0) * 1_000_000)

    def to_json(self) -> dict[str, Any]:
        """Return the stored definition; `ChangeFilter.from_json` reads it back."""
        rest: dict[str, Any] = {"waits": True} if self.waits else {}
        rest |= {} if self.group is None else {"group": self.group}
        rest |= {"key": list(self.key)} if self.key else {}
        rest |= {"ordered": True} if self.ordered else {}
        rest |= {"coalesce_s": self.coalesce_s} if self.coalesce_s else {}
        return rest | {
            "schema": self.schema,
            "table": self.table,
            "operations": sorted(self.operations),
            "columns": None if self.columns is None else list(self.columns),
            "changed": None if self.changed is None else list(self.changed),
            "when": self.when,
        }

    @classmethod
    def from_json(cls, definition: dict[str, Any]) -> ChangeFilter:
        """Read a stored definition."""
        columns, changed = definition.get("columns"), definition.get("changed")
        return cls(
            schema=definition["schema"],
            table=definition["table"],
            operations=frozenset(definition["operations"]),
            columns=None if columns is None else tuple(columns),
            changed=None if changed is None else tuple(changed),
            when=definition.get("when"),
            waits=definition.get("waits", False),
            group=definition.get("group"),
            key=tuple(definition.get("key", ())),
            ordered=definition.get("ordered", False),
            coalesce_s=definition.get("coalesce_s"),
        )


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which emitted events a subscription wants."""

    event: str
    when: str | None = None  # CEL

    def admits(self, payload: Any) -> bool:
        """Return whether an event with this payload is wanted. Raises FilterFailed."""
        return self.when is None or compile_stored(self.when).matches({"event": payload})

    def to_json(self) -> dict[str, Any]:
        """Return the stored definition; `EventFilter.from_json` reads it back."""
        return {"event": self.event, "when": self.when}

    @classmethod
    def from_json(cls, definition: dict[str, Any]) -> EventFilter:
        """Read a stored definition. Raises TypeError for one that somebody else wrote."""
        event = definition["event"]
        if not isinstance(event, str):
            raise TypeError(f"the name of an event is text, not {event!r}")
        return cls(event=event, when=definition.get("when"))


@dataclass(frozen=True, slots=True)
class Subscription:
    """A stored (task, trigger) pair. ``head`` is its part of every job, encoded for COPY."""

    id: int
    app: str
    task: str
    trigger: str
    queue: str
    version: str | None
    rank: int
    source: str
    filter: ChangeFilter | EventFilter
    head: bytes

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Subscription:
        """Read a row of ``conductor.subscriptions`` (definition already decoded)."""
        kind, definition = row["kind"], row["definition"]
        return cls(
            id=row["id"],
            app=row["app"],
            task=row["task"],
            trigger=row["trigger"],
            queue=row["queue"],
            version=row["version"],
            rank=row["rank"],
            source=row["source"],
            filter=ChangeFilter.from_json(definition)
            if kind == "change"
            else EventFilter.from_json(definition),
            head=encode_head(
                queue=row["queue"],
                task=row["task"],
                app=row["app"],
                version=row["version"],
                trigger=kind,
                rank=row["rank"],
                subscription=row["id"],
            ),
        )


def event_topic(event: str) -> str:
    """Return the topic that steps wait for when they wait for an event."""
    return f"event:{event}"


def change_topic(wanted: ChangeFilter, source: str = "default") -> str:
    """Return the topic that steps wait for when they wait for changes like these of a source."""
    definition = {**wanted.to_json(), "waits": True}
    digest = blake2s(_json(definition).encode(), digest_size=8).hexdigest()
    where = "" if source == "default" else f"{source}:"
    return f"change:{where}{wanted.schema}.{wanted.table}:{digest}"


def match_key(match: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the fields (sorted, as JSON) that a message must have, and their values (as JSON).

    >>> match_key({"order": 5, "city": "Bonn"})
    ('["city","order"]', '["Bonn",5]')
    """
    if not match:
        return "", ""
    names = sorted(match)
    return _json(names), _json([_canonical(match[name]) for name in names])


def matched_values(fields: str, message: Any) -> str | None:
    """Return a message's values of these fields as `match_key` does; None when it lacks one.

    >>> matched_values('["order"]', {"order": 5, "city": "Bonn"})
    '[5]'
    """
    if not fields:
        return ""
    names: list[str] = loads(fields)
    if not isinstance(message, dict) or not message.keys() >= set(names):
        return None
    try:
        return _json([_canonical(message[name]) for name in names])
    except JSONEncodeError:  # nobody can wait for what is nested too deep to be written
        return None


def end_wait(condition: str | None, payload: Any, envelope: str) -> tuple[str, str] | None:
    """Return how a wait ends with an event, outcome and result; None: it goes on.

    ``condition`` is what the wait has stored (JSON). The result is the event's envelope, as text:
    written again, numbers might be others. Of a wait that fails it says why.
    """
    when = loads(condition).get("when") if condition else None
    try:
        if when and not compile_stored(when).matches({"event": payload}):
            return None
    except FilterFailed as error:
        return "failed", dumps({"type": "FilterFailed", "message": str(error)}).decode()
    try:
        dumps(payload)
    except JSONEncodeError as error:  # it reads what is nested deeper than it writes
        return "failed", dumps({"type": "EventUnreadable", "message": str(error)}).decode()
    return "completed", envelope


def _canonical(value: Any) -> Any:
    """Return a number as others write it: a float of PostgreSQL's has no ``.0``."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    return int(value) if whole else value


def _json(value: Any) -> str:
    return dumps(value, option=OPT_SORT_KEYS).decode()


class EventIndex:
    """Event subscriptions by event name. Built once per set of subscriptions, then only read."""

    __slots__ = ("_by_event",)

    def __init__(self, subscriptions: list[Subscription]) -> None:
        self._by_event: dict[str, list[Subscription]] = {}
        for subscription in sorted(subscriptions, key=lambda s: s.id):
            if isinstance(subscription.filter, EventFilter):
                self._by_event.setdefault(subscription.filter.event, []).append(subscription)

    def match(self, event: str) -> list[Subscription]:
        """Return the subscriptions of an event, in the order of their ids."""
        return self._by_event.get(event, [])
