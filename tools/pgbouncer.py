"""PgBouncer from Debian's package, unpacked into the project's cache.

Nothing is installed and nothing needs root (see `tools.debs`). Tests put it between the product
and a real server.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tools.debs import dependencies, filling, is_installed, unpack

PACKAGE = "pgbouncer"
SYSTEM = Path("/usr/sbin/pgbouncer")
CACHE = Path(__file__).resolve().parents[1] / ".cache"


@dataclass(frozen=True)
class PgBouncer:
    """The program, and the folder of the libraries that the system lacks."""

    program: Path
    libraries: Path | None = None


def find_pgbouncer(cache: Path = CACHE, system: Path = SYSTEM) -> PgBouncer:
    """Return the system's PgBouncer, the cached one, or a fresh download.

    Raises:
        PackagesUnavailable: Debian's package cannot be had here; the message says why in one line.
    """
    for installed in (shutil.which(PACKAGE), system):
        if installed and Path(installed).is_file():
            return PgBouncer(Path(installed))
    home = cache / PACKAGE
    if not home.is_dir():
        with filling(home) as (packages, root):
            archives = packages.download([PACKAGE])
            wanted = {name for archive in archives for name in dependencies(archive)}
            missing = sorted(n for n in wanted if n.startswith("lib") and not is_installed(n))
            unpack([*archives, *packages.download(missing)], root)
    return PgBouncer(home / "usr/sbin/pgbouncer", next(home.glob("usr/lib/*-linux-gnu*"), None))
