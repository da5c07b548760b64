"""The client for synchronous code: Django, Flask, scripts.

A thread of its own runs the asynchronous client; nothing is implemented twice. With a
``connection`` (a psycopg connection of the caller) the job is part of the caller's transaction and
is enqueued on that connection, in the calling thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, overload

from typing_extensions import TypeVar, Unpack

from conductor.enqueue import JobBatch, Via, emit_through_wal_blocking, enqueue_blocking
from conductor.job import JobHandle
from conductor.store.schedules import drop_schedule_blocking, put_schedule_blocking
from conductor.tracing import sending

if TYPE_CHECKING:
    from psycopg import Connection

    from conductor.calls import ScheduleOptions
    from conductor.client import Conductor, InvokeOptions
    from conductor.definitions import EventDefinition, Task, TaskDefinition
    from conductor.triggers import Cron

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True, default=Any)


class _Portal:
    """An event loop in a thread, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine in the thread and return what it returns."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="conductor client", daemon=True
                )
                self._thread.start()
            loop = self._loop
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupted caller leaves nothing running
            raise

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@dataclass(frozen=True, slots=True, eq=False)
class SyncJobHandle(Generic[R_co]):
    """`conductor.job.JobHandle` for synchronous code."""

    handle: JobHandle[R_co]
    portal: _Portal

    @property
    def id(self) -> int:
        """The job's id; of a dropped one, of the job that holds its dedupe key."""
        return self.handle.id

    @property
    def status(self) -> Literal["enqueued", "dropped"]:
        """Whether the job was enqueued."""
        return self.handle.status

    def result(self, timeout_s: float | None = None) -> R_co:
        """Wait for the job, like `JobHandle.result`."""
        return self.portal.call(self.handle.result(timeout_s))

    def cancel(self, reason: str | None = None) -> bool:
        """Cancel the job, like `JobHandle.cancel`."""
        return self.portal.call(self.handle.cancel(reason))


class SyncConductor:
    """A client for synchronous code, safe for many threads. Close it, or use it with ``with``.

    Takes a `Conductor` that no event loop uses: it owns it from now on.

        client = SyncConductor(Conductor(dsn, tasks=[send_email]))
        client.invoke(send_email, SendEmail(to="a@example.com"))
    """

    def __init__(self, conductor: Conductor[Any]) -> None:
        self._conductor = conductor
        self._portal = _Portal()

    @overload
    def invoke(
        self,
        task: TaskDefinition[P, R] | Task[P, R],
        payload: P,
        *,
        connection: Connection[Any] | None = ...,
        **options: Unpack[InvokeOptions],
    ) -> SyncJobHandle[R]: ...
    @overload
    def invoke(
        self,
        task: TaskDefinition[None, R] | Task[None, R],
        payload: None = ...,
        *,
        connection: Connection[Any] | None = ...,
        **options: Unpack[InvokeOptions],
    ) -> SyncJobHandle[R]: ...
    @overload
    def invoke(
        self,
        task: str,
        payload: Any = ...,
        *,
        connection: Connection[Any] | None = ...,
        **options: Unpack[InvokeOptions],
    ) -> SyncJobHandle[Any]: ...
    def invoke(
        self,
        task: TaskDefinition[Any, Any] | Task[Any, Any] | str,
        payload: Any = None,
        *,
        connection: Connection[Any] | None = None,
        **options: Unpack[InvokeOptions],
    ) -> SyncJobHandle[Any]:
        """Enqueue one run of a task, like `Conductor.invoke`."""
        batch = self._conductor.invocation(task, [payload], options)
        return self._enqueue(batch, connection)[0]

    def invoke_many(
        self,
        task: TaskDefinition[P, R] | Task[P, R],
        payloads: Iterable[P],
        *,
        connection: Connection[Any] | None = None,
        keys: Sequence[str | None] | None = None,
        dedupe_keys: Sequence[str] | None = None,
        **options: Unpack[InvokeOptions],
    ) -> list[SyncJobHandle[R]]:
        """Enqueue many runs of a task, like `Conductor.invoke_many`."""
        batch = self._conductor.invocation(task, payloads, options, keys, dedupe_keys)
        return self._enqueue(batch, connection) if batch.payloads else []

    @overload
    def emit(
        self,
        event: EventDefinition[P],
        payload: P,
        *,
        metadata: dict[str, Any] | None = ...,
        connection: Connection[Any] | None = ...,
        via: Via = ...,
    ) -> None: ...
    @overload
    def emit(
        self,
        event: EventDefinition[None],
        payload: None = ...,
        *,
        metadata: dict[str, Any] | None = ...,
        connection: Connection[Any] | None = ...,
        via: Via = ...,
    ) -> None: ...
    @overload
    def emit(
        self,
        event: str,
        payload: Any = ...,
        *,
        metadata: dict[str, Any] | None = ...,
        connection: Connection[Any] | None = ...,
        via: Via = ...,
    ) -> None: ...
    def emit(
        self,
        event: EventDefinition[Any] | str,
        payload: Any = None,
        *,
        metadata: dict[str, Any] | None = None,
        connection: Connection[Any] | None = None,
        via: Via = "queue",
    ) -> None:
        """Emit an event, like `Conductor.emit`."""
        self._emit(event, [payload], metadata, connection, via)

    def emit_many(
        self,
        event: EventDefinition[P],
        payloads: Iterable[P],
        *,
        metadata: dict[str, Any] | None = None,
        connection: Connection[Any] | None = None,
        via: Via = "queue",
    ) -> None:
        """Emit an event many times, like `Conductor.emit_many`."""
        self._emit(event, payloads, metadata, connection, via)

    def _emit(
        self,
        event: EventDefinition[Any] | str,
        payloads: Iterable[Any],
        metadata: dict[str, Any] | None,
        connection: Connection[Any] | None,
        via: Via,
    ) -> None:
        if via == "queue":
            batch = self._conductor.emission(event, payloads, metadata)
            if batch.payloads:
                self._enqueue(batch, connection)
            return
        emission = self._conductor.wal_emission(event, payloads, metadata, via)
        if connection is not None:
            emit_through_wal_blocking(connection, emission)
        elif emission.payloads:
            self._portal.call(self._conductor.emit_on(emission))

    def cancel(self, job: int, reason: str | None = None) -> bool:
        """Cancel a job, like `Conductor.cancel`."""
        return self._portal.call(self._conductor.cancel(job, reason))

    def schedule(
        self,
        name: str,
        task: TaskDefinition[P, Any] | Task[P, Any],
        cron: Cron,
        payload: P,
        *,
        connection: Connection[Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> None:
        """Invoke a task on a schedule, like `Conductor.schedule`."""
        if connection is None:
            self._portal.call(self._conductor.schedule(name, task, cron, payload, **options))
            return
        plan = self._conductor.schedule_plan(name, task, cron, payload, options)
        put_schedule_blocking(connection, task.name, name, plan)

    def unschedule(
        self,
        name: str,
        task: TaskDefinition[Any, Any] | Task[Any, Any],
        *,
        connection: Connection[Any] | None = None,
    ) -> bool:
        """End a schedule, like `Conductor.unschedule`."""
        if connection is None:
            return self._portal.call(self._conductor.unschedule(name, task))
        return drop_schedule_blocking(connection, task.name, name)

    def _enqueue(
        self, batch: JobBatch, connection: Connection[Any] | None
    ) -> list[SyncJobHandle[Any]]:
        conductor = self._conductor
        if connection is None:
            jobs = self._portal.call(conductor.enqueue_batch(batch))
        else:
            with sending(batch.queue, batch.task, batch.payloads, batch.metadata) as traced:
                jobs = enqueue_blocking(connection, batch.carrying(traced.metadata))
                traced.sent(jobs[0].id if len(jobs) == 1 else None)
        handles = conductor.handles(batch, jobs, committed=connection is None)
        return [SyncJobHandle(handle, self._portal) for handle in handles]

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._portal.call(self._conductor.close())
        self._portal.stop()

    def __enter__(self) -> Self:
        """Return itself; connections are opened when first needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections and end the thread."""
        self.close()
