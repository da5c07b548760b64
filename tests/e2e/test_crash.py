"""Exactly once, whatever dies: the sidecar, each of its connections, the server.

Traffic runs through the shop all the time. In the end the oracle compares, by query, what was
committed with what is in the queue and what was handled.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psycopg
import pytest

from conductor.migrations import migrate
from examples.shop.installation import Installation, create_database
from examples.shop.oracle import create_shop, judge_database
from examples.shop.traffic import Plan, Traffic
from tests.servers import StartServer
from tools.localpg.server import PostgresServer, StopMode

KILLS = 30
LONGEST_LIFE_S = 2.2
RECOVERY_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 60.0
PLAN = Plan(seconds=120, transactions_per_s=60, loads=40, load_rows=2_000)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while not await condition():
        assert time.monotonic() < deadline, f"{what}: not within {RECOVERY_TIMEOUT_S:.0f} s"
        await asyncio.sleep(0.05)


async def sidecar_backends(connection: psycopg.AsyncConnection) -> dict[str, int]:
    """The sidecar's connections by name: the walsender, the sink and those for control."""
    cursor = await connection.execute(
        "select application_name, backend_type, pid from pg_stat_activity"
        " where application_name like 'cdc%' order by pid"
    )
    backends: dict[str, int] = {}
    for name, kind, pid in await cursor.fetchall():
        alike = sum(label.startswith(f"{name} ({kind})") for label in backends)
        backends[f"{name} ({kind}) {alike + 1}"] = pid
    return backends


async def kill_at_random_moments(installation: Installation, rng: random.Random) -> None:
    """From while it starts to long after it has: each life of the sidecar ends elsewhere."""
    killed: set[int] = set()

    async def is_alive() -> bool:
        return installation.sidecar.pid not in {None, *killed}

    while len(killed) < KILLS:
        await until(is_alive, "the supervisor starts the sidecar again")
        await asyncio.sleep(rng.uniform(0.0, LONGEST_LIFE_S))
        if (pid := installation.sidecar.pid) is not None:
            installation.sidecar.kill()
            killed.add(pid)


async def terminate_each_connection(admin_dsn: str) -> set[str]:
    """End each of the sidecar's sessions in turn, and wait until the sidecar is back."""
    ended: set[str] = set()
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as connection:

        async def is_streaming() -> bool:
            names = " ".join(await sidecar_backends(connection))
            return "walsender" in names and "sink" in names

        await until(is_streaming, "the sidecar streams")
        for name in await sidecar_backends(connection):
            await until(is_streaming, f"the sidecar streams again after {ended}")
            pid = (await sidecar_backends(connection)).get(name)
            if pid is not None:
                await connection.execute("select pg_terminate_backend(%s)", [pid])
                ended.add(name)
                await asyncio.sleep(0.3)  # let it work on without this one
        await until(is_streaming, f"the sidecar streams again after {ended}")
    return ended


async def crash_everything(
    server: PostgresServer, installation: Installation, rng: random.Random
) -> None:
    await kill_at_random_moments(installation, rng)
    ended = await terminate_each_connection(server.dsn("shop"))
    assert len(ended) >= 4  # the walsender, the sink, and control of source and queue
    await asyncio.to_thread(server.restart, StopMode.IMMEDIATE)
    await terminate_each_connection(server.dsn("shop"))  # it is back, and must come back once more


@pytest.mark.pg(18)
@pytest.mark.timeout(600)
def test_nothing_is_lost_or_doubled_by_crashes(start_server: StartServer, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    server = start_server(durable=True)
    create_database(server.dsn())
    dsn = server.dsn("shop", "shop")
    migrate(dsn)
    create_shop(dsn)
    installation = Installation(dsn, tmp_path, workers=1, restart_delay_s=0.1)
    traffic = Traffic(dsn, PLAN)

    async def scenario() -> None:
        async with installation:
            await installation.wait_captured()
            async with asyncio.TaskGroup() as group:
                group.create_task(traffic.run())
                await crash_everything(server, installation, random.Random(seed))
                traffic.stop()
            await installation.drain(DRAIN_TIMEOUT_S)

    asyncio.run(scenario())
    verdict = judge_database(dsn)
    assert verdict.faults == 0, f"seed {seed}: {verdict}"
    assert verdict.changes > 1_000
    assert traffic.totals.interrupted > 0  # the restart hit the application as well
