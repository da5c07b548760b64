"""The plugin for pytest, in a project of its own: what it prints when a test fails."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from psycopg.conninfo import make_conninfo

from tests.integration.pages import shell
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.pg(18)

SECRET: Final = "pa55word"
FAILS: Final = """
pytest_plugins = ["conductor.testing.plugin"]

def test_it(conductor_dsn: str, conductor_server_dsn: str) -> None:
    assert not conductor_dsn.startswith("")
"""


def fail(database: ScratchDatabase, folder: Path, dsn: str) -> str:
    (folder / "test_it.py").write_text(FAILS)
    command = "python -m pytest -p no:cacheprovider -p no:cloudcoil test_it.py"
    done = shell(database, folder, f"export CONDUCTOR_TEST_DSN='{dsn}'\n{command}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done.stdout


def test_a_failing_test_shows_no_password(database: ScratchDatabase, tmp_path: Path) -> None:
    said = fail(database, tmp_path, make_conninfo(database.admin_dsn, password=SECRET))
    assert "dbname=conductor_test_" in said
    assert "1 failed" in said


@pytest.mark.parametrize(
    "dsn", [f"host=/nowhere password={SECRET}", f"postgresql://me:{SECRET}@x@db/"]
)
def test_a_server_that_is_not_there_is_said_in_a_line(
    database: ScratchDatabase, tmp_path: Path, dsn: str
) -> None:
    said = fail(database, tmp_path, dsn)
    assert "no server for tests: " in said
    assert "psycopg" not in said
    assert "1 error" in said
