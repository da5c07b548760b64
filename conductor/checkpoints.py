"""Steps of many jobs, written in groups: each await returns only after its own commit.

While one commit is under way, the steps that finish meanwhile gather and go with the next, so that
a thousand concurrent jobs cost a few commits. A write is fenced against its job's row; a lost
connection is retried until the database has answered, which the fence makes safe. This module
must not know what a step means.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from conductor.errors import FenceLost
from conductor.store.jobs import JobStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from conductor.store.jobs import StepWrite, StoredStep
    from conductor.store.sessions import Session

_MAX_BATCH: Final = 500

Written = "asyncio.Future[datetime | None]"
Loaded = "asyncio.Future[list[StoredStep]]"


class Checkpoints:
    """The step log of one worker.

    Args:
        session: a connection of its own.
        worker: returns the worker's current id, which the writes are fenced with.
        on_written: told how many steps a commit has written.
    """

    def __init__(
        self, session: Session, worker: Callable[[], int], on_written: Callable[[int], None]
    ) -> None:
        self._session, self._worker, self._on_written = session, worker, on_written
        self._writes: deque[tuple[StepWrite, asyncio.Future[datetime | None]]] = deque()
        self._loads: dict[int, asyncio.Future[list[StoredStep]]] = {}
        self._wanted = asyncio.Event()

    async def write(self, step: StepWrite) -> datetime | None:
        """Write a step; return its wake_at once it is committed. Raises FenceLost."""
        future: asyncio.Future[datetime | None] = asyncio.get_running_loop().create_future()
        self._writes.append((step, future))
        self._wanted.set()
        return await future

    async def load(self, job: int) -> list[StoredStep]:
        """Return what earlier runs of the job have written."""
        future = self._loads.get(job)
        if future is None:
            future = self._loads[job] = asyncio.get_running_loop().create_future()
            self._wanted.set()
        return await asyncio.shield(future)

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                await self._serve_loads()
                await self._serve_writes()
        finally:
            await self._session.close()

    async def _serve_loads(self) -> None:
        if not self._loads:
            return
        loads, self._loads = self._loads, {}
        steps = await self._session.insist(
            lambda connection: JobStore(connection).load_steps(loads)
        )
        for job, future in loads.items():
            if not future.done():
                future.set_result(steps.get(job, []))

    async def _serve_writes(self) -> None:
        if not self._writes:
            return
        batch = [self._writes.popleft() for _ in range(min(len(self._writes), _MAX_BATCH))]
        if self._writes:
            self._wanted.set()
        steps = [step for step, _ in batch]
        written = await self._session.insist(
            lambda connection: JobStore(connection).write_steps(self._worker(), steps)
        )
        self._on_written(len(written))
        for step, future in batch:
            if future.done():  # its handler has been cancelled meanwhile
                continue
            key = step.job, step.name
            if key in written:
                future.set_result(written[key])
            else:
                future.set_exception(FenceLost(f"job {step.job} is no longer this worker's"))
