"""Tables without usable replica identity: their inserts are captured, and no write of theirs fails.

A second publication has them. It gets into a stream that began before it, tables move between the
two without a row missing, and what somebody does to it is drift.
"""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cdc import cut_over
from cdc.errors import CdcError, PublicationDrift
from cdc.metrics import Metrics
from cdc.recorder import Recorder
from cdc.recording import read
from cdc.replay import replay
from cdc.service import Service
from tests.integration.sidecar import (
    captured,
    cdc,
    eventually,
    jobs,
    published,
    query,
    routed,
    running,
    settings_for,
    slot_row,
    stamps,
    subscribe,
    terminate,
    value,
)
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio

SECOND = "conductor_inserts"


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """A table with a key, and one without."""
    query(migrated.dsn, "create table keyed (id int primary key, body text)")
    query(migrated.dsn, "create table keyless (id int, body text)")
    return migrated


def insert(shop: ScratchDatabase, table: str, *ids: int) -> None:
    for number in ids:
        query(shop.dsn, f"insert into {table} values (%s, 'x')", number)


def seen(shop: ScratchDatabase) -> list[tuple[str, str, int | None]]:
    return [(job["table"], job["op"], (job.get("new") or {}).get("id")) for job in jobs(shop)]


def options(shop: ScratchDatabase) -> dict[str, Any]:
    return dict(value(shop.dsn, "select options from conductor.progress") or {})


def retire(shop: ScratchDatabase, subscription: int) -> None:
    query(
        shop.dsn,
        "update conductor.subscriptions set retired_at = now() where id = %s",
        subscription,
    )
    query(shop.dsn, "select pg_notify('conductor_subscriptions', '')")


async def test_inserts_of_a_keyless_table_are_captured_and_no_write_fails(
    shop: ScratchDatabase,
) -> None:
    subscription = subscribe(shop.dsn, "public.keyless", ["insert", "truncate"])
    async with running(shop):
        await captured(shop, subscription)
        insert(shop, "keyless", 1)
        query(shop.dsn, "update keyless set body = 'y'")
        query(shop.dsn, "delete from keyless")
        query(shop.dsn, "truncate keyless")
        insert(shop, "keyless", 2)
        await routed(shop, 3)
    assert published(shop) == set()
    assert published(shop, SECOND) == {"public.keyless"}
    assert [op for _, op, _ in seen(shop)] == ["insert", "truncate", "insert"]
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


async def test_a_slot_made_after_it_carries_it_at_once(shop: ScratchDatabase) -> None:
    subscription = subscribe(shop.dsn, "public.keyless", ["insert"])
    async with running(shop):
        await captured(shop, subscription)
    assert value(shop.dsn, "select epoch from conductor.progress") == 1  # never started again


async def test_it_gets_into_a_stream_that_began_without_it(
    shop: ScratchDatabase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also while a transaction is open that wrote before it came: the server could not decode it"""
    monkeypatch.setattr(cut_over, "SLOW_WRITER_S", 0.0)
    first = subscribe(shop.dsn, "public.keyed")
    async with running(shop):
        await captured(shop, first)
        with psycopg.connect(shop.dsn) as writer:
            writer.execute("insert into keyless values (1, 'early')")
            writer.execute("insert into keyed values (1, 'early')")
            second = subscribe(shop.dsn, "public.keyless", ["insert"], task="second")
            await eventually(lambda: published(shop, SECOND), "the second publication")
            insert(shop, "keyed", 2)
            insert(shop, "keyless", 2)
            await routed(shop, 1)
            assert stamps(shop, second)[0] is None
            epoch = value(shop.dsn, "select epoch from conductor.progress")
            terminate(shop, f"cdc {shop.name} stream")  # what a server has in mind is gone
            await eventually(
                lambda: value(shop.dsn, "select epoch from conductor.progress") > epoch, "a leader"
            )
            assert options(shop).get("inserts") is None
            await eventually(lambda: _is_named(capsys, writer.info.backend_pid), "the warning")
            writer.execute("insert into keyless values (3, 'late')")
        await captured(shop, second)
        insert(shop, "keyless", 4)
        insert(shop, "keyed", 3)
        await routed(shop, 4)
    assert [row for table, _, row in seen(shop) if table == "keyless"] == [4]
    assert [row for table, _, row in seen(shop) if table == "keyed"] == [2, 1, 3]
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


def _is_named(capsys: pytest.CaptureFixture[str], pid: int) -> bool:
    """Whether a warning since the last look says who holds up the second publication."""
    lines = [line for line in capsys.readouterr().out.splitlines() if "activation_waits" in line]
    return any(
        "second publication" in line and re.search(rf"pids=\[.*\b{pid}\b", line) for line in lines
    )


async def test_a_stream_that_falls_back_carries_it_still(shop: ScratchDatabase) -> None:
    """A slot can stand before the publication came: a crash takes its last steps back."""
    first = subscribe(shop.dsn, "public.keyed")
    async with running(shop):
        await captured(shop, first)
    query(shop.admin_dsn, "select pg_copy_logical_replication_slot(%s, 'before')", shop.name)
    async with running(shop):
        second = subscribe(shop.dsn, "public.keyless", ["insert"], task="second")
        await captured(shop, second)
        insert(shop, "keyless", 1)
        await routed(shop, 1)
    query(shop.admin_dsn, "select pg_drop_replication_slot(%s)", shop.name)
    query(shop.admin_dsn, "select pg_copy_logical_replication_slot('before', %s)", shop.name)
    query(shop.admin_dsn, "select pg_drop_replication_slot('before')")
    insert(shop, "keyless", 2)
    insert(shop, "keyed", 2)
    async with running(shop):
        await routed(shop, 3)
    assert seen(shop)[1:] == [("keyless", "insert", 2), ("keyed", "insert", 2)]


async def test_what_was_not_routed_when_its_leader_died_is_routed(shop: ScratchDatabase) -> None:
    """Where the second publication can be decoded is noted; the router has not come that far."""
    first = subscribe(shop.dsn, "public.keyed")
    async with running(shop):
        await captured(shop, first)
    second = subscribe(shop.dsn, "public.keyless", ["insert"], task="second")
    for statement in _plan(shop):
        query(shop.source_dsn, statement)
    insert(shop, "keyed", 1)
    noted = query(
        shop.dsn,
        "update conductor.progress set options = json_build_object('inserts', json_build_array("
        " (select oid::bigint from pg_publication where pubname = %s),"
        " pg_current_wal_insert_lsn()::text)) returning slot",
        SECOND,
    )
    assert len(noted) == 1
    async with running(shop):
        await captured(shop, second)
        insert(shop, "keyless", 2)
        await routed(shop, 2)
    assert seen(shop) == [("keyed", "insert", 1), ("keyless", "insert", 2)]


async def test_a_table_that_gets_a_key_moves_and_no_row_is_missing(shop: ScratchDatabase) -> None:
    inserts = subscribe(shop.dsn, "public.keyless", ["insert"])
    async with running(shop):
        await captured(shop, inserts)
        query(shop.dsn, "alter table keyless replica identity full")
        with psycopg.connect(shop.dsn) as writer:
            writer.execute("insert into keyless values (1, 'x')")
            updates = subscribe(shop.dsn, "public.keyless", ["update"], task="updates")
            await eventually(lambda: published(shop) == {"public.keyless"}, "the move")
            writer.execute("update keyless set body = 'early'")
            insert(shop, "keyless", 2)
            await routed(shop, 1)
            assert stamps(shop, updates)[0] is None  # for it, the writer's updates are not whole
            writer.execute("insert into keyless values (3, 'x')")
        await captured(shop, updates)
        query(shop.dsn, "update keyless set body = 'late' where id = 3")
        await routed(shop, 4)
        assert published(shop, SECOND) == set()
        # and back, when nobody wants updates any more and its rows have no identity again
        query(
            shop.dsn, "update conductor.subscriptions set retired_at = now() where id = %s", updates
        )
        query(shop.dsn, "select pg_notify('conductor_subscriptions', '')")
        await eventually(lambda: stamps(shop, updates)[1], "end of the updates")
        query(shop.dsn, "alter table keyless replica identity default")
        await eventually(lambda: published(shop, SECOND) == {"public.keyless"}, "the way back")
        query(shop.dsn, "update keyless set body = 'free'")
        insert(shop, "keyless", 4)
        await routed(shop, 5)
    assert seen(shop) == [
        ("keyless", "insert", 2),
        ("keyless", "insert", 1),
        ("keyless", "insert", 3),
        ("keyless", "update", 3),
        ("keyless", "insert", 4),
    ]
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


async def test_rows_of_a_keyless_partitioned_table_come_as_its_root(shop: ScratchDatabase) -> None:
    query(shop.dsn, "create table p (id int, body text) partition by range (id)")
    query(shop.dsn, "create table p1 partition of p for values from (0) to (9)")
    subscription = subscribe(shop.dsn, "public.p", ["insert"])
    async with running(shop):
        await captured(shop, subscription)
        insert(shop, "p", 1)
        insert(shop, "p1", 2)
        query(shop.dsn, "update p set body = 'y'")
        query(shop.dsn, "delete from p1")
        await routed(shop, 2)
    assert seen(shop) == [("p", "insert", 1), ("p", "insert", 2)]


@pytest.mark.wal2json
async def test_wal2json_gives_the_same_jobs(shop: ScratchDatabase) -> None:
    subscription = subscribe(shop.dsn, "public.keyless", ["insert", "truncate"])
    async with running(shop, plugin="wal2json"):
        await captured(shop, subscription)
        insert(shop, "keyless", 1)
        query(shop.dsn, "update keyless set body = 'y'")
        query(shop.dsn, "truncate keyless")
        await routed(shop, 2)
    assert [op for _, op, _ in seen(shop)] == ["insert", "truncate"]


async def run_into(shop: ScratchDatabase, error: type[CdcError]) -> CdcError:
    settings = settings_for(shop)
    with pytest.raises(error) as caught:
        async with asyncio.timeout(50):
            await Service(settings, Metrics("test", settings.slot)).run()
    return caught.value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("alter publication conductor_inserts drop table keyless", "not in conductor_inserts"),
        ("drop publication conductor_inserts", "conductor_inserts"),
        ("alter publication conductor_inserts set (publish = 'truncate')", "does not publish"),
        ("alter publication conductor_inserts set table keyless (id)", "column list"),
    ],
)
async def test_what_somebody_does_to_it_is_drift(
    shop: ScratchDatabase, damage: str, words: str
) -> None:
    first = subscribe(shop.dsn, "public.keyed")
    subscription = subscribe(shop.dsn, "public.keyless", ["insert"], task="second")
    async with running(shop):
        await captured(shop, subscription)
        await captured(shop, first)
    query(shop.source_dsn, damage)
    assert words in str(await run_into(shop, PublicationDrift))
    status = cdc(shop, "status", "--json")
    assert words in status.stdout
    assert cdc(shop, "check").returncode == 65
    assert cdc(shop, "apply").returncode == 65
    applied = cdc(shop, "apply", "--accept-gap")
    assert applied.returncode == 0, applied.stderr
    async with running(shop):
        await eventually(
            lambda: (
                value(shop.dsn, "select count(*) from conductor.gaps where closed_at is null") == 0
            ),
            "no gap is open",
        )
        slot = slot_row(shop)
        assert slot is not None
        await eventually(lambda: _carries(shop), "the stream carries it")
        insert(shop, "keyless", 7)
        insert(shop, "keyed", 8)
        await routed(shop, 2)
    assert published(shop, SECOND) == {"public.keyless"}
    policies = [row["policy"] for row in query(shop.dsn, "select policy from conductor.gaps")]
    made_anew = ["continue"] if damage.startswith("drop") else []  # until it was carried again
    assert policies == ["stop", *made_anew]


def _carries(shop: ScratchDatabase) -> bool:
    """Whether a stream was started when the server could decode with it."""
    return bool(
        value(
            shop.admin_dsn,
            "select (options -> 'inserts' ->> 0)::oid = p.oid"
            " and routed_lsn >= (options -> 'inserts' ->> 1)::pg_lsn"
            " and exists (select from pg_stat_activity where query ilike %s and state = 'active')"
            " from conductor.progress, pg_publication p where p.pubname = %s",
            f"%{SECOND}%",
            SECOND,
        )
    )


async def test_dropped_while_nothing_is_captured_through_it_it_costs_nothing(
    shop: ScratchDatabase,
) -> None:
    keyed = subscribe(shop.dsn, "public.keyed")
    second = subscribe(shop.dsn, "public.keyless", ["insert"], task="second")
    async with running(shop):
        await captured(shop, keyed)
        await captured(shop, second)
        query(
            shop.dsn, "update conductor.subscriptions set retired_at = now() where id = %s", second
        )
        query(shop.dsn, "select pg_notify('conductor_subscriptions', '')")
        await eventually(lambda: stamps(shop, second)[1], "its end")
        await eventually(lambda: published(shop, SECOND) == set(), "taken out")
        query(shop.source_dsn, f"drop publication {SECOND}")
        insert(shop, "keyed", 1, 2)
        await routed(shop, 2)
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


async def test_it_is_restored_when_it_would_do_harm(shop: ScratchDatabase) -> None:
    subscription = subscribe(shop.dsn, "public.keyless", ["insert"])
    async with running(shop):
        await captured(shop, subscription)
    query(shop.source_dsn, f"alter publication {SECOND} set (publish = 'insert, update, truncate')")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        query(shop.dsn, "update keyless set id = 1")
    assert "set (publish = 'insert, truncate'" in cdc(shop, "plan").stdout
    assert cdc(shop, "apply").returncode == 0
    query(shop.dsn, "update keyless set id = 1")
    assert cdc(shop, "check").returncode == 0


async def test_unmanaged_the_owner_runs_what_the_plan_prints(shop: ScratchDatabase) -> None:
    keyed = subscribe(shop.dsn, "public.keyed")
    subscription = subscribe(shop.dsn, "public.keyless", ["insert"], task="second")
    for statement in _plan(shop):
        query(shop.admin_dsn, statement)
    assert _plan(shop) == []
    async with running(shop, manage_publication=False):
        await captured(shop, keyed)
        await captured(shop, subscription)
        query(shop.dsn, "alter table keyless replica identity full")
        updates = subscribe(shop.dsn, "public.keyless", ["update"], task="updates")
        statements = _plan(shop)
        assert [s.split()[0] for s in statements] == ["begin;"]  # one transaction
        query(shop.admin_dsn, statements[0])
        await captured(shop, updates)
        insert(shop, "keyless", 1)
        query(shop.dsn, "update keyless set body = 'y'")
        await routed(shop, 2)
    assert [op for _, op, _ in seen(shop)] == ["insert", "update"]
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


async def test_unmanaged_what_lost_its_key_is_in_the_plan(shop: ScratchDatabase) -> None:
    """Its updates fail until then, so every command has to say so: from when it is carried."""
    first = subscribe(shop.dsn, "public.keyed", ["insert"])
    for statement in _plan(shop):
        query(shop.admin_dsn, statement)
    async with running(shop, manage_publication=False):
        await captured(shop, first)
        query(shop.dsn, "alter table keyed drop constraint keyed_pkey")
        (created,) = _plan(shop)  # no more: the stream would not carry what is moved
        assert created.startswith("create publication")
        query(shop.admin_dsn, created)
        await eventually(lambda: asyncio.to_thread(_plan, shop), "the move")
        unmanaged = {"CDC_MANAGE_PUBLICATION": "false"}
        assert "drop table only" in cdc(shop, "check", **unmanaged).stdout
        assert "drop table only" in cdc(shop, "status", "--json").stdout
        assert cdc(shop, "apply", **unmanaged, CDC_ADMIN_DSN=shop.admin_dsn).returncode == 0
        assert _plan(shop) == []
        query(shop.dsn, "update keyed set body = 'y'")
        insert(shop, "keyed", 1)
        await routed(shop, 1)
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


def _plan(shop: ScratchDatabase) -> list[str]:
    shown = cdc(shop, "plan", "--json", CDC_MANAGE_PUBLICATION="false")
    assert shown.returncode in {0, 1}, shown.stderr
    return list(json.loads(shown.stdout)["statements"])


async def test_an_identity_that_went_frees_the_application(shop: ScratchDatabase) -> None:
    """Its updates failed from then on; the table moves once the stream carries the other one."""
    subscription = subscribe(shop.dsn, "public.keyed", ["insert"])
    async with running(shop):
        await captured(shop, subscription)
        insert(shop, "keyed", 1)
        query(shop.dsn, "alter table keyed drop constraint keyed_pkey")
        await eventually(lambda: published(shop, SECOND) == {"public.keyed"}, "the move")
        query(shop.dsn, "update keyed set body = 'y'")
        insert(shop, "keyed", 2)
        await routed(shop, 2)
    assert published(shop) == set()
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


async def test_what_is_about_to_begin_is_not_moved_from_under_it(
    shop: ScratchDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mark is in the log: from there on its rows count, and the stream has one publication."""
    async with running(shop):
        await eventually(lambda: slot_row(shop), "the slot")
        await eventually(
            lambda: value(shop.dsn, "select epoch from conductor.progress"), "a leader"
        )
        with psycopg.connect(shop.dsn) as holder:
            holder.execute("lock table conductor.activations in share mode")  # no stamp
            subscription = subscribe(shop.dsn, "public.keyed", ["insert"])
            await eventually(lambda: "subscriptions_marked" in capsys.readouterr().out, "the mark")
            query(shop.dsn, "alter table keyed drop constraint keyed_pkey")
            there = "select count(*) from pg_publication where pubname = %s"
            await eventually(lambda: value(shop.dsn, there, SECOND), "the second publication")
            insert(shop, "keyed", 1)
        await captured(shop, subscription)
        await eventually(lambda: published(shop, SECOND) == {"public.keyed"}, "the move")
        insert(shop, "keyed", 2)
        await routed(shop, 2)
    assert value(shop.dsn, "select count(*) from conductor.gaps") == 0


@pytest.mark.parametrize("is_temporary", [False, True])
async def test_a_recording_has_them_too(
    shop: ScratchDatabase, tmp_path: Path, *, is_temporary: bool
) -> None:
    """Also where the slot stands before the second publication: the recorder asks the progress."""
    keyed = subscribe(shop.dsn, "public.keyed")
    async with running(shop):
        await captured(shop, keyed)
        subscription = subscribe(shop.dsn, "public.keyless", ["insert"], task="second")
        await captured(shop, subscription)
    file = tmp_path / "recording"
    with file.open("w") as output:
        recorder = Recorder(settings_for(shop), output, temporary=is_temporary)
        task = asyncio.create_task(recorder.run())
        await eventually(lambda: file.stat().st_size, "the header")
        insert(shop, "keyless", 1)
        await eventually(lambda: "keyless" in file_events(file), "the insert")
        recorder.stop()
        await task


def file_events(file: Path) -> list[str]:
    """The tables of the inserts that a recording has so far."""
    with file.open() as lines:
        header, entries = read(lines)
        return [line["table"] for line in replay(header, entries) if line["op"] == "insert"]
