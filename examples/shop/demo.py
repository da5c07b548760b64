"""The whole path on real input, with processes killed in the middle, judged by an oracle.

    python -m examples.shop.demo        # or: make demo; KEEP=1 keeps everything running afterwards

Starts a PostgreSQL server of its own, a sidecar and two workers, sends traffic through the shop's
tables, kills the sidecar twice and a worker once (SIGKILL), waits until all is done, and compares
the queue's own record with what was committed. The exit status is 1 when anything was lost or
duplicated.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg

from examples.shop.display import Display
from examples.shop.installation import Installation, NotReady, create_database
from examples.shop.oracle import Verdict, create_shop, judge_database
from examples.shop.statements import STATEMENTS
from examples.shop.traffic import Plan, Traffic
from tools.localpg import BinariesNotFound, PostgresServer, ServerFailed, find_binaries

LOGS = Path(__file__).resolve().parents[2] / ".demo"
DRAIN_TIMEOUT_S = 60.0
SHOW_INTERVAL_S = 0.25
BUSY_JOBS = 500
PATIENCE = 0.2


@dataclass(frozen=True)
class Kill:
    """A SIGKILL to one process after this part of the traffic, or once many jobs wait."""

    process: str
    after: float
    when_busy: bool = False


KILLS = (Kill("sidecar", 0.25), Kill("worker-1", 0.4, when_busy=True), Kill("sidecar", 0.7))


class Demo:
    """One run on a server that is up."""

    def __init__(self, server: PostgresServer, plan: Plan, display: Display, logs: Path) -> None:
        self._server = server
        self._plan = plan
        self._display = display
        self.dsn = server.dsn("shop", "shop")
        self.installation = Installation(self.dsn, logs)
        self.traffic = Traffic(self.dsn, plan)
        self._busy = asyncio.Event()

    @property
    def psql(self) -> str:
        """The server's own psql where it has one."""
        psql = self._server.binaries.bindir / "psql"
        return str(psql) if psql.exists() else "psql"

    async def prepare(self) -> None:
        """Create the database with both schemas."""
        await asyncio.to_thread(create_database, self._server.dsn())
        await asyncio.to_thread(run_module, "conductor", "migrate", CONDUCTOR_DSN=self.dsn)
        await asyncio.to_thread(create_shop, self.dsn)
        self._display.say("migrated; the shop's tables and the oracle are there")

    async def run(self) -> Verdict:
        """Send the traffic, kill, drain, judge. The installation must be running.

        Raises:
            NotReady: a step took too long.
        """
        await self.installation.wait_captured()
        self._display.say(f"every change is captured: {self._plan.seconds:.0f} s of traffic")
        async with self._progress_shown():
            kills = asyncio.create_task(self._kill())
            await self.traffic.run()
            await kills
            self._display.say("traffic has ended; draining")
            try:
                await self.installation.drain(DRAIN_TIMEOUT_S)
            except NotReady as error:
                self._display.say(f"not drained: {error}")
        self._display.say("comparing the queue's record with the oracle")
        return await asyncio.to_thread(judge_database, self.dsn)

    async def _kill(self) -> None:
        processes = {process.name: process for process in self.installation.processes}
        started = time.monotonic()
        for kill in KILLS:
            await asyncio.sleep(started + kill.after * self._plan.seconds - time.monotonic())
            if kill.when_busy:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._busy.wait(), PATIENCE * self._plan.seconds)
            pid = processes[kill.process].pid
            processes[kill.process].kill()
            self._display.say(f"killed {kill.process} (pid {pid}, SIGKILL)")

    @asynccontextmanager
    async def _progress_shown(self) -> AsyncIterator[None]:
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            task = asyncio.create_task(self._show_progress(connection))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def _show_progress(self, connection: psycopg.AsyncConnection) -> None:
        while True:
            row = await (await connection.execute(STATEMENTS["read_counts"])).fetchone()
            changes, waiting, handled = row or (0, 0, 0)
            (self._busy.set if waiting >= BUSY_JOBS else self._busy.clear)()
            totals = self.traffic.totals
            restarts = (f"{p.name} {p.restarts}" for p in self.installation.processes)
            self._display.show(
                {
                    "transactions": f"{totals.committed:,} committed, {totals.rolled_back:,} not",
                    "changes": f"{changes:,}",
                    "jobs": f"{waiting:,} waiting, {handled:,} handled",
                    "restarts": ", ".join(restarts),
                }
            )
            await asyncio.sleep(SHOW_INTERVAL_S)


def run_module(*arguments: str, **settings: str) -> None:
    """Run `python -m …` to its end.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def explain(verdict: Verdict, display: Display) -> None:
    """Say what the last line cannot."""
    if verdict.redelivered:
        display.say(f"{verdict.redelivered} jobs were delivered again after the worker's death")
    if verdict.faults:
        display.say(f"{verdict}; see oracle.lost, oracle.duplicated, oracle.wrong")


def invitation(demo: Demo) -> str:
    """What to try while everything is kept running."""
    python, dsn, processes = sys.executable, demo.dsn, demo.installation.processes
    return "\n".join(
        [
            f"database  {dsn}",
            *(f"metrics   {url} ({name})" for name, url in demo.installation.metrics.items()),
            f"logs      {demo.installation.folder}",
            "try",
            f"  export CONDUCTOR_DSN='{dsn}' CDC_SOURCE_DSN='{dsn}'",
            f"  {python} -m conductor jobs list",
            f"  {python} -m cdc status",
            f"  {python} -m examples.shop.traffic --seconds 10",
            f"  {demo.psql} \"$CONDUCTOR_DSN\" -c 'table oracle.verdict'",
            f"  kill -9 {' or '.join(f'{p.pid} ({p.name})' for p in processes)}",
            "Ctrl-C stops everything and removes the server.",
        ]
    )


async def run_demo(plan: Plan, logs: Path, *, keep: bool) -> int:
    """Run the demo and return its exit status."""
    with PostgresServer(find_binaries()) as server, Display() as display:
        display.say(f"PostgreSQL {server.binaries.full_version} is up")
        demo = Demo(server, plan, display, logs)
        await demo.prepare()
        async with demo.installation:
            verdict = await demo.run()
            explain(verdict, display)
            if keep:
                display.close()
                print(f"{invitation(demo)}\ndemo: {verdict.summary}", flush=True)  # a pipe too
                await interrupted()
    if not keep:
        print(f"demo: {verdict.summary}")
    return 1 if verdict.faults else 0


async def interrupted() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    event = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    await event.wait()


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.shop.demo")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of traffic")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--loads", type=int, default=Plan.loads, help="of the whole stock")
    parser.add_argument("--logs", type=Path, default=LOGS, help="the folder for them")
    parser.add_argument("--keep", action="store_true", default=os.environ.get("KEEP", "") == "1")
    options = parser.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    plan = Plan(seed=options.seed, seconds=options.seconds, loads=options.loads)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        sys.exit(asyncio.run(run_demo(plan, options.logs, keep=options.keep)))
    except (NotReady, BinariesNotFound, ServerFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; everything is stopped")


if __name__ == "__main__":
    main()
