"""Steps of many jobs, written in groups: each await returns only after its own commit.

While one commit is under way, the steps that finish meanwhile gather and go with the next, so that
a thousand concurrent jobs cost a few commits. A write is fenced against its job's row; while the
database is away or busy it is sent again, which the fence makes safe. What the database refuses
for another reason fails the attempt that asked for it, and no other. This module must not know
what a step means.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg

from conductor.errors import FenceLost, StepRefused
from conductor.store.sessions import is_transient
from conductor.store.steps import Call, StepStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from psycopg import AsyncConnection

    from conductor.store.sessions import Session
    from conductor.store.steps import StoredStep, Write, Written

    _Waiting = tuple[Write, asyncio.Future[StoredStep]]

T = TypeVar("T")

_MAX_BATCH: Final = 500


class Checkpoints:
    """The step log of one worker.

    Args:
        session: a connection of its own.
        worker: returns the worker's current id, which the writes are fenced with.
        on_written: told how many steps a commit has written.
        on_made: told the queue of a job that a step has made.
    """

    def __init__(
        self,
        session: Session,
        worker: Callable[[], int],
        on_written: Callable[[int], None],
        on_made: Callable[[str], None],
    ) -> None:
        self._session, self._worker = session, worker
        self._on_written, self._on_made = on_written, on_made
        self._writes: deque[tuple[Write, asyncio.Future[StoredStep]]] = deque()
        self._loads: dict[int, asyncio.Future[list[StoredStep]]] = {}
        self._settled: deque[tuple[int, asyncio.Future[list[StoredStep]]]] = deque()
        self._wanted = asyncio.Event()

    async def write(self, step: Write) -> StoredStep:
        """Write a step; return it once it is committed. Raises FenceLost and StepRefused."""
        future: asyncio.Future[StoredStep] = asyncio.get_running_loop().create_future()
        self._writes.append((step, future))
        self._wanted.set()
        return await future

    async def load(self, job: int) -> list[StoredStep]:
        """Return what earlier runs of the job have written. Raises StepRefused."""
        future = self._loads.get(job)
        if future is None:
            future = self._loads[job] = asyncio.get_running_loop().create_future()
            self._wanted.set()
        return await asyncio.shield(future)

    async def load_settled(self, job: int) -> list[StoredStep]:
        """Return a job's steps once no transaction that writes one is under way.

        Raises StepRefused.
        """
        future: asyncio.Future[list[StoredStep]] = asyncio.get_running_loop().create_future()
        self._settled.append((job, future))
        self._wanted.set()
        return await future

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
        while self._settled:
            job, settled = self._settled.popleft()
            with _refusals(f"the steps of job {job}", [settled]):
                found = await self._try(partial(_load_settled, job=job))
                if not settled.done():
                    settled.set_result(found)
        if not self._loads:
            return
        loads, self._loads = self._loads, {}
        with _refusals("steps", loads.values()):
            steps = await self._try(lambda connection: StepStore(connection).load(loads))
            for job, future in loads.items():
                if not future.done():
                    future.set_result(steps.get(job, []))

    async def _serve_writes(self) -> None:
        if not self._writes:
            return
        batch = [self._writes.popleft() for _ in range(min(len(self._writes), _MAX_BATCH))]
        if self._writes:
            self._wanted.set()
        try:
            written = await self._write([step for step, _ in batch])
        except Exception:  # noqa: BLE001 - a value that cannot even be sent is one step's fault too
            await self._write_singly(batch)
        else:
            self._answer(batch, written)

    async def _write_singly(self, batch: Sequence[_Waiting]) -> None:
        """Find the step that is to blame: the others are none the worse for it."""
        for step, future in batch:
            with _refusals(f"step {step.name!r} of job {step.job}", [future]):
                self._answer([(step, future)], await self._write([step]))

    async def _write(self, steps: Sequence[Write]) -> Written:
        return await self._try(
            lambda connection: StepStore(connection).write(self._worker(), steps)
        )

    async def _try(self, operation: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        """Do it, again and again while that can help. Raises what it says when it cannot."""

        async def attempt(connection: AsyncConnection[Any]) -> tuple[T] | Exception:
            try:
                return (await operation(connection),)
            except psycopg.Error as error:
                if is_transient(error) or connection.closed:
                    raise
                return error
            except Exception as error:  # noqa: BLE001 - of a value that is none of its column's
                return error

        result = await self._session.insist(attempt)
        if isinstance(result, Exception):
            raise result
        return result[0]

    def _answer(self, batch: Sequence[_Waiting], written: Written) -> None:
        self._on_written(len(written))
        for step, future in batch:
            stored = written.get((step.job, step.name))
            if stored is not None and isinstance(step, Call) and step.makes is not None:
                self._on_made(step.makes.queue)
            if future.done():  # its handler has been cancelled meanwhile
                continue
            if stored is not None:
                future.set_result(stored)
            else:
                future.set_exception(FenceLost(f"job {step.job} is no longer this worker's"))


async def _load_settled(connection: AsyncConnection[Any], job: int) -> list[StoredStep]:
    return await StepStore(connection).load_settled(job)


@contextmanager
def _refusals(what: str, waiting: Iterable[asyncio.Future[Any]]) -> Iterator[None]:
    """Tell who waits what the database has refused, and why."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - told to whom it concerns
        sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
        state = f" (SQLSTATE {sqlstate})" if sqlstate else ""
        why = f"{type(error).__name__}: {' '.join(str(error).split())}{state}"
        for future in waiting:
            if not future.done():
                refused = StepRefused(f"the database refuses {what}: {why}")
                refused.__cause__ = error
                future.set_exception(refused)
