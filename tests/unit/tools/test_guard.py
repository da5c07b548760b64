import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.localpg import guard


def write_pid(data: Path, content: str) -> None:
    data.mkdir(exist_ok=True)
    (data / "postmaster.pid").write_text(content)


def test_only_a_process_that_works_in_the_folder_is_its_server(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_pid(data, f"{os.getpid()}\n{data}\n")
    assert guard.server_pid(data) is None
    with subprocess.Popen(["/bin/sh", "-c", "read line"], cwd=data, stdin=subprocess.PIPE) as child:
        write_pid(data, f"{child.pid}\n{data}\n")
        assert guard.server_pid(data) == child.pid


@pytest.mark.parametrize("content", ["", "x\n", "999999999\n"])
def test_a_useless_pid_file_is_no_server(tmp_path: Path, content: str) -> None:
    write_pid(tmp_path / "data", content)
    assert guard.server_pid(tmp_path / "data") is None


def test_no_pid_file_is_no_server(tmp_path: Path) -> None:
    assert guard.server_pid(tmp_path) is None


def test_the_end_of_the_parent_stops_the_server_and_removes_its_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    data = home / "data"
    data.mkdir()
    with subprocess.Popen(["/bin/sleep", "100"], cwd=data) as server:
        write_pid(data, f"{server.pid}\n")
        command = [sys.executable, "-I", guard.__file__, str(home), str(data)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd="/") as process:
            assert process.stdin is not None
            assert home.exists()
            process.stdin.close()
            server.wait()
    assert process.returncode == 0
    assert not home.exists()
