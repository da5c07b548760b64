"""Who waits for a connection through an outage is served when that is over, however long it was."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import pytest

from conductor import connections, transactions
from conductor.connections import Connections
from conductor.store.steps import StepWrite
from conductor.transactions import Transactions
from tests.integration.conftest import eventually
from tests.servers import StartServer
from tools.localpg import PostgresServer
from tools.localpg.server import StopMode

pytestmark = [pytest.mark.anyio, pytest.mark.pg(18)]


class ServedError(Exception):
    """There was a connection."""


@pytest.fixture
def server(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> PostgresServer:
    """A server, and pools that give up connecting to it soon while their users still wait."""
    for module, wait in ((connections, "WAIT_S"), (transactions, "_WAIT_S")):
        monkeypatch.setattr(module, "RECONNECT_S", 0.2)
        monkeypatch.setattr(module, wait, 100.0)
    return start_server()


async def through_an_outage(
    server: PostgresServer, caplog: pytest.LogCaptureFixture, asking: Any
) -> None:
    """Stop the server, ask for a connection, and start it when the pool has given up."""
    await asyncio.to_thread(server.stop, StopMode.IMMEDIATE)
    waiting = asyncio.create_task(asking())

    async def has_given_up() -> bool:
        return "reconnection attempt in pool" in caplog.text

    await eventually(has_given_up)
    assert not waiting.done()
    await asyncio.to_thread(server.start)
    with pytest.raises(ServedError):
        await asyncio.wait_for(waiting, 60)


async def test_a_client(server: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
    pool = Connections(server.dsn(), 2, "test")

    async def ask() -> NoReturn:
        async with pool.lend() as connection:
            await connection.execute("select 1")
        raise ServedError

    with pytest.raises(ServedError):
        await ask()
    await through_an_outage(server, caplog, ask)
    await pool.close()


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_handlers_transaction(
    server: PostgresServer, caplog: pytest.LogCaptureFixture, *, in_thread: bool
) -> None:
    pool = Transactions(server.dsn(), 1, lambda: 1, dead_after_s=8.0)
    step = StepWrite(1, 1, "book", 0, "transaction")

    async def work(_connection: Any) -> bytes:
        raise ServedError

    def work_blocking(_connection: Any) -> bytes:
        raise ServedError

    async def ask() -> None:
        if in_thread:
            await asyncio.to_thread(pool.run_blocking, step, work_blocking)
        else:
            await pool.run(step, work)

    await through_an_outage(server, caplog, ask)
    await pool.close()
