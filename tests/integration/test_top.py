"""`conductor top`: what it shows, that it asks little, and how it behaves without a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from rich.console import Console

from conductor.cli.screen import Leases, draw
from conductor.sql import load
from conductor.store.overview import COUNTED_AT_MOST, SHOWN_AT_MOST, read_overview
from conductor.store.sessions import connect
from tests.integration.conftest import Queue, eventually
from tests.integration.sidecar import drop_slot, running, subscribe
from tests.servers import ScratchDatabase, dsn_for, wait_until

pytestmark = pytest.mark.anyio

PROJECT = Path(__file__).resolve().parents[2]
QUERIES = load("overview")
VALUES = {
    **dict.fromkeys(("tasks", "queues", "workers", "slots"), SHOWN_AT_MOST),
    "bound": COUNTED_AT_MOST,
    "timeout_s": 5,
}
STOCK = """
insert into conductor.queues (name, paused) values ('mail', false), ('calm', true);
insert into conductor.tasks (app, name, queue, max_attempts, retention)
values ('shop', 'send', 'mail', 5, '1 day'), ('shop', 'sort', 'mail', 5, '1 day'),
    ('shop', 'rest', 'calm', 5, '1 day');
insert into conductor.workers (app, version, queue, tasks, host, pid, slots)
values ('shop', '2', 'mail', '{send,sort}', 'node-a', 71, 10);
insert into conductor.jobs (queue, task, payload, state, rank, attempt, run_at, worker)
values ('mail', 'send', '{}', 'ready', 0, 0, now() - interval '20 minutes', null),
    ('mail', 'send', '{}', 'ready', -5, 0, now() - interval '1 minute', null),
    ('mail', 'send', '{}', 'running', 0, 0, now(), 1),
    ('mail', 'send', '{}', 'suspect', 0, 0, now(), null),
    ('mail', 'sort', '{}', 'scheduled', 0, 2, now() + interval '1 hour', null),
    ('mail', 'sort', '{}', 'scheduled', 0, 0, now() + interval '1 hour', null),
    ('mail', 'sort', '{}', 'waiting', 0, 0, 'infinity', null),
    ('mail', 'gone', '{}', 'running', 0, 0, now(), 1);
insert into conductor.jobs (queue, task, key, ordered, payload, state)
values ('mail', 'sort', 'k', true, '{}', 'parked');
insert into conductor.history (id, run_at, created_at, finished_at, expires_on, fence, rank,
    attempt, crashes, outcome, trigger, queue, task, payload)
select 900 + n, now(), now(), now() - n * interval '25 seconds', current_date + 7, 1, 0, 1, 0,
    case when n = 3 then 'completed' else 'failed' end::conductor.job_outcome, 'invoke', 'mail',
    'send', '{}'
from generate_series(0, 3) n;
insert into conductor.progress (slot, database, leader, routed_lsn, acknowledged_lsn)
values ('orders', 'elsewhere', 'node-b:9', '0/20', '0/10');
insert into conductor.gaps (slot, condition, policy) values ('orders', 'slot_lost', 'stop');
"""


@pytest.fixture
async def connection(queue: Queue) -> AsyncIterator[AsyncConnection[Any]]:
    connection = await connect(queue.database.dsn, "top")
    yield connection
    await connection.close()


@pytest.fixture
async def stocked(connection: AsyncConnection[Any]) -> AsyncConnection[Any]:
    await connection.execute(STOCK.encode())
    return connection


def by(rows: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {row[name]: row for row in rows}


async def test_everything_is_counted(stocked: AsyncConnection[Any]) -> None:
    overview = await read_overview(stocked)
    tasks, queues = by(overview["tasks"], "task"), by(overview["queues"], "queue")
    send, sort, gone = tasks["send"], tasks["sort"], tasks["gone"]
    assert (send["ready"], send["running"], send["suspect"]) == (2, 1, 1)
    assert send["failed_per_minute"] == 3
    assert 1200 <= send["oldest_ready_s"] < 1300
    counts = [sort[name] for name in ("retrying", "scheduled", "waiting", "parked")]
    assert counts == [1, 1, 1, 1]
    assert sort["oldest_ready_s"] is None
    assert (gone["ready"], gone["running"]) == (None, 1)
    assert (queues["mail"]["ready"], queues["mail"]["running"]) == (2, 2)
    assert queues["mail"]["oldest_ready_s"] == send["oldest_ready_s"]
    assert queues["calm"]["paused"]
    (worker,) = overview["workers"]
    assert (worker["host"], worker["busy"], worker["slots"]) == ("node-a", 2, 10)
    (slot,) = overview["slots"]
    assert (slot["slot"], slot["here"], slot["open_gaps"]) == ("orders", False, 1)
    assert slot["lag_bytes"] is slot["retained_wal_bytes"] is None


async def test_what_is_due_ages_though_no_worker_marks_it_ready(
    stocked: AsyncConnection[Any],
) -> None:
    await stocked.execute(
        "insert into conductor.jobs (queue, task, payload, state, run_at) values"
        " ('mail', 'sort', '{}', 'scheduled', now() - interval '1 hour')"
    )
    overview = await read_overview(stocked)
    sort = by(overview["tasks"], "task")["sort"]
    assert 3600 <= sort["oldest_ready_s"] < 3700
    assert by(overview["queues"], "queue")["mail"]["oldest_ready_s"] == sort["oldest_ready_s"]


async def test_a_slot_of_this_server_is_described(
    connection: AsyncConnection[Any], queue: Queue
) -> None:
    await connection.execute(
        "insert into conductor.progress (slot, database, system_identifier, acknowledged_lsn)"
        " select %s, current_database(), system_identifier::text, '0/10' from pg_control_system()",
        [queue.database.name],
    )
    (slot,) = (await read_overview(connection))["slots"]
    assert (slot["here"], slot["missing"], slot["lag_bytes"] > 0) == (True, True, True)


async def test_a_sidecar_that_leads_is_shown(
    connection: AsyncConnection[Any], queue: Queue
) -> None:
    await queue.rows("create table notes (id int primary key)")
    subscribe(queue.database.dsn, "public.notes", ["insert"])

    async def slot() -> dict[str, Any]:
        return next(iter((await read_overview(connection))["slots"]), {"active": None})

    async def is_led() -> bool:
        shown = await slot()
        return bool(shown["active"] and shown["leader"])

    async with running(queue.database):
        await eventually(is_led)
        shown = await slot()
        assert shown["leader"].endswith(f":{os.getpid()}")
        assert shown["wal_status"] == "reserved"
        assert shown["retained_wal_bytes"] > 0
    assert not await is_led()
    text = screen_of(await read_overview(connection))
    assert "nobody" in text
    drop_slot(queue.database)


async def test_counts_are_bounded(connection: AsyncConnection[Any]) -> None:
    await connection.execute(STOCK.encode())
    await connection.execute(
        "insert into conductor.jobs (queue, task, payload, state, run_at)"
        " select 'mail', 'send', '{}', (%s::text[])[1 + n %% 4]::conductor.job_state, now()"
        " from generate_series(1, %s) n",
        [["ready", "running", "scheduled", "parked"], COUNTED_AT_MOST * 16],
    )
    send = by((await read_overview(connection))["tasks"], "task")["send"]
    counts = {send[name] for name in ("ready", "running", "scheduled")}
    assert counts <= {COUNTED_AT_MOST, COUNTED_AT_MOST - 1}
    for analysed in (False, True):
        if analysed:
            await connection.execute("analyze conductor.jobs")
        for name in QUERIES.keys() - {"limit_reading"}:
            for node in await run_nodes(connection, name):
                table = node.get("Relation Name", "")
                assert (node["Node Type"], table) != ("Seq Scan", "jobs"), name
                if table == "jobs" or table.startswith("history"):
                    read = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
                    assert read <= COUNTED_AT_MOST, (name, node)


async def run_nodes(connection: AsyncConnection[Any], name: str) -> list[dict[str, Any]]:
    """Run a query and return the nodes of its plan, with what each has read."""
    statement = b"explain (analyze, format json, timing off) " + QUERIES[name]
    cursor = connection.cursor(row_factory=dict_row)
    async with connection.transaction():
        await cursor.execute(QUERIES["limit_reading"], VALUES)
        await cursor.execute(statement, VALUES)
        row = await cursor.fetchone()
    assert row is not None
    nodes, found = [json.loads(row["QUERY PLAN"])[0]["Plan"]], []
    while nodes:
        node = nodes.pop()
        found.append(node)
        nodes += node.get("Plans", [])
    return found


async def test_the_screen_says_what_needs_somebody(stocked: AsyncConnection[Any]) -> None:
    overview = await read_overview(stocked)
    overview["workers"].append({**overview["workers"][0], "id": 2, "host": "\x1b[31mevil"})
    text = screen_of(overview, {1: 5.0, 2: 0.0})
    for words in ("calm (paused)", "20 min", "silent for 5.0 s", "elsewhere", "node-a:71"):
        assert words in text
    assert "\x1b" not in text


def screen_of(overview: dict[str, Any], silent_s: dict[int, float] | None = None) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(draw(overview, silent_s or {}))
    return console.export_text()


def test_a_lease_that_stands_still_is_silent_for_that_long() -> None:
    leases = Leases()
    assert leases.look([{"id": 1, "renewals": 4}, {"id": 2, "renewals": 4}], 10) == {}
    assert leases.look([{"id": 1, "renewals": 4}, {"id": 2, "renewals": 5}], 13) == {2: 0}
    assert leases.look([{"id": 1, "renewals": 4}, {"id": 2, "renewals": 5}], 15) == {1: 5, 2: 2}
    assert leases.look([{"id": 2, "renewals": 5}], 16) == {2: 3}
    assert leases.look([{"id": 1, "renewals": 4}], 17) == {}


async def test_one_look_does_not_say_that_a_worker_lives(stocked: AsyncConnection[Any]) -> None:
    overview = await read_overview(stocked)
    assert "held" not in screen_of(overview)
    assert "held" in screen_of(overview, {1: 0.0})
    overview["workers"][0]["draining"] = True
    assert "draining" in screen_of(overview)
    assert "silent for 9.0 s" in screen_of(overview, {1: 9.0})


# --- the command ---------------------------------------------------------------------------------


def command(dsn: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CONDUCTOR")},
        "CONDUCTOR_DSN": dsn,
        "PYTHONPATH": str(PROJECT),
        "TERM": "xterm-256color",
        "COLUMNS": "150",
        "LINES": "50",
    }
    return [sys.executable, "-m", "conductor", "top", *arguments], environment


def run(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words, environment = command(dsn, *arguments)
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_without_a_terminal_it_prints_once(migrated: ScratchDatabase) -> None:
    for arguments in ((), ("--once",)):
        done = run(migrated.dsn, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "conductor.dispatch" in done.stdout
        assert "no workers hold a lease" in done.stdout
        assert "\x1b" not in done.stdout


def test_as_json(migrated: ScratchDatabase) -> None:
    overview = json.loads(run(migrated.dsn, "--json").stdout)
    assert overview.keys() == {"at", "queues", "tasks", "workers", "slots"}
    assert [task["task"] for task in overview["tasks"]] == ["conductor.dispatch"]


def test_without_the_schema(database: ScratchDatabase) -> None:
    done = run(database.dsn)
    assert done.returncode == 78
    assert done.stderr.startswith("error: the schema conductor is not current: ")
    assert "conductor migrate" in done.stderr


def test_without_a_server(migrated: ScratchDatabase) -> None:
    done = run(dsn_for(migrated.dsn, host="127.0.0.1", port="1", password="s3cret"))
    assert done.returncode == 69
    assert done.stderr.startswith("error: cannot connect")
    assert "s3cret" not in done.stderr


@pytest.fixture
def screen(migrated: ScratchDatabase) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command on a terminal."""
    words, environment = command(migrated.dsn, "--interval", "0.5")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        words, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    yield process, ours
    process.kill()
    process.wait()
    os.close(ours)


async def test_on_a_terminal_it_goes_on_until_control_c(
    screen: tuple[subprocess.Popen[bytes], int], queue: Queue
) -> None:
    process, terminal = screen
    seen = b""

    def shows(pattern: bytes) -> bool:
        nonlocal seen
        seen += os.read(terminal, 65536)
        return re.search(pattern, seen) is not None

    wait_until(lambda: shows(rb"no queues"), 60, "the first screen")
    await queue.rows("insert into conductor.queues (name) values ('parcels')")
    wait_until(lambda: shows(rb"parcels"), 60, "the queue that came later")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: shows(rb"\x1b\[\?1049l"), 60, "the terminal is given back")
    assert process.wait(60) == 0
