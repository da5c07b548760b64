"""What tests of the queue's services share: a pool on a migrated database, and its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from psycopg.rows import dict_row

from conductor.connections import Connections
from conductor.metrics import Metrics
from conductor.testing import travel
from tests.servers import ScratchDatabase

WITHIN_S = 60.0  # only a failure takes as long: it is for a machine with much else to do


async def eventually(check: Callable[[], Awaitable[bool]], within_s: float = WITHIN_S) -> None:
    """Wait until ``check`` says true."""
    async with asyncio.timeout(within_s):
        while not await check():  # noqa: ASYNC110 - what is asked has no event
            await asyncio.sleep(0.02)


class Queue:
    """A migrated database as a test sees it.

    ``connections`` are what services get; the test itself asks on others.
    """

    def __init__(self, database: ScratchDatabase) -> None:
        self.database = database
        self.connections = Connections(database.dsn, 8, "conductor services")
        self._asking = Connections(database.dsn, 2, "test")

    async def close(self) -> None:
        """Close both."""
        await self.connections.close()
        await self._asking.close()

    async def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Run a statement and return its rows, by column."""
        async with self._asking.lend() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []

    async def column(self, query: str, *values: Any) -> list[Any]:
        """Run a statement and return the first column of its rows."""
        return [next(iter(row.values())) for row in await self.rows(query, *values)]

    async def value(self, query: str, *values: Any) -> Any:
        """Run a statement and return its only value."""
        (value,) = await self.column(query, *values)
        return value

    async def until(self, query: str, *values: Any, within_s: float = WITHIN_S) -> None:
        """Wait until a query's only value is true."""

        async def check() -> bool:
            return bool(await self.value(query, *values))

        await eventually(check, within_s)

    async def pass_by(self, **time: float) -> None:
        """Let time pass for what is stored."""
        async with self.connections.lend() as connection:
            await travel(connection, timedelta(**time))


@pytest.fixture
async def queue(migrated: ScratchDatabase) -> AsyncIterator[Queue]:
    """A migrated database and the owner's connections to it."""
    queue = Queue(migrated)
    yield queue
    await queue.close()


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of one process."""
    return Metrics()
