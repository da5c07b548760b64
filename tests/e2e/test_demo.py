"""The demo as a user runs it, with less traffic."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

LAST_LINE = re.compile(
    r"demo: (\d+) changes committed, (\d+) jobs enqueued, (\d+) handled, 0 lost, 0 duplicated"
)


SMALL = ["--seconds", "6", "--loads", "1"]


@pytest.mark.timeout(600)
def test_the_demo_ends_with_nothing_lost_or_duplicated(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.shop.demo", *SMALL, "--logs", tmp_path],
        env={**os.environ, "KEEP": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    last = done.stdout.splitlines()[-1]
    match = LAST_LINE.fullmatch(last)
    assert match, f"{last}\n{done.stdout}\n{done.stderr}"
    changes, jobs, handled = map(int, match.groups())
    assert done.returncode == 0
    assert changes > 20_000
    assert jobs == handled > changes / 2
    assert done.stdout.count("SIGKILL") == 3


@pytest.mark.timeout(600)
def test_what_is_kept_can_be_tried_and_ends_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "examples.shop.demo", *SMALL, "--logs", tmp_path],
        env={**os.environ, "KEEP": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout
        try:
            printed = []
            for line in demo.stdout:
                printed.append(line.rstrip("\n"))
                if LAST_LINE.fullmatch(printed[-1]):
                    break
            for address in re.findall(r"metrics   http://(\S+)", "\n".join(printed)):
                with urllib.request.urlopen(f"http://{address}", timeout=10) as page:
                    assert b"# HELP" in page.read()
            said = run_commands(printed)
        finally:
            demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
    jobs, status, *_ = said.split("\n slot ")
    assert re.search(r"\d+ +[a-z-]+ +completed +default +change", jobs), said
    assert "(" in status.split("retained wal bytes")[1].split("\n")[0], said
    assert "settle-payment" in status, said


def run_commands(printed: list[str]) -> str:
    """What the commands under ``try`` print; the one that kills is left out."""
    commands = [line.strip() for line in printed[printed.index("try") + 1 :] if line[:2] == "  "]
    script = "\n".join(command for command in commands if not command.startswith("kill"))
    done = subprocess.run(
        ["bash", "-euc", script.replace("--seconds 10", "--seconds 1")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
