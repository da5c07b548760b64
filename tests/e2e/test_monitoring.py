"""A real Prometheus scrapes real processes: faults are made, alerts fire, fixes end them."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from conductor.migrations import migrate
from tests.deploy.test_dashboards import CHARTS
from tests.e2e.monitored import TABLE
from tests.e2e.prometheus_server import PrometheusServer
from tests.servers import Cluster, ScratchDatabase, StartServer, wait_until
from tools.supervision import OWN_SETTINGS, dies_with_us, free_port

START_TIMEOUT_S = 60.0
ALERT_TIMEOUT_S = 120.0  # a killed worker counts for half a minute
PANELS_TIMEOUT_S = 60.0
WAL_LIMIT = "64MB"
NEAR_LIMIT = 0.2  # of the room is left
MEGABYTE = 1_000_000

# Nothing of this happens in a healthy system, or not within seconds.
EMPTY_WHEN_HEALTHY = {
    "overview: Alerts",
    "overview: Oldest work that waits",
    "queue: Oldest work that is due",
    "router: Conditions met, in 5 minutes",
    "router: Open gaps, by condition",
}


class Process:
    """One process of the system, started and ended by the test."""

    def __init__(self, module: list[str], settings: Mapping[str, str], log: Path) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(OWN_SETTINGS)}
        self._environment = {**inherited, **settings}
        self._command = [*dies_with_us(), sys.executable, "-m", *module]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log
            )

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=30)
            self._process = None

    @property
    def log(self) -> str:
        return self._log.read_text()[-3000:]


class System:
    """A sidecar, a worker and a Prometheus on one database."""

    def __init__(self, database: ScratchDatabase, folder: Path) -> None:
        ports = {"cdc": free_port(), "conductor": free_port()}
        self.database = database
        self.sidecar = Process(
            ["cdc", "run"],
            {
                "CDC_SOURCE_DSN": database.source_dsn,
                "CDC_SLOT": database.name,
                "CDC_METRICS_HOST": "127.0.0.1",
                "CDC_METRICS_PORT": str(ports["cdc"]),
            },
            folder / "sidecar.log",
        )
        self.worker = Process(
            ["conductor", "worker", "tests.e2e.monitored:orchestrator"],
            {
                "CONDUCTOR_DSN": database.dsn,
                "CONDUCTOR_METRICS_HOST": "127.0.0.1",
                "CONDUCTOR_METRICS_PORT": str(ports["conductor"]),
                "CONDUCTOR_WAIT_CAPTURED_S": "60",
            },
            folder / "worker.log",
        )
        targets = {job: f"127.0.0.1:{port}" for job, port in ports.items()}
        self.prometheus = PrometheusServer(targets, folder)

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            for process in (self.sidecar, self.worker):
                stack.callback(process.end)
                process.start()
            stack.enter_context(self.prometheus)
            yield

    def execute(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with psycopg.connect(self.database.admin_dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def await_data(self, expr: str) -> None:
        what = f"{expr}\n{self.sidecar.log}\n{self.worker.log}"
        wait_until(lambda: bool(self.prometheus.query(expr)), START_TIMEOUT_S, what)

    def await_alerts(self, *names: str) -> None:
        wait_until(
            lambda: set(names) <= set(self.prometheus.firing()), ALERT_TIMEOUT_S, f"{names} fire"
        )
        for name in names:
            texts = self.prometheus.firing()[name]["annotations"]
            assert "error" not in texts["summary"].lower(), texts
            assert "<" not in texts["summary"] + texts["description"], texts

    def await_quiet(self, *names: str) -> None:
        wait_until(
            lambda: not set(names) & set(self.prometheus.firing()), ALERT_TIMEOUT_S, f"{names} end"
        )


@pytest.fixture
def system(start_server: StartServer, tmp_path: Path) -> Iterator[System]:
    server = start_server(
        settings={
            "max_slot_wal_keep_size": WAL_LIMIT,
            "min_wal_size": "32MB",
            "max_wal_size": "1GB",
        }
    )
    cluster = Cluster(server.dsn())
    with cluster.database() as database:
        migrate(database.dsn)
        with psycopg.connect(database.dsn) as connection:
            connection.execute(TABLE.encode())
        system = System(database, tmp_path)
        with system.running():
            yield system
    cluster.close()


def work(system: System) -> None:
    """Let something happen of every kind that a dashboard shows."""
    system.execute("insert into public.notes (text) select 'x' from generate_series(1, 20)")
    for name in ("Ann", "Nobody"):
        system.execute(
            "select conductor.invoke('greet', json_build_object('name', %s::text))", name
        )
    system.execute("""select conductor.emit('note.made', '{"name": "Ann"}', via => 'queue')""")


def headroom(system: System) -> float:
    """The part that is left of the WAL which the slot may keep."""
    ((part,),) = system.execute(
        "select safe_wal_size / (safe_wal_size + (pg_current_wal_lsn() - restart_lsn))"
        " from pg_replication_slots where slot_name = %s",
        system.database.name,
    )
    return float(str(part))


def fill_wal(system: System) -> None:
    """Write WAL, but not more than the slot may keep."""
    while headroom(system) > NEAR_LIMIT:
        system.execute("select pg_logical_emit_message(false, 'x', repeat('x', %s))", MEGABYTE)


def free_wal(system: System) -> bool:
    """Let the server forget what is acknowledged."""
    system.execute("checkpoint")
    return headroom(system) > 0.5


@pytest.mark.pg(18)
@pytest.mark.timeout(600)
def test_alerts_fire_and_end_and_dashboards_show_data(system: System) -> None:
    shows_everything_when_healthy(system)
    alerts_that_stand_still(system)
    alerts_without_a_sidecar(system)


def shows_everything_when_healthy(system: System) -> None:
    system.await_data("cdc_leader == 1")
    system.await_data('conductor_workers{queue="mail"} == 1')
    work(system)
    system.await_data("cdc_jobs_routed_total == 20")
    system.await_data('conductor_jobs_finished_total{task="greet",outcome="failed"} == 1')
    system.await_data("slot:cdc_wal_written_bytes:rate5m > 0")
    system.await_data("slot:cdc_slot_wal_headroom:ratio > 0.5")
    with suppress(TimeoutError):
        wait_until(lambda: not empty_panels(system), PANELS_TIMEOUT_S, "every panel shows data")
    assert empty_panels(system) == set()
    assert not system.prometheus.firing().keys() & {"CdcNoLeader", "ConductorNoWorkers"}


def empty_panels(system: System) -> set[str]:
    """The panels that should show something and have a query without a result now."""
    empty = {
        f"{name}: {panel['title']}"
        for name, panel in CHARTS
        for target in panel["targets"]
        if not system.prometheus.query(runnable(target["expr"]))
    }
    return empty - EMPTY_WHEN_HEALTHY


def runnable(expr: str) -> str:
    """A panel's query as Grafana would send it with everything chosen."""
    expr = re.sub(r"\$__rate_interval|\$__interval", "1m", expr)
    return re.sub(r'"\$\w+"', '".*"', expr)


def alerts_that_stand_still(system: System) -> None:
    """The worker is killed: nobody gives up its lease, nobody marks what is due ready.

    And the router cannot commit.
    """
    faults = ("ConductorNoWorkers", "ConductorQueueStale", "ConductorTargetDown", "CdcWalNearLimit")
    system.worker.end(signal.SIGKILL)
    system.execute(
        "insert into conductor.jobs (queue, task, payload, run_at, state) values"
        """ ('mail', 'greet', '{"name": "Ann"}', now() - interval '20 minutes', 'scheduled')"""
    )
    with psycopg.connect(system.database.dsn) as blocker:
        blocker.execute("select from conductor.progress for update")
        fill_wal(system)
        system.await_alerts(*faults)
    system.worker.start()
    wait_until(lambda: free_wal(system), ALERT_TIMEOUT_S, "the slot moves")
    system.await_quiet(*faults)


def alerts_without_a_sidecar(system: System) -> None:
    system.sidecar.end(signal.SIGKILL)
    system.await_alerts("CdcNoLeader", "CdcTargetDown")
    system.sidecar.start()
    system.await_quiet("CdcNoLeader", "CdcTargetDown")
