"""Noticing that the schema has become too new for the workers of this process.

A live migration may change what older workers rely on; it then says so in its record. Every process
looks there every two seconds and ends its work in good order: what runs is finished, nothing more
is claimed. This module must not know what a migration does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from conductor.errors import MigrationMismatch
from conductor.migrations import check_current
from conductor.periodic import Periodic

if TYPE_CHECKING:
    from conductor.connections import Connections
    from conductor.metrics import Metrics

EVERY_S: Final = 2.0


class Supersession:
    """Watches the schema until stopped, or until it is too new."""

    def __init__(self, connections: Connections, metrics: Metrics) -> None:
        self._connections = connections
        self._error: MigrationMismatch | None = None
        self._loop = Periodic("supersession", self._look, metrics)
        self.stop = self._loop.stop

    async def run(self) -> None:
        """Watch. Raises MigrationMismatch when a migration has come that ends these workers."""
        await self._loop.run()
        if self._error is not None:
            raise self._error

    async def _look(self) -> float:
        async with self._connections.lend() as connection:
            try:
                await check_current(connection)
            except MigrationMismatch as error:
                self._error = error
                self.stop()
        return EVERY_S
