"""The demo as a user runs it, with less traffic."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAST_LINE = re.compile(
    r"demo: (\d+) changes committed, (\d+) jobs enqueued, (\d+) handled, 0 lost, 0 duplicated"
)


@pytest.mark.timeout(150)
def test_the_demo_ends_with_nothing_lost_or_duplicated(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "examples.shop.demo",
            "--seconds",
            "6",
            "--loads",
            "1",
            "--logs",
            tmp_path,
        ],
        env={**os.environ, "KEEP": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=140,
    )
    last = done.stdout.splitlines()[-1]
    match = LAST_LINE.fullmatch(last)
    assert match, f"{last}\n{done.stdout}\n{done.stderr}"
    changes, jobs, handled = map(int, match.groups())
    assert done.returncode == 0
    assert changes > 20_000
    assert jobs == handled > changes / 2
    assert done.stdout.count("SIGKILL") == 3
