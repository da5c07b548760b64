from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conductor.cli import main
from tests.servers import ScratchDatabase, dsn_for

APPLICATION = """
import asyncio, os
from pydantic import BaseModel
from conductor import Conductor, Orchestrator, define_event, define_task
from conductor.triggers import OnEvent

class Number(BaseModel):
    n: int

double = define_task("double", payload=Number, returns=int)
counted = define_event("counted", payload=Number)
conductor = Conductor(os.environ["CONDUCTOR_DSN"], tasks=[double], events=[counted], app="shop")

@conductor.task(double, max_attempts=1)
async def run(event, ctx):
    if event.payload.n == 13:
        raise ValueError("thirteen")
    return 2 * event.payload.n

@conductor.task("note", OnEvent(counted))
async def note(event, ctx):
    pass

@conductor.task("wait", OnEvent(define_event("waited")))
async def wait(event, ctx):
    print("waiting", flush=True)
    await asyncio.sleep(3600)

orchestrator = Orchestrator(conductor)
elsewhere = 7
"""


ENDED = """
insert into conductor.history (
    id, run_at, created_at, finished_at, expires_on, fence, rank, attempt, crashes, outcome,
    trigger, queue, task, key, payload, metadata, error, source_lsn, source_generation,
    source_ordinal, subscription)
values (nextval('conductor.jobs_id_seq'), now(), now(), now(), 'infinity', 3, -4, 2, 0, %s,
    'change', 'mail', 'send-email', 'k', '{"a": "\\u0000"}', %s,
    '{"type": "ValueError", "message": "no"}', '0/16', 1, 2, 3)
returning id
"""


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def failed(self, status: int) -> tuple[str, str]:
        """The error and the hint of a command that failed as it should."""
        assert self.status == status, self.err
        assert self.out == ""
        error, hint = self.err.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        return error.removeprefix("error: "), hint.removeprefix("hint: ")


Command = Callable[..., Ended]


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"shop_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(APPLICATION)
    (tmp_path / f"{name}_broken.py").write_text("import json\nraise KeyError('x')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def conductor(
    migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run a command in this process."""
    monkeypatch.setenv("CONDUCTOR_DSN", migrated.dsn)
    monkeypatch.setenv("CONDUCTOR_CONNECT_TIMEOUT_S", "0.2")

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["conductor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        status = ended.value.code
        return Ended(status if isinstance(status, int) else int(status is not None), *shown)

    return run


@pytest.fixture
def start_worker(conductor: Command, application: str) -> Iterator[Callable[..., Any]]:
    """Start a real worker process; it is killed at the end unless it has ended."""
    started: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "conductor", "worker", f"{application}:orchestrator"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ask(database: ScratchDatabase, query: str, *values: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.dsn) as connection:
        cursor = connection.execute(query.encode(), values)
        return cursor.fetchall() if cursor.description else []


def wait_for(database: ScratchDatabase, query: str, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not ask(database, query)[0][0]:
        assert time.monotonic() < deadline, query
        time.sleep(0.05)


def add_task(database: ScratchDatabase, name: str = "send-email") -> None:
    ask(
        database,
        "insert into conductor.tasks (app, name, queue, max_attempts, retention)"
        " values ('shop', %s, 'mail', 5, '1 day')",
        name,
    )


def add_ended(database: ScratchDatabase, outcome: str, metadata: str | None = None) -> int:
    ((number,),) = ask(
        database,
        ENDED,
        outcome,
        metadata,
    )
    return int(number)


# --- migrate -----------------------------------------------------------------------------------


def test_migrate(
    database: ScratchDatabase, conductor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", database.dsn)
    planned = conductor("migrate", "--dry-run")
    assert planned.status == 0
    assert "-- 0001_initial" in planned.out
    assert "create table conductor.jobs" in planned.out
    assert conductor("migrate").out.startswith("applied 0001_initial\n")
    assert conductor("migrate").out == "nothing to do\n"
    assert conductor("migrate", "--dry-run").out == ""


def test_migrate_without_rights_says_whose_it_needs(
    database: ScratchDatabase, conductor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = f"{database.name}_stranger"
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute(f"create role {role} login password 'strange'".encode())
        try:
            monkeypatch.setenv(
                "CONDUCTOR_DSN", dsn_for(database.dsn, user=role, password="strange")
            )
            error, hint = conductor("migrate").failed(78)
        finally:
            admin.execute(f"drop role {role}".encode())
    assert "permission denied for database" in error
    assert "owns the database" in hint


def test_a_role_without_the_schema_is_told_what_it_needs(
    conductor: Command, application: str, migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = f"{migrated.name}_stranger"
    with psycopg.connect(migrated.admin_dsn, autocommit=True) as admin:
        admin.execute(f"create role {role} login password 'strange'".encode())
        try:
            dsn = dsn_for(migrated.dsn, user=role, password="strange")
            monkeypatch.setenv("CONDUCTOR_DSN", dsn)
            for command in (
                ("worker", f"{application}:orchestrator"),
                ("jobs", "list"),
                ("invoke", "double"),
                ("invoke", "double", '{"n": 1}', "--app", f"{application}:conductor"),
            ):
                error, hint = conductor(*command).failed(78)
                assert error == "permission denied for schema conductor"
                assert "grant it the role that owns them" in hint
        finally:
            admin.execute(f"drop role {role}".encode())


def test_no_server(
    conductor: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, migrated: ScratchDatabase
) -> None:
    nowhere = dsn_for(migrated.dsn, host=str(tmp_path), hostaddr="", port="1", password="s3cret")
    monkeypatch.setenv("CONDUCTOR_DSN", nowhere)
    for command in (("migrate",), ("jobs", "list"), ("emit", "x")):
        error, hint = conductor(*command).failed(69)
        assert "cannot connect to the database" in error
        assert "s3cret" not in error
        assert "Check the DSN" in hint


@pytest.mark.parametrize("dsn", ["", "postgres//app:s3cret@db"])
def test_a_wrong_dsn(conductor: Command, monkeypatch: pytest.MonkeyPatch, dsn: str) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", dsn)
    error, _ = conductor("jobs", "list").failed(78)
    assert error.startswith("CONDUCTOR_DSN: is n")
    assert "s3cret" not in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dbname": "nonesuch"}, 'database "nonesuch" does not exist'),
        ({"user": "nonesuch"}, "none"),
    ],
)
def test_a_wrong_database_or_role_is_told_at_once(
    conductor: Command,
    application: str,
    monkeypatch: pytest.MonkeyPatch,
    migrated: ScratchDatabase,
    changes: dict[str, str],
    words: str,
) -> None:
    """Not after the time that a server is given to come up."""
    monkeypatch.setenv("CONDUCTOR_CONNECT_TIMEOUT_S", "3600")
    monkeypatch.setattr("conductor.connections.WAIT_S", 3600.0)
    monkeypatch.setenv("CONDUCTOR_DSN", dsn_for(migrated.dsn, **{"password": "s3cret", **changes}))
    for command in (
        ("migrate",),
        ("worker", f"{application}:orchestrator"),
        ("jobs", "list"),
        ("invoke", "double"),
        ("invoke", "double", '{"n": 1}', "--app", f"{application}:conductor"),
        ("emit", "counted", '{"n": 1}', "--app", f"{application}:conductor"),
    ):
        error, hint = conductor(*command).failed(78)
        assert words in error
        assert "s3cret" not in error
        assert "CONDUCTOR_DSN" in hint


def test_without_the_schema(
    conductor: Command, database: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", database.dsn)
    _, hint = conductor("jobs", "list").failed(78)
    assert "conductor migrate" in hint


# --- invoke and emit ---------------------------------------------------------------------------


def test_invoke_enqueues_a_job(conductor: Command, migrated: ScratchDatabase) -> None:
    add_task(migrated)
    ended = conductor(
        "invoke", "send-email", '{"to": "a"}', "--priority", "3", "--key", "a",
        "--run-at", "2100-01-01T00:00:00+01:00", "--json",
    )  # fmt: skip
    assert ended.status == 0
    job = ended.json["id"]
    (row,) = ask(
        migrated,
        "select queue, payload, rank, key, state::text from conductor.jobs where id=%s",
        job,
    )
    assert row == ("mail", {"to": "a"}, -3, "a", "scheduled")
    first = conductor("invoke", "send-email", "--dedupe-key", "once")
    assert first.out.strip().isdecimal()
    again = conductor("invoke", "send-email", "--dedupe-key", "once", "--json")
    assert again.json == {"id": None, "status": "dropped"}


def test_an_unknown_task_names_the_nearest(conductor: Command, migrated: ScratchDatabase) -> None:
    add_task(migrated)
    error, _ = conductor("invoke", "send-emial").failed(2)
    assert error == "unknown task 'send-emial'; did you mean 'send-email'?"


def test_an_unknown_event_names_the_nearest(conductor: Command, migrated: ScratchDatabase) -> None:
    ask(migrated, "insert into conductor.events (app, name) values ('shop', 'user.created')")
    error, _ = conductor("emit", "user.craeted").failed(2)
    assert error == "unknown event 'user.craeted'; did you mean 'user.created'?"


@pytest.mark.parametrize("payload", ["{", "{'a': 1}", ""])
def test_a_payload_that_is_no_json(conductor: Command, payload: str) -> None:
    error, hint = conductor("invoke", "send-email", payload).failed(2)
    assert "not JSON" in error
    assert "shell" in hint


def test_text_that_cannot_be_stored(conductor: Command) -> None:
    for arguments, message in (
        (("invoke", "send-email", '{"to": ["\\u0000"]}'), "the payload: to.0: the text holds"),
        (("emit", "user.created", '{"to": "\\ud800"}'), "the payload: to: the text holds"),
        (("invoke", "send-email", "--key", "\udcff"), "key '?': the text holds"),
        (("jobs", "cancel", "1", "--reason", "\udcff"), "reason '?': the text holds"),
    ):
        error, hint = conductor(*arguments).failed(2)
        assert error.startswith(message)
        assert "base64" in hint


@pytest.mark.parametrize("instant", ["tomorrow", "2100-01-01T00:00:00"])
def test_an_instant_needs_its_zone(conductor: Command, instant: str) -> None:
    error, _ = conductor("invoke", "send-email", "--run-at", instant).failed(2)
    assert error == f"'{instant}' is no instant"


def test_an_application_checks_payloads(
    conductor: Command, application: str, migrated: ScratchDatabase
) -> None:
    path = f"{application}:conductor"
    error, _ = conductor("invoke", "double", '{"n": "x"}', "--app", path).failed(2)
    assert error.startswith("payload of task 'double': n: Input should be a valid integer")
    assert conductor("invoke", "double", '{"n": 1}', "--app", path).status == 0
    error, _ = conductor("emit", "counted", "{}", "--app", path).failed(2)
    assert error == "payload of event 'counted': n: Field required"
    assert conductor("emit", "counted", '{"n": 1}', "--app", path).status == 0
    assert ask(migrated, "select task from conductor.jobs order by id") == [
        ("double",), ("conductor.dispatch",),
    ]  # fmt: skip


# --- jobs --------------------------------------------------------------------------------------


def test_jobs_are_listed_and_filtered(conductor: Command, migrated: ScratchDatabase) -> None:
    add_task(migrated)
    failed = add_ended(migrated, "failed")
    alive = int(conductor("invoke", "send-email", "{}").out)
    listed = conductor("jobs", "list", "--json").json
    assert [row["id"] for row in listed] == [alive, failed]
    assert [row["state"] for row in listed] == ["ready", "failed"]
    assert [row["id"] for row in conductor("jobs", "list", "--state", "failed", "--json").json] == [
        failed
    ]
    assert conductor("jobs", "list", "--task", "x", "--json").json == []
    assert conductor("jobs", "list", "--queue", "x").out == "no jobs\n"
    assert "send-email" in conductor("jobs", "list", "--limit", "1").out


def test_a_job_is_shown(conductor: Command, migrated: ScratchDatabase) -> None:
    failed = add_ended(migrated, "failed")
    shown = conductor("jobs", "show", str(failed), "--json").json
    assert shown["error"] == {"type": "ValueError", "message": "no"}
    assert shown["payload"] == {"a": "\x00"}
    assert shown["steps"] == []
    readable = conductor("jobs", "show", str(failed)).out
    assert "ValueError" in readable
    assert "0/16" in readable


def test_a_job_that_is_not_there(conductor: Command) -> None:
    for command in ("show", "retry", "cancel"):
        error, _ = conductor("jobs", command, "77").failed(2)
        assert error == "there is no job 77"


@pytest.mark.parametrize(
    "metadata, kept",
    [
        (None, {}),
        ('{"traceparent": "00"}', {"traceparent": "00"}),
        ("[1]", {"metadata": [1]}),
    ],
)
@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_an_ended_job_runs_again_as_a_new_one(
    conductor: Command,
    migrated: ScratchDatabase,
    outcome: str,
    metadata: str | None,
    kept: dict[str, Any],
) -> None:
    old = add_ended(migrated, outcome, metadata)
    new = conductor("jobs", "retry", str(old), "--json").json["id"]
    ((row, state),) = ask(
        migrated, "select to_json(j), state::text from conductor.jobs j where id = %s", new
    )
    assert state == "ready"
    assert row["metadata"] == {**kept, "retry_of": old}
    assert (row["queue"], row["task"], row["key"], row["rank"]) == ("mail", "send-email", "k", -4)
    assert (row["attempt"], row["crashes"], row["fence"]) == (0, 0, 0)
    assert (row["source_lsn"], row["source_generation"], row["subscription"]) == ("0/16", 1, 3)
    assert row["payload"] == {"a": "\x00"}


def test_only_what_failed_or_was_cancelled_runs_again(
    conductor: Command, migrated: ScratchDatabase
) -> None:
    add_task(migrated)
    error, _ = conductor("jobs", "retry", str(add_ended(migrated, "completed"))).failed(2)
    assert error.endswith("is completed")
    alive = conductor("invoke", "send-email").out.strip()
    error, _ = conductor("jobs", "retry", alive).failed(2)
    assert error == f"job {alive} has not ended"


def test_a_job_is_cancelled_once(conductor: Command, migrated: ScratchDatabase) -> None:
    add_task(migrated)
    job = conductor("invoke", "send-email").out.strip()
    assert conductor("jobs", "cancel", job, "--reason", "typo").status == 0
    shown = conductor("jobs", "show", job, "--json").json
    assert (shown["state"], shown["error"]["message"]) == ("cancelled", "typo")
    error, _ = conductor("jobs", "cancel", job).failed(2)
    assert error == f"job {job} has ended already"


# --- schedules ---------------------------------------------------------------------------------


def test_halted_lanes_are_listed_and_resumed(conductor: Command, migrated: ScratchDatabase) -> None:
    assert conductor("lanes", "list").out == "no halted lanes\n"
    with psycopg.connect(migrated.dsn) as connection:
        connection.execute(
            "insert into conductor.halted_lanes (queue, task, key, job, place)"
            " values ('mail', 'send', 'k', 7, 7), ('mail', 'other', 'k', 8, 8)"
        )
    (lane,) = conductor("lanes", "list", "--task", "send", "--json").json
    assert (lane["queue"], lane["key"], lane["job"], lane["parked"]) == ("mail", "k", 7, 0)
    assert "send" in conductor("lanes", "list").out
    assert conductor("lanes", "resume", "send", "k").out == "resumed send k\n"
    error, hint = conductor("lanes", "resume", "send", "k").failed(2)
    assert "no lane 'k' of task 'send' is halted" in error
    assert "conductor lanes list" in hint
    assert [lane["task"] for lane in conductor("lanes", "list", "--json").json] == ["other"]


def test_schedules_are_listed(conductor: Command, migrated: ScratchDatabase) -> None:
    assert conductor("schedules").out == "no schedules\n"
    ask(
        migrated,
        "insert into conductor.schedules"
        " (app, task, name, queue, expression, timezone, next_at, payload) values"
        " ('shop', 'tidy', 'nightly', 'default', '0 3 * * *', 'UTC', '2030-01-02', null),"
        " ('', 'report', 'customer 7', 'default', '0 9 * * 1', 'UTC', '2030-01-01', '{\"id\": 7}')",
    )
    found = conductor("schedules", "--json").json
    assert [(row["task"], row["name"], row["made"]) for row in found] == [
        ("report", "customer 7", "run time"),
        ("tidy", "nightly", "trigger"),
    ]
    assert found[0]["payload"] == {"id": 7}
    assert [row["app"] for row in conductor("schedules", "--task", "tidy", "--json").json] == [
        "shop"
    ]
    assert "customer 7" in conductor("schedules").out


# --- worker ------------------------------------------------------------------------------------


def test_a_worker_process_runs_jobs_and_drains(
    conductor: Command, start_worker: Callable[..., Any], migrated: ScratchDatabase
) -> None:
    process = start_worker()
    wait_for(migrated, "select count(*) = 1 from conductor.workers")
    conductor("invoke", "double", '{"n": 21}')
    conductor("invoke", "double", '{"n": 13}')
    conductor("emit", "counted", '{"n": 1}')
    wait_for(migrated, "select count(*) = 3 from conductor.history")
    process.send_signal(signal.SIGTERM)
    _, logged = process.communicate(timeout=60)
    assert process.returncode == 0
    assert ask(migrated, "select * from conductor.workers") == []
    results = ask(
        migrated, "select task, outcome::text, result from conductor.history order by 1, 2"
    )
    assert results == [
        ("double", "completed", 42),
        ("double", "failed", None),
        ("note", "completed", None),
    ]
    started = [e for e in map(json.loads, logged.splitlines()) if e["event"] == "started"]
    assert [event["app"] for event in started] == ["shop"]
    assert '"n"' not in logged


def test_a_second_signal_quits_at_once(
    conductor: Command, start_worker: Callable[..., Any], migrated: ScratchDatabase
) -> None:
    process = start_worker()
    ask(migrated, "select conductor.emit('waited', 'null')")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    wait_for(migrated, "select draining from conductor.workers")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert ask(migrated, "select state::text from conductor.jobs") == [("running",)]


def test_what_cannot_be_loaded_says_why(conductor: Command, application: str) -> None:
    error, hint = conductor("worker", "nowhere_at_all:orchestrator").failed(78)
    assert error == (
        "cannot import nowhere_at_all: ModuleNotFoundError: No module named 'nowhere_at_all'"
    )
    assert hint == "Run this in the module's folder, or install its package here."
    error, hint = conductor("worker", f"{application}_broken").failed(78)
    assert error == f"cannot import {application}_broken: KeyError: 'x'"
    assert hint.endswith("line 2.")
    error, hint = conductor("worker", f"{application}:orchestrater").failed(78)
    assert error == f"module {application} has no 'orchestrater'"
    assert hint.startswith("Did you mean orchestrator")
    error, _ = conductor("worker", f"{application}:elsewhere").failed(78)
    assert error.endswith("is int, not an orchestrator")


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ('OnChange(Users, "insert", columns=("emial",))', "unknown column 'emial' of public.users"),
        ("OnChange(Users, columns=lambda u: u.emial)", "unknown column 'emial' of public.users"),
        ('OnChange(Users, "update", when="new.emial == old.id")', "did you mean 'email'?"),
        ('OnEvent(made, when="event.nam == 1")', "unknown field 'nam' of event 'made'"),
        ('Cron("0 25 * * *")', "0 25 * * *"),
        ('define_task("send email")', "'send email' cannot be the name of a task"),
        ('define_task("t", payload=object())', "payload of task 't': pydantic cannot take"),
        ('conductor.task(define_task("t"), attempts=3)(print)', "did you mean 'max_attempts'?"),
        ('conductor.task("t", OnChange("public.orders"))(print)', "did you mean 'public.orders"),
    ],
)
def test_a_wrong_declaration_says_what_and_where(
    conductor: Command, application: str, declaration: str, message: str
) -> None:
    name = f"{application}_wrong"
    source = (
        "from conductor import *\n"
        "class Users(TableRow, table='public.users'):\n    id: int\n    email: str\n"
        "class Orders(TableRow, table='public.orders_'):\n    id: int\n"
        "class Made(TableRow):\n    name: int\n"
        "made = define_event('made', payload=Made)\n"
        "import sys\n"
        "conductor = Conductor('', database=Database.from_module(sys.modules[__name__]))\n"
        "def wrong():\n"
        f"    {declaration}\n"
        "wrong()\n"
    )
    Path(f"{name}.py").write_text(source)
    error, hint = conductor("worker", f"{name}:conductor").failed(78)
    assert message in error
    assert hint.endswith(f"It was raised in {Path(f'{name}.py').resolve()}, line 13.")


def test_wrong_usage(conductor: Command) -> None:
    assert conductor("jobs", "list", "--limit", "0").status == 2
    assert conductor("nonsense").status == 2
    assert conductor("--help").status == 0


def test_a_bug_is_told_apart(conductor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(_settings: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("conductor.cli.actions.migrate", explode)
    ended = conductor("migrate")
    assert ended.status == 70
    assert "Traceback" in ended.err
    assert "error: ZeroDivisionError('oh')" in ended.err
