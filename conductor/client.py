"""What an application calls: declare handlers, invoke tasks, emit events, cancel jobs.

A `Conductor` knows an application's definitions. It opens connections when they are first needed
and belongs to the event loop that first uses it. With a ``connection`` of the caller everything
happens in the caller's transaction, and nothing but the insert itself is sent on it. This module
must not run handlers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self, TypedDict, overload

from typing_extensions import TypeVar, Unpack

from conductor.arguments import check_type, declares
from conductor.binding import (
    collect,
    databases_of,
    refuse_second,
)
from conductor.connections import Connections
from conductor.declarations import Declarations
from conductor.definitions import (
    EventDefinition,
    Task,
    TaskDefinition,
    check_name,
    check_option_text,
)
from conductor.emitting import Emitter
from conductor.enqueue import (
    DEDUPE_FOR,
    Enqueued,
    JobBatch,
    JobOutcome,
    cancel,
    enqueue,
    fetch_outcomes,
    hint_queue,
)
from conductor.errors import (
    DefinitionInvalid,
    OptionInvalid,
    ResultTimeout,
    UnknownTask,
    check_options,
)
from conductor.events import Change
from conductor.hints import QueueHints
from conductor.job import JobHandle
from conductor.refetch import Sources
from conductor.results import ResultPoller
from conductor.rows import DEFAULT_SOURCE, Database
from conductor.scheduling import Scheduling
from conductor.tracing import sending

if TYPE_CHECKING:
    from psycopg import AsyncConnection

P = TypeVar("P")
R = TypeVar("R")
D = TypeVar("D", default=Any)


class InvokeOptions(TypedDict, total=False):
    """Options of ``invoke``; see `Conductor.invoke`."""

    run_at: datetime | None
    delay: timedelta | float | None
    priority: int | None
    key: str | None
    dedupe_key: str | None
    dedupe_for: timedelta
    metadata: dict[str, Any] | None


def _check_dsns(dsn: object, source_dsn: object, sources: object) -> None:
    """Raise DefinitionInvalid for what is no text; it is not quoted, it may hold a password."""
    if not isinstance(sources, Mapping):
        raise DefinitionInvalid(
            f"sources is not Mapping, but {type(sources).__name__}",
            hint='Such as sources={"billing": os.environ["BILLING_DSN"]}.',
        )
    dsns = {"dsn": dsn, "source_dsn": "" if source_dsn is None else source_dsn}
    dsns |= {f"the DSN of source {name!r}": value for name, value in sources.items()}
    for what, value in dsns.items():
        if not isinstance(value, str):
            raise DefinitionInvalid(
                f"{what} is not str, but {type(value).__name__}",
                hint='Such as os.environ["CONDUCTOR_DSN"].',
            )


class Conductor(Declarations[D], Emitter, Scheduling):
    """An application's tasks and events, and its way into the queue.

    ``tasks`` and ``events`` are definitions, or a module that holds them; ``database`` the row
    models that triggers are checked against (of several databases: a list); ``context`` what
    handlers reach as ``ctx.deps``.
    ``app`` names the application: each has its own subscriptions. ``version`` is stored with the
    jobs that are routed to it. ``source_dsn`` is where tables are when that is not the queue
    database, ``sources`` the same of further sources by their names: only triggers with ``refetch``
    and waits for changes ask them. Raises DefinitionInvalid.

        conductor = Conductor(dsn, tasks=[send_email], events=[user_created], context=Deps(mailer))
    """

    @overload
    def __init__(
        self: Conductor[None],
        dsn: str,
        *,
        tasks: Iterable[TaskDefinition[Any, Any]] | ModuleType = ...,
        events: Iterable[EventDefinition[Any]] | ModuleType = ...,
        database: Database | Sequence[Database] | None = ...,
        app: str = ...,
        version: str | None = ...,
        pool_size: int = ...,
        source_dsn: str | None = ...,
        sources: Mapping[str, str] | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        dsn: str,
        *,
        tasks: Iterable[TaskDefinition[Any, Any]] | ModuleType = ...,
        events: Iterable[EventDefinition[Any]] | ModuleType = ...,
        database: Database | Sequence[Database] | None = ...,
        context: D,
        app: str = ...,
        version: str | None = ...,
        pool_size: int = ...,
        source_dsn: str | None = ...,
        sources: Mapping[str, str] | None = ...,
    ) -> None: ...
    @declares
    def __init__(
        self,
        dsn: str,
        *,
        tasks: Iterable[TaskDefinition[Any, Any]] | ModuleType = (),
        events: Iterable[EventDefinition[Any]] | ModuleType = (),
        database: Database | Sequence[Database] | None = None,
        context: Any = None,
        app: str = "default",
        version: str | None = None,
        pool_size: int = 4,
        source_dsn: str | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        _check_dsns(dsn, source_dsn, {} if sources is None else sources)
        check_type("pool_size", pool_size, (int,), "pool_size=4")
        check_type("version", version, (str, type(None)), 'version="2"')
        self.dsn = dsn
        self.source_dsn = source_dsn
        self.sources = dict(sources or {})
        self.app = check_name("app", app)
        self.version = check_option_text("version", version)
        self.deps: D = context
        self.databases = databases_of(database)
        self.definitions: dict[str, TaskDefinition[Any, Any]] = collect(
            TaskDefinition, tasks, "task"
        )
        self.events: dict[str, EventDefinition[Any]] = collect(EventDefinition, events, "event")
        self.tasks: dict[str, Task[Any, Any]] = {}
        self._connections = Connections(dsn, pool_size, "conductor client")
        self._sources: Sources | None = None
        self._results = ResultPoller(self._fetch_outcomes)
        self._hints = QueueHints(self._hint)

    # --- enqueueing ----------------------------------------------------------------------------

    @overload
    async def invoke(
        self,
        task: TaskDefinition[P, R] | Task[P, R],
        payload: P,
        *,
        connection: AsyncConnection[Any] | None = ...,
        hint: bool = ...,
        **options: Unpack[InvokeOptions],
    ) -> JobHandle[R]: ...
    @overload
    async def invoke(
        self,
        task: TaskDefinition[None, R] | Task[None, R],
        payload: None = ...,
        *,
        connection: AsyncConnection[Any] | None = ...,
        hint: bool = ...,
        **options: Unpack[InvokeOptions],
    ) -> JobHandle[R]: ...
    @overload
    async def invoke(
        self,
        task: str,
        payload: Any = ...,
        *,
        connection: AsyncConnection[Any] | None = ...,
        hint: bool = ...,
        **options: Unpack[InvokeOptions],
    ) -> JobHandle[Any]: ...
    async def invoke(
        self,
        task: TaskDefinition[Any, Any] | Task[Any, Any] | str,
        payload: Any = None,
        *,
        connection: AsyncConnection[Any] | None = None,
        hint: bool = False,
        **options: Unpack[InvokeOptions],
    ) -> JobHandle[Any]:
        """Enqueue one run of a task and return at once.

        ``run_at`` (aware) or ``delay`` (seconds or timedelta) put it off. ``priority``: higher runs
        first. ``key`` is carried along; jobs of an ordered task run one at a time for each, and
        have neither ``run_at``, ``delay`` nor ``priority``. While a ``dedupe_key`` is taken
        (``dedupe_for``, a day by default, also after the job has ended) no other job is made: the
        handle's status is ``dropped`` then. ``metadata`` is JSON, carried along.

        With ``connection`` the job is part of the caller's transaction, and workers find it by
        polling unless ``hint=True`` asks for a NOTIFY in it. Raises UnknownTask, PayloadInvalid,
        OptionInvalid, DatabaseUnavailable.

            handle = await conductor.invoke(send_email, SendEmail(to="a@example.com"))
        """
        batch = self.invocation(task, [payload], options)
        jobs = await self.enqueue_batch(batch, connection, hint=hint)
        return self.handles(batch, jobs, committed=connection is None)[0]

    async def invoke_many(
        self,
        task: TaskDefinition[P, R] | Task[P, R],
        payloads: Iterable[P],
        *,
        connection: AsyncConnection[Any] | None = None,
        hint: bool = False,
        keys: Sequence[str | None] | None = None,
        dedupe_keys: Sequence[str] | None = None,
        **options: Unpack[InvokeOptions],
    ) -> list[JobHandle[R]]:
        """Enqueue many runs of one task in one statement; handles are in the payloads' order.

        Options as for `invoke`, but ``keys`` and ``dedupe_keys`` have one entry a payload.

            await conductor.invoke_many(resize, [Resize(id=n) for n in range(10_000)])
        """
        batch = self.invocation(task, payloads, options, keys, dedupe_keys)
        if not batch.payloads:
            return []
        jobs = await self.enqueue_batch(batch, connection, hint=hint)
        return self.handles(batch, jobs, committed=connection is None)

    async def cancel(
        self,
        job: int,
        reason: str | None = None,
        *,
        connection: AsyncConnection[Any] | None = None,
    ) -> bool:
        """Cancel a job; true when it had not ended yet. A running handler is told within 1 s."""
        if connection is not None:
            return await cancel(connection, job, reason)
        async with self._connections.lend() as own:
            return await cancel(own, job, reason)

    def invocation(
        self,
        task: TaskDefinition[Any, Any] | Task[Any, Any] | str,
        payloads: Iterable[Any],
        options: InvokeOptions,
        keys: Sequence[str | None] | None = None,
        dedupe_keys: Sequence[str] | None = None,
    ) -> JobBatch:
        """Return the checked batch that `invoke` and `invoke_many` enqueue."""
        check_options(options, InvokeOptions.__annotations__)
        definition = self._known_task(task)
        encoded = [definition.encode_payload(payload) for payload in payloads]
        bound = self.tasks.get(definition.name)
        priority = options.get("priority")
        delay, key, once = options.get("delay"), options.get("key"), options.get("dedupe_key")
        if (key is not None and keys) or (once is not None and dedupe_keys):
            raise OptionInvalid("a key for all payloads, or one for each: not both")
        return JobBatch(
            queue=definition.queue,
            task=definition.name,
            payloads=encoded,
            run_at=options.get("run_at"),
            delay=_duration(delay),
            priority=priority if priority is not None else bound.priority if bound else 0,
            keys=keys if key is None else [key] * len(encoded),
            dedupe_keys=dedupe_keys if once is None else [once] * len(encoded),
            dedupe_for=options.get("dedupe_for", DEDUPE_FOR),
            ordered=definition.ordered,
            metadata=options.get("metadata"),
        )

    def _known_task(
        self, task: TaskDefinition[Any, Any] | Task[Any, Any] | str
    ) -> TaskDefinition[Any, Any]:
        check_type("the task", task, (TaskDefinition, Task, str), "invoke(send_email, …)")
        name = task if isinstance(task, str) else task.name
        known = self.definitions.get(name)
        given = task.definition if isinstance(task, Task) else task
        if known is None:
            raise UnknownTask(name, self.definitions)
        if not isinstance(given, str):
            refuse_second(known, given, "task")
        return known

    def handles(
        self, batch: JobBatch, jobs: Sequence[Enqueued], *, committed: bool
    ) -> list[JobHandle[Any]]:
        """Return handles for what a batch has become."""
        return [
            JobHandle(job.id, batch.task, "enqueued" if job.is_new else "dropped", self, committed)
            for job in jobs
        ]

    async def enqueue_batch(
        self,
        batch: JobBatch,
        connection: AsyncConnection[Any] | None = None,
        *,
        hint: bool = False,
    ) -> list[Enqueued]:
        """Enqueue a batch on the caller's connection, or commit it on one of the client's own."""
        with sending(batch.queue, batch.task, batch.payloads, batch.metadata) as traced:
            jobs = await self._enqueue(batch.carrying(traced.metadata), connection, hint=hint)
            traced.sent(jobs[0].id if len(jobs) == 1 else None)
        return jobs

    async def _enqueue(
        self, batch: JobBatch, connection: AsyncConnection[Any] | None, *, hint: bool
    ) -> list[Enqueued]:
        if connection is not None:
            jobs = await enqueue(connection, batch)
            if hint:
                await hint_queue(connection, batch.queue)
            return jobs
        async with self._connections.lend() as own:
            jobs = await enqueue(own, batch)
        self._hints.after_commit(batch.queue)
        return jobs

    # --- waiting -------------------------------------------------------------------------------

    async def job_result(self, handle: JobHandle[Any], timeout_s: float | None) -> Any:
        """Wait for a job; see `JobHandle.result`."""
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._results.wait(handle.id, committed=handle.committed)
        except TimeoutError as error:
            raise ResultTimeout(f"job {handle.id} has not ended in {timeout_s} s") from error
        return self.definitions[handle.task].decode_result(data)

    async def _fetch_outcomes(self, jobs: Sequence[int]) -> list[JobOutcome]:
        async with self._connections.lend() as connection:
            return await fetch_outcomes(connection, jobs)

    async def _hint(self, queue: str) -> None:
        async with self._connections.lend() as connection:
            await hint_queue(connection, queue)

    async def refetch(self, change: Change[Any]) -> None:
        """Read again what a change lacks of its new row. Raises as `SourceRows.complete` does."""
        await self._asked().complete(change)

    async def source_position(self, source: str) -> str | None:
        """Return where a source's log ends now; None for the queue's own database."""
        return await self._asked().position(source)

    @property
    def source_dsns(self) -> dict[str, str]:
        """Where the sources are that are not the queue's own database, by their names."""
        default = {} if self.source_dsn is None else {DEFAULT_SOURCE: self.source_dsn}
        return self.sources | default

    def _asked(self) -> Sources:
        if self._sources is None:
            self._sources = Sources(self._connections, self.source_dsns)
        return self._sources

    async def close(self) -> None:
        """Close the connections; waits for results end with a cancellation."""
        await self._results.close()
        await self._hints.close()
        await self._connections.close()
        if self._sources is not None:
            await self._sources.close()

    async def __aenter__(self) -> Self:
        """Return itself; connections are opened when first needed."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.close()


def _duration(delay: timedelta | float | None) -> timedelta | None:
    if not isinstance(delay, (int, float)):
        return delay
    try:
        return timedelta(seconds=delay)
    except (OverflowError, ValueError) as error:
        raise OptionInvalid(f"delay {delay} is not a time") from error
