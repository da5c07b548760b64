"""The stand everything is measured on: one durable server, one database, our processes."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from psycopg import sql

from benchmarks.statements import STATEMENTS
from conductor.migrations import migrate
from tools.localpg import PostgresServer
from tools.supervision import SupervisedProcess, free_port

SETTINGS = {"max_wal_size": "8GB", "checkpoint_timeout": "30min", "shared_buffers": "512MB"}
POLL_INTERVAL_S = 0.05
TIMEOUT_S = 120.0
ROLE = "bench"
CREATE_DATABASE: Final = "create database {} owner bench"


class Stand:
    """A database of one benchmark, and what runs on it. Make it with `build`."""

    def __init__(
        self,
        server: PostgresServer,
        name: str,
        connection: psycopg.AsyncConnection,
        folder: Path,
    ) -> None:
        self.server = server
        self.slot = f"{ROLE}_{name}"
        self.dsn = server.dsn(self.slot, ROLE)
        self.connection = connection
        self._folder = folder

    @classmethod
    @asynccontextmanager
    async def build(cls, server: PostgresServer, name: str, folder: Path) -> AsyncIterator[Self]:
        """Create a database with both schemas on a server that is up; drop its slot at the end."""
        database = f"{ROLE}_{name}"
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(STATEMENTS["create_role"])
            admin.execute(sql.SQL(CREATE_DATABASE).format(sql.Identifier(database)))
        dsn = server.dsn(database, ROLE)
        migrate(dsn)
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            await connection.execute(files(__package__).joinpath("schema.sql").read_bytes())
            stand = cls(server, name, connection, folder)
            yield stand
            await stand.run("drop_slot", slot=stand.slot)

    async def run(self, statement: str, **parameters: Any) -> Any:
        """Run a named statement and return the first value of its first row, or None."""
        row = await self.row(statement, **parameters)
        return row[0] if row else None

    async def row(self, statement: str, **parameters: Any) -> tuple[Any, ...] | None:
        """Run a named statement and return its first row."""
        cursor = await self.connection.execute(STATEMENTS[statement], parameters)
        return await cursor.fetchone() if cursor.description else None

    async def wait_for(
        self, statement: str, timeout_s: float = TIMEOUT_S, /, **parameters: Any
    ) -> float:
        """Wait until the statement says true; return when that was (monotonic seconds).

        Raises:
            TimeoutError: it never was.
        """
        deadline = time.monotonic() + timeout_s
        while not await self.run(statement, **parameters):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{statement}: not within {timeout_s:.0f} s")
            await asyncio.sleep(POLL_INTERVAL_S)
        return time.monotonic()

    @asynccontextmanager
    async def sidecar(self) -> AsyncIterator[SupervisedProcess]:
        """A running `cdc run`."""
        settings = {
            "CDC_SOURCE_DSN": self.dsn,
            "CDC_SLOT": self.slot,
            "CDC_METRICS_PORT": str(free_port()),
        }
        async with self._process("sidecar", ("cdc", "run"), settings) as process:
            yield process

    @asynccontextmanager
    async def worker(self, orchestrator: str) -> AsyncIterator[str]:
        """A running worker of `benchmarks.tasks`; yields the address of its metrics."""
        port = str(free_port())
        settings = {"CONDUCTOR_DSN": self.dsn, "CONDUCTOR_METRICS_PORT": port}
        command = ("conductor", "worker", f"benchmarks.tasks:{orchestrator}")
        async with self._process("worker", command, settings):
            yield f"http://127.0.0.1:{port}/metrics"

    @asynccontextmanager
    async def _process(
        self, name: str, module: tuple[str, ...], settings: dict[str, str]
    ) -> AsyncIterator[SupervisedProcess]:
        process = SupervisedProcess(name, module, settings, self._folder)
        await process.start()
        try:
            yield process
        finally:
            await process.stop()

    async def program(self, name: str, *arguments: str) -> str:
        """Run a program of the server's installation; return its output.

        Raises:
            RuntimeError: it failed.
        """
        path = str(self.server.binaries.bindir / name)
        return await _run((path, *arguments), dict(self.server.binaries.environment))

    async def python(self, module: str, *arguments: str) -> str:
        """Run a module of ours as a process; return its output (errors: `program`)."""
        return await _run((sys.executable, "-m", module, *arguments), None)


async def _run(command: tuple[str, ...], environment: dict[str, str] | None) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]}: {output.decode(errors='replace').strip()}")
    return output.decode()
