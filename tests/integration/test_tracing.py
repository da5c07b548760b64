"""Traces on a real server, read from OpenTelemetry's own exporter in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import BaseModel

from conductor import (
    Batch,
    BatchContext,
    BatchFailed,
    Conductor,
    Context,
    Emitted,
    Invocation,
    NonRetryable,
    OnChange,
    OnEvent,
    Orchestrator,
    SyncContext,
    TableRow,
    define_event,
    define_task,
)
from conductor.retry import RetryPolicy
from conductor.sync import SyncConductor
from tests.integration.conftest import Queue, eventually
from tests.integration.sidecar import drop_slot, query, running

pytestmark = pytest.mark.anyio

SECRET = "what nobody else may read"
AT_ONCE = RetryPolicy(initial_s=0, max_s=0, jitter=0)


class Order(BaseModel):
    note: str = SECRET


class Notes(TableRow, table="public.notes"):
    id: int
    text: str


sell = define_task("sell", payload=Order, returns=str)
pack = define_task("pack", payload=Order, returns=str, queue="packing")
note = define_task("note", payload=Order)
sold = define_event("order.sold", payload=Order)


class Spans:
    """What has been exported so far."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def parent_of(self, span: ReadableSpan) -> ReadableSpan | None:
        wanted = span.parent and span.parent.span_id
        return next((s for s in self.all if s.context and s.context.span_id == wanted), None)

    def path(self, span: ReadableSpan | None) -> list[str]:
        """The names from the root of a trace to a span."""
        return [] if span is None else [*self.path(self.parent_of(span)), span.name]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """A tracer provider for this test alone."""
    spans = Spans()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    yield spans
    assert SECRET not in "".join(span.to_json() for span in spans.all)
    spans.provider.shutdown()


@pytest.fixture
async def conductor(queue: Queue) -> AsyncIterator[Conductor[None]]:
    conductor = Conductor(queue.database.dsn, tasks=[sell, pack, note], events=[sold])
    yield conductor
    await conductor.close()


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return trace.format_trace_id(span.context.trace_id)


def traceparent(span: trace.Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_one_trace_from_a_request_through_steps_and_waits_to_a_child(
    queue: Queue, conductor: Conductor[None], spans: Spans
) -> None:
    @conductor.task(pack)
    async def packing(event: Invocation[Order], ctx: Context[None]) -> str:
        return "a box"

    @conductor.task(sell)
    async def selling(event: Invocation[Order], ctx: Context[None]) -> str:
        await ctx.step("look up", lambda: event.payload.note, returns=str)
        await ctx.transaction("take", lambda db: db.execute("select 1"), returns=None)
        return await ctx.invoke("have it packed", pack, event.payload)

    async with Orchestrator(conductor, metrics_port=None):
        with spans.tracer.start_as_current_span("request"):
            handle = await conductor.invoke(sell, Order())
        assert await handle.result(60) == "a box"
        await eventually(lambda: _is(len(spans.named("process default")) == 2))

    assert len({trace_of(span) for span in spans.all}) == 1
    first, second = spans.named("process default")
    assert attributes(first)["conductor.outcome"] == "suspended"
    assert attributes(second)["conductor.outcome"] == "completed"
    made = ["request", "send default"]
    ran = [*made, "process default"]
    assert spans.path(first) == spans.path(second) == ran
    assert spans.path(spans.one("step look up")) == [*ran, "step look up"]
    assert spans.path(spans.one("step take")) == [*ran, "step take"]
    assert spans.path(spans.one("process packing")) == [*ran, "send packing", "process packing"]
    assert attributes(spans.one("send packing"))["conductor.step.name"] == "have it packed"
    sent, processed = spans.one("send default"), first
    assert (sent.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert attributes(sent) == {
        "messaging.system": "pgconductor",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "default",
        "messaging.message.id": str(handle.id),
        "conductor.task": "sell",
    }
    assert attributes(processed) | {"messaging.message.id": str(handle.id)} == attributes(processed)
    assert [link.context.span_id for link in processed.links] == [sent.context.span_id]


async def test_a_retry_is_in_the_same_trace_and_linked(
    queue: Queue, conductor: Conductor[None], spans: Spans
) -> None:
    @conductor.task(sell, max_attempts=2, retry=AT_ONCE)
    async def selling(event: Invocation[Order], ctx: Context[None]) -> str:
        if ctx.job.attempt:
            raise NonRetryable(SECRET)
        return await ctx.step("ask", lambda: 1 / len(event.payload.note[:0]), returns=str)

    async with Orchestrator(conductor, metrics_port=None):
        job = (await conductor.invoke(sell, Order())).id
        await queue.until("select exists (select from conductor.history where id = %s)", job)
    first, second = spans.named("process default")
    sent = spans.one("send default")
    outcomes = [attributes(span)["conductor.outcome"] for span in (first, second)]
    assert outcomes == ["retried", "failed"]
    assert [attributes(span)["conductor.attempt"] for span in (first, second)] == [1, 2]
    kinds = [attributes(span)["error.type"] for span in (first, second)]
    assert kinds == ["ZeroDivisionError", "NonRetryable"]
    for span in (first, second):
        assert span.status.status_code is StatusCode.ERROR
        assert not span.status.description
        assert spans.parent_of(span) is sent
        assert [link.context.span_id for link in span.links] == [sent.context.span_id]
    assert attributes(spans.one("step ask"))["error.type"] == "ZeroDivisionError"
    assert [event for span in spans.all for event in span.events] == []


async def test_blocking_code_is_traced_alike(
    queue: Queue, conductor: Conductor[None], spans: Spans
) -> None:
    @conductor.task(sell)
    def selling(event: Invocation[Order], ctx: SyncContext[None]) -> str:
        ctx.start("have it packed", pack, event.payload)
        with spans.tracer.start_as_current_span("its own"):
            return ctx.step("look up", lambda: "found", returns=str)

    @conductor.task(pack)
    async def packing(event: Invocation[Order], ctx: Context[None]) -> str:
        return "a box"

    def from_elsewhere() -> None:
        with SyncConductor(Conductor(conductor.dsn, tasks=[sell])) as client:
            with spans.tracer.start_as_current_span("request"):
                client.invoke(sell, Order())
            with psycopg.connect(conductor.dsn) as connection:
                client.invoke(sell, Order(), connection=connection)

    from_elsewhere()
    async with Orchestrator(conductor, metrics_port=None) as orchestrator:
        await orchestrator.drain()
    ran = ["send default", "process default"]
    paths = [spans.path(span) for span in spans.named("step look up")]
    inner = [*ran, "its own", "step look up"]
    assert sorted(paths) == sorted([["request", *inner], inner])
    packed = [*ran, "send packing", "process packing"]
    paths = [spans.path(span) for span in spans.named("process packing")]
    assert sorted(paths) == sorted([["request", *packed], packed])


async def test_an_event_carries_the_trace_to_its_subscribers(
    queue: Queue, conductor: Conductor[None], spans: Spans
) -> None:
    @conductor.task("thank", OnEvent(sold))
    async def thank(event: Emitted[Order], ctx: Context[None]) -> None:
        pass

    @conductor.task(sell)
    async def selling(event: Invocation[Order], ctx: Context[None]) -> str:
        await ctx.emit("tell", sold, event.payload)
        return ""

    async with Orchestrator(conductor, metrics_port=None) as orchestrator:
        await conductor.emit_many(sold, [Order(), Order()])
        await conductor.invoke(sell, Order())
        await orchestrator.drain()
    told = ["send order.sold", "process default"]
    thanked = [s for s in spans.all if attributes(s).get("conductor.task") == "thank"]
    paths = sorted(spans.path(span) for span in thanked)
    assert paths == sorted([told, told, ["send default", "process default", *told]])
    emitted = next(s for s in spans.named("send order.sold") if s.parent is None)
    assert attributes(emitted)["messaging.batch.message_count"] == 2
    assert attributes(emitted)["conductor.event"] == "order.sold"


async def test_a_batch_is_a_trace_of_its_own_linked_to_where_its_jobs_came_from(
    queue: Queue, conductor: Conductor[None], spans: Spans
) -> None:
    @conductor.task(note, batch=Batch(size=3, wait_s=10), max_attempts=1)
    async def noting(events: Sequence[Invocation[Order]], ctx: BatchContext[None]) -> None:
        raise BatchFailed({1: ValueError(SECRET)})

    async with Orchestrator(conductor, metrics_port=None) as orchestrator:
        for _ in range(2):
            await conductor.invoke(note, Order())
        await queue.rows("select conductor.invoke('note', payload => '{}')")
        await orchestrator.drain()
    processed = spans.one("process default")
    assert processed.parent is None
    made = {span.context.span_id for span in spans.named("send default")}
    assert {link.context.span_id for link in processed.links} == made
    shown = attributes(processed)
    assert (shown["messaging.batch.message_count"], shown["conductor.batch.failed"]) == (3, 1)
    assert (shown["conductor.outcome"], shown["conductor.task"]) == ("mixed", "note")


async def test_a_context_that_is_given_is_kept_and_a_bad_one_harms_nobody(
    queue: Queue, conductor: Conductor[None], spans: Spans
) -> None:
    seen: list[Any] = []

    @conductor.task(sell)
    async def selling(event: Invocation[Order], ctx: Context[None]) -> str:
        seen.append(ctx.metadata)
        return ""

    browser = spans.tracer.start_span("browser")
    given = {"traceparent": traceparent(browser), "tenant": 7}
    bad: list[Any] = ["", "00-1", 7, None, ["00"], "00-" + "0" * 32 + "-" + "0" * 16 + "-01"]
    async with Orchestrator(conductor, metrics_port=None) as orchestrator:
        await conductor.invoke(sell, Order(), metadata=given)
        for value in bad:
            await queue.rows(
                "select conductor.invoke('sell', payload => %s, metadata => %s)",
                json.dumps({"note": "x"}),
                json.dumps({"traceparent": value, "tracestate": value}),
            )
        await orchestrator.drain()
    browser.end()
    processed = spans.named("process default")
    assert len(processed) == 1 + len(bad)
    paths = sorted(spans.path(span) for span in processed)
    assert paths == [
        ["browser", "send default", "process default"],
        *([["process default"]] * len(bad)),
    ]
    assert len({trace_of(span) for span in processed}) == 1 + len(bad)
    carried = next(metadata for metadata in seen if "tenant" in metadata)
    assert carried["traceparent"].split("-")[1] == given["traceparent"].split("-")[1]  # type: ignore[attr-defined]


async def test_the_router_begins_a_trace_where_the_source_committed(
    queue: Queue, conductor: Conductor[None], spans: Spans
) -> None:
    database = queue.database
    await queue.rows("create table notes (id int primary key, text text)")

    @conductor.task("index", OnChange(Notes, "insert", when="new.id > 0"))
    async def index(event: Any, ctx: Context[None]) -> None:
        pass

    async with running(database):
        orchestrator = Orchestrator(conductor, metrics_port=None)
        await orchestrator.start(wait_captured_s=30)
        await queue.rows("insert into notes values (-1, %s)", SECRET)
        await queue.rows("insert into notes values (1, %s), (2, %s)", SECRET, SECRET)
        await eventually(lambda: _is(len(spans.named("process default")) == 2))
        await orchestrator.stop()
    drop_slot(database)
    routed = spans.one(f"route {database.name}")
    processed = spans.named("process default")
    assert [spans.parent_of(span) for span in processed] == [routed, routed]
    assert routed.kind is SpanKind.PRODUCER
    (lsn,) = {row["l"] for row in query(database.dsn, SOURCES)}
    assert attributes(routed)["cdc.commit_lsn"] == lsn
    assert attributes(routed)["cdc.slot"] == database.name
    assert routed.start_time is not None
    assert routed.end_time is not None
    assert routed.start_time <= routed.end_time


SOURCES = "select distinct source_lsn::text as l from conductor.history where trigger = 'change'"


async def test_without_a_provider_nothing_is_carried(
    queue: Queue, conductor: Conductor[None]
) -> None:
    with trace.get_tracer("test").start_as_current_span("request"):
        handle = await conductor.invoke(sell, Order())
    row = await queue.rows("select metadata from conductor.jobs where id = %s", handle.id)
    assert row == [{"metadata": None}]


async def _is(fact: bool) -> bool:
    return fact
