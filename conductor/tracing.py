"""Traces, where OpenTelemetry is installed: spans, and W3C trace context in the metadata of jobs.

A job carries the context of whoever made it as ``traceparent`` in its metadata; each of its runs is
a span below that, in the same trace, whatever process it is in. Names and attributes follow
OpenTelemetry's semantic conventions for messaging where these have some, and are
``conductor.…`` where not. A span never holds a payload, a result or the text of an error.

Only OpenTelemetry's API is used, and it is imported by whoever sets a tracer provider: until then
there is nothing to do, and asking costs a look into a dictionary. `export` is the exception: the
services call it when they start, and it sets a provider where the environment asks for one.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from orjson import loads

from conductor.contract import DISPATCH_TASK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, SpanKind, Tracer
    from opentelemetry.util.types import AttributeValue

    from conductor.job import JobInfo

Metadata = dict[str, Any] | None

SYSTEM: Final = "pgconductor"
"""The value of ``messaging.system``."""

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""The variables that say where spans go; without one of them the services export none."""

CONTEXT_FIELDS: Final = ("traceparent", "tracestate")
"""What of a job's metadata is read and written here (W3C Trace Context)."""

_NAMED_BY_ENVIRONMENT: Final = "OTEL_PYTHON_TRACER_PROVIDER" in os.environ
_LOG: Final = logging.getLogger("conductor.tracing")
_tracers: dict[object, Tracer] = {}  # of the provider in use


def find_tracer() -> Tracer | None:
    """Return the process' tracer; None while nobody has set a tracer provider."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not hasattr(trace, "get_tracer_provider"):  # absent, or half imported
        return None
    # What get_tracer_provider() looks at first. It asks the environment as well, each time, which
    # costs more than all else here.
    if getattr(trace, "_TRACER_PROVIDER", trace) is None and not _NAMED_BY_ENVIRONMENT:
        return None
    provider = trace.get_tracer_provider()
    if type(provider) in (trace.ProxyTracerProvider, trace.NoOpTracerProvider):  # no ABC's check
        return None
    tracer = _tracers.get(provider)
    if tracer is None:
        _tracers.clear()
        tracer = _tracers[provider] = provider.get_tracer(SYSTEM)
    return tracer


# --- making jobs ------------------------------------------------------------------------------


class Sending:
    """Jobs on their way into the queue. ``metadata``: theirs, with the trace's context in it."""

    __slots__ = ("_span", "metadata")

    def __init__(self, metadata: Metadata, span: Span | None = None) -> None:
        self.metadata = metadata
        self._span = span

    def sent(self, job: int | None) -> None:
        """Take note of the job that was made; a batch has no id."""
        if self._span is not None and job is not None:
            self._span.set_attribute("messaging.message.id", str(job))


def sending(
    queue: str, task: str, payloads: Sequence[bytes], metadata: Metadata, step: str | None = None
) -> AbstractContextManager[Sending]:
    """Return what is entered around the making of jobs. ``step``: the step that makes them.

    Metadata that has a trace's context already keeps it, and is its parent.
    """
    tracer = find_tracer()
    if tracer is None:
        return nullcontext(Sending(metadata))
    destination, attributes = _destination(queue, task, payloads)
    if len(payloads) > 1:
        attributes["messaging.batch.message_count"] = len(payloads)
    if step is not None:
        attributes["conductor.step.name"] = step
    return _sending(tracer, destination, attributes, metadata)


@contextmanager
def _sending(
    tracer: Tracer, destination: str, attributes: dict[str, AttributeValue], metadata: Metadata
) -> Iterator[Sending]:
    from opentelemetry.trace import SpanKind  # noqa: PLC0415 - there is a tracer, so it is there

    attributes |= _operation("send", destination)
    parent = read_context(metadata)
    with _span(tracer, f"send {destination}", SpanKind.PRODUCER, attributes, parent) as span:
        carrier = current_context()  # nothing, when the SDK is disabled
        yield Sending({**(metadata or {}), **carrier} if carrier else metadata, span)


def _destination(
    queue: str, task: str, payloads: Sequence[bytes]
) -> tuple[str, dict[str, AttributeValue]]:
    """Say where jobs go: a task's into its queue; an event to whoever is subscribed."""
    if task == DISPATCH_TASK and payloads:
        event: str = loads(payloads[0])["event"]
        return event, {"conductor.event": event}
    return queue, {"conductor.task": task}


# --- running jobs -----------------------------------------------------------------------------


@contextmanager
def attempt(tracer: Tracer, job: JobInfo) -> Iterator[Span]:
    """Enter the span of one run of a job, below the context that its metadata carries.

    It is linked to that as well, so that retries are found from where the job was made.
    """
    from opentelemetry.context import Context  # noqa: PLC0415 - as above
    from opentelemetry.trace import SpanKind  # noqa: PLC0415

    parent = read_context(job.metadata) or Context()  # and not whatever the worker was started in
    attributes: dict[str, AttributeValue] = {
        **_operation("process", job.queue),
        "messaging.message.id": str(job.id),
        "conductor.task": job.task,
        "conductor.trigger": job.trigger,
        "conductor.attempt": job.attempt + 1,
        "conductor.run": job.fence,
        "conductor.idempotency_key": job.idempotency_key,
    }
    name = f"process {job.queue}"
    with _span(tracer, name, SpanKind.CONSUMER, attributes, parent, _links([job])) as span:
        yield span


@contextmanager
def batch(tracer: Tracer, jobs: Sequence[JobInfo]) -> Iterator[Span]:
    """Enter the span of one run of several jobs: a trace of its own, linked to where each was made.

    They are of one task, and at least one.
    """
    from opentelemetry.context import Context  # noqa: PLC0415 - as above
    from opentelemetry.trace import SpanKind  # noqa: PLC0415

    queue, task = jobs[0].queue, jobs[0].task
    attributes: dict[str, AttributeValue] = {
        **_operation("process", queue),
        "messaging.batch.message_count": len(jobs),
        "conductor.task": task,
    }
    links = _links(jobs)
    with _span(tracer, f"process {queue}", SpanKind.CONSUMER, attributes, Context(), links) as span:
        yield span


def _links(jobs: Iterable[JobInfo]) -> list[Link]:
    """Return links to the spans that made these jobs, as far as they are known."""
    from opentelemetry.trace import Link, get_current_span  # noqa: PLC0415 - as above

    parents = [parent for job in jobs if (parent := read_context(job.metadata)) is not None]
    made_by = [get_current_span(parent).get_span_context() for parent in parents]
    return [Link(context) for context in made_by if context.is_valid]


def ended(span: Span, outcome: str, error: bytes | None) -> None:
    """Say how a run has ended. ``error``: as it is stored, of which only the type is told."""
    span.set_attribute("conductor.outcome", outcome)
    if error is not None:
        _mark_failed(span, str(loads(error).get("type", "")))


def step(name: str, kind: str) -> AbstractContextManager[object]:
    """Return what is entered around a step that runs now, and not when its result is read."""
    tracer = find_tracer()
    if tracer is None:
        return _NOTHING
    return _step(tracer, name, kind)


@contextmanager
def _step(tracer: Tracer, name: str, kind: str) -> Iterator[Span]:
    from opentelemetry.trace import SpanKind  # noqa: PLC0415 - as above

    attributes = {"conductor.step.name": name, "conductor.step.kind": kind}
    with _span(tracer, f"step {name}", SpanKind.INTERNAL, attributes) as span:
        yield span


_NOTHING: Final[AbstractContextManager[object]] = nullcontext()


# --- the context in metadata ------------------------------------------------------------------


def read_context(metadata: Metadata) -> Context | None:
    """Return the context that metadata carries; None when there is none that can be read.

    Anybody may have written it. Call it only where there is a tracer.
    """
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - as above
        TraceContextTextMapPropagator,
    )

    found = {name: (metadata or {}).get(name) for name in CONTEXT_FIELDS}
    carrier = {name: value for name, value in found.items() if isinstance(value, str)}
    if "traceparent" not in carrier:
        return None
    return TraceContextTextMapPropagator().extract(carrier)


def current_context(span: Span | None = None) -> dict[str, str]:
    """Return what carries the current span's context, or a given one's. Only with a tracer."""
    from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - as above
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
        TraceContextTextMapPropagator,
    )

    carrier: dict[str, str] = {}
    context = None if span is None else set_span_in_context(span)
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier


def without_context(metadata: Metadata) -> Metadata:
    """Return inherited metadata as a child gets it, which is to carry a context of its own."""
    if metadata is None or find_tracer() is None:
        return metadata
    return {name: value for name, value in metadata.items() if name not in CONTEXT_FIELDS}


# --- spans ------------------------------------------------------------------------------------


def _operation(name: str, destination: str) -> dict[str, AttributeValue]:
    return {
        "messaging.system": SYSTEM,
        "messaging.operation.name": name,
        "messaging.operation.type": name,
        "messaging.destination.name": destination,
    }


@contextmanager
def _span(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    attributes: Mapping[str, AttributeValue],
    parent: Context | None = None,
    links: Sequence[Link] = (),
) -> Iterator[Span]:
    """Be in a span. An error is told by its type alone: its text may hold what is in a row."""
    with tracer.start_as_current_span(
        name,
        parent,
        kind,
        attributes,
        links,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except Exception as error:
            _mark_failed(span, type(error).__name__)
            raise


def _mark_failed(span: Span, kind: str) -> None:
    from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - as above

    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


# --- exporting --------------------------------------------------------------------------------


def export(service: str) -> None:
    """Export the process' spans where the environment says so (`ENDPOINTS`), as OTLP over HTTP.

    OpenTelemetry's own variables rule: ``OTEL_SERVICE_NAME`` (``service`` when
    nothing names it),
    ``OTEL_TRACES_SAMPLER``, ``OTEL_SDK_DISABLED`` and the rest. A provider that is set already
    stays. Without the extra ``otel`` this says so in the log and does nothing else.
    """
    if find_tracer() is not None or not any(map(os.environ.get, ENDPOINTS)):
        return
    try:
        from opentelemetry import trace  # noqa: PLC0415 - optional
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        _LOG.warning("no spans are exported: %s; install pgconductor[otel]", error)
        return
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": service}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
