"""Connections of a worker: opened when first used, opened again when lost.

A session is one autocommit connection that never prepares statements (so that the server plans
each execution with its values, and so that a pooler in between changes nothing), reads JSON as raw
bytes, and notices a dead peer within seconds. This module must not know any query of the queue.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg.types.string import ByteaBinaryLoader, ByteaLoader

from conductor.dsn import parse_dsn
from conductor.sql import load
from conductor.store.arrays import register_arrays

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from psycopg.abc import AdaptContext
    from psycopg.pq.abc import PGconn
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_ISO_DATES: Final = load("sessions")["iso_dates"]
_LIMIT: Final = load("steps")["limit_idle"]
_STANDSTILL_S: Final = 5.0
_FIRST_DELAY_S: Final = 0.05
_LAST_DELAY_S: Final = 5.0
RECONNECT_S: Final = 10.0
"""For how long a pool tries to connect before it begins anew, as `knock_again` says."""
_KNOCK_S: Final = 0.01
_SETTINGS: Final[dict[str, str | int]] = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


class _JsonTextLoader(ByteaLoader):
    """JSON in text format is its own bytes."""

    def load(self, data: bytes | bytearray | memoryview) -> bytes:
        return bytes(data)


def connection_settings(dsn: str, name: str) -> dict[str, Any]:
    """Return psycopg's arguments for a session: the DSN's own settings win. Raises ConfigError."""
    given = parse_dsn(dsn)
    defaults = {"application_name": name, **_SETTINGS}
    return {
        **{key: value for key, value in defaults.items() if key not in given},
        "client_encoding": "utf8",
        "autocommit": True,
        "prepare_threshold": None,
    }


def _adapt(context: AdaptContext) -> None:
    register_arrays(context)
    context.adapters.register_loader("json", ByteaBinaryLoader)
    context.adapters.register_loader("json", _JsonTextLoader)


def first_line(error: psycopg.Error) -> str:
    """Return what an error says for a log: what follows may quote a row (DETAIL)."""
    return str(error).strip().partition("\n")[0]


@asynccontextmanager
async def brief_transaction(connection: AsyncConnection[Any]) -> AsyncIterator[None]:
    """A transaction that the server ends when we freeze in it: others need its locks."""
    async with connection.transaction():
        await connection.execute(_LIMIT, {"timeout_s": _STANDSTILL_S})
        yield


async def check_open(connection: AsyncConnection[Any]) -> None:
    """Raise OperationalError for a connection that the server has closed. Costs no round trip.

    Pools ask before they lend one, so that whoever gets it after a restart need not fail.
    """
    _read_what_came(connection.pgconn)


def check_open_blocking(connection: Connection[Any]) -> None:
    """Like `check_open`, in a thread."""
    _read_what_came(connection.pgconn)


def _read_what_came(connection: PGconn) -> None:
    for _ in range(2):  # its last words, then the end
        connection.consume_input()


async def knock_again(pool: AsyncConnectionPool[Any]) -> None:
    """Let a pool that has given up connecting try again while somebody waits for a connection.

    Its pauses double, up to five minutes if it is let: after an outage, whoever waits would go on
    waiting for as long as that had lasted. A request makes the pool try at once.
    """
    if pool.get_stats().get("requests_waiting"):
        with suppress(psycopg.OperationalError):  # nothing to be had yet
            async with pool.connection(_KNOCK_S):
                pass


def knock_again_blocking(pool: ConnectionPool[Any]) -> None:
    """Like `knock_again`, in a thread."""
    if pool.get_stats().get("requests_waiting"):
        with suppress(psycopg.OperationalError), pool.connection(_KNOCK_S):
            pass


async def prepare(connection: AsyncConnection[Any]) -> None:
    """Make a new connection one whose times the driver can read. Mostly no round trip."""
    if not _writes_iso(connection):
        await connection.execute(_ISO_DATES)


def _writes_iso(connection: AsyncConnection[Any] | Connection[Any]) -> bool:
    style = connection.pgconn.parameter_status(b"DateStyle")
    return style is None or style.startswith(b"ISO")


async def connect(dsn: str, name: str) -> AsyncConnection[Any]:
    """Open a session's connection once. Raises psycopg.OperationalError and ConfigError."""
    connection = await AsyncConnection.connect(dsn, **connection_settings(dsn, name))
    await prepare(connection)
    _adapt(connection)
    return connection


def connect_blocking(dsn: str, name: str) -> Connection[Any]:
    """Like `connect`, for a thread. Raises psycopg.OperationalError."""
    connection = Connection.connect(dsn, **connection_settings(dsn, name))
    if not _writes_iso(connection):
        connection.execute(_ISO_DATES)
    _adapt(connection)
    return connection


_TRANSIENT_CLASSES: Final = ("08", "25", "40", "53", "55", "57", "58")
"""SQLSTATE classes of a server that is away, read only, busy, full, shutting down or ill, and of
transactions that met others. The same statement can succeed later."""


def is_transient(error: psycopg.Error) -> bool:
    """Return whether a statement can succeed when it is sent again, as it is.

    Anything else is the fault of what was sent, or of the schema: sending it again is no help.
    """
    if error.sqlstate is None:  # of the driver: a lost connection, or a value that it cannot send
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate[:2] in _TRANSIENT_CLASSES


class Backoff:
    """Growing, jittered delays between attempts to reach the database."""

    def __init__(self) -> None:
        self._next_s = _FIRST_DELAY_S

    def delay_s(self) -> float:
        """Return how long to wait before the next attempt."""
        delay, self._next_s = self._next_s, min(self._next_s * 2, _LAST_DELAY_S)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - jitter is no secret

    def reset(self) -> None:
        """Start again: the database answered."""
        self._next_s = _FIRST_DELAY_S


class Session:
    """One connection for one part of a worker. Not for concurrent transactions."""

    def __init__(self, dsn: str, name: str, *, on_lost: Callable[[], None] | None = None) -> None:
        self._dsn, self.name = dsn, name
        self._on_lost = on_lost
        self._connection: AsyncConnection[Any] | None = None
        self._opening = asyncio.Lock()
        self._backoff = Backoff()

    async def connection(self) -> AsyncConnection[Any]:
        """Return the open connection, opening one (for as long as that takes) if there is none."""
        async with self._opening:
            while self._connection is None or self._connection.closed:
                await self.close()
                try:
                    self._connection = await connect(self._dsn, self.name)
                except psycopg.OperationalError as error:
                    _LOG.warning("%s: cannot connect: %s", self.name, error)
                    await asyncio.sleep(self._backoff.delay_s())
            return self._connection

    async def failed(self, error: psycopg.Error) -> None:
        """Take note that a statement failed, and wait a little: the next may work.

        The connection is given up; what was sent on it may or may not have been committed.
        """
        _LOG.warning("%s: %s: %s", self.name, type(error).__name__, first_line(error))
        await self.close()
        if self._on_lost is not None:
            self._on_lost()
        await asyncio.sleep(self._backoff.delay_s())

    def answered(self) -> None:
        """Take note that the database does what it is asked."""
        self._backoff.reset()

    async def insist(self, operation: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        """Run an operation that may safely run twice, again and again until it succeeds."""
        while True:
            connection = await self.connection()
            try:
                result = await operation(connection)
            except psycopg.Error as error:
                await self.failed(error)
            else:
                self.answered()
                return result

    async def close(self) -> None:
        """Close the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
