"""Schedules that are due: one method per named query of the cron tick."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import class_row, scalar_row
from psycopg.types.json import Json

from conductor import sql

_QUERIES: Final = sql.load("schedules")


@dataclass(frozen=True, slots=True)
class DueSchedule:
    """A schedule whose next instant has come; ``seen_at`` is the database's time now."""

    id: int
    app: str
    task: str
    name: str
    expression: str
    timezone: str
    next_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class Firing:
    """One job of a schedule: for which instant, and where the schedule goes from ``due_at``."""

    id: int
    due_at: str  # ISO 8601, as the others: exact to the microsecond
    fired_at: str
    next_at: str
    missed: int
    payload: dict[str, Any]


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
