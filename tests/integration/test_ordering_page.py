"""`docs/ordering-batches-coalescing.md`: its module is what a type checker takes, and runs."""

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

PAGE: Final = Page("ordering-batches-coalescing.md")
TIMEOUT_S: Final = 60.0
RUN: Final = """
# shop.py
from conductor import Orchestrator

orchestrator = Orchestrator(conductor)
"""
PAY: Final = """
import asyncio, shop

async def main() -> None:
    async with shop.conductor:
        for account in (7, 8, 7):
            await shop.pay(account)

asyncio.run(main())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's module."""
    PAGE.write_files(tmp_path)
    return tmp_path


def test_every_block_belongs_to_the_module() -> None:
    assert {block.language for block in PAGE.blocks()} == {"python"}
    assert PAGE.files == {"shop.py"}


def test_the_type_checker_agrees(folder: Path) -> None:
    command = (
        str(Path(sys.executable).parent / "mypy"),
        *("--strict", "--config-file=", f"--cache-dir={MYPY_CACHE}", "shop.py"),
    )
    variables = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_the_page_runs(folder: Path, database: ScratchDatabase) -> None:
    for table in ("accounts (id int primary key, customer_id int, balance int)",
                  "products (id int primary key, name text)"):  # fmt: skip
        query(database.dsn, f"create table {table}")
    query(database.dsn, "alter table accounts replica identity full")  # a delete tells its customer
    with (folder / "shop.py").open("a") as file:
        file.write(RUN)
    assert shell(database, folder, "conductor migrate").returncode == 0
    with (
        process(folder, database, "cdc", "run"),
        process(folder, database, "conductor", "worker", "shop:orchestrator"),
    ):
        stamped = (
            "select count(*) = 3 as done from conductor.activations where start_lsn is not null"
        )
        wait_until(lambda: query(database.dsn, stamped)[0]["done"], TIMEOUT_S, "capture")
        query(database.dsn, "insert into accounts values (1, 10, 0), (2, 10, 0), (3, 30, 0)")
        query(database.dsn, "insert into products select n, case when n < 9 then 'a' else '' end"
              " from generate_series(1, 9) n")  # fmt: skip
        query(database.dsn, "update products set name = 'b' where id = 1")
        done = shell(database, folder, f"python -c '{PAY}'")
        assert done.returncode == 0, done.stderr
        counts = """
            select count(*) filter (where task = 'sync-account' and key = '10') = 2
                and count(*) filter (where task = 'charge') = 3
                and count(*) filter (where task = 'index') = 9
                and count(*) filter (where task = 'render') = 9 as done
            from conductor.history where outcome = 'completed'
        """
        wait_until(lambda: query(database.dsn, counts)[0]["done"], TIMEOUT_S, "all jobs")
    (left,) = query(
        database.dsn, "select task, last_error ->> 'message' as why from conductor.jobs"
    )
    assert left == {"task": "index", "why": "no name"}
