"""How results are shown: JSON, or tables for people."""

from __future__ import annotations

import json
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LISTED: Final = ("id", "queue", "task", "state", "trigger", "attempt", "run_at", "finished_at")
_SCHEDULED: Final = ("task", "name", "expression", "timezone", "next_at", "last_at", "made")
_BLOCKS: Final = ("payload", "result", "error", "metadata", "steps")


def print_json(value: Any) -> None:
    """Print JSON, in ASCII: what a payload holds must not break a terminal."""
    print(json.dumps(value, indent=2))  # noqa: T201 - a command's result


def print_jobs(rows: list[dict[str, Any]]) -> None:
    """Print a table of jobs."""
    _print_table(rows, _LISTED, "no jobs")


def print_schedules(rows: list[dict[str, Any]]) -> None:
    """Print a table of schedules."""
    _print_table(rows, _SCHEDULED, "no schedules")


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], none: str) -> None:
    if not rows:
        Console().print(none)
        return
    table = Table(*(name.replace("_", " ") for name in columns), box=None)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    Console().print(table)


def print_lanes(rows: list[dict[str, Any]]) -> None:
    """Print a table of halted lanes."""
    if not rows:
        Console().print("no halted lanes")
        return
    table = Table(*(name.replace("_", " ") for name in rows[0]), box=None)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def print_job(row: dict[str, Any]) -> None:
    """Print everything about one job."""
    facts = Table(show_header=False, box=None)
    for name, value in row.items():
        if name not in _BLOCKS and value is not None:
            facts.add_row(name.replace("_", " "), _cell(value))
    console = Console()
    console.print(facts)
    for name in _BLOCKS:
        if row.get(name):
            console.print(f"{name}:", style="bold")
            console.print(_text(row[name]), markup=False, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, dict) and "traceback" in value:
        facts = {key: fact for key, fact in value.items() if key != "traceback"}
        return f"{json.dumps(facts, indent=2)}\n{value['traceback']}"
    return json.dumps(value, indent=2)


def _cell(value: Any) -> str:
    return "" if value is None else escape(str(value))
