"""Spans of runs, for a worker with a tracer: of one job, or of a batch; and how they have ended."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from conductor import tracing
from conductor.store.jobs import Finished, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.trace import Tracer

    from conductor.worker.batches import BatchRun
    from conductor.worker.execution import Execution


async def traced(execution: Execution, tracer: Tracer) -> Outcome | None:
    """Run an execution in its span and return its outcome."""
    with tracing.attempt(tracer, execution.info) as span:
        outcome = await execution.outcome()
        tracing.ended(span, *describe(outcome))
        return outcome


async def traced_together(run: BatchRun, tracer: Tracer) -> Sequence[Outcome | None]:
    """Run a batch in its span and return the outcomes of its members."""
    with tracing.batch(tracer, [member.info for member in run.members]) as span:
        ends = await run.outcomes()
        names = Counter(describe(end)[0] for end in ends)
        span.set_attribute("conductor.outcome", "mixed" if len(names) > 1 else min(names))
        span.set_attribute("conductor.batch.failed", names["failed"] + names["retried"])
        return ends


def describe(outcome: Outcome | None) -> tuple[str, bytes | None]:
    """Return an outcome's name, and the error of a failure as it is stored."""
    if outcome is None:
        return "abandoned", None
    if isinstance(outcome, Finished):
        return outcome.ending, outcome.document if outcome.ending == "failed" else None
    if outcome.failures:
        return "retried", outcome.error
    return "suspended" if outcome.waits or outcome.wake_at is not None else "given back", None
