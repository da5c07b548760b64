"""`docs/defining-tasks-and-events.md`, run from end to end: every block of it, in its order.

A Python block goes to the file that its first line names, SQL to the database, a session is a
doctest, a shell block runs. The type checkers read what a reader of the page would then have.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final

import psycopg
import pytest

from conductor.testing import travel
from tests.integration.pages import MYPY_CACHE, ROOT, Page, process, shell
from tests.integration.sidecar import query
from tests.servers import ScratchDatabase, wait_until

PAGE: Final = Page("defining-tasks-and-events.md")
TIMEOUT_S: Final = 60.0


@pytest.fixture
def page(database: ScratchDatabase, tmp_path: Path) -> Path:
    """A folder as the page leaves it before anything runs: tables, modules, generated models."""
    for block in PAGE.blocks("sql"):
        query(database.dsn, block.text)
    PAGE.write_files(tmp_path)
    generate = PAGE.blocks("sh")[0]
    assert "gen types python" in generate.text
    done = shell(database, tmp_path, generate.text)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {block.language for block in PAGE.blocks()} == {"python", "sql", "sh", "pycon"}
    assert PAGE.files == {"schemas/tasks.py", "schemas/events.py", "worker.py", "api.py"}
    assert len(PAGE.blocks("sh")) == 3


@pytest.mark.pg(15)
def test_the_type_checkers_agree(page: Path) -> None:
    (page / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    programs = Path(sys.executable).parent
    for command in (
        (programs / "mypy", "--strict", "--config-file=", f"--cache-dir={MYPY_CACHE}",
         "worker.py", "api.py"),
        (programs / "pyright", "--pythonpath", sys.executable),
    ):  # fmt: skip
        variables = {**os.environ, "MYPYPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=page, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.pg(15)
def test_wrong_names_end_as_the_page_says(page: Path, database: ScratchDatabase) -> None:
    (session,) = PAGE.blocks("pycon")
    (page / "session.txt").write_text(session.text)
    done = shell(database, page, "python -m doctest session.txt")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.timeout(600)
def test_the_page_runs(page: Path, database: ScratchDatabase) -> None:
    _, prepare, run = (block.text for block in PAGE.blocks("sh"))
    done = shell(database, page, prepare)
    assert (done.returncode, done.stderr) == (0, "no differences\n"), done.stdout
    *servers, last = run.splitlines()
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(process(page, database, *server.removesuffix(" &").split()))
        stamped = (
            "select count(*) = 4 as done from conductor.activations a"
            " join conductor.subscriptions s on s.id = a.subscription"
            " where s.kind = 'change' and a.start_lsn is not null"
        )
        wait_until(lambda: query(database.dsn, stamped)[0]["done"], TIMEOUT_S, "capture")
        done = shell(database, page, last)
        assert (done.returncode, done.stdout) == (0, "True 19.0 cat.png@64\n"), done.stderr
        query(database.dsn, "insert into users (email, name) values"
              " ('ada@example.com', 'Ada'), ('bob@example.org', 'Bob')")  # fmt: skip
        query(database.dsn, "update users set email = 'ada@example.net' where name = 'Ada'")
        query(database.dsn, "update users set name = 'Bobby' where name = 'Bob'")
        query(database.dsn, "delete from users where name = 'Bobby'")
        asyncio.run(pass_a_day(database))
        wait_until(lambda: mails(database) >= EXPECTED_MAILS, TIMEOUT_S, "the mails")
        ended = "select count(*) as n from conductor.history where outcome <> 'completed'"
        wait_until(lambda: counts(database) == EXPECTED_RUNS, TIMEOUT_S, "the runs")
        assert query(database.dsn, ended)[0]["n"] == 0
        assert mails(database) == EXPECTED_MAILS


EXPECTED_MAILS = {
    ("user@example.com", "Hi"),
    ("ada@example.com", "Hello Ada"),
    ("ada@example.net", "No longer ada@example.com"),
}
EXPECTED_RUNS = {
    ("send-email", "invoke"): 3,
    ("process-order", "invoke"): 1,
    ("process-data", "invoke"): 1,
    ("make-thumbnail", "invoke"): 1,
    ("on-user-created", "change"): 1,  # the other address is not of example.com
    ("index-user", "change"): 2,
    ("on-new-address", "change"): 1,  # the other update is of the name alone
    ("greet", "event"): 1,
    ("greet", "change"): 3,
    ("greet", "cron"): 1,
}


async def pass_a_day(database: ScratchDatabase) -> None:
    """Let it be nine in Berlin, once: the summer ends with a day of 25 hours."""
    async with await psycopg.AsyncConnection.connect(database.dsn) as connection:
        await travel(connection, timedelta(hours=25))


def mails(database: ScratchDatabase) -> set[tuple[str, str]]:
    rows = query(
        database.dsn,
        "select payload ->> 'to' as receiver, payload ->> 'subject' as subject"
        " from conductor.history where task = 'send-email'",
    )
    return {(row["receiver"], row["subject"]) for row in rows}


def counts(database: ScratchDatabase) -> dict[tuple[str, str], int]:
    rows = query(
        database.dsn,
        "select task, trigger::text, count(*) from conductor.history"
        " where queue = 'default' group by 1, 2",
    )
    return {(row["task"], row["trigger"]): row["count"] for row in rows}
