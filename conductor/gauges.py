"""Gauges that describe the whole queue, read from the database now and then.

Every process that serves metrics reads them and finds the same, so dashboards take the ``max``.
Counts are bounded: a backlog of millions must not make its own measurement slow. This module must
not measure the process itself.
"""

from __future__ import annotations

from typing import Final

from conductor.connections import Connections
from conductor.metrics import JOBS, OLDEST_READY, WORKERS, XMIN_AGE, Metrics
from conductor.periodic import Periodic
from conductor.store.operations import OperationStore

EVERY_S: Final = 10.0
COUNTED_AT_MOST: Final = 10_001
"""A gauge that shows this says: more than ten thousand."""


class Gauges:
    """Refreshes the gauges of the queue until stopped."""

    def __init__(self, connections: Connections, metrics: Metrics) -> None:
        self._connections = connections
        self._metrics = metrics
        self._loop = Periodic("gauges", self.tick, metrics)
        self.run = self._loop.run
        self.stop = self._loop.stop

    async def tick(self) -> float:
        """Read everything once; returns the seconds to the next time."""
        async with self._connections.lend() as connection:
            store = OperationStore(connection)
            queues = await store.queue_names()
            jobs = await store.count_jobs(COUNTED_AT_MOST)
            oldest = await store.oldest_ready()
            workers = await store.count_workers()
            xmin_age = await store.oldest_xmin()
        self._metrics.clear(JOBS)
        for queue, state, count in jobs:
            self._metrics.get(JOBS, queue, state).set(count)
        for metric, found in ((OLDEST_READY, oldest), (WORKERS, workers)):
            self._metrics.clear(metric)
            for queue in queues:
                self._metrics.get(metric, queue).set(found.get(queue, 0))
        self._metrics.get(XMIN_AGE).set(xmin_age)
        return EVERY_S
