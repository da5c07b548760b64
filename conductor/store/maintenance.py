"""The statements of maintenance: one method per named query, each in the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import class_row, scalar_row
from psycopg.sql import SQL, Identifier, Literal

from conductor import sql

_QUERIES: Final = sql.load("maintenance")
_OPEN_LANES: Final = sql.load("registration")["open_lanes"]


@dataclass(frozen=True, slots=True)
class Days:
    """What the partitions of history are and should reach to. ``today`` is the UTC day."""

    today: date
    longest_days: float
    partitions: list[str]


class MaintenanceStore:
    """The maintenance queries on one connection."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def try_lock(self) -> bool:
        """Become the only maintainer until the transaction ends; false when there is one."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["try_lock"])
        return bool(await cursor.fetchone())

    async def plan_days(self) -> Days:
        """Return today, the longest retention and the partitions by name."""
        cursor = self._connection.cursor(row_factory=class_row(Days))
        await cursor.execute(_QUERIES["plan_days"])
        (days,) = await cursor.fetchall()
        return days

    async def defaulted_days(self, days: Sequence[date]) -> set[date]:
        """Return those days of which the default partition holds rows."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["defaulted_days"], {"days": list(days)})
        return set(await cursor.fetchall())

    async def set_lock_timeout(self, timeout_s: float) -> None:
        """Wait no longer than this for any lock of this transaction."""
        values = {"timeout_ms": str(int(timeout_s * 1000))}
        await self._connection.execute(_QUERIES["set_lock_timeout"], values)

    async def add_partition(self, name: str, day: date) -> None:
        """Create the partition of one expiry day."""
        names = {"partition": Identifier(name)}
        bounds = {"day": Literal(day), "next_day": Literal(day + timedelta(days=1))}
        await self._connection.execute(_composed("create_partition", **names))
        await self._connection.execute(_composed("attach_partition", **names, **bounds))

    async def drop_partition(self, name: str) -> None:
        """Forget the jobs of one expiry day."""
        await self._connection.execute(_composed("drop_partition", partition=Identifier(name)))

    async def purge_default(self, batch: int) -> int:
        """Delete expired rows of the default partition; returns how many."""
        return await self._purge("purge_default", batch)

    async def purge_dedupe_keys(self, batch: int) -> int:
        """Delete expired deduplication keys; returns how many."""
        return await self._purge("purge_dedupe_keys", batch)

    async def call_stalled_lanes(self) -> None:
        """Have lanes looked at in which somebody waits and nobody has the turn."""
        await self._connection.execute(_QUERIES["call_stalled_lanes"])

    async def open_stray_lanes(self) -> None:
        """Let the jobs go that were put into lanes of tasks which are not ordered any more."""
        cursor = await self._connection.execute(_QUERIES["stray_lanes"])
        for queue, task in await cursor.fetchall():
            await self._connection.execute(_OPEN_LANES, {"queues": [queue], "tasks": [task]})

    async def purge_steps(self, batch: int) -> int:
        """Delete steps of jobs that are gone; returns how many."""
        return await self._purge("purge_steps", batch)

    async def _purge(self, query: str, batch: int) -> int:
        cursor = await self._connection.execute(_QUERIES[query], {"batch": batch})
        return cursor.rowcount


def _composed(query: str, **parts: Identifier | Literal) -> Any:
    # The text is a file of ours; only its placeholders are filled, quoted by psycopg.
    return SQL(_QUERIES[query].decode()).format(**parts)
