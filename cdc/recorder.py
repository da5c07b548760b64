"""`cdc record`: write what the server sends into a file, and acknowledge nothing.

The slot stays where it is, so that a sidecar started afterwards is sent all of it again. With a
temporary slot of its own it disturbs nobody, and sees what is committed from now on.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Final, TextIO

from cdc.catalog import publication_names, read_publications, read_server, read_shape
from cdc.config import Settings
from cdc.connection import Connection, connect_queue, connect_source
from cdc.cut_over import Start, choose_start
from cdc.errors import SlotMissing
from cdc.marker import PREFIX
from cdc.preflight import refuse_server
from cdc.recording import Header, write_frame, write_header, write_shape
from cdc.slots import SlotKeeper
from cdc.source import PGOUTPUT, ReplicationStream
from cdc.wire.frames import XLOG_DATA, XLOG_DATA_HEADER_SIZE, Keepalive, parse_frame
from cdc.wire.wal2json import CatalogRequest, Decoder

_NAME: Final = "cdc record"
STATUS_EVERY_S: Final = 5.0
_NO_SLOT_HINT: Final = (
    "`cdc run` makes the slot and streams from it until it is stopped; --temporary records through "
    "one of its own"
)


class Recorder:
    """Records until `stop`, or until there are `limit` messages.

    Args:
        settings: of the sidecar whose stream it is. The queue database is read for the position
            from which on its slot carries the second publication, if there is one.
        output: where to write.
        temporary: record through a slot that ends with the recording.
        limit: most messages; None for no limit.
        status_every_s: how often the server is told that somebody is there.
    """

    def __init__(
        self,
        settings: Settings,
        output: TextIO,
        *,
        temporary: bool = False,
        limit: int | None = None,
        status_every_s: float = STATUS_EVERY_S,
    ) -> None:
        self._settings = settings
        self._output = output
        self._temporary = temporary
        self._limit = limit
        self._status_every_s = status_every_s
        self._stop = asyncio.Event()
        self._received_lsn = 0
        self._decoder = Decoder(PREFIX)
        self.messages = 0

    def stop(self) -> None:
        """End the recording."""
        self._stop.set()

    async def run(self) -> None:
        """Record.

        Raises:
            SlotBusy: a sidecar streams from the slot.
            CdcError: the source cannot be reached, or refuses.
        """
        settings = self._settings
        async with AsyncExitStack() as stack:
            source = await connect_source(settings.source_conninfo, application_name=_NAME)
            stack.push_async_callback(source.close)
            stream = await ReplicationStream.open(settings.source_conninfo, application_name=_NAME)
            stack.push_async_callback(stream.close)
            await self._start(source, stream)
            tasks = [
                asyncio.create_task(self._record(source, stream), name="record"),
                asyncio.create_task(self._report(stream), name="status"),
                asyncio.create_task(self._stop.wait(), name="stop"),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for task in done:
                task.result()

    async def _start(self, source: Connection, stream: ReplicationStream) -> None:
        settings, slot = self._settings, self._settings.slot
        server = await read_server(source)
        if (refusal := refuse_server(server, settings.plugin)) is not None:
            raise refusal
        system = await stream.identify()
        if self._temporary:
            slot = f"{slot[:40]}_recording_{os.getpid()}"
            await stream.create_slot(slot, settings.plugin, temporary=True)
        try:
            if settings.plugin == PGOUTPUT:
                start = await self._choose_start(source)
                await stream.start(slot, start.publications, from_lsn=start.from_lsn)
            else:
                await stream.start_wal2json(slot, temporary=self._temporary)
        except SlotMissing as error:
            raise SlotMissing(str(error), hint=_NO_SLOT_HINT) from error
        header = Header(
            slot=slot,
            plugin=settings.plugin,
            publication=settings.publication,
            server_version=server.version,
            system_identifier=system.system_identifier,
            timeline=system.timeline,
            database=system.database,
            encoding=server.encoding,
            recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._output.write(write_header(header))
        self._output.flush()

    async def _choose_start(self, source: Connection) -> Start:
        """Choose the publications: what exists, for a slot of our own; else what a sidecar can."""
        settings = self._settings
        names = publication_names(settings.publication)
        found = await read_publications(source, names)
        if self._temporary:
            return Start((names[0], *(name for name in names[1:] if name in found)))
        if names[1] not in found:
            return Start(names[:1])
        queue = await connect_queue(settings.queue_conninfo, application_name=_NAME)
        try:
            slots = SlotKeeper(settings.slot, settings.source, source, queue)
            return await choose_start(source, slots, settings.publication)
        finally:
            await queue.close()

    async def _record(self, source: Connection, stream: ReplicationStream) -> None:
        while self._limit is None or self.messages < self._limit:
            frames = await stream.read()
            at_us = time.time_ns() // 1000
            for frame in frames:
                await self._record_frame(source, frame, at_us)
                if self.messages == self._limit:
                    break
            self._output.flush()

    async def _record_frame(self, source: Connection, frame: bytes, at_us: int) -> None:
        parsed = parse_frame(frame)
        self._received_lsn = max(self._received_lsn, parsed.wal_end)
        if frame[0] == XLOG_DATA:
            self.messages += 1
            if self._settings.plugin != PGOUTPUT:
                async for line in self._shapes(source, frame[XLOG_DATA_HEADER_SIZE:]):
                    self._output.write(line)
        self._output.write(write_frame(at_us, frame))
        if isinstance(parsed, Keepalive) and parsed.reply_requested:
            self._output.flush()

    async def _shapes(self, source: Connection, payload: bytes) -> AsyncIterator[str]:
        """Yield what the catalog says to what a frame does not tell."""
        while isinstance(request := self._decoder.decode(payload), CatalogRequest):
            shape = await read_shape(source, self._settings.publication, request)
            self._decoder.describe(request, shape.table, shape.types)
            yield write_shape(shape)

    async def _report(self, stream: ReplicationStream) -> None:
        """Keep the connection: tell what was received, and never that it is safe anywhere."""
        while True:
            await stream.send_status(self._received_lsn, 0, 0)
            await asyncio.sleep(self._status_every_s)
