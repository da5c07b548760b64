"""A stream of wal2json as if it were one of pgoutput.

The router has one way for changes: pgoutput's messages. `TranslatedStream` stands between a
walsender that runs another plugin and that way: it decodes the frames, asks the catalog what they
do not tell, and hands on the same messages in pgoutput's bytes. It holds no position and
acknowledges nothing; frames that carry no change become keepalives, so that idle positions move on.

A change that cannot be decoded is handed on as it came: the reader sets it aside.
"""

import time
from collections.abc import Iterator
from typing import Final, Protocol

from cdc.catalog import read_shape
from cdc.connection import Connection
from cdc.source import ReplicationStream
from cdc.wire.encoding import encode
from cdc.wire.frames import XLOG_DATA, XLOG_DATA_HEADER_SIZE, keepalive, parse_frame
from cdc.wire.wal2json import CatalogRequest, Decoded, Decoder, EmptyTransaction, Undecodable

FORGET_EVERY_S: Final = 3.0
"""How long a column may be missed before the catalog is asked whether it is still there."""


class TranslationMetrics(Protocol):
    """What a translation reports."""

    def diverged(self, kind: str, count: int) -> None:
        """The plugin could not tell, so many times, what pgoutput would have."""


class TranslatedStream:
    """Reads from a stream that runs wal2json; status messages pass through.

    Args:
        stream: started with `queries.start_wal2json`.
        catalog: an ordinary connection to the same database, for this alone.
        publication: decides as what a partition appears.
        decoder: of this session.
        metrics: where to report.
    """

    def __init__(
        self,
        stream: ReplicationStream,
        catalog: Connection,
        publication: str,
        decoder: Decoder,
        metrics: TranslationMetrics,
    ) -> None:
        self._stream = stream
        self._catalog = catalog
        self._publication = publication
        self._decoder = decoder
        self._metrics = metrics
        self._forgotten_s = time.monotonic()

    async def read(self, limit: int, limit_bytes: int) -> list[bytes]:
        """Return pgoutput's CopyData payloads, at least one (errors: `ReplicationStream.read`)."""
        translated: list[bytes] = []
        while not translated:
            frames = await self._stream.read(limit, limit_bytes)
            self._forget_now_and_then()
            for frame in frames:
                if frame[0] == XLOG_DATA:
                    translated += await self._translate(frame)
                else:
                    translated.append(frame)
            self._report()
        return translated

    async def send_status(
        self, write_lsn: int, flush_lsn: int, apply_lsn: int, *, reply_requested: bool = False
    ) -> None:
        """Send a standby status update."""
        await self._stream.send_status(
            write_lsn, flush_lsn, apply_lsn, reply_requested=reply_requested
        )

    async def _translate(self, frame: bytes) -> list[bytes]:
        payload = frame[XLOG_DATA_HEADER_SIZE:]
        decoded = self._decoder.decode(payload)
        while isinstance(decoded, CatalogRequest):
            shape = await read_shape(self._catalog, self._publication, decoded)
            self._decoder.describe(decoded, shape.table, shape.types)
            decoded = self._decoder.decode(payload)
        return list(reframe(frame, decoded))

    def _forget_now_and_then(self) -> None:
        now_s = time.monotonic()
        if now_s - self._forgotten_s >= FORGET_EVERY_S and self._decoder.has_assumed_unchanged:
            self._decoder.forget()
            self._forgotten_s = now_s

    def _report(self) -> None:
        divergences = self._decoder.divergences
        if divergences:
            for kind, count in divergences.items():
                self._metrics.diverged(kind, count)
            divergences.clear()


def reframe(frame: bytes, decoded: list[Decoded]) -> Iterator[bytes]:
    """Yield the frames that pgoutput would have sent in place of this one."""
    header = frame[:XLOG_DATA_HEADER_SIZE]
    for message in decoded:
        if isinstance(message, EmptyTransaction):
            yield keepalive(wal_end=message.end_lsn, sent_at_us=parse_frame(frame).sent_at_us)
        elif isinstance(message, Undecodable):
            yield frame
        else:
            yield header + encode(message)
