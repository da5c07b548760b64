"""The command line: what an operator sees and what a supervisor gets."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.integration.sidecar import (
    cdc,
    drop_slot,
    environment,
    jobs,
    published,
    query,
    slot_row,
    stamps,
    subscribe,
    terminate,
)
from tests.servers import ScratchDatabase, StartServer, dsn_for, wait_until

TIMEOUT_S = 60.0


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """A database with one table that a subscription wants."""
    query(migrated.dsn, "create table t (id int primary key, body text)")
    subscribe(migrated.dsn, "public.t", ["insert"])
    return migrated


@contextmanager
def sidecar(database: ScratchDatabase, **changes: str) -> Iterator[subprocess.Popen[str]]:
    """`cdc run` as a process; killed at the end of the block if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cdc", "run"],
        env=environment(database, **changes),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def start(database: ScratchDatabase) -> None:
    """Run a sidecar until its slot exists, then stop it."""
    with sidecar(database) as process:
        wait_until(lambda: stamps(database, 1)[0] is not None, TIMEOUT_S, "a stamp")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def events(stderr: str) -> dict[str, dict[str, object]]:
    """The last log line of each event."""
    return {line["event"]: line for line in map(json.loads, stderr.splitlines())}


def last_lines(stderr: str) -> tuple[str, str]:
    """The two lines of a failure."""
    *_, error, hint = stderr.strip().splitlines()
    return error, hint


def test_run_routes_and_stops_cleanly(shop: ScratchDatabase) -> None:
    with sidecar(shop) as process:
        wait_until(lambda: stamps(shop, 1)[0] is not None, TIMEOUT_S, "a stamp")
        query(shop.dsn, "insert into t values (1, 'secret row')")
        wait_until(lambda: len(jobs(shop)) == 1, TIMEOUT_S, "a job")
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    seen = events(stderr)
    assert {"starting", "slot_created", "leading", "subscriptions_marked", "stopped"} <= set(seen)
    assert "secret row" not in stderr
    assert "password" not in stderr


def test_metrics_and_probes(shop: ScratchDatabase) -> None:
    changes = {"CDC_METRICS_PORT": "0", "CDC_METRICS_HOST": "127.0.0.1"}
    with sidecar(shop, **changes) as process:
        assert process.stderr is not None
        port = json.loads(process.stderr.readline())["port"]
        wait_until(lambda: stamps(shop, 1)[0] is not None, TIMEOUT_S, "a stamp")

        def get(path: str) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, ""

        assert get("/livez")[0] == get("/readyz")[0] == 200
        assert get("/healthz")[0] == 404
        status, text = get("/metrics")
    assert status == 200
    assert "cdc_leader{" in text
    assert "cdc_changes_total{" in text


def test_check_changes_nothing_and_says_what_run_will_do(shop: ScratchDatabase) -> None:
    done = cdc(shop, "check")
    assert done.returncode == 0, done.stderr
    assert "wal_level logical" in done.stdout
    assert 'add table only "public"."t"' in done.stdout
    assert f"will create slot '{shop.name}'" in done.stdout
    assert slot_row(shop) is None
    assert published(shop) == set()
    assert query(shop.dsn, "select from conductor.progress") == []


def test_check_names_what_cannot_be_captured(shop: ScratchDatabase) -> None:
    query(shop.dsn, "create table nokey (id int)")
    subscribe(shop.dsn, "public.nokey", task="no-key")
    subscribe(shop.dsn, "public.tt", task="typo")
    done = cdc(shop, "check", "--json")
    assert done.returncode == 78
    errors = [finding for finding in json.loads(done.stdout) if finding["level"] == "error"]
    assert "replica identity full" in errors[0]["fix"]
    assert "did you mean public.t" in errors[1]["message"]


def test_check_names_what_run_takes_out(shop: ScratchDatabase) -> None:
    query(shop.dsn, "create table u (id int primary key)")
    subscribe(shop.dsn, "public.u", task="other")
    start(shop)
    query(shop.dsn, "update conductor.subscriptions set retired_at = now() where task = 'other'")
    query(shop.dsn, "delete from conductor.activations where subscription = 2")
    done = cdc(shop, "check")
    assert done.returncode == 0
    assert 'drop table only "public"."u"' in done.stdout


def test_check_names_who_else_publishes_what_is_ours(shop: ScratchDatabase) -> None:
    query(shop.dsn, "create table theirs (id int primary key)")
    query(
        shop.dsn,
        "create publication conductor for table t, theirs with (publish_via_partition_root = true)",
    )
    query(shop.dsn, "create publication narrow for table t (id)")
    query(shop.admin_dsn, "create publication wide for all tables")
    query(shop.admin_dsn, "create publication inner_queue for tables in schema conductor")
    query(shop.dsn, "create publication harmless for table t")
    found = json.loads(cdc(shop, "check", "--json").stdout)
    warnings = [f["message"] for f in found if f["level"] == "warning" and "publi" in f["message"]]
    assert [message.split("'")[1] for message in warnings] == [
        "conductor",
        "inner_queue",
        "narrow",
        "wide",
    ]
    assert "public.theirs" in warnings[0]
    assert "never routed" in warnings[0]
    assert "public.t in part" in warnings[2]
    assert "FOR ALL TABLES" in warnings[3]


def test_what_others_publish_is_never_routed(shop: ScratchDatabase) -> None:
    query(shop.dsn, "create publication narrow for table t (id)")
    query(shop.admin_dsn, "create publication wide for all tables")
    with sidecar(shop) as process:
        wait_until(lambda: stamps(shop, 1)[0] is not None, TIMEOUT_S, "a stamp")
        query(shop.dsn, "insert into t values (1, 'whole')")
        wait_until(lambda: len(jobs(shop)) == 1, TIMEOUT_S, "a job")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert [payload["new"] for payload in jobs(shop)] == [{"id": 1, "body": "whole"}]


def test_a_slot_that_was_left_behind_is_named(shop: ScratchDatabase) -> None:
    start(shop)
    left = f"{shop.name}_left"  # as an earlier release let it be made
    query(shop.dsn, "insert into conductor.progress (slot, state) values (%s, 'streaming')", left)
    with sidecar(shop) as process:
        assert process.stderr is not None
        lines = (json.loads(line) for line in process.stderr)
        idle = next(line for line in lines if line["event"] == "idle_slots")
        assert list(idle["slots"]) == [left]
        assert "cdc slot drop" in idle["hint"]
    done = cdc(shop, "check")
    assert f"start its sidecar; if it is out of service: cdc slot drop {left}" in done.stdout


def test_check_and_run_name_a_condition_alike(shop: ScratchDatabase) -> None:
    start(shop)
    drop_slot(shop)
    check = cdc(shop, "check")
    assert check.returncode == 65
    run = cdc(shop, "run")
    assert run.returncode == 65
    error, hint = last_lines(run.stderr)
    assert error.startswith(f"error: slot '{shop.name}' is gone")
    assert error.removeprefix("error: ") in check.stdout
    assert hint.startswith("hint: ")
    assert "Traceback" not in run.stderr
    status = json.loads(cdc(shop, "status", "--json").stdout)
    assert status["condition"] == "slot_missing"
    assert [gap["condition"] for gap in status["gaps"]] == ["slot_missing"]


def test_status_shows_positions_leader_and_subscriptions(shop: ScratchDatabase) -> None:
    before = json.loads(cdc(shop, "status", "--json").stdout)
    assert before["state"] is None
    assert before["subscriptions"][0]["state"] == "pending"
    with sidecar(shop) as process:
        wait_until(lambda: stamps(shop, 1)[0] is not None, TIMEOUT_S, "a stamp")
        status = json.loads(cdc(shop, "status", "--json").stdout)
        assert status["leader"].endswith(f":{process.pid}")
        with sidecar(shop):
            wait_until(lambda: read_status(shop)["standbys"] == 1, TIMEOUT_S, "a standby")
            assert len(read_status(shop)["sidecars"]) == 2
    assert status["state"] == "streaming"
    assert status["condition"] is None
    assert status["subscriptions"] == [
        {
            "id": 1,
            "app": "test",
            "task": "seen",
            "table": "public.t",
            "operations": ["insert"],
            "state": "active",
            "start_lsn": stamps(shop, 1)[0],
        }
    ]
    readable = cdc(shop, "status").stdout
    assert "public.t" in readable
    assert re.search(r"leader +nobody", readable), readable  # whatever the last one has written
    assert status["standbys"] == 0
    assert (status["publication_drift"], status["publication_lacks"]) == ([], [])


def test_status_shows_what_somebody_took_out_of_the_publication(shop: ScratchDatabase) -> None:
    lacking = read_status(shop)["publication_lacks"]
    assert [row["statement"].split()[0] for row in lacking] == ["create", "alter"]
    start(shop)
    query(shop.admin_dsn, "alter publication conductor drop table t")
    status = read_status(shop)
    ((what,),) = [row.values() for row in status["publication_drift"]]
    assert "public.t" in what
    ((statement,),) = [row.values() for row in status["publication_lacks"]]
    assert statement.endswith('add table only "public"."t"')
    assert "public.t" in cdc(shop, "status").stdout


def read_status(database: ScratchDatabase) -> dict[str, Any]:
    """What `cdc status` knows."""
    report: dict[str, Any] = json.loads(cdc(database, "status", "--json").stdout)
    return report


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"dbname": "nonesuch"}, 78, "does not exist"),
        ({"user": "nonesuch"}, 78, "nonesuch"),
        ({"host": "127.0.0.1", "port": "1"}, 69, "127.0.0.1"),
    ],
)
def test_a_wrong_dsn_is_one_line_and_a_hint(
    shop: ScratchDatabase, changes: dict[str, str], code: int, words: str
) -> None:
    dsn = dsn_for(shop.source_dsn, **{"password": "hunter2", **changes})
    done = cdc(shop, "run", CDC_SOURCE_DSN=dsn, CDC_GIVE_UP_AFTER_S="0.3")
    error, hint = last_lines(done.stderr)
    assert done.returncode == code
    assert error.startswith("error: ")
    assert words in error
    assert "CDC_SOURCE_DSN" in hint
    assert "hunter2" not in done.stderr


def test_a_role_without_replication_is_told_what_to_run(shop: ScratchDatabase) -> None:
    for command in ("run", "check"):
        done = cdc(shop, command, CDC_SOURCE_DSN=shop.dsn)
        assert done.returncode == 78
        assert "replication" in done.stderr + done.stdout
    assert "hint: alter role" in done.stderr or "alter role" in done.stdout


@pytest.fixture
def stranger(shop: ScratchDatabase) -> Iterator[str]:
    """The DSN of a role that may replicate, and has no right on schema conductor."""
    role = sql.Identifier(f"{shop.name}-Stranger")
    make = sql.SQL("create role {} login replication password 'strange'").format(role)
    with psycopg.connect(shop.admin_dsn, autocommit=True) as admin:
        admin.execute(make)
        yield dsn_for(shop.source_dsn, user=f"{shop.name}-Stranger", password="strange")
        admin.execute(sql.SQL("drop role {}").format(role))


def test_a_role_without_the_queue_is_told_what_to_run(shop: ScratchDatabase, stranger: str) -> None:
    for command in ("run", "status"):
        done = cdc(shop, command, CDC_QUEUE_DSN=stranger)
        error, hint = last_lines(done.stderr)
        assert done.returncode == 78
        assert "may not use schema conductor" in error
        assert re.fullmatch(rf'hint: grant \w+_app to "{shop.name}-Stranger"', hint)
    query(shop.admin_dsn, hint.removeprefix("hint: "))
    assert cdc(shop, "status", CDC_QUEUE_DSN=stranger).returncode == 0


def test_nobody_is_told_to_become_a_superuser(shop: ScratchDatabase, stranger: str) -> None:
    query(shop.admin_dsn, "alter schema conductor owner to current_user")
    error, hint = last_lines(cdc(shop, "run", CDC_QUEUE_DSN=stranger).stderr)
    assert "may not use schema conductor" in error
    assert "grant" not in hint
    assert "let an ordinary role own it" in hint


def test_settings_are_checked_before_anything_is_opened(shop: ScratchDatabase) -> None:
    done = cdc(shop, "run", CDC_SLOT="Not A Slot", CDC_SOURCE_DSN="postgresql://u:hunter2@h:x/d")
    assert done.returncode == 78
    error, _ = last_lines(done.stderr)
    assert "CDC_SLOT" in error
    assert "CDC_SOURCE_DSN" in error
    assert "hunter2" not in done.stderr
    assert cdc(shop, "nonesuch").returncode == 2


def test_wal_level_is_checked(start_server: StartServer) -> None:
    server = start_server(settings={"wal_level": "replica"})
    database = ScratchDatabase("replica", server.dsn(), server.dsn(), server.dsn())
    for command in ("run", "check"):
        done = cdc(database, command)
        assert done.returncode == 78
        assert "wal_level" in done.stderr + done.stdout


def test_check_of_what_cannot_be_reached_is_unavailability(shop: ScratchDatabase) -> None:
    nowhere = dsn_for(shop.source_dsn, host="127.0.0.1", port="1")
    assert cdc(shop, "check", CDC_SOURCE_DSN=nowhere).returncode == 69
    assert cdc(shop, "check", CDC_QUEUE_DSN=nowhere).returncode == 69


def test_a_paused_leader_writes_nothing_after_its_successor(shop: ScratchDatabase) -> None:
    """The slot is free once the paused leader's walsender is gone; the fence does the rest.

    Few rows while it is paused: a walsender whose socket is full cannot be terminated, only timed
    out by the server.
    """
    with sidecar(shop) as old:
        wait_until(lambda: stamps(shop, 1)[0] is not None, TIMEOUT_S, "a stamp")
        for number in range(1, 121):
            query(shop.dsn, "insert into t values (%s, 'x')", number)
            if number == 100:
                old.send_signal(signal.SIGSTOP)
        terminate(shop, f"cdc {shop.name} stream")
        with sidecar(shop) as new:
            wait_until(lambda: len(jobs(shop)) >= 120, TIMEOUT_S, "the successor")
            old.send_signal(signal.SIGCONT)
            query(shop.dsn, "insert into t values (121, 'x')")
            wait_until(lambda: len(jobs(shop)) >= 121, TIMEOUT_S, "one more job")
            for process in (old, new):
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
    assert [payload["new"]["id"] for payload in jobs(shop)] == list(range(1, 122))
