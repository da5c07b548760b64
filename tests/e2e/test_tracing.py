"""Both programs export their spans, and a change's way through both is one trace."""

from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from tests.collector import Collector
from tests.e2e.monitored import TABLE
from tests.e2e.programs import running
from tests.servers import ScratchDatabase, wait_until

TIMEOUT_S = 60.0
HANDLED = "select exists (select from conductor.history where task = 'index-note')"


@pytest.mark.pg(18)
def test_a_change_is_followed_through_both_processes(
    migrated: ScratchDatabase, tmp_path: Path
) -> None:
    with ExitStack() as stack, psycopg.connect(migrated.dsn, autocommit=True) as connection:
        connection.execute(TABLE.encode())
        collector = stack.enter_context(Collector())
        exporting = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        sidecar = {
            "CDC_SOURCE_DSN": migrated.source_dsn,
            "CDC_SLOT": migrated.name,
            "CDC_METRICS_PORT": "0",
        }
        worker = {"CONDUCTOR_DSN": migrated.dsn, "CONDUCTOR_WAIT_CAPTURED_S": "30"}
        log = tmp_path / "worker.log"
        application = ["conductor", "worker", "tests.e2e.monitored:orchestrator"]
        with (
            running(["cdc", "run"], {**sidecar, **exporting}, tmp_path / "sidecar.log"),
            running(application, {**worker, **exporting}, log),
        ):
            wait_until(lambda: '"started"' in log.read_text(), TIMEOUT_S, "the worker works")
            connection.execute("insert into notes (text) values ('x')")
            wait_until(lambda: handled(connection), TIMEOUT_S, "the change is handled")
        spans = {span.name: (service, span) for service, span in collector.spans}
    routed_by, routed = spans[f"route {migrated.name}"]
    processed_by, processed = spans["process default"]
    assert (routed_by, processed_by) == ("cdc", "conductor")
    assert processed.parent_span_id == routed.span_id
    assert processed.trace_id == routed.trace_id


def handled(connection: psycopg.Connection[tuple[bool]]) -> bool:
    row = connection.execute(HANDLED).fetchone()
    return row is not None and row[0]
