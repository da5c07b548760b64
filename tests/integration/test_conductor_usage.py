"""What a command line gets wrong is told in two lines, with status 2 or 78, and is no bug."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psycopg
import pytest

import cdc.cli
import conductor.cli
from tests.servers import ScratchDatabase

LATE = "run_at 9999-12-31 00:00:00+00:00 is after 9999-12-30"
ORDERED = "Give key (at most 500 characters), and neither run_at nor priority."
MODULE = "Give MODULE:NAME, the module as in an import, not as a file: shop.tasks:app."


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, list[str]]:
    monkeypatch.setattr(sys, "argv", ["conductor", *arguments])
    with pytest.raises(SystemExit) as ended:
        conductor.cli.main()
    status = ended.value.code
    assert isinstance(status, int)
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "status", "error", "hint"),
    [
        ("invoke t --priority 40000", 2, "priority 40000 is not between", "Nothing was stored."),
        ("invoke t --run-at 9999-12-31T00:00:00+00:00", 2, LATE, "Nothing was stored."),
        ("jobs list --state faild", 2, "unknown state 'faild'; did you mean 'failed'?", "One of "),
        ("worker :orchestrator", 78, "':orchestrator' names no module", MODULE),
        ("worker ./tasks.py", 78, "'./tasks.py' names no module", MODULE),
        ("worker tasks.py:app", 78, "cannot import tasks.py: ModuleNotFoundError", MODULE),
    ],
)
def test_what_needs_no_database_to_be_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    status: int,
    error: str,
    hint: str,
) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", "postgresql://nobody@127.0.0.1:1/nowhere")
    found, lines = run(monkeypatch, capsys, *arguments.split())
    assert found == status
    assert lines[0].startswith(f"error: {error}")
    assert lines[1].startswith(f"hint: {hint}")
    assert len(lines) == 2


@pytest.mark.parametrize("program", [conductor.cli.main, cdc.cli.main])
def test_the_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: Callable[[], None]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--version"])
    with pytest.raises(SystemExit) as ended:
        program()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pgconductor {version('pgconductor')}\n"


def test_no_schema(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(monkeypatch, capsys, "gen", "types", "python", "--schemas", " ,")
    assert status == 2
    assert any("no schema is named" in line for line in lines)


def test_a_file_that_cannot_be_written(
    migrated: ScratchDatabase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", migrated.dsn)
    file = tmp_path / "missing" / "rows.py"
    status, lines = run(monkeypatch, capsys, "gen", "types", "python", "-o", str(file))
    assert status == 78
    assert lines == [
        f"error: cannot write {file}: No such file or directory",
        "hint: Name another --output.",
    ]


@pytest.mark.parametrize("options", [(), ("--key", "a", "--priority", "1")])
def test_what_an_ordered_task_cannot_have(
    migrated: ScratchDatabase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    with psycopg.connect(migrated.dsn, autocommit=True) as connection:
        connection.execute(
            "insert into conductor.tasks (app, name, queue, max_attempts, retention, ordered)"
            " values ('shop', 'ship', 'mail', 5, '1 day', true)"
        )
    monkeypatch.setenv("CONDUCTOR_DSN", migrated.dsn)
    status, lines = run(monkeypatch, capsys, "invoke", "ship", "1", *options)
    assert (status, lines) == (2, ["error: task 'ship' is ordered by key", f"hint: {ORDERED}"])
