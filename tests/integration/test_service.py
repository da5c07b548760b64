"""The whole sidecar in one process of the test: exactly once across everything that can break."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from cdc.errors import (
    CdcError,
    ConfigError,
    PublicationDrift,
    PublicationMissing,
    QueueUnavailable,
    ServerDecodeError,
    SlotAhead,
    SlotForeign,
    SlotMissing,
    SourceUnavailable,
    SystemChanged,
    WalLevelTooLow,
)
from cdc.metrics import Metrics
from cdc.service import Service
from conductor.migrations import migrate
from tests.integration.sidecar import (
    ascii_shop,
    captured,
    drop_slot,
    eventually,
    jobs,
    published,
    query,
    routed,
    running,
    settings_for,
    slot_row,
    subscribe,
    terminate,
    value,
)
from tests.servers import NewDatabase, ScratchDatabase, StartServer, dsn_for
from tools.localpg.server import StopMode

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """A database with one captured table."""
    query(migrated.dsn, "create table t (id int primary key, body text)")
    subscribe(migrated.dsn, "public.t", ["insert"])
    return migrated


@asynccontextmanager
async def capturing(
    shop: ScratchDatabase, **changes: Any
) -> AsyncIterator[tuple[Service, asyncio.Task[None]]]:
    async with running(shop, **changes) as (service, task):
        await captured(shop, 1)
        yield service, task


def insert(shop: ScratchDatabase, *ids: int) -> None:
    query(shop.dsn, "insert into t select unnest(%s), 'x'", list(ids))


def ids(shop: ScratchDatabase) -> list[int]:
    return [payload["new"]["id"] for payload in jobs(shop)]


def leader_pid(shop: ScratchDatabase) -> int | None:
    slot = slot_row(shop)
    return None if slot is None else slot["active_pid"]


async def ends_with(shop: ScratchDatabase, error: type[CdcError], **changes: object) -> CdcError:
    """Run a sidecar until it ends by itself; return its error."""
    settings = settings_for(shop, **changes)
    with pytest.raises(error) as caught:
        async with asyncio.timeout(50):  # less than it tries by default
            await Service(settings, Metrics("test", settings.slot)).run()
    return caught.value


def gaps(shop: ScratchDatabase) -> list[tuple[str, str, bool]]:
    rows = query(
        shop.dsn,
        "select condition, policy, closed_at is null as open from conductor.gaps order by id",
    )
    return [(row["condition"], row["policy"], row["open"]) for row in rows]


def metric(service: Service, name: str, **labels: str) -> float | None:
    labels["slot"] = service._settings.slot
    return service._metrics.registry.get_sample_value(name, labels)


# --- nothing lost, nothing doubled --------------------------------------------------------------


async def test_what_is_committed_while_nobody_runs_is_routed_later(shop: ScratchDatabase) -> None:
    async with capturing(shop):
        insert(shop, 1)
        await routed(shop, 1)
    insert(shop, 2, 3)
    async with capturing(shop):
        await routed(shop, 3)
    assert ids(shop) == [1, 2, 3]


async def test_any_lost_connection_loses_and_doubles_nothing(shop: ScratchDatabase) -> None:
    name = f"cdc {shop.name}"
    victims = itertools.cycle((name, f"{name} stream", f"{name} listener", f"cdc sink {shop.name}"))
    async with capturing(shop) as (service, task):
        for number in range(1, 201):
            insert(shop, number)
            if number % 25 == 0:
                # Somebody leads again.
                await eventually(lambda n=number: len(ids(shop)) > n - 25, f"job {number - 24}")
                victim = next(victims)
                await eventually(lambda v=victim: terminate(shop, v), f"terminating {victim}")
        await routed(shop, 200)
        assert not task.done()
        assert metric(service, "cdc_reconnects_total", cause="source")
        assert metric(service, "cdc_reconnects_total", cause="queue")
    assert ids(shop) == list(range(1, 201))
    identities = query(
        shop.dsn,
        "select source_generation, source_lsn, source_ordinal, subscription from conductor.jobs"
        " group by 1, 2, 3, 4 having count(*) > 1",
    )
    assert identities == []


async def test_a_filter_that_fails_over_a_nul_is_a_dead_letter(new_database: NewDatabase) -> None:
    """The library quotes the pattern that it cannot compile, and PostgreSQL cannot hold that."""
    shop = new_database(migrated=True)
    query(shop.dsn, "create table t (id int primary key, doc json)")
    subscribe(shop.dsn, "public.t", ["insert"], when='"a".matches(new.doc.x)')
    async with capturing(shop) as (service, _):
        for number, pattern in enumerate(("(\\u0000", "a"), 1):
            query(shop.dsn, "insert into t values (%s, %s)", number, f'{{"x": "{pattern}"}}')
        await routed(shop, 1)
        assert metric(service, "cdc_reconnects_total", cause="queue") == 0
    assert ids(shop) == [2]
    (letter,) = query(shop.dsn, "select error from conductor.dead_letters")
    assert letter["error"].startswith("FilterFailed")


async def test_a_server_that_crashes_loses_and_doubles_nothing(start_server: StartServer) -> None:
    server = start_server(durable=True)
    migrate(server.dsn())
    shop = ScratchDatabase("restart", server.dsn(), server.dsn(), server.dsn())
    query(shop.dsn, "create table t (id int primary key, body text)")
    subscribe(shop.dsn, "public.t", ["insert"])
    async with capturing(shop, source_dsn=server.dsn()):
        for number in range(1, 40):
            insert(shop, number)
        await asyncio.to_thread(server.restart, StopMode.IMMEDIATE)
        insert(shop, 40)
        await routed(shop, 40)
    assert ids(shop) == list(range(1, 41))


async def test_the_queue_may_be_another_database(new_database: NewDatabase) -> None:
    source, queue = new_database(), new_database(migrated=True)
    query(source.dsn, "create table t (id int primary key, body text)")
    subscribe(queue.dsn, "public.t", ["insert"])
    async with running(source, queue_dsn=queue.source_dsn, slot=queue.name):
        await captured(queue, 1)
        insert(source, 1, 2)
        await routed(queue, 2)
        terminate(queue, f"cdc sink {queue.name}")
        insert(source, 3)
        await routed(queue, 3)
    drop_slot(queue)


async def test_a_standby_takes_over(shop: ScratchDatabase) -> None:
    async with capturing(shop) as (first, _), running(shop) as (second, _):
        await eventually(lambda: second.why_not_ready() is None, "a ready standby")
        assert metric(first, "cdc_leader") == 1
        assert metric(second, "cdc_leader") == 0
        insert(shop, 1)
        await routed(shop, 1)
        first.stop()
        insert(shop, 2)
        await eventually(lambda: metric(second, "cdc_leader") == 1, "a new leader")
        await routed(shop, 2)
    assert value(shop.dsn, "select epoch from conductor.progress") == 2


async def test_stopping_acknowledges_and_frees_the_slot(shop: ScratchDatabase) -> None:
    async with capturing(shop) as (service, task):
        insert(shop, *range(1, 5001))
        await eventually(lambda: jobs(shop), "a job")
        service.stop()
        async with asyncio.timeout(60):
            await task
    await eventually(lambda: leader_pid(shop) is None, "a free slot")
    slot = slot_row(shop)
    progress = query(
        shop.dsn,
        "select acknowledged_lsn::text as acknowledged, acknowledged_lsn >= routed_lsn as is_all"
        " from conductor.progress",
    )[0]
    assert slot is not None
    # Beyond what was routed when a pause came before the stop: then it is an idle position.
    assert progress == {"acknowledged": slot["confirmed_flush_lsn"], "is_all": True}
    assert ids(shop) == list(range(1, 5001))


async def test_stopping_a_standby_or_a_sidecar_without_a_server_is_quick(
    shop: ScratchDatabase,
) -> None:
    never_s = 3600.0  # so neither is given up
    async with capturing(shop), running(shop, stop_timeout_s=never_s) as (standby, waiting):
        await eventually(lambda: standby.why_not_ready() is None, "a ready standby")
        standby.stop()
        await eventually(waiting.done, "the end of the standby")
    nowhere = dsn_for(shop.source_dsn, host="127.0.0.1", port="1")
    async with running(shop, source_dsn=nowhere, stop_timeout_s=never_s) as (lonely, _):
        await eventually(lambda: "SourceUnavailable" in (lonely.why_not_ready() or ""), "a failure")
        assert lonely.why_dead() is None


# --- conditions: never silent -------------------------------------------------------------------


async def test_a_missing_slot_stops_and_leaves_a_gap(shop: ScratchDatabase) -> None:
    async with capturing(shop):
        insert(shop, 1)
        await routed(shop, 1)
    drop_slot(shop)
    insert(shop, 2)
    for _ in range(2):  # restarted by its supervisor, it adds no second row
        error = await ends_with(shop, SlotMissing)
        assert error.exit_code == 65
    assert gaps(shop) == [("slot_missing", "stop", True)]
    async with capturing(shop, gap_policy="recreate"):
        await eventually(lambda: leader_pid(shop), "a leader")
        insert(shop, 3)
        await routed(shop, 2)
    assert ids(shop) == [1, 3]
    assert gaps(shop) == [("slot_missing", "recreate", False)]
    generations = query(shop.dsn, "select distinct source_generation as g from conductor.jobs")
    assert len(generations) == 2


async def test_a_new_slot_that_has_to_wait_for_a_writer_is_tried_again(
    shop: ScratchDatabase,
) -> None:
    async with capturing(shop):
        insert(shop, 1)
        await routed(shop, 1)
    drop_slot(shop)
    tries = (
        "select count(*) from pg_stat_activity"
        " where query like 'CREATE_REPLICATION_SLOT%%' and state = 'active' and datname = %s"
    )
    with psycopg.connect(shop.dsn) as writer:
        writer.execute("insert into t values (2)")
        async with running(shop, gap_policy="recreate", slot_creation_deadline_s=0.6):
            for wanted in (1, 0, 1):
                await eventually(
                    lambda wanted=wanted: value(shop.admin_dsn, tries, shop.name) == wanted,
                    "another try",
                )
            writer.commit()
            streams = "select state = 'streaming' from conductor.progress"
            await eventually(lambda: value(shop.dsn, streams), "the slot")
            insert(shop, 3)
            await routed(shop, 2)
    assert ids(shop) == [1, 3]
    assert gaps(shop) == [("slot_missing", "recreate", False)]


async def test_a_slot_that_somebody_else_consumed_stops(shop: ScratchDatabase) -> None:
    async with capturing(shop):
        pass
    insert(shop, 1)
    query(
        shop.source_dsn,
        "select pg_replication_slot_advance(%s, pg_current_wal_flush_lsn())",
        shop.name,
    )
    await ends_with(shop, SlotAhead)
    assert gaps(shop) == [("slot_ahead", "stop", True)]


async def test_a_foreign_slot_is_not_touched(shop: ScratchDatabase) -> None:
    query(shop.source_dsn, "select pg_create_logical_replication_slot(%s, 'pgoutput')", shop.name)
    error = await ends_with(shop, SlotForeign, gap_policy="recreate")
    assert error.exit_code == 65
    assert slot_row(shop) is not None


async def test_another_system_stops(shop: ScratchDatabase) -> None:
    async with capturing(shop):
        pass
    query(shop.dsn, "update conductor.progress set system_identifier = '1'")
    await ends_with(shop, SystemChanged)
    async with capturing(shop, gap_policy="recreate"):
        await eventually(lambda: not gaps(shop)[0][2], "a closed gap")
        await captured(shop, 1)
        insert(shop, 1)
        await routed(shop, 1)


async def test_a_table_taken_out_while_running_is_drift(shop: ScratchDatabase) -> None:
    settings = settings_for(shop)
    service = Service(settings, Metrics("test", settings.slot))
    task = asyncio.create_task(service.run())
    await captured(shop, 1)
    query(shop.source_dsn, "alter publication conductor drop table t")
    with pytest.raises(PublicationDrift) as caught:
        await asyncio.wait_for(task, 60)
    assert caught.value.exit_code == 65
    assert gaps(shop) == [("publication_drift", "stop", True)]
    assert metric(service, "cdc_conditions_total", condition="publication_drift") == 1
    async with capturing(shop, gap_policy="recreate"):
        await eventually(lambda: published(shop) == {"public.t"}, "the table back")
        await eventually(lambda: leader_pid(shop), "a leader")
        insert(shop, 2)
        await routed(shop, 1)


async def test_a_publication_dropped_while_running_is_missing(shop: ScratchDatabase) -> None:
    async with capturing(shop, gap_policy="recreate"):
        query(shop.source_dsn, "drop publication conductor")
        await eventually(lambda: published(shop) == {"public.t"}, "the publication back")
        await eventually(lambda: gaps(shop) and not gaps(shop)[0][2], "a closed gap")
        await eventually(lambda: leader_pid(shop), "a leader")
        insert(shop, 1)
        await routed(shop, 1)
    assert gaps(shop)[0][0] == "publication_missing"


async def test_a_publication_dropped_while_stopped_is_missing(shop: ScratchDatabase) -> None:
    async with capturing(shop):
        pass
    query(shop.source_dsn, "drop publication conductor")
    await ends_with(shop, PublicationMissing)


async def test_what_the_server_cannot_decode_stops_after_a_few_attempts(
    start_server: StartServer,
) -> None:
    shop = ascii_shop(start_server())
    async with capturing(shop):
        insert(shop, 1)
        await routed(shop, 1)
    query(shop.dsn, "insert into t values (2, convert_from('\\xff', 'SQL_ASCII'))")
    metrics = Metrics("test", shop.name)
    with pytest.raises(ServerDecodeError) as caught:
        await Service(settings_for(shop), metrics).run()
    assert caught.value.exit_code == 65
    assert gaps(shop) == [("server_decode_error", "stop", True)]
    labels = {"slot": shop.name, "condition": "server_decode_error"}
    assert metrics.registry.get_sample_value("cdc_conditions_total", labels) == 1


# --- it refuses what it cannot do ---------------------------------------------------------------


async def test_an_unreachable_server_is_given_up(shop: ScratchDatabase) -> None:
    nowhere = dsn_for(shop.source_dsn, host="127.0.0.1", port="1")
    error = await ends_with(shop, SourceUnavailable, source_dsn=nowhere, give_up_after_s=0.5)
    assert error.exit_code == 69
    error = await ends_with(shop, QueueUnavailable, queue_dsn=nowhere, give_up_after_s=0.5)
    assert error.exit_code == 69


async def test_a_database_without_the_schema_is_a_matter_of_configuration(
    database: ScratchDatabase,
) -> None:
    error = await ends_with(database, ConfigError)
    assert "conductor migrate" in error.hint


async def test_wal_level_below_logical_is_named(start_server: StartServer) -> None:
    server = start_server(settings={"wal_level": "replica"})
    shop = ScratchDatabase("replica", server.dsn(), server.dsn(), server.dsn())
    error = await ends_with(shop, WalLevelTooLow)
    assert (error.exit_code, "wal_level = logical" in error.hint) == (78, True)


async def test_a_taken_port_is_named(shop: ScratchDatabase) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        await ends_with(shop, ConfigError, metrics_host="127.0.0.1", metrics_port=port)


# --- it harms nobody ----------------------------------------------------------------------------


async def test_an_idle_slot_moves_past_what_is_not_published(shop: ScratchDatabase) -> None:
    query(shop.dsn, "create table noise (body text)")
    async with capturing(shop):
        before = value(shop.dsn, "select pg_current_wal_lsn()::text")
        for _ in range(20):
            query(
                shop.dsn, "insert into noise select repeat('x', 1000) from generate_series(1, 1000)"
            )
        await eventually(
            lambda: value(
                shop.dsn,
                "select confirmed_flush_lsn > %s::pg_lsn from pg_replication_slots"
                " where slot_name = %s",
                before,
                shop.name,
            ),
            "the slot to move",
        )


async def test_a_slow_queue_keeps_the_stream_alive(shop: ScratchDatabase) -> None:
    """The server's walsender would drop a client that is silent for its timeout."""
    async with capturing(shop, wal_sender_timeout_s=5) as (service, _):
        with psycopg.connect(shop.admin_dsn) as holder:
            holder.execute("lock table conductor.jobs in exclusive mode")
            walsender = leader_pid(shop)
            insert(shop, *range(1, 20_001))
            started_s = asyncio.get_running_loop().time()
            await eventually(
                lambda: asyncio.get_running_loop().time() - started_s > 6.5, "a long wait"
            )
            assert leader_pid(shop) == walsender
            assert service.why_dead() is None
        await routed(shop, 20_000)


async def test_stopping_does_not_wait_for_a_queue_that_is_stuck(shop: ScratchDatabase) -> None:
    async with capturing(shop, stop_timeout_s=0.5) as (service, task):
        with psycopg.connect(shop.admin_dsn) as holder:
            holder.execute("lock table conductor.jobs in exclusive mode")
            insert(shop, 1)
            await eventually(
                lambda: value(shop.admin_dsn, "select true from pg_locks where not granted"),
                "a waiting sink",
            )
            service.stop()
            await eventually(task.done, "its end")  # while the queue is as stuck as before
    async with capturing(shop):
        await routed(shop, 1)
