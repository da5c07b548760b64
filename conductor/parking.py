"""Parking: when a run is put away, and how its handler is kept from going on until then.

A durable wait parks on a future that never resolves. Once every open await of the context is a
durable wait, and the handler has come to rest, the run is suspended: its slot is free, and it runs
again from the top when what it waits for has come. This module must not know what a step is for.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, NoReturn

from conductor.errors import JobCancelled

if TYPE_CHECKING:
    from datetime import datetime

    from conductor.job import JobInfo
    from conductor.store.steps import StoredStep

_QUIET_ROUNDS: Final = 32  # turns of the event loop without an await of the context


class Parkable(ABC):
    """A run that can be put away while it waits. Every await of the context enters and leaves it.

    `suspend` is called once only durable waits are open.
    """

    __slots__ = (
        "_checking",
        "_held",
        "_open",
        "_parked",
        "_rounds",
        "cancelled",
        "info",
        "leaving",
    )

    def __init__(self, info: JobInfo) -> None:
        self.info = info
        self.cancelled = False
        self.leaving = False  # put away, given back or another worker's: nothing more is begun
        self._open = 0  # awaits of the context, parked ones included
        self._parked: list[StoredStep] = []
        self._held: set[asyncio.Task[Any]] = set()
        self._checking = False
        self._rounds = 0

    @abstractmethod
    def suspend(self, wake_at: datetime | None, *, waits: bool) -> None:
        """End the run here; it goes on at ``wake_at``, or (``waits``) when something comes."""

    async def stay(self) -> None:
        """Raise CancelledError, as the handler's await did, in a run that is being left.

        A ``finally`` of the handler must not do for good what belongs after its wait.
        """
        if self.leaving:
            await asyncio.sleep(0)  # where a cancellation that is under way arrives
            raise asyncio.CancelledError

    def enter(self) -> None:
        """An await of the context begins."""
        self._open += 1
        self._rounds = _QUIET_ROUNDS

    def leave(self) -> None:
        """An await of the context ends."""
        self._open -= 1
        self._rounds = _QUIET_ROUNDS
        if self._parked:
            self._check_later()

    async def park(self, step: StoredStep) -> NoReturn:
        """Wait until the worker puts the job away. Raises JobCancelled in one that ends."""
        self.check_waits(step.name)
        self._parked.append(step)
        self._check_later()
        try:
            await self.hold()
        finally:
            self._parked.remove(step)

    async def hold(self) -> NoReturn:
        """Wait to be cancelled, by the worker or with the end of the run."""
        task = asyncio.current_task()
        if task is not None:
            self._held.add(task)
        try:
            while True:
                await self.stay()
                await asyncio.get_running_loop().create_future()
        finally:
            if task is not None:
                self._held.discard(task)

    def let_go(self) -> None:
        """The run is being left: its waits end, those too that nobody cancels."""
        self._rounds = _QUIET_ROUNDS
        if self._parked:
            self._check_later()

    def check_waits(self, name: str) -> None:
        """Raise JobCancelled where a wait would never end: the job, or its attempt, ends here."""
        if self.cancelled and not self.leaving:
            raise JobCancelled(
                f"job {self.info.id} is to stop: nothing can be waited for, as {name!r} would",
                hint="Clean up with steps; what takes longer, begin with ctx.start.",
            )

    def end(self) -> None:
        """The run is over: what is left of the handler's tasks ends where it awaits the context."""
        self.leaving = True
        for task in self._held:
            task.cancel()

    def _check_later(self) -> None:
        """See whether only durable waits are open, once the handler has come to rest.

        What has just returned to it may open another await some turns of the event loop later.
        """
        if not self._checking:
            self._checking = True
            self._check()

    def _check(self) -> None:
        if self._rounds:
            self._rounds -= 1
            asyncio.get_running_loop().call_soon(self._check)
            return
        self._checking = False
        if not self._parked or self._open != len(self._parked):
            return
        if self.cancelled:
            for task in self._held:
                task.cancel()
        else:
            wake_ats = [step.wake_at for step in self._parked if step.wake_at is not None]
            self.suspend(
                min(wake_ats, default=None), waits=any(s.kind != "sleep" for s in self._parked)
            )
