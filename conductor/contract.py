"""The job contract: what a router must write so that a worker can run it.

One place says how a routed job looks on the wire into ``conductor.jobs`` (binary COPY, see
"Binary Format" on PostgreSQL's COPY page), what its payload holds and what its identity is.
Pure: no I/O, no clock. Used by the router (`cdc`), the dispatcher and the workers.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2s
from struct import Struct
from typing import TYPE_CHECKING

from orjson import dumps, loads

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

INTERNAL_QUEUE = "conductor.internal"
DISPATCH_TASK = "conductor.dispatch"

COPY_COLUMNS = (
    "run_at",
    "queue",
    "task",
    "app",
    "version",
    "trigger",
    "rank",
    "subscription",
    "metadata",
    "source_generation",
    "source_lsn",
    "source_ordinal",
    "payload",
)
"""Columns of a routed job, in the order `encode_copy_rows` writes them."""

KEYED_COLUMNS = (*COPY_COLUMNS, "ordered", "coalescing", "state", "key")
"""Columns of a routed job that has a key, as `encode_keyed_rows` writes them."""

LANE_KEY_LENGTH = 500
"""The most characters of a key that is indexed: of an ordered job, or of one that coalesces."""

COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER = b"\xff\xff"

_NULL = b"\xff\xff\xff\xff"
_ROW_START = Struct("!hiq").pack  # number of fields; run_at
_SMALLINT = Struct("!ih").pack
_BIGINT = Struct("!iq").pack
_POSITION = Struct("!iqiQ").pack  # generation; commit LSN
_ORDINAL_AND_LENGTH = Struct("!iqi").pack  # ordinal; length of the payload
_TRUE = b"\x00\x00\x00\x01\x01"
_POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01 in Unix microseconds


@dataclass(slots=True)
class JobSpec:
    """A job to be, as the router hands it to its sink. Immutable by convention (one per row).

    ``head`` and ``position`` are shared by all jobs of a subscription and of a transaction.
    """

    head: bytes  # encode_head(...) of the subscription
    position: bytes  # encode_position(...) of the transaction; ends with the commit LSN
    ordinal: int  # of the change in its transaction
    payload: bytes  # JSON text
    key: str | None = None
    ordered: bool = False  # it stands in the lane of its key
    coalesce_us: int = 0  # how long it waits for later changes of its key to go into it
    fills: bool = True  # what the WAL left out of it may come from the change of its key before it


def _text(value: str | None) -> bytes:
    return _data(None if value is None else value.encode())


def _data(value: bytes | None) -> bytes:
    return _NULL if value is None else len(value).to_bytes(4, "big") + value


def encode_head(
    *,
    queue: str,
    task: str,
    app: str | None,
    version: str | None,
    trigger: str,
    rank: int,
    subscription: int,
) -> bytes:
    """Return the columns that every job of one subscription shares, encoded for COPY."""
    return (
        _text(queue)
        + _text(task)
        + _text(app)
        + _text(version)
        + _text(trigger)
        + _SMALLINT(2, rank)
        + _BIGINT(8, subscription)
    )


def encode_position(generation: int, commit_lsn: int, metadata: bytes | None = None) -> bytes:
    """Return the columns that every job of one source transaction shares, encoded for COPY.

    ``metadata`` is JSON text.
    """
    return _data(metadata) + _POSITION(8, generation, 8, commit_lsn)


def encode_copy_rows(specs: Iterable[JobSpec], run_at_us: int) -> bytes:
    """Return COPY data, without header and trailer, of jobs due at ``run_at_us`` (Unix time)."""
    start = _ROW_START(len(COPY_COLUMNS), 8, run_at_us - _POSTGRES_EPOCH_US)
    # One piece a row: joining five times as many pieces takes three times as long.
    return b"".join(
        [
            start
            + spec.head
            + spec.position
            + _ORDINAL_AND_LENGTH(8, spec.ordinal, len(spec.payload))
            + spec.payload
            for spec in specs
        ]
    )


def encode_keyed_rows(specs: Iterable[JobSpec], now_us: int) -> bytes:
    """Return COPY data of jobs that stand in lanes or coalesce, or both, at ``now_us``."""
    since_us = now_us - _POSTGRES_EPOCH_US
    return b"".join(
        [
            _ROW_START(len(KEYED_COLUMNS), 8, since_us + spec.coalesce_us)
            + spec.head
            + spec.position
            + _ORDINAL_AND_LENGTH(8, spec.ordinal, len(spec.payload))
            + spec.payload
            + (_TRUE if spec.ordered else _NULL)
            + (_TRUE if spec.coalesce_us else _NULL)
            + _text("parked" if spec.ordered else "scheduled")
            + _text(spec.key)
            for spec in specs
        ]
    )


def event_envelope(event: str, payload: bytes) -> bytes:
    """Return the payload of jobs of an emitted event, whose own payload is JSON text.

    >>> event_envelope("order.paid", b'{"id":7}')
    b'{"event":"order.paid","payload":{"id":7}}'
    """
    return b'{"event":%b,"payload":%b}' % (dumps(event), payload)


def queue_and_task(head: bytes) -> tuple[str, str]:
    """Return what `encode_head` was given first.

    >>> queue_and_task(_text("default") + _text("send") + _NULL)
    ('default', 'send')
    """
    queue_end = 4 + int.from_bytes(head[:4], "big")
    task_start = queue_end + 4
    task_end = task_start + int.from_bytes(head[queue_end:task_start], "big")
    return head[4:queue_end].decode(), head[task_start:task_end].decode()


def job_key(values: Sequence[bytes]) -> str:
    """Return the key of a row's job, from the JSON texts of the values that it is made of.

    One value is its text, so that jobs which are invoked may share it; several are a
    JSON array. A long key is cut and gets a digest.

    >>> job_key([b'"a-1"']), job_key([b"7"]), job_key([b"7", b'"a-1"'])
    ('a-1', '7', '[7,"a-1"]')
    """
    key = b"[" + b",".join(values) + b"]" if len(values) != 1 else values[0]
    text = key.decode()
    if len(values) == 1 and text.startswith('"'):
        with suppress(ValueError):  # json takes what is no text: "\\ud800"
            text = loads(key)
    if len(text) <= LANE_KEY_LENGTH:
        return text
    digest = blake2s(text.encode(), digest_size=16).hexdigest()
    return f"{text[: LANE_KEY_LENGTH - len(digest) - 1]}#{digest}"


def idempotency_key(generation: int, commit_lsn: str, ordinal: int, subscription: int) -> str:
    """Return the stable name of a routed job: the same for every delivery of the same change.

    The generation names one creation of one slot, so slot and generation are one number here.

    >>> idempotency_key(3, "0/16B3748", 65536, 12)
    '3:0/16B3748:65536:12'
    """
    return f"{generation}:{commit_lsn}:{ordinal}:{subscription}"
