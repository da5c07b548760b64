"""PostgreSQL 15 with wal2json from Debian's packages, unpacked into the project's cache.

Nothing is installed and no state of the system's apt is changed: packages are downloaded with
`apt-get download` and unpacked with `dpkg-deb --extract`, as any user. Without package lists on
the machine, private ones are fetched into the cache. Libraries that the system lacks (libpq,
ICU, LDAP, ...) are unpacked beside the server.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

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
DOWNLOAD_TIMEOUT_S = 300


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
        _fill(home)
    return _binaries(home)


def _binaries(home: Path) -> Binaries:
    bindir = home / "usr" / "lib" / "postgresql" / str(VERSION) / "bin"
    return Binaries(bindir, home, next(home.glob("usr/lib/*-linux-gnu*"), None))


def _fill(home: Path) -> None:
    """Unpack in a folder beside `home`, then rename: two runs at once do not disturb each other."""
    for program in ("apt-get", "dpkg-deb", "ldd"):
        if shutil.which(program) is None:
            raise BinariesNotFound(f"Debian's packages cannot be had here: no {program}")
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.") as folder:
        work = Path(folder)
        root = work / "root"
        root.mkdir()
        apt = _Apt(work)
        archives = apt.download(PACKAGES)
        _unpack(archives, root)
        _add_libraries(root, archives, apt)
        root.chmod(0o755)
        try:
            root.rename(home)
        except OSError:
            if not home.is_dir():
                raise


def _add_libraries(root: Path, archives: list[Path], apt: "_Apt") -> None:
    """Unpack the libraries that the server misses, following the packages' dependencies."""
    seen: set[str] = set()
    while missing := _missing_libraries(_binaries(root)):
        wanted = {name for archive in archives for name in _library_dependencies(archive)} - seen
        if not wanted:
            raise BinariesNotFound(f"libraries not found for PostgreSQL {VERSION}: {missing}")
        seen |= wanted
        archives = apt.download(sorted(name for name in wanted if not _is_installed(name)))
        _unpack(archives, root)


def _missing_libraries(binaries: Binaries) -> list[str]:
    library = binaries.bindir.parent / "lib"
    plugins = [library / "libpqwalreceiver.so", library / "wal2json.so"]
    programs = map(str, [*binaries.bindir.iterdir(), *plugins])
    libraries = {"LD_LIBRARY_PATH": str(binaries.library_path or "")}
    listed = subprocess.run(
        ["ldd", *programs],
        env={**os.environ, **libraries},
        capture_output=True,
        check=False,
        text=True,
    )
    return sorted(set(re.findall(r"^\s*(\S+) => not found", listed.stdout, re.MULTILINE)))


def _library_dependencies(archive: Path) -> list[str]:
    """The first alternative of each library that the package depends on."""
    depends = _run("dpkg-deb", "--field", str(archive), "Depends")
    names = [entry.split("|")[0].split("(")[0].strip() for entry in depends.split(",")]
    return [name for name in names if name.startswith("lib") and not name.startswith(JIT_COMPILER)]


def _is_installed(package: str) -> bool:
    command = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    status = subprocess.run(command, capture_output=True, check=False, text=True)
    return "not-installed" not in status.stdout and "installed" in status.stdout


def _unpack(archives: Iterable[Path], root: Path) -> None:
    for archive in archives:
        _run("dpkg-deb", "--extract", str(archive), str(root))


class _Apt:
    """`apt-get download` with the system's package lists, or else with private ones."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._options: tuple[str, ...] = ("-q", "-o", "APT::Sandbox::User=root")
        self._private = False

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Download the packages and return the new archives."""
        if not packages:
            return []
        before = set(self._work.glob("*.deb"))
        try:
            self._apt_get("download", *packages)
        except BinariesNotFound:
            if self._private:
                raise
            self._fetch_lists()
            self._apt_get("download", *packages)
        return sorted(set(self._work.glob("*.deb")) - before)

    def _fetch_lists(self) -> None:
        state, cache = self._work / "apt-state", self._work / "apt-cache"
        for folder in (state / "lists" / "partial", cache / "archives" / "partial"):
            folder.mkdir(parents=True)
        folders = (f"Dir::State={state}", f"Dir::Cache={cache}")
        for option in (*folders, "Dir::State::status=/var/lib/dpkg/status"):
            self._options += ("-o", option)
        self._private = True
        self._apt_get("update")

    def _apt_get(self, *arguments: str) -> None:
        _run("apt-get", *self._options, *arguments, cwd=self._work)


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        reason = lines[0] if lines else f"exit status {error.returncode}"
        raise BinariesNotFound(f"Debian's packages cannot be had here: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise BinariesNotFound(f"Debian's packages cannot be had here: {error}") from error
    return done.stdout
