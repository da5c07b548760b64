"""LISTEN as a hint: a notification names a queue that has new jobs, and its workers look at once.

One listener serves a process, on a connection of its own: receiving notifications holds it. A
hint that is lost costs nothing but time, for workers poll anyway. Give it a DSN that reaches the
server directly: a pooler in transaction mode does not pass notifications on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import psycopg

from conductor.sql import load
from conductor.store.sessions import Session

if TYPE_CHECKING:
    from collections.abc import Callable

_LISTEN: Final = load("workers")["listen"]


class Listener:
    """Tells subscribers of a queue that there is something in it."""

    def __init__(self, dsn: str) -> None:
        self._session = Session(dsn, "conductor listener")
        self._subscribers: dict[str, list[Callable[[], None]]] = {}

    def subscribe(self, queue: str, hint: Callable[[], None]) -> None:
        """Call ``hint`` for every notification of the queue, and after a lost connection."""
        self._subscribers.setdefault(queue, []).append(hint)

    def unsubscribe(self, queue: str, hint: Callable[[], None]) -> None:
        """Stop calling ``hint``."""
        self._subscribers[queue].remove(hint)

    async def run(self) -> None:
        """Listen until cancelled, across lost connections."""
        try:
            while True:
                connection = await self._session.connection()
                try:
                    await connection.execute(_LISTEN)
                    self._session.answered()
                    for queue in self._subscribers:
                        self._tell(queue)
                    async for notification in connection.notifies():
                        self._tell(notification.payload)
                except psycopg.Error as error:
                    await self._session.failed(error)
        finally:
            await self._session.close()

    def _tell(self, queue: str) -> None:
        for hint in self._subscribers.get(queue, ()):
            hint()
