"""The screen of `conductor top`: what `conductor.store.overview` has read, as tables.

What needs somebody is red. Ages are counted from the database's clock. This module asks nothing
itself: it is given a way to read.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from conductor.errors import DatabaseUnavailable, LoginRefused
from conductor.store.overview import COUNTED_AT_MOST

Row = dict[str, Any]

STALE_S: Final = 600.0
"""A job that has been ready for so long is red, as the alert ConductorQueueStale has it."""

SILENT_S: Final = 4.0
"""A worker whose lease was not renewed for so long is red; after twice that it is declared dead."""

_TASK_COLUMNS: Final = (
    *("ready", "oldest", "running", "retrying", "waiting", "scheduled", "parked", "suspect"),
    "failed/min",
)
_WIDTH: Final = 140  # where there is no terminal
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"))
_SIZES: Final = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Leases:
    """How long each worker's lease has stood still, on this process' clock.

    Nobody compares two clocks: between two looks either the counter of renewals has moved, or not.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}
        self._living: set[int] = set()  # whose counter has moved before our eyes

    def look(self, workers: Iterable[Row], now_s: float) -> dict[int, float]:
        """Return for how long each worker's counter has not moved, of those that can be judged.

        Whoever was just met may have been dead for hours: it has moved, or been silent, first.
        """
        seen: dict[int, tuple[int, float]] = {}
        for worker in workers:
            name, renewals = worker["id"], worker["renewals"]
            known, since_s = self._seen.get(name, (renewals, now_s))
            if known != renewals:
                self._living.add(name)
                since_s = now_s
            seen[name] = (renewals, since_s)
        self._seen = seen
        self._living &= seen.keys()
        silent = {worker: now_s - since_s for worker, (_, since_s) in seen.items()}
        return {w: s for w, s in silent.items() if w in self._living or s > SILENT_S}


def show(overview: Row) -> None:
    """Print it once."""
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(draw(overview, {}))


async def watch(read: Callable[[], Awaitable[Row]], interval_s: float) -> None:
    """Show it until Ctrl-C. While the database does not answer, the screen says so.

    Raises what `read` raises the first time.
    """
    leases = Leases()
    loop = asyncio.get_running_loop()
    shown = draw(await read(), {})
    with Live(shown, screen=True, auto_refresh=False) as live:
        while True:
            try:
                overview = await read()
            except (DatabaseUnavailable, LoginRefused) as error:
                live.update(Group(Text(str(error), style="bold red"), shown), refresh=True)
            else:
                silent = leases.look(overview["workers"], loop.time())
                shown = draw(overview, silent)
                live.update(shown, refresh=True)
            await asyncio.sleep(interval_s)


def draw(overview: Row, silent_s: dict[int, float]) -> Group:
    """Return the screen.

    ``silent_s``: how long a worker's lease has stood still; of who is not in it, nothing is known.
    """
    at = datetime.fromtimestamp(overview["at"], UTC)
    parts: list[RenderableType] = [Text(f"{at:%Y-%m-%d %H:%M:%S} UTC", style="dim")]
    for table in (
        _queues(overview["queues"]),
        _tasks(overview["tasks"]),
        _workers(overview["workers"], silent_s),
        _slots(overview["slots"]),
    ):
        parts += [Text(), table]
    return Group(*parts)


def _queues(queues: list[Row]) -> RenderableType:
    table = _table("queue", *_TASK_COLUMNS)
    for row in queues:
        name = f"{row['queue']} (paused)" if row["paused"] else row["queue"]
        table.add_row(_name(name, alarming=row["paused"]), *_counts(row))
    return table if queues else Text("no queues: no worker has registered yet")


def _tasks(tasks: list[Row]) -> RenderableType:
    table = _table("task", "queue", *_TASK_COLUMNS)
    for row in tasks:
        table.add_row(_name(row["task"]), _name(row["queue"]), *_counts(row))
    return table


def _counts(row: Row) -> list[Text]:
    stale = (row["oldest_ready_s"] or 0) > STALE_S
    return [
        _count(row["ready"]),
        _alarm(age(row["oldest_ready_s"]), stale),
        *(_count(row[name]) for name in ("running", "retrying", "waiting", "scheduled", "parked")),
        _count(row["suspect"], alarming=True),
        _count(row["failed_per_minute"], alarming=True),
    ]


def _workers(workers: list[Row], silent_s: dict[int, float]) -> RenderableType:
    table = _table("worker", "queue", "app", "version", "busy", "slots", "up", "lease")
    for row in workers:
        silence_s = silent_s.get(row["id"])
        silent = silence_s is not None and silence_s > SILENT_S
        state = "-" if silence_s is None else f"silent for {age(silence_s)}" if silent else "held"
        table.add_row(
            _name(f"{row['id']} {row['host']}:{row['pid']}"),
            *(_name(row[name] or "") for name in ("queue", "app", "version")),
            _count(row["busy"]),
            _count(row["slots"]),
            Text(age(row["up_s"])),
            _alarm("draining" if row["draining"] and not silent else state, silent),
        )
    return table if workers else Text("no workers hold a lease", style="bold red")


def _slots(slots: list[Row]) -> RenderableType:
    table = _table("slot", "leader", "lag", "behind", "WAL kept", "until lost", "gaps", "letters")
    for row in slots:
        table.add_row(
            _name(row["slot"]),
            _leader(row),
            Text(size(row["lag_bytes"])),
            Text(age(row["lag_s"])),
            Text(size(row["retained_wal_bytes"])),
            _alarm(size(row["safe_wal_bytes"]), row["wal_status"] in {"unreserved", "lost"}),
            _count(row["open_gaps"], alarming=True),
            _count(row["dead_letters"], alarming=True),
        )
    return table if slots else Text("no sidecar has written here yet", style="dim")


def _leader(row: Row) -> Text:
    """Say who leads, as far as this server knows."""
    if not row["here"]:
        return Text(f"{row['leader'] or 'nobody'} (source elsewhere: cdc status)")
    if row["missing"]:
        return Text("the slot is missing", style="bold red")
    return Text(row["leader"] or "") if row["active"] else Text("nobody", style="bold red")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    table.add_column(first)
    for name in others:
        left = name in {"queue", "app", "version", "leader", "lease"}
        table.add_column(name, justify="left" if left else "right")
    return table


def _name(text: str, *, alarming: bool = False) -> Text:
    """Return a name, which anybody may have chosen: what would steer a terminal is left out."""
    return _alarm("".join(c if c.isprintable() else "\ufffd" for c in text), alarming)


def _count(count: int | None, *, alarming: bool = False) -> Text:
    if count is None:
        return Text("")
    text = f">{COUNTED_AT_MOST - 1}" if count >= COUNTED_AT_MOST else str(count)
    return _alarm(text, alarming and count > 0)


def _alarm(text: str, alarming: bool) -> Text:
    return Text(text, style="bold red" if alarming else "")


def age(seconds: float | None) -> str:
    """Say how long something is, in its two largest units at most.

    >>> age(3.14), age(4000), age(None)
    ('3.1 s', '1 h 6 min', '-')
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{max(seconds, 0.0):.1f} s"
    rest, parts = int(seconds), list[str]()
    for unit_s, name in _UNITS:
        count, rest = divmod(rest, unit_s)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def size(count_bytes: int | None) -> str:
    """Say how much something is.

    >>> size(1_500_000), size(7), size(None)
    ('1.5 MB', '7 B', '-')
    """
    if count_bytes is None:
        return "-"
    for name, unit_bytes in _SIZES:
        if abs(count_bytes) >= unit_bytes:
            return f"{count_bytes / unit_bytes:.1f} {name}"
    return f"{count_bytes} B"
