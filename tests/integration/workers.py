"""Workers on a scratch database: handlers in, jobs in, history out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from inspect import iscoroutinefunction
from typing import Any

from psycopg.types.json import Json

from conductor.client import Conductor
from conductor.definitions import Task, define_task
from conductor.lease import Leases
from conductor.metrics import Metrics
from conductor.retry import RetryPolicy
from conductor.triggers import Invocable
from conductor.worker import Listener, Worker
from tests.integration.conftest import Queue

AT_ONCE = RetryPolicy(initial_s=0, max_s=0, jitter=0)


def task(
    handler: Callable[..., Any],
    *,
    name: str = "work",
    payload: Any = dict[str, Any],
    returns: Any = Any,
    **options: Any,
) -> Task[Any, Any]:
    """Bind a handler to an invocable task; retries come at once."""
    return Task(
        definition=define_task(name, payload=payload, returns=returns),
        triggers=(Invocable(),),
        handler=handler,
        is_sync=not iscoroutinefunction(handler),
        **{"retry": AT_ONCE, **options},
    )


class Workshop:
    """The workers of one process, and its queue."""

    def __init__(self, queue: Queue, metrics: Metrics) -> None:
        self.queue, self.metrics = queue, metrics
        self.dsn = queue.database.dsn
        self.client = Conductor(self.dsn)

    @asynccontextmanager
    async def worker(
        self,
        tasks: Iterable[Task[Any, Any]],
        *,
        leases: Leases | None = None,
        listen: bool = False,
        **options: Any,
    ) -> AsyncIterator[Worker]:
        """Run a worker of the queue ``default``; it drains at the end."""
        async with AsyncExitStack() as stack:
            if leases is None:
                leases = stack.enter_context(Leases(self.dsn))
            listener = Listener(self.dsn) if listen else None
            listening = asyncio.create_task(listener.run()) if listener else None
            worker = Worker(
                self.dsn,
                "default",
                {task.name: task for task in tasks},
                leases=leases,
                metrics=self.metrics,
                port=self.client,
                listener=listener,
                **options,
            )
            running = asyncio.create_task(worker.run())
            ready = asyncio.create_task(worker.ready.wait())
            await asyncio.wait([running, ready], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            try:
                yield worker
            finally:
                worker.stop()
                await running
                if listening is not None:
                    listening.cancel()
                    await asyncio.gather(listening, return_exceptions=True)

    async def invoke(self, payload: Any = None, *, name: str = "work", **columns: Any) -> int:
        """Put one job into the queue; returns its id."""
        (job,) = await self.invoke_many([payload], name=name, **columns)
        return job

    async def invoke_many(
        self, payloads: Iterable[Any], *, name: str = "work", **columns: Any
    ) -> list[int]:
        """Put jobs into the queue; returns their ids."""
        names = ", ".join(columns)
        holders = ", ".join(["%s"] * len(columns))
        return await self.queue.column(
            f"insert into conductor.jobs (queue, task, payload{', ' if names else ''}{names})"
            f" select 'default', %s, p{', ' if names else ''}{holders}"
            " from json_array_elements(%s) with ordinality as e (p, n) order by n returning id",
            name,
            *columns.values(),
            Json([{} if payload is None else payload for payload in payloads]),
        )

    async def job(self, job: int) -> dict[str, Any]:
        """Return a job, alive or finished."""
        (row,) = await self.queue.rows("select * from conductor.job where id = %s", job)
        return row

    async def ended(self, job: int) -> dict[str, Any]:
        """Wait until a job has ended; return it."""
        await self.queue.until("select exists (select from conductor.history where id = %s)", job)
        return await self.job(job)

    async def drained(self) -> None:
        """Wait until no job is left."""
        await self.queue.until("select count(*) = 0 from conductor.jobs")
