"""Wherever the reads of a stream end, and however little one may take: the same transactions."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import cycle

from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import UndecodableMessage
from cdc.spool import SpoolMemory
from cdc.streaming import StreamedStream
from cdc.transactions import TransactionReader
from cdc.wire.frames import XLOG_DATA_HEADER_SIZE, keepalive

from .test_streaming import Counts, Transaction, histories, sent


class Reads:
    """A stream that gives its frames in reads of these sizes, as far as the limit allows it."""

    def __init__(self, frames: list[bytes], sizes: list[int]) -> None:
        self.frames = frames
        self._sizes = cycle(sizes)

    async def read(self, limit: int, limit_bytes: int) -> list[bytes]:
        assert limit_bytes > 0
        size = min(next(self._sizes), limit)
        taken, self.frames = self.frames[:size], self.frames[size:]
        if not taken:
            raise EOFError
        return taken

    async def send_status(
        self, write_lsn: int, flush_lsn: int, apply_lsn: int, *, reply_requested: bool = False
    ) -> None:
        raise AssertionError("no status is due", write_lsn, flush_lsn, apply_lsn, reply_requested)


@given(
    histories(),
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(1, 200),
)
def test_any_split_of_the_stream_into_reads_gives_the_same(
    history: tuple[list[Transaction], list[int]], sizes: list[int], limit: int, limit_bytes: int
) -> None:
    """Wherever a read ends: in a transaction, in a piece of one, before a keepalive."""
    _, payloads = sent(history)
    header = b"w" + bytes(XLOG_DATA_HEADER_SIZE - 1)
    frames: list[bytes] = []
    for number, payload in enumerate(payloads):
        frames += [header + payload, keepalive(wal_end=number, sent_at_us=0)]

    async def read_all(stream: StreamedStream, *limits: int) -> list[bytes]:
        found: list[bytes] = []
        with suppress(EOFError):
            while True:
                found += await stream.read(*limits)
        return found

    def stream(sizes: list[int]) -> StreamedStream:
        return StreamedStream(Reads(frames, sizes), Counts(), SpoolMemory(100))

    whole = asyncio.run(read_all(stream([len(frames) + 1]), 1 << 30, 1 << 30))
    cut = asyncio.run(read_all(stream(sizes), limit, limit_bytes))
    assert cut == whole
    assert transactions_in(cut) == transactions_in(whole)


def transactions_in(frames: list[bytes]) -> list[tuple[int, int, int, object]]:
    """What a reader makes of frames: where each event stands, and the event."""
    reader = TransactionReader(0)
    found: list[tuple[int, int, int, object]] = []
    for frame in frames:
        if frame[:1] == b"w":
            try:
                event: object = reader.feed(frame[XLOG_DATA_HEADER_SIZE:])
            except UndecodableMessage as error:
                event = str(error)
            found.append((reader.xid, reader.commit_lsn, reader.ordinal, event))
    return found
