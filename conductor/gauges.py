"""Gauges that describe the whole queue, exported by one process at a time.

The duty is a row that its holder renews. A sidecar comes before a worker: it is there when every
worker is gone, which is when the gauges matter. Who does not hold the duty shows no such gauge.
Counts are bounded: a backlog of millions must not make its own measurement slow. Whether a worker
lives is judged here as well, by its counter: when all are gone nobody else declares one dead. This
module must not measure the process itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from math import nan
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import psycopg

from conductor.connections import Connections
from conductor.contract import INTERNAL_QUEUE
from conductor.errors import ConductorError
from conductor.lease import Watch
from conductor.metrics import (
    DEAD_LETTERS,
    FAILURES,
    GAPS_OPEN,
    GAUGES_READ,
    HALTED_LANES,
    JOBS,
    OLDEST_READY,
    RECONNECTS,
    STATES,
    TABLE,
    WORKERS,
    XMIN_AGE,
    Metrics,
)
from conductor.periodic import Periodic
from conductor.store.gauges import GaugeStore
from conductor.store.operations import OperationStore

EVERY_S: Final = 10.0
HELD_S: Final = 25.0
"""How long the duty stays with a process that does not renew it."""

COUNTED_AT_MOST: Final = 10_001
"""A gauge that shows this says: more than ten thousand."""

STILL_S: Final = 15.0
"""A worker that has renewed nothing for so long is not counted."""

WORKER, SIDECAR = 0, 1
"""Precedence: a sidecar takes the duty from a worker."""

_Seen = dict[str, tuple[int, float]]
"""By queue: the first that nobody has taken, and since when it is seen."""

_GIVE_UP_S: Final = 1.0
_DUTY: Final = "gauges"
_BY_QUEUE_AND_SLOT: Final = (
    JOBS,
    OLDEST_READY,
    WORKERS,
    HALTED_LANES,
    GAPS_OPEN,
    DEAD_LETTERS,
)
_ALONE: Final = (XMIN_AGE, GAUGES_READ)


class Gauges:
    """Refreshes the gauges of the queue until stopped, while it has the duty."""

    def __init__(
        self, connections: Connections, metrics: Metrics, *, precedence: int = WORKER
    ) -> None:
        self._connections = connections
        self._metrics = metrics
        self._precedence = precedence
        self._holder = uuid4().hex
        self._watch = Watch(STILL_S, longest_gap_s=EVERY_S)
        self._watched_s = monotonic()
        self._calls: _Seen = {}  # of lanes
        self._words: _Seen = {}  # that have come for jobs
        self._loop = Periodic("gauges", self.tick, metrics)
        self.stop = self._loop.stop
        self._forget()

    async def run(self) -> None:
        """Refresh until `stop`, then leave the duty to another process."""
        await self._loop.run()
        self._forget()
        with suppress(ConductorError, psycopg.Error, TimeoutError):
            async with asyncio.timeout(_GIVE_UP_S), self._connections.lend() as connection:
                await GaugeStore(connection).give_up_duty(_DUTY, self._holder)

    async def tick(self) -> float:
        """Read everything once, if it is our duty; returns the seconds to the next time."""
        try:
            async with self._connections.lend() as connection:
                store = GaugeStore(connection)
                mine = await store.take_duty(_DUTY, self._holder, self._precedence, HELD_S)
                if mine:
                    await self._read_queues(OperationStore(connection))
                    await self._read_router(store)
        except BaseException:
            self._forget()
            raise
        if mine:
            self._metrics.get(GAUGES_READ).set_to_current_time()
        else:
            self._forget()
        return EVERY_S

    async def _read_queues(self, store: OperationStore) -> None:
        queues = await store.queue_names()
        jobs = await store.count_jobs(COUNTED_AT_MOST)
        workers, dead = self._judge(await store.list_leases())
        oldest = await store.oldest_due(dead, COUNTED_AT_MOST)
        calls = await store.first_calls(self._positions(queues))
        words = await store.first_words(COUNTED_AT_MOST)
        for queue, since_s in (*_untaken(calls, self._calls), *_untaken(words, self._words)):
            oldest[queue] = min(oldest.get(queue, since_s), since_s)
        halted = await store.count_halted_lanes(COUNTED_AT_MOST)
        xmin_age = await store.oldest_xmin()
        self._metrics.clear(JOBS)
        for queue in queues:  # at 0, so that the first job is a rise
            for state in STATES:
                self._metrics.get(JOBS, queue, state)
        for queue, state, count in jobs:
            self._metrics.get(JOBS, queue, state).set(count)
        for metric, found in (
            (OLDEST_READY, oldest),
            (WORKERS, workers),
            (HALTED_LANES, halted),
        ):
            self._metrics.clear(metric)
            for queue in queues:
                self._metrics.get(metric, queue).set(found.get(queue, 0))
        self._metrics.get(XMIN_AGE).set(xmin_age)

    def _judge(self, leases: list[tuple[int, str, int]]) -> tuple[dict[str, int], set[int]]:
        """Return how many workers of each queue live, and which are dead."""
        now_s = monotonic()
        standing = self._watch.observe({w: n for w, _, n in leases}, now_s - self._watched_s)
        self._watched_s = now_s
        dead = {worker for worker, _ in standing}
        alive = Counter(queue for worker, queue, _ in leases if worker not in dead)
        return {**alive, INTERNAL_QUEUE: alive.total()}, dead

    def _positions(self, queues: list[str]) -> dict[str, int]:
        return {queue: self._calls.get(queue, (0, 0.0))[0] for queue in queues}

    async def _read_router(self, store: GaugeStore) -> None:
        gaps = await store.open_gaps()
        letters = await store.count_dead_letters(COUNTED_AT_MOST)
        self._metrics.clear(GAPS_OPEN)
        for slot, condition, count in gaps:
            self._metrics.get(GAPS_OPEN, slot, condition or "none").set(count)
        self._metrics.clear(DEAD_LETTERS)
        for slot, count in letters:
            self._metrics.get(DEAD_LETTERS, slot).set(count)

    def _forget(self) -> None:
        """Show nothing: another process does, or nobody can."""
        self._watch.forget()
        self._calls.clear()
        self._words.clear()
        for metric in _BY_QUEUE_AND_SLOT:
            self._metrics.clear(metric)
        for metric in _ALONE:
            self._metrics.get(metric).set(nan)


def _untaken(found: list[tuple[str, int, float]], seen: _Seen) -> list[tuple[str, float]]:
    """Return queues whose first call, or word, nobody has taken since it was seen, and when.

    Workers take them at once: whose job stands behind another one is no longer called for.
    """
    untaken = []
    for queue, first, now_s in found:
        known, since_s = seen.get(queue, (0, 0.0))
        if known == first:
            untaken.append((queue, since_s))
        else:
            seen[queue] = (first, now_s)
    return untaken


class SidecarGauges:
    """The same beside a sidecar: with a connection and a registry of its own.

    >>> gauges = SidecarGauges(dsn)  # doctest: +SKIP
    >>> task = asyncio.create_task(gauges.run())  # doctest: +SKIP
    """

    def __init__(self, dsn: str) -> None:
        table: tuple[Any, ...] = tuple(m for m in TABLE if m.scope == "queue database")
        metrics = Metrics((*table, RECONNECTS, FAILURES))
        self.registry = metrics.registry
        self._connections = Connections(dsn, 1, "cdc gauges")
        self._gauges = Gauges(self._connections, metrics, precedence=SIDECAR)
        self.stop = self._gauges.stop

    async def run(self) -> None:
        """Refresh until `stop`."""
        try:
            await self._gauges.run()
        finally:
            await self._connections.close()
