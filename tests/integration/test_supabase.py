"""Models that the Supabase CLI has written, used as they come."""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest

from conductor import Change, Conductor, Context, Database, OnChange, Orchestrator
from conductor.cli.checking import compare
from conductor.connections import Connections
from conductor.definitions import Task, define_task
from conductor.errors import (
    ColumnNotCaptured,
    ConductorError,
    DefinitionInvalid,
    RegistrationRefused,
    UnknownColumn,
    UnknownTable,
)
from conductor.registration import Registration, register
from conductor.supabase import UnknownModel
from conductor.types import DatetimeOutOfRange
from tests.integration.sidecar import eventually, query, running
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio

TABLES = """
create type mood as enum ('sad', 'so so');
create type pair as (a int, b jsonb);
create table movies (
    id bigint primary key, "Odd name" text, moods mood[], cover bytea, old_data jsonb, data json,
    price numeric, shown_at timestamptz, pair pair, scene vector,
    size bigint generated always as (length("Odd name")) stored
);
create table hosts (id int primary key, "Ip address" inet);
create table "victory-road" (id int primary key);
create view cheap as select id from movies where price < 5;
create table twice (id int primary key);
create table "Twice" (id int primary key);
"""


# The name and the text of pgvector's type, whose C code is not here.
VECTOR = """
create type vector;
create function vector_in(cstring) returns vector language internal immutable strict as 'textin';
create function vector_out(vector) returns cstring language internal immutable strict as 'textout';
create type vector (input = vector_in, output = vector_out, storage = extended);
"""


@pytest.fixture
def types() -> Iterator[ModuleType]:
    """The module, new for each test: what is taken of it is kept by class."""
    sys.modules.pop("tests.integration.supabase_types", None)
    yield importlib.import_module("tests.integration.supabase_types")
    sys.modules.pop("tests.integration.supabase_types", None)


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    query(migrated.admin_dsn, VECTOR)
    query(migrated.dsn, TABLES)
    return migrated


async def handle(_event: Any, _ctx: Any) -> None: ...


def registration(*rows: Any) -> Registration:
    return Registration("shop", None, tuple(
        Task(
            definition=define_task(f"t{number}"),
            triggers=(OnChange(row, "insert"),),
            handler=handle,
            is_sync=False,
        )
        for number, row in enumerate(rows)
    ))  # fmt: skip


async def registered(database: ScratchDatabase, *rows: Any) -> list[dict[str, Any]]:
    connections = Connections(database.dsn, 1, "test")
    try:
        await register(connections, registration(*rows))
    finally:
        await connections.close()
    found = query(database.dsn, "select definition from conductor.subscriptions order by task")
    return [row["definition"] for row in found]


async def test_classes_find_their_tables_in_the_live_catalog(
    shop: ScratchDatabase, types: ModuleType
) -> None:
    database = Database.from_supabase(types)
    assert database.is_partial
    found = await registered(shop, types.PublicMovies, types.PublicVictoryRoad)
    assert [(d["schema"], d["table"], d["columns"]) for d in found] == [
        ("public", "movies", None),
        ("public", "victory-road", None),
    ]


async def test_a_mapping_decides_where_the_catalog_is_not_clear(
    shop: ScratchDatabase, types: ModuleType
) -> None:
    Database.from_supabase(types)
    with pytest.raises(RegistrationRefused, match=r'PublicTwice may be public."Twice" or public.t'):
        await registered(shop, types.PublicTwice)
    database = Database.from_supabase(types, {"PublicTwice": 'public."Twice"'})
    assert database.tables == {'public."Twice"': {"id"}}
    (definition,) = await registered(shop, types.PublicTwice)
    assert definition["table"] == "Twice"


@pytest.mark.pg(15)
async def test_wrong_names_are_reported(shop: ScratchDatabase, types: ModuleType) -> None:
    with pytest.raises(UnknownModel, match="'PublicMovie'; did you mean 'PublicMovies'"):
        Database.from_supabase(types, {"PublicMovie": "public.movies"})
    Database.from_supabase(types)
    with pytest.raises(DefinitionInvalid, match=r"column 'Ip address' \(PgCatalogInet\)") as inet:
        OnChange(types.PublicHosts)
    assert "PgCatalogInet = str" in inet.value.hint
    with pytest.raises(UnknownColumn, match=r"'odd' of model PublicMovies; did you .*'odd_name'"):
        OnChange(types.PublicMovies, columns=("odd",))
    with pytest.raises(UnknownColumn, match="'emial' of model PublicMovies in filter"):
        OnChange(types.PublicMovies, "insert", when='new.emial == ""')
    with pytest.raises(UnknownTable, match="of model PublicGone"):
        await registered(shop, types.PublicGone)
    with pytest.raises(DefinitionInvalid, match="defines no models"):
        Database.from_supabase(sys)
    OnChange(types.PublicMovies, columns=("Odd name",))
    vars(types)["PgCatalogInet"] = str
    assert OnChange(types.PublicHosts, columns=lambda h: h.ip).model is types.PublicHosts


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('class A(BaseModel):\n    class: str = Field(alias="class")', "column 'class' in line 3"),
        ('class A(BaseModel):\n    _id: int = Field(alias="_id")', "'_id'"),
        (None, "cannot import"),
    ],
)
def test_a_file_that_python_cannot_read_is_reported_by_column(
    source: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        head = "from pydantic import BaseModel, Field\n"
        (tmp_path / "broken_types.py").write_text(head + source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DefinitionInvalid, match=message):
        Database.from_supabase("broken_types")


async def test_rows_are_read_as_the_router_sends_them(
    shop: ScratchDatabase, types: ModuleType
) -> None:
    vars(types)["PgCatalogInet"] = str
    events: list[Change[Any]] = []
    conductor = Conductor(shop.dsn, database=Database.from_supabase(types.__name__))

    @conductor.task("collect", OnChange(types.PublicMovies), OnChange(types.PublicHosts, "insert"))
    async def collect(event: Change[Any], _: Context[None]) -> None:
        events.append(event)

    orchestrator = Orchestrator(conductor)
    async with running(shop), conductor, _stopping(orchestrator):
        await orchestrator.start(wait_captured_s=30)
        query(
            shop.dsn,
            "insert into movies values (1, 'x', '{sad,\"so so\"}', '\\x00ff', '{\"a\": 1}', '[1]',"
            " 9.5, 'infinity', row(1, '{\"b\": [2]}'), '[1,2.5,-3e-05]')",
        )
        query(shop.dsn, "insert into movies (id, pair) values (2, row(null, null))")
        query(shop.dsn, "insert into hosts values (1, '10.0.0.1')")
        await eventually(lambda: len(events) == 3, "three changes")
        async with await _connect(shop) as connection:
            unused = ["PublicGone", "PublicTwice"]  # and of those whose table is known nothing
            assert [found.table for found in await compare(connection, conductor)] == unused
            query(shop.dsn, 'alter table hosts drop column "Ip address"')
            query(shop.dsn, 'alter table "victory-road" alter column id type text')
            findings = await compare(connection, conductor)
            assert [(found.table, found.column) for found in findings] == [
                ("PublicGone", None),
                ("PublicTwice", None),
                ('public."victory-road"', "id"),
                ("public.hosts", "Ip address"),
            ]
    found = {(event.table, event.new.id): event.new for event in events}
    movie, host = found["movies", 1], found["hosts", 1]
    assert isinstance(movie, types.PublicMovies)
    assert (movie.id, movie.odd_name, movie.moods) == (1, "x", ["sad", "so so"])
    assert (movie.cover, movie.old_data, movie.data) == (b"\x00\xff", {"a": 1}, [1])
    assert (movie.price, host.ip) == (9.5, "10.0.0.1")
    assert movie.shown_at == DatetimeOutOfRange.of("infinity", movie.shown_at.tzinfo)
    assert isinstance(movie.pair, types.PublicPair)
    assert (movie.pair.a, movie.pair.b) == (1, {"b": [2]})
    assert movie.scene == [1, 2.5, -3e-05]
    none = found["movies", 2].pair
    assert (none.a, none.b) == (None, None)
    with pytest.raises(ColumnNotCaptured, match=r"'size' of public\.movies"):
        _ = movie.size


def test_a_row_of_a_table_within_a_row_is_not_read_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nested_types.py").write_text(
        "from __future__ import annotations\n"
        "from typing import List, Optional\n"
        "from pydantic import BaseModel, Field\n"
        "class PublicA(BaseModel):\n"
        '    rows: Optional[List[PublicB]] = Field(alias="Rows")\n'
        "class PublicB(BaseModel):\n"
        '    a: str = Field(alias="a")\n'
        "class PublicBInsert(dict): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    database = Database.from_supabase("nested_types")
    (model,) = (each for each in database.models if each.__name__ == "PublicA")
    with pytest.raises(
        DefinitionInvalid, match=r"column 'Rows' is a row of a table \(PublicB\)"
    ) as no:
        OnChange(model, "insert")
    assert no.value.hint == "Write rows: Optional[str] in that file, and keep its alias."


@asynccontextmanager
async def _stopping(orchestrator: Orchestrator) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await orchestrator.stop()


async def _connect(database: ScratchDatabase) -> Any:
    return await psycopg.AsyncConnection.connect(database.dsn, autocommit=True)


def test_an_unknown_table_is_known_before_registration_only_when_all_are() -> None:
    error: type[ConductorError] = UnknownTable
    partial = Database({"public.users": frozenset({"id"})}, is_partial=True)
    trigger: OnChange[Any] = OnChange("public.orders", "insert")
    partial.check(trigger.table)
    with pytest.raises(error, match=r"public\.orders"):
        Database(partial.tables).check(trigger.table)
