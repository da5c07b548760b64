"""A handler's own writes and the end of its step, in one transaction of the queue database.

The job's row is locked by the last statement before the commit, so that a slow transaction keeps
nobody from rescuing or cancelling the job; one whose job is another worker's by then is rolled
back. The server ends a transaction that is idle longer than a lease would last. Connections are
opened when needed. This module must not know what a step means.
"""

from __future__ import annotations

import asyncio
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from conductor.errors import FenceLost
from conductor.replay import inside
from conductor.sql import load
from conductor.store.arrays import register_arrays
from conductor.store.sessions import (
    RECONNECT_S,
    check_open,
    check_open_blocking,
    connection_settings,
    knock_again,
    knock_again_blocking,
    prepare,
)
from conductor.store.steps import write_statement

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg import AsyncConnection, Connection

    from conductor.store.steps import StepWrite

IDLE_SHARE: Final = 0.75  # of the time after which a worker is declared dead
MAX_CONNECTIONS: Final = 20  # unless somebody asks for more
_WAIT_S: Final = 600.0  # for a connection: others' transactions go first
_CLOSING_S: Final = 2.0  # for threads of the pool that are just connecting

_LIMIT: Final = load("steps")["limit_idle"]


class CommitUnknown(Exception):  # noqa: N818 - says what happened; never seen by a handler
    """The connection was lost while committing: nobody knows whether it was. ``cause`` says why."""

    def __init__(self, cause: psycopg.Error) -> None:
        super().__init__()
        self.cause = cause


class Transactions:
    """The transactions of one worker's handlers.

    Args:
        size: how many at once; more wait for one to end.
        worker: returns the worker's current id, which the writes are fenced with.
        dead_after_s: how long a lease lasts.
    """

    def __init__(
        self, dsn: str, size: int, worker: Callable[[], int], *, dead_after_s: float
    ) -> None:
        self._dsn, self._worker, self._size = dsn, worker, size
        self._limit = {"timeout_s": dead_after_s * IDLE_SHARE}
        self._pool: AsyncConnectionPool[AsyncConnection[Any]] | None = None
        self._blocking: ConnectionPool[Connection[Any]] | None = None
        self._opening = Lock()  # threads come together

    async def run(
        self, step: StepWrite, work: Callable[[AsyncConnection[Any]], Awaitable[bytes]]
    ) -> bytes:
        """Do ``work``, write the step with the document it returns, commit, return the document.

        Raises FenceLost and CommitUnknown.
        """
        if self._pool is None:
            self._pool = AsyncConnectionPool(
                self._dsn,
                open=False,
                configure=prepare,
                check=check_open,
                reconnect_failed=knock_again,
                **self._options(),
            )
            await self._pool.open()
        committing = False
        async with self._pool.connection() as connection:
            register_arrays(connection)
            connection.row_factory = tuple_row  # others may have wanted other rows
            try:
                async with connection.transaction():
                    await connection.execute(_LIMIT, self._limit)
                    with inside("a transaction"):
                        step.result = await work(connection)
                    cursor = await connection.execute(*write_statement(self._worker(), [step]))
                    _check(step, written=await cursor.fetchone())
                    committing = True
            except psycopg.OperationalError as error:
                if committing:
                    raise CommitUnknown(error) from error
                raise
        return step.result or b"null"

    def run_blocking(self, step: StepWrite, work: Callable[[Connection[Any]], bytes]) -> bytes:
        """Like `run`, in a thread."""
        with self._opening:
            if self._blocking is None:
                self._blocking = ConnectionPool(
                    self._dsn,
                    open=True,
                    check=check_open_blocking,
                    reconnect_failed=knock_again_blocking,
                    **self._options(),
                )
        committing = False
        with self._blocking.connection() as connection:
            register_arrays(connection)
            connection.row_factory = tuple_row
            try:
                with connection.transaction():
                    connection.execute(_LIMIT, self._limit)
                    with inside("a transaction"):
                        step.result = work(connection)
                    cursor = connection.execute(*write_statement(self._worker(), [step]))
                    _check(step, written=cursor.fetchone())
                    committing = True
            except psycopg.OperationalError as error:
                if committing:
                    raise CommitUnknown(error) from error
                raise
        return step.result or b"null"

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            await self._pool.close()
        if self._blocking is not None:
            await asyncio.to_thread(self._blocking.close, timeout=_CLOSING_S)

    def _options(self) -> dict[str, Any]:
        return {
            "kwargs": connection_settings(self._dsn, "conductor transactions"),
            "min_size": 0,
            "max_size": self._size,
            "timeout": _WAIT_S,
            "reconnect_timeout": RECONNECT_S,
        }


def _check(step: StepWrite, *, written: object) -> None:
    if written is None:
        raise FenceLost(f"job {step.job} is no longer this worker's")
