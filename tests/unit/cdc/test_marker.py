"""Markers: only ours, with the nonce, count."""

from __future__ import annotations

import json

import pytest

from cdc.marker import Marker, decode_marker

MARKER = Marker("a", "nonce", start=(1, 2), end=(3,))


def test_a_marker_survives_the_stream() -> None:
    assert decode_marker(MARKER.encode().encode(), slot="a", nonce="nonce") == MARKER


@pytest.mark.parametrize(("slot", "nonce"), [("b", "nonce"), ("a", "guessed")])
def test_a_marker_of_another_slot_or_nonce_is_none(slot: str, nonce: str) -> None:
    assert decode_marker(MARKER.encode().encode(), slot=slot, nonce=nonce) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b'{"slot": "a", "nonce": "nonce"}',
        json.dumps({"slot": "a", "nonce": "nonce", "start": ["x"], "end": []}).encode(),
        json.dumps({"slot": "a", "nonce": "nonce", "start": 1, "end": []}).encode(),
        b'{"slot": "a", "nonce": "nonce", "start": [1e400], "end": []}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_none(content: bytes) -> None:
    assert decode_marker(content, slot="a", nonce="nonce") is None
