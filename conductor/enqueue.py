"""Putting jobs into the queue on a given connection: the one way in, for clients and for workers.

Works in whatever transaction the connection is in, commits nothing, sends no NOTIFY. A batch is one
statement. Errors of the database are passed on as psycopg raises them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, get_args

import psycopg
from pydantic_core import to_json

from conductor import texts
from conductor.contract import DISPATCH_TASK, INTERNAL_QUEUE, LANE_KEY_LENGTH, event_envelope
from conductor.errors import EmitRefused, OptionInvalid
from conductor.sql import load
from conductor.tracing import sending

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from psycopg import AsyncConnection, Connection

    from conductor.job import TriggerKind
    from conductor.tracing import Sending

_QUERIES: Final = load("enqueue")
_ENQUEUE: Final = _QUERIES["enqueue_jobs"]
_ENQUEUE_ONCE: Final = _QUERIES["enqueue_jobs_once"]
_ENQUEUE_ORDERED: Final = _QUERIES["enqueue_ordered_jobs"]
_RESERVE: Final = _QUERIES["reserve_jobs"]
_COPY: Final = _QUERIES["copy_jobs"]
_EMIT: Final = _QUERIES["emit_events"]
_COPY_ORDERED: Final = _QUERIES["copy_ordered_jobs"]
_CALL_LANES: Final = _QUERIES["call_lanes"]
_CANCEL: Final = _QUERIES["cancel_job"]
_FETCH_OUTCOMES: Final = _QUERIES["fetch_outcomes"]
_HINT: Final = _QUERIES["hint_queue"]

DEDUPE_FOR: Final = timedelta(days=1)

Via: TypeAlias = Literal["queue", "wal", "auto"]
"""How an event travels: as a job of the queue database, or as a message in the WAL of a source."""

_NO_WAY: Final = (
    psycopg.errors.ObjectNotInPrerequisiteState,  # conductor.emit says why
    psycopg.errors.InvalidSchemaName,  # no schema conductor: neither queue nor source
    psycopg.errors.UndefinedFunction,
)
_COPY_FROM: Final = 500  # payloads from which two round trips are worth it
_COPY_CHUNK: Final = 1000  # rows
_COPY_ESCAPES: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_PRIORITIES: Final = range(-32767, 32768)  # rank is a smallint
_LONGEST: Final = timedelta(days=365_000)  # a thousand years: the server's clock ends later
LAST_INSTANT: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The last time at which a job can run: Python's time ends a day later, in some zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobBatch:
    """Jobs of one task that share everything but payload and keys. Raises OptionInvalid.

    ``payloads`` are JSON text. ``run_at`` (aware) and ``delay`` count from the database's now; the
    later one holds. ``keys`` and ``dedupe_keys`` have one entry a payload. ``ordered``: jobs of a
    key run one at a time; each has one.
    """

    queue: str
    task: str
    payloads: Sequence[bytes]
    trigger: TriggerKind = "invoke"
    run_at: datetime | None = None
    delay: timedelta | None = None
    priority: int = 0
    keys: Sequence[str | None] | None = None
    dedupe_keys: Sequence[str] | None = None
    dedupe_for: timedelta = DEDUPE_FOR
    ordered: bool = False
    metadata: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse options that cannot be meant."""
        _check_kind("run_at", self.run_at, datetime, "run_at=datetime.now(UTC) + timedelta(days=1)")
        _check_kind("delay", self.delay, timedelta, "delay=5 or delay=timedelta(minutes=1)")
        _check_kind("dedupe_for", self.dedupe_for, timedelta, "dedupe_for=timedelta(hours=1)")
        _check_kind("metadata", self.metadata, dict, 'metadata={"order": 42}')
        if self.run_at is not None and self.run_at.tzinfo is None:
            raise OptionInvalid(f"run_at {self.run_at} has no time zone")
        if self.run_at is not None and self.run_at > LAST_INSTANT:
            raise OptionInvalid(f"run_at {self.run_at} is after {LAST_INSTANT:%Y-%m-%d}")
        if self.delay is not None and self.delay > _LONGEST:
            raise OptionInvalid(f"delay {self.delay} is longer than a thousand years")
        check_priority(self.priority)
        if not timedelta() < self.dedupe_for <= _LONGEST:
            raise OptionInvalid(
                f"dedupe_for {self.dedupe_for} is not between now and in a thousand years"
            )
        for name, keys in (("key", self.keys), ("dedupe_key", self.dedupe_keys)):
            if keys is not None and len(keys) != len(self.payloads):
                raise OptionInvalid(f"{len(keys)} keys for {len(self.payloads)} payloads")
            for key in keys or ():
                check_option(name, key)
        if self.ordered and self.payloads:
            check_ordered(
                self.task,
                self.keys or [None],
                delayed=self.run_at is not None or self.delay is not None,
                priority=self.priority,
            )

    def carrying(self, metadata: dict[str, Any] | None) -> JobBatch:
        """Return the batch with other metadata."""
        return self if metadata is self.metadata else replace(self, metadata=metadata)

    def statement(self) -> tuple[bytes, dict[str, Any]]:
        """Return the statement that enqueues the batch, and its parameters."""
        parameters = {
            "queue": self.queue,
            "task": self.task,
            "trigger": self.trigger,
            "payloads": [payload.decode() for payload in self.payloads],
            "keys": list(self.keys or ()),
            "run_at": self.run_at,
            "delay": self.delay,
            "rank": -self.priority,
            "metadata": None if self.metadata is None else metadata_text(self.metadata).decode(),
        }
        if self.dedupe_keys is None:
            return _ENQUEUE_ORDERED if self.ordered else _ENQUEUE, parameters
        once = {
            "dedupe_keys": list(self.dedupe_keys),
            "dedupe_for": self.dedupe_for,
            "ordered": self.ordered or None,
        }
        return _ENQUEUE_ONCE, parameters | once


def check_priority(priority: int) -> None:
    """Raise OptionInvalid for a priority that no job can have."""
    if priority not in _PRIORITIES:
        raise OptionInvalid(f"priority {priority} is not between -32767 and 32767")


def duration_s(what: str, duration: float | timedelta) -> float:
    """Return a duration in seconds. Raises OptionInvalid for what is none, or cannot be stored.

    >>> duration_s("delay", timedelta(minutes=1))
    60.0
    """
    try:
        exact = duration if isinstance(duration, timedelta) else timedelta(seconds=duration)
    except (TypeError, ValueError, OverflowError) as error:
        hint = "Seconds, or a timedelta."
        raise OptionInvalid(f"{what} {duration!r} is not a time", hint=hint) from error
    if abs(exact) > _LONGEST:
        raise OptionInvalid(f"{what} {duration} is longer than a thousand years")
    return exact.total_seconds()


def check_ordered(task: str, keys: Sequence[str | None], *, delayed: bool, priority: int) -> None:
    """Raise OptionInvalid for what jobs of an ordered task cannot have, or must."""
    if delayed or priority:
        raise OptionInvalid(
            f"task {task!r} is ordered: its jobs have no time and no priority",
            hint="They run when those of their key before them have ended.",
        )
    for key in keys:
        if key is None:
            raise OptionInvalid(
                f"task {task!r} is ordered by key, and no key was given",
                hint='Say key="…": jobs of one key run one at a time.',
            )
        if len(key) > LANE_KEY_LENGTH:
            raise OptionInvalid(
                f"a key of task {task!r} is longer than {LANE_KEY_LENGTH} characters"
            )


def _check_kind(name: str, value: object, kind: type[Any], example: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise OptionInvalid(
            f"{name} is not {kind.__name__}, but {value!r}",
            hint=f"Such as {example}. Nothing was stored.",
        )


def check_option(name: str, text: str | None) -> None:
    """Raise OptionInvalid for an option that is no text, or one that PostgreSQL cannot hold."""
    _check_kind(name, text, str, f"{name}=str(order.id)")
    try:
        texts.check_text(text)
    except texts.TextInvalid as error:
        shown = texts.clean(str(text))
        raise OptionInvalid(f"{name} {shown!r}: {error}", hint=texts.HINT) from error


def metadata_text(metadata: dict[str, Any]) -> bytes:
    """Return metadata as JSON text. Raises OptionInvalid."""
    try:
        return texts.to_document(metadata)
    except ValueError as error:
        hint = getattr(error, "hint", "Metadata is what JSON can hold.")
        raise OptionInvalid(f"metadata: {texts.clean(str(error))}", hint=hint) from error


class Enqueued(NamedTuple):
    """A job's id, and whether it is new: else it is the one that holds the dedupe key."""

    id: int
    is_new: bool


class JobOutcome(NamedTuple):
    """How a job ended; ``outcome`` is None for one that is not known (any more, or yet)."""

    job: int
    outcome: str | None
    result: str | None
    error: str | None


def emission(event: str, payloads: Sequence[bytes], metadata: dict[str, Any] | None) -> JobBatch:
    """Return the dispatch jobs that stand for emitted events (see `conductor.contract`)."""
    return JobBatch(
        queue=INTERNAL_QUEUE,
        task=DISPATCH_TASK,
        trigger="event",
        payloads=[event_envelope(event, payload) for payload in payloads],
        metadata=metadata,
    )


async def enqueue(connection: AsyncConnection[Any], batch: JobBatch) -> list[Enqueued]:
    """Enqueue a batch; the answer is in the order of its payloads. A large one goes by COPY."""
    if batch.dedupe_keys is None and len(batch.payloads) >= _COPY_FROM:
        return await _copy(connection, batch)
    cursor = await connection.execute(*batch.statement())
    return [Enqueued(*row) for row in await cursor.fetchall()]


def _copy_text(value: str | int | None) -> str:
    """Return a value in COPY's text format (PostgreSQL: COPY, "Text Format")."""
    if value is None:
        return r"\N"
    return str(value).translate(_COPY_ESCAPES)


async def _copy(connection: AsyncConnection[Any], batch: JobBatch) -> list[Enqueued]:
    _, parameters = batch.statement()
    count = len(batch.payloads)
    async with connection.transaction():  # one, for an event's jobs say which emitted it
        cursor = await connection.execute(_RESERVE, {**parameters, "count": count})
        reserved = await cursor.fetchall()
        columns = ("queue", "task", "trigger", "rank", "metadata")
        due, state, emitted_by = reserved[0][1:]
        head = [due, "parked" if batch.ordered else state, emitted_by]
        head += [parameters[name] for name in columns]
        head += ["t"] if batch.ordered else []
        shared = "\t".join(map(_copy_text, head))
        keys = batch.keys or repeat(None, count)
        rows = zip(reserved, parameters["payloads"], keys, strict=True)
        query = _COPY_ORDERED if batch.ordered else _COPY
        async with connection.cursor() as copier, copier.copy(query) as copy:
            while chunk := "".join(
                f"{job}\t{shared}\t{_copy_text(payload)}\t{_copy_text(key)}\n"
                for (job, *_), payload, key in islice(rows, _COPY_CHUNK)
            ):
                await copy.write(chunk)
        if batch.ordered:
            await connection.execute(_CALL_LANES, parameters)
    return [Enqueued(job, is_new=True) for job, *_ in reserved]


def enqueue_blocking(connection: Connection[Any], batch: JobBatch) -> list[Enqueued]:
    """Enqueue a batch on a connection of synchronous code."""
    return [Enqueued(*row) for row in connection.execute(*batch.statement()).fetchall()]


@dataclass(frozen=True, slots=True)
class WalEmission:
    """An event, emitted once for each payload (JSON text) by way of the WAL."""

    event: str
    payloads: Sequence[bytes]
    via: Via
    metadata: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a way that there is not."""
        if self.via not in get_args(Via):
            raise OptionInvalid(f"via={self.via!r}", hint=f"One of {', '.join(get_args(Via))}.")

    def traced(self) -> AbstractContextManager[Sending]:
        """Trace that it is sent, where there is a tracer."""
        return sending(INTERNAL_QUEUE, DISPATCH_TASK, self.payloads, self.metadata)

    def carrying(self, metadata: dict[str, Any] | None) -> WalEmission:
        """Return it with other metadata."""
        return replace(self, metadata=metadata)

    def statement(self) -> tuple[bytes, dict[str, Any]]:
        """Return the statement that emits, and its parameters."""
        return _EMIT, {
            "event": self.event,
            "payloads": [payload.decode() for payload in self.payloads],
            "metadata": None if self.metadata is None else to_json(self.metadata).decode(),
            "via": self.via,
        }


async def emit_through_wal(connection: AsyncConnection[Any], emission: WalEmission) -> None:
    """Emit on a connection to the source database. Raises EmitRefused where none would see it."""
    try:
        with emission.traced() as traced:
            await connection.execute(*emission.carrying(traced.metadata).statement())
            traced.sent(None)
    except _NO_WAY as error:
        raise EmitRefused(str(error).partition("\n")[0]) from error


def emit_through_wal_blocking(connection: Connection[Any], emission: WalEmission) -> None:
    """Emit on a connection of synchronous code, like `emit_through_wal`."""
    try:
        with emission.traced() as traced:
            connection.execute(*emission.carrying(traced.metadata).statement())
            traced.sent(None)
    except _NO_WAY as error:
        raise EmitRefused(str(error).partition("\n")[0]) from error


async def cancel(connection: AsyncConnection[Any], job: int, reason: str | None = None) -> bool:
    """Cancel a job; true when it had not ended yet. A running one is told through its worker.

    Raises OptionInvalid for a reason that PostgreSQL cannot hold.
    """
    check_option("reason", reason)
    cursor = await connection.execute(_CANCEL, {"job": job, "reason": reason})
    row = await cursor.fetchone()
    return bool(row and row[0])


async def fetch_outcomes(connection: AsyncConnection[Any], jobs: Sequence[int]) -> list[JobOutcome]:
    """Return the outcomes of those of the jobs that have ended or are not known."""
    cursor = await connection.execute(_FETCH_OUTCOMES, {"jobs": list(jobs)})
    return [JobOutcome(*row) for row in await cursor.fetchall()]


async def hint_queue(connection: AsyncConnection[Any], queue: str) -> None:
    """Tell waiting workers that the queue has something. It serialises commits: rarely, alone."""
    await connection.execute(_HINT, {"queue": queue})
