"""Maintenance: history's partitions, what has expired, and registrations nobody stands behind.

History is partitioned by the day on which its jobs may be forgotten. Partitions are made ahead, so
that midnight never waits for one, and dropped when their day has come; rows of days without one
lie in the default partition and are deleted in batches. Every process runs this now and then, one
at a time. Statements that need a strong lock give up quickly and are tried again: a settle never
waits for maintenance longer than that. This module must not touch jobs that are alive.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from datetime import date, timedelta
from functools import partial
from math import ceil
from typing import Any, Final

from psycopg import AsyncConnection, errors

from conductor.connections import Connections
from conductor.metrics import MAINTAINED, Metrics
from conductor.periodic import Periodic
from conductor.store.maintenance import Days, MaintenanceStore
from conductor.store.registration import RegistrationStore
from conductor.store.sessions import brief_transaction

EVERY_S: Final = 60.0
AHEAD_DAYS: Final = 7
DEFAULT_RETENTION_DAYS: Final = 7  # of jobs whose task is not registered (any more)
PARTITIONED_DAYS: Final = 100
"""How far ahead partitions are made; what expires later lies in the default partition."""

ABANDONED_AFTER_S: Final = 600.0
"""How long nobody must have offered a task of an older version before it is retired."""

_BATCH: Final = 5000
_LOCK_TIMEOUT_S: Final = 0.2
_ATTEMPTS: Final = 5
_PREFIX: Final = "history_"

_log = logging.getLogger("conductor.maintenance")

Statement = Callable[[MaintenanceStore], Awaitable[Any]]


def partition_name(day: date) -> str:
    """Return the name of the partition of an expiry day.

    >>> partition_name(date(2026, 1, 31))
    'history_20260131'
    """
    return f"{_PREFIX}{day:%Y%m%d}"


def partition_day(name: str) -> date:
    """Return the expiry day of a partition; the inverse of `partition_name`."""
    digits = name.removeprefix(_PREFIX)
    return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))


def expired_partitions(days: Days) -> list[str]:
    """Return the partitions whose jobs may be forgotten today."""
    return [name for name in days.partitions if partition_day(name) <= days.today]


def missing_days(days: Days) -> list[date]:
    """Return the days that should have a partition and have none, in order.

    A job that ends today expires after its retention and the rest of a day; so many days, and a
    week more, in case nobody maintains for that long.
    """
    retention = max(days.longest_days, DEFAULT_RETENTION_DAYS)
    reach = min(ceil(min(retention, PARTITIONED_DAYS)) + 1 + AHEAD_DAYS, PARTITIONED_DAYS)
    wanted = (days.today + timedelta(days=n) for n in range(1, reach + 1))
    existing = set(days.partitions)
    return [day for day in wanted if partition_name(day) not in existing]


class Maintenance:
    """Maintains the queue until stopped."""

    def __init__(self, connections: Connections, metrics: Metrics) -> None:
        self._connections = connections
        self._done = metrics.get(MAINTAINED)
        self._loop = Periodic("maintenance", self.tick, metrics)
        self.run = self._loop.run
        self.stop = self._loop.stop

    async def tick(self) -> float:
        """Do what is due, unless another process is doing it; returns the seconds to the next."""
        async with self._connections.lend() as connection:
            await self.maintain(connection)
        self._done.set_to_current_time()
        return EVERY_S * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, no secret

    async def maintain(self, connection: AsyncConnection[Any]) -> None:
        """Do everything once, each piece in a transaction of its own."""
        await partition_history(connection)
        for purge in (
            MaintenanceStore.purge_default,
            MaintenanceStore.purge_dedupe_keys,
            MaintenanceStore.purge_steps,
        ):
            while await _alone(connection, partial(purge, batch=_BATCH)):
                pass
        await _alone(connection, MaintenanceStore.open_stray_lanes)
        await _alone(connection, MaintenanceStore.call_stalled_lanes)
        await retire_abandoned(connection, ABANDONED_AFTER_S)
        await retire_unawaited(connection)


async def partition_history(connection: AsyncConnection[Any]) -> None:
    """Drop the partitions that have expired and add those that are missing.

    Also to be called before workers settle for the first time: a day of which the default
    partition holds rows already gets none.
    """
    store = MaintenanceStore(connection)
    days = await store.plan_days()
    missing = missing_days(days)
    taken = await store.defaulted_days(missing) if missing else set()
    try:
        for name in expired_partitions(days):
            await _insist(connection, partial(MaintenanceStore.drop_partition, name=name))
        for day in (day for day in missing if day not in taken):
            add = partial(MaintenanceStore.add_partition, name=partition_name(day), day=day)
            await _insist(connection, add)
    except errors.InsufficientPrivilege as error:
        # Only the owner can: the default partition keeps and purges what comes meanwhile.
        _log.warning("history is not partitioned by this role: %s", error.diag.message_primary)


async def _alone(connection: AsyncConnection[Any], statement: Statement) -> Any:
    """Run a statement as the only maintainer; None when there is another one."""
    async with brief_transaction(connection):
        store = MaintenanceStore(connection)
        return await statement(store) if await store.try_lock() else None


async def _insist(connection: AsyncConnection[Any], statement: Statement) -> None:
    """Run a statement that needs a strong lock, waiting for it only shortly, a few times."""

    async def impatient(store: MaintenanceStore) -> None:
        await store.set_lock_timeout(_LOCK_TIMEOUT_S)
        await statement(store)

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            await _alone(connection, impatient)
        except (errors.LockNotAvailable, errors.DeadlockDetected) as error:
            _log.info("attempt %s of %s: %s", attempt, _ATTEMPTS, error.diag.message_primary)
        except (errors.DuplicateTable, errors.UndefinedTable, errors.CheckViolation) as error:
            # Another process was faster, or the default partition got a row of that day.
            _log.info("left as it is: %s", error.diag.message_primary)
            return
        else:
            return


async def retire_abandoned(connection: AsyncConnection[Any], grace_s: float) -> list[str]:
    """Retire tasks that the newest version of their application lacks and nobody offers.

    Returns ``app/task`` names. Safe beside registrations: it takes the same lock.
    """
    store = RegistrationStore(connection)
    await store.mark_seen()
    retired: list[str] = []
    for app in await store.abandoned_apps(grace_s):
        async with brief_transaction(connection):
            await store.lock_app(app)
            names = await store.retire_abandoned(app, grace_s)
            await store.notify_subscriptions(app)
        retired += [f"{app}/{name}" for name in names]
    _report(retired)
    return retired


async def retire_unawaited(connection: AsyncConnection[Any]) -> int:
    """Retire what woke jobs of older versions, once none of them works or waits; return how many.

    Safe beside registrations: it takes the same lock.
    """
    store = RegistrationStore(connection)
    retired = 0
    for app in await store.app_names():
        async with brief_transaction(connection):
            await store.lock_app(app)
            if count := await store.retire_unawaited(app):
                await store.notify_subscriptions(app)
        retired += count
    return retired


def _report(retired: Iterable[str]) -> None:
    for name in retired:
        _log.warning("retired %s: a newer version lacks it and no worker offers it", name)
