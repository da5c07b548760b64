"""`docs/durable-execution.md`, run from end to end: every block of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.integration.pages import MYPY_CACHE, ROOT, Page, process, shell
from tests.integration.sidecar import query
from tests.servers import ScratchDatabase, wait_until

pytestmark = pytest.mark.pg(18)

PAGE: Final = Page("durable-execution.md")
TIMEOUT_S: Final = 60.0
PYTEST: Final = "pytest -p no:cacheprovider -p no:cloudcoil"  # as this project runs it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's modules."""
    PAGE.write_files(tmp_path)
    return tmp_path


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {block.language for block in PAGE.blocks()} == {"python", "sql", "sh"}
    assert PAGE.files == {
        *("shop.py", "later.py", "place.py", "paying.py"),
        *("test_shop.py", "test_days.py"),
    }
    assert [len(PAGE.blocks(language)) for language in ("sql", "sh")] == [1, 3]


def test_the_type_checker_agrees(folder: Path) -> None:
    command = (
        str(Path(sys.executable).parent / "mypy"),
        *("--strict", "--config-file=", f"--cache-dir={MYPY_CACHE}"),
        *sorted(PAGE.files),
    )
    variables = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_tests_pass_and_versions_stand_side_by_side(
    folder: Path, database: ScratchDatabase
) -> None:
    test, _, _ = (block.text for block in PAGE.blocks("sh"))
    test = test.replace("pytest", PYTEST)
    done = shell(database, folder, test)
    said = "4 passed, 1 error" in done.stdout and "set it to the DSN of one where" in done.stdout
    assert (done.returncode, said) == (1, True), done.stdout  # no server: failed, not skipped
    done = shell(database, folder, f"export CONDUCTOR_TEST_DSN='{database.admin_dsn}'\n{test}")
    assert (done.returncode, "5 passed" in done.stdout) == (0, True), done.stdout + done.stderr
    left = "select count(*) as left from pg_database where datname like 'conductor\\_test\\_%'"
    assert query(database.admin_dsn, left)[0]["left"] == 0
    done = shell(database, folder, "python later.py && python paying.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_the_page_runs(folder: Path, database: ScratchDatabase) -> None:
    for block in PAGE.blocks("sql"):
        query(database.dsn, block.text)
    _, migrate, run = (block.text for block in PAGE.blocks("sh"))
    assert shell(database, folder, migrate).returncode == 0
    first, second, last = run.splitlines()
    with (
        process(folder, database, *first.removesuffix(" &").split()),
        process(folder, database, *second.removesuffix(" &").split()),
    ):
        done = shell(database, folder, last)
        assert done.stdout == "shipped (1, 250) left [('lamp', 9)]\n", done.stderr
        assert f"It prints `{done.stdout.strip()}`" in (ROOT / "docs" / PAGE.name).read_text()
        ended = "select count(*) = 2 as done from conductor.history where task = 'fulfil'"
        wait_until(lambda: query(database.dsn, ended)[0]["done"], TIMEOUT_S, "both orders")
    rows = query(database.dsn, "select task, outcome::text, error from conductor.history")
    outcomes = {(row["task"], row["outcome"]) for row in rows}
    assert outcomes >= {("fulfil", "completed"), ("fulfil", "failed"), ("remember", "completed")}
    (failed,) = [row["error"]["message"] for row in rows if row["outcome"] == "failed"]
    assert failed == "bomb is sold out"
    names = query(database.dsn, "select name from conductor.schedules order by name")
    assert [row["name"] for row in names] == ["order 1", "order 2"]
