"""Where a server's folder is made."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.localpg import account
from tools.localpg.account import make_home, server_account

EVERYTHING = 1 << 60


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of the one in memory."""
    with tempfile.TemporaryDirectory(prefix="m-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setattr(account, "MEMORY", folder)
        monkeypatch.setattr(account, "MEMORY_NEEDED_BYTES", 1)
        yield folder


def parent(*, in_memory: bool) -> Path:
    home = make_home(server_account(), in_memory=in_memory)
    home.rmdir()
    return home.parent


def test_only_what_may_be_lost_is_in_memory(memory: Path) -> None:
    assert parent(in_memory=True) == memory
    assert parent(in_memory=False) == Path(tempfile.gettempdir())


def test_without_room_there_it_is_on_the_disk(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "MEMORY_NEEDED_BYTES", EVERYTHING)
    assert parent(in_memory=True) == Path(tempfile.gettempdir())


def test_where_no_program_may_run_it_is_on_the_disk(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(os.statvfs(memory))
    found[8] |= os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(found))
    assert parent(in_memory=True) == Path(tempfile.gettempdir())


def test_without_such_a_file_system_it_is_on_the_disk(memory: Path) -> None:
    memory.rmdir()
    try:
        assert parent(in_memory=True) == Path(tempfile.gettempdir())
    finally:
        memory.mkdir()
