"""The connections of a client: opened when first needed, lent for one statement at a time.

In autocommit, unprepared (so that a pooler in between changes nothing). What goes wrong with the
database is named here. This module must not know any query.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from conductor.errors import ConfigError, DatabaseUnavailable, MigrationMismatch
from conductor.store.sessions import connection_settings, prepare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_S: Final = 10.0


async def _check_open(connection: AsyncConnection[Any]) -> None:
    """Raise OperationalError for a connection that the server has closed. Costs no round trip."""
    for _ in range(2):  # its last words, then the end
        connection.pgconn.consume_input()


class Connections:
    """Up to ``size`` connections to one database, for one event loop.

    ``database`` is what messages call it.
    """

    def __init__(
        self, dsn: str, size: int, name: str, *, database: str = "the queue database"
    ) -> None:
        self._dsn, self._size, self._name = dsn, size, name
        self._database = database
        self._pool: AsyncConnectionPool[AsyncConnection[Any]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[AsyncConnection[Any]]:
        """Lend a connection. Raises DatabaseUnavailable, MigrationMismatch or ConfigError."""
        pool = await self._opened()
        try:
            async with pool.connection() as connection:
                yield connection
        except (PoolTimeout, psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise DatabaseUnavailable(f"cannot use {self._database}: {error}") from error
        except (
            psycopg.errors.UndefinedTable,
            psycopg.errors.UndefinedFunction,
            psycopg.errors.InvalidSchemaName,
        ) as error:
            raise MigrationMismatch(f"the schema conductor is not there: {error}") from error

    async def _opened(self) -> AsyncConnectionPool[AsyncConnection[Any]]:
        loop = asyncio.get_running_loop()
        if self._pool is None:
            self._loop = loop
            self._pool = AsyncConnectionPool(
                self._dsn,
                kwargs=connection_settings(self._dsn, self._name),
                min_size=1,
                max_size=self._size,
                open=False,
                timeout=WAIT_S,
                name=self._name,
                check=_check_open,
                configure=prepare,
            )
            await self._pool.open()
        if self._loop is not loop:
            raise ConfigError(
                "this client belongs to another event loop",
                hint="Close it before its loop ends; SyncConductor serves synchronous code.",
            )
        return self._pool

    async def close(self) -> None:
        """Close them; the next use opens others."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()
