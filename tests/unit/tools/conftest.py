"""Fake installations: shell scripts that print what the real programs print."""

from collections.abc import Callable
from pathlib import Path

import pytest

WriteProgram = Callable[[Path, str], Path]


@pytest.fixture
def write_program() -> WriteProgram:
    """A function that writes an executable shell script."""

    def write(path: Path, script: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def install(write_program: WriteProgram) -> Callable[[Path, str], Path]:
    """A function that installs a fake server of a version and returns its bin folder."""

    def install_server(prefix: Path, version: str) -> Path:
        postgres = (
            'case "$1" in\n'
            f"--version) echo 'postgres (PostgreSQL) {version} (Debian {version}-0+deb12u1)';;\n"
            "--describe-config) printf 'wal_level\\tsighup\\nwork_mem\\tuser\\n';;\n"
            "esac"
        )
        write_program(prefix / "bin" / "initdb", "exit 0")
        return write_program(prefix / "bin" / "postgres", postgres).parent

    return install_server
