"""Files from Debian packages without installing them, as any user.

Packages are downloaded with `apt-get download` and unpacked with `dpkg-deb --extract`. Without
package lists on the machine, private ones are fetched into the working folder. No state of the
system's apt or dpkg is changed. Standard library only: `tools/venv.py` runs before any package
of ours is installed.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DOWNLOAD_TIMEOUT_S = 300


class PackagesUnavailable(Exception):  # noqa: N818  # named for what happened
    """Debian's packages cannot be had here; the message says why in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Debian's packages cannot be had here: {reason}")


class Packages:
    """A downloader of packages into a working folder."""

    def __init__(self, work: Path) -> None:
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise PackagesUnavailable(f"no {program}")
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
        except PackagesUnavailable:
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
        run("apt-get", *self._options, *arguments, cwd=self._work)


@contextmanager
def filling(home: Path) -> Iterator[tuple[Packages, Path]]:
    """Give a downloader and an empty folder, which becomes `home` at the end.

    The folder lies beside `home` and is renamed: two runs at once do not disturb each other.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.") as folder:
        root = Path(folder, "root")
        root.mkdir()
        yield Packages(Path(folder)), root
        root.chmod(0o755)
        try:
            root.rename(home)
        except OSError:
            if not home.is_dir():
                raise


def unpack(archives: Iterable[Path], root: Path) -> None:
    """Unpack the files of the archives below a folder."""
    for archive in archives:
        run("dpkg-deb", "--extract", str(archive), str(root))


def dependencies(archive: Path) -> list[str]:
    """The names of the packages that an archive depends on, the first of alternatives."""
    depends = run("dpkg-deb", "--field", str(archive), "Depends")
    return [entry.split("|")[0].split("(")[0].strip() for entry in depends.split(",")]


def is_installed(package: str) -> bool:
    """Whether the system has the package."""
    command = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    status = subprocess.run(command, capture_output=True, check=False, text=True)
    return status.stdout == "installed"


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a program of apt or dpkg and return what it prints."""
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
        raise PackagesUnavailable(lines[0] if lines else f"{command[0]} failed") from error
    except subprocess.TimeoutExpired as error:
        raise PackagesUnavailable(f"{command[0]} took {DOWNLOAD_TIMEOUT_S} s") from error
    return done.stdout
