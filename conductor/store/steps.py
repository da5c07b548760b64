"""Steps of jobs: what their runs have written, what they have made, and what they wait for.

Every write is fenced by (worker, fence) and locks the rows of its jobs. A write that is sent again,
because its reply was lost, gives what the first has written. Documents are JSON text; they travel
as such, because a recordset would read the escapes in them. What a step means is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from orjson import dumps

from conductor.sql import load
from conductor.store.arrays import JsonArray, TextArray, literal, timestamp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from psycopg import AsyncConnection

    from conductor.store.schedules import SchedulePlan

_QUERIES: Final = load("steps")
_LOAD: Final = _QUERIES["load_steps"]
_LOCK: Final = _QUERIES["lock_job"]
_WRITE: Final = _QUERIES["write_steps"]
_CALL: Final = _QUERIES["write_calls"]
_SCHEDULE: Final = _QUERIES["write_schedules"]


@dataclass(slots=True)
class StoredStep:
    """A step as it is stored. ``due``: its ``wake_at`` has come.

    ``outcome``: how what it waited for has ended; None while it has not. ``child``: the job it has
    made.
    """

    name: str
    position: int | None
    kind: str
    result: bytes | None
    wake_at: datetime | None
    due: bool
    outcome: str | None = None
    child: int | None = None


@dataclass(slots=True)
class StepWrite:
    """A step to be written, fenced by its job's claim. ``delay_s``, ``wake_at``: of a sleep."""

    job: int
    fence: int
    name: str
    position: int | None
    kind: str
    result: bytes | None = None
    delay_s: float | None = None
    wake_at: datetime | None = None


@dataclass(slots=True, kw_only=True)
class NewJob:
    """A job that a step makes: a child, or the dispatch of an event."""

    queue: str
    task: str
    payload: bytes
    trigger: str = "invoke"
    rank: int = 0
    key: str | None = None
    ordered: bool = False
    metadata: bytes | None = None
    after_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Wanted:
    """What a step waits for: messages of a topic whose fields have these values, and a condition.

    ``fields`` and ``matched`` are made by `conductor.matching`; ``condition`` is JSON. ``source``:
    of a change; ``seen_lsn``: what was committed there before does not match (None: it is the
    queue's own database, and asked when the step is written).
    """

    topic: str
    fields: str = ""
    matched: str = ""
    condition: bytes | None = None
    source: str = "default"
    seen_lsn: str | None = None


@dataclass(slots=True, kw_only=True)
class ScheduleCall:
    """A step that begins a schedule, or ends one (without a plan)."""

    job: int
    fence: int
    name: str
    position: int | None
    kind: str
    schedule: str
    task: str
    plan: SchedulePlan | None = None


@dataclass(slots=True, kw_only=True)
class Call:
    """A step that makes a job, waits for something, or gives up.

    ``outcome`` ends it, unless it has ended; then ``cancels`` is a job that is to be cancelled.
    """

    job: int
    fence: int
    name: str
    position: int | None
    kind: str
    result: bytes | None = None
    outcome: str | None = None
    delay_s: float | None = None
    wake_at: datetime | None = None
    cancels: int | None = None
    makes: NewJob | None = None
    wants: Wanted | None = None


Write = StepWrite | Call | ScheduleCall
Written = dict[tuple[int, str], StoredStep]


class StepStore:
    """The statements about steps on one connection (see `conductor.store.sessions`)."""

    __slots__ = ("_connection",)

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def load(self, jobs: Iterable[int]) -> dict[int, list[StoredStep]]:
        """Return the steps of jobs, by job."""
        steps: dict[int, list[StoredStep]] = {}
        for job, *columns in await self._rows(_LOAD, {"jobs": literal(jobs)}):
            steps.setdefault(job, []).append(StoredStep(*columns))
        return steps

    async def load_settled(self, job: int) -> list[StoredStep]:
        """Return a job's steps once no transaction that writes one is under way."""
        async with self._connection.transaction():
            await self._rows(_LOCK, {"job": job})
            return (await self.load([job])).get(job, [])

    async def write(self, worker: int, writes: Sequence[Write]) -> Written:
        """Write steps; return those that were the worker's to write, by (job, name)."""
        plain = [write for write in writes if isinstance(write, StepWrite)]
        calls = [write for write in writes if isinstance(write, Call)]
        rows = await self._rows(*write_statement(worker, plain)) if plain else []
        if calls:
            rows += await self._rows(_CALL, _call_parameters(worker, calls))
        schedules = [write for write in writes if isinstance(write, ScheduleCall)]
        if schedules:
            rows += await self._rows(_SCHEDULE, _schedule_parameters(worker, schedules))
        return {(job, columns[0]): StoredStep(*columns) for job, *columns in rows}

    async def _rows(self, query: bytes, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        cursor = self._connection.cursor(binary=True)
        await cursor.execute(query, parameters, prepare=False)
        return await cursor.fetchall()


def write_statement(worker: int, writes: Sequence[StepWrite]) -> tuple[bytes, dict[str, Any]]:
    """Return the statement that writes steps, and its parameters (see `register_arrays`)."""
    return _WRITE, {
        "worker": worker,
        "jobs": literal([w.job for w in writes]),
        "fences": literal([w.fence for w in writes]),
        "names": TextArray([w.name for w in writes]),
        "positions": literal([w.position for w in writes]),
        "kinds": TextArray([w.kind for w in writes]),
        "results": JsonArray([w.result for w in writes]),
        "delays": literal([w.delay_s for w in writes]),
        "wake_ats": literal([timestamp(w.wake_at) for w in writes]),
    }


def _call_parameters(worker: int, calls: Sequence[Call]) -> dict[str, Any]:
    return {
        "worker": worker,
        "calls": dumps([_call_row(call) for call in calls]).decode(),
        "results": JsonArray([call.result for call in calls]),
        "conditions": JsonArray([None if c.wants is None else c.wants.condition for c in calls]),
        "payloads": JsonArray([None if c.makes is None else c.makes.payload for c in calls]),
        "metadata": JsonArray([None if c.makes is None else c.makes.metadata for c in calls]),
    }


def _call_row(call: Call) -> dict[str, Any]:
    row: dict[str, Any] = {
        "job": call.job,
        "fence": call.fence,
        "name": call.name,
        "position": call.position,
        "kind": call.kind,
        "outcome": call.outcome,
        "delay_s": call.delay_s,
        "wake_at": call.wake_at,
        "cancels": call.cancels,
    }
    if call.wants is not None:
        wants = call.wants
        row |= {"topic": wants.topic, "fields": wants.fields, "matched": wants.matched}
        row |= {"seen_lsn": wants.seen_lsn}
    if call.makes is not None:
        made = call.makes
        row |= {"queue": made.queue, "task": made.task, "trigger": made.trigger}
        row |= {"rank": made.rank, "key": made.key, "after_s": made.after_s}
        row |= {"ordered": made.ordered or None}
    return row


def _schedule_parameters(worker: int, calls: Sequence[ScheduleCall]) -> dict[str, Any]:
    return {
        "worker": worker,
        "calls": dumps([_schedule_row(call) for call in calls]).decode(),
        "payloads": JsonArray([None if c.plan is None else c.plan.payload for c in calls]),
        "metadata": JsonArray([None if c.plan is None else c.plan.metadata for c in calls]),
    }


def _schedule_row(call: ScheduleCall) -> dict[str, Any]:
    row: dict[str, Any] = {
        "job": call.job,
        "fence": call.fence,
        "name": call.name,
        "position": call.position,
        "kind": call.kind,
        "schedule": call.schedule,
        "task": call.task,
    }
    if call.plan is not None:
        plan = call.plan
        row |= {"queue": plan.queue, "rank": plan.rank}
        row |= {"expression": plan.expression, "timezone": plan.timezone}
    return row
