"""Worker processes for tests that kill them, pause them, or let them be."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Workers:
    """Worker processes of a module; those that have died are started again.

    ``python -m module DSN arguments``. `processes` are those that live now.
    """

    def __init__(self, module: str, dsn: str, count: int, *arguments: str) -> None:
        self._command = (sys.executable, "-m", module, dsn, *arguments)
        self._count = count
        self.processes: list[asyncio.subprocess.Process] = []
        self.started = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Workers]:
        """Keep them running until the end of the block; they drain then."""
        keeper = asyncio.gather(*(self._keep() for _ in range(self._count)))
        try:
            yield self
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            for process in self.processes:
                process.terminate()
            await asyncio.gather(*(process.wait() for process in self.processes))

    async def _keep(self) -> None:
        while True:
            process = await asyncio.create_subprocess_exec(
                *self._command, stderr=asyncio.subprocess.DEVNULL
            )
            self.started += 1
            self.processes.append(process)
            await process.wait()
            self.processes.remove(process)
