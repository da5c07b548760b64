"""What both programs log of data that somebody put a secret into: JSON, listed names, no secret."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc.logs import EVENTS as CDC_EVENTS
from conductor.logs import EVENTS
from tests.e2e.programs import running
from tests.servers import ScratchDatabase, wait_until

PROJECT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0
SECRET = "4111-1111-1111-1111"
NAMES = {*CDC_EVENTS, *(event.name for event in EVENTS)}

APPLICATION = """
import os
from pydantic import BaseModel
from conductor import (
    Conductor, Insert, NonRetryable, OnChange, OnEvent, Orchestrator, TableRow, define_event,
    define_task,
)

class Card(TableRow, table="public.cards"):
    id: int
    number: str

class Number(BaseModel):
    number: str

pay = define_task("pay", payload=Number, returns=int)
paid = define_event("paid", payload=Number)
conductor = Conductor(os.environ["CONDUCTOR_DSN"], tasks=[pay], events=[paid])

@conductor.task("see", OnChange(Card, "insert", when="int(new.number) > 0"))
async def see(event, ctx):
    raise NonRetryable(event.new.number)

@conductor.task(pay, max_attempts=1)
async def paying(event, ctx):
    match event.payload.number[-1]:
        case "s":
            await ctx.step("charge", lambda: event.payload.number)
            await ctx.step("charge again", lambda: {event.payload})
        case "r":
            return event.payload.number
        case "t":
            await ctx.transaction("keep", lambda db: db.execute(
                "insert into cards values (1, %s), (1, %s)", [event.payload.number] * 2),
                returns=None)
        case _:
            raise ValueError(event.payload.number)

@conductor.task("thank", OnEvent(paid, when="int(event.number) > 0"))
async def thank(event, ctx):
    pass

orchestrator = Orchestrator(conductor)
"""


def execute(database: ScratchDatabase, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def logs(migrated: ScratchDatabase, tmp_path: Path) -> list[dict[str, Any]]:
    """What both have logged while all kinds of things failed."""
    (tmp_path / "cards_app.py").write_text(APPLICATION)
    with psycopg.connect(migrated.dsn, autocommit=True) as connection:
        connection.execute("create table cards (id int primary key, number text)")
    sidecar = {
        "CDC_SOURCE_DSN": migrated.source_dsn,
        "CDC_SLOT": migrated.name,
        "CDC_METRICS_PORT": "0",
        "CDC_LOG_LEVEL": "debug",
    }
    worker = {
        "CONDUCTOR_DSN": migrated.dsn,
        "CONDUCTOR_LOG_LEVEL": "debug",
        "CONDUCTOR_WAIT_CAPTURED_S": "30",
        "PYTHONPATH": f"{tmp_path}:{PROJECT}",
    }
    files = [tmp_path / "sidecar.log", tmp_path / "worker.log"]
    with ExitStack() as stack:
        stack.enter_context(running(["cdc", "run"], sidecar, files[0]))
        stack.enter_context(running(["conductor", "worker", "cards_app"], worker, files[1]))
        wait_until(lambda: "started" in files[1].read_text(), TIMEOUT_S, "the worker works")
        fail_in_every_way(migrated)
        wait_until(lambda: is_over(migrated), TIMEOUT_S, "all of it has failed")
        execute(
            migrated,
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = %s and pid <> pg_backend_pid()",
            migrated.name,
        )
        wait_until(lambda: "connection_lost" in files[1].read_text(), TIMEOUT_S, "it is noticed")
        wait_until(lambda: "session_ended" in files[0].read_text(), TIMEOUT_S, "it is noticed")
    text = "".join(file.read_text() for file in files)
    assert SECRET not in text
    return [json.loads(line) for line in text.splitlines()]


def fail_in_every_way(database: ScratchDatabase) -> None:
    execute(database, "insert into cards values (1, %s), (2, '7')", SECRET)
    for last in "xsrt":
        payload = json.dumps({"number": SECRET + last})
        execute(database, "select conductor.invoke('pay', payload => %s)", payload)
    execute(
        database, "select conductor.invoke('pay', payload => %s)", json.dumps({"other": SECRET})
    )
    execute(
        database,
        "select conductor.emit('paid', %s, via => 'queue')",
        json.dumps({"number": SECRET}),
    )
    execute(
        database,
        "insert into conductor.jobs (queue, task, trigger, payload)"
        " values ('conductor.internal', 'conductor.dispatch', 'event', %s)",
        json.dumps(SECRET),
    )


def is_over(database: ScratchDatabase) -> bool:
    ((failed, letters),) = execute(
        database,
        "select (select count(*) from conductor.history where outcome = 'failed'),"
        " (select count(*) from conductor.dead_letters)",
    )
    return (failed, letters) == (8, 1)


def is_ours(line: dict[str, Any]) -> bool:
    """Not a library's, whose sentences are its own: the pool's about a lost connection."""
    return line.get("logger", "cdc").partition(".")[0] in {"cdc", "conductor"}


def test_every_line_has_a_listed_name_and_none_the_secret(logs: list[dict[str, Any]]) -> None:
    names = {line["event"] for line in logs if is_ours(line)}
    assert names - NAMES == set()
    assert names >= {"leading", "started", "events_unreadable", "event_filters_failed"}
    assert all(line["timestamp"].endswith("Z") and line["level"] for line in logs)
