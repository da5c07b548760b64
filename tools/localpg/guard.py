"""Outlives the process that started a server, and cleans up after it.

Run as `python guard.py HOME DATA` with a pipe as standard input whose other end only the parent
holds: end of file means that the parent is gone, however it died. Then the server that runs in
DATA is stopped and HOME is removed. Uses nothing but the standard library.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

STOP_TIMEOUT_S = 10.0


def server_pid(data: Path) -> int | None:
    """The running postmaster of a data folder; a stale or foreign pid is None."""
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
        return pid if Path(f"/proc/{pid}/cwd").samefile(data) else None
    except (OSError, ValueError):
        return None


def stop_server(data: Path) -> None:
    """Shut the server down at once; its data folder is about to be removed."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    pid = server_pid(data)
    while pid is not None:
        expired = time.monotonic() > deadline
        os.kill(pid, signal.SIGKILL if expired else signal.SIGQUIT)
        time.sleep(0.05)
        pid = server_pid(data)


def main() -> None:
    """Wait for the end of the parent, then clean up."""
    home, data = Path(sys.argv[1]), Path(sys.argv[2])
    while sys.stdin.buffer.read(1):
        pass
    stop_server(data)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
