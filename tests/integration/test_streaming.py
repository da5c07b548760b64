"""Transactions in progress, piece by piece: the same jobs as when they come whole at their commit.

Sidecars of every mode read one database through slots of their own, with as little memory for
decoding as the server lets itself be given, so that it streams whatever is larger.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import psycopg
import pytest

from cdc import spool
from cdc.config import Settings
from cdc.errors import ConfigError
from cdc.metrics import Metrics
from cdc.service import Service
from tests.integration.sidecar import (
    cdc,
    eventually,
    query,
    running,
    settings_for,
    terminate,
    value,
)
from tests.integration.test_differential import CORPUS, TABLES
from tests.servers import ScratchDatabase
from tests.unit.cdc.type_cases import SETUP

pytestmark = pytest.mark.anyio

WATCHED: Final = ("users", "facts", "pairs", "measures", "child", "empty")
OPERATIONS: Final = ["insert", "update", "delete", "truncate"]


def modes(database: ScratchDatabase) -> tuple[str, ...]:
    version = int(value(database.dsn, "show server_version_num"))
    return ("off", "on", "parallel") if version >= 160000 else ("off", "on")


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    query(migrated.dsn, SETUP)
    query(migrated.dsn, TABLES)
    query(
        migrated.admin_dsn, f"alter database {migrated.name} set logical_decoding_work_mem = '64kB'"
    )
    return migrated


def slot_of(database: ScratchDatabase, mode: str) -> str:
    return f"{database.name}_{mode}"


@asynccontextmanager
async def sidecars(
    database: ScratchDatabase, *tables: str, metrics: Metrics | None = None
) -> AsyncIterator[tuple[str, ...]]:
    """A sidecar of every mode, each with its own source and its own subscriptions to the tables."""
    async with AsyncExitStack() as stack:
        found = modes(database)
        for mode in found:
            for table in tables:
                query(
                    database.dsn,
                    "insert into conductor.subscriptions"
                    " (app, task, trigger, kind, source, queue, definition)"
                    " values ('test', %s, %s, 'change', %s, 'default', %s)"
                    " on conflict do nothing",
                    *(mode, table, mode),
                    json.dumps({"schema": "shop", "table": table, "operations": OPERATIONS}),
                )
            sidecar = running(
                database,
                slot=slot_of(database, mode),
                publication="watched",
                source=mode,
                streaming=mode,
                metrics=metrics if mode == found[-1] else None,
            )
            await stack.enter_async_context(sidecar)
        await eventually(lambda: pending(database) == 0, "the subscriptions")
        yield found


def pending(database: ScratchDatabase) -> int:
    return int(
        value(
            database.dsn,
            "select count(*) from conductor.subscriptions s where not exists ("
            " select from conductor.activations a where a.subscription = s.id"
            " and a.start_lsn is not null)",
        )
    )


def behind(database: ScratchDatabase, lsn: str) -> int:
    statement = "select count(*) from conductor.progress where acknowledged_lsn < %s"
    return int(value(database.dsn, statement, lsn))


async def routed(database: ScratchDatabase) -> dict[str, list[tuple[Any, ...]]]:
    """Wait until all have routed what is written; return jobs and dead letters of each mode."""
    end = value(database.admin_dsn, "select pg_current_wal_insert_lsn()::text")
    await eventually(lambda: behind(database, end) == 0, "every sidecar to catch up", 60)
    assert value(database.dsn, "select count(*) from conductor.dead_letters") == 0
    rows = query(
        database.dsn,
        "select task, source_lsn::text, source_ordinal, payload::text"
        " from conductor.jobs order by id",
    )
    by_mode: dict[str, list[tuple[Any, ...]]] = {mode: [] for mode in modes(database)}
    for row in rows:
        by_mode[row.pop("task")].append(tuple(row.values()))
    return by_mode


def streamed(database: ScratchDatabase, mode: str) -> int:
    """How many transactions were sent to a mode's sidecar in pieces, as the server counts them."""
    return int(
        value(
            database.admin_dsn,
            "select coalesce(sum(stream_txns), 0) from pg_stat_replication_slots"
            " where slot_name = %s",
            slot_of(database, mode),
        )
    )


def run(database: ScratchDatabase, *statements: str) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


MANY: Final = "insert into shop.empty select generate_series(%s::int, %s)"

LARGE: Final = (
    # a description within a piece, and a rename that is rolled back with its subtransaction
    """
    begin;
    insert into shop.users (id, note) select i, repeat('n', 50) from generate_series(100, 1500) i;
    savepoint one;
    alter table shop.users rename column karma to fame;
    alter table shop.users add column extra int default 7;
    insert into shop.users (id, fame) select i, i from generate_series(2000, 4000) i;
    rollback to one;
    insert into shop.users (id, karma) select i, i from generate_series(5000, 6500) i;
    savepoint two;
    update shop.users set karma = karma + 1 where id < 1000;
    savepoint three;
    delete from shop.users where id < 300;
    release three;
    rollback to two;
    alter table shop.users add column kept int default 9;
    insert into shop.users (id, kept) select i, i from generate_series(7000, 8000) i;
    truncate shop.empty;
    select pg_logical_emit_message(true, 'app', repeat('m', 100));
    select pg_logical_emit_message(false, 'app', 'x');
    commit
    """,
    "begin; insert into shop.empty select generate_series(1, 5000); rollback",
    "insert into shop.empty select generate_series(1, 5000)",
    # a subtransaction a row, every third rolled back
    """
    do $$
    begin
        for i in 10000 .. 13000 loop
            begin
                insert into shop.users (id, note) values (i, 'a row of its own subtransaction');
                if i % 3 = 0 then raise exception 'no'; end if;
            exception when raise_exception then null;
            end;
        end loop;
    end
    $$
    """,
    "delete from shop.empty",
)


async def test_one_corpus_gives_the_same_jobs(shop: ScratchDatabase) -> None:
    async with sidecars(shop, *WATCHED) as found:
        run(shop, *CORPUS, *LARGE)
        jobs = await routed(shop)
    assert len(jobs["off"]) > 15_000
    for mode in found[1:]:
        assert jobs[mode] == jobs["off"]
        assert streamed(shop, mode) >= 5
    assert streamed(shop, "off") == 0


async def test_transactions_side_by_side_and_tables_that_change_between_their_pieces(
    shop: ScratchDatabase,
) -> None:
    metrics = Metrics("test", "m")

    def kept() -> float:
        samples = [s for family in metrics.registry.collect() for s in family.samples]
        return next(s.value for s in samples if s.name == "cdc_spooled_transactions")

    async with sidecars(shop, *WATCHED, metrics=metrics) as found:
        with psycopg.connect(shop.dsn) as one, psycopg.connect(shop.dsn) as two:
            one.execute(MANY, (1, 3000))
            two.execute(MANY, (10_001, 13_000))
            await eventually(lambda: kept() == 2, "both transactions, kept by the sidecar")
            run(shop, "insert into shop.users (id) values (1)")  # meanwhile, and whole
            run(shop, "alter table shop.users add column more int default 3")
            two.execute("insert into shop.users (id) select generate_series(100, 2000)")
            one.execute("savepoint a")
            one.execute(MANY, (3001, 6000))
            one.execute("rollback to a")
            two.commit()
            one.execute(MANY, (6001, 9000))
            one.commit()
        with psycopg.connect(shop.dsn) as three:
            three.execute(MANY, (20_001, 23_000))
            await eventually(lambda: kept() == 1, "the third")
            three.rollback()
        run(shop, "insert into shop.users (id) values (2)")
        jobs = await routed(shop)
        await eventually(lambda: kept() == 0, "nothing kept")
    assert len(jobs["off"]) == 3000 + 3000 + 3000 + 1901 + 2
    for mode in found[1:]:
        assert jobs[mode] == jobs["off"]


async def test_what_is_open_is_sent_again_after_a_lost_connection(
    shop: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 20_000)
    async with sidecars(shop, *WATCHED) as found:
        with psycopg.connect(shop.dsn) as open_one:
            open_one.execute(MANY, (1, 3000))
            run(shop, "insert into shop.users (id) values (1)")  # and acknowledged past its begin
            await routed(shop)
            for mode in found:
                lost = terminate(shop, f"cdc {slot_of(shop, mode)} stream"[:63])
                assert lost == 1
            open_one.execute(MANY, (3001, 6000))
            run(shop, "insert into shop.users (id) values (2)")
            open_one.commit()
        jobs = await routed(shop)
    assert len(jobs["off"]) == 6002
    for mode in found[1:]:
        assert jobs[mode] == jobs["off"]


async def test_prepared_transactions_come_when_they_are_committed(shop: ScratchDatabase) -> None:
    def prepare(name: str, *numbers: int) -> None:
        with psycopg.connect(shop.dsn) as connection:
            connection.execute(MANY, numbers)
            connection.execute(f"prepare transaction '{shop.name}_{name}'".encode())

    async with sidecars(shop, *WATCHED) as found:
        prepare("one", 1, 3000)
        prepare("two", 10_001, 13_000)
        try:
            run(shop, "insert into shop.users (id) values (1)")
            before = await routed(shop)
            run(shop, f"commit prepared '{shop.name}_two'")
        finally:
            run(shop, f"rollback prepared '{shop.name}_one'")
        run(shop, "insert into shop.users (id) values (2)")
        jobs = await routed(shop)
    assert len(before["off"]) == 1
    assert len(jobs["off"]) == 3002
    for mode in found[1:]:
        assert jobs[mode] == jobs["off"]
        assert streamed(shop, mode) >= 2


async def test_a_sidecar_that_dies_anywhere_loses_and_repeats_nothing(
    shop: ScratchDatabase,
) -> None:
    """Dropped without a word, again and again, in pieces and between them."""
    mode = modes(shop)[-1]
    changes: dict[str, Any] = {"streaming": mode, "source": mode}
    async with running(shop, **changes):
        watched = {"schema": "shop", "table": "empty", "operations": ["insert"]}
        query(
            shop.dsn,
            "insert into conductor.subscriptions"
            " (app, task, trigger, kind, source, queue, definition)"
            " values ('test', 'seen', 'empty', 'change', %s, 'default', %s)",
            *(mode, json.dumps(watched)),
        )
        await eventually(lambda: pending(shop) == 0, "the subscription")
    last = 0
    with psycopg.connect(shop.dsn) as writer:
        for _ in range(5):
            service = Service(settings_for(shop, **changes), Metrics("test", shop.name))
            task = asyncio.create_task(service.run())
            for size in (900, 50, 2000):
                await asyncio.to_thread(writer.execute, MANY, (last + 1, last + size))
                last += size
                await asyncio.to_thread(writer.execute, "savepoint a")
                await asyncio.to_thread(writer.execute, MANY, (last + 1, last + size))
                await asyncio.to_thread(writer.execute, "rollback to a")
                if size != 2000:  # the last is open while the sidecar dies
                    await asyncio.to_thread(writer.commit)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            writer.commit()
    count = "select count(*) from conductor.jobs"
    async with running(shop, **changes):
        await eventually(lambda: value(shop.dsn, count) >= last, "every row's job", 60)
    routed_ids = "select (payload #>> '{new,id}')::int as id from conductor.jobs order by jobs.id"
    ids = query(shop.dsn, routed_ids)
    assert [row["id"] for row in ids] == list(range(1, last + 1))


@pytest.mark.pg(15)
async def test_what_a_server_or_plugin_cannot_do_is_refused(migrated: ScratchDatabase) -> None:
    def settings(**changes: Any) -> Settings:
        return Settings(
            source_dsn=migrated.source_dsn, slot=migrated.name, metrics_port=-1, **changes
        )

    with pytest.raises(ConfigError, match="needs PostgreSQL 16"):
        await Service(settings(streaming="parallel"), Metrics("test", "m")).run()
    with pytest.raises(ConfigError, match="is for pgoutput"):
        await Service(settings(streaming="on", plugin="wal2json"), Metrics("test", "m")).run()
    checked = cdc(migrated, "check", CDC_STREAMING="parallel")
    assert checked.returncode == 78
    assert "needs PostgreSQL 16" in checked.stdout


async def test_a_table_that_is_described_in_a_part_that_is_rolled_back_stays_described(
    shop: ScratchDatabase,
) -> None:
    """The server tells a transaction of each table once, and does not tell again after that."""
    async with sidecars(shop, *WATCHED) as found:
        with psycopg.connect(shop.dsn) as connection:
            connection.execute("savepoint a")
            connection.execute(MANY, (1, 3000))
            connection.execute("rollback to a")
            connection.execute(MANY, (3001, 6000))
        run(shop, "insert into shop.empty values (1)")
        jobs = await routed(shop)
    assert len(jobs["off"]) == 3001
    for mode in found[1:]:
        assert jobs[mode] == jobs["off"]
