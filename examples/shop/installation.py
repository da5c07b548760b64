"""The shop as it is installed: a role and a database, a sidecar and some workers.

Only `create_database` needs a superuser. All else is done by an ordinary role that owns the
database, and has REPLICATION for the sidecar.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

from examples.shop.statements import STATEMENTS
from tools.supervision import SupervisedProcess, free_port

ROLE = "shop"
POLL_INTERVAL_S = 0.2


class NotReady(Exception):  # noqa: N818 - named for what happened
    """The shop did not get where it should within its time; the message holds the logs' ends."""


class Installation:
    """The processes of a shop whose database is there. Enter it to run them.

    Args:
        dsn: the database; of an ordinary role that owns it and has REPLICATION.
        folder: for the logs.
        workers: how many worker processes.
        restart_delay_s: how long a process that died stays down.
    """

    def __init__(
        self, dsn: str, folder: Path, *, workers: int = 2, restart_delay_s: float = 0.5
    ) -> None:
        self.dsn = dsn
        self.folder = folder
        self.metrics: dict[str, str] = {}
        self._restart_delay_s = restart_delay_s
        sidecar = {"CDC_SOURCE_DSN": dsn}
        worker = {"CONDUCTOR_DSN": dsn}
        orchestrator = "examples.shop.tasks:orchestrator"
        self.sidecar = self._process("sidecar", ("cdc", "run"), sidecar)
        self.workers = [
            self._process(f"worker-{number}", ("conductor", "worker", orchestrator), worker)
            for number in range(1, workers + 1)
        ]

    async def __aenter__(self) -> Self:
        try:
            for process in self.processes:
                await process.start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await asyncio.gather(*(process.stop() for process in self.processes))

    @property
    def processes(self) -> list[SupervisedProcess]:
        """Every process of the shop."""
        return [*self.workers, self.sidecar]

    async def wait_captured(self, timeout_s: float = 30.0) -> None:
        """Wait until each change gives its jobs.

        Raises:
            NotReady: it took longer.
        """
        await self._wait_for("is_captured", {}, timeout_s, bool)

    async def drain(self, timeout_s: float) -> None:
        """Wait until every committed change is a job, and every job is done.

        Raises:
            NotReady: it took longer.
        """
        deadline = time.monotonic() + timeout_s
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            last = await (await connection.execute(STATEMENTS["close_traffic"])).fetchone()
        revision = str(last[0]) if last else ""
        await self._wait_for("is_routed", {"revision": revision}, timeout_s, bool)
        left_s = deadline - time.monotonic()
        await self._wait_for("count_pending", {}, left_s, lambda pending: pending == 0)

    async def _wait_for(
        self,
        statement: str,
        parameters: dict[str, Any],
        timeout_s: float,
        reached: Callable[[Any], bool],
    ) -> None:
        deadline = time.monotonic() + timeout_s
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            while True:
                row = await (await connection.execute(STATEMENTS[statement], parameters)).fetchone()
                if row is not None and reached(row[0]):
                    return
                if time.monotonic() > deadline:
                    raise NotReady(f"{statement} not within {timeout_s:.0f} s\n{self._logs()}")
                await asyncio.sleep(POLL_INTERVAL_S)

    def _logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.last_lines()}" for p in self.processes)

    def _process(
        self, name: str, module: tuple[str, ...], settings: dict[str, str]
    ) -> SupervisedProcess:
        port = str(free_port())
        self.metrics[name] = f"http://127.0.0.1:{port}/metrics"
        prefix = "CDC" if module[0] == "cdc" else "CONDUCTOR"
        settings = {**settings, f"{prefix}_METRICS_PORT": port}
        return SupervisedProcess(
            name, module, settings, self.folder, restart_delay_s=self._restart_delay_s
        )


def create_database(admin_dsn: str) -> None:
    """Create the role and the database that it owns."""
    with psycopg.connect(admin_dsn, autocommit=True) as connection:
        connection.execute(STATEMENTS["create_role"])
        connection.execute(STATEMENTS["create_database"])
