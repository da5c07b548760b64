"""Events emitted through the WAL → job specs, and what jobs wait for.

`conductor.emit_wal` writes a transactional logical message of our prefix. Its content is two lines
of UTF-8 JSON: a header (the secret of the owning slot, the emitter's transaction, metadata), then
the envelope, which becomes the payload of every subscriber's job as it stands. Whatever else has
the prefix, and whatever cannot be read, is a dead letter. Pure: `conductor.matching` and the
filters decide who wants an event, here as in the dispatcher.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cdc.errors import EmissionInvalid
from cdc.lsn import Lsn
from cdc.routing import DeadLetter, Routed
from cdc.wire.messages import LogicalMessage
from conductor.contract import JobSpec, encode_position
from conductor.filters import FilterFailed
from conductor.matching import EventFilter, EventIndex, Subscription, event_topic

PREFIX: Final = "conductor.emit"

_PREFIX: Final = PREFIX.encode() + b"\0"
_PREFIX_START: Final = 10  # in a LogicalMessage: after tag, flags and LSN


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the stream a message stands."""

    commit_lsn: int
    ordinal: int
    commit_time_us: int
    metadata: bytes | None = None
    """What jobs of this transaction carry, unless the event brings its own (JSON text)."""

    def __str__(self) -> str:
        return f"commit {Lsn(self.commit_lsn)}, ordinal {self.ordinal}"


@dataclass(slots=True)
class Emission(JobSpec):
    """An emitted event, for those who wait for it: like a job's specification, but it becomes none.

    `emitted_by` is the transaction that emitted it; None when its cluster is not the queue's.
    """

    value: Any = None  # the event's payload
    emitted_by: str | None = None

    def job_of(self, subscription: Subscription) -> JobSpec:
        """Return the job of a subscriber."""
        return JobSpec(subscription.head, self.position, self.ordinal, self.payload)


class EventRouter:
    """Routes the events that are emitted through the WAL of one database.

    Args:
        generation: of the slot.
        secret: what a message must carry to be ours; None: this slot routes no events.
        is_local: the source is in the queue's own cluster, so that transactions can be compared.
        subscriptions: those that route now; others than of events are left out.
    """

    def __init__(
        self,
        generation: int,
        secret: str | None,
        subscriptions: Iterable[Subscription],
        *,
        is_local: bool,
    ) -> None:
        self._generation = generation
        self._secret = secret
        self._is_local = is_local
        self._index = EventIndex(list(subscriptions))
        self.counts = 0, 0
        """How many events a subscription was about, and how many nobody's."""

    @property
    def are_ours(self) -> bool:
        """Whether this slot routes them; else another slot of the database does."""
        return self._secret is not None

    def take_counts(self) -> tuple[int, int]:
        """Return the counts, and begin again."""
        counts, self.counts = self.counts, (0, 0)
        return counts

    def activate(self, subscriptions: Iterable[Subscription]) -> None:
        """Let these subscriptions, and no others, route from here on."""
        self._index = EventIndex(list(subscriptions))

    def route(self, message: LogicalMessage, place: Place, raw: bytes, out: Routed) -> None:
        """Append the jobs of one message of our prefix to `out`, or the dead letter it becomes.

        `raw` is the message as it came.
        """
        if self._secret is None:
            return
        try:
            event, emission = _read(message, place, self._generation, self._secret)
        except EmissionInvalid as error:
            reason = f"{place}: an emitted event cannot be routed: {error}"
            out.dead_letters.append(_dead_letter(place, None, reason, raw))
            return
        if not self._is_local:
            emission.emitted_by = None
        found = self._index.match(event)
        _route(emission, found, place, raw, out)
        matched, unmatched = self.counts
        self.counts = matched + bool(found), unmatched + (not found)
        out.waits.append((event_topic(event), emission))


def is_emission(payload: bytes) -> bool:
    """Tell whether a message of pgoutput, as bytes, is one of our prefix."""
    return payload[:1] == b"M" and payload.startswith(_PREFIX, _PREFIX_START)


def route_event_again(
    generation: int,
    message: LogicalMessage,
    place: Place,
    subscriptions: Iterable[Subscription],
    raw: bytes,
    out: Routed,
) -> None:
    """Route an event that was set aside, for these subscriptions; who wrote it was checked then.

    Raises EmissionInvalid for what cannot be read.
    """
    _, emission = _read(message, place, generation, secret=None)
    _route(emission, subscriptions, place, raw, out)


def _read(
    message: LogicalMessage, place: Place, generation: int, secret: str | None
) -> tuple[str, Emission]:
    """Return the event's name and what is known of it; with a secret, only if it carries that."""
    first, _, envelope = message.content.partition(b"\n")
    try:
        header, body = orjson.loads(first), orjson.loads(envelope)
        found, event, value = header["secret"], body["event"], body["payload"]
        metadata, emitted_by = header["metadata"], header["xid"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise EmissionInvalid(f"{type(error).__name__}: {error}") from None
    if secret is not None and found != secret:
        raise EmissionInvalid("it was not written by conductor.emit_wal")
    if not isinstance(event, str) or not isinstance(metadata, str | None):
        raise EmissionInvalid("it has no name, or other metadata than text")
    carried = place.metadata if metadata is None else metadata.encode()
    emission = Emission(
        head=b"",
        position=encode_position(generation, place.commit_lsn, carried),
        ordinal=place.ordinal,
        payload=envelope,
        value=value,
        emitted_by=str(emitted_by),
    )
    return event, emission


def _route(
    emission: Emission,
    subscriptions: Iterable[Subscription],
    place: Place,
    raw: bytes,
    out: Routed,
) -> None:
    """Append one job a subscription that wants the event; a filter that fails, a dead letter."""
    for subscription in subscriptions:
        wanted = subscription.filter
        try:
            is_wanted = not isinstance(wanted, EventFilter) or wanted.admits(emission.value)
        except FilterFailed as error:
            reason = f"{type(error).__name__}: {error}"
            out.dead_letters.append(_dead_letter(place, subscription.id, reason, raw))
            continue
        if is_wanted:
            out.specs.append(emission.job_of(subscription))


def _dead_letter(place: Place, subscription: int | None, error: str, raw: bytes) -> DeadLetter:
    return DeadLetter(
        commit_lsn=place.commit_lsn,
        ordinal=place.ordinal,
        subscription=subscription,
        relation=None,
        error=error,
        raw=raw,
        commit_time_us=place.commit_time_us,
    )
