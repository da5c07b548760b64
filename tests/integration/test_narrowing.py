"""Columns and rows that operators leave out never leave the database, and no write fails."""

import json
from typing import Any

import pytest

from cdc.errors import ConfigError
from cdc.metrics import Metrics
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
    stamps,
    subscribe,
    value,
)
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio

LISTS = {"public.users": ["email"]}
FILTERS = {"public.lines": "level >= 40"}


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """A table with a secret, and one with noise."""
    query(migrated.dsn, "create table users (id int primary key, email text, secret text)")
    query(migrated.dsn, "create table lines (id int primary key, level int, body text)")
    return migrated


def open_gaps(shop: ScratchDatabase) -> Any:
    return value(shop.dsn, "select count(*) from conductor.gaps")


async def test_only_listed_columns_leave_the_database(shop: ScratchDatabase) -> None:
    subscription = subscribe(shop.dsn, "public.users")
    async with running(shop, column_lists=LISTS):
        await captured(shop, subscription)
        query(shop.dsn, "insert into users values (1, 'a', 'secret')")
        query(shop.dsn, "update users set secret = 'b'")
        query(shop.dsn, "delete from users")
        await routed(shop, 3)
    assert [job["op"] for job in jobs(shop)] == ["insert", "update", "delete"]
    assert [job.get("new") for job in jobs(shop)[:2]] == [{"id": 1, "email": "a"}] * 2


async def test_an_identity_that_becomes_the_whole_row_ends_the_list(shop: ScratchDatabase) -> None:
    subscription = subscribe(shop.dsn, "public.users")
    async with running(shop, column_lists=LISTS):
        await captured(shop, subscription)
        query(shop.dsn, "alter table users replica identity full")
        listed = (
            "select count(*) from pg_publication_rel r join pg_class c on c.oid = r.prrelid"
            " where c.relname = 'users' and r.prattrs is not null"
        )
        await eventually(lambda: value(shop.dsn, listed) == 0, "no list")
        query(shop.dsn, "insert into users values (1, 'a', 'secret')")
        query(shop.dsn, "update users set secret = 'b'")
        await routed(shop, 2)
    assert open_gaps(shop) == 0


async def test_rows_are_filtered_on_the_server_and_updates_are_free(shop: ScratchDatabase) -> None:
    subscription = subscribe(shop.dsn, "public.lines", ["insert"])
    async with running(shop, row_filters=FILTERS):
        await captured(shop, subscription)
        query(shop.dsn, "insert into lines values (1, 10, 'a'), (2, 40, 'b')")
        query(shop.dsn, "update lines set level = 50")  # would come as an insert
        query(shop.dsn, "alter table lines drop constraint lines_pkey")
        query(shop.dsn, "delete from lines")
        query(shop.dsn, "insert into lines values (3, 60, 'c')")
        await routed(shop, 2)
    assert [job["new"]["id"] for job in jobs(shop)] == [2, 3]
    assert published(shop, "conductor_inserts") == {"public.lines"}


async def test_new_settings_change_what_is_captured_without_a_gap(shop: ScratchDatabase) -> None:
    users = subscribe(shop.dsn, "public.users", ["insert"], task="users")
    lines = subscribe(shop.dsn, "public.lines", ["insert"], task="lines")
    number = 0

    async def run(expected: list[list[str]], **settings: Any) -> None:
        nonlocal number
        shown = cdc(shop, "plan", "--json", **_environment(settings))
        assert json.loads(shown.stdout)["drift"] == []
        async with running(shop, **settings):
            await captured(shop, users)
            await captured(shop, lines)
            await eventually(lambda: _is_defined(shop, **settings), "the definition")
            before, number = len(jobs(shop)), number + 1
            query(shop.dsn, "insert into users values (%s, 'a', 'secret')", number)
            query(shop.dsn, "insert into lines values (%s, 1, 'a')", 2 * number)
            query(shop.dsn, "insert into lines values (%s, 40, 'a')", 2 * number + 1)
            found = (await routed(shop, before + len(expected)))[before:]
        assert [sorted(job["new"]) for job in found] == expected

    whole, listed = ["email", "id", "secret"], ["email", "id"]
    row = ["body", "id", "level"]
    await run([whole, row, row])
    await run([listed, row, row], column_lists=LISTS)
    await run([listed, row], column_lists=LISTS, row_filters=FILTERS)
    await run([listed, row, row], column_lists=LISTS, row_filters={"public.lines": "level > 0"})
    await run([whole, row, row])
    assert open_gaps(shop) == 0
    assert published(shop, "conductor_inserts") == set()


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    return {f"CDC_{name.upper()}": json.dumps(value) for name, value in settings.items()}


def _is_defined(
    shop: ScratchDatabase,
    column_lists: dict[str, list[str]] | None = None,
    row_filters: dict[str, str] | None = None,
) -> bool:
    """Whether the publications are as settings for these two tables say."""
    rows = query(
        shop.dsn,
        "select c.relname as name, r.prattrs is not null as listed,"
        " pg_get_expr(r.prqual, r.prrelid) as condition"
        " from pg_publication_rel r join pg_class c on c.oid = r.prrelid",
    )
    condition = None if row_filters is None else f"({row_filters['public.lines']})"
    return sorted(tuple(row.values()) for row in rows) == [
        ("lines", False, condition),
        ("users", column_lists is not None, None),
    ]


async def test_a_listed_column_that_is_renamed_is_named(
    shop: ScratchDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves the database no longer: nobody must find that out by missing it."""
    subscription = subscribe(shop.dsn, "public.users")
    said = "no column email, which CDC_COLUMN_LISTS names"
    async with running(shop, column_lists=LISTS):
        await captured(shop, subscription)
        query(shop.dsn, "alter table users rename column email to address")
        await eventually(lambda: said in capsys.readouterr().out, "the log")
    checked = cdc(shop, "check", CDC_COLUMN_LISTS=json.dumps(LISTS))
    assert (checked.returncode, said in checked.stdout) == (78, True)


async def test_check_warns_of_what_a_list_costs(shop: ScratchDatabase) -> None:
    subscribe(shop.dsn, "public.users")
    subscribe(shop.dsn, "public.lines")
    settings = _environment({"column_lists": LISTS, "row_filters": FILTERS})
    shown = cdc(shop, "check", **settings)
    assert "DROP COLUMN" in shown.stdout
    assert "only inserts of public.lines can be captured" in shown.stdout
    applied = cdc(shop, "apply", **settings)
    assert applied.returncode == 0, applied.stderr
    assert 'add table only "public"."users" ("id", "email")' in applied.stdout


@pytest.mark.parametrize("condition", ["level >=", "lefel > 1", "random() > 0.5", "level"])
async def test_a_wrong_condition_stops_nobody_else(shop: ScratchDatabase, condition: str) -> None:
    users = subscribe(shop.dsn, "public.users")
    lines = subscribe(shop.dsn, "public.lines", ["insert"], task="lines")
    filters = {"public.lines": condition}
    async with running(shop, row_filters=filters):
        await captured(shop, users)
        query(shop.dsn, "insert into users values (1, 'a', 'b')")
        await routed(shop, 1)
        assert stamps(shop, lines)[0] is None
    applied = cdc(shop, "apply", **_environment({"row_filters": filters}))
    assert applied.returncode == 78
    assert "is CDC_ROW_FILTERS right?" in applied.stderr


async def test_a_condition_that_changes_with_the_slot_is_not_taken_for_the_old_one(
    shop: ScratchDatabase,
) -> None:
    lines = subscribe(shop.dsn, "public.lines", ["insert"], task="lines")
    async with running(shop, row_filters=FILTERS):
        await captured(shop, lines)
        await eventually(lambda: _conditions(shop) == ["(level >= 40)"], "the first condition")
    assert cdc(shop, "slot", "drop", shop.name).returncode == 0
    changed = {"public.lines": "level > 0"}
    shown = cdc(shop, "check", **_environment({"row_filters": changed})).stdout
    assert "`cdc run` will run: " in shown, shown
    async with running(shop, row_filters=changed):
        await captured(shop, lines)
        query(shop.dsn, "insert into lines values (1, 1, 'a')")
        (job,) = await routed(shop, 1)
    assert (job["new"]["id"], _conditions(shop)) == (1, ["(level > 0)"])


def _conditions(shop: ScratchDatabase) -> list[str]:
    rows = query(shop.dsn, "select pg_get_expr(prqual, prrelid) as c from pg_publication_rel")
    return [row["c"] for row in rows]


async def test_wal2json_cannot(shop: ScratchDatabase) -> None:
    settings = settings_for(shop, plugin="wal2json", column_lists=LISTS)
    with pytest.raises(ConfigError, match="are for pgoutput"):
        await Service(settings, Metrics("test", settings.slot)).run()
