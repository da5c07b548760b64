"""Jobs as workers touch them: claim, settle, promote, wake.

A worker's outcomes and its next claim travel together (`JobStore.exchange`): sent in one go, each
statement a transaction of its own, so that a claim sees what the settle before it has committed
and a failing one takes nothing with it. What was not the worker's to write is not an error here:
it is missing from what comes back. Policy (which ranges, when, how often) is the caller's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal

import psycopg
from orjson import loads

from conductor.contract import idempotency_key
from conductor.job import JobInfo
from conductor.sql import load
from conductor.store.arrays import JsonArray, TextArray, literal, timestamp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime, timedelta

    from psycopg import AsyncConnection, AsyncPipeline

_QUERIES: Final = load("jobs")
_CLAIM: Final = _QUERIES["claim_jobs"]
_CLAIM_SUSPECT: Final = _QUERIES["claim_suspect"]
_FINISH: Final = _QUERIES["finish_jobs"]
_RESCHEDULE: Final = _QUERIES["reschedule_jobs"]
_PROMOTE: Final = _QUERIES["promote_jobs"]
_CANCELLED: Final = _QUERIES["cancelled_jobs"]
_HELD: Final = _QUERIES["held_jobs"]
_OWNED: Final = _QUERIES["owned_jobs"]
_OFFER: Final = _QUERIES["offer_heads"]
_WAKE: Final = _QUERIES["wake_jobs"]
_TO_WAKE: Final = _QUERIES["jobs_to_wake"]

OFFER_BATCH: Final = 1000
"""How many lanes one claim looks at."""

BEGINNING: Final = "-infinity"
"""The text of the time before all others."""
FOREVER: Final = "infinity"
"""The text of the time after all others."""

Ending = Literal["completed", "failed", "cancelled"]
Row = tuple[Any, ...]
Statement = tuple[bytes, dict[str, Any]]


@dataclass(slots=True)
class ClaimRange:
    """A range of one task's ready jobs: after (rank, run_at, id), up to the end of a rank.

    ``run_at`` None is the beginning of time.
    """

    task: str
    rank: int
    run_at: datetime | None
    id: int
    last_rank: int


@dataclass(slots=True)
class Claim:
    """What to ask for: up to ``limit`` jobs of the ranges, and one suspect if any is wanted.

    ``look_back_s``: ranges start no later than this long ago. ``suspect_crashes``: the most crashes
    a suspect may have; None asks for no suspect. ``codes``: the versions of the tasks' handlers,
    by task (JSON); ``variants``: likewise all that are there. ``lanes_after``: the heads of lanes
    that were called for after this are offered first; 0: of all lanes, None: of none.
    """

    queue: str
    tasks: Sequence[str]
    ranges: Sequence[ClaimRange]
    limit: int
    look_back_s: float = 0.0
    suspect_crashes: int | None = None
    codes: str = "{}"
    variants: str = "{}"
    lanes_after: int | None = None


@dataclass(slots=True)
class ClaimedJob:
    """A job that is this worker's now.

    ``waited_s``: how long it could have run before, by the database's clock; ``claimed_s``: when it
    was received, by the monotonic one. ``unreadable``: why its metadata cannot be read, if so.
    """

    info: JobInfo
    payload: bytes
    waited_s: float
    claimed_s: float
    unreadable: str | None = None


@dataclass(slots=True)
class Finished:
    """The job ends. ``document`` is its result, or why it failed or was cancelled (JSON)."""

    id: int
    fence: int
    task: str
    ending: Ending
    document: bytes | None
    retention: timedelta
    stepped: bool  # it may have steps
    parent: int | None = None  # who awaits it


@dataclass(slots=True)
class Rescheduled:
    """The job goes back: after a failure (``failures`` 1, with its error), asleep, or unstarted.

    ``waits``: until something comes for it, or ``wake_at`` when that is given.
    """

    id: int
    fence: int
    task: str
    failures: int = 0
    delay_s: float = 0.0
    wake_at: datetime | None = None
    error: bytes | None = None
    waits: bool = False


Outcome = Finished | Rescheduled


@dataclass(slots=True)
class Exchange:
    """What came back. ``refused`` outcomes got an error: they may be sent again, one by one.

    ``woken``: the queues of jobs that were woken by what has ended.
    """

    settled: set[int] = field(default_factory=set)
    refused: list[Outcome] = field(default_factory=list)
    jobs: list[ClaimedJob] = field(default_factory=list)
    suspects: list[ClaimedJob] = field(default_factory=list)
    woken: list[str] = field(default_factory=list)
    lanes_left: bool = False  # to look at
    lanes_last: int | None = None  # position of the last call that was looked at
    error: psycopg.Error | None = None


@dataclass(slots=True)
class Promotion:
    """What one look at due jobs found; ``next_due_s``: when the next is, within a minute."""

    promoted: int
    promoted_at: datetime
    next_due_s: float | None


class JobStore:
    """The hot path's statements on one connection (see `conductor.store.sessions`)."""

    __slots__ = ("_connection",)

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def exchange(
        self, worker: int, outcomes: Sequence[Outcome], claim: Claim | None
    ) -> Exchange:
        """Settle outcomes and claim, in one round trip.

        Raises psycopg.OperationalError when the connection was lost: anything sent may or may not
        have been committed.
        """
        groups = _grouped(outcomes)
        statements = [*(_settle(worker, group) for group in groups), *_wakes(outcomes)]
        if claim is not None and claim.lanes_after is not None:
            offer = {"queue": claim.queue, "limit": OFFER_BATCH, "after": claim.lanes_after}
            statements.append((_OFFER, offer))
        if claim is not None and claim.suspect_crashes is not None:
            statements.append((_CLAIM_SUSPECT, _suspect_parameters(worker, claim)))
        if claim is not None and claim.limit > 0:
            statements.append((_CLAIM, _claim_parameters(worker, claim)))
        replies, error = await self._send(statements)
        if error is not None and self._connection.closed:
            raise error
        exchange = Exchange(error=error)
        for group, reply in zip(groups, replies, strict=False):
            if reply is None:
                exchange.refused += group
            else:
                exchange.settled.update([row[0] for row in reply])
        asked = [query for query, _ in statements[len(groups) :]]
        for query, reply in zip(asked, replies[len(groups) :], strict=True):
            _note(exchange, query, reply or [], claim.queue if claim is not None else "")
        return exchange

    async def _send(
        self, statements: Sequence[Statement]
    ) -> tuple[list[list[Row] | None], psycopg.Error | None]:
        """Send statements together, each with a Sync of its own; None for one that failed."""
        error: psycopg.Error | None = None
        cursors = [self._connection.cursor(binary=True) for _ in statements]
        try:
            async with self._connection.pipeline() as pipeline:
                for cursor, (query, parameters) in zip(cursors, statements, strict=True):
                    if cursor is not cursors[0]:
                        _separate(pipeline)
                    try:
                        await cursor.execute(query, parameters, prepare=False)
                    except psycopg.Error as raised:  # of this or an earlier statement
                        error = error or raised
                        if self._connection.closed:
                            break
        except psycopg.Error as raised:
            error = error or raised
        replies = [None if c.pgresult is None else await c.fetchall() for c in cursors]
        return replies, error

    async def promote(self, after: datetime | None, limit: int) -> Promotion:
        """Make up to ``limit`` due jobs ready, those that were due after ``after``."""
        parameters = {"after": BEGINNING if after is None else str(after), "limit": limit}
        ((promoted, _, promoted_at, next_due_s),) = await self._rows(_PROMOTE, parameters)
        return Promotion(promoted, promoted_at, next_due_s)

    async def cancelled(self, worker: int) -> list[tuple[int, int, str]]:
        """Return (id, fence, reason) of the worker's running jobs that are to be cancelled."""
        return [
            (id_, fence, reason)
            for id_, fence, reason in await self._rows(_CANCELLED, {"worker": worker})
        ]

    async def held(self, worker: int) -> dict[int, int]:
        """Return the fences of the jobs that the worker runs, as far as the database knows."""
        return dict(await self._pairs(_HELD, {"worker": worker}))

    async def owned(self, worker: int, jobs: Iterable[int]) -> dict[int, int]:
        """Return the fences of those of the jobs that are the worker's."""
        return dict(await self._pairs(_OWNED, {"worker": worker, "ids": literal(jobs)}))

    async def wake(self, jobs: Iterable[int]) -> set[str]:
        """Bring jobs what has come for them; return the queues of those that it wakes."""
        return {queue for (queue,) in await self._rows(_WAKE, {"jobs": literal(jobs)})}

    async def to_wake(self, limit: int) -> list[int]:
        """Return jobs that something has come for, of the oldest ``limit`` of such."""
        return [job for (job,) in await self._rows(_TO_WAKE, {"limit": limit})]

    async def _rows(self, query: bytes, parameters: Mapping[str, Any]) -> list[Row]:
        cursor = self._connection.cursor(binary=True)
        await cursor.execute(query, parameters, prepare=False)
        return await cursor.fetchall()

    async def _pairs(self, query: bytes, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [(first, second) for first, second in await self._rows(query, parameters)]


def _separate(pipeline: AsyncPipeline) -> None:
    """End the implicit transaction here without waiting, as `pipeline.sync()` would."""
    pipeline.command_queue.append(pipeline.pgconn.pipeline_sync)
    pipeline.result_queue.append(None)


def _note(exchange: Exchange, query: bytes, rows: list[Row], queue: str) -> None:
    """Take note of what a wake or a claim came back with."""
    if query is _WAKE:
        exchange.woken = [woken for (woken,) in rows]
        return
    now_s = monotonic()
    if query is _OFFER:
        for looked, last in rows:
            exchange.lanes_left, exchange.lanes_last = looked >= OFFER_BATCH, last
        return
    jobs = [_claimed(row, queue, now_s) for row in rows]
    if query is _CLAIM:
        exchange.jobs = jobs
    else:
        exchange.suspects = jobs


def _grouped(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """Split outcomes by the statement that writes them, each part in the order of the ids."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kind = outcome.ending if isinstance(outcome, Finished) else ""
        groups.setdefault(kind, []).append(outcome)
    for group in groups.values():
        group.sort(key=_id_of)
    return list(groups.values())


def _id_of(outcome: Outcome) -> int:
    return outcome.id


def _wakes(outcomes: Sequence[Outcome]) -> list[Statement]:
    """Return the statement that wakes who awaits what has ended."""
    parents = {o.parent for o in outcomes if isinstance(o, Finished) and o.parent is not None}
    return [(_WAKE, {"jobs": literal(sorted(parents))})] if parents else []


def _settle(worker: int, group: Sequence[Outcome]) -> Statement:
    finished = [outcome for outcome in group if isinstance(outcome, Finished)]
    if finished:
        return _FINISH, _finish_parameters(worker, finished)
    return _RESCHEDULE, _reschedule_parameters(
        worker, [outcome for outcome in group if isinstance(outcome, Rescheduled)]
    )


def _finish_parameters(worker: int, group: Sequence[Finished]) -> dict[str, Any]:
    places = {retention: n for n, retention in enumerate({f.retention for f in group}, start=1)}
    ending = group[0].ending
    return {
        "worker": worker,
        "ids": literal([f.id for f in group]),
        "fences": literal([f.fence for f in group]),
        "retention": literal([places[f.retention] for f in group]),
        "documents": JsonArray([f.document for f in group]),
        "retentions": literal([_interval(retention) for retention in places]),
        "stepped": literal([f.id for f in group if f.stepped]),
        "outcome": ending,
        "failures": int(ending == "failed"),
    }


def _interval(retention: timedelta) -> str | None:
    if retention.total_seconds() <= 0:
        return None
    return f'"{retention.days} days {retention.seconds}.{retention.microseconds:06} seconds"'


def _reschedule_parameters(worker: int, group: Sequence[Rescheduled]) -> dict[str, Any]:
    return {
        "worker": worker,
        "ids": literal([r.id for r in group]),
        "fences": literal([r.fence for r in group]),
        "failures": literal([r.failures for r in group]),
        "delays": literal([r.delay_s for r in group]),
        "wake_ats": literal(
            [FOREVER if r.waits and r.wake_at is None else timestamp(r.wake_at) for r in group]
        ),
        "errors": JsonArray([r.error for r in group]),
        "waits": literal([r.waits for r in group]),
    }


def _claim_parameters(worker: int, claim: Claim) -> dict[str, Any]:
    ranges = claim.ranges
    return {
        "worker": worker,
        "queue": claim.queue,
        "codes": claim.codes,
        "variants": claim.variants,
        "limit": claim.limit,
        "look_back": f"{claim.look_back_s} seconds",
        "tasks": TextArray([r.task for r in ranges]),
        "ranks": literal([r.rank for r in ranges]),
        "run_ats": literal([timestamp(r.run_at) or BEGINNING for r in ranges]),
        "ids": literal([r.id for r in ranges]),
        "last_ranks": literal([r.last_rank for r in ranges]),
    }


def _suspect_parameters(worker: int, claim: Claim) -> dict[str, Any]:
    return {
        "worker": worker,
        "queue": claim.queue,
        "codes": claim.codes,
        "variants": claim.variants,
        "tasks": TextArray(claim.tasks),
        "crashes": claim.suspect_crashes,
    }


def _claimed(row: Row, queue: str, now_s: float) -> ClaimedJob:
    (
        id_, task, trigger, attempt, crashes, fence, rank, key, run_at, created_at, metadata, app,
        version, generation, lsn, ordinal, subscription, payload, started_at, parent, code,
    ) = row  # fmt: skip
    read, unreadable = (None, None) if metadata is None else _metadata(metadata)
    info = JobInfo(
        id_,
        task,
        queue,
        trigger,
        attempt,
        crashes,
        fence,
        -rank,
        key,
        run_at,
        created_at,
        read,
        app,
        version,
        f"job:{id_}" if lsn is None else idempotency_key(generation, lsn, ordinal, subscription),
        parent,
        code,
    )
    waited_s = (started_at - run_at).total_seconds()
    return ClaimedJob(info, payload, waited_s, now_s, unreadable)


def _metadata(text: bytes) -> tuple[Any, str | None]:
    r"""Return decoded metadata, or why it cannot be: the database takes more than a parser does.

    ``json`` columns hold ``"\ud800"``, which orjson refuses, and any depth of nesting.
    """
    try:
        return loads(text), None
    except ValueError:
        pass
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, str(error)
