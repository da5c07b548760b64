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

from conductor.errors import (
    ConfigError,
    DatabaseUnavailable,
    MigrationMismatch,
    PrivilegeMissing,
)
from conductor.logins import login_refused
from conductor.store.sessions import (
    RECONNECT_S,
    check_open,
    connection_settings,
    knock_again,
    prepare,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_S: Final = 10.0
_KNOCK_S: Final = 2.0


def _said(error: psycopg.Error) -> str:
    """Return what the server says, without the place in a statement."""
    return error.diag.message_primary or str(error)


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
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[AsyncConnection[Any]]:
        """Lend a connection.

        Raises DatabaseUnavailable, MigrationMismatch or ConfigError; LoginRefused at once when
        nothing was lent before.
        """
        pool = await self._opened()
        try:
            async with pool.connection() as connection:
                yield connection
        except PoolTimeout as error:
            await self._knock()
            raise DatabaseUnavailable(f"cannot use {self._database}: {error}") from error
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise DatabaseUnavailable(f"cannot use {self._database}: {error}") from error
        except (
            psycopg.errors.UndefinedTable,
            psycopg.errors.UndefinedFunction,
            psycopg.errors.InvalidSchemaName,
        ) as error:
            raise MigrationMismatch(f"the schema conductor is not there: {_said(error)}") from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise PrivilegeMissing(_said(error)) from error

    async def _opened(self) -> AsyncConnectionPool[AsyncConnection[Any]]:
        loop = asyncio.get_running_loop()
        if self._pool is None and self._loop is not loop:
            self._loop, self._opening = loop, asyncio.Lock()
        if self._loop is not loop:
            raise ConfigError(
                "this client belongs to another event loop",
                hint="Close it before its loop ends; SyncConductor serves synchronous code.",
            )
        if self._pool is not None:
            return self._pool
        async with self._opening:
            return await self._open()

    async def _open(self) -> AsyncConnectionPool[AsyncConnection[Any]]:
        if self._pool is None:  # nobody else was faster
            await self._knock()
            self._pool = AsyncConnectionPool(
                self._dsn,
                kwargs=connection_settings(self._dsn, self._name),
                min_size=1,
                max_size=self._size,
                open=False,
                timeout=WAIT_S,
                name=self._name,
                check=check_open,
                configure=prepare,
                reconnect_timeout=RECONNECT_S,
                reconnect_failed=knock_again,
            )
            await self._pool.open()
        return self._pool

    async def _knock(self) -> None:
        """Raise LoginRefused when the server will not let us in: a pool tells nobody, and waits."""
        settings = connection_settings(self._dsn, self._name)
        try:
            async with asyncio.timeout(_KNOCK_S):
                connection = await AsyncConnection.connect(self._dsn, **settings)
        except TimeoutError:
            return  # whoever asked may wait longer
        except psycopg.OperationalError as error:
            if refused := login_refused(error, self._database):
                raise refused from error
        else:
            await connection.close()

    async def close(self) -> None:
        """Close them; the next use opens others."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()
