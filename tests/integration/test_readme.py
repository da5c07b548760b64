"""The README's example runs as it stands there, with the README's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.servers import ScratchDatabase, wait_until

README = Path(__file__).parents[2] / "README.md"
TIMEOUT_S = 60.0


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the example as `welcome.py`."""
    (example,) = blocks("python")
    (tmp_path / "welcome.py").write_text(example)
    return tmp_path


@contextmanager
def started(*command: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT_S) == 0


def test_the_example_greets_a_new_user_once(database: ScratchDatabase, folder: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "CONDUCTOR_DSN": database.dsn,
        "CONDUCTOR_METRICS_PORT": "-1",
        "CDC_SOURCE_DSN": database.source_dsn,
        "CDC_METRICS_PORT": "-1",
        "CDC_SLOT": database.name,
    }
    with psycopg.connect(database.dsn, autocommit=True) as connection, ExitStack() as stack:
        connection.execute("create table users (id bigint primary key, email text, secret text)")

        def run(*command: str) -> None:
            subprocess.run(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=environment,
                check=True,
                timeout=TIMEOUT_S,
                stdout=subprocess.DEVNULL,
            )

        def count(statement: str) -> int:
            row = connection.execute(statement.encode()).fetchone()
            assert row is not None
            return int(row[0])

        run("conductor", "migrate")
        run("cdc", "check")
        for command in (("cdc", "run"), ("conductor", "worker", "welcome:orchestrator")):
            stack.enter_context(started(*command, folder=folder, environment=environment))
        wait_until(
            lambda: (
                count("select count(*) from conductor.activations where start_lsn > '0/0'") == 1
            ),
            TIMEOUT_S,
            "the subscription's start",
        )
        connection.execute("insert into users values (1, 'ada@example.com', 'x')")
        wait_until(
            lambda: count("select count(*) from conductor.job where state = 'completed'") == 2,
            TIMEOUT_S,
            "the job and the one it invoked",
        )
        rows = connection.execute("select task, payload from conductor.job order by id").fetchall()
    assert rows[0][0] == "welcome"
    assert rows[0][1]["new"] == {"id": 1, "email": "ada@example.com"}
    assert rows[1] == ("send-mail", {"to": "ada@example.com"})


def test_the_commands_exist() -> None:
    named = set(re.findall(r"^(?:conductor|cdc) (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert named >= {"migrate", "check", "worker", "jobs"}
    for program in ("conductor", "cdc"):
        help_text = subprocess.run(
            [sys.executable, "-m", program, "--help"],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        ).stdout
        commands = {
            command
            for found, command in re.findall(r"\b(conductor|cdc) (\w+)", "\n".join(blocks("sh")))
            if found == program
        }
        assert all(command in help_text for command in commands)
