"""Telling waiting workers about new jobs, at a bounded rate.

NOTIFY makes commits wait for each other, so it is sent after the commit, alone, and at most once an
interval for a queue; what comes in between is told at the interval's end. Workers also poll: a lost
hint costs latency, never a job.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from conductor.errors import ConductorError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

INTERVAL_S: Final = 0.02
CLOSE_TIMEOUT_S: Final = 1.0


class QueueHints:
    """Sends hints through ``send``. Belongs to one event loop."""

    def __init__(self, send: Callable[[str], Awaitable[None]]) -> None:
        self._send = send
        self._queues: dict[str, bool] = {}  # in their interval; true: something came since
        self._tasks: set[asyncio.Task[None]] = set()

    def after_commit(self, queue: str) -> None:
        """Hint the queue now, or at the end of the interval that runs."""
        if queue in self._queues:
            self._queues[queue] = True
            return
        self._queues[queue] = True
        task = asyncio.create_task(self._serve(queue), name=f"conductor hint {queue}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Let hints under way finish, unless the database keeps them waiting."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def _serve(self, queue: str) -> None:
        try:
            while self._queues[queue]:
                self._queues[queue] = False
                await self._send(queue)
                await asyncio.sleep(INTERVAL_S)
        except ConductorError:
            return  # the database went away: its workers poll when it is back
        finally:
            del self._queues[queue]
