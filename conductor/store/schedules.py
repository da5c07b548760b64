"""Schedules: what is due, and those made while an application runs. One method per named query."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from psycopg import AsyncConnection, Connection
from psycopg.rows import class_row, scalar_row
from psycopg.types.json import Json

from conductor import sql

_QUERIES: Final = sql.load("schedules")


@dataclass(frozen=True, slots=True)
class DueSchedule:
    """A schedule that stands at an instant which has come; ``seen_at`` is the database's time now.

    Unless it ``is_planned``, that instant is none of its own, only where to look from.
    ``has_payload``: it was made at run time, and its jobs get that.
    """

    id: int
    app: str
    task: str
    name: str
    expression: str
    timezone: str
    next_at: datetime
    is_planned: bool
    has_payload: bool
    metadata: Any
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class Firing:
    """One job of a schedule: for which instant, and where the schedule goes from ``due_at``.

    Without an instant (``fired_at``) it only goes on. ``payload`` is that of a trigger's jobs.
    """

    id: int
    due_at: str  # ISO 8601, as the others: exact to the microsecond
    fired_at: str | None
    next_at: str
    missed: int
    payload: dict[str, Any]
    metadata: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulePlan:
    """When a schedule made at run time fires, and what its jobs are. JSON travels as text."""

    queue: str
    rank: int
    expression: str
    timezone: str
    payload: bytes
    metadata: bytes | None


class ScheduleStore:
    """The cron tick's queries on one connection."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def due_schedules(self, batch: int, excluded: Collection[int]) -> list[DueSchedule]:
        """Lock and return at most ``batch`` schedules that are due and nobody else has locked."""
        cursor = self._connection.cursor(row_factory=class_row(DueSchedule))
        values = {"batch": batch, "excluded": list(excluded)}
        await cursor.execute(_QUERIES["due_schedules"], values)
        return await cursor.fetchall()

    async def fire_schedules(self, firings: Sequence[Firing]) -> list[tuple[str, str]]:
        """Insert the jobs and move the schedules; returns (queue, task) of each job."""
        rows = Json([asdict(firing) for firing in firings])
        cursor = await self._connection.execute(_QUERIES["fire_schedules"], {"firings": rows})
        return await cursor.fetchall()

    async def until_next(self, excluded: Collection[int]) -> float | None:
        """Return the seconds until the next instant; None when there is no schedule."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["until_next"], {"excluded": list(excluded)})
        seconds: float | None = await cursor.fetchone()
        return seconds


def _put(task: str, name: str, plan: SchedulePlan) -> tuple[bytes, dict[str, Any]]:
    values = {
        "task": task,
        "name": name,
        "queue": plan.queue,
        "rank": plan.rank,
        "expression": plan.expression,
        "timezone": plan.timezone,
        "payload": plan.payload.decode(),
        "metadata": None if plan.metadata is None else plan.metadata.decode(),
    }
    return _QUERIES["put_schedule"], values


async def put_schedule(
    connection: AsyncConnection[Any], task: str, name: str, plan: SchedulePlan
) -> None:
    """Begin a schedule of a task, or replace that of its name."""
    await connection.execute(*_put(task, name, plan))


async def drop_schedule(connection: AsyncConnection[Any], task: str, name: str) -> bool:
    """End a schedule that was made at run time; false when there is none."""
    cursor = await connection.execute(_QUERIES["drop_schedule"], {"task": task, "name": name})
    return await cursor.fetchone() is not None


def put_schedule_blocking(
    connection: Connection[Any], task: str, name: str, plan: SchedulePlan
) -> None:
    """Like `put_schedule`, on a connection of synchronous code."""
    connection.execute(*_put(task, name, plan))


def drop_schedule_blocking(connection: Connection[Any], task: str, name: str) -> bool:
    """Like `drop_schedule`, on a connection of synchronous code."""
    cursor = connection.execute(_QUERIES["drop_schedule"], {"task": task, "name": name})
    return cursor.fetchone() is not None
