"""What protocols 2 and 4 of pgoutput add to version 1: transactions in progress, piece by piece.

Between a Stream Start and its Stream Stop every message has the transaction's id after its tag: the
one of the subtransaction that it belongs to. Without it, it is a message of version 1. Layouts:
PostgreSQL documentation, "Logical Replication Message Formats". No state, like `pgoutput`.
"""

import struct
from typing import Final

from cdc.errors import ProtocolError
from cdc.wire.frames import POSTGRES_EPOCH_US
from cdc.wire.messages import StreamAbort, StreamCommit, StreamMessage, StreamStart, StreamStop

TAGS: Final = frozenset((b"S", b"E", b"c", b"A"))

_START = struct.Struct(">IB")
_COMMIT = struct.Struct(">IBQQq")
_ABORT = struct.Struct(">II")
_ABORT_PARALLEL = struct.Struct(">IIQq")
_XID = struct.Struct(">xI").unpack_from

_XID_END = 5  # of a message in a piece: tag and xid


def decode_streamed(payload: bytes) -> StreamMessage:
    """Decode a message whose tag is one of `TAGS`; raise `ProtocolError` when it is not one.

    >>> decode_streamed(b"S" + bytes([0, 0, 2, 228, 1]))
    StreamStart(xid=740, is_first=True)
    """
    tag, body = payload[:1], payload[1:]
    try:
        if tag == b"S":
            xid, is_first = _START.unpack(body)
            return StreamStart(xid, bool(is_first))
        if tag == b"E" and not body:
            return StreamStop()
        if tag == b"c":
            xid, flags, commit_lsn, end_lsn, time = _COMMIT.unpack(body)
            return StreamCommit(xid, flags, commit_lsn, end_lsn, time + POSTGRES_EPOCH_US)
        if tag == b"A" and len(body) == _ABORT.size:
            return StreamAbort(*_ABORT.unpack(body))
        if tag == b"A":
            xid, subxid, abort_lsn, time = _ABORT_PARALLEL.unpack(body)
            return StreamAbort(xid, subxid, abort_lsn, time + POSTGRES_EPOCH_US)
    except struct.error:
        pass
    size = f"{len(payload)} bytes"
    raise ProtocolError(tag.decode("latin-1"), 0, "a message of a transaction in progress", size)


def split_xid(payload: bytes) -> tuple[int, bytes]:
    """Return the subtransaction of a message in a piece, and the message of version 1."""
    if len(payload) < _XID_END:
        tag, size = payload[:1].decode("latin-1"), len(payload)
        raise ProtocolError(tag, size, "a transaction's id", "the end")
    (xid,) = _XID(payload)
    return xid, payload[:1] + payload[_XID_END:]
