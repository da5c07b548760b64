"""Emitted events become jobs: one for each live subscription, exactly once.

``emit`` leaves one dispatch job in the emitter's transaction. Every worker process takes them in
batches; a batch's dispatch jobs are deleted and the subscribers' jobs inserted in one transaction.
Which subscriptions are live is asked in that transaction, so an event emitted after a start has
returned always reaches what was registered there. An event that nobody wants is counted, one that
cannot be read ends as a failed job. Jobs that wait for an event are told as well
(`conductor.wakeups`). This module must not decide what matches (`conductor.matching` does).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import orjson

from conductor.connections import Connections
from conductor.errors import FilterFailed
from conductor.matching import EventFilter, EventIndex, Subscription
from conductor.metrics import (
    ENQUEUED,
    EVENTS_DISPATCHED,
    EVENTS_REFUSED,
    EVENTS_UNDELIVERED,
    EVENTS_UNMATCHED,
    Metrics,
)
from conductor.periodic import Periodic
from conductor.store.dispatch import START, Dispatch, DispatchStore, Position
from conductor.store.waits import WaitStore
from conductor.wakeups import Message, leave_word

BATCH: Final = 500
IDLE_INITIAL_S: Final = 0.1
IDLE_MAX_S: Final = 1.0

_LOOK_BACK: Final = timedelta(seconds=2)
_LOOK_BACK_EVERY_S: Final = 0.25
_FULL_EVERY_S: Final = 1.0
_FULL_SHARE: Final = 20  # a full scan may cost a twentieth of the time

_log = logging.getLogger("conductor.dispatcher")


class MovingCursor:
    """Where the next scan of the dispatch jobs begins, so that none walks over all dead entries.

    Most scans go on where the last ended. Jobs that were committed late lie behind that: every
    250 ms a scan looks 2 s back, and from time to time one looks everywhere. Instants are of a
    monotonic clock, in seconds.
    """

    def __init__(self) -> None:
        self._position = START
        self._look_back_at = 0.0
        self._full_at = 0.0
        self._is_full = False

    def start(self, now_s: float) -> Position:
        """Return the position the scan that begins now starts behind."""
        self._is_full = now_s >= self._full_at
        if self._is_full or self._position == START:
            return START
        if now_s >= self._look_back_at:
            self._look_back_at = now_s + _LOOK_BACK_EVERY_S
            rank, run_at, _ = self._position
            return Position(rank, run_at - _LOOK_BACK, 0)
        return self._position

    def moved(self, last: Position | None, took_s: float, now_s: float, *, more: bool) -> None:
        """Note how the scan ended: at ``last`` (None: it found nothing) after ``took_s``.

        With ``more`` to come (a full batch) the cursor also moves back: the rest of what a look
        back or a full scan has found lies right behind ``last``.
        """
        if self._is_full:
            self._full_at = now_s + max(_FULL_EVERY_S, _FULL_SHARE * took_s)
        if last is not None:
            self._position = last if more else max(self._position, last)


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What became of one batch of dispatch jobs."""

    jobs: list[tuple[Subscription, Dispatch]]
    events: int
    unmatched: int
    refused: int
    failed: int = 0  # jobs that failed at once, for their filter could not be evaluated
    waiting: Sequence[int] = ()  # jobs that were waiting for one of the events
    undelivered: int = 0  # events, by subscription, that one did not get: it cannot be read


class Dispatcher:
    """Dispatches emitted events until stopped.

    ``hint`` is told the queues that got jobs, after the commit. `wake` says that there may be
    events.
    """

    def __init__(
        self, connections: Connections, metrics: Metrics, hint: Callable[[str], None]
    ) -> None:
        self._connections = connections
        self._metrics = metrics
        self._hint = hint
        self._cursor = MovingCursor()
        self._idle_s = IDLE_INITIAL_S
        self._loop = Periodic("dispatcher", self.tick, metrics)
        self._dispatched = metrics.get(EVENTS_DISPATCHED)
        self._unmatched = metrics.get(EVENTS_UNMATCHED)
        self._refused = metrics.get(EVENTS_REFUSED)
        self._undelivered = metrics.get(EVENTS_UNDELIVERED)
        self.run = self._loop.run
        self.stop = self._loop.stop
        self.wake = self._loop.wake

    async def tick(self) -> float:
        """Dispatch one batch; returns the seconds until the next pass, 0 while there is more."""
        if await self.dispatch():
            self._idle_s = IDLE_INITIAL_S
            return 0.0
        idle_s = self._idle_s
        self._idle_s = min(idle_s * 2, IDLE_MAX_S)
        return idle_s

    async def dispatch(self) -> int:
        """Dispatch one batch and return how many events it had."""
        async with self._connections.lend() as connection:
            began_s = time.monotonic()
            async with connection.transaction():
                store = DispatchStore(connection)
                taken = await store.take_dispatches(self._cursor.start(began_s), BATCH)
                took_s = time.monotonic() - began_s
                batch = await _fan_out(store, WaitStore(connection), taken)
        # After the commit: a batch that is rolled back is found where it was.
        last = taken[-1].position if taken else None
        more = len(taken) == BATCH
        self._cursor.moved(last, took_s, time.monotonic(), more=more)
        self._count(batch)
        queues = {subscription.queue for subscription, _ in batch.jobs}
        if batch.waiting:
            async with self._connections.lend() as connection:
                queues |= await WaitStore(connection).wake(batch.waiting)
        for queue in queues:
            self._hint(queue)
        return len(taken)

    def _count(self, batch: Dispatched) -> None:
        self._dispatched.inc(batch.events)
        self._unmatched.inc(batch.unmatched)
        self._undelivered.inc(batch.undelivered)
        if batch.refused:
            self._refused.inc(batch.refused)
            _log.error("%s emitted events cannot be read; their jobs failed", batch.refused)
        if batch.failed:
            self._refused.inc(batch.failed)
            _log.error("%s filters of events failed, and the jobs with them", batch.failed)
        made = Counter((subscription.queue, subscription.task) for subscription, _ in batch.jobs)
        for (queue, task), count in made.items():
            self._metrics.get(ENQUEUED, queue, task, "event").inc(count)


async def _fan_out(store: DispatchStore, waits: WaitStore, taken: Sequence[Dispatch]) -> Dispatched:
    """Insert the jobs of what was taken, in the transaction that took it."""
    if not taken:
        return Dispatched([], 0, 0, 0)
    events, refused = read_events(taken)
    subscriptions = await store.subscriptions_of({event for event, _ in events})
    index = EventIndex(subscriptions.read)
    jobs, failed = select_jobs(events, index)
    if jobs:
        await store.add_event_jobs(jobs)
    if failed:
        await store.fail_event_jobs(failed)
    if refused:
        await store.refuse_dispatches(refused)
    waiting = await leave_word(waits, [_message(*event) for event in events if event[1].emitted_by])
    unmatched = sum(1 for event, _ in events if not index.match(event)) if not waiting else 0
    undelivered = sum(subscriptions.unreadable[event] for event, _ in events)
    return Dispatched(jobs, len(events), unmatched, len(refused), len(failed), waiting, undelivered)


def _message(event: str, dispatch: Dispatch) -> Message:
    payload = orjson.loads(dispatch.payload)["payload"]
    return Message(event, payload, dispatch.emitted_by or "", dispatch.payload)


def select_jobs(
    events: Sequence[tuple[str, Dispatch]], index: EventIndex
) -> tuple[list[tuple[Subscription, Dispatch]], list[tuple[Subscription, Dispatch, str]]]:
    """Return the jobs of events, and those whose filter failed with the reason."""
    jobs: list[tuple[Subscription, Dispatch]] = []
    failed: list[tuple[Subscription, Dispatch, str]] = []
    for event, dispatch in events:
        for subscription in index.match(event):
            try:
                if _is_wanted(subscription, dispatch):
                    jobs.append((subscription, dispatch))
            except FilterFailed as error:
                failed.append((subscription, dispatch, str(error)))
    return jobs, failed


def _is_wanted(subscription: Subscription, dispatch: Dispatch) -> bool:
    wanted = subscription.filter
    if not isinstance(wanted, EventFilter) or wanted.when is None:
        return True
    return wanted.admits(orjson.loads(dispatch.payload)["payload"])


def read_events(
    taken: Sequence[Dispatch],
) -> tuple[list[tuple[str, Dispatch]], list[tuple[Dispatch, str]]]:
    """Return (event, dispatch job) of those that can be read, and the others with the reason."""
    events: list[tuple[str, Dispatch]] = []
    refused: list[tuple[Dispatch, str]] = []
    for dispatch in taken:
        try:
            envelope = orjson.loads(dispatch.payload)
        except orjson.JSONDecodeError as error:  # json takes what is no text: "\\ud800"
            refused.append((dispatch, str(error)))
            continue
        event = envelope.get("event") if isinstance(envelope, dict) else None
        if isinstance(event, str) and "payload" in envelope:
            events.append((event, dispatch))
        else:
            refused.append((dispatch, "not an object with the name of an event and its payload"))
    return events, refused
