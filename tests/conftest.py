"""Which servers the integration tests run on, and the fixtures that give them out.

A test that asks for `server`, `database`, `migrated` or `start_server` runs once on each server:
PostgreSQL 15 with wal2json (Debian's packages) and the newest (`PG_BINDIR`, or embedded 18).
`@pytest.mark.pg(15)` chooses one, `@pytest.mark.wal2json` the one with the plugin. With
`CONDUCTOR_TEST_DSN` (a superuser's URI) they run once, on that server.

Where Debian's packages cannot be had, the tests on PostgreSQL 15 are deselected and the summary
says so; under `CI=true` that is an error.

The tests run in several processes (pytest-xdist), each with servers of its own; `pytest -n0` runs
them in one, as with a debugger.
"""

import getpass
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.servers import Cluster, NewDatabase, ScratchDatabase, StartServer
from tools.localpg import (
    Binaries,
    BinariesNotFound,
    PostgresServer,
    find_binaries,
    find_wal2json_binaries,
)

WAL2JSON_VERSION = 15
EMBEDDED_VERSION = 18
GIVEN_DSN = os.environ.get("CONDUCTOR_TEST_DSN", "")
IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}

PROCESSES = 3  # whose tests mostly wait: for timers, start-ups and dead processes
LONG = ("tests/e2e/", "tests/deploy/test_alerts.py", "tests/deploy/test_image.py")
"""Tests that take long or much of the machine: first, so that none is begun when all else is
done, and in one process, so that they are not at work at the same time."""

not_run = pytest.StashKey[dict[str, int]]()


def pytest_xdist_auto_num_workers() -> int:
    """How many processes run tests: one on a server that is given, for its slots are counted."""
    return 0 if GIVEN_DSN else PROCESSES


@cache
def newest_version() -> int:
    """The version beside 15: of `PG_BINDIR` when that is set, else the embedded one."""
    return find_binaries().version if os.environ.get("PG_BINDIR") else EMBEDDED_VERSION


@cache
def binaries_of(version: int) -> Binaries:
    """The binaries that tests use for a version."""
    return find_wal2json_binaries() if version == WAL2JSON_VERSION else find_binaries(version)


@cache
def given_version() -> int:
    """The major version of the server of `CONDUCTOR_TEST_DSN`."""
    with psycopg.connect(GIVEN_DSN) as connection:
        return connection.info.server_version // 10000


@cache
def given_has_wal2json() -> bool:
    """Whether the server of `CONDUCTOR_TEST_DSN` can decode with wal2json."""
    with psycopg.connect(GIVEN_DSN, autocommit=True) as connection:
        try:
            connection.execute(
                "select pg_create_logical_replication_slot('conductor_probe', 'wal2json', true)"
            )
        except psycopg.Error:
            return False
    return True


def versions_for(wanted: set[int]) -> list[int]:
    """The versions to run a test on, given those its markers ask for."""
    if GIVEN_DSN:
        return [given_version()]
    return sorted(wanted or {WAL2JSON_VERSION, newest_version()})


def why_not(version: int, *, wanted: set[int], wal2json: bool) -> str | None:
    """Why a test cannot run on a version here; None when it can."""
    if GIVEN_DSN:
        if wal2json and not given_has_wal2json():
            return "the server of CONDUCTOR_TEST_DSN has no wal2json"
        mismatch = wanted and version not in wanted
        return "the server of CONDUCTOR_TEST_DSN has another version" if mismatch else None
    try:
        binaries_of(version)
    except BinariesNotFound as error:
        return str(error)
    return None


def wanted_by(markers: Iterator[pytest.Mark]) -> tuple[set[int], bool]:
    """What the markers `pg` and `wal2json` ask for."""
    wanted: set[int] = set()
    wal2json = False
    for marker in markers:
        if marker.name == "pg":
            wanted |= set(marker.args)
        wal2json = wal2json or marker.name == "wal2json"
    return ({WAL2JSON_VERSION} if wal2json and not GIVEN_DSN else wanted), wal2json


def version_of(item: pytest.Item) -> int | None:
    """The server version that this run of a test is for."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return None
    version = item.callspec.params.get("pg_version")
    return version if isinstance(version, int) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for each server version."""
    if "pg_version" in metafunc.fixturenames:
        wanted, _ = wanted_by(metafunc.definition.iter_markers())
        versions = versions_for(wanted)
        metafunc.parametrize("pg_version", versions, ids=[f"pg{v}" for v in versions])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here, and remember why; begin with what takes long."""
    reasons: dict[str, int] = {}
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        version = version_of(item)
        wanted, wal2json = wanted_by(item.iter_markers())
        reason = why_not(version, wanted=wanted, wal2json=wal2json) if version else None
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
        (kept if reason is None else dropped).append(item)
    if dropped and IN_CI:
        raise pytest.UsageError(f"{len(dropped)} tests cannot run: {'; '.join(reasons)}")
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))  # at random within each half
    config.stash[not_run] = reasons


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what was not run to the process that prints the summary."""
    output: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["not_run"] = session.config.stash.get(not_run, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take it over: every process has collected the same tests."""
    node.config.stash[not_run] = getattr(node, "workeroutput", {}).get("not_run", {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say in one line a reason what was not run."""
    for reason, count in config.stash.get(not_run, {}).items():
        terminalreporter.write_line(f"NOT RUN: {count} tests: {reason}", yellow=True)


def pytest_unconfigure() -> None:
    """Remove pytest's own folder of temporary folders too, unless another run uses it."""
    with suppress(OSError):
        Path(tempfile.gettempdir(), f"pytest-of-{getpass.getuser()}").rmdir()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests and fixtures run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def cluster_of() -> Iterator[Callable[[int], Cluster]]:
    """Start each version's server when it is first asked for; stop them all at the end."""
    with ExitStack() as stack:

        @cache
        def start(version: int) -> Cluster:
            if GIVEN_DSN:
                dsn = GIVEN_DSN
            else:
                server = PostgresServer(binaries_of(version), durable=False)
                dsn = stack.enter_context(server).dsn()
            cluster = Cluster(dsn)
            stack.callback(cluster.close)
            return cluster

        yield start


@pytest.fixture
def server(pg_version: int, cluster_of: Callable[[int], Cluster]) -> Cluster:
    """The shared server of this version: for databases of one's own, never to be restarted."""
    return cluster_of(pg_version)


@pytest.fixture
def new_database(server: Cluster) -> Iterator[NewDatabase]:
    """A function that creates a database: `new_database(migrated=True)`."""
    with ExitStack() as stack:

        def create(*, migrated: bool = False) -> ScratchDatabase:
            return stack.enter_context(server.database(migrated=migrated))

        yield create


@pytest.fixture
def database(new_database: NewDatabase) -> ScratchDatabase:
    """An empty database of this test alone."""
    return new_database()


@pytest.fixture
def migrated(new_database: NewDatabase) -> ScratchDatabase:
    """A database of this test alone, with the schema `conductor`."""
    return new_database(migrated=True)


@pytest.fixture
def start_server(pg_version: int) -> Iterator[StartServer]:
    """A function that starts a server of this test alone, which it may restart or kill."""
    binaries = binaries_of(newest_version() if GIVEN_DSN else pg_version)
    with ExitStack() as stack:

        def start(
            *, settings: Mapping[str, str] | None = None, durable: bool = False
        ) -> PostgresServer:
            return stack.enter_context(PostgresServer(binaries, settings=settings, durable=durable))

        yield start
