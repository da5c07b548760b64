"""One process at work: a worker for each queue, the cron tick, the dispatcher, maintenance.

`Orchestrator.start` registers the application and returns when its workers claim; `stop` drains
them. `run` does both, with signals in between. Several processes of one application are equals:
whatever must happen once is decided in the database. This module must not know how jobs run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Self

import psycopg

from conductor.arguments import check_type, declares
from conductor.client import Conductor
from conductor.connections import Connections
from conductor.contract import INTERNAL_QUEUE
from conductor.definitions import Task
from conductor.dispatcher import Dispatcher
from conductor.enqueue import hint_queue
from conductor.errors import ConductorError, ConfigError, DatabaseUnavailable, MigrationMismatch
from conductor.gauges import Gauges
from conductor.health import HealthServer
from conductor.hints import QueueHints
from conductor.lease import DEAD_AFTER_S, Leases
from conductor.maintenance import Maintenance, partition_history
from conductor.metrics import (
    BUILD_INFO,
    CRASHED,
    ENQUEUED,
    FINISHED,
    RECONNECTS,
    RESCUED,
    Metrics,
)
from conductor.migrations import check_migrated
from conductor.registration import Registration, check_unique, register, wait_captured
from conductor.scheduler import Scheduler
from conductor.store.leases import Rescue
from conductor.store.operations import OperationStore
from conductor.store.sessions import Backoff
from conductor.supersession import Supersession
from conductor.triggers import Cron, OnEvent
from conductor.worker import Listener, Worker

DEFAULT_SLOTS: Final = 100
DRAIN_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 30.0

_POOL_SIZE: Final = 4  # scheduler, dispatcher, maintenance, gauges and hints
_DRAIN_POLL_S: Final = 0.02
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_ENQUEUED: Final[dict[type, str]] = {Cron: "cron", OnEvent: "event"}  # by this process itself

_log = logging.getLogger("conductor")


class Orchestrator:
    """The workers of one process and what they need.

    Args:
        conductor: the application.
        tasks: what this process runs; by default every task with a handler.
        slots: how many jobs at once in each queue, or by queue.
        metrics_port: where ``/metrics``, ``/livez`` and ``/readyz`` are served; None: nowhere.
        metrics_host: the address they are served on.
        drain_timeout_s: how long `stop` waits for running handlers.
        connect_timeout_s: how long `start` tries to reach the database.
        transactions: how many `ctx.transaction` at once in each queue: each holds a connection. By
            default as many as slots, but not more than 20.
        dead_after_s: for how long a worker's lease must stand still until others take its jobs;
            the same in all processes of a database.
        listen_dsn: a DSN that reaches the server directly, when the conductor's leads to a pooler.

    Raises RegistrationRefused when there is no task, or two have one name.

        await Orchestrator(conductor, tasks=[send, welcome]).run()
    """

    @declares
    def __init__(
        self,
        conductor: Conductor[Any],
        tasks: Iterable[Task[Any, Any]] | None = None,
        *,
        slots: int | Mapping[str, int] = DEFAULT_SLOTS,
        metrics_port: int | None = None,
        metrics_host: str = "0.0.0.0",  # noqa: S104 - to be scraped from elsewhere is its purpose
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        transactions: int | None = None,
        dead_after_s: float = DEAD_AFTER_S,
        listen_dsn: str | None = None,
    ) -> None:
        check_type("the conductor", conductor, (Conductor,), "Orchestrator(conductor)")
        check_type("slots", slots, (int, Mapping), 'slots=100 or slots={"mail": 5}')
        self.conductor = conductor
        self.slots, self.transactions = slots, transactions
        self.dead_after_s = dead_after_s
        self.metrics_port, self.metrics_host = metrics_port, metrics_host
        self.drain_timeout_s, self.connect_timeout_s = drain_timeout_s, connect_timeout_s
        self.listen_dsn = listen_dsn
        self.metrics = Metrics()
        self.registration = Registration(
            app=conductor.app,
            version=conductor.version,
            tasks=check_unique(conductor.tasks.values() if tasks is None else tasks),
            events=tuple(conductor.events.values()),
        )
        self._health = HealthServer(self.metrics.registry, live=self._dead, ready=self._unready)
        self._state = "not started"
        self._connections = Connections(conductor.dsn, _POOL_SIZE, "conductor services")
        self._crew: _Crew | None = None

    @property
    def is_started(self) -> bool:
        """Whether `start` has returned and `stop` has not been called."""
        return self._state == "started"

    @property
    def address(self) -> str:
        """Where metrics and probes are served, as ``host:port``."""
        return f"{self.metrics_host}:{self._health.port}"

    async def start(self, wait_captured_s: float | None = None) -> None:
        """Register, start the workers, and return when they claim.

        With ``wait_captured_s`` it also waits until the router captures what the change triggers
        want: from then on every matching commit becomes a job. Raises DatabaseUnavailable (after
        ``connect_timeout_s``), MigrationMismatch, RegistrationRefused, UnknownTable, UnknownColumn,
        CaptureTimeout, and ConfigError when the port is taken; nothing runs then.
        """
        if self._state != "not started":
            raise RuntimeError(f"this orchestrator is {self._state}")
        self._state = "starting"
        try:
            await self._serve()
            await self._reach_database()
            read_sources = frozenset(self.conductor.source_dsns)
            self.registration = replace(self.registration, read_sources=read_sources)
            ids = await register(self._connections, self.registration)
            async with self._connections.lend() as connection:
                await partition_history(connection)
            self._crew = _Crew(self, self._connections)
            self._crew.start()
            await self._crew.claiming()
            if wait_captured_s is not None:
                await wait_captured(self._connections, self.registration, ids, wait_captured_s)
        except BaseException:
            await self.stop()
            raise
        self._state = "started"
        names = ", ".join(self.registration.task_names)
        _log.info("started app %s with tasks %s", self.conductor.app, names)

    async def _serve(self) -> None:
        if self.metrics_port is None:
            return
        try:
            await self._health.start(self.metrics_host, self.metrics_port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self.metrics_host}:{self.metrics_port}: "
                f"{error.strerror or error}",
                hint="Choose another CONDUCTOR_METRICS_PORT (0: any free one, -1: none), or the"
                " metrics_port of the orchestrator.",
            ) from error
        _log.info("serving metrics and probes on %s:%s", self.metrics_host, self._health.port)

    async def stop(self) -> None:
        """Claim no more, let running handlers finish (``drain_timeout_s``), close everything."""
        if self._state in {"stopping", "stopped"}:
            return
        self._state = "stopping"
        if self._crew is not None:
            await self._crew.stop()
        await self._connections.close()
        await self._health.stop()
        self._state = "stopped"

    async def run(self, wait_captured_s: float | None = None) -> None:
        """Work until SIGTERM or SIGINT, then drain; a second signal quits at once.

        Raises what `start` raises, and whatever ended a part of the process that must not end.
        """
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()

        def interrupt(number: signal.Signals) -> None:
            if asked.is_set():
                os._exit(128 + number)  # its jobs are rescued like those of a crash
            _log.info("%s: draining for up to %g s", number.name, self.drain_timeout_s)
            asked.set()

        for number in _SIGNALS:
            loop.add_signal_handler(number, interrupt, number)
        try:
            if await _first(self.start(wait_captured_s), asked) and self._crew is not None:
                await _first(self._crew.ended(), asked)
        finally:
            await self.stop()
            await self.conductor.close()
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    async def drain(self, timeout_s: float = 30.0) -> None:
        """Return when no job of these tasks runs, could run, or is due; for tests.

        What has come for waiting jobs has reached them by then: events, ends of children, deadlines
        and schedules. Jobs that wait for something later are not waited for (see `travel`). Starts
        and stops the orchestrator unless it is started. Raises TimeoutError and says what is left.
        """
        if not self.is_started:
            async with self:
                await self.drain(timeout_s)
            return
        tasks = [(task.queue, task.name) for task in self.registration.tasks]
        try:
            async with asyncio.timeout(timeout_s), self._connections.lend() as connection:
                store = OperationStore(connection)
                while await store.has_unfinished(tasks):  # noqa: ASYNC110 - the database is asked
                    await asyncio.sleep(_DRAIN_POLL_S)
        except TimeoutError:
            async with self._connections.lend() as connection:
                left = await OperationStore(connection).unfinished(tasks)
            jobs = ", ".join("{jobs} {state} of task {task}".format_map(row) for row in left)
            raise TimeoutError(
                f"not drained after {timeout_s:g} s: {jobs or 'events or schedules that are due'}"
            ) from None

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()

    async def _reach_database(self) -> None:
        """Check that the database is there and migrated, trying for a while."""
        deadline = asyncio.get_running_loop().time() + self.connect_timeout_s
        backoff = Backoff()
        while True:
            try:
                await asyncio.to_thread(check_migrated, self.conductor.dsn)
            except DatabaseUnavailable as error:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
                _log.warning("not started yet: %s", " ".join(str(error).split()))
                await asyncio.sleep(backoff.delay_s())
            else:
                return

    # --- probes --------------------------------------------------------------------------------

    def _dead(self) -> str | None:
        """Return why the process cannot work any more. That it answers at all is most of it."""
        return self._crew.why_dead() if self._crew is not None and self.is_started else None

    def _unready(self) -> str | None:
        """Return why the process does not work now."""
        if self._crew is None or not self.is_started:
            return self._state
        return self._crew.why_unready()


class _Crew:
    """Everything that runs in a started orchestrator."""

    def __init__(self, owner: Orchestrator, connections: Connections) -> None:
        dsn, self._owner, self._metrics = owner.conductor.dsn, owner, owner.metrics
        self._connections = connections
        self._hints = QueueHints(self._hint)
        self._leases = Leases(
            dsn,
            on_rescue=self._count_rescue,
            on_reconnect=self._metrics.get(RECONNECTS, "leases").inc,
            dead_after_s=owner.dead_after_s,
        )
        self._listener = Listener(owner.listen_dsn or dsn)
        queues = sorted({task.queue for task in owner.registration.tasks})
        self._workers = [self._worker(queue) for queue in queues]
        self._dispatcher = Dispatcher(connections, self._metrics, self._hints.after_commit)
        self._services: list[Dispatcher | Scheduler | Maintenance | Gauges | Supersession] = [
            self._dispatcher,
            Scheduler(connections, self._metrics, self._hints.after_commit),
            Maintenance(connections, self._metrics),
            Supersession(connections, self._metrics),
        ]
        if owner.metrics_port is not None:
            self._services.append(Gauges(connections, self._metrics))
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start all parts."""
        app = self._owner.conductor
        self._metrics.get(BUILD_INFO, app.app, app.version or "", _release()).set(1)
        for task in self._owner.registration.tasks:  # at 0, so that the first one is a rise
            for kind in {kind for t in task.triggers if (kind := _ENQUEUED.get(type(t)))}:
                self._metrics.get(ENQUEUED, task.queue, task.name, kind)
            self._metrics.get(CRASHED, task.queue, task.name)
        self._listener.subscribe(INTERNAL_QUEUE, self._dispatcher.wake)
        self._leases.start()
        self._listening = asyncio.create_task(self._listener.run(), name="the listener")
        self._tasks = [
            *(asyncio.create_task(w.run(), name=f"the worker of {w.queue}") for w in self._workers),
            *(
                asyncio.create_task(s.run(), name=f"the {type(s).__name__.lower()}")
                for s in self._services
            ),
        ]
        for part in self._tasks:
            part.add_done_callback(self._wind_up)

    def _count_rescue(self, rescue: Rescue) -> None:
        """Count what the lease thread took from a dead worker."""
        self._metrics.get(RESCUED).inc(rescue.rescued)
        for (queue, task, outcome), jobs in rescue.ended.items():
            self._metrics.get(FINISHED, queue, task, outcome).inc(jobs)
            if outcome == "failed":
                self._metrics.get(CRASHED, queue, task).inc(jobs)

    async def claiming(self) -> None:
        """Return when every worker claims; raises what ended a part before."""
        ready = asyncio.create_task(self._all_ready())
        await asyncio.wait([*self._tasks, ready], return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            await self.ended()

    async def ended(self) -> None:
        """Wait until a part ends by itself, which none must, and raise what ended it."""
        done, _ = await asyncio.wait(
            [*self._tasks, self._listening], return_when=asyncio.FIRST_COMPLETED
        )
        for part in done:
            part.result()
        raise RuntimeError(f"{next(iter(done)).get_name()} has ended by itself")

    async def stop(self) -> None:
        """Stop all parts; the workers drain."""
        self._end_all()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        await self._hints.close()
        await asyncio.to_thread(self._leases.stop)

    def _end_all(self) -> None:
        for part in (*self._services, *self._workers):
            part.stop()

    def _wind_up(self, part: asyncio.Task[None]) -> None:
        """Claim no more when the schema has become too new, whoever waits for this process."""
        error = None if part.cancelled() else part.exception()
        if isinstance(error, MigrationMismatch):
            _log.error("%s; draining for up to %g s", error, self._owner.drain_timeout_s)
            self._end_all()

    def why_dead(self) -> str | None:
        """Return which part has ended; None when none has."""
        ended = next((part for part in self._tasks if part.done()), None)
        return f"{ended.get_name()} has ended" if ended is not None else None

    def why_unready(self) -> str | None:
        """Return which worker cannot claim; None when all can."""
        for worker in self._workers:
            if not worker.id:
                return f"the worker of queue {worker.queue} has no lease"
        return None

    def _worker(self, queue: str) -> Worker:
        owner = self._owner
        slots = owner.slots
        return Worker(
            owner.conductor.dsn,
            queue,
            {task.name: task for task in owner.registration.tasks if task.queue == queue},
            leases=self._leases,
            metrics=self._metrics,
            slots=slots if isinstance(slots, int) else slots.get(queue, DEFAULT_SLOTS),
            app=owner.conductor.app,
            version=owner.conductor.version,
            deps=owner.conductor.deps,
            port=owner.conductor,
            listener=self._listener,
            hint=self._hints.after_commit,
            drain_timeout_s=owner.drain_timeout_s,
            transactions=owner.transactions,
        )

    async def _all_ready(self) -> None:
        for worker in self._workers:
            await worker.ready.wait()

    async def _hint(self, queue: str) -> None:
        with suppress(ConductorError, psycopg.Error):  # workers poll as well
            async with self._connections.lend() as connection:
                await hint_queue(connection, queue)


async def _first(work: Coroutine[Any, Any, None], asked: asyncio.Event) -> bool:
    """Run ``work``; true when it has ended before something else was asked for."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(asked.wait())
    await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if working.done():
        working.result()
        return True
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working
    return False


def _release() -> str:
    try:
        return version("pgconductor")
    except PackageNotFoundError:
        return ""
