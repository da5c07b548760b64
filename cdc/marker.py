"""Activation markers: which subscriptions begin or end to route at this point of the stream.

A marker is a transactional logical message. Its commit is the stamp, so that a replay routes
exactly as the first pass did. It carries the nonce of the progress row: any role may write logical
messages, and one without the nonce is somebody else's. Pure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

PREFIX = "conductor.mark"


@dataclass(frozen=True, slots=True)
class Marker:
    """From its commit on, ``start`` route and ``end`` do not (ids of subscriptions)."""

    slot: str
    nonce: str
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def encode(self) -> str:
        """Return the content for ``pg_logical_emit_message(true, PREFIX, content)``."""
        return json.dumps(
            {"slot": self.slot, "nonce": self.nonce, "start": self.start, "end": self.end}
        )


def decode_marker(content: bytes, *, slot: str, nonce: str) -> Marker | None:
    """Return the marker in a message of our prefix, or None when it is not for this slot and nonce.

    >>> decode_marker(b'{"slot": "a", "nonce": "n", "start": [1], "end": []}', slot="a", nonce="n")
    Marker(slot='a', nonce='n', start=(1,), end=())
    >>> decode_marker(b"forged", slot="a", nonce="n") is None
    True
    """
    try:
        fields = json.loads(content)
        if (fields["slot"], fields["nonce"]) != (slot, nonce):
            return None
        return Marker(
            slot=slot,
            nonce=nonce,
            start=tuple(int(i) for i in fields["start"]),
            end=tuple(int(i) for i in fields["end"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
