"""The runner of local servers, on real ones."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.servers import Cluster, NewDatabase, ScratchDatabase, StartServer, wait_until
from tools.localpg import PostgresServer, ServerFailed
from tools.localpg.binaries import embedded_binaries
from tools.localpg.server import StopMode

CREATE_SLOT = "select slot_name from pg_create_logical_replication_slot(%s, %s)"

# Starts a server, prints its pid and home, then dies as kill -9 does, without any clean-up.
KILLED_PARENT = """
import os, pickle, signal, sys
from tools.localpg import PostgresServer

binaries = pickle.loads(bytes.fromhex(sys.argv[1]))
server = PostgresServer(binaries, durable=False).__enter__()
print(server.pid, server.home, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def scalar(dsn: str, statement: str, *parameters: object) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(statement.encode(), parameters).fetchone()
        return row and row[0]


def test_server_decodes_logically_and_keeps_data_over_restarts(start_server: StartServer) -> None:
    server = start_server(settings={"work_mem": "8MB"})
    assert scalar(server.dsn(), "show wal_level") == "logical"
    assert scalar(server.dsn(), "show work_mem") == "8MB"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create table kept (id int)")
    port = server.port
    for mode in (StopMode.FAST, StopMode.IMMEDIATE, StopMode.KILL):
        before = server.pid
        server.restart(mode)
        assert server.pid != before
        assert server.port == port
        assert scalar(server.dsn(), "select count(*) from kept") == 0


def test_tcp_asks_for_a_password(start_server: StartServer) -> None:
    server = start_server()
    assert scalar(server.tcp_dsn(), "select 1") == 1
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(server.tcp_dsn(password="wrong"))


def test_everything_is_private_and_removed(start_server: StartServer) -> None:
    server = start_server()
    assert server.socket_folder.stat().st_mode & 0o077 == 0
    assert server.data.stat().st_mode & 0o077 == 0
    assert not (server.home / "password").exists()
    home = server.home
    server.__exit__(None, None, None)
    assert not home.exists()
    assert server.pid is None


def test_a_failed_start_says_why_and_leaves_nothing(start_server: StartServer) -> None:
    with pytest.raises(ServerFailed, match="unrecognized configuration parameter") as caught:
        start_server(settings={"no_such_setting": "1"})
    assert "did not start" in str(caught.value)


def test_a_running_server_is_not_started_twice(start_server: StartServer) -> None:
    server = start_server()
    with pytest.raises(ServerFailed, match="running already"):
        server.start()


def test_no_orphan_after_the_parent_is_killed(start_server: StartServer) -> None:
    binaries = pickle.dumps(start_server().binaries)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_PARENT, binaries.hex()],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, home = done.stdout.split()
    wait_until(lambda: not Path(home).exists(), 60, "removing the folder")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 60, "stopping the server")


def test_binaries_that_only_their_owner_can_read(tmp_path: Path) -> None:
    embedded = embedded_binaries()
    assert embedded is not None
    prefix = tmp_path / "private"
    for folder in embedded.folders:
        shutil.copytree(embedded.prefix / folder, prefix / folder, symlinks=True)
    bindir = prefix / embedded.bindir.relative_to(embedded.prefix)
    for path in (prefix, bindir, bindir.parent / "lib", bindir / "postgres"):
        path.chmod(0o700)
    private = replace(embedded, bindir=bindir, prefix=prefix)
    with PostgresServer(private, durable=False) as server:
        assert scalar(server.dsn(), "select 1") == 1
    for path in (prefix, bindir / "postgres"):
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.wal2json
def test_wal2json_decodes(database: ScratchDatabase) -> None:
    assert scalar(database.source_dsn, CREATE_SLOT, "with_wal2json", "wal2json") == "with_wal2json"


def test_scratch_database_roles_are_ordinary(database: ScratchDatabase) -> None:
    statement = (
        "select rolsuper or rolcreaterole or rolcreatedb from pg_roles where rolname = current_user"
    )
    for dsn in (database.dsn, database.source_dsn):
        assert scalar(dsn, statement) is False
        assert scalar(dsn, "select current_database()") == database.name
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("create table published (id int primary key)")
    with psycopg.connect(database.source_dsn, autocommit=True) as connection:
        connection.execute("create publication by_sidecar for table published")
    assert scalar(database.admin_dsn, "show is_superuser") == "on"


def test_dropping_a_database_drops_its_active_slots(server: Cluster) -> None:
    with server.database() as database:
        assert scalar(database.source_dsn, CREATE_SLOT, "left_over", "pgoutput") == "left_over"
        parameters = conninfo_to_dict(database.source_dsn, replication="database")
        with psycopg.connect(**parameters, autocommit=True) as idle:  # type: ignore[arg-type]  # str values
            assert idle.info.backend_pid
    for left in ("pg_database where datname = %s", "pg_replication_slots where database = %s"):
        assert scalar(server.admin_dsn, f"select count(*) from {left}", database.name) == 0


def test_a_server_object_outside_its_context_is_not_running(start_server: StartServer) -> None:
    server = PostgresServer(start_server().binaries)
    assert server.pid is None
    server.stop()
    assert os.fspath(server.home) == "."


def test_migrated_databases_are_separate_and_owned_by_the_application(
    new_database: NewDatabase,
) -> None:
    first, second = new_database(migrated=True), new_database(migrated=True)
    owner = "select nspowner::regrole::text = current_user from pg_namespace where nspname = %s"
    for migrated in (first, second):
        assert scalar(migrated.dsn, owner, "conductor") is True
    with psycopg.connect(first.dsn, autocommit=True) as connection:
        connection.execute("create table public.own (id int)")
    assert scalar(second.dsn, "select to_regclass('public.own')::text") is None
