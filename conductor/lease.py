"""The lease thread of a process: renews its workers' leases, and takes over from dead workers.

A lease is a counter in the worker's row. Whoever sees another's counter stand still for 8 s, by
its own monotonic clock and while it is itself connected, declares that worker dead and takes its
jobs: no two clocks are compared, and an outage of the database, a pause of this process or a step
of a clock kills nobody. The thread has a connection of its own, so that an event loop that is busy
does not look dead; a call that holds the interpreter's lock longer than the lease does, and its
jobs are fenced. This module must not run jobs.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from threading import Event, Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Final, Self

import psycopg

from conductor.store.leases import Ended, LeaseStore, Rescue
from conductor.store.sessions import Backoff, connect_blocking, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

WATCH_INTERVAL_S: Final = 0.5
DEAD_AFTER_S: Final = 8.0
RENEWALS: Final = 4  # in that time
MAX_CRASHES: Final = 3
RESCUE_BATCH: Final = 500
_LONGEST_GAP_S: Final = 1.0  # what one look may add to a standstill, however late it came

_LOG: Final = logging.getLogger("conductor.lease")


@dataclass(slots=True)
class Standstill:
    """For how long a renewal counter has been seen to stand still."""

    renewals: int
    still_s: float = 0.0


class Watch:
    """Who has stood still for how long. Pure: observations and elapsed times in, the dead out.

    >>> watch = Watch(dead_after_s=2.0)
    >>> [watch.observe({7: 1}, 1.0) for _ in range(3)]
    [[], [], [(7, 1)]]
    """

    def __init__(
        self, dead_after_s: float = DEAD_AFTER_S, *, longest_gap_s: float = _LONGEST_GAP_S
    ) -> None:
        self._dead_after_s = dead_after_s
        self._longest_gap_s = longest_gap_s
        self._seen: dict[int, Standstill] = {}

    def observe(self, counters: dict[int, int], elapsed_s: float) -> list[tuple[int, int]]:
        """Take note of all counters; return (worker, counter) of those that are dead.

        ``elapsed_s`` since the observation before counts up to the longest gap (a second): more was
        a pause of this process or an outage, during which others could not renew either. A counter
        below zero was declared dead by somebody, who may have died since.
        """
        before, self._seen = self._seen, {}
        dead: list[tuple[int, int]] = []
        for worker, renewals in counters.items():
            known = before.get(worker)
            if known is None or known.renewals != renewals:
                known = Standstill(renewals)
            else:
                known.still_s += min(elapsed_s, self._longest_gap_s)
            self._seen[worker] = known
            if renewals < 0 or known.still_s >= self._dead_after_s:
                dead.append((worker, renewals))
        return dead

    def forget(self) -> None:
        """Start again: the connection was lost, and with it the view of the others."""
        self._seen.clear()

    def next_death_s(self) -> float:
        """Return in how many seconds the first could be dead."""
        longest = max((known.still_s for known in self._seen.values()), default=0.0)
        return self._dead_after_s - longest


class Leases:
    """The leases of one process.

    Args:
        dsn: the queue database.
        on_rescue: told, from the thread, what was taken from a dead worker.
        dead_after_s: for how long another's counter must stand still; a living one is renewed four
            times in that time.

    >>> with Leases(dsn) as leases:  # doctest: +SKIP
    ...     leases.hold(worker_id, on_lost=stop_running)
    """

    def __init__(
        self,
        dsn: str,
        *,
        on_rescue: Callable[[Rescue], None] | None = None,
        on_reconnect: Callable[[], None] | None = None,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        self._dsn = dsn
        self._on_rescue, self._on_reconnect = on_rescue, on_reconnect
        self.dead_after_s = dead_after_s
        self._renew_interval_s = dead_after_s / RENEWALS
        self._watch = Watch(dead_after_s)
        self._held: dict[int, Callable[[], None]] = {}
        self._lock = Lock()
        self._stopped = Event()
        self._renewed_s = -1e9
        self._watched_s = monotonic()
        self._thread = Thread(target=self._run, name="conductor-leases", daemon=True)
        self.twice_crashed: set[int] = set()
        """Jobs here that two processes have died with: one at a time. For the event loop only."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; leases that are still held run out."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> Self:
        """Start the thread."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread."""
        self.stop()

    def hold(self, worker: int, on_lost: Callable[[], None]) -> None:
        """Renew this worker's lease; ``on_lost`` is called from the thread if it is gone."""
        with self._lock:
            self._held[worker] = on_lost

    def release(self, worker: int) -> None:
        """Stop renewing this worker's lease."""
        with self._lock:
            self._held.pop(worker, None)

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stopped.is_set():
            try:
                with connect_blocking(self._dsn, "conductor leases") as connection:
                    self._watch.forget()
                    self._watched_s = monotonic()
                    store = LeaseStore(connection)
                    while not self._stopped.is_set():
                        self._tick(store)
                        backoff.reset()
                        self._stopped.wait(self._pause_s())
            except psycopg.Error as error:
                _LOG.warning("leases: %s: %s", type(error).__name__, first_line(error))
                if self._on_reconnect is not None:
                    self._on_reconnect()
                self._stopped.wait(backoff.delay_s())

    def _pause_s(self) -> float:
        next_death_s = self._watch.next_death_s()
        due_s = self._renewed_s + self._renew_interval_s - monotonic()
        return max(min(WATCH_INTERVAL_S, next_death_s, due_s), 0.01)

    def _tick(self, store: LeaseStore) -> None:
        self._renew(store)
        counters = store.watch()
        now = monotonic()
        dead = self._watch.observe(counters, now - self._watched_s)
        self._watched_s = now
        for worker, renewals in dead:
            with self._lock:
                mine = worker in self._held
            if not mine and (renewals < 0 or store.declare_dead(worker, renewals)):
                self._rescue(store, worker)

    def _renew(self, store: LeaseStore) -> None:
        """Renew what is held, when it is time."""
        with self._lock:
            held = dict(self._held)
        if not held or monotonic() < self._renewed_s + self._renew_interval_s:
            return
        renewed = store.renew(held)
        self._renewed_s = monotonic()
        for worker in held.keys() - renewed:
            _LOG.error("worker %s was declared dead while it lived", worker)
            self.release(worker)
            held[worker]()

    def _rescue(self, store: LeaseStore, worker: int) -> None:
        """Take a dead worker's jobs in batches; its row goes last, so that others can go on."""
        rescued, ended = 0, Counter[Ended]()
        while not self._stopped.is_set():
            taken = store.rescue(worker, limit=RESCUE_BATCH, max_crashes=MAX_CRASHES)
            if not taken.rescued and not taken.ended:
                break
            rescued += taken.rescued
            ended.update(taken.ended)
            self._renew(store)
        buried = store.bury(worker)
        if rescued or ended or buried:
            failed = sum(jobs for (*_, outcome), jobs in ended.items() if outcome == "failed")
            _LOG.warning(
                "worker %s is dead: %s jobs run again, %s have crashed too often",
                worker, rescued, failed,
            )  # fmt: skip
            if self._on_rescue is not None:
                self._on_rescue(Rescue(rescued, ended))
