"""Spans of source transactions, where there is a tracer: from their commit to that of their jobs.

A span begins when the source committed (by its clock) and ends when the queue has committed the
jobs, which carry its context: their runs are in the same trace. A transaction without a job leaves
none, and one whose jobs were not committed neither: it is routed, and traced, again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import orjson

from cdc.lsn import Lsn
from conductor.tracing import SYSTEM, current_context, find_tracer

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_US: Final = 1000  # nanoseconds


class TransactionSpans:
    """The span of the source transaction that is read, and those that wait for their commit."""

    def __init__(self, slot: str) -> None:
        self._slot = slot
        self._open: Span | None = None

    def begin(self, commit_lsn: int, commit_time_us: int) -> bytes | None:
        """Begin a transaction; return the metadata of its jobs, None where nobody traces."""
        tracer = find_tracer()
        if tracer is None:
            self._open = None
            return None
        from opentelemetry.context import Context  # noqa: PLC0415  # there is a tracer
        from opentelemetry.trace import SpanKind  # noqa: PLC0415  # the same

        self._open = tracer.start_span(
            f"route {self._slot}",
            Context(),
            SpanKind.PRODUCER,
            {
                "messaging.system": SYSTEM,
                "messaging.operation.name": "route",
                "messaging.operation.type": "send",
                "cdc.slot": self._slot,
                "cdc.commit_lsn": str(Lsn(commit_lsn)),
            },
            start_time=min(commit_time_us * _US, time.time_ns()),
        )
        carrier = current_context(self._open)
        return orjson.dumps(carrier) if carrier else None

    def commit(self) -> list[Span]:
        """Return the span of the transaction that has been read, to be ended with `committed`."""
        span, self._open = self._open, None
        return [] if span is None else [span]


def committed(spans: Iterable[Span]) -> None:
    """End the spans of transactions whose jobs the queue has committed."""
    for span in spans:
        span.end()
