"""Runs processes as a supervisor would: whatever dies is started again.

For the demo, the benchmarks and the crash tests. A process of ours ends with us, also when we are
killed, where the system can say so (`setpriv`).
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_TIMEOUT_S = 15.0
OWN_SETTINGS = ("CONDUCTOR_", "CDC_", "PG")


class SupervisedProcess:
    """One process, started again after each death until it is stopped.

    Args:
        name: for people, and of its log file.
        module: what `python -m` runs, with its arguments.
        settings: its environment, beside ours without settings of the product.
        folder: where its log goes, over an earlier run's; a restart appends.
        restart_delay_s: how long a death lasts.
    """

    def __init__(
        self,
        name: str,
        module: Sequence[str],
        settings: Mapping[str, str],
        folder: Path,
        *,
        restart_delay_s: float = 0.5,
    ) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        self.starts = 0
        self._restart_delay_s = restart_delay_s
        self._command = [*dies_with_us(), sys.executable, "-m", *module]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(OWN_SETTINGS)}
        self._environment = {**inherited, **settings}
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process else None

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU the running process has used (Linux, proc(5): utime and stime)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory_bytes(self) -> int:
        """How much of the running process is in memory (Linux, proc(5): VmRSS)."""
        return self._status_bytes("VmRSS")

    @property
    def peak_memory_bytes(self) -> int:
        """The most that it ever was (VmHWM)."""
        return self._status_bytes("VmHWM")

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return max(self.starts - 1, 0)

    async def start(self) -> None:
        """Start it and watch over it."""
        await self._spawn()
        self._watch = asyncio.create_task(self._keep_alive())

    def kill(self) -> None:
        """SIGKILL it now; it will be started again."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> int | None:
        """Ask it to stop (SIGTERM), wait, insist (SIGKILL); return its exit status."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        process = self._process
        if process is None:
            return None
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        return process.returncode

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        lines = self.log_file.read_text(errors="replace").splitlines()
        return "\n".join(lines[-count:])

    def _status_bytes(self, field: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    async def _spawn(self) -> None:
        with self.log_file.open("ab" if self.starts else "wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for us
            )
        self.starts += 1

    async def _keep_alive(self) -> None:
        while self._process is not None:
            await self._process.wait()
            await asyncio.sleep(self._restart_delay_s)
            await self._spawn()


def dies_with_us() -> list[str]:
    """The prefix of a command that ends when its parent does."""
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", "KILL"] if program else []


def free_port() -> int:
    """A TCP port of loopback that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
