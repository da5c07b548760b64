"""What the tests of the sidecar share: settings, subscriptions, a service beside the test."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from cdc.config import Settings
from cdc.metrics import Metrics
from cdc.service import Service
from conductor.migrations import migrate
from tests.servers import POLL_INTERVAL_S, ScratchDatabase, longer
from tools.localpg.server import PostgresServer

TIMEOUT_S = 60.0  # only a failure takes as long
OPERATIONS = ("insert", "update", "delete", "truncate")


def settings_for(database: ScratchDatabase, **changes: Any) -> Settings:
    """Settings of a sidecar on one database, with a slot of its own."""
    values: dict[str, Any] = {
        "source_dsn": database.source_dsn,
        "slot": database.name,
        "metrics_port": -1,
        "status_interval_s": 0.2,
        **changes,
    }
    return Settings(**values)


def query(dsn: str, statement: str, *parameters: Any) -> list[dict[str, Any]]:
    """Run a statement in its own transaction; return its rows."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def value(dsn: str, statement: str, *parameters: Any) -> Any:
    """Run a statement; return the first column of its first row, or None."""
    rows = query(dsn, statement, *parameters)
    return next(iter(rows[0].values())) if rows else None


def subscribe(
    dsn: str,
    table: str,
    operations: Iterable[str] = OPERATIONS,
    *,
    task: str = "seen",
    **definition: Any,
) -> int:
    """Store a subscription as registration does; return its id."""
    schema, name = table.split(".")
    definition = {"schema": schema, "table": name, "operations": list(operations), **definition}
    subscription = value(
        dsn,
        "insert into conductor.subscriptions (app, task, trigger, kind, queue, definition)"
        " values ('test', %s, %s, 'change', 'default', %s) returning id",
        task,
        f"change:{table}",
        json.dumps(definition),
    )
    query(dsn, "select pg_notify('conductor_subscriptions', '')")
    return int(subscription)


def ascii_shop(server: PostgresServer) -> ScratchDatabase:
    """A captured table `t` in a database that also holds what the server cannot decode."""
    query(
        server.dsn(),
        "create database ascii encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0",
    )
    dsn = server.dsn("ascii") + "&client_encoding=utf8"
    migrate(dsn)
    query(dsn, "create table t (id int primary key, body text)")
    subscribe(dsn, "public.t", ["insert"])
    return ScratchDatabase("ascii", dsn, dsn, dsn)


def stamps(database: ScratchDatabase, subscription: int) -> tuple[str | None, str | None]:
    """Start and end stamp of a subscription."""
    rows = query(
        database.dsn,
        "select start_lsn::text, end_lsn::text from conductor.activations"
        " where subscription = %s and slot = %s",
        subscription,
        database.name,
    )
    return (rows[0]["start_lsn"], rows[0]["end_lsn"]) if rows else (None, None)


def jobs(database: ScratchDatabase) -> list[dict[str, Any]]:
    """The payloads of all jobs, in the order in which they were routed."""
    return [
        row["payload"]
        for row in query(database.dsn, "select payload from conductor.jobs order by id")
    ]


def published(database: ScratchDatabase, publication: str = "conductor") -> set[str]:
    """The tables of a publication."""
    rows = query(
        database.dsn,
        "select schemaname || '.' || tablename as name from pg_publication_tables"
        " where pubname = %s",
        publication,
    )
    return {row["name"] for row in rows}


def slot_row(database: ScratchDatabase) -> dict[str, Any] | None:
    """The slot as the server sees it."""
    rows = query(
        database.dsn, "select * from pg_replication_slots where slot_name = %s", database.name
    )
    return rows[0] if rows else None


def drop_slot(database: ScratchDatabase) -> None:
    """Drop the slot of a sidecar that has stopped."""
    query(database.admin_dsn, "select pg_drop_replication_slot(%s)", database.name)


def terminate(database: ScratchDatabase, application: str) -> int:
    """Terminate the sidecar's backends whose application_name is this; return how many."""
    rows = query(
        database.admin_dsn,
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = %s and application_name = %s",
        database.name,
        application,
    )
    return len(rows)


async def eventually(
    condition: Callable[[], Any] | Callable[[], Awaitable[Any]],
    what: str,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """Wait until the condition gives something true; return that."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    pause_s = POLL_INTERVAL_S
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return result
        if asyncio.get_running_loop().time() > deadline_s:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        await asyncio.sleep(pause_s)
        pause_s = longer(pause_s)


@asynccontextmanager
async def running(
    database: ScratchDatabase, *, metrics: Metrics | None = None, **changes: Any
) -> AsyncIterator[tuple[Service, asyncio.Task[None]]]:
    """A service that runs until the end of the block; an error of its own is raised there."""
    settings = settings_for(database, **changes)
    service = Service(settings, metrics or Metrics("test", settings.slot))
    task = asyncio.create_task(service.run())
    try:
        yield service, task
    finally:
        service.stop()
        await task


async def captured(database: ScratchDatabase, subscription: int) -> None:
    """Wait until a subscription routes."""
    await eventually(lambda: stamps(database, subscription)[0], f"start of {subscription}")


async def routed(database: ScratchDatabase, count: int) -> list[dict[str, Any]]:
    """Wait until there are that many jobs; return their payloads."""
    await eventually(lambda: len(jobs(database)) >= count, f"{count} jobs")
    found = jobs(database)
    assert len(found) == count
    return found


def environment(database: ScratchDatabase, **changes: str) -> dict[str, str]:
    """The environment of a `cdc` process: nothing of ours but the settings."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return {
        **kept,
        "CDC_SOURCE_DSN": database.source_dsn,
        "CDC_SLOT": database.name,
        "CDC_METRICS_PORT": "-1",
        **changes,
    }


def cdc(
    database: ScratchDatabase, *arguments: str, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cdc", *arguments],
        env=environment(database, **changes),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def identifier(name: str) -> str:
    """A name as SQL text."""
    return sql.Identifier(name).as_string()
