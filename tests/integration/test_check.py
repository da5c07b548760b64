"""`conductor check`: each way in which an application and its database can differ is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.sidecar import query
from tests.servers import Cluster, ScratchDatabase

TABLES = """
create type mood as enum ('happy', 'sad');
create domain label as text not null;
create table users (
    id bigint primary key, email text not null, bio text, mood mood not null, moods mood[] not null,
    tags text[], data jsonb, price numeric, called label,
    size bigint generated always as (length(email)) stored
);
create table keyless (note text);
create view emails as select email from users;
"""

APPLICATION = """
import os
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal
from conductor import Conductor, Database, OnChange, TableRow
from conductor.types import Array
import sys

class Mood(StrEnum):
    HAPPY = "happy"
    SAD = "sad"

class Glad(StrEnum):
    HAPPY = "happy"

{models}

conductor = Conductor(
    os.environ["CONDUCTOR_DSN"], database=Database.from_module(sys.modules[__name__])
)

async def handle(event: Any, ctx: Any) -> None: ...

{triggers}
"""

USERS = """
class Users(TableRow, table="public.users"):
    id: int
    email: str
    bio: str | None
    mood: Mood
    moods: list[Mood]
    tags: list[str] | None
    data: Any
    price: Decimal | None
    called: str
"""


_AGAIN = "generate the row models again"


def check(
    database: ScratchDatabase, folder: Path, *options: str, models: str = USERS, triggers: str = ""
) -> tuple[int, str, str]:
    (folder / "shopfront.py").write_text(APPLICATION.format(models=models, triggers=triggers))
    done = subprocess.run(
        [sys.executable, "-m", "conductor", "check", "shopfront:conductor", *options],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "CONDUCTOR_DSN": database.dsn,
            "PYTHONPATH": str(Path.cwd()),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def on(trigger: str) -> str:
    return f'conductor.task("t", {trigger})(handle)'


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    query(migrated.dsn, TABLES)
    return migrated


def test_no_difference_is_success(shop: ScratchDatabase, tmp_path: Path) -> None:
    triggers = on('OnChange(Users, "insert", columns=("id",), when="new.id > 1")')
    assert check(shop, tmp_path, triggers=triggers) == (0, "", "no differences\n")
    assert check(shop, tmp_path, "--json")[:2] == (0, "[]\n")


def test_a_queue_that_is_not_migrated_is_found(database: ScratchDatabase, tmp_path: Path) -> None:
    query(database.dsn, TABLES)
    status, shown, _ = check(database, tmp_path)
    assert status == 1
    assert shown.startswith("schema conductor: the database lacks migration 0001_initial, ")
    assert shown.endswith(" (fix: Run `conductor migrate` with the newest version.)\n")
    assert shown.count("\n") == 1
    tables_elsewhere = check(database, tmp_path, "--db-url", database.dsn)
    assert tables_elsewhere == (0, "", "no differences\n")


def test_a_role_without_rights_on_the_queue_is_told_what_it_needs(
    shop: ScratchDatabase, server: Cluster, tmp_path: Path
) -> None:
    query(shop.admin_dsn, f"revoke {server.owner_role} from {server.source_role}")
    try:
        stranger = replace(shop, dsn=shop.source_dsn)
        status, shown, said = check(stranger, tmp_path)
    finally:
        query(shop.admin_dsn, f"grant {server.owner_role} to {server.source_role}")
    assert (status, shown) == (78, "")
    assert "permission denied for schema conductor" in said
    assert "USAGE" in said


def test_a_migration_that_is_missing_is_found(shop: ScratchDatabase, tmp_path: Path) -> None:
    query(
        shop.dsn,
        "delete from conductor.migrations where number = "
        "(select max(number) from conductor.migrations)",
    )
    status, shown, _ = check(shop, tmp_path)
    assert (status, shown.count("\n")) == (1, 1)
    assert "lacks migration" in shown
    assert "0001" not in shown


@pytest.mark.pg(15)
@pytest.mark.parametrize(
    ("models", "problem", "fix"),
    [
        (USERS.replace("public.users", "public.user"), "'public.user'; did you mean 'public.users'",
         "create the table"),
        (USERS.replace("public.users", "public.emails"), "unknown table 'public.emails'", "create"),
        (USERS.replace("bio:", "boi:"), "unknown column 'boi' of model Users; did you mean 'bio'",
         _AGAIN),
        (USERS + "    size: int\n", "column 'size' of model Users is generated", "leave it out"),
        (USERS.replace("bio: str | None", "bio: str"), "column 'bio' may be null",
         "bio: … | None, or alter table public.users alter column bio set not null"),
        (USERS.replace("mood: Mood", "mood: int"), "column 'mood' is mood, which int", _AGAIN),
        (USERS.replace("email: str", "email: int"), "column 'email' is text, which int", _AGAIN),
        (USERS.replace("id: int", "id: datetime"), "column 'id' is int8, which datetime", _AGAIN),
        (USERS.replace("tags: list[str] | None", "tags: str | None"), "column 'tags' is _text",
         _AGAIN),
        (USERS.replace("price: Decimal | None", "price: datetime | None"), "is numeric", _AGAIN),
        (USERS.replace("mood: Mood", 'mood: Literal["happy"]'),
         "column 'mood': model Users lacks the labels 'sad' of type public.mood", _AGAIN),
        (USERS.replace("mood: Mood", "mood: Glad | Literal['glad']"), "lacks the labels 'sad' of",
         _AGAIN),
        (USERS.replace("id: int", "id: Mood"), "column 'id' is int8, which Mood of", _AGAIN),
        (USERS.replace("id: int", 'id: Literal["a"]'), "column 'id' is int8, which str of", _AGAIN),
        (USERS.replace("list[str]", "list[int]"),
         "column 'tags' has elements, and each is text, which int of model Users is not", _AGAIN),
        (USERS.replace("list[str]", "list[list[datetime] | None]"), "each is text, which datetime",
         _AGAIN),
        (USERS.replace("moods: list[Mood]", "moods: list[Literal['sad']]"),
         "column 'moods': model Users lacks the labels 'happy' of type public.mood", _AGAIN),
    ],
)  # fmt: skip
def test_a_model_that_differs_is_found(
    shop: ScratchDatabase, tmp_path: Path, models: str, problem: str, fix: str
) -> None:
    code, lines, count = check(shop, tmp_path, models=models)
    assert (code, len(lines.splitlines()), count) == (1, 1, "1 difference\n"), lines
    assert problem in lines
    assert f"(fix: {fix}" in lines or fix in lines.partition("(fix:")[2]


@pytest.mark.pg(15)
@pytest.mark.parametrize(
    "field", ["mood: str", 'mood: Literal["happy", "sad"]', "mood: Any", "price: float | None",
              "price: str | None", "data: dict[str, int] | None", "tags: set[str] | None",
              "called: Any", "tags: list[list[str]] | None", "tags: tuple[str, ...] | None",
              "tags: list[Any] | None", "tags: list[str | int] | None", "mood: Glad | str",
              'mood: Literal["happy"] | Glad | Mood', "moods: Array[Mood]", "moods: list[str]",
              "id: Literal[1, 2]", "bio: Literal['a'] | None", "bio: Mood | None"],
)  # fmt: skip
def test_what_a_model_may_be_is_no_difference(
    shop: ScratchDatabase, tmp_path: Path, field: str
) -> None:
    name = field.partition(":")[0]
    models = "\n".join(
        f"    {field}" if line.strip().startswith(f"{name}:") else line
        for line in USERS.splitlines()
    )
    assert check(shop, tmp_path, models=models)[:2] == (0, "")


def test_a_new_label_of_an_enum_is_found(shop: ScratchDatabase, tmp_path: Path) -> None:
    query(shop.dsn, "alter type mood add value 'so so'")
    code, lines, _ = check(shop, tmp_path)
    assert code == 1
    for column in ("mood", "moods"):
        assert f"{column!r}: model Users lacks the labels 'so so' of type public.mood" in lines


@pytest.mark.parametrize(
    ("trigger", "problem", "fix"),
    [
        ('OnChange("public.keyless")', "no usable replica identity", "Add a primary key"),
        ('OnChange(Users, "update", changed=("email",))', "REPLICA IDENTITY FULL", "alter table"),
        ('OnChange(Users, "update", when="old.id != new.id")', "the filter's `old`", "alter table"),
        ('OnChange(Users, "insert", when="new.price > 5")', "new.price is text", "double(new.pr"),
        ('OnChange("public.users", "insert", when="new.called")', "not a condition", "Compare it"),
        (
            'OnChange(Users, "insert", columns=("email",), refetch=True)',
            "'id' is not captured",
            "Add it to the trigger's columns",
        ),
    ],
)
def test_what_hinders_a_trigger_is_found(
    shop: ScratchDatabase, tmp_path: Path, trigger: str, problem: str, fix: str
) -> None:
    extra = '\nclass Keyless(TableRow, table="public.keyless"):\n    note: str | None\n'
    code, lines, _ = check(shop, tmp_path, models=USERS + extra, triggers=on(trigger))
    assert (code, len(lines.splitlines())) == (1, 1), lines
    assert problem in lines
    assert fix in lines.partition("(fix:")[2]


def test_every_difference_is_one_line(shop: ScratchDatabase, tmp_path: Path) -> None:
    models = USERS.replace("bio: str | None", "bio: str").replace("email: str", "emial: str")
    triggers = on('OnChange(Users, "update", columns=("id",), changed=("emial",))')
    code, lines, errors = check(shop, tmp_path, models=models, triggers=triggers)
    assert code == 1
    assert errors == "4 differences\n"
    assert sorted(line.partition(":")[0] for line in lines.splitlines()) == ["public.users"] * 4
    _, text, _ = check(shop, tmp_path, "--json", models=models, triggers=triggers)
    found: list[dict[str, Any]] = json.loads(text)
    assert [(f["column"], f["task"]) for f in found] == [
        (None, "t"), ("bio", None), ("emial", None), ("emial", "t"),
    ]  # fmt: skip
    assert all(f["problem"] and f["fix"] for f in found)


def test_a_generated_module_that_is_old_is_found(shop: ScratchDatabase, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "conductor", "gen", "types", "python", "--db-url", shop.dsn]
    source = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    (tmp_path / "database_types.py").write_text(source.replace("\n\n\nclass", "\n\n\n\nclass"))
    models = "import database_types\nfrom database_types import PublicUsers as Users\n"
    assert check(shop, tmp_path, models=models)[:2] == (0, "")
    query(shop.dsn, "alter table users add column added int")
    query(shop.dsn, "create table new_one (id int primary key)")
    code, lines, _ = check(shop, tmp_path, models=models)
    assert (code, len(lines.splitlines())) == (1, 1), lines
    assert "not what the database gives now: PublicNewOne, PublicUsers" in lines
    assert "(fix: conductor gen types python --schemas public > " in lines


def test_what_cannot_be_compared_says_so(shop: ScratchDatabase, tmp_path: Path) -> None:
    code, _, errors = check(shop, tmp_path, "--db-url", "postgresql://nobody@127.0.0.1:1/none")
    assert code == 69
    assert errors.startswith("error: cannot connect")
    code, _, errors = check(shop, tmp_path, models="def")
    assert (code, "cannot import shopfront" in errors) == (78, True)
