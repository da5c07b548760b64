"""The exporter's queries: its duty, and what the router has left behind."""

from __future__ import annotations

from typing import Any, Final

from psycopg import AsyncConnection

from conductor import sql

_QUERIES: Final = sql.load("gauges")


class GaugeStore:
    """The exporter's queries on one connection."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def take_duty(self, name: str, holder: str, precedence: int, seconds: float) -> bool:
        """Take or keep a duty for so long; false when somebody else has it."""
        values = {"name": name, "holder": holder, "precedence": precedence, "seconds": seconds}
        cursor = await self._connection.execute(_QUERIES["take_duty"], values)
        return await cursor.fetchone() is not None

    async def give_up_duty(self, name: str, holder: str) -> None:
        """Leave a duty to the next who asks."""
        values = {"name": name, "holder": holder}
        await self._connection.execute(_QUERIES["give_up_duty"], values)

    async def open_gaps(self) -> list[tuple[str, str | None, int]]:
        """Return (slot, condition, gaps nobody has closed); (slot, None, 0) when there is none."""
        cursor = await self._connection.execute(_QUERIES["open_gaps"])
        return await cursor.fetchall()

    async def count_dead_letters(self, bound: int) -> list[tuple[str, int]]:
        """Return (slot, dead letters), counted up to ``bound``."""
        cursor = await self._connection.execute(_QUERIES["count_dead_letters"], {"bound": bound})
        return await cursor.fetchall()
