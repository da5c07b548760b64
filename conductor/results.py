"""Waiting for jobs to end: one query at a time for all the jobs a process waits for.

The interval between two looks grows from 50 ms to 1 s while nothing ends, and starts again with a
new job. No NOTIFY, no connection held while waiting. A database that cannot be reached is waited
for; the caller's own timeout bounds that.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import from_json

from conductor.errors import ConductorError, JobCancelled, JobFailed, ResultGone, Retry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from conductor.enqueue import JobOutcome

FIRST_INTERVAL_S: Final = 0.05
LAST_INTERVAL_S: Final = 1.0
_GROWTH: Final = 1.5


class ResultPoller:
    """Waits for outcomes that ``fetch`` returns for a list of job ids."""

    def __init__(self, fetch: Callable[[Sequence[int]], Awaitable[list[JobOutcome]]]) -> None:
        self._fetch = fetch
        self._waiting: dict[int, list[asyncio.Future[JobOutcome]]] = {}
        self._may_appear: set[int] = set()
        self._woken = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def wait(self, job: int, *, committed: bool) -> bytes | None:
        """Return the job's stored result. Raises JobFailed, JobCancelled or ResultGone.

        A job that is not ``committed`` yet may be unknown until it is; else an unknown one is gone.
        """
        future: asyncio.Future[JobOutcome] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job, []).append(future)
        if not committed:
            self._may_appear.add(job)
        self._woken.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._poll(), name="conductor results")
            self._loop.add_done_callback(self._ended)
        try:
            return _result(await future)
        finally:
            self._forget(job, future)

    async def close(self) -> None:
        """Stop looking; who still waits is cancelled."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for futures in self._waiting.values():
            for future in futures:
                future.cancel()

    async def _poll(self) -> None:
        interval_s = FIRST_INTERVAL_S
        while self._waiting:
            if self._woken.is_set():
                self._woken.clear()
                interval_s = FIRST_INTERVAL_S
            try:
                await self._look()
            except ConductorError as error:
                if error.retry is not Retry.TIMED:
                    self._fail(error)
            await self._pause(interval_s)
            interval_s = min(interval_s * _GROWTH, LAST_INTERVAL_S)

    async def _pause(self, interval_s: float) -> None:
        try:
            async with asyncio.timeout(interval_s):
                await self._woken.wait()
        except TimeoutError:
            return
        await asyncio.sleep(FIRST_INTERVAL_S)  # so that many new waiters are one query

    async def _look(self) -> None:
        for outcome in await self._fetch(list(self._waiting)):
            if outcome.outcome is None and outcome.job in self._may_appear:
                continue
            for future in self._waiting.get(outcome.job, ()):
                if not future.done():
                    future.set_result(outcome)

    def _ended(self, loop: asyncio.Task[None]) -> None:
        """Nobody waits for ever because looking went wrong."""
        error = None if loop.cancelled() else loop.exception()
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        for futures in self._waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def _forget(self, job: int, future: asyncio.Future[JobOutcome]) -> None:
        futures = self._waiting[job]
        futures.remove(future)
        if not futures:
            del self._waiting[job]
            self._may_appear.discard(job)
            self._woken.set()


def _result(outcome: JobOutcome) -> bytes | None:
    job = outcome.job
    error: dict[str, Any] = from_json(outcome.error) if outcome.error else {}
    match outcome.outcome:
        case "completed":
            return None if outcome.result is None else outcome.result.encode()
        case "failed":
            raise JobFailed(job, error)
        case "cancelled":
            raise JobCancelled(f"job {job} was cancelled: {error.get('message', 'no reason')}")
        case _:
            raise ResultGone(f"job {job} has ended, or never was, and its history is not kept")
