"""One PostgreSQL server in a private temporary folder.

The server listens on a Unix socket in a folder that only its account (and root) can enter, where
every role is trusted, and on 127.0.0.1, where passwords are asked for. Its parent process stops
it and removes the folder; a guard process does so when the parent is killed.
"""

import itertools
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode

from tools.localpg import guard
from tools.localpg.account import make_home, server_account, usable_binaries
from tools.localpg.binaries import Binaries

SUPERUSER = "postgres"
START_ATTEMPTS = 5
POLL_INTERVAL_S = 0.01
DEFAULT_SETTINGS: Mapping[str, str] = {
    "wal_level": "logical",
    "max_connections": "200",
    "max_wal_senders": "40",
    "max_replication_slots": "40",
    "max_slot_wal_keep_size": "50GB",
    "max_prepared_transactions": "10",
    "shared_buffers": "128MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}
# For tests: a crash of the server loses nothing then, only a crash of the machine would.
FAST_SETTINGS: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}


class ServerFailed(Exception):  # noqa: N818  # named for what happened
    """The server did not start or stop; the message ends with its last log lines."""


class StopMode(Enum):
    """How to stop, as in `pg_ctl --mode`."""

    SMART = signal.SIGTERM
    FAST = signal.SIGINT
    IMMEDIATE = signal.SIGQUIT
    KILL = signal.SIGKILL


class PostgresServer:
    """A server that lives as long as this object is entered.

    Args:
        binaries: what to run.
        settings: server settings (`postgres -c`), over the defaults above.
        durable: off saves the fsyncs, and the disk where there is memory enough: right for tests,
            wrong for a benchmark.
        timeout_s: how long a start or a stop may take.

    Example:
        with PostgresServer(find_binaries(), settings={"work_mem": "8MB"}) as server:
            server.restart(StopMode.IMMEDIATE)
    """

    def __init__(
        self,
        binaries: Binaries,
        *,
        settings: Mapping[str, str] | None = None,
        durable: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        self._account = server_account()
        self._durable = durable
        self._settings = dict(settings or {})
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.binaries = binaries
        self.password = secrets.token_urlsafe(18)
        self.port = 0
        self.home = Path()

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.home / "data"

    @property
    def socket_folder(self) -> Path:
        """The folder of the Unix socket."""
        return self.home / "socket"

    @property
    def log_file(self) -> Path:
        """What the server has written to standard error."""
        return self.home / "log"

    @property
    def pid(self) -> int | None:
        """The postmaster's pid while it runs."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process else None

    def __enter__(self) -> Self:
        self.home = make_home(self._account, in_memory=not self._durable)
        try:
            self._start_guard()
            self.binaries = usable_binaries(self.binaries, self._account, self.home)
            self._initialise()
            self._start_on_free_port()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def dsn(
        self, dbname: str = "postgres", user: str = SUPERUSER, password: str | None = None
    ) -> str:
        """A connection URI over the Unix socket; needs a password from nobody."""
        query = urlencode({"host": str(self.socket_folder), "port": self.port})
        login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        return f"postgresql://{login}@/{quote(dbname, safe='')}?{query}"

    def tcp_dsn(
        self, dbname: str = "postgres", user: str = SUPERUSER, password: str | None = None
    ) -> str:
        """A connection URI over 127.0.0.1, with the superuser's password when none is given."""
        login = f"{quote(user, safe='')}:{quote(password or self.password, safe='')}"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{quote(dbname, safe='')}"

    def start(self) -> None:
        """Start the stopped server on its port and wait until it takes connections."""
        if self.pid is not None:
            raise ServerFailed(f"the server on port {self.port} is running already")
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self.binaries.bindir / "postgres", *self._arguments()],
                cwd="/",
                env=self.binaries.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the caller
                **self._account.identity,
            )
        self._wait_until_ready(self._process)

    def stop(self, mode: StopMode = StopMode.FAST) -> None:
        """Stop the server and wait for it; a server that is not running stays so."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(mode.value)
        try:
            self._process.wait(self._timeout_s)
        except subprocess.TimeoutExpired as error:
            raise self._failure(f"did not stop in {self._timeout_s:.0f} s ({mode.name})") from error
        self._wait_until_gone()
        self._process = None

    def restart(self, mode: StopMode = StopMode.FAST) -> None:
        """Stop and start again, on the same port and data."""
        self.stop(mode)
        self.start()

    def log(self) -> str:
        """The server's log so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def _arguments(self) -> list[str]:
        settings = {
            **DEFAULT_SETTINGS,
            **({} if self._durable else FAST_SETTINGS),
            **self._plugin_settings(),
            **self._settings,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.socket_folder),
            "port": str(self.port),
        }
        pairs = [("-c", f"{name}={value}") for name, value in settings.items()]
        return ["-D", str(self.data), *itertools.chain.from_iterable(pairs)]

    def _plugin_settings(self) -> dict[str, str]:
        """Allow wal2json where the server has a list of allowed plugins (recent minor releases)."""
        if self.binaries.has_wal2json and "output_plugin_libraries" in self.binaries.settings:
            return {"output_plugin_libraries": "pgoutput, test_decoding, wal2json"}
        return {}

    def _start_guard(self) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(self.home), str(self.data)],
            cwd="/",
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the caller's group must not reach it
        )

    def _initialise(self) -> None:
        for folder in (self.data, self.socket_folder):
            folder.mkdir(mode=0o700)
            self._account.own(folder)
        secret = self.home / "password"
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        self._account.own(secret)
        command = [
            str(self.binaries.bindir / "initdb"),
            *("--pgdata", str(self.data), "--username", SUPERUSER, "--pwfile", str(secret)),
            *("--auth-local", "trust", "--auth-host", "scram-sha-256"),
            *("--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"),
        ]
        done = subprocess.run(
            command,
            cwd="/",
            env=self.binaries.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            **self._account.identity,
        )
        secret.unlink()
        if done.returncode != 0:
            raise ServerFailed(f"initdb failed: {done.stdout.decode(errors='replace').strip()}")

    def _start_on_free_port(self) -> None:
        """Another process can take the port that was free a moment ago: then try the next one."""
        for attempt in range(1, START_ATTEMPTS + 1):
            self.port = _free_port()
            try:
                self.start()
            except ServerFailed:
                if attempt == START_ATTEMPTS or "Address already in use" not in self.log():
                    raise
            else:
                return

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """The eighth line of postmaster.pid says so (src/include/utils/pidfile.h)."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self._failure(f"did not start (exit status {process.returncode})")
            lines = _lines(self.data / "postmaster.pid")
            state = lines[7].strip() if len(lines) >= 8 and lines[0] == str(process.pid) else ""
            if state in {"ready", "standby"}:  # a standby that can be asked, if not written to
                return
            time.sleep(POLL_INTERVAL_S)
        raise self._failure(f"was not ready after {self._timeout_s:.0f} s")

    def _wait_until_gone(self) -> None:
        """Backends outlive a killed postmaster for a moment, and keep a new one from starting."""
        deadline = time.monotonic() + self._timeout_s
        while any(_is_in(process, self.data) for process in Path("/proc").glob("[0-9]*")):
            if time.monotonic() > deadline:
                raise self._failure("left processes behind")
            time.sleep(POLL_INTERVAL_S)

    def _failure(self, what: str) -> ServerFailed:
        last = "\n".join(self.log().splitlines()[-15:])
        return ServerFailed(f"PostgreSQL {self.binaries.full_version} {what}:\n{last}")

    def _remove(self) -> None:
        try:
            self.stop(StopMode.IMMEDIATE)
        finally:
            shutil.rmtree(self.home, ignore_errors=True)
            if self._guard is not None and self._guard.stdin is not None:
                self._guard.stdin.close()
                self._guard.wait()


def _is_in(process: Path, folder: Path) -> bool:
    """Whether a process of /proc works in this folder, as every process of a server does."""
    try:
        return (process / "cwd").samefile(folder)
    except OSError:  # it ended, or is not ours
        return False


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")
    except OSError:
        return []


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
