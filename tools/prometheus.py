"""Prometheus and promtool from Debian's package, unpacked into the project's cache.

Nothing is installed and nothing needs root (see `tools.debs`). Tests check rules with promtool and
let a real server scrape real processes.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tools.debs import filling, unpack

PACKAGE = "prometheus"
CACHE = Path(__file__).resolve().parents[1] / ".cache"


@dataclass(frozen=True)
class Prometheus:
    """The two programs of one installation."""

    server: Path
    promtool: Path

    def check(self, *arguments: str | Path, text: str = "") -> str:
        """Run promtool, give it a text to read, and return what it prints.

        Raises:
            AssertionError: it found something; the message is all that it printed.
        """
        done = subprocess.run(
            [self.promtool, *arguments],
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
        )
        if done.returncode != 0:
            raise AssertionError(done.stdout)
        return done.stdout


def find_prometheus(cache: Path = CACHE) -> Prometheus:
    """Return the system's Prometheus, the cached one, or a fresh download.

    Raises:
        PackagesUnavailable: Debian's package cannot be had here; the message says why in one line.
    """
    server, promtool = shutil.which("prometheus"), shutil.which("promtool")
    if server and promtool:
        return Prometheus(Path(server), Path(promtool))
    home = cache / PACKAGE
    if not home.is_dir():
        with filling(home) as (packages, root):
            unpack(packages.download([PACKAGE]), root)
    return Prometheus(home / "usr/bin/prometheus", home / "usr/bin/promtool")
