"""The account that a server runs as, and folders that it can use.

A PostgreSQL server refuses to run as root. Root therefore starts it as `postgres` or `nobody`,
who may be unable to read the project folder: its binaries are then linked or copied into the
server's own folder. The permissions of folders that are not ours are never changed.
"""

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from tools.localpg.binaries import Binaries, BinariesNotFound

# A Unix socket's whole path may have 107 bytes, of which `.s.PGSQL.65535.lock` takes 20.
MAX_SOCKET_FOLDER = 80
MEMORY = Path("/dev/shm")  # noqa: S108  # mkdtemp is safe there
MEMORY_NEEDED_BYTES = 4 * 1024**3
"""For what the servers of one run of the tests hold together, with much left for others."""


class ProcessIdentity(TypedDict, total=False):
    """The arguments of `subprocess.Popen` that choose the account; empty for one's own."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class Account:
    """Who runs the server: `identity` is empty when it is the current user."""

    uid: int
    gid: int
    identity: ProcessIdentity

    def own(self, path: Path) -> None:
        """Give a folder of ours to the account."""
        if self.identity:
            os.chown(path, self.uid, self.gid)

    def can_run(self, binaries: Binaries) -> bool:
        """Whether the account can execute the server's programs where they are."""
        try:
            for program in ("postgres", "initdb"):
                subprocess.run(
                    [binaries.bindir / program, "--version"],
                    cwd="/",
                    env=binaries.environment,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=True,
                    **self.identity,
                )
        except (OSError, subprocess.CalledProcessError):
            return False
        return True


def server_account() -> Account:
    """The current user or, for root, `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), {})
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        identity = ProcessIdentity(user=entry.pw_uid, group=entry.pw_gid, extra_groups=[])
        return Account(entry.pw_uid, entry.pw_gid, identity)
    raise BinariesNotFound("root cannot run a server, and there is no user postgres or nobody")


def make_home(account: Account, *, in_memory: bool = False) -> Path:
    """Create the folder for everything of one server, with a path short enough for sockets.

    ``in_memory``: in a file system that is lost with the machine, where that has room.
    """
    memory = [str(MEMORY)] if in_memory and _has_room(MEMORY) else []
    for parent in dict.fromkeys((*memory, tempfile.gettempdir(), "/tmp")):  # noqa: S108  # as above
        home = Path(tempfile.mkdtemp(prefix="localpg-", dir=parent))
        home.chmod(0o755 if account.identity else 0o700)  # the server's account must pass through
        if len(str(home)) <= MAX_SOCKET_FOLDER and _can_enter(account, home):
            return home
        home.rmdir()
    raise BinariesNotFound("no temporary folder that the server's account can enter")


def _has_room(folder: Path) -> bool:
    """Whether a file system in memory can grow, and programs may be run from it."""
    try:
        found = os.statvfs(folder)
        memory = Path("/proc/meminfo").read_text()
    except OSError:
        return False
    free = found.f_bavail * found.f_frsize
    available = int(memory.partition("MemAvailable:")[2].split()[0]) * 1024
    return not found.f_flag & os.ST_NOEXEC and min(free, available) >= MEMORY_NEEDED_BYTES


def _can_enter(account: Account, folder: Path) -> bool:
    command = ["/bin/sh", "-c", 'cd "$0"', str(folder)]
    return subprocess.run(command, cwd="/", check=False, **account.identity).returncode == 0


def usable_binaries(binaries: Binaries, account: Account, home: Path) -> Binaries:
    """Return the binaries, or a copy of them in `home` when the account cannot run them."""
    if account.can_run(binaries):
        return binaries
    copy = home / "install"
    for folder in binaries.folders:
        source = binaries.prefix / folder
        shutil.copytree(source, copy / folder, symlinks=True, copy_function=_link)
    for folder, _, _ in os.walk(copy):
        Path(folder).chmod(0o755)
    libraries = binaries.library_path
    moved = replace(
        binaries,
        bindir=copy / binaries.bindir.relative_to(binaries.prefix),
        prefix=copy,
        library_path=libraries and copy / libraries.relative_to(binaries.prefix),
    )
    if not account.can_run(moved):
        raise BinariesNotFound(f"uid {account.uid} cannot run {binaries.bindir}/postgres or a copy")
    return moved


def _link(source: str, target: str) -> None:
    """Link a file that everyone may read; copy another, for a link shares its permissions."""
    mode = Path(source).stat().st_mode
    try:
        if mode & stat.S_IROTH:
            os.link(source, target)
            return
    except OSError:  # another file system, or a foreign file that the kernel protects
        pass
    shutil.copy2(source, target)
    Path(target).chmod(mode | (0o055 if mode & stat.S_IXUSR else 0o044))
