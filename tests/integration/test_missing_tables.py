"""A captured table that is dropped, renamed or replaced: one gap, and a way out by each policy."""

import asyncio
from typing import Any

import psycopg
import pytest

from cdc.errors import PublicationDrift, TableMissing
from cdc.metrics import Metrics
from cdc.reconciliation import Reconciliation
from cdc.service import Service
from cdc.status import read_status
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
    value,
)
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """A database with two captured tables."""
    for name in ("a", "b"):
        query(migrated.dsn, f"create table {name} (id int primary key, body text)")
        subscribe(migrated.dsn, f"public.{name}", ["insert"], task=f"task_{name}")
    return migrated


def gaps(shop: ScratchDatabase) -> list[tuple[Any, ...]]:
    rows = query(
        shop.dsn,
        "select condition, policy, closed_at is null as open, detail ->> 'table' as name"
        " from conductor.gaps order by id",
    )
    return [tuple(row.values()) for row in rows]


async def run_into(shop: ScratchDatabase, error: type[Exception], **changes: Any) -> Exception:
    settings = settings_for(shop, **changes)
    with pytest.raises(error) as caught:
        await Service(settings, Metrics("test", settings.slot)).run()
    return caught.value


async def capture_both(shop: ScratchDatabase) -> None:
    async with running(shop):
        await captured(shop, 1)
        await captured(shop, 2)


def interrupted(shop: ScratchDatabase) -> bool:
    return gaps(shop) == [("table_missing", "continue", True, "a")]


def insert(shop: ScratchDatabase, table: str, *ids: int) -> None:
    query(shop.dsn, f"insert into {table} select unnest(%s), 'x'", list(ids))


def ids(shop: ScratchDatabase) -> list[int]:
    return [payload["new"]["id"] for payload in jobs(shop)]


async def test_stop_names_the_task_to_retire(shop: ScratchDatabase) -> None:
    await capture_both(shop)
    query(shop.dsn, "drop table a")
    for _ in range(2):
        error = await run_into(shop, TableMissing)
        assert isinstance(error, TableMissing)
        assert (error.exit_code, "public.a" in str(error)) == (65, True)
        assert "deploy task task_a without its trigger" in error.hint
    assert gaps(shop) == [("table_missing", "stop", True, "a")]
    assert cdc(shop, "check").returncode == 65
    assert "-- table_missing: table public.a" in cdc(shop, "plan").stdout
    with pytest.raises(TableMissing):
        async with Reconciliation.open(settings_for(shop)) as reconciliation:
            await reconciliation.apply(accept_gap=True)
    query(shop.dsn, "update conductor.subscriptions set retired_at = now() where id = 1")
    async with running(shop):
        await eventually(lambda: stamps(shop, 1)[1], "the end of the retired one")
        insert(shop, "b", 1)
        await routed(shop, 1)
        await eventually(lambda: not gaps(shop)[0][2], "a closed gap")


async def test_stop_goes_on_when_the_table_is_there_again(shop: ScratchDatabase) -> None:
    await capture_both(shop)
    query(shop.dsn, "drop table a")
    await run_into(shop, TableMissing)
    query(shop.dsn, "create table a (id int primary key, body text)")
    async with running(shop):
        await eventually(lambda: not gaps(shop)[0][2], "a closed gap")
        insert(shop, "a", 1)
        await routed(shop, 1)


async def test_recreate_goes_on_with_the_others_and_keeps_the_slot(shop: ScratchDatabase) -> None:
    generation = "select generation from conductor.progress"
    async with running(shop, gap_policy="recreate") as (service, _):
        await captured(shop, 1)
        await captured(shop, 2)
        before = value(shop.dsn, generation)
        insert(shop, "a", 1)
        query(shop.dsn, "drop table a")
        await eventually(lambda: interrupted(shop), "the gap of a")
        insert(shop, "b", 2)
        await routed(shop, 2)
        settings = settings_for(shop, gap_policy="recreate")
        labels = {"slot": settings.slot, "condition": "table_missing"}
        sample = service._metrics.registry.get_sample_value
        assert sample("cdc_conditions_total", labels) == 1
        refused = {"slot": settings.slot, "state": "refused"}
        await eventually(lambda: sample("cdc_subscriptions", refused) == 1, "it is reported")
        states = [s["state"] for s in (await read_status(settings))["subscriptions"]]
        assert states == ["interrupted", "active"]
        assert cdc(shop, "check", CDC_GAP_POLICY="recreate").returncode == 0
    async with running(shop, gap_policy="recreate"):  # started again, it adds no row
        insert(shop, "b", 3)
        await routed(shop, 3)
        assert interrupted(shop)
        query(shop.dsn, "create table a (id int primary key, body text)")
        await eventually(lambda: "public.a" in published(shop), "a published")
        await eventually(lambda: gaps(shop) == [("table_missing", "continue", False, "a")], "over")
        insert(shop, "a", 4)
        await routed(shop, 4)
    assert ids(shop) == [1, 2, 3, 4]
    assert value(shop.dsn, generation) == before
    (row,) = query(shop.dsn, "select from_lsn < to_lsn as moved from conductor.gaps")
    assert row == {"moved": True}


async def test_a_gap_ends_when_earlier_writers_have_ended(shop: ScratchDatabase) -> None:
    await capture_both(shop)
    query(shop.dsn, "create table c (id int primary key)")
    async with running(shop, gap_policy="recreate", manage_publication=False):
        query(shop.dsn, "drop table a")
        await eventually(lambda: interrupted(shop), "the gap of a")
        query(shop.dsn, "create table a (id int primary key, body text)")
        with psycopg.connect(shop.dsn) as writer:
            writer.execute("insert into a values (1, 'before it is published')")
            query(shop.source_dsn, "alter publication conductor add table a, c")
            subscribe(shop.dsn, "public.c", task="task_c")
            await captured(shop, 3)  # so it has looked
            assert interrupted(shop)
        await eventually(lambda: not gaps(shop)[0][2], "a closed gap")


@pytest.mark.parametrize(
    "change",
    [
        "alter table a rename to renamed",
        "alter table a rename to renamed; create view a as select * from renamed",
    ],
)
async def test_a_renamed_or_replaced_table_is_missing(shop: ScratchDatabase, change: str) -> None:
    await capture_both(shop)
    query(shop.dsn, change)
    await run_into(shop, TableMissing)
    async with running(shop, gap_policy="recreate"):
        insert(shop, "renamed", 1)
        insert(shop, "b", 2)
        await routed(shop, 1)
    assert ids(shop) == [2]
    assert (slot_row(shop) is not None, len(gaps(shop))) == (True, 1)


async def test_a_table_that_was_made_anew_unseen_is_drift(shop: ScratchDatabase) -> None:
    await capture_both(shop)
    query(shop.dsn, "drop table a")
    query(shop.dsn, "create table a (id int primary key, body text)")
    await run_into(shop, PublicationDrift)
    async with running(shop, gap_policy="recreate"):
        await eventually(lambda: not gaps(shop)[0][2], "a closed gap")
        await eventually(lambda: (slot_row(shop) or {})["active_pid"], "a leader")
        insert(shop, "a", 1)
        await routed(shop, 1)


async def test_drift_is_a_gap_from_where_all_was_well(shop: ScratchDatabase) -> None:
    settings = settings_for(shop)
    task = asyncio.create_task(Service(settings, Metrics("test", settings.slot)).run())
    await captured(shop, 1)
    await captured(shop, 2)
    query(shop.source_dsn, "alter publication conductor drop table a")
    changed = value(shop.dsn, "select pg_current_wal_lsn()::text")
    insert(shop, "a", 1)
    insert(shop, "b", 2)
    await routed(shop, 1)
    with pytest.raises(PublicationDrift):
        await asyncio.wait_for(task, 60)
    assert value(shop.dsn, "select from_lsn <= %s::pg_lsn from conductor.gaps", changed) is True
