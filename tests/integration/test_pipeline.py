"""From SQL to payload on a real server: what is committed arrives once, whole, and lossless."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from cdc.metrics import Metrics
from cdc.pending import PENDING_LIMIT_BYTES
from cdc.service import Service
from tests.integration.sidecar import (
    captured,
    eventually,
    jobs,
    query,
    routed,
    running,
    settings_for,
    subscribe,
    value,
)
from tests.servers import ScratchDatabase
from tests.unit.cdc.type_cases import SETUP, TYPE_CASES

pytestmark = pytest.mark.anyio

WRONG_SETTINGS = {
    "datestyle": "German",
    "timezone": "Asia/Kathmandu",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "-3",
    "bytea_output": "escape",
    "quote_all_identifiers": "on",
}


@pytest.fixture
def items(migrated: ScratchDatabase) -> ScratchDatabase:
    query(migrated.dsn, "create table item (id bigint primary key, note text)")
    return migrated


async def test_values_do_not_depend_on_the_databases_settings(migrated: ScratchDatabase) -> None:
    query(migrated.dsn, SETUP)
    columns = ", ".join(f"c{i} {kind}" for i, (kind, _, _) in enumerate(TYPE_CASES))
    query(migrated.dsn, f"create table shop.value (id int primary key, {columns})")
    for name, setting in WRONG_SETTINGS.items():
        query(migrated.dsn, f"alter database {migrated.name} set {name} = '{setting}'")
    async with running(migrated):
        await captured(migrated, subscribe(migrated.dsn, "shop.value", ["insert"]))
        literals = ", ".join(["%s"] * len(TYPE_CASES))
        query(
            migrated.dsn,
            f"insert into shop.value values (1, {literals})",
            *[text for _, text, _ in TYPE_CASES],
        )
        await routed(migrated, 1)
    payload = value(migrated.dsn, "select payload::text from conductor.jobs")
    missing = [
        (kind, text, expected)
        for i, (kind, text, expected) in enumerate(TYPE_CASES)
        if f'"c{i}":{expected}' not in payload
    ]
    assert not missing


async def test_only_what_is_committed_becomes_jobs(items: ScratchDatabase) -> None:
    async with running(items):
        await captured(items, subscribe(items.dsn, "public.item"))
        with psycopg.connect(items.dsn) as connection:
            connection.execute("insert into item values (1, 'rolled back')")
            connection.rollback()
            connection.execute("insert into item values (2, 'kept')")
            connection.execute("savepoint a")
            connection.execute("insert into item values (3, 'savepoint rolled back')")
            connection.execute("rollback to savepoint a")
            connection.execute("update item set note = 'changed' where id = 2")
            connection.commit()
        found = await routed(items, 2)
    assert [(p["op"], p["new"]) for p in found] == [
        ("insert", {"id": 2, "note": "kept"}),
        ("update", {"id": 2, "note": "changed"}),
    ]
    assert found[0]["commit_lsn"] == found[1]["commit_lsn"]


async def test_a_transaction_larger_than_memory_allows_arrives_at_once(
    items: ScratchDatabase,
) -> None:
    rows = 3 * PENDING_LIMIT_BYTES // 1000
    async with running(items):
        await captured(items, subscribe(items.dsn, "public.item", ["insert"]))
        query(
            items.dsn,
            "insert into item select i, repeat('x', 1000) from generate_series(1, %s) i",
            rows,
        )
        counts: set[int] = set()

        def all_there() -> bool:
            counts.add(value(items.dsn, "select count(*) from conductor.jobs"))
            return rows in counts

        await eventually(all_there, "every job of the transaction")
    assert counts <= {0, rows}
    distinct = "select count(distinct (payload -> 'new' ->> 'id')) from conductor.jobs"
    assert value(items.dsn, distinct) == rows


async def test_a_sidecar_that_dies_anywhere_loses_and_repeats_nothing(
    items: ScratchDatabase,
) -> None:
    """The sidecar is dropped without a word, again and again, while rows are written."""
    subscription = subscribe(items.dsn, "public.item", ["insert"])
    async with running(items):
        await captured(items, subscription)
    last = 0
    for _ in range(8):
        service = Service(settings_for(items), Metrics("test", items.name))
        task = asyncio.create_task(service.run())
        target = last + 400
        while last < target:
            values = ", ".join(f"({last + n}, 'n')" for n in range(1, 11))
            await asyncio.to_thread(query, items.dsn, f"insert into item values {values}")
            last += 10
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    async with running(items):
        await eventually(lambda: len(jobs(items)) >= last, "every row's job")
    ids = [payload["new"]["id"] for payload in jobs(items)]
    assert ids == list(range(1, last + 1))


async def test_unwanted_traffic_moves_the_position(items: ScratchDatabase) -> None:
    query(items.dsn, "create table noise (id int)")

    def acknowledged() -> Any:
        return value(
            items.admin_dsn,
            "select confirmed_flush_lsn >= %s::pg_lsn from pg_replication_slots"
            " where slot_name = %s",
            lsn,
            items.name,
        )

    async with running(items):
        await captured(items, subscribe(items.dsn, "public.item", ["delete"]))
        query(items.dsn, "insert into item values (1, 'nobody wants inserts')")
        query(items.dsn, "insert into noise select generate_series(1, 300000)")
        lsn = value(items.dsn, "select pg_current_wal_insert_lsn()::text")
        query(items.dsn, "insert into noise select generate_series(1, 300000)")
        await eventually(acknowledged, "the slot's position")
    assert jobs(items) == []


async def test_a_truncate_of_several_tables_is_one_change_each(items: ScratchDatabase) -> None:
    query(items.dsn, "create table other (id int primary key references item)")
    async with running(items):
        for table in ("public.item", "public.other"):
            await captured(items, subscribe(items.dsn, table, ["truncate"], task=table))
        query(items.dsn, "truncate item cascade")
        found = await routed(items, 2)
    assert {(p["table"], p["op"], p["cascade"]) for p in found} == {
        ("item", "truncate", True),
        ("other", "truncate", True),
    }
    assert value(items.dsn, "select count(distinct source_ordinal) from conductor.jobs") == 2


@pytest.mark.parametrize("streaming", ["off", "on"])
async def test_a_transaction_from_elsewhere_is_one_like_any_other(
    items: ScratchDatabase, streaming: str
) -> None:
    """What a subscriber of another server applies has an Origin message before its changes."""
    origin, watch = f"{items.name}_origin", f"{items.name}_watch"
    query(items.admin_dsn, f"alter database {items.name} set logical_decoding_work_mem = '64kB'")
    async with running(items, streaming=streaming):
        await captured(items, subscribe(items.dsn, "public.item"))
        query(items.admin_dsn, "select pg_create_logical_replication_slot(%s, 'pgoutput')", watch)
        with psycopg.connect(items.admin_dsn) as applier:
            applier.execute("select pg_replication_origin_create(%s)", [origin])
            applier.execute("select pg_replication_origin_session_setup(%s)", [origin])
            applier.commit()
            applier.execute("select pg_replication_origin_xact_setup('0/ABCDEF', now())")
            applier.execute("insert into item values (1, 'from elsewhere')")
            applier.commit()
            applier.execute("select pg_replication_origin_xact_setup('0/ABCDFF', now())")
            applier.execute(
                "insert into item select g, repeat('x', 99) from generate_series(2, 3000) g"
            )
            applier.commit()
        found = await routed(items, 3000)
        sent = value(
            items.admin_dsn,
            "select count(*) from pg_logical_slot_get_binary_changes(%s, null, null,"
            " 'proto_version', '1', 'publication_names', 'conductor')"
            " where get_byte(data, 0) = ascii('O')",
            watch,
        )
    query(items.admin_dsn, "select pg_drop_replication_slot(%s)", watch)
    query(items.admin_dsn, "select pg_replication_origin_drop(%s)", origin)
    assert sent == 2
    assert [payload["new"]["id"] for payload in found] == list(range(1, 3001))
    assert found[0]["new"]["note"] == "from elsewhere"
    assert value(items.dsn, "select count(*) from conductor.dead_letters") == 0


async def test_a_renamed_and_retyped_table_is_followed(items: ScratchDatabase) -> None:
    async with running(items):
        await captured(items, subscribe(items.dsn, "public.item", ["insert"]))
        query(items.dsn, "insert into item values (1, 'before')")
        query(items.dsn, "alter table item add column tags text[], drop column note")
        query(items.dsn, "insert into item values (2, '{a,NULL}')")
        query(items.dsn, "alter table item alter column id type numeric")
        query(items.dsn, "insert into item values (3.5, null)")
        found = await routed(items, 3)
    assert [p["new"] for p in found] == [
        {"id": 1, "note": "before"},
        {"id": 2, "tags": ["a", None]},
        {"id": "3.5", "tags": None},
    ]


async def test_a_toasted_value_that_did_not_change_is_never_null(items: ScratchDatabase) -> None:
    query(items.dsn, "alter table item add column big text, alter column big set storage external")
    async with running(items):
        await captured(items, subscribe(items.dsn, "public.item"))
        query(items.dsn, "insert into item values (1, 'a', repeat('x', 10000))")
        query(items.dsn, "update item set note = 'b'")
        query(items.dsn, "alter table item replica identity full")
        query(items.dsn, "update item set note = 'c'")
        found = await routed(items, 3)
    assert found[1]["unchanged"] == ["big"]
    assert found[1]["new"] == {"id": 1, "note": "b"}
    assert "unchanged" not in found[2]
    assert found[2]["new"] == {"id": 1, "note": "c", "big": "x" * 10000}
    assert found[2]["changed"] == ["note"]


async def test_a_version_registered_later_is_on_the_jobs_after_it(items: ScratchDatabase) -> None:
    async with running(items):
        await captured(items, subscribe(items.dsn, "public.item", ["insert"]))
        query(items.dsn, "insert into item values (1)")
        await routed(items, 1)
        query(items.dsn, "update conductor.subscriptions set version = '2'")
        query(items.dsn, "select pg_notify('conductor_subscriptions', '')")

        def latest() -> Any:
            query(items.dsn, "insert into item select max(id) + 1 from item")
            return value(items.dsn, "select version from conductor.jobs order by id desc limit 1")

        await eventually(lambda: latest() == "2", "the new version")
