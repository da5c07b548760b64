"""Pages of documentation whose blocks are run: what is in them, and a folder as a reader has it.

A Python block goes to the file that its first line names, SQL to the database, shell blocks run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tests.servers import ScratchDatabase

ROOT: Final = Path(__file__).parents[2]
MYPY_CACHE: Final = ROOT / ".mypy_cache" / "pages"  # what pages import is checked once for all
_BLOCK: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE: Final = re.compile(r"# ([\w/]+\.py)\n")


class Block(NamedTuple):
    """A block of code in a page."""

    language: str
    text: str


class Page:
    """A page of documentation."""

    def __init__(self, name: str) -> None:
        self.name = name
        text = (ROOT / "docs" / name).read_text()
        self._blocks = [Block(*match.groups()) for match in _BLOCK.finditer(text)]

    def blocks(self, language: str | None = None) -> list[Block]:
        """The blocks of a language, or all."""
        return [block for block in self._blocks if language in {None, block.language}]

    @property
    def files(self) -> set[str]:
        """The files that its Python blocks go to."""
        return {match[1] for block in self.blocks("python") if (match := _FILE.match(block.text))}

    def write_files(self, folder: Path) -> None:
        """Write the page's modules; a file's blocks are one after another in it."""
        for block in self.blocks("python"):
            name = _FILE.match(block.text)
            assert name is not None, f"no file is named: {block.text[:60]}"
            path = folder / name[1]
            if not path.parent.exists():
                path.parent.mkdir()
                (path.parent / "__init__.py").touch()
            with path.open("a") as file:
                file.write(block.text + "\n\n")


def environment(database: ScratchDatabase, folder: Path) -> dict[str, str]:
    """The environment of the page's commands."""
    programs = Path(sys.executable).parent
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{ROOT}",
        "CONDUCTOR_DSN": database.dsn,
        "CONDUCTOR_METRICS_PORT": "-1",
        "CDC_SOURCE_DSN": database.source_dsn,
        "CDC_SLOT": database.name,
        "CDC_METRICS_PORT": "-1",
    }


def shell(database: ScratchDatabase, folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell block to its end."""
    return subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", script], cwd=folder,
        env=environment(database, folder), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@contextmanager
def process(folder: Path, database: ScratchDatabase, *command: str) -> Iterator[None]:
    """A process that runs until the end of the block, and then ends as it should."""
    with (folder / f"{command[0]}.log").open("wb") as log:
        started = subprocess.Popen(
            command, cwd=folder, env=environment(database, folder), stdout=log, stderr=log
        )
        try:
            yield
            started.send_signal(signal.SIGTERM)
            assert started.wait(60) == 0
        finally:
            started.kill()
            started.wait()
