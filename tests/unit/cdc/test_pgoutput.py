from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import ProtocolError
from cdc.wire.messages import UNCHANGED, Column, Delete, Insert, Message, Relation, Update
from cdc.wire.pgoutput import decode

from .pgoutput_encoder import encode
from .strategies import messages

TAGS = b"BCORYIUDTM"


@given(messages)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message


@given(messages, st.data())
def test_a_message_that_stops_short_is_a_protocol_error(
    message: Message, data: st.DataObject
) -> None:
    payload = encode(message)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(ProtocolError) as raised:
        decode(payload[:cut])
    assert raised.value.tag == payload[: min(cut, 1)].decode()
    assert 0 <= raised.value.offset <= cut


@given(messages, st.binary(min_size=1, max_size=9))
def test_bytes_after_a_message_are_a_protocol_error(message: Message, trailing: bytes) -> None:
    payload = encode(message)
    with pytest.raises(ProtocolError, match=f"message of {len(payload)} bytes") as raised:
        decode(payload + trailing)
    assert raised.value.offset == len(payload)


@given(st.sampled_from(TAGS), st.binary(max_size=80))
def test_noise_is_a_message_or_a_protocol_error(tag: int, body: bytes) -> None:
    with suppress(ProtocolError):
        decode(bytes([tag]) + body)


@given(messages, st.data())
def test_damaged_messages_are_messages_or_protocol_errors(
    message: Message, data: st.DataObject
) -> None:
    payload = bytearray(encode(message))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        decode(bytes(payload))


def test_tags_that_version_1_does_not_have() -> None:
    for tag in sorted(set(range(256)) - set(TAGS)):
        with pytest.raises(ProtocolError, match="version 1"):
            decode(bytes([tag]) + bytes(20))


def test_values_in_binary_format_are_refused() -> None:
    payload = encode(Insert(1, [b"a"])).replace(b"t", b"b")
    with pytest.raises(ProtocolError, match=r"byte 8: expected a value as text .* got 'b'"):
        decode(payload)


def test_wrong_kinds_of_rows() -> None:
    with pytest.raises(ProtocolError, match="byte 5: expected N, got 'K'"):
        decode(encode(Insert(1, [])).replace(b"N", b"K"))
    with pytest.raises(ProtocolError, match="byte 5: expected K, O or N, got 'X'"):
        decode(encode(Update(1, "K", [], [])).replace(b"K", b"X"))
    with pytest.raises(ProtocolError, match="byte 8: expected N, got 'K'"):
        decode(encode(Update(1, "K", [], [])).replace(b"N", b"K"))
    with pytest.raises(ProtocolError, match="byte 5: expected K, O or N, got 'N'"):
        decode(encode(Delete(1, "K", [])).replace(b"K", b"N"))


def test_names_must_be_utf_8_and_identities_known() -> None:
    payload = encode(Relation(1, "shop", "users", "d", (Column("id", 20, -1, is_key=True),)))
    with pytest.raises(ProtocolError, match="byte 11: expected UTF-8"):
        decode(payload.replace(b"users", b"u\xffers"))
    with pytest.raises(ProtocolError, match="expected d, n, f or i, got 'x'"):
        decode(payload.replace(b"users\0d", b"users\0x"))


def test_unchanged_is_neither_null_nor_empty() -> None:
    decoded = decode(encode(Update(1, None, None, [UNCHANGED, None, b""])))
    assert isinstance(decoded, Update)
    assert decoded.new[0] is UNCHANGED
    assert decoded.new[1:] == [None, b""]
