"""Whether a pooler lends the queue's backends to other clients between our transactions.

The sink sets its session to commit asynchronously and stores the PID of its backend, so that its
successor can end it. Behind a pooler in transaction mode, strangers would commit asynchronously
and lose their connection. Nothing here changes anything.
"""

import asyncio
from typing import Final

from cdc import queries
from cdc.connection import Connection, queue_errors
from cdc.errors import CdcError, ConfigError, QueueUnavailable

_ROUNDS: Final = 3
"""In a busy pool the backend that was just given back may have gone to somebody else."""

_WAIT_S: Final = 5.0


async def find_shared_backend(one: Connection, other: Connection) -> CdcError | None:
    """Return why these connections to the queue database must not be used; None when they may.

    Args:
        one: a connection with nothing open on it.
        other: another one with the same connection string, with nothing open on it.
    """
    with queue_errors():
        if await _pid(one) == one.info.backend_pid:
            return None  # as the server said when we connected: nobody is in between
        for _ in range(_ROUNDS):
            if await _is_lent(one, other):
                return ConfigError(
                    "CDC_QUEUE_DSN leads through a pooler in transaction mode",
                    hint="give cdc a way to the server itself, or through a pool in session mode "
                    "(docs/postgres/pgbouncer.md)",
                )
    return None


async def _is_lent(one: Connection, other: Connection) -> bool:
    """Tell whether `one` loses its backend to `other`, or waits for one while `other` holds it."""
    before = await _pid(one)
    try:
        async with asyncio.timeout(_WAIT_S), other.transaction():
            if await _pid(other) == before:
                return True
            try:
                async with asyncio.timeout(_WAIT_S / 2):
                    return await _pid(one) != before
            except TimeoutError:
                return True
    except TimeoutError:
        raise QueueUnavailable("the pooler of CDC_QUEUE_DSN has no connection to spare") from None


async def _pid(connection: Connection) -> int:
    cursor = await connection.execute(queries.BACKEND_PID)
    row = await cursor.fetchone()
    return int(row["pid"]) if row else 0
