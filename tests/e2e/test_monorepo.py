"""The three packages of `examples/monorepo`, as three packages: built, installed, both sides run.

The worker and the API each have an environment of their own, with nothing of the other's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from conductor.migrations import migrate
from tests.integration.sidecar import environment, query
from tests.servers import ScratchDatabase, wait_until

ROOT: Final = Path(__file__).parents[2]
MONOREPO: Final = ROOT / "examples" / "monorepo"
SCHEMAS: Final = MONOREPO / "schemas" / "src" / "myapp_schemas"
PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q",
              "--cache-dir", str(ROOT / ".cache" / "pip"))  # fmt: skip
TIMEOUT_S: Final = 60.0


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    proxies = {name: value for name, value in os.environ.items() if "proxy" in name.lower()}
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    return subprocess.run(
        command, env={**kept, **proxies, **pip, **variables}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def succeed(*command: str | Path, **variables: str) -> str:
    done = run(*command, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(wheels: Path) -> None:
    """Build the four wheels; `build_wheel` runs in place, with the pinned backend."""
    sources = (ROOT, *(MONOREPO / name for name in ("schemas", "worker", "api")))
    succeed(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, *sources)
    names = {path.name.partition("-")[0] for path in wheels.glob("*.whl")}
    assert names == {"pgconductor", "myapp_schemas", "myapp_worker", "myapp_api"}


def install(folder: Path, wheels: Path, *packages: str) -> Path:
    """Create a clean environment with these packages and what they need; return its programs."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder)
    chosen = [
        path for path in wheels.glob("*.whl") if path.name.startswith(("pgconductor", *packages))
    ]
    python = folder / "bin" / "python"
    command = (*PIP, "--python", python, "install", "--no-compile")  # each runs once or twice
    succeed(*command, "-c", ROOT / "constraints.txt", *chosen)
    return folder / "bin"


@contextmanager
def process(*command: str | Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until the end of the block, and then ends as it should."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    started = subprocess.Popen(command, env={**kept, **variables})
    try:
        yield started
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    finally:
        started.kill()
        started.wait()


@pytest.mark.pg(15)
@pytest.mark.timeout(600)
def test_two_services_share_a_package_of_definitions(
    database: ScratchDatabase, tmp_path: Path
) -> None:
    build(tmp_path / "wheels")
    worker = install(tmp_path / "worker", tmp_path / "wheels", "myapp_schemas", "myapp_worker")
    api = install(tmp_path / "api", tmp_path / "wheels", "myapp_schemas", "myapp_api")
    dsn = {"CONDUCTOR_DSN": database.dsn}
    for programs, other in ((worker, "myapp_api"), (api, "myapp_worker")):
        assert run(programs / "python", "-c", f"import {other}", **dsn).returncode != 0
    loaded = succeed(
        api / "python", "-c",
        "import sys, myapp_schemas.tasks, myapp_schemas.events, myapp_schemas.database_types;"
        "print('psycopg' in sys.modules)",
    )  # fmt: skip
    assert loaded == "False\n"  # definitions load no driver
    query(database.dsn, (SCHEMAS / "schema.sql").read_text())
    migrate(database.dsn)
    assert succeed(worker / "conductor", "check", "myapp_worker.main:conductor", **dsn) == ""
    generated = succeed(worker / "conductor", "gen", "types", "python", **dsn)
    assert generated == (SCHEMAS / "database_types.py").read_text()
    with (
        process(worker / "cdc", "run", **environment(database)),
        process(
            worker / "conductor", "worker", "myapp_worker.main:orchestrator",
            CONDUCTOR_WAIT_CAPTURED_S="60", CONDUCTOR_METRICS_PORT="-1", **dsn,
        ),
    ):  # fmt: skip
        captured = "select exists (select from conductor.activations where start_lsn is not null)"
        wait_until(lambda: query(database.dsn, captured)[0]["exists"], TIMEOUT_S, "capture")
        lines = succeed(api / "myapp-api", "ada@example.com", "Ada", **dsn).splitlines()
        welcome, bought = (json.loads(line) for line in lines)
        assert welcome["sent"]
        assert welcome["message_id"].startswith("msg-")
        assert bought["total"] == "25.00"
        assert bought["confirmation"]["sent"]
        greetings = "select email, reason from greetings order by reason"
        wait_until(lambda: len(query(database.dsn, greetings)) == 2, TIMEOUT_S, "greetings")
        assert [(row["email"], row["reason"]) for row in query(database.dsn, greetings)] == [
            ("ada@example.com", "event"), ("ada@example.com", "row of Ada"),
        ]  # fmt: skip
        refused = run(api / "myapp-api", "no address", "Ada", **dsn)
        assert refused.returncode != 0
        assert "email" in refused.stderr
        assert query(database.dsn, "select count(*) from users")[0]["count"] == 1
