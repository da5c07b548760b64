"""What befalls a source, for real: each is a condition with its name, status 65, gap and metric.

The queue is in another server, so that what happens to the source does not happen to the progress.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cdc import session
from cdc.errors import CdcError
from cdc.metrics import Metrics
from cdc.service import Service
from tests.integration.sidecar import (
    captured,
    cdc,
    eventually,
    jobs,
    query,
    routed,
    running,
    settings_for,
    subscribe,
    value,
)
from tests.servers import NewDatabase, ScratchDatabase, StartServer
from tools.localpg import PostgresServer

pytestmark = pytest.mark.anyio

SLOT = "faulty"
SMALL_WAL = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}


@dataclass(frozen=True)
class Shop:
    """A source server whose slot has routed one change, and its queue elsewhere; nobody runs."""

    server: PostgresServer
    database: ScratchDatabase  # the queue, with the source's connection string and slot
    queue_dsn: str

    @property
    def places(self) -> dict[str, Any]:
        """Settings of a sidecar."""
        return {"source_dsn": self.server.dsn(), "queue_dsn": self.queue_dsn}

    def on(self, server: PostgresServer) -> "Shop":
        """The same queue with another source."""
        database = replace(self.database, source_dsn=server.dsn())
        return replace(self, server=server, database=database)

    def run(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        """Run a statement on the source."""
        return query(self.server.dsn(), statement, *parameters)

    def insert(self, *ids: int) -> None:
        self.run("insert into t select unnest(%s), repeat('x', 1000)", list(ids))

    @property
    def ids(self) -> list[int]:
        """The rows that have jobs, in order."""
        return [payload["new"]["id"] for payload in jobs(self.database)]

    async def route(self, *ids: int) -> None:
        """Run a sidecar until these rows have jobs."""
        async with running(self.database, **self.places):
            await captured(self.database, 1)
            self.insert(*ids)
            await routed(self.database, len(self.ids) + len(set(ids) - set(self.ids)))


@pytest.fixture
async def shop(start_server: StartServer, new_database: NewDatabase) -> Shop:
    return await open_shop(start_server, new_database)


async def open_shop(start_server: StartServer, new_database: NewDatabase, **settings: str) -> Shop:
    server, queue = start_server(settings=settings), new_database(migrated=True)
    database = ScratchDatabase(SLOT, queue.dsn, server.dsn(), queue.admin_dsn)
    query(server.dsn(), "create table t (id int primary key, body text)")
    subscribe(queue.dsn, "public.t", ["insert"])
    shop = Shop(server, database, queue.source_dsn)
    await shop.route(1)
    return shop


def gaps(shop: Shop) -> list[tuple[Any, ...]]:
    rows = query(
        shop.database.dsn,
        "select condition, policy, closed_at is null as open from conductor.gaps order by id",
    )
    return [tuple(row.values()) for row in rows]


async def shown_everywhere(shop: Shop, condition: str) -> None:
    """A condition's name, as a supervisor, an operator, a query and a dashboard see it."""
    environment = {"CDC_QUEUE_DSN": shop.queue_dsn}
    done = await asyncio.to_thread(cdc, shop.database, "run", **environment)
    assert done.returncode == 65, done.stderr
    *_, error, hint = done.stderr.strip().splitlines()
    assert (error.startswith("error: "), hint.startswith("hint: ")) == (True, True)
    assert f'"condition": "{condition}"' in done.stderr
    assert gaps(shop) == [(condition, "stop", True)]
    done = await asyncio.to_thread(cdc, shop.database, "status", "--json", **environment)
    status = json.loads(done.stdout)
    assert status["condition"] == condition
    assert [gap["condition"] for gap in status["gaps"]] == [condition]
    done = await asyncio.to_thread(cdc, shop.database, "check", **environment)
    assert f" is open: {condition} since " in done.stdout, done.stdout
    metrics = Metrics("test", SLOT)
    with pytest.raises(CdcError) as caught:
        await Service(settings_for(shop.database, **shop.places), metrics).run()
    assert (caught.value.condition, caught.value.exit_code) == (condition, 65)
    labels = {"slot": SLOT, "condition": condition}
    assert metrics.registry.get_sample_value("cdc_conditions_total", labels) == 1
    assert gaps(shop) == [(condition, "stop", True)]  # however often it is started


async def accepted(shop: Shop, condition: str, number: int) -> None:
    """The other policy: a new slot, a closed gap, and what follows is captured."""
    async with running(shop.database, **shop.places, gap_policy="recreate"):
        await eventually(lambda: gaps(shop) == [(condition, "recreate", False)], "a closed gap")
        await captured(shop.database, 1)
        await eventually(
            lambda: shop.run("select 1 from pg_replication_slots where active"),
            "a leader",
        )
        shop.insert(number)
        await eventually(lambda: number in shop.ids, "what follows")


def restore(server: PostgresServer, copy: str) -> None:
    """Put a copy of the data folder in the place of a stopped server's."""
    shutil.rmtree(server.data)
    subprocess.run(["cp", "-a", server.home / copy, server.data], check=True)


def back_up(server: PostgresServer, copy: str) -> None:
    """Copy the data folder of a server, stopped for it."""
    server.stop()
    subprocess.run(["cp", "-a", server.data, server.home / copy], check=True)
    server.start()


def stand_by(primary: PostgresServer, standby: PostgresServer) -> None:
    """Make a server the standby of another one, slots included."""
    back_up(primary, "base")
    standby.stop()
    shutil.rmtree(standby.data)
    subprocess.run(["cp", "-a", primary.home / "base", standby.data], check=True)
    with (standby.data / "postgresql.auto.conf").open("a") as settings:
        place = f"host={primary.socket_folder} port={primary.port} user=postgres"
        settings.write(f"primary_conninfo = '{place}'\n")
    (standby.data / "standby.signal").touch()
    standby.start()


# --- the server -----------------------------------------------------------------------------------


async def test_a_restored_copy_is_behind(shop: Shop) -> None:
    back_up(shop.server, "copy")
    await shop.route(*range(2, 500))
    shop.server.stop()
    restore(shop.server, "copy")
    shop.server.start()
    await shown_everywhere(shop, "server_behind")
    await accepted(shop, "server_behind", 1000)


async def test_another_cluster_is_another_system(shop: Shop, start_server: StartServer) -> None:
    other = shop.on(start_server())
    other.run("create table t (id int primary key, body text)")
    await shown_everywhere(other, "system_changed")
    await accepted(other, "system_changed", 1000)


async def test_a_standby_promoted_too_early_left_the_timeline_below_progress(
    shop: Shop, start_server: StartServer
) -> None:
    standby = start_server()
    stand_by(shop.server, standby)
    standby.stop()
    await shop.route(*range(2, 500))
    shop.server.stop()
    standby.start()
    promoted = shop.on(standby)
    promoted.run("select pg_promote()")
    promoted.run("select txid_current() from generate_series(1, 3)")
    await shown_everywhere(promoted, "timeline_switched")
    await accepted(promoted, "timeline_switched", 1000)


async def test_a_standby_that_had_everything_is_followed(
    shop: Shop, start_server: StartServer
) -> None:
    standby = start_server()
    stand_by(shop.server, standby)
    await shop.route(2, 3)
    routed_lsn = value(shop.database.dsn, "select routed_lsn::text from conductor.progress")
    await eventually(
        lambda: value(standby.dsn(), "select pg_last_wal_replay_lsn() >= %s::pg_lsn", routed_lsn),
        "the standby to have replayed",
    )
    promoted = shop.on(standby)
    found = await asyncio.to_thread(cdc, promoted.database, "check", CDC_QUEUE_DSN=shop.queue_dsn)
    assert "warning: the source is a standby" in found.stdout, found.stdout
    shop.server.stop()
    promoted.run("select pg_promote()")
    await promoted.route(4, 5)
    assert promoted.ids == [1, 2, 3, 4, 5]
    assert gaps(promoted) == []
    assert value(shop.database.dsn, "select timeline from conductor.progress") == 2


# --- the slot -------------------------------------------------------------------------------------


def drop_and(statement: str) -> Callable[[Shop], None]:
    def break_it(shop: Shop) -> None:
        shop.run("select pg_drop_replication_slot(%s)", SLOT)
        shop.run(statement, SLOT)

    return break_it


def advance(shop: Shop) -> None:
    shop.insert(2)
    shop.run("select pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())", SLOT)


@pytest.mark.parametrize(
    ("condition", "break_it"),
    [
        ("slot_missing", drop_and("select %s")),
        ("slot_ahead", advance),
        ("slot_foreign", drop_and("select pg_create_physical_replication_slot(%s)")),
        (
            "slot_two_phase",
            drop_and("select pg_create_logical_replication_slot(%s, 'pgoutput', false, true)"),
        ),
    ],
)
async def test_conditions_of_the_slot(
    shop: Shop, condition: str, break_it: Callable[[Shop], None]
) -> None:
    break_it(shop)
    await shown_everywhere(shop, condition)


async def test_a_slot_whose_wal_was_removed_is_lost(
    start_server: StartServer, new_database: NewDatabase
) -> None:
    shop = await open_shop(start_server, new_database, **SMALL_WAL)

    def lose() -> bool:
        shop.run("select pg_logical_emit_message(false, 'x', repeat('x', 9000000))")
        shop.run("select pg_switch_wal()")
        shop.run("checkpoint")
        return bool(shop.run("select 1 from pg_replication_slots where wal_status = 'lost'"))

    await eventually(lose, "a lost slot")
    await shown_everywhere(shop, "slot_lost")
    await accepted(shop, "slot_lost", 1000)


# --- the publication ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "statement"),
    [
        ("publication_missing", "drop publication conductor"),
        ("publication_drift", "alter publication conductor set (publish = 'insert')"),
        ("table_missing", "drop table t"),
    ],
)
async def test_conditions_of_the_publication(shop: Shop, condition: str, statement: str) -> None:
    shop.run(statement)
    await shown_everywhere(shop, condition)


async def test_a_publication_dropped_and_made_anew_while_stopped_is_no_silence(shop: Shop) -> None:
    """What was written in between is lost, and said to be, whether or not the server errs."""
    shop.run("drop publication conductor")
    shop.insert(2)
    shop.run("create publication conductor for table t with (publish_via_partition_root = true)")
    shop.insert(3)
    async with running(shop.database, **shop.places, gap_policy="recreate"):
        await eventually(lambda: gaps(shop) and not gaps(shop)[0][2], "a closed gap")


# --- standbys that the slot waits for -------------------------------------------------------------


@pytest.mark.pg(18)
async def test_a_dead_standby_that_the_slot_waits_for_is_named_and_over_with_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MONITOR_EVERY_S", 0.2)
    shop.run("select pg_create_physical_replication_slot('dead', true)")
    shop.run("alter system set synchronized_standby_slots = 'dead'")
    shop.run("select pg_reload_conf()")
    metrics = Metrics("test", SLOT)
    async with running(shop.database, **shop.places, metrics=metrics):
        await captured(shop.database, 1)
        shop.insert(2)
        waiting = ("standby_slots_waiting", "stop", True)
        await eventually(lambda: gaps(shop) == [waiting], "the condition")
        labels = {"slot": SLOT, "condition": "standby_slots_waiting"}
        assert metrics.registry.get_sample_value("cdc_conditions_total", labels) == 1
        done = await asyncio.to_thread(
            cdc, shop.database, "status", "--json", CDC_QUEUE_DSN=shop.queue_dsn
        )
        assert json.loads(done.stdout)["condition"] == "standby_slots_waiting"
        assert shop.ids == [1]
        shop.run("alter system reset synchronized_standby_slots")
        shop.run("select pg_reload_conf()")
        await routed(shop.database, 2)
        await eventually(lambda: gaps(shop) == [(*waiting[:2], False)], "its end")
