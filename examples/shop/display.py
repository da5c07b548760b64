"""Shows how the demo gets on: a live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

PLAIN_INTERVAL_S = 2.0


class Display:
    """What happens, as it happens. Enter it; on a terminal it redraws in place.

    Example:
        with Display() as display:
            display.say("server started")
            display.show({"changes": "1,200"})
    """

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._started = time.monotonic()
        self._next_line = 0.0
        self._rows: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=5)
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last numbers standing; `say` still works."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
            self._live = None

    def say(self, what: str) -> None:
        """Tell an event, once."""
        elapsed_s = time.monotonic() - self._started
        self._console.print(f"{elapsed_s:5.1f} s  {what}", markup=False)

    def show(self, rows: Mapping[str, str]) -> None:
        """Show the present numbers."""
        self._rows.update(rows)
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_INTERVAL_S
            self.say(" · ".join(f"{name} {value}" for name, value in self._rows.items()))

    def _table(self) -> Table:
        table = Table(title="examples/shop", title_justify="left", show_header=False)
        table.add_column(justify="right", style="dim")
        table.add_column(min_width=40)
        for name, value in self._rows.items():
            table.add_row(name, value)
        return table
