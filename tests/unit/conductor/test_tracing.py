"""Without OpenTelemetry, or without a provider, there is nothing to do and nothing is imported."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from conductor import tracing
from tests.collector import Collector


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_nothing_is_imported_for_it() -> None:
    done = run(
        "import sys, conductor, conductor.orchestrator, conductor.sync, cdc.service\n"
        "from conductor import tracing\n"
        "tracing.export('x')\n"
        "assert tracing.find_tracer() is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])",
    )
    assert done.stdout == "[]\n", done.stderr


def test_without_the_extra_the_log_says_so() -> None:
    done = run(
        "import sys\nsys.modules['opentelemetry'] = None\n"
        "from conductor import tracing\ntracing.export('x')\n",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
    )
    assert done.returncode == 0
    assert "install pgconductor[otel]" in done.stderr


def test_a_disabled_sdk_carries_nothing() -> None:
    done = run(
        "from opentelemetry import trace\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "from conductor import tracing\n"
        "trace.set_tracer_provider(TracerProvider())\n"
        "with tracing.sending('default', 'task', [b'{}'], None) as sending: pass\n"
        "print(sending.metadata)\n",
        OTEL_SDK_DISABLED="true",
    )
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_what_is_made_without_a_tracer_is_as_it_was_given() -> None:
    metadata: dict[str, Any] = {"traceparent": "00"}
    with tracing.sending("default", "task", [b"{}"], metadata) as sending:
        sending.sent(7)
    assert sending.metadata is metadata
    assert tracing.without_context(metadata) is metadata
    assert tracing.step("a", "step") is tracing.step("b", "step")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.mark.parametrize(
    "environment, service", [({}, "cdc"), ({"OTEL_SERVICE_NAME": "shop-cdc"}, "shop-cdc")]
)
def test_the_environment_says_where_spans_go(
    collector: Collector, environment: dict[str, str], service: str
) -> None:
    done = run(
        "from conductor import tracing\n"
        "tracing.export('cdc')\n"
        "with tracing.step('look up', 'step'): pass\n",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        **environment,
    )
    assert done.returncode == 0, done.stderr
    ((service_name, span),) = collector.spans
    assert (service_name, span.name) == (service, "step look up")
