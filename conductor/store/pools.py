"""The few connections that the services of one process share (scheduler, dispatcher, gauges …).

In autocommit mode and without prepared statements, so that a pooler in between changes nothing.
Whoever borrows one opens its own transactions. This module must not know any query.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeAlias

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from conductor.store.sessions import connection_settings

Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[AsyncConnection[Any]]]
"""Lends a connection in autocommit mode: the method ``connection`` of a pool."""

_WAIT_S: Final = 10.0


def service_pool(dsn: str, size: int) -> AsyncConnectionPool[AsyncConnection[Any]]:
    """Return a pool of up to ``size`` connections, not opened yet."""
    return AsyncConnectionPool(
        dsn,
        kwargs=connection_settings(dsn, "conductor services"),
        min_size=1,
        max_size=size,
        open=False,
        timeout=_WAIT_S,
        name="conductor services",
    )
