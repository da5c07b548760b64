"""A piece of work that a process repeats until it stops, whatever happens to the database.

The work says after how many seconds it wants to run again and may be woken earlier. A lost
connection is not the end: the work is tried again after a jittered, growing pause. This module
must not know what the work is.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import psycopg

from conductor.errors import ConductorError, DatabaseUnavailable, LoginRefused
from conductor.metrics import FAILURES, RECONNECTS, Metrics

CONNECTION_LOST: Final = (
    DatabaseUnavailable,
    LoginRefused,
    psycopg.OperationalError,
    psycopg.InterfaceError,
)
"""What a statement raises when the server or the network has gone away, or shut us out."""

_PAUSE_INITIAL_S: Final = 0.1
_PAUSE_MAX_S: Final = 5.0

_log = logging.getLogger("conductor")


class Periodic:
    """Runs ``work`` again and again; one pass at a time.

    Args:
        part: the name of this part of the process, for logs and metrics.
        work: one pass; returns the seconds until the next.

    >>> ticks = Periodic("scheduler", scheduler.tick, metrics)  # doctest: +SKIP
    >>> await ticks.run()  # doctest: +SKIP
    """

    def __init__(self, part: str, work: Callable[[], Awaitable[float]], metrics: Metrics) -> None:
        self._part = part
        self._work = work
        self._reconnects = metrics.get(RECONNECTS, part)
        self._failures = metrics.get(FAILURES, part)
        self._stopped = asyncio.Event()
        self._wake = asyncio.Event()
        self._pause_s = _PAUSE_INITIAL_S

    async def run(self) -> None:
        """Repeat until `stop`; never raises for what a pass raises."""
        while not self._stopped.is_set():
            self._wake.clear()
            await self._sleep(await self._pass())

    def wake(self) -> None:
        """Let the next pass begin now."""
        self._wake.set()

    def stop(self) -> None:
        """End after the pass that is running."""
        self._stopped.set()
        self._wake.set()

    async def _pass(self) -> float:
        try:
            delay_s = await self._work()
        except CONNECTION_LOST as error:
            self._reconnects.inc()
            _log.warning("%s lost its connection and will go on: %s", self._part, _line(error))
        except Exception as error:  # noqa: BLE001 - a part that ended silently would be worse
            self._failures.inc()
            is_bug = not isinstance(error, ConductorError)
            _log.error(
                "%s failed and will be tried again: %s", self._part, _line(error), exc_info=is_bug
            )
        else:
            self._pause_s = _PAUSE_INITIAL_S
            return delay_s
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
        self._pause_s = min(self._pause_s * 2, _PAUSE_MAX_S)
        return pause_s

    async def _sleep(self, delay_s: float) -> None:
        if delay_s <= 0 or self._stopped.is_set():
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), delay_s)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
