"""The span of one run of a job, for a worker with a tracer: what it was, and how it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conductor import tracing
from conductor.store.jobs import Finished, Outcome

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from conductor.worker.execution import Execution


async def traced(execution: Execution, tracer: Tracer) -> Outcome | None:
    """Run an execution in its span and return its outcome."""
    with tracing.attempt(tracer, execution.info) as span:
        outcome = await execution.outcome()
        tracing.ended(span, *describe(outcome))
        return outcome


def describe(outcome: Outcome | None) -> tuple[str, bytes | None]:
    """Return an outcome's name, and the error of a failure as it is stored."""
    if outcome is None:
        return "abandoned", None
    if isinstance(outcome, Finished):
        return outcome.ending, outcome.document if outcome.ending == "failed" else None
    if outcome.failures:
        return "retried", outcome.error
    return "suspended" if outcome.waits or outcome.wake_at is not None else "given back", None
