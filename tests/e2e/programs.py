"""The two programs as processes of a test."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.supervision import OWN_SETTINGS, dies_with_us

TIMEOUT_S = 60.0


@contextmanager
def running(module: list[str], settings: dict[str, str], log: Path) -> Iterator[None]:
    """A process that writes its standard error into a file; it must end well."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OWN_SETTINGS)}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*dies_with_us(), sys.executable, "-m", *module],
            env={**inherited, **settings},
            stderr=file,
        )
        try:
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()
