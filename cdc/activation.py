"""From a registered subscription to a stamped one: when it begins and ends to route.

A new table reaches the stream only for transactions that touch it after the publication was
changed; one that was writing meanwhile delivers a part. So a subscription begins at a marker that
is put into the WAL when every such writer has ended; the marker's commit is the stamp, written with
the jobs of that transaction, and a replay routes exactly as the first pass did (router-rules 13).

`Activator` is the leader's loop that brings what a `SubscriptionBook` has forward. It holds no
durable state: a subscription without a stamp is marked again.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog

from cdc import queries
from cdc.catalog import TableName
from cdc.connection import Connection, queue_errors, source_errors
from cdc.cut_over import CutOver
from cdc.errors import CdcError, PublicationError, TableMissing
from cdc.lsn import Lsn
from cdc.marker import PREFIX, Marker
from cdc.publication import PublicationKeeper, Reconciled
from cdc.slots import SlotKeeper
from cdc.subscriptions import Entry, SubscriptionBook
from cdc.wanted import Wanted, dotted

POLL_S: Final = 1.0
LOOK_AGAIN_S: Final = 3.0
"""How often the source's catalog is compared when no subscription has changed: for what somebody
else has done to the publication, or about a table that was refused."""

WRITER_POLL_S: Final = 0.1
SLOW_WRITER_S: Final = 5.0


class ActivationMetrics(Protocol):
    """What the activator reports."""

    def subscriptions(self, *, active: int, pending: int, refused: int) -> None:
        """How many route, wait to begin, or cannot begin or go on."""

    def condition(self, name: str) -> None:
        """A condition was met."""

    def tasks(self, names: Iterable[str]) -> None:
        """Whose jobs may be routed."""


_Capture = tuple[int, bool]
"""A table's OID, and whether its inserts alone are meant (and truncates)."""


def _capture(wanted: Wanted, reconciled: Reconciled) -> _Capture:
    return reconciled.published[wanted.table], wanted.is_insert_only


@dataclass(slots=True)
class _Writers:
    """The transactions that may have written to a table before it was published to them."""

    transactions: set[str]
    pids: set[int]
    since_s: float
    reported: bool = False


@dataclass(slots=True)
class Activator:
    """The leader's loop: publish, wait for writers, mark.

    Args:
        book: the subscriptions.
        keeper: the publication.
        slots: the slot, whose stamps and gaps they are.
        source: an ordinary connection to the source database.
        listener: a connection to the queue database, for LISTEN alone.
        nonce: of the progress row; the marker proves with it that it is ours.
        metrics: where to report.
        routed_lsn: gives the position of the router.
        cut_over: brings the second publication into the stream.
    """

    book: SubscriptionBook
    keeper: PublicationKeeper
    slots: SlotKeeper
    source: Connection
    listener: Connection
    nonce: str
    metrics: ActivationMetrics
    routed_lsn: Callable[[], int]
    cut_over: CutOver
    _writers: dict[_Capture, _Writers] = field(default_factory=dict)
    _effective: set[_Capture] = field(default_factory=set)
    _marked_start: set[int] = field(default_factory=set)
    _marked_end: set[int] = field(default_factory=set)
    _reconciled: Reconciled | None = None
    _seen_revision: int = -1
    _looked_s: float = 0.0
    _well_until: Lsn | None = None  # routed when the publication was last seen to be right
    _said: dict[object, str] = field(default_factory=dict)
    _log: Any = field(default_factory=lambda: structlog.get_logger("cdc"))

    async def run(self) -> None:
        """Look at once, then at every notification, at least every second. Never returns.

        Raises:
            PublicationMissing, PublicationDrift: what is captured was taken out by somebody else.
            TableMissing: a captured table is gone, and the keeper does not tolerate that.
            SourceUnavailable, QueueUnavailable: a connection was lost.
        """
        with queue_errors():
            await self.listener.execute(queries.LISTEN_SUBSCRIPTIONS)
        while True:
            await self.step()
            if self._writers or self.cut_over.is_pending:
                await asyncio.sleep(WRITER_POLL_S)
            else:
                await self._wait_for_notification()

    async def step(self) -> None:
        """Bring every subscription as far forward as it can go now."""
        await self.book.refresh()
        changes = self.book.changes
        reconciled = await self._reconcile(changes)
        await self._carry_inserts(reconciled)
        starting = [
            e
            for e in changes
            if e.start_lsn is None
            and e.subscription.id not in self._marked_start
            and e.subscription.id not in reconciled.refused
            and self._is_published(e.wanted, reconciled)
        ]
        oid_of = reconciled.published
        back = oid_of.keys() & self.book.past.interrupted
        self._note_effective(changes, reconciled, back)
        waiting = {_capture(e.wanted, reconciled) for e in starting}
        waiting |= {(oid_of[table], table in reconciled.inserts) for table in back}
        await self._await_writers(waiting, reconciled)
        start = [e for e in starting if _capture(e.wanted, reconciled) in self._effective]
        # Messages are in no publication: what is emitted after the mark's commit is routed.
        start += [
            e
            for e in self.book.entries
            if not e.is_change
            and e.start_lsn is None
            and e.subscription.id not in self._marked_start
        ]
        await self._mark(start=start, end=self._ending(self.book.entries, start))
        await self._end_interruptions(changes, reconciled)

    async def _carry_inserts(self, reconciled: Reconciled) -> None:
        """See to it that the stream carries the second publication, if a table is for it."""
        if not reconciled.needs_inserts or reconciled.inserts_oid is None:
            return
        await self.cut_over.advance(reconciled.inserts_oid, reconciled.captured_inserts)

    def _is_published(self, wanted: Wanted, reconciled: Reconciled) -> bool:
        """Whether all that it wants is published, and reaches the stream."""
        if wanted.table in reconciled.inserts:
            oid = reconciled.inserts_oid
            return wanted.is_insert_only and oid is not None and self.cut_over.carries(oid)
        return wanted.table in reconciled.published

    def _note_effective(
        self, changes: list[Entry], reconciled: Reconciled, back: Collection[TableName]
    ) -> None:
        """Note what is routed already, and so captured: no writer has to be waited for again.

        Inserts alone say nothing of updates: the table may just have been moved.
        """
        oid_of = reconciled.published
        for e in changes:
            if e.routes and e.wanted.table in oid_of.keys() - back:
                self._is_effective(_capture(e.wanted, reconciled))
        for table in reconciled.inserts:
            self._effective.discard((oid_of[table], False))

    def _is_effective(self, capture: _Capture) -> None:
        self._effective |= {capture, (capture[0], True)}

    def _ending(self, entries: list[Entry], start: list[Entry]) -> list[Entry]:
        """Return what ends at this marker: an old definition not before the new one begins.

        Between two markers neither would route.
        """
        starting = {e.subscription.id for e in start} | self._marked_start
        awaited = {
            e.place
            for e in entries
            if not e.retired and e.start_lsn is None and e.subscription.id not in starting
        }
        return [
            e
            for e in entries
            if e.retired
            and e.routes
            and e.place not in awaited
            and e.subscription.id not in self._marked_end
        ]

    async def _reconcile(self, entries: list[Entry]) -> Reconciled:
        now_s = asyncio.get_running_loop().time()
        if (
            self._reconciled is None
            or self._seen_revision != self.book.revision
            or now_s - self._looked_s >= LOOK_AGAIN_S
        ):
            routed_lsn = Lsn(self.routed_lsn())
            try:
                self._reconciled = await self.keeper.reconcile(
                    [entry.wanted for entry in entries],
                    past=self.book.past,
                    carries=self.cut_over.carries,
                )
            except PublicationError as error:
                error.since = self._well_until
                raise
            self._seen_revision, self._looked_s = self.book.revision, now_s
            self._report(entries, self._reconciled)
            await self._begin_interruptions(self._reconciled)
            await self._remember(self._reconciled)
            self._well_until = routed_lsn
        return self._reconciled

    async def _remember(self, reconciled: Reconciled) -> None:
        past = self.book.past
        seen = reconciled.memberships, reconciled.insert_memberships, reconciled.applied
        if seen != (past.memberships, past.insert_memberships, past.applied):
            await self.slots.remember(seen[0], self.nonce, *seen[1:])

    async def _begin_interruptions(self, reconciled: Reconciled) -> None:
        """Leave a gap, once, for each captured table that is gone: the others go on."""
        for table, error in reconciled.missing.items():
            if table not in self.book.past.interrupted:
                error.since = self._well_until
                await self.slots.open_gap(error, policy="continue")
                self.metrics.condition(TableMissing.condition)
                self._log.error(
                    "condition", condition=error.condition, error=str(error), hint=error.hint
                )

    async def _end_interruptions(self, entries: list[Entry], reconciled: Reconciled) -> None:
        """End the gaps of tables that are captured whole again, or that nobody wants any more."""
        live = {e.wanted.table for e in entries if not e.retired}
        over = {
            table
            for table in self.book.past.interrupted
            if table not in reconciled.missing
            and (table not in live or self._is_captured(table, reconciled))
        }
        if over:
            await self.slots.end_interruptions(over)
            self._log.info("interruption_ended", tables=sorted(map(dotted, over)))

    def _is_captured(self, table: TableName, reconciled: Reconciled) -> bool:
        oid = reconciled.published.get(table)
        return oid is not None and (oid, table in reconciled.inserts) in self._effective

    async def _wait_for_notification(self) -> None:
        with queue_errors():
            async for _ in self.listener.notifies(timeout=POLL_S, stop_after=1):
                pass

    async def _await_writers(self, waiting: set[_Capture], reconciled: Reconciled) -> None:
        """Find out which tables' earlier writers have all ended, without queueing for a lock."""
        published = set(reconciled.published.values())
        self._effective = {capture for capture in self._effective if capture[0] in published}
        needed = waiting - self._effective
        self._writers = {c: w for c, w in self._writers.items() if c in needed}
        if not needed:
            return
        oids = sorted({oid for oid, _ in needed})
        with source_errors():
            cursor = await self.source.execute(queries.WRITERS, {"oids": oids})
            rows = await cursor.fetchall()
        now_s = asyncio.get_running_loop().time()
        for capture in needed:
            oid = capture[0]
            present = {row["transaction"]: row["pid"] for row in rows if row["oid"] == oid}
            writers = self._writers.setdefault(capture, _Writers(set(present), set(), now_s))
            writers.transactions &= set(present)
            writers.pids = {present[t] for t in writers.transactions if present[t] is not None}
            if not writers.transactions:
                del self._writers[capture]
                self._is_effective(capture)
            elif now_s - writers.since_s > SLOW_WRITER_S and not writers.reported:
                writers.reported = True
                self._log.warning(
                    "activation_waits",
                    tables=sorted(dotted(t) for t, o in reconciled.published.items() if o == oid),
                    pids=sorted(writers.pids),
                    hint="the subscription begins when these transactions have ended",
                )

    async def _mark(self, *, start: list[Entry], end: list[Entry]) -> None:
        if not start and not end:
            return
        marker = Marker(
            slot=self.slots.name,
            nonce=self.nonce,
            start=tuple(e.subscription.id for e in start),
            end=tuple(e.subscription.id for e in end),
        )
        with source_errors():
            await self.source.execute(
                queries.EMIT_MARK, {"prefix": PREFIX, "content": marker.encode()}
            )
        self._marked_start.update(marker.start)
        self._marked_end.update(marker.end)
        self._log.info("subscriptions_marked", start=list(marker.start), end=list(marker.end))

    def _report(self, entries: list[Entry], reconciled: Reconciled) -> None:
        refused = reconciled.refused
        started = [e for e in entries if e.start_lsn is not None]
        gone = sum(e.wanted.table in reconciled.missing for e in started if not e.retired)
        self.metrics.subscriptions(
            active=len(started) - gone,
            pending=len(entries) - len(started) - len(refused),
            refused=len(refused) + gone,
        )
        by_id = {e.subscription.id: e.subscription for e in entries}
        self.metrics.tasks({subscription.task for subscription in by_id.values()})
        for subscription_id, error in refused.items():
            self._say_once(
                subscription_id,
                "subscription_refused",
                error,
                subscription=subscription_id,
                task=by_id[subscription_id].task,
            )
        self._say_once("publication", "publication_unchanged", reconciled.obstacle)

    def _say_once(self, key: object, event: str, error: CdcError | None, **fields: object) -> None:
        """Log a lasting trouble when it begins or changes, not every second."""
        if error is None:
            self._said.pop(key, None)
        elif self._said.get(key) != str(error):
            self._said[key] = str(error)
            self._log.warning(event, error=str(error), hint=error.hint, **fields)
