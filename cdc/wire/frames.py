"""The frames inside CopyData of a replication stream.

PostgreSQL documentation, "Streaming Replication Protocol": the server sends XLogData (`w`) and
primary keepalives (`k`), the client standby status updates (`r`). Times on the wire count from
2000-01-01; everywhere in this package `…_us` is microseconds of the Unix epoch, UTC.
"""

import struct
from dataclasses import dataclass

from cdc.errors import ProtocolError

XLOG_DATA = ord("w")
XLOG_DATA_HEADER_SIZE = 25
POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01 in the Unix epoch

_XLOG_DATA = struct.Struct(">xQQq")
_KEEPALIVE = struct.Struct(">xQqB")
_KEEPALIVE_BUILT = struct.Struct(">cQqB")
_STATUS = struct.Struct(">cQQQqB")


@dataclass(slots=True)
class XLogData:
    """A piece of the stream: one message of the output plugin. Treat as immutable.

    `wal_start` does not order transactions (only their commit LSNs do); `wal_end` is where the
    server's WAL ended when it was sent.
    """

    wal_start: int
    wal_end: int
    sent_at_us: int
    payload: bytes


@dataclass(slots=True)
class Keepalive:
    """Everything below `wal_end` has been sent; the server may ask for a status at once."""

    wal_end: int
    sent_at_us: int
    reply_requested: bool


def parse_frame(frame: bytes) -> XLogData | Keepalive:
    """Parse one CopyData payload from the server.

    A loop that needs nothing but the message may test `frame[0] == XLOG_DATA` and slice
    `frame[XLOG_DATA_HEADER_SIZE:]` itself: this is all that happens here for the payload.
    """
    kind = frame[:1]
    if kind == b"w" and len(frame) >= XLOG_DATA_HEADER_SIZE:
        start, end, sent_at = _XLOG_DATA.unpack_from(frame)
        return XLogData(start, end, sent_at + POSTGRES_EPOCH_US, frame[XLOG_DATA_HEADER_SIZE:])
    if kind == b"k" and len(frame) == _KEEPALIVE.size:
        end, sent_at, reply = _KEEPALIVE.unpack(frame)
        return Keepalive(end, sent_at + POSTGRES_EPOCH_US, bool(reply))
    raise ProtocolError(kind.decode("latin-1"), 0, "XLogData or keepalive", f"{len(frame)} bytes")


def keepalive(*, wal_end: int, sent_at_us: int, reply_requested: bool = False) -> bytes:
    """Build a primary keepalive, as a server does."""
    return _KEEPALIVE_BUILT.pack(b"k", wal_end, sent_at_us - POSTGRES_EPOCH_US, reply_requested)


def status_update(
    *, write_lsn: int, flush_lsn: int, apply_lsn: int, now_us: int, reply_requested: bool = False
) -> bytes:
    """Build a standby status update; the server moves the slot up to `flush_lsn`."""
    sent_at = now_us - POSTGRES_EPOCH_US
    return _STATUS.pack(b"r", write_lsn, flush_lsn, apply_lsn, sent_at, reply_requested)
