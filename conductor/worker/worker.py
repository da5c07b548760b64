"""One queue's loop in a process: settle what has ended, claim what there is room for, again.

While an exchange with the database is under way, handlers run from the buffer; what ends meanwhile
is settled with the next exchange, together with the next claim. There is no timer on this path:
batches are as large as the database is slow. A lost connection is opened again, for as long as it
takes, while handlers go on; their outcomes are settled afterwards if the fence still holds. A
worker whose lease was lost stops its handlers and starts over under another id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import psycopg
from orjson import dumps

from conductor.checkpoints import Checkpoints
from conductor.durable import Services
from conductor.store.jobs import JobStore
from conductor.store.leases import WorkerRow, WorkerStore
from conductor.store.sessions import Session
from conductor.transactions import MAX_CONNECTIONS, Transactions
from conductor.worker.claiming import Claiming
from conductor.worker.execution import Surroundings
from conductor.worker.instruments import Instruments
from conductor.worker.settling import Settling
from conductor.worker.slots import Slots
from conductor.worker.threads import Threads
from conductor.worker.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from conductor.definitions import Task
    from conductor.job import JobInfo, JobPort
    from conductor.lease import Leases
    from conductor.metrics import Metrics
    from conductor.store.jobs import Exchange, Outcome
    from conductor.worker.claiming import PlannedClaim
    from conductor.worker.listener import Listener

DEFAULT_SLOTS: Final = 100
DRAIN_TIMEOUT_S: Final = 30.0
_STOPPING_S: Final = 2.0  # for handlers that are told to stop when the drain time is up
_SETTLING_S: Final = 5.0  # for the last outcomes, and for signing off
_LONG_S: Final = 60.0
_MANY: Final = 32767

_LOG: Final = logging.getLogger("conductor.worker")


class Worker:
    """Runs the jobs of one queue. `run` until `stop`.

    Args:
        dsn: the queue database.
        queue: whose jobs.
        tasks: what it can run, by name; other jobs of the queue are left alone.
        leases: the process' leases, started.
        metrics: the process' metrics.
        port: what handles of jobs that handlers start go through: a client.
        hint: told other queues that have got jobs; without it their workers find them by polling.
        slots: how many jobs at once.
        transactions: how many of them in a `ctx.transaction` at once; by default all, up to 20.
        listener: the process' listener; without one the worker polls.
        deps: what handlers find in ``ctx.deps``.

    >>> worker = Worker(
    ...     dsn, "default", tasks, leases=leases, metrics=metrics, port=client
    ... )  # doctest: +SKIP
    >>> await worker.run()  # doctest: +SKIP
    """

    def __init__(
        self,
        dsn: str,
        queue: str,
        tasks: Mapping[str, Task[Any, Any]],
        *,
        leases: Leases,
        metrics: Metrics,
        port: JobPort,
        slots: int = DEFAULT_SLOTS,
        app: str = "",
        version: str | None = None,
        deps: Any = None,
        listener: Listener | None = None,
        hint: Callable[[str], None] | None = None,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
        transactions: int | None = None,
    ) -> None:
        self.queue = queue
        self.id = 0  # of the worker's row; 0: none yet, or no more
        self.ready = asyncio.Event()  # it claims
        self._leases, self._listener, self._hint = leases, listener, hint
        self._drain_timeout_s = drain_timeout_s
        self._instruments = Instruments(metrics, queue, tasks, slots)
        self._session = self._open(dsn, "worker")
        self._row = WorkerRow(
            app, version, queue, sorted(tasks), socket.gethostname(), os.getpid(), slots
        )
        self._wake = asyncio.Event()
        self._threads = Threads(f"conductor-{queue}")
        steps = self._open(dsn, "steps")
        self._peers = steps  # seldom asked about
        self._checkpoints = Checkpoints(
            steps, lambda: self.id, self._instruments.steps.inc, self.hint_queue
        )
        self._transactions = Transactions(
            dsn,
            transactions or min(slots, MAX_CONNECTIONS),
            lambda: self.id,
            dead_after_s=leases.dead_after_s,
        )
        services = Services(self._checkpoints, self._transactions, port)
        self._slots = Slots(
            slots,
            Surroundings(tasks, services, self._threads, deps, self._is_offered),
            twice_crashed=leases.twice_crashed,
            wake=self._wake.set,
        )
        self._claiming = _claiming(queue, tasks)
        self._settling = Settling(self._slots, self._instruments)
        self._upkeep = Upkeep(
            self._open(dsn, "upkeep"), queue, self._slots, lambda: self.id, self.hint_queue
        )
        self._stopping = False
        self._deadline: asyncio.TimerHandle | None = None
        self._serving: asyncio.Task[None] | None = None

    def _open(self, dsn: str, part: str) -> Session:
        name = f"conductor {part} {self.queue}"
        return Session(dsn, name, on_lost=self._instruments.reconnected)

    async def run(self) -> None:
        """Work until `stop`, then drain. Returns when every outcome is settled or time is up."""
        if self._listener is not None:
            self._listener.subscribe(self.queue, self.hint)
        parts = [
            asyncio.create_task(part, name=f"conductor {self.queue}")
            for part in (self._serve(), self._checkpoints.run(), self._upkeep.run())
        ]
        self._serving = parts[0]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                if not part.cancelled():
                    part.result()
        finally:
            await self._close(parts)

    def stop(self) -> None:
        """Claim no more, give back what has not started, wait for what runs (`drain_timeout_s`).

        Then handlers are cancelled and their jobs given back. Call it on the event loop.
        """
        over = self._serving is not None and self._serving.done()
        if not (self._stopping or over):
            self._stopping = True
            self._slots.return_buffer()
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._drain_timeout_s, self._give_up)
            self._wake.set()

    def hint(self) -> None:
        """Look for jobs now."""
        self._claiming.polling.hint()
        self._wake.set()

    def hint_queue(self, queue: str) -> None:
        """Take note that a queue has got jobs, this one or another."""
        if queue == self.queue:
            self.hint()
        elif self._hint is not None:
            self._hint(queue)

    def _hint_all(self, queues: Iterable[str]) -> None:
        for queue in set(queues):
            self.hint_queue(queue)

    async def _is_offered(self, job: JobInfo) -> bool:
        return await self._peers.insist(
            lambda connection: WorkerStore(connection).is_offered(job.app, job.version, job.task)
        )

    async def _serve(self) -> None:
        """Exchange outcomes for jobs until stopped and drained."""
        draining = False
        while True:
            if not self.id:
                await self._register()
            if self._stopping and not draining:
                draining = True
                await self._session.insist(
                    lambda connection: WorkerStore(connection).drain(self.id)
                )
            if self._settling.audit_is_due():
                await self._session.insist(
                    lambda connection: self._settling.audit(JobStore(connection), self.id)
                )
            planned = self._plan()
            outcomes = [] if planned is not None and planned.alone else self._settling.take()
            if outcomes or planned is not None:
                await self._exchange(outcomes, planned)
            elif self._stopping and not self._slots.running:
                return
            else:
                await self._pause()

    def _plan(self) -> PlannedClaim | None:
        if self._stopping:
            return None
        return self._claiming.plan(
            monotonic(),
            room=self._slots.room(),
            riding=self._settling.waiting,
            suspect_crashes=1 if self._leases.twice_crashed else _MANY,
        )

    async def _exchange(self, outcomes: list[Outcome], planned: PlannedClaim | None) -> None:
        connection = await self._session.connection()
        store, worker, started_s = JobStore(connection), self.id, monotonic()
        try:
            reply = await store.exchange(worker, outcomes, planned.claim if planned else None)
            if worker != self.id:  # the lease was lost meanwhile, and all of it with it
                return
            self._take(planned, reply, monotonic() - started_s)
            self._hint_all(reply.woken)
            await self._settling.settle(store, worker, outcomes, reply)
        except psycopg.Error as error:
            if worker == self.id:
                self._settling.lost(outcomes)
            await self._session.failed(error)
        else:
            self._observe(monotonic() - started_s, outcomes, planned)
            if reply.error is None:
                self._session.answered()
            else:
                await self._session.failed(reply.error)

    def _take(self, planned: PlannedClaim | None, reply: Exchange, duration_s: float) -> None:
        if planned is None:
            return
        self._claiming.claimed(
            planned,
            reply.jobs,
            reply.suspects,
            now_s=monotonic(),
            duration_s=duration_s,
            lanes_left=reply.lanes_left,
            lanes_last=reply.lanes_last,
        )
        if self._stopping:
            self._slots.refuse(reply.suspects + reply.jobs)
            return
        for suspect in reply.suspects:
            if suspect.info.crashes > 1:
                self._leases.twice_crashed.add(suspect.info.id)
        self._slots.take(reply.suspects, first=True)
        self._slots.take(reply.jobs)

    def _observe(
        self, duration_s: float, outcomes: list[Outcome], planned: PlannedClaim | None
    ) -> None:
        instruments, slots = self._instruments, self._slots
        if outcomes:
            instruments.settle.observe(duration_s)
        if planned is not None:
            instruments.claim.observe(duration_s)
        ended, slots.ended = slots.ended, []
        instruments.count_runs(ended)
        instruments.busy.set(slots.busy)

    async def _pause(self) -> None:
        """Wait until something has ended, or it is time to look for jobs."""
        self._wake.clear()
        timer = None
        if not self._stopping:
            due_s = self._claiming.polling.due_s if self._slots.room() else monotonic() + _LONG_S
            delay_s = max(due_s - monotonic(), 0.0)
            timer = asyncio.get_running_loop().call_later(delay_s, self._wake.set)
        await self._wake.wait()
        if timer is not None:
            timer.cancel()

    async def _register(self) -> None:
        """Get a row and a lease. Under the new id nothing of an earlier one can be written."""
        loop = asyncio.get_running_loop()
        self._settling.start_over()
        worker = await self._session.insist(
            lambda connection: WorkerStore(connection).register(self._row)
        )
        self.id = worker

        def lost() -> None:
            loop.call_soon_threadsafe(self._lose_lease, worker)

        self._leases.hold(worker, lost)
        self.ready.set()
        _LOG.info("worker %s of queue %s has %s slots", worker, self.queue, self._slots.limit)

    def _lose_lease(self, worker: int) -> None:
        """Stop everything: this worker was declared dead, and its jobs run elsewhere."""
        if worker == self.id:
            self.id = 0
            self._instruments.leases_lost.inc()
            self._slots.abandon()
            self._wake.set()

    def _give_up(self) -> None:
        """Stop the handlers that still run at the end of the drain time."""
        _LOG.warning("queue %s: stopping %s handlers", self.queue, len(self._slots.running))
        self._slots.return_running()
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(_STOPPING_S, self._give_back_stuck)

    def _give_back_stuck(self) -> None:
        """Leave handlers that did not stop to themselves; soon after, leave the database too."""
        self._slots.return_stuck()
        if self._serving is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(_SETTLING_S, self._serving.cancel)

    async def _close(self, parts: list[asyncio.Task[None]]) -> None:
        if self._listener is not None:
            self._listener.unsubscribe(self.queue, self.hint)
        if self._deadline is not None:
            self._deadline.cancel()
        self._slots.abandon()
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        worker, self.id = self.id, 0
        self._leases.release(worker)
        try:
            async with asyncio.timeout(_SETTLING_S):
                await self._session.insist(
                    lambda connection: WorkerStore(connection).retire(worker)
                )
        except TimeoutError:
            _LOG.warning("worker %s could not sign off; its lease will run out", worker)
        await self._session.close()
        await self._transactions.close()
        self._threads.close()


def _claiming(queue: str, tasks: Mapping[str, Task[Any, Any]]) -> Claiming:
    codes = {name: task.code for name, task in tasks.items() if task.code is not None}
    variants = {name: [code for code in task.codes if code] for name, task in tasks.items()}
    return Claiming(
        queue,
        tasks,
        dumps(codes).decode(),
        dumps(variants).decode(),
        has_lanes=any(task.definition.ordered for task in tasks.values()),
    )
