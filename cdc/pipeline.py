"""The pump: stream → transactions → routing → sink, and what is acknowledged for it.

Three loops share one position. The reader decodes and routes what has arrived; the writer commits
what is routed, always as much as arrived while the last commit was under way, so there is no timer
on the hot path; the status loop tells the server where we are, asked or not. When the writer falls
behind, the reader stops taking rows from the socket; the status loop goes on, so the server never
takes a slow sink for a dead client.

This module must not open connections or decide who leads: it is given a stream and a sink, and ends
by an error of either, or by `stop`.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, Protocol

from cdc import emission
from cdc.emission import EventRouter, Place
from cdc.errors import RelationUnknown, ServerDecodeError, UndecodableMessage
from cdc.lsn import Lsn
from cdc.marker import PREFIX, Marker, decode_marker
from cdc.pending import Pending
from cdc.progress import Progress
from cdc.relations import describe_shape
from cdc.routing import DeadLetter, Router
from cdc.sink import DURABLE_EVERY_S, Sink, Stamp
from cdc.tracing import TransactionSpans, committed
from cdc.transactions import UNCERTAIN, TransactionReader
from cdc.wire.frames import XLOG_DATA, XLOG_DATA_HEADER_SIZE, Keepalive, parse_frame
from cdc.wire.messages import (
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Relation,
    Truncate,
    Update,
)
from conductor.matching import Subscription

READ_FRAMES: Final = 1024
READ_BYTES: Final = 256 << 10
BURST_END_S: Final = 0.02
HINT_EVERY_S: Final = 0.005
STATUS_EVERY_S: Final = 1.0


class Stream(Protocol):
    """What the pump needs of a replication stream."""

    async def read(self, limit: int, limit_bytes: int) -> list[bytes]:
        """Return up to `limit` CopyData payloads: those that are there, at least one.

        No more once they have `limit_bytes`. Lets the event loop run once in any case.
        """

    async def send_status(
        self, write_lsn: int, flush_lsn: int, apply_lsn: int, *, reply_requested: bool = False
    ) -> None:
        """Send a standby status update."""


class SubscriptionSource(Protocol):
    """Where subscriptions and their stamps for this slot come from."""

    revision: int
    """Rises whenever anything of it changes."""

    @property
    def stamped(self) -> list[tuple[Subscription, int | None, int | None]]:
        """Every subscription that the slot routes with its start and end stamp."""

    async def refresh(self) -> None:
        """Read them again."""


@dataclass(slots=True)
class Committed:
    """One sink transaction, for metrics."""

    jobs_by_head: Counter[bytes]
    dead_letters: int
    duration_s: float
    commit_time_us: int  # of the oldest source transaction in it; 0 when it held no rows
    end_lsn: int


class PipelineMetrics(Protocol):
    """What the pump reports. Called per read and per commit, never per change."""

    def read(self, kinds: Counter[type], size_bytes: int, unmatched: int) -> None:
        """Messages of each kind have been decoded."""

    def emitted(self, *, matched: int, unmatched: int) -> None:
        """Events that were emitted through the WAL have been routed."""

    def committed(self, committed: Committed) -> None:
        """A sink transaction has been committed."""

    def waited(self, seconds: float) -> None:
        """The reader has waited that long for the writer."""

    def positions(self, *, received: int, routed: int, acknowledged: int, server: int) -> None:
        """Where everybody stands, as LSNs."""


_head_of = attrgetter("head")
_ROW_CHANGES: Final = (Insert, Update, Delete)


class Pipeline:
    """One leadership's run. `run` returns after `stop`, or raises a `CdcError`."""

    def __init__(
        self,
        *,
        slot: str,
        stream: Stream,
        sink: Sink,
        subscriptions: SubscriptionSource,
        metrics: PipelineMetrics,
        status_every_s: float = STATUS_EVERY_S,
        emit_secret: str | None = None,
    ) -> None:
        """Make one, for a stream that has started.

        `emit_secret` is what emitted events carry, where this slot routes them.
        """
        position = sink.position
        self._slot = slot
        self._stream = stream
        self._sink = sink
        self._subscriptions = subscriptions
        self._metrics = metrics
        self._status_every_s = status_every_s
        self._wanted: set[int] = set()
        self._reader = TransactionReader(position.routed_lsn, wanted=self._wanted)
        self._router = Router(
            position.generation,
            [s for s, start, end in subscriptions.stamped if start is not None and end is None],
        )
        self._events = EventRouter(
            position.generation, emit_secret, self._router.active, is_local=position.is_local
        )
        self._revision = subscriptions.revision
        self._spans = TransactionSpans(slot)
        self._progress = Progress(position.routed_lsn, position.acknowledged_lsn)
        self._pending = Pending()
        self._marker: Marker | None = None
        self._uncommitted: Counter[bytes] = Counter()  # jobs written in the open sink transaction
        self._hints: set[str] = set()
        self._hinted_at_s = 0.0
        self._server_lsn = 0
        self._status_due = asyncio.Event()
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._stop = asyncio.Event()

    @property
    def acknowledged_lsn(self) -> int:
        """Everything below it is durable in the queue database."""
        return self._progress.acknowledgeable()

    def stop(self) -> None:
        """Stop reading, commit what is whole, acknowledge it, return."""
        self._stop.set()

    async def run(self) -> None:
        """Pump until `stop` or an error. Raises the first `CdcError` of any loop."""
        reader = asyncio.create_task(self._read(), name="reader")
        writer = asyncio.create_task(self._write(), name="writer")
        status = asyncio.create_task(self._report(), name="status")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        tasks = (reader, writer, status, stop)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stop.done() and not (reader.done() or writer.done() or status.done()):
                reader.cancel()
                await asyncio.wait((reader,))
                self._work.set()
                await writer
                await self._send_status()
            elif reader.done() and isinstance(reader.exception(), ServerDecodeError):
                self._stop.set()  # write what came before it, so that only it can be skipped
                self._work.set()
                await writer
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    # --- reading -----------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            try:
                rest = iter(await self._stream.read(READ_FRAMES, READ_BYTES))
            except ServerDecodeError as error:
                raise self._located(error) from error
            if self._subscriptions.revision != self._revision:
                self._renew()
            while (marker := self._take(rest)) is not None:
                await self._meet(marker)
            if self._has_work:
                self._work.set()
            if self._pending.is_full:
                await self._wait_for_room()

    def _located(self, error: ServerDecodeError) -> ServerDecodeError:
        """Name the transaction that the server cannot decode, when it has begun to send it."""
        if not self._reader.in_transaction:
            return error
        commit_lsn = self._reader.commit_lsn
        return ServerDecodeError(
            f"{error}, in the transaction that committed at {Lsn(commit_lsn)}",
            hint="if client_encoding = SQL_ASCII does not help, give that transaction up: "
            f"cdc slot skip {self._slot} --to {Lsn(commit_lsn + 1)}",
        )

    async def _wait_for_room(self) -> None:
        started_s = time.monotonic()
        self._room.clear()
        self._work.set()
        await self._room.wait()
        self._metrics.waited(time.monotonic() - started_s)

    def _take(self, frames: Iterator[bytes]) -> Marker | None:
        """Decode and route frames until they end, or until a marker needs a look at the catalog."""
        feed, reader, pending = self._reader.feed, self._reader, self._pending
        routed, route = pending.routed, self._router.route
        relation_of = reader.relations.get
        done, size_bytes = routed.lengths, 0
        kinds: Counter[type] = Counter()
        marker: Marker | None = None
        for frame in frames:
            if frame[0] != XLOG_DATA:
                self._note_keepalive(frame)
                continue
            payload = frame[XLOG_DATA_HEADER_SIZE:]
            size_bytes += len(payload)
            try:
                event = feed(payload)
            except UndecodableMessage as error:
                self._set_aside(error, payload)
                continue
            if event is None:
                continue
            kinds[type(event)] += 1
            if isinstance(event, _ROW_CHANGES):
                route(relation_of(event.relation_oid), event, reader.ordinal, payload, routed)
            elif isinstance(event, Begin):
                lsn, time_us = event.final_lsn, event.commit_time_us
                self._router.begin(lsn, time_us, self._spans.begin(lsn, time_us))
                self._progress.transaction_started()
            elif isinstance(event, Commit):
                self._cut(event)
            else:
                marker = self._take_rare(event, payload)
                if marker is not None:
                    break
        pending.grow(done)
        self._metrics.read(kinds, size_bytes, routed.unmatched)
        routed.unmatched = 0
        if any(self._events.counts):
            matched, unmatched = self._events.take_counts()
            self._metrics.emitted(matched=matched, unmatched=unmatched)
        return marker

    def _take_rare(self, event: object, payload: bytes) -> Marker | None:
        reader = self._reader
        if isinstance(event, Relation):
            self._want(event.oid)
        elif isinstance(event, Truncate):
            for index, oid in enumerate(event.relation_oids):
                if oid in self._wanted:
                    ordinal = reader.ordinal + index
                    shape = reader.relations.get(oid)
                    self._router.route(shape, event, ordinal, payload, self._pending.routed)
        elif isinstance(event, LogicalMessage) and event.transactional:
            if event.prefix == PREFIX:
                nonce = self._sink.position.marker_nonce
                return decode_marker(event.content, slot=self._slot, nonce=nonce)
            if event.prefix == emission.PREFIX:
                self._events.route(event, self._place(), payload, self._pending.routed)
        return None

    def _place(self) -> Place:
        reader = self._reader
        lsn, time_us = reader.commit_lsn, reader.commit_time_us
        return Place(lsn, reader.message_ordinal, time_us, self._router.metadata)

    def _want(self, relation_oid: int) -> None:
        if self._router.wants(self._reader.relations.get(relation_oid)):
            self._wanted.add(relation_oid)
        else:
            self._wanted.discard(relation_oid)

    def _cut(self, commit: Commit) -> None:
        """Everything routed so far belongs to whole transactions."""
        pending = self._pending
        self._router.end(pending.routed)
        if self._marker is not None:
            self._stamp(self._marker, commit.commit_lsn)
            self._marker = None
        spans = self._spans.commit()
        if len(pending.routed.specs) > pending.cut:
            pending.commit_time_us = pending.commit_time_us or commit.commit_time_us
            pending.spans += spans
        elif self._sink.is_open:  # its jobs are written already
            pending.spans += spans
        pending.cut_at(commit.end_lsn)
        self._progress.transaction_ended(commit.end_lsn)

    def _set_aside(self, error: UndecodableMessage, payload: bytes) -> None:
        if payload[:1] == UNCERTAIN and not self._events.are_ours:
            return  # the slot that routes it sets it aside
        self._pending.routed.dead_letters.append(
            DeadLetter(
                commit_lsn=error.commit_lsn,
                ordinal=error.ordinal,
                subscription=None,
                relation=self._describe(error.relation_oid),
                error=str(error),
                raw=payload,
                commit_time_us=self._reader.commit_time_us if self._reader.in_transaction else 0,
            )
        )
        if not self._reader.in_transaction:  # a message that stands alone ends at its own LSN
            self._progress.received(error.commit_lsn)
            self._pending.cut_at(error.commit_lsn)

    def _describe(self, relation_oid: int | None) -> dict[str, Any] | None:
        if relation_oid is None:
            return None
        try:
            return describe_shape(self._reader.relations.get(relation_oid))
        except RelationUnknown:
            return {"oid": relation_oid}

    def _note_keepalive(self, frame: bytes) -> None:
        keepalive = parse_frame(frame)
        if isinstance(keepalive, Keepalive):
            self._server_lsn = max(self._server_lsn, keepalive.wal_end)
            self._progress.keepalive(keepalive.wal_end)
            if keepalive.reply_requested:
                self._status_due.set()

    # --- activation --------------------------------------------------------------------------

    async def _meet(self, marker: Marker) -> None:
        """Make sure that what a marker starts is known; it takes effect with its commit."""
        known = {s.id for s, _, _ in self._subscriptions.stamped}
        if not known.issuperset(marker.start):
            await self._subscriptions.refresh()
        self._marker = marker

    def _renew(self) -> None:
        """Take over what may change of a subscription while it routes: its version."""
        self._revision = self._subscriptions.revision
        active = set(self._router.active)
        ids = {s.id for s in active}
        stored = [s for s, _, _ in self._subscriptions.stamped]
        renewed = [s for s in stored if s.id in ids and s not in active]
        if renewed:
            self._router.activate(renewed)
            self._events.activate(self._router.active)

    def _stamp(self, marker: Marker, commit_lsn: int) -> None:
        active = {s.id for s in self._router.active}
        starting = [
            s
            for s, start, end in self._subscriptions.stamped
            if s.id in marker.start and s.id not in active and start is None and end is None
        ]
        self._router.activate(starting)
        self._router.retire(marker.end)
        self._events.activate(self._router.active)
        self._pending.stamps.append(Stamp(commit_lsn, tuple(s.id for s in starting), marker.end))
        for oid in self._reader.relations.oids:
            self._want(oid)

    # --- writing -----------------------------------------------------------------------------

    @property
    def _has_work(self) -> bool:
        pending = self._pending
        if pending.is_full:
            return True
        return (pending.has_whole or self._sink.is_open) and pending.end_lsn is not None

    async def _write(self) -> None:
        while not self._stop.is_set():
            if self._has_work:
                await self._write_pending()
            else:
                self._work.clear()
                await self._wait_for_work()
        if self._pending.end_lsn is not None:
            await self._write_pending()
        await self._sink.abandon_open()
        if not self._sink.is_durable:
            await self._make_durable(self._sink.routed_lsn)

    async def _wait_for_work(self) -> None:
        try:
            async with asyncio.timeout(HINT_EVERY_S if self._hints else BURST_END_S):
                await self._work.wait()
        except TimeoutError:
            await self._use_the_pause()

    async def _use_the_pause(self) -> None:
        """Nothing to write: send what is left of hints, make durable, store an idle position."""
        await self._hint()
        pending, now_s = self._pending, time.monotonic()
        if self._sink.is_open:
            return
        if pending.end_lsn is not None and now_s - pending.since_s >= DURABLE_EVERY_S:
            await self._write_pending()  # transactions without a job: only their position
        elif not self._sink.is_durable:
            await self._make_durable(self._sink.routed_lsn)
        elif (idle_lsn := self._progress.idle_lsn_to_store(now_s)) is not None:
            await self._make_durable(idle_lsn)
            self._progress.idle_stored(idle_lsn, now_s)

    async def _make_durable(self, lsn: int) -> None:
        await self._sink.persist_acknowledged(lsn)
        self._progress.committed(self._sink.routed_lsn, durable=True)
        self._status_due.set()

    async def _write_pending(self) -> None:
        taken = self._pending
        batch, self._pending = taken.take()
        self._room.set()
        started_s = time.monotonic()
        await self._sink.write(batch)
        self._uncommitted.update(map(_head_of, batch.specs))
        if batch.end_lsn is None:
            return
        committed(taken.spans)
        durable = self._sink.is_durable
        self._progress.committed(batch.end_lsn, durable=durable)
        if durable:
            self._status_due.set()
        heads, self._uncommitted = self._uncommitted, Counter()
        self._hints.update(self._router.queue_of(head) for head in heads)
        self._hints |= await self._sink.wake()
        self._metrics.committed(
            Committed(
                jobs_by_head=heads,
                dead_letters=len(batch.dead_letters),
                duration_s=time.monotonic() - started_s,
                commit_time_us=taken.commit_time_us,
                end_lsn=batch.end_lsn,
            )
        )
        if started_s - self._hinted_at_s >= HINT_EVERY_S:
            await self._hint()

    async def _hint(self) -> None:
        if self._hints and not self._sink.is_open:
            queues, self._hints = self._hints, set()
            self._hinted_at_s = time.monotonic()
            await self._sink.hint(queues)

    # --- status ------------------------------------------------------------------------------

    async def _report(self) -> None:
        while True:
            await self._send_status()
            self._status_due.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._status_every_s):
                    await self._status_due.wait()

    async def _send_status(self) -> None:
        progress = self._progress
        acknowledged = progress.acknowledgeable()
        received = max(progress.received_lsn, acknowledged)
        await self._stream.send_status(received, acknowledged, acknowledged)
        self._metrics.positions(
            received=received,
            routed=progress.routed_lsn,
            acknowledged=acknowledged,
            server=max(self._server_lsn, received),
        )
