"""A pooler before the queue database: refused where it lends our backends to others."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from cdc import connection, pooling
from cdc.connection import connect_queue
from cdc.errors import ConfigError, QueueUnavailable
from cdc.metrics import Metrics
from cdc.pooling import find_shared_backend
from cdc.service import Service
from conductor.migrations import migrate
from tests.integration.sidecar import (
    captured,
    cdc,
    query,
    routed,
    running,
    settings_for,
    slot_row,
    subscribe,
)
from tests.servers import ScratchDatabase, StartServer, dsn_for, wait_until
from tools.debs import PackagesUnavailable
from tools.localpg import PostgresServer
from tools.localpg.account import server_account
from tools.pgbouncer import PgBouncer, find_pgbouncer
from tools.supervision import dies_with_us, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.pg(18)]

CONFIGURATION = """
[databases]
* = host={folder} port={port} user=postgres
[pgbouncer]
unix_socket_dir = {folder}
listen_port = {own_port}
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
query_wait_timeout = 60
"""


@pytest.fixture(scope="module")
def pgbouncer() -> PgBouncer:
    try:
        return find_pgbouncer()
    except PackagesUnavailable as error:
        pytest.fail(str(error))


def listens(path: Path) -> bool:
    """Whether somebody takes connections: the file is there a moment earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def pooler(
    pgbouncer: PgBouncer, server: PostgresServer, mode: str, size: int = 20
) -> Iterator[str]:
    """A pooler before a server; its connection string. Runs as the server does: not as root."""
    account, port = server_account(), free_port()
    folder = server.home / f"pgbouncer-{mode}"
    folder.mkdir(mode=0o755)
    program = shutil.copy(pgbouncer.program, folder)
    libraries = folder / "lib"
    if pgbouncer.libraries is not None:
        shutil.copytree(pgbouncer.libraries, libraries, symlinks=True)
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        CONFIGURATION.format(
            folder=server.socket_folder, port=server.port, own_port=port, mode=mode, size=size
        )
    )
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*dies_with_us(), program, configuration],
            cwd="/",
            env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(libraries)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **account.identity,
        )
    try:
        path = server.socket_folder / f".s.PGSQL.{port}"
        wait_until(lambda: listens(path) or process.poll() is not None, 60, "the pooler's socket")
        assert process.poll() is None, (folder / "log").read_text()
        yield dsn_for(server.dsn(), port=str(port))
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def server(start_server: StartServer) -> PostgresServer:
    server = start_server()
    migrate(server.dsn())
    query(server.dsn(), "create table t (id int primary key)")
    subscribe(server.dsn(), "public.t", ["insert"])
    return server


def shop_of(server: PostgresServer) -> ScratchDatabase:
    return ScratchDatabase("pooled", server.dsn(), server.dsn(), server.dsn())


async def test_a_pooler_in_transaction_mode_is_refused(
    pgbouncer: PgBouncer, server: PostgresServer
) -> None:
    shop = shop_of(server)
    with pooler(pgbouncer, server, "transaction") as dsn:
        settings = settings_for(shop, queue_dsn=dsn)
        with pytest.raises(ConfigError, match="transaction mode") as caught:
            await Service(settings, Metrics("test", settings.slot)).run()
        assert caught.value.exit_code == 78
        done = await asyncio.to_thread(cdc, shop, "check", CDC_QUEUE_DSN=dsn)
        assert (done.returncode, "transaction mode" in done.stdout) == (78, True)
        with psycopg.connect(dsn) as stranger:  # nothing of ours was left behind
            found = stranger.execute("show synchronous_commit").fetchone()
    assert found == ("on",)
    assert slot_row(shop) is None


async def test_a_pooler_in_session_mode_is_used(
    pgbouncer: PgBouncer, server: PostgresServer
) -> None:
    shop = shop_of(server)
    with pooler(pgbouncer, server, "session") as dsn:
        async with running(shop, queue_dsn=dsn):
            await captured(shop, 1)
            query(shop.dsn, "insert into t values (1)")
            await routed(shop, 1)


@pytest.mark.parametrize(("size", "held"), [(1, 0), (2, 0), (2, 1)])
async def test_a_small_or_busy_pool_is_seen_through(
    pgbouncer: PgBouncer, server: PostgresServer, size: int, held: int
) -> None:
    with ExitStack() as stack:
        dsn = stack.enter_context(pooler(pgbouncer, server, "transaction", size))
        for _ in range(held):
            stack.enter_context(psycopg.connect(dsn)).execute("select 1")
        one = await connect_queue(dsn, application_name="one")
        other = await connect_queue(dsn, application_name="other")
        try:
            assert isinstance(await find_shared_backend(one, other), ConfigError)
        finally:
            await one.close()
            await other.close()


async def test_a_session_pool_without_room_is_a_matter_of_time(
    pgbouncer: PgBouncer, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pooler(pgbouncer, server, "session", 1) as dsn:
        one = await connect_queue(dsn, application_name="one")
        other = await psycopg.AsyncConnection[dict[str, Any]].connect(
            dsn, autocommit=True, row_factory=dict_row
        )
        monkeypatch.setattr(connection, "_ANSWER_S", 1.0)
        monkeypatch.setattr(pooling, "_WAIT_S", 1.0)
        try:
            with pytest.raises(QueueUnavailable, match="no connection to spare"):
                await connect_queue(dsn, application_name="third")
            with pytest.raises(QueueUnavailable, match="no connection to spare"):
                await find_shared_backend(one, other)
        finally:
            await one.close()
            await other.close()
