"""Time travel for a queue under test: what is stored for later comes nearer.

Every instant of the queue that something waits for is moved back, so that running workers find it
due, whatever sessions they have. For databases of tests alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, Protocol

from psycopg import AsyncConnection

from conductor.sql import load

_QUERIES: Final = load("testing")


class TimeTravel(Protocol):
    """The fixture `time_travel`: lets that much time pass in a test's database."""

    async def __call__(self, by: timedelta) -> None:
        """Pass by."""


async def travel(connection: AsyncConnection[Any], by: timedelta) -> None:
    """Let that much time pass for delayed jobs, sleeps, waits, schedules and dedupe keys.

    await travel(connection, timedelta(days=3))
    """
    async with connection.transaction():
        for name in ("move_jobs", "move_steps", "move_schedules", "move_dedupe_keys"):
            await connection.execute(_QUERIES[name], {"by": by})
