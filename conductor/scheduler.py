"""The cron tick: turns the instants of schedules into jobs, one job an instant in all processes.

Every worker process ticks. A due schedule is locked, its job inserted and its next instant set in
one transaction, so whoever moves a schedule fires it and nobody else does. After a downtime only
the latest missed instant fires; the others are counted. Time is the database's: the tick sleeps
for as long as the database says, at most a second, so that a schedule registered meanwhile is
seen. This module must not decide when an expression fires (`conductor.cron` does).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final

from conductor.connections import Connections
from conductor.cron import fires_between, next_fire
from conductor.errors import CronInvalid
from conductor.metrics import CRON_MISSED, CRON_TICK, ENQUEUED, Metrics
from conductor.periodic import Periodic
from conductor.store.schedules import DueSchedule, Firing, ScheduleStore

BATCH: Final = 200
LONGEST_SLEEP_S: Final = 1.0
COUNTED_AT_MOST: Final = 100_000
"""Missed instants that are counted one by one; a longer downtime counts as this many."""

_log = logging.getLogger("conductor.scheduler")


@dataclass(frozen=True, slots=True)
class Move:
    """What to do with a due schedule: fire for ``fires_at`` (if any), then stand at ``next_at``."""

    fires_at: datetime | None
    next_at: datetime
    missed: int


def plan_move(expression: str, timezone: str, due_at: datetime, now: datetime) -> Move:
    """Return which instant of [``due_at``, ``now``] fires (the latest) and what comes after.

    Raises CronInvalid when this process cannot read the expression or lacks the zone.

    >>> noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> plan_move("*/5 * * * *", "UTC", noon, noon + timedelta(minutes=11)).missed
    2
    """
    instants = islice(fires_between(expression, timezone, due_at, now), COUNTED_AT_MOST)
    latest, missed = due_at, 0
    for instant in instants:
        latest, missed = instant, missed + 1
    if missed == COUNTED_AT_MOST:
        latest = _latest(expression, timezone, latest, now)
    return Move(latest, next_fire(expression, timezone, now), missed)


def first_move(expression: str, timezone: str, begins_at: datetime, now: datetime) -> Move:
    """Return the first move of a schedule that was made at ``begins_at``. Raises CronInvalid.

    >>> noon = datetime(2026, 1, 1, 12, 1, tzinfo=UTC)
    >>> first_move("*/5 * * * *", "UTC", noon, noon).next_at.minute
    5
    """
    first = next_fire(expression, timezone, begins_at)
    if first > now:
        return Move(None, first, 0)
    return plan_move(expression, timezone, first, now)


def _latest(expression: str, timezone: str, known: datetime, now: datetime) -> datetime:
    """Return the last firing not later than ``now``, looking back further and further."""
    window = timedelta(hours=1)
    while now - window > known:
        instants = list(fires_between(expression, timezone, now - window, now))
        if instants:
            return instants[-1]
        window *= 2
    return known


class Scheduler:
    """Fires due schedules until stopped. ``hint`` is told the queues that got jobs."""

    def __init__(
        self, connections: Connections, metrics: Metrics, hint: Callable[[str], None]
    ) -> None:
        self._connections = connections
        self._hint = hint
        self._metrics = metrics
        self._unreadable: set[int] = set()
        self._loop = Periodic("scheduler", self.tick, metrics)
        self._missed = metrics.get(CRON_MISSED)
        self.run = self._loop.run
        self.stop = self._loop.stop

    async def tick(self) -> float:
        """Fire what is due now; returns the seconds until the next instant, at most 1."""
        async with self._connections.lend() as connection:
            async with connection.transaction():
                store = ScheduleStore(connection)
                due = await store.due_schedules(BATCH, self._unreadable)
                firings = await asyncio.to_thread(self._plan, due) if due else []
                fired = await store.fire_schedules(firings) if firings else []
            self._report(fired, sum(firing.missed for firing in firings))
            if due:
                return 0.0
            seconds = await store.until_next(self._unreadable)
        return LONGEST_SLEEP_S if seconds is None else min(max(seconds, 0.0), LONGEST_SLEEP_S)

    def _plan(self, due: list[DueSchedule]) -> list[Firing]:
        firings = []
        for schedule in due:
            try:
                plan = plan_move if schedule.is_planned else first_move
                move = plan(
                    schedule.expression, schedule.timezone, schedule.next_at, schedule.seen_at
                )
            except CronInvalid as error:
                # Left for a process that can: of another version, or with the zone's data.
                self._unreadable.add(schedule.id)
                _log.error(
                    "schedule %s of task %s cannot be fired here: %s",
                    schedule.name,
                    schedule.task,
                    error,
                )
                continue
            firings.append(_firing(schedule, move))
        return firings

    def _report(self, fired: list[tuple[str, str]], missed: int) -> None:
        self._metrics.get(CRON_TICK).set_to_current_time()
        self._missed.inc(missed)
        for (queue, task), count in Counter(fired).items():
            self._metrics.get(ENQUEUED, queue, task, "cron").inc(count)
        for queue in {queue for queue, _ in fired}:
            self._hint(queue)


def _firing(schedule: DueSchedule, move: Move) -> Firing:
    fired_at = None if move.fires_at is None else _iso(move.fires_at)
    firing = {"schedule": schedule.name, "scheduled_at": fired_at}
    return Firing(
        id=schedule.id,
        due_at=_iso(schedule.next_at),
        fired_at=fired_at,
        next_at=_iso(move.next_at),
        missed=move.missed,
        payload=firing,
        metadata={**(schedule.metadata or {}), **firing} if schedule.has_payload else None,
    )


def _iso(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat()
