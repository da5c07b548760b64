import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import ProtocolError
from cdc.wire.frames import (
    POSTGRES_EPOCH_US,
    XLOG_DATA,
    XLOG_DATA_HEADER_SIZE,
    Keepalive,
    XLogData,
    parse_frame,
    status_update,
)

from .strategies import lsns, times_us


@given(lsns, lsns, times_us, st.binary(max_size=50))
def test_xlog_data(start: int, end: int, sent_at_us: int, payload: bytes) -> None:
    frame = b"w" + struct.pack(">QQq", start, end, sent_at_us - POSTGRES_EPOCH_US) + payload
    assert parse_frame(frame) == XLogData(start, end, sent_at_us, payload)
    assert frame[0] == XLOG_DATA
    assert frame[XLOG_DATA_HEADER_SIZE:] == payload


@given(lsns, times_us, st.booleans())
def test_keepalive(end: int, sent_at_us: int, reply: bool) -> None:
    frame = b"k" + struct.pack(">Qq?", end, sent_at_us - POSTGRES_EPOCH_US, reply)
    assert parse_frame(frame) == Keepalive(end, sent_at_us, reply)


@given(st.binary(max_size=60))
def test_anything_else_is_a_protocol_error(frame: bytes) -> None:
    if (frame[:1] == b"w" and len(frame) >= 25) or (frame[:1] == b"k" and len(frame) == 18):
        parse_frame(frame)
    else:
        with pytest.raises(ProtocolError):
            parse_frame(frame)


@pytest.mark.parametrize("frame", [b"w" + bytes(23), b"k" + bytes(16), b"k" + bytes(18)])
def test_frames_of_a_wrong_size(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match=rf"expected XLogData or keepalive, got {len(frame)}"):
        parse_frame(frame)


def test_status_update_is_34_bytes_of_the_protocol() -> None:
    update = status_update(
        write_lsn=1, flush_lsn=2, apply_lsn=3, now_us=POSTGRES_EPOCH_US + 4, reply_requested=True
    )
    expected = "72" + "0000000000000001" + "0000000000000002" + "0000000000000003"
    assert update.hex() == expected + "0000000000000004" + "01"
    assert status_update(write_lsn=1, flush_lsn=2, apply_lsn=3, now_us=0)[-1] == 0
