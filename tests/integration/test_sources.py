"""Several source databases, each with its sidecar, and one queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from cdc.errors import SourceTaken
from cdc.metrics import Metrics
from cdc.service import Service
from conductor import (
    Conductor,
    Context,
    Database,
    Insert,
    OnChange,
    Orchestrator,
    TableRow,
    define_task,
)
from conductor.errors import RegistrationRefused, UnknownColumn
from tests.integration.conftest import Queue
from tests.integration.sidecar import (
    captured,
    cdc,
    drop_slot,
    eventually,
    jobs,
    query,
    routed,
    running,
    settings_for,
    subscribe,
    value,
)
from tests.servers import Cluster, NewDatabase, ScratchDatabase, StartServer

pytestmark = pytest.mark.anyio

LAST = 3000


class Orders(TableRow, table="public.orders"):
    id: int
    note: str


class Invoices(TableRow, table="public.invoices"):
    id: int
    total: int


def module(*models: type[TableRow]) -> ModuleType:
    made = ModuleType("models")
    for model in models:
        setattr(made, model.__name__, model)
    return made


def sources() -> list[Database]:
    """What an application says: its own models, and those of the database of billing."""
    shop, billing = module(Orders), module(Invoices)
    return [Database.from_module(shop), Database.from_module(billing, source="billing")]


def test_triggers_are_checked_against_the_models_of_their_source() -> None:
    conductor = Conductor("", database=sources())
    with pytest.raises(UnknownColumn):
        conductor.task("t", OnChange("public.invoices", columns=("totl",), source="billing"))(
            lambda _event, _ctx: None
        )
    trigger = OnChange(Invoices, "insert")
    assert (trigger.source, OnChange(Orders).source) == ("billing", "default")
    assert OnChange(Orders, source="archive").source == "archive"
    assert OnChange("public.invoices").source == "default"


async def test_two_sources_are_routed_once_each_while_their_sidecars_die(
    queue: Queue, new_database: NewDatabase
) -> None:
    shop, billing = new_database(), new_database()
    query(shop.dsn, "create table orders (id int primary key, note text)")
    query(billing.dsn, "create table invoices (id int primary key, total int)")
    # A table of that name in the queue's database as well, of another shape: nobody looks there.
    query(queue.database.dsn, "create table invoices (nothing text)")
    conductor = Conductor(queue.database.dsn, database=sources())

    @conductor.task("ordered", OnChange(Orders, "insert"))
    async def ordered(event: Insert[Orders], _ctx: Context[None]) -> None: ...

    @conductor.task("billed", OnChange(Invoices, "insert"))
    async def billed(event: Insert[Invoices], _ctx: Context[None]) -> None: ...

    orchestrator = Orchestrator(conductor)
    sidecars = {shop: "default", billing: "billing"}

    def start(database: ScratchDatabase) -> asyncio.Task[None]:
        settings = settings_for(
            database, queue_dsn=queue.database.dsn, source=sidecars[database], slot=database.name
        )
        return asyncio.create_task(Service(settings, Metrics("test", database.name)).run())

    running = {database: start(database) for database in sidecars}
    await queue.until("select count(*) = 2 from conductor.progress")  # says where the tables are
    await orchestrator.start(wait_captured_s=60)
    for first in range(1, LAST, 300):
        numbers = (first, first + 299)
        write = "insert into orders select i, 'n' from generate_series(%s::int, %s) i"
        await asyncio.to_thread(query, shop.dsn, write, *numbers)
        write = "insert into invoices select i, i from generate_series(%s::int, %s) i"
        await asyncio.to_thread(query, billing.dsn, write, *numbers)
        dying = shop if first % 600 == 1 else billing
        running[dying].cancel()
        await asyncio.gather(running[dying], return_exceptions=True)
        running[dying] = start(dying)
    counted = "select count(*) >= %s from conductor.history"
    await queue.until(counted, 2 * LAST)
    await orchestrator.stop()
    for sidecar in running.values():
        sidecar.cancel()
    await asyncio.gather(*running.values(), return_exceptions=True)
    await conductor.close()
    rows = await queue.rows(
        "select task, (payload -> 'new' ->> 'id')::int as id, source_generation as generation"
        " from conductor.history order by task, id"
    )
    for task in ("ordered", "billed"):
        of_task = [row for row in rows if row["task"] == task]
        assert [row["id"] for row in of_task] == list(range(1, LAST + 1))
        assert len({row["generation"] for row in of_task}) == 1
    assert len({row["generation"] for row in rows}) == 2
    progress = await queue.rows("select slot, source from conductor.progress order by source")
    assert [(row["slot"], row["source"]) for row in progress] == [
        (billing.name, "billing"),
        (shop.name, "default"),
    ]


def waiting(dsn: str, **options: Any) -> Conductor:
    """An application whose task waits for an invoice of the source billing."""
    wait = define_task("wait", payload=int, returns=Any)
    conductor = Conductor(dsn, tasks=[wait], database=sources(), **options)
    issued = OnChange(Invoices, "insert")

    @conductor.task(wait, waits=[issued])
    async def handler(event: Any, ctx: Context[None]) -> Any:
        found = await ctx.wait_for_change("issued", issued, match={"id": event.payload})
        return found.new.total

    return conductor


async def test_what_must_ask_another_source_is_refused_without_its_dsn(queue: Queue) -> None:
    conductor = waiting(queue.database.dsn)
    with pytest.raises(RegistrationRefused, match="'wait' waits for changes of source 'billing'"):
        await Orchestrator(conductor).start()
    await conductor.close()
    conductor = Conductor(queue.database.dsn, database=sources())

    @conductor.task("billed", OnChange(Invoices, "insert", refetch=True))
    async def billed(event: Insert[Invoices], _ctx: Context[None]) -> None: ...

    with pytest.raises(RegistrationRefused, match="reads rows again") as refused:
        await Orchestrator(conductor).start()
    assert "CONDUCTOR_SOURCES" in str(refused.value.hint)
    await conductor.close()


@pytest.fixture
def elsewhere(start_server: StartServer) -> Iterator[ScratchDatabase]:
    """A database of another server."""
    cluster = Cluster(start_server(settings={"max_slot_wal_keep_size": "1GB"}).dsn())
    with cluster.database() as database:
        yield database
    cluster.close()


async def test_a_job_waits_for_a_change_of_another_source_and_reads_its_rows_again(
    queue: Queue, elsewhere: ScratchDatabase
) -> None:
    """In another cluster: its positions have nothing to do with the queue's."""
    billing = elsewhere
    query(billing.dsn, "create table invoices (id int primary key, total int)")
    conductor = waiting(queue.database.dsn, sources={"billing": billing.dsn})
    totals: list[int] = []
    trigger = OnChange(Invoices, "insert", columns=("id",), refetch=True)

    @conductor.task("billed", trigger)
    async def billed(event: Insert[Invoices], _ctx: Context[None]) -> None:
        totals.append(event.new.total)

    orchestrator = Orchestrator(conductor)
    sidecar: dict[str, Any] = {"queue_dsn": queue.database.source_dsn, "source": "billing"}
    waits = "select count(*) = 1 from conductor.jobs where state = 'waiting'"
    async with running(billing, **sidecar):
        await queue.until("select count(*) = 1 from conductor.progress where state = 'streaming'")
        await orchestrator.start(wait_captured_s=30)
    query(billing.dsn, "insert into invoices values (7, 1)")  # before the wait, and not routed yet
    handle = await conductor.invoke("wait", 7)
    await queue.until(waits)
    async with running(billing, **sidecar):
        await eventually(lambda: totals == [1], "the earlier one, routed")
        await queue.until(waits)
        query(billing.dsn, "delete from invoices; insert into invoices values (7, 2)")
        assert await handle.result(timeout_s=60) == 2
        await eventually(lambda: totals == [1, 2], "both rows")
    await orchestrator.stop()
    drop_slot(billing)
    await conductor.close()


LEADS = (
    "select true from conductor.progress p join pg_stat_activity a on a.pid = p.sink_pid"
    " where p.slot = %s and p.state = 'streaming'"
)


async def test_a_second_slot_of_a_source_is_refused(migrated: ScratchDatabase) -> None:
    query(migrated.dsn, "create table item (id int primary key)")
    second = {"CDC_SLOT": f"{migrated.name}_2", "CDC_PUBLICATION": "second"}
    async with running(migrated):
        await captured(migrated, subscribe(migrated.dsn, "public.item", ["insert"]))
        refused = await asyncio.to_thread(cdc, migrated, "run", **second)
        assert refused.returncode == 78
        assert f"error: source 'default' is routed by slot '{migrated.name}'" in refused.stderr
        assert "CDC_SOURCE" in refused.stderr
        check = await asyncio.to_thread(cdc, migrated, "check", **second)
        assert check.returncode == 78
        assert "each change would be two jobs" in check.stdout
        status = await asyncio.to_thread(cdc, migrated, "status", "--json", **second)
        assert json.loads(status.stdout)["condition"] == "source_taken"
        query(migrated.dsn, "insert into item values (1)")
        assert [payload["new"]["id"] for payload in await routed(migrated, 1)] == [1]
    assert value(migrated.dsn, "select count(*) from conductor.progress") == 1
    assert value(migrated.dsn, "select count(*) from conductor.gaps") == 0
    assert query(migrated.dsn, "select pubname from pg_publication") == [{"pubname": "conductor"}]
    # With the first out of service it takes its place.
    dropped = await asyncio.to_thread(cdc, migrated, "slot", "drop", migrated.name)
    assert dropped.returncode == 0
    started = "select start_lsn from conductor.activations where slot = %s"
    async with running(migrated, slot=second["CDC_SLOT"], publication="second"):
        await eventually(lambda: value(migrated.dsn, started, second["CDC_SLOT"]), "its stamp")
        query(migrated.dsn, "insert into item values (2)")
        assert [payload["new"]["id"] for payload in await routed(migrated, 2)] == [1, 2]


async def test_of_two_slots_that_an_earlier_release_let_be_made_the_first_goes_on(
    migrated: ScratchDatabase,
) -> None:
    other = f"{migrated.name}_2"
    async with running(migrated):
        await eventually(lambda: value(migrated.dsn, LEADS, migrated.name), "the first")
        async with running(migrated, slot=other, source="other", publication="other"):
            await eventually(lambda: value(migrated.dsn, LEADS, other), "the second")
    query(migrated.dsn, "update conductor.progress set source = 'default'")
    service = Service(
        settings_for(migrated, slot=other, publication="other"), metrics := Metrics("test", other)
    )
    with pytest.raises(SourceTaken):
        await service.run()
    counted = metrics.registry.get_sample_value(
        "cdc_conditions_total", {"slot": other, "condition": "source_taken"}
    )
    assert counted == 1
    drop_slot(migrated)
    async with running(migrated, gap_policy="recreate"):  # it stays the first with a new slot
        remade = "select state = 'streaming' and generation > 2 from conductor.progress"
        await eventually(lambda: value(migrated.dsn, remade), "the new slot")
    async with running(migrated):
        await eventually(lambda: value(migrated.dsn, LEADS, migrated.name), "the first again")
    assert jobs(migrated) == []
