"""Where the handlers write what they did: one row a job, keyed by the job's idempotency key.

Handlers run many at a time, so their rows are committed in groups: each `record` returns only after
its own row is durable. A row that is there already is a second delivery, and is counted as one.
"""

import asyncio

import psycopg

from examples.shop.statements import STATEMENTS


class Ledger:
    """Records handled jobs over one connection, opened when first needed.

    Example:
        await ledger.record(ctx.job.idempotency_key, ctx.job.id, ctx.job.task)
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: psycopg.AsyncConnection | None = None
        self._waiting: dict[str, tuple[int, str, asyncio.Future[None]]] = {}
        self._writer: asyncio.Task[None] | None = None

    async def record(self, key: str, job: int, task: str) -> None:
        """Write one row and return when it is committed.

        Raises:
            psycopg.Error: it was not; the job should be tried again.
        """
        if key in self._waiting:  # the same job twice in one group: one row can hold it
            return await asyncio.shield(self._waiting[key][2])
        future = asyncio.get_running_loop().create_future()
        self._waiting[key] = (job, task, future)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_groups())
        return await asyncio.shield(future)

    async def _write_groups(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, {}
            try:
                await self._write(group)
            except (psycopg.Error, OSError) as error:
                outcome: Exception | None = error
            else:
                outcome = None
            for _, _, future in group.values():
                if outcome is None:
                    future.set_result(None)
                else:
                    future.set_exception(outcome)
                    future.exception()  # its handler may be gone: then nobody else reads it

    async def _write(self, group: dict[str, tuple[int, str, asyncio.Future[None]]]) -> None:
        if self._connection is None or self._connection.closed:
            self._connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
        rows = {
            "keys": list(group),
            "jobs": [job for job, _, _ in group.values()],
            "tasks": [task for _, task, _ in group.values()],
        }
        await self._connection.execute(STATEMENTS["record_deliveries"], rows)
