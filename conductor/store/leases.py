"""Leases of workers: registering, renewing, watching, and taking over from the dead.

Registering and retiring are the worker's own, on its event loop. Renewing and watching run in a
thread with a blocking connection, so that a busy loop does not look dead. Who is dead is the
caller's to decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from orjson import loads

from conductor.sql import load
from conductor.store.arrays import TextArray, literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from psycopg import AsyncConnection, Connection

_QUERIES: Final = load("workers")
_REGISTER: Final = _QUERIES["register_worker"]
_DRAIN: Final = _QUERIES["drain_worker"]
_RETIRE: Final = _QUERIES["retire_worker"]
_OFFERED: Final = _QUERIES["offered_by"]
_RENEW: Final = _QUERIES["renew_leases"]
_WATCH: Final = _QUERIES["watch_leases"]
_DECLARE_DEAD: Final = _QUERIES["declare_dead"]
_RESCUE: Final = _QUERIES["rescue_jobs"]
_BURY: Final = _QUERIES["bury_worker"]


Ended = tuple[str, str, str]
"""Queue, task and outcome of jobs that were ended for their dead worker."""


@dataclass(frozen=True, slots=True)
class Rescue:
    """What was taken from a dead worker: jobs that run again, and those that ended, by kind."""

    rescued: int
    ended: Mapping[Ended, int]


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """How a worker describes itself."""

    app: str
    version: str | None
    queue: str
    tasks: Sequence[str]
    host: str
    pid: int
    slots: int


class WorkerStore:
    """A worker's own row, on its event loop."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def register(self, row: WorkerRow) -> int:
        """Insert the worker's row; return its id."""
        parameters = {
            "app": row.app,
            "version": row.version,
            "queue": row.queue,
            "tasks": TextArray(row.tasks),
            "host": row.host,
            "pid": row.pid,
            "slots": row.slots,
        }
        cursor = await self._connection.execute(_REGISTER, parameters)
        ((worker,),) = await cursor.fetchall()
        return int(worker)

    async def drain(self, worker: int) -> None:
        """Note that the worker claims no more."""
        await self._connection.execute(_DRAIN, {"worker": worker})

    async def is_offered(self, app: str | None, version: str | None, task: str) -> bool:
        """Return whether a task's jobs of this version have somebody to wait for.

        A live worker of it, or the newest version, which may be about to start.
        """
        values = {"app": app, "version": version, "task": task}
        cursor = await self._connection.execute(_OFFERED, values)
        return await cursor.fetchone() is not None

    async def retire(self, worker: int) -> None:
        """Delete the worker's row, unless jobs are still running under it."""
        await self._connection.execute(_RETIRE, {"worker": worker})


class LeaseStore:
    """Everybody's rows, from the lease thread."""

    def __init__(self, connection: Connection[Any]) -> None:
        self._connection = connection

    def renew(self, workers: Iterable[int]) -> set[int]:
        """Renew the leases of this process' workers; return those that still had one."""
        rows = self._connection.execute(_RENEW, {"workers": literal(workers)}).fetchall()
        return {worker for (worker,) in rows}

    def watch(self) -> dict[int, int]:
        """Return every worker's renewal counter."""
        return dict(self._connection.execute(_WATCH).fetchall())

    def declare_dead(self, worker: int, renewals: int) -> bool:
        """Declare a worker dead whose counter still is ``renewals``; False when it is not."""
        parameters = {"worker": worker, "renewals": renewals}
        return self._connection.execute(_DECLARE_DEAD, parameters).fetchone() is not None

    def rescue(self, worker: int, *, limit: int, max_crashes: int) -> Rescue:
        """Take up to ``limit`` jobs from a dead worker."""
        parameters = {"worker": worker, "limit": limit, "max_crashes": max_crashes}
        row = self._connection.execute(_RESCUE, parameters).fetchone()
        rescued, ended, *_ = row or (0, b"[]")
        return Rescue(rescued, {(q, t, outcome): jobs for q, t, outcome, jobs in loads(ended)})

    def bury(self, worker: int) -> bool:
        """Delete a dead worker's row once nothing is left to it; False while something is."""
        return self._connection.execute(_BURY, {"worker": worker}).fetchone() is not None
