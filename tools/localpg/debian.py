"""PostgreSQL 15 with wal2json from Debian's packages, unpacked into the project's cache.

Nothing is installed and nothing needs root (see `tools.debs`). Libraries that the system lacks
(libpq, ICU, LDAP, ...) are unpacked beside the server.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from tools.debs import Packages, PackagesUnavailable, dependencies, filling, is_installed, unpack
from tools.localpg.binaries import DEBIAN_SERVERS, Binaries, BinariesNotFound

VERSION = 15
PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".cache"
PACKAGES = (
    f"postgresql-{VERSION}",
    f"postgresql-client-{VERSION}",
    f"postgresql-{VERSION}-wal2json",
)
JIT_COMPILER = "libllvm"  # large, and only loaded when jit is on


def find_wal2json_binaries(cache: Path = CACHE) -> Binaries:
    """Return a PostgreSQL 15 with wal2json: the system's, the cached one, or a fresh download.

    Raises:
        BinariesNotFound: Debian's packages cannot be had here; the message says why in one line.
    """
    system = DEBIAN_SERVERS / str(VERSION)
    if (system / "lib" / "wal2json.so").is_file() and (system / "bin" / "postgres").is_file():
        return Binaries(system / "bin", system)
    home = cache / f"postgresql-{VERSION}"
    if not home.is_dir():
        try:
            _fill(home)
        except PackagesUnavailable as error:
            raise BinariesNotFound(str(error)) from error
    return _binaries(home)


def _binaries(home: Path) -> Binaries:
    bindir = home / "usr" / "lib" / "postgresql" / str(VERSION) / "bin"
    return Binaries(bindir, home, next(home.glob("usr/lib/*-linux-gnu*"), None))


def _fill(home: Path) -> None:
    if shutil.which("ldd") is None:
        raise PackagesUnavailable("no ldd")
    with filling(home) as (packages, root):
        archives = packages.download(PACKAGES)
        unpack(archives, root)
        _add_libraries(root, archives, packages)


def _add_libraries(root: Path, archives: list[Path], packages: Packages) -> None:
    """Unpack the libraries that the server misses, following the packages' dependencies."""
    seen: set[str] = set()
    while missing := _missing_libraries(_binaries(root)):
        wanted = {name for archive in archives for name in _libraries_for(archive)} - seen
        if not wanted:
            raise PackagesUnavailable(f"libraries not found: {', '.join(missing)}")
        seen |= wanted
        archives = packages.download(sorted(name for name in wanted if not is_installed(name)))
        unpack(archives, root)


def _libraries_for(archive: Path) -> list[str]:
    names = dependencies(archive)
    return [name for name in names if name.startswith("lib") and not name.startswith(JIT_COMPILER)]


def _missing_libraries(binaries: Binaries) -> list[str]:
    library = binaries.bindir.parent / "lib"
    plugins = [library / "libpqwalreceiver.so", library / "wal2json.so"]
    programs = map(str, [*binaries.bindir.iterdir(), *plugins])
    listed = subprocess.run(
        ["ldd", *programs],
        env={**os.environ, "LD_LIBRARY_PATH": str(binaries.library_path or "")},
        capture_output=True,
        check=False,
        text=True,
    )
    return sorted(set(re.findall(r"^\s*(\S+) => not found", listed.stdout, re.MULTILINE)))
