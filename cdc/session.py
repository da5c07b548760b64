"""One attempt to lead: from two connection strings to a running pump.

Connect, look, bring publication and slot into being (in that order), take the slot (which is the
leader lock) or stand by, look again, raise the epoch, pump. Any error ends the attempt; the next
one starts from what is durable. Which errors are worth another attempt is decided by `service`.
"""

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog

from cdc import queries, spool
from cdc.activation import Activator
from cdc.catalog import (
    insert_only_name,
    read_server,
    read_server_lsn,
    read_slot,
    read_slot_statistics,
)
from cdc.conditions import Situation, judge, judge_waiting
from cdc.config import Settings
from cdc.connection import (
    Connection,
    connect_queue,
    connect_source,
    listener_name,
    source_errors,
)
from cdc.cut_over import CutOver, choose_start
from cdc.emit_owner import claim_emits
from cdc.errors import (
    CdcError,
    PublicationDrift,
    PublicationMissing,
    SlotBusy,
    SourceUnavailable,
    StandbySlotsWaiting,
)
from cdc.lsn import Lsn
from cdc.marker import PREFIX
from cdc.metrics import Metrics
from cdc.pipeline import Pipeline, Stream
from cdc.pooling import find_shared_backend
from cdc.preflight import (
    can_fail_over,
    limits_of,
    refuse_narrowing,
    refuse_server,
    refuse_streaming,
    refuse_unlimited_wal,
)
from cdc.publication import PublicationKeeper, Reconciled
from cdc.sink import Sink
from cdc.slots import Loss, SlotKeeper
from cdc.source import PGOUTPUT, ReplicationStream
from cdc.streaming import StreamedStream
from cdc.subscriptions import SubscriptionBook
from cdc.translation import TranslatedStream
from cdc.wanted import EVERY_PUBLICATION
from cdc.wire.wal2json import Decoder

STANDBY_POLL_S: Final = 1.0
MONITOR_EVERY_S: Final = 5.0
WAITING_SIGHTINGS: Final = 3
"""How often in a row the stream is seen waiting for a standby before that is a condition."""

PROBE_AFTER_S: Final = 10.0
HEARTBEAT_EVERY_S: Final = 10.0
HEARTBEAT_PREFIX: Final = "conductor.heartbeat"
_HEARTBEAT_POLL_S: Final = 0.05
_SECOND_LOOK_S: Final = 0.3

State = Literal["connecting", "standby", "leading"]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an attempt works with, once it is connected."""

    source: Connection
    queue: Connection
    listener: Connection  # to the queue; for LISTEN, and before that for the slot's lock
    book: SubscriptionBook
    keeper: PublicationKeeper
    slots: SlotKeeper
    stream: ReplicationStream


class Session:
    """One attempt. `run` returns after `stop`, or raises the `CdcError` that ended it.

    Args:
        settings: of the process.
        metrics: of the process.
        loss: give up what this says is lost: start with a new slot.
        is_final: whether a condition is to be recorded, rather than tried again first.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        loss: Loss | None = None,
        is_final: Callable[[CdcError], bool] = lambda _: True,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._loss_to_accept = loss
        self._is_final = is_final
        self._log: Any = structlog.get_logger("cdc").bind(slot=settings.slot)
        self._stack = AsyncExitStack()
        self._pipeline: Pipeline | None = None
        self._stream: ReplicationStream | None = None
        self._carried: int | None = None  # the OID of the second publication, in the stream
        self._cut_over: CutOver | None = None
        self.state: State = "connecting"
        self.connected_s: float | None = None
        """Since when it led or stood by, on the monotonic clock."""
        self.loss: Loss | None = None
        """What the error that ended this attempt may have lost."""

    @property
    def silence_s(self) -> float:
        """For how long the server has said nothing while we waited for it."""
        return 0.0 if self._stream is None else self._stream.silence_s

    def stop(self) -> bool:
        """Finish the batch in hand; False when there is none, so that `run` may be cancelled."""
        if self._pipeline is None:
            return False
        self._pipeline.stop()
        return True

    async def run(self) -> None:
        """Lead, or stand by until that is possible.

        Raises:
            CdcError: what ended the attempt. If it is a condition, its gap is recorded.
        """
        async with self._stack:
            parts = await self._connect()
            try:
                situation = await self._take_slot(parts)
                await self._lead(parts, situation)
            except CdcError as error:
                named = self._name(error)
                self.loss = await self._record(parts, named)
                raise named from error
            finally:
                self.state = "connecting"
                self._metrics.connected.set(0)

    # --- before leading ------------------------------------------------------------------------

    async def _connect(self) -> _Parts:
        settings = self._settings
        name = f"cdc {settings.slot}"
        source = await connect_source(settings.source_conninfo, application_name=name)
        self._stack.push_async_callback(source.close)
        with source_errors():
            await source.execute(queries.WAIT_BRIEFLY_FOR_LOCKS)
        server = await read_server(source)
        refusal = (
            refuse_server(server, settings.plugin)
            or refuse_streaming(server, settings.plugin, settings.streaming)
            or refuse_narrowing(settings.plugin, settings.narrowing)
            or refuse_unlimited_wal(server, allowed=settings.allow_unlimited_wal)
        )
        if refusal is not None:
            raise refusal
        queue = await connect_queue(settings.queue_conninfo, application_name=name)
        self._stack.push_async_callback(queue.close)
        listener = await connect_queue(
            settings.queue_conninfo, application_name=listener_name(settings.slot)
        )
        self._stack.push_async_callback(listener.close)
        if (refusal := await find_shared_backend(queue, listener)) is not None:
            raise refusal
        book = SubscriptionBook(queue, slot=settings.slot, source=settings.source)
        self._metrics.task_of = book.task_of
        stream = await ReplicationStream.open(
            settings.source_conninfo,
            application_name=f"{name} stream",
            wal_sender_timeout_s=settings.wal_sender_timeout_s,
        )
        self._stack.push_async_callback(stream.close)
        self._stream = stream
        return _Parts(
            source=source,
            queue=queue,
            listener=listener,
            book=book,
            keeper=PublicationKeeper(
                settings.publication,
                source,
                settings.manage_publication,
                tolerate_missing=settings.gap_policy == "recreate",
                narrowing=settings.narrowing,
            ),
            slots=SlotKeeper(
                settings.slot,
                settings.source,
                source,
                queue,
                settings.slot_creation_deadline_s,
                settings.plugin,
                failover=settings.failover and can_fail_over(server),
            ),
            stream=stream,
        )

    async def _take_slot(self, parts: _Parts) -> Situation:
        """Return once streaming has begun and the slot still fits our progress."""
        while True:
            situation = await self._look(parts)
            if situation is not None:
                try:
                    if not await self._prepare(parts, situation):
                        continue
                    await self._start(parts)
                    break
                except SlotBusy as error:
                    self._log.info("slot_busy", error=str(error), hint=error.hint)
            self._stand_by()
            await asyncio.sleep(STANDBY_POLL_S * random.uniform(0.7, 1.3))  # noqa: S311  # jitter
        situation = await parts.slots.reread(situation)
        if (problem := judge(situation)) is not None:
            raise problem
        return situation

    async def _start(self, parts: _Parts) -> None:
        settings = self._settings
        if settings.plugin == PGOUTPUT:
            start = await choose_start(parts.source, parts.slots, settings.publication)
            self._carried = start.carried
            await parts.stream.start(
                settings.slot,
                start.publications,
                streaming=settings.streaming,
                from_lsn=start.from_lsn,
            )
            return
        self._carried = EVERY_PUBLICATION
        numbers_as_text = await parts.stream.start_wal2json(settings.slot)
        self._log.warning(
            "plugin_limits",
            plugin=settings.plugin,
            numbers_as_text=numbers_as_text,
            limits=limits_of(settings.plugin, numbers_as_text=numbers_as_text),
        )

    def _name(self, error: CdcError) -> CdcError:
        """Say what it means that the server cannot find the second publication any more.

        The slot does without it, so that no new one is needed; nor is it a loss where nothing was
        captured through it.
        """
        name = insert_only_name(self._settings.publication)
        if not isinstance(error, PublicationMissing) or f'"{name}"' not in str(error):
            return error
        captured = self._cut_over is not None and self._cut_over.captured
        return PublicationDrift(str(error)) if captured else SourceUnavailable(str(error))

    async def _look(self, parts: _Parts) -> Situation | None:
        """Look whether streaming may go on; None when another sidecar leads."""
        situation = await parts.slots.situation(parts.stream)
        active = situation.slot is not None and situation.slot.active_pid is not None
        if active and situation.progress is not None:
            return None
        if self._loss_to_accept is None and judge(situation) is not None:
            # Another sidecar may have been creating the slot: what is wrong for good stays wrong.
            await asyncio.sleep(_SECOND_LOOK_S)
            situation = await parts.slots.situation(parts.stream)
            if (problem := judge(situation)) is not None:
                raise problem
        return situation

    async def _prepare(self, parts: _Parts, situation: Situation) -> bool:
        """Bring publication, then slot and progress into being; False: look again first."""
        loss = self._loss_to_accept
        if loss is not None:
            return await self._accept(parts, loss)
        reconciled = await self._reconcile(parts)
        if situation.progress is None or situation.progress.state == "creating":
            start = await parts.slots.create(parts.stream, parts.listener)
            await _note_inserts(parts, reconciled, start)
            self._log.info("slot_created", lsn=_text(start))
        return True

    async def _accept(self, parts: _Parts, loss: Loss) -> bool:
        """Start over with a new slot, if there is still something that only one cures.

        Else the loss was accepted before, perhaps by an attempt that ended before it had a slot:
        what is there by now has to be looked at like anything else.
        """
        mended: list[Reconciled] = []

        async def mend() -> CdcError | None:
            mended.append(await self._reconcile(parts, tolerate_drift=True))
            return mended[0].loss

        start = await parts.slots.recreate(parts.stream, parts.listener, loss, mend)
        self._loss_to_accept = None
        if start is None:
            self._log.info("loss_is_over", loss=str(loss.error))
            return False
        await _note_inserts(parts, mended[0], start)
        self._log.warning("slot_recreated", lsn=_text(start), after=str(loss.error))
        return True

    async def _reconcile(self, parts: _Parts, *, tolerate_drift: bool = False) -> Reconciled:
        book = parts.book
        await book.refresh()
        reconciled = await parts.keeper.reconcile(
            [entry.wanted for entry in book.changes],
            past=book.past,
            tolerate_drift=tolerate_drift,
        )
        progress = await parts.slots.read_progress()
        if progress is not None and reconciled.applied != book.past.applied:
            await parts.slots.remember(
                reconciled.memberships,
                progress.marker_nonce,
                reconciled.insert_memberships,
                reconciled.applied,
            )
        return reconciled

    def _stand_by(self) -> None:
        if self.state != "standby":
            self._log.info("standing_by")
        self._connected("standby")

    def _connected(self, state: State) -> None:
        self.state = state
        self.connected_s = self.connected_s or time.monotonic()
        self._metrics.connected.set(1)

    # --- leading -------------------------------------------------------------------------------

    async def _lead(self, parts: _Parts, situation: Situation) -> None:
        settings = self._settings
        sink = await Sink.open(settings.queue_conninfo, settings.slot, leader=_leader())
        self._stack.push_async_callback(sink.close)
        await self._follow_timeline(parts, situation)
        if idle := await parts.slots.idle_slots():
            self._log.warning(
                "idle_slots",
                slots=idle,
                hint="new subscriptions wait for them too: start their sidecars, or end those that "
                "are out of service with cdc slot drop",
            )
        emit_secret = await claim_emits(parts.source, parts.queue, settings.slot)
        if emit_secret is not None:
            parts.book.route_emits()
        await parts.book.refresh()
        pipeline = Pipeline(
            slot=settings.slot,
            stream=await self._understood(parts.stream),
            sink=sink,
            subscriptions=parts.book,
            metrics=self._metrics,
            status_every_s=settings.status_interval_s,
            emit_secret=emit_secret,
        )
        progress = await parts.slots.read_progress()
        cut_over = self._cut_over = CutOver(
            slots=parts.slots,
            source=parts.source,
            nonce=sink.position.marker_nonce,
            routed_lsn=lambda: sink.routed_lsn,
            restart=pipeline.stop,
            carried=self._carried,
            noted=None if progress is None else progress.inserts,
        )
        activator = Activator(
            book=parts.book,
            keeper=parts.keeper,
            slots=parts.slots,
            source=parts.source,
            listener=parts.listener,
            nonce=sink.position.marker_nonce,
            metrics=self._metrics,
            routed_lsn=lambda: sink.routed_lsn,
            cut_over=cut_over,
        )
        self._pipeline = pipeline
        self._connected("leading")
        self._metrics.lead()
        self._log.info(
            "leading", epoch=sink.position.epoch, lsn=_text(Lsn(sink.position.routed_lsn))
        )
        try:
            await self._run_together(pipeline, activator, parts)
        finally:
            self._metrics.follow()
            self._pipeline = None
        await parts.stream.finish()

    async def _understood(self, stream: ReplicationStream) -> Stream:
        """Return the stream as one of pgoutput, protocol 1."""
        settings = self._settings
        if settings.plugin == PGOUTPUT and settings.streaming == "off":
            return stream
        if settings.plugin == PGOUTPUT:
            memory = spool.SpoolMemory(spool.MEMORY_BYTES)
            streamed = StreamedStream(stream, self._metrics, memory)
            self._stack.callback(streamed.close)
            return streamed
        catalog = await connect_source(
            settings.source_conninfo, application_name=f"cdc {settings.slot} catalog"
        )
        self._stack.push_async_callback(catalog.close)
        decoder = Decoder(PREFIX)
        return TranslatedStream(stream, catalog, settings.publication, decoder, self._metrics)

    async def _run_together(self, pipeline: Pipeline, activator: Activator, parts: _Parts) -> None:
        """Run the pump with its companions; the first to end ends all."""
        pump = asyncio.create_task(pipeline.run(), name="pipeline")
        tasks = [
            pump,
            asyncio.create_task(activator.run(), name="activation"),
            asyncio.create_task(self._watch(parts.stream), name="watchdog"),
            asyncio.create_task(self._monitor(parts), name="monitor"),
            asyncio.create_task(self._beat(parts.source, pipeline), name="heartbeat"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in sorted(done, key=lambda task: task is not pump):
            task.result()

    async def _watch(self, stream: ReplicationStream) -> None:
        """Ask a silent server for an answer; drop the connection when none comes."""
        limit_s = self._settings.wal_sender_timeout_s
        probe_s = min(PROBE_AFTER_S, limit_s / 3)
        probed_s = 0.0
        while True:
            await asyncio.sleep(1.0)
            silence_s, now_s = stream.silence_s, time.monotonic()
            if silence_s > limit_s:
                stream.abort(SourceUnavailable(f"the server was silent for {silence_s:.0f} s"))
            elif silence_s > probe_s and now_s - probed_s > probe_s:
                probed_s = now_s
                await stream.probe()

    async def _monitor(self, parts: _Parts) -> None:
        """Read what only the server knows about the slot."""
        waiting, noted = 0, True  # perhaps by a predecessor
        while True:
            slot = await read_slot(parts.source, self._settings.slot)
            statistics = await read_slot_statistics(parts.source, self._settings.slot)
            self._metrics.slot(slot, statistics)
            self._metrics.server(await read_server_lsn(parts.source))
            problem = judge_waiting(slot)
            waiting = 0 if problem is None else waiting + 1
            if problem is None and noted:
                await parts.slots.close_unharmed(StandbySlotsWaiting.condition)
                noted = False
            elif problem is not None and waiting == WAITING_SIGHTINGS:
                await self._record(parts, problem)
                noted = True
            await asyncio.sleep(MONITOR_EVERY_S)

    async def _beat(self, source: Connection, pipeline: Pipeline) -> None:
        """Time messages on the whole way: written, read, durable in the queue, acknowledged."""
        while True:
            written_at_s, started_s = time.time(), time.monotonic()
            lsn = await _write_heartbeat(source)
            while lsn is not None and pipeline.acknowledged_lsn < lsn:  # noqa: ASYNC110  # seldom, and never urgent
                await asyncio.sleep(_HEARTBEAT_POLL_S)
            if lsn is not None:
                self._metrics.heartbeat(written_at_s, time.monotonic() - started_s)
            await asyncio.sleep(HEARTBEAT_EVERY_S)

    async def _follow_timeline(self, parts: _Parts, situation: Situation) -> None:
        progress, timeline = situation.progress, situation.system.timeline
        if progress is not None and progress.timeline != timeline:
            await parts.slots.follow_timeline(progress, timeline)
            self._log.warning("timeline_followed", timeline=timeline)

    async def _record(self, parts: _Parts, error: CdcError) -> Loss | None:
        """Leave a row, a count and a line of what may mean loss."""
        if error.condition is None or not self._is_final(error):
            return None
        policy = self._settings.gap_policy
        self._metrics.condition(error.condition)
        self._log.error(
            "condition", condition=error.condition, policy=policy, error=str(error), hint=error.hint
        )
        if not error.leaves_gap:
            return None
        with suppress(CdcError):  # a database that is gone as well: the next attempt meets it again
            return await parts.slots.open_gap(error, policy=policy)
        return None


async def _write_heartbeat(source: Connection) -> Lsn | None:
    """Write a heartbeat; None where nothing can be written, on a standby."""
    with source_errors():
        cursor = await source.execute(queries.EMIT_HEARTBEAT, {"prefix": HEARTBEAT_PREFIX})
        row = await cursor.fetchone()
    return Lsn.parse(row["lsn"]) if row and row["lsn"] else None


async def _note_inserts(parts: _Parts, reconciled: Reconciled, start: Lsn) -> None:
    """Note that a new slot can decode with the second publication: that was there before it."""
    if reconciled.inserts_oid is not None:
        await parts.slots.note_inserts(reconciled.inserts_oid, start)


def _leader() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _text(lsn: Lsn | None) -> str | None:
    return None if lsn is None else str(lsn)
