"""How results are shown: JSON, or tables for people. No text of anybody's steers the terminal."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conductor.texts import printable

_LISTED: Final = ("id", "task", "state", "queue", "trigger", "attempt", "ended_or_due")
_SCHEDULED: Final = ("task", "name", "expression", "timezone", "next_at", "last_at", "made")
_BLOCKS: Final = ("payload", "result", "error", "metadata", "steps")
_TIMES: Final = frozenset({"ended_or_due", "next_at", "last_at", "halted_at"})
_FOLDED: Final = frozenset({"task", "name", "key"})
_PIPE_WIDTH: Final = 200


def print_json(value: Any) -> None:
    """Print JSON, in ASCII: what a payload holds must not break a terminal."""
    print(json.dumps(value, indent=2))  # noqa: T201 - a command's result


def print_jobs(rows: list[dict[str, Any]]) -> None:
    """Print a table of jobs, with one time each: when it ended, else from when it may run."""
    listed = [{**row, "ended_or_due": row["finished_at"] or row["run_at"]} for row in rows]
    _print_table(listed, _LISTED, "no jobs")


def print_schedules(rows: list[dict[str, Any]]) -> None:
    """Print a table of schedules."""
    _print_table(rows, _SCHEDULED, "no schedules")


def print_lanes(rows: list[dict[str, Any]]) -> None:
    """Print a table of halted lanes."""
    _print_table(rows, tuple(rows[0]) if rows else (), "no halted lanes")


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], none: str) -> None:
    if not rows:
        _console().print(none)
        return
    table = Table(box=None, pad_edge=False)
    for name in columns:
        # Names go on in the next line where a screen is narrow: half a name helps nobody.
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=name not in _FOLDED)
    for row in rows:
        table.add_row(*(_brief(name, row[name]) for name in columns))
    _console().print(table)


def _console() -> Console:
    """Return the terminal, or lines for a file or a pipe, which have room."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def _brief(name: str, value: Any) -> str:
    """Return a cell of a list; times are in UTC, to the second."""
    if name in _TIMES and isinstance(value, str):
        return value[:19].replace("T", " ")
    return _cell(value)


def print_job(row: dict[str, Any]) -> None:
    """Print everything about one job."""
    facts = Table(show_header=False, box=None)
    for name, value in row.items():
        if name not in _BLOCKS and value is not None:
            facts.add_row(name.replace("_", " "), _cell(value))
    console = _console()
    console.print(facts)
    for name in _BLOCKS:
        if row.get(name):
            console.print(f"{name}:", style="bold")
            console.print(_text(row[name]), markup=False, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, dict) and "traceback" in value:
        facts = {key: fact for key, fact in value.items() if key != "traceback"}
        return f"{json.dumps(facts, indent=2)}\n{printable(str(value['traceback']))}"
    return json.dumps(value, indent=2)


def _cell(value: Any) -> str:
    return "" if value is None else escape(printable(str(value)))
