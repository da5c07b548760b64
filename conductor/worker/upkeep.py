"""What a worker does besides its jobs: cancellations, and making jobs ready whose time has come.

Runs on a connection of its own, so that neither waits for the hot path. Every worker promotes the
due jobs of all queues and wakes those that something has come for, where whoever brought it could
not; rows another one is at are skipped.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Final

import psycopg

from conductor.store.jobs import JobStore
from conductor.worker.claiming import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

    from conductor.store.jobs import Promotion
    from conductor.store.sessions import Session
    from conductor.worker.slots import Slots

PROMOTE_BATCH: Final = 1000
WAKE_BATCH: Final = 1000
PROMOTE_INTERVAL_S: Final = 0.25  # while something is due within a minute
IDLE_INTERVAL_S: Final = 1.0
CANCEL_INTERVAL_S: Final = 0.5
_SHORTEST_S: Final = 0.005
_LOOK_BACK: Final = timedelta(seconds=10)


class Upkeep:
    """The upkeep of one worker.

    Args:
        worker: returns the worker's current id.
        hint: told the queue that jobs have become ready in.
    """

    def __init__(
        self,
        session: Session,
        queue: str,
        slots: Slots,
        worker: Callable[[], int],
        hint: Callable[[str], None],
    ) -> None:
        self._session, self._queue, self._slots = session, queue, slots
        self._worker, self._hint = worker, hint
        self._cancel_due_s = 0.0
        self._full = Pace(1.0, float("inf"))
        self._reached: datetime | None = None  # what was due before has been promoted

    async def run(self) -> None:
        """Tick until cancelled."""
        try:
            while True:
                connection = await self._session.connection()
                try:
                    store = JobStore(connection)
                    await self._cancel(store)
                    await self._wake(store)
                    pause_s = await self._promote(store)
                except psycopg.Error as error:
                    await self._session.failed(error)
                else:
                    self._session.answered()
                    await asyncio.sleep(pause_s)
        finally:
            await self._session.close()

    async def _cancel(self, store: JobStore) -> None:
        now = monotonic()
        if now < self._cancel_due_s or self._slots.is_idle:
            return
        self._cancel_due_s = now + CANCEL_INTERVAL_S
        for job, fence, reason in await store.cancelled(self._worker()):
            self._slots.cancel(job, fence, reason)

    async def _wake(self, store: JobStore) -> None:
        jobs = await store.to_wake(WAKE_BATCH)
        if jobs:
            for queue in await store.wake(jobs):
                self._hint(queue)

    async def _promote(self, store: JobStore) -> float:
        """Promote what is due; return the seconds until the next look."""
        started_s = monotonic()
        full = started_s >= self._full.due_s or self._reached is None
        after = None if full or self._reached is None else self._reached - _LOOK_BACK
        promotion = await store.promote(after, PROMOTE_BATCH)
        if promotion.promoted:
            self._hint(self._queue)
        if promotion.promoted >= PROMOTE_BATCH:
            return 0.0
        self._reached = promotion.promoted_at
        if full:
            ended_s = monotonic()
            self._full.ran(ended_s, ended_s - started_s)
        return self._pause_s(promotion)

    def _pause_s(self, promotion: Promotion) -> float:
        if promotion.next_due_s is None:
            return IDLE_INTERVAL_S if self._slots.is_idle else PROMOTE_INTERVAL_S
        return min(max(promotion.next_due_s, _SHORTEST_S), PROMOTE_INTERVAL_S)
