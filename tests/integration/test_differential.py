"""The same SQL through both plugins at once gives the same jobs, byte for byte.

Two sidecars read one database through slots of their own: `pgoutput` and `wal2json`. What wal2json
cannot tell is asserted too, one divergence a test, with its count.
"""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from cdc.metrics import Metrics
from tests.integration.sidecar import cdc, eventually, query, running, value
from tests.servers import ScratchDatabase
from tests.unit.cdc.type_cases import SETUP, TYPE_CASES

pytestmark = [pytest.mark.anyio, pytest.mark.wal2json]

PLUGINS: Final = ("pgoutput", "wal2json")
LOST: Final = {("numeric", "NaN"), ("numeric", "-Infinity"), ("float4", "NaN")}
LOST_FLOATS: Final = {("float8", "Infinity"), ("float8", "-Infinity")}

TABLES: Final = """
    create table shop.users (id int8 primary key, email text, note text, karma int4 default 0,
        twice int4 generated always as (karma * 2) stored, balance numeric(12, 2));
    alter table shop.users alter note set storage external;
    create table shop.facts (id int4, body text, big text, seen timestamptz, price float8);
    alter table shop.facts alter big set storage external;
    alter table shop.facts replica identity full;
    create table shop.pairs (note text, b int4 not null, a text not null);
    create unique index pairs_key on shop.pairs (b, a) include (note);
    alter table shop.pairs replica identity using index pairs_key;
    create table shop.measures (at date, id int8, value float8, primary key (at, id))
        partition by range (at);
    create table shop.measures_old partition of shop.measures
        for values from (minvalue) to ('2026-01-01');
    create table shop.measures_new (gone text, value float8, id int8 not null, at date not null);
    alter table shop.measures_new drop column gone;
    alter table shop.measures attach partition shop.measures_new
        for values from ('2026-01-01') to (maxvalue);
    create table shop."Odd ""name"", %" ("a b" int4 primary key, "sch""ema" text, "ü%s" bool);
    create table shop.child (id int8 primary key references shop.users, email text);
    create table shop.empty (id int4 primary key);
    create table shop.unwatched (id int4 primary key, body text);
"""
WATCHED: Final = (
    *("types", "users", "facts", "pairs", "measures", 'Odd "name", %', "child", "empty"),
)
CORPUS: Final = (
    "insert into shop.users values (1, 'a@example.com', repeat('x', 9000), 1, default, 1.10)",
    "insert into shop.users values (2, '', '', null, default, -0.00)",
    "insert into shop.users (id, note) values (3, null), (4, E'\\\\')",
    "update shop.users set karma = 5 where id = 1",  # the note is TOASTed and not touched
    "update shop.users set note = 'short', karma = karma + 1 where id = 1",
    "update shop.users set note = repeat('y', 9000) where id = 1",
    "update shop.users set id = 10 where id = 1",  # a key change, with TOAST
    "update shop.users set email = email",  # nothing changes
    "delete from shop.users where id = 2",
    "insert into shop.facts values (1, 'one', repeat('z', 9000), '2026-01-02 03:04:05+09', 1e-7)",
    "update shop.facts set body = 'two'",
    "update shop.facts set body = null, price = -0.0",
    "update shop.facts set big = repeat('w', 9000)",
    "update shop.facts set id = id",
    "delete from shop.facts",
    "insert into shop.pairs values ('n', 1, 'a'), ('m', 2, 'ä')",
    "update shop.pairs set note = 'o' where b = 1",
    "update shop.pairs set a = 'b' where b = 1",
    "update shop.pairs set b = 7, a = 'c' where b = 1",
    "delete from shop.pairs where b = 2",
    "insert into shop.measures values ('2025-06-01', 1, 1.5), ('2026-06-01', 2, null)",
    "update shop.measures set value = 3 where id = 2",
    "update shop.measures set at = '2026-02-02' where id = 1",  # moves to the other partition
    "insert into shop.measures_new (value, id, at) values (9, 9, '2026-09-09')",
    "delete from shop.measures where id = 2",
    'insert into shop."Odd ""name"", %" values (1, E\'q"\\\\u\\n\\t\\x01é😀\', true)',
    'insert into shop."Odd ""name"", %" values (2, null, null)',
    'update shop."Odd ""name"", %" set "a b" = 3 where "a b" = 2',
    """
    begin;
    insert into shop.child values (10, 'c');
    insert into shop.unwatched values (1, 'not captured');
    savepoint one;
    insert into shop.users values (20, 'rolled back');
    update shop.child set email = 'rolled back';
    rollback to one;
    update shop.child set email = 'kept';
    savepoint two;
    insert into shop.users values (21, 'kept');
    release two;
    select pg_logical_emit_message(true, 'app', 'in a transaction');
    delete from shop.child;
    commit;
    """,
    "begin; insert into shop.users values (30); rollback",
    "select pg_logical_emit_message(false, 'app', 'alone')",
    "insert into shop.unwatched values (2, 'a transaction of nothing that is captured')",
    "create temp table scratch (id int4); insert into scratch values (1); drop table scratch",
    "truncate shop.pairs",
    "truncate shop.facts, shop.empty",
    "truncate shop.measures",
    "truncate shop.measures_new",  # of a partition: nothing
)


def type_cases(*, lost: bool) -> list[tuple[str, str]]:
    """The (type, value)s that wal2json can tell, or those that it cannot."""
    cannot = LOST | LOST_FLOATS
    return [(t, v) for t, v, _ in TYPE_CASES if ((t, v) in cannot) is lost]


@dataclass(frozen=True)
class Shop:
    """One database that two sidecars read."""

    database: ScratchDatabase
    metrics: Metrics  # of the sidecar of wal2json

    def run(self, *statements: str) -> None:
        """Run scripts, each on its own."""
        with psycopg.connect(self.database.dsn, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def insert_types(self, cases: Iterable[tuple[str, str]]) -> None:
        """Insert a row of shop.types."""
        values = sql.SQL(", ").join(sql.Literal(text) for _, text in cases)
        with psycopg.connect(self.database.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("insert into shop.types values ({})").format(values))

    def subscribe(self, tables: Iterable[str]) -> None:
        """Watch tables, once for each plugin."""
        for plugin in PLUGINS:
            for name in tables:
                operations = ["insert", "update", "delete", "truncate"]
                definition = {"schema": "shop", "table": name, "operations": operations}
                query(
                    self.database.dsn,
                    "insert into conductor.subscriptions"
                    " (app, task, trigger, kind, source, queue, definition)"
                    " values ('test', %s, %s, 'change', %s, 'default', %s)",
                    *(plugin, f"change:{name}", plugin, json.dumps(definition)),
                )
        query(self.database.dsn, "select pg_notify('conductor_subscriptions', '')")

    def pending(self) -> int:
        """How many subscriptions do not route yet."""
        return int(
            value(
                self.database.dsn,
                "select count(*) from conductor.subscriptions s where not exists ("
                " select from conductor.activations a where a.subscription = s.id"
                " and a.start_lsn is not null)",
            )
        )

    async def payloads(self) -> tuple[list[str], list[str]]:
        """Wait until both have routed all that is written; return what each made, as text."""
        end = value(self.database.admin_dsn, "select pg_current_wal_insert_lsn()::text")
        await eventually(lambda: self._behind(end) == 0, "both sidecars to catch up")
        by_plugin = {
            plugin: [
                row["payload"]
                for row in query(
                    self.database.dsn,
                    "select payload::text from conductor.jobs where task = %s order by id",
                    plugin,
                )
            ]
            for plugin in PLUGINS
        }
        return by_plugin["pgoutput"], by_plugin["wal2json"]

    def _behind(self, lsn: str) -> int:
        return int(
            value(
                self.database.dsn,
                "select count(*) from conductor.progress where acknowledged_lsn < %s",
                lsn,
            )
        )

    def diverged(self) -> dict[str, float]:
        """The divergences that the sidecar of wal2json has counted."""
        samples = [s for family in self.metrics.registry.collect() for s in family.samples]
        return {
            s.labels["kind"]: s.value
            for s in samples
            if s.name == "cdc_plugin_divergences_total" and s.value
        }


@asynccontextmanager
async def two_sidecars(database: ScratchDatabase, *tables: str) -> AsyncIterator[Shop]:
    """Sidecars of both plugins that route these tables."""
    shop = Shop(database, Metrics("test", "wal2json"))
    settings: dict[str, dict[str, Any]] = {
        p: {"plugin": p, "slot": f"{database.name}_{p}", "publication": p, "source": p}
        for p in PLUGINS
    }
    settings["wal2json"]["metrics"] = shop.metrics
    async with running(database, **settings["pgoutput"]), running(database, **settings["wal2json"]):
        shop.subscribe(tables)
        await eventually(lambda: shop.pending() == 0, "both to route")
        yield shop


@pytest.fixture
def prepared(migrated: ScratchDatabase) -> ScratchDatabase:
    """A database with the tables of the corpus."""
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(f"c{i}"), sql.SQL(name.encode().decode()))
        for i, (name, _) in enumerate(type_cases(lost=False))
    )
    with psycopg.connect(migrated.dsn, autocommit=True) as connection:
        connection.execute(SETUP)
        connection.execute(TABLES)
        connection.execute(
            sql.SQL("create table shop.types ({}, primary key (c0, c1))").format(columns)
        )
    return migrated


async def test_one_corpus_gives_the_same_jobs(prepared: ScratchDatabase) -> None:
    async with two_sidecars(prepared, *WATCHED) as shop:
        shop.insert_types(type_cases(lost=False))
        shop.run("update shop.types set c2 = 1", "update shop.types set c1 = not c1")
        shop.run(*CORPUS, "delete from shop.types")
        pgoutput, wal2json = await shop.payloads()
        assert wal2json == pgoutput
        assert len(pgoutput) > len(CORPUS)
        operations = {json.loads(payload)["op"] for payload in pgoutput}
        assert operations == {"insert", "update", "delete", "truncate"}
        truncates = sum('"op":"truncate"' in payload for payload in pgoutput)
        assert shop.diverged() == {"truncate_options": truncates}


async def test_altered_tables_stay_the_same(prepared: ScratchDatabase) -> None:
    """When each alteration is read before the next one is made."""
    alterations = (
        ("alter table shop.users add column city text default 'Rome'", "karma = 1"),
        ("alter table shop.users drop column email", "karma = 2"),
        ("alter table shop.users rename column city to town", "karma = 3, town = null"),
        ("alter table shop.users alter karma drop default, drop column twice", "karma = 4"),
        ("alter table shop.users alter karma type numeric(20, 4)", "karma = 5"),
        ("alter table shop.users replica identity full", "karma = 6"),
        ("alter table shop.users replica identity default", "id = id + 1"),
        ("create domain shop.feel as text; alter table shop.users add f shop.feel", "f = 'g'"),
    )
    async with two_sidecars(prepared, "users") as shop:
        shop.run("insert into shop.users values (1, 'a', repeat('x', 9000))")
        await shop.payloads()
        for alteration, assignment in alterations:
            shop.run(alteration)
            shop.run(f"update shop.users set {assignment}")
            shop.run("insert into shop.users (id) values (100)", "delete from shop.users")
            shop.run("insert into shop.users (id, note) values (1, repeat('x', 9000))")
            pgoutput, wal2json = await shop.payloads()
            assert wal2json == pgoutput, alteration
        assert shop.diverged() == {}


async def test_what_begins_later_is_the_same(prepared: ScratchDatabase) -> None:
    """A partition whose root begins to be captured appears as the root, from one commit on."""
    async with two_sidecars(prepared, "users") as shop:
        shop.run("insert into shop.measures values ('2026-06-01', 1, 1)")
        shop.subscribe(["measures"])
        await eventually(lambda: shop.pending() == 0, "both to route")
        shop.run("insert into shop.measures values ('2026-06-01', 2, 2)")
        shop.run("create schema other")
        shop.run("alter table shop.measures detach partition shop.measures_old")
        shop.run("create table other.far partition of shop.measures default")
        shop.run("insert into shop.measures values ('2025-06-01', 3, 3)")
        pgoutput, wal2json = await shop.payloads()
        assert wal2json == pgoutput
        assert [json.loads(payload)["new"]["id"] for payload in pgoutput] == [2, 3]


async def test_numbers_without_a_value_are_lost(migrated: ScratchDatabase) -> None:
    """Before wal2json 2.6: null in place of NaN and infinity."""
    with psycopg.connect(migrated.dsn, autocommit=True) as connection:
        connection.execute("create schema shop")
        connection.execute(
            "create table shop.types (id int4 primary key, a float8 not null, b numeric)"
        )
    async with two_sidecars(migrated, "types") as shop:
        shop.run("insert into shop.types values (1, 'NaN', 'NaN'), (2, '-Infinity', 2)")
        pgoutput, wal2json = await shop.payloads()
        told = [json.loads(payload)["new"] for payload in wal2json]
        assert told == [{"id": 1, "a": None, "b": None}, {"id": 2, "a": None, "b": "2"}]
        assert json.loads(pgoutput[0])["new"] == {"id": 1, "a": "NaN", "b": "NaN"}
        assert shop.diverged() == {"number_lost": 2}


async def test_a_truncate_does_not_tell_its_options(prepared: ScratchDatabase) -> None:
    async with two_sidecars(prepared, "users", "child") as shop:
        shop.run("truncate shop.users restart identity cascade")
        pgoutput, wal2json = await shop.payloads()
        told = [json.loads(payload) for payload in pgoutput]
        assert [json.loads(payload) for payload in wal2json] == [
            change | {"cascade": False, "restart_identity": False} for change in told
        ]
        assert {change["table"] for change in told} == {"users", "child"}
        assert all(change["cascade"] and change["restart_identity"] for change in told)
        assert shop.diverged() == {"truncate_options": 2}


async def test_rows_older_than_the_catalog(prepared: ScratchDatabase) -> None:
    """Read after their table was altered, renamed or dropped: the values are all there."""
    async with two_sidecars(prepared, "users", "facts", "pairs") as shop:
        shop.run("insert into shop.users (id) values (0)")
        await shop.payloads()
    prepared_sql = (
        "insert into shop.users values (1, 'a', repeat('x', 9000))",
        "update shop.users set karma = 2 where id = 1",
        "insert into shop.facts values (1, 'b')",
        "update shop.facts set body = 'c'",
        "insert into shop.pairs values ('n', 1, 'a')",
        "alter table shop.users rename email to mail",
        "alter table shop.facts add more text",
    )
    shop.run(*prepared_sql)
    async with two_sidecars(prepared) as shop:
        pgoutput, wal2json = await shop.payloads()
        assert list(map(json.loads, wal2json)) == list(map(json.loads, pgoutput))
        assert len(pgoutput) == 6
        assert shop.diverged()["shape_guessed"] >= 3


async def test_a_slot_of_the_other_plugin_is_foreign(prepared: ScratchDatabase) -> None:
    name = f"{prepared.name}_pgoutput"
    async with two_sidecars(prepared, "users"):
        pass
    changes = {"CDC_SLOT": name, "CDC_SOURCE": "pgoutput", "CDC_PUBLICATION": "pgoutput"}
    result = cdc(prepared, "run", CDC_PLUGIN="wal2json", **changes)
    assert result.returncode == 65
    assert "logical (pgoutput), not a permanent one of wal2json" in result.stderr


async def test_check_names_the_limits(prepared: ScratchDatabase) -> None:
    result = cdc(prepared, "check", "--json", CDC_PLUGIN="wal2json")
    assert result.returncode == 0, result.stderr
    messages = [finding["message"] for finding in json.loads(result.stdout)]
    assert any("NaN" in message for message in messages)
    hidden = [message for message in messages if "cannot see whether wal2json" in message]
    assert len(hidden) == 1


async def test_lost_connections_lose_and_double_nothing(prepared: ScratchDatabase) -> None:
    async with two_sidecars(prepared, "users", "facts", "measures") as shop:
        for number in range(1, 31):
            shop.run(
                f"""
                begin;
                insert into shop.users values ({number}, 'a', repeat('x', 3000));
                insert into shop.measures values ('2026-01-01', {number}, {number});
                update shop.users set karma = {number} where id = {number};
                commit;
                """
            )
            if number % 10 == 0:
                for plugin in PLUGINS:
                    query(
                        prepared.admin_dsn,
                        "select pg_terminate_backend(pid) from pg_stat_activity"
                        " where application_name in (%s, %s)",
                        f"cdc {prepared.name}_{plugin} stream",
                        f"cdc {prepared.name}_{plugin} catalog",
                    )
        pgoutput, wal2json = await shop.payloads()
        assert wal2json == pgoutput
        assert len(pgoutput) == 90
