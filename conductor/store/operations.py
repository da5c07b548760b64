"""What operators ask of the queue and do to it: one method per named query."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import dict_row, scalar_row
from psycopg.types.json import Json

from conductor import sql

_QUERIES: Final = sql.load("operations")
_LIMIT_READING: Final = sql.load("overview")["limit_reading"]
_READING_TIMEOUT_S: Final = 30.0

Row = dict[str, Any]
"""One row by column, in JSON's types."""


class OperationStore:
    """The operators' queries on one connection."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def list_jobs(
        self, *, queue: str | None, task: str | None, state: str | None, limit: int
    ) -> list[Row]:
        """Return the newest jobs, alive or ended; a filter that is None takes all."""
        values = {"queue": queue, "task": task, "state": state, "limit": limit}
        return await self._column("list_jobs", values)

    async def list_schedules(self, *, task: str | None, limit: int) -> list[Row]:
        """Return schedules, of one task or all, the next first."""
        return await self._column("list_schedules", {"task": task, "limit": limit})

    async def show_job(self, job: int) -> Row | None:
        """Return everything about one job; None when it is unknown or forgotten."""
        found: Row | None = await self._scalar("show_job", {"id": job})
        return found

    async def show_steps(self, job: int) -> list[Row]:
        """Return the steps of a job that is alive, in the order in which they were written."""
        return await self._column("show_steps", {"id": job})

    async def ended_job(self, job: int) -> tuple[str, Any] | None:
        """Return outcome and metadata of a job that has ended; None when there is no such job."""
        rows = await self._rows("ended_job", {"id": job})
        return (rows[0]["outcome"], rows[0]["metadata"]) if rows else None

    async def retry_job(self, job: int, metadata: dict[str, Any]) -> tuple[int, str] | None:
        """Enqueue a failed or cancelled job again; returns the new job's id and queue."""
        rows = await self._rows("retry_job", {"id": job, "metadata": Json(metadata)})
        return (rows[0]["id"], rows[0]["queue"]) if rows else None

    async def cancel_job(self, job: int, reason: str | None) -> bool:
        """Cancel a job; true when it had not ended yet."""
        return bool(await self._scalar("cancel_job", {"id": job, "reason": reason}))

    async def halted_lanes(self, task: str | None, limit: int) -> list[Row]:
        """Return halted lanes, of one task or all; ``parked`` is counted up to 1001."""
        return await self._column("halted_lanes", {"task": task, "limit": limit})

    async def resume_lane(self, task: str, key: str) -> bool:
        """Let a halted lane go on; true when it was halted."""
        return bool(await self._scalar("resume_lane", {"task": task, "key": key}))

    async def count_halted_lanes(self, bound: int) -> dict[str, int]:
        """Return how many lanes of each queue are halted, counted up to ``bound``."""
        cursor = await self._connection.execute(_QUERIES["count_halted_lanes"], {"bound": bound})
        return dict(await cursor.fetchall())

    async def invoke_task(
        self,
        task: str,
        payload: str,
        *,
        run_at: datetime | None,
        priority: int,
        key: str | None,
        dedupe_key: str | None,
    ) -> int | None:
        """Enqueue a job of a registered task; None when the dedupe key is taken."""
        values = {
            "task": task,
            "payload": payload,
            "run_at": run_at,
            "priority": priority,
            "key": key,
            "dedupe_key": dedupe_key,
        }
        job: int | None = await self._scalar("invoke_task", values)
        return job

    async def emit_event(self, event: str, payload: str) -> int:
        """Enqueue the dispatch of an event; returns the dispatch job's id."""
        job: int = await self._scalar("emit_event", {"event": event, "payload": payload})
        return job

    async def task_queue(self, task: str) -> str | None:
        """Return the queue of a registered task; None when it is not registered."""
        queue: str | None = await self._scalar("task_queue", {"task": task})
        return queue

    async def task_names(self) -> list[str]:
        """Return the names of all registered tasks."""
        return await self._column("task_names")

    async def event_names(self) -> list[str]:
        """Return the names of all registered events."""
        return await self._column("event_names")

    async def queue_names(self) -> list[str]:
        """Return the names of all queues."""
        return await self._column("queue_names")

    async def count_jobs(self, bound: int) -> list[tuple[str, str, int]]:
        """Return (queue, state, jobs), counted up to ``bound``; every queue has a ready row."""
        cursor = await self._connection.execute(_QUERIES["count_jobs"], {"bound": bound})
        return await cursor.fetchall()

    async def oldest_due(self, dead: Collection[int], bound: int) -> dict[str, float]:
        """Return since when each queue's oldest work could run, in Unix seconds.

        Jobs, those that wait for a worker to mark them ready or to rescue them from a ``dead`` one
        included, and schedules; not parked jobs. Queues with nothing due are left out.
        """
        values = {"dead": list(dead), "bound": bound}
        async with self._connection.transaction():
            await self._connection.execute(_LIMIT_READING, {"timeout_s": _READING_TIMEOUT_S})
            cursor = await self._connection.execute(_QUERIES["oldest_due"], values)
            return dict(await cursor.fetchall())

    async def first_calls(self, positions: Mapping[str, int]) -> list[tuple[str, int, float]]:
        """Return (queue, first call of a lane at or after its position, Unix time)."""
        values = {"queues": list(positions), "positions": list(positions.values())}
        cursor = await self._connection.execute(_QUERIES["first_calls"], values)
        return await cursor.fetchall()

    async def first_words(self, bound: int) -> list[tuple[str, int, float]]:
        """Return (queue, first word for a job that nobody has told it, Unix time)."""
        cursor = await self._connection.execute(_QUERIES["first_words"], {"bound": bound})
        return await cursor.fetchall()

    async def list_leases(self) -> list[tuple[int, str, int]]:
        """Return (worker, queue, renewals) of every worker that has a row."""
        cursor = await self._connection.execute(_QUERIES["list_leases"])
        return await cursor.fetchall()

    async def oldest_xmin(self) -> int:
        """Return the age, in transactions, of what keeps dead rows longest, as this role sees."""
        age: int = await self._scalar("oldest_xmin", {})
        return age

    async def has_unfinished(self, tasks: Collection[tuple[str, str]]) -> bool:
        """Return whether one of these (queue, task) has a job that runs or could, or gets one."""
        values = {"queues": [queue for queue, _ in tasks], "tasks": [task for _, task in tasks]}
        return bool(await self._scalar("has_unfinished", values))

    async def unfinished(self, tasks: Collection[tuple[str, str]]) -> list[Row]:
        """Return ``task``, ``state`` and number of ``jobs`` that are such jobs."""
        values = {"queues": [queue for queue, _ in tasks], "tasks": [task for _, task in tasks]}
        return await self._rows("unfinished_jobs", values)

    async def _rows(self, query: str, values: Row) -> list[Row]:
        cursor = self._connection.cursor(row_factory=dict_row)
        await cursor.execute(_QUERIES[query], values)
        return await cursor.fetchall()

    async def _column(self, query: str, values: Row | None = None) -> list[Any]:
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES[query], values)
        return await cursor.fetchall()

    async def _scalar(self, query: str, values: Row) -> Any:
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES[query], values)
        return await cursor.fetchone()
