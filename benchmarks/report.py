"""What was measured: printed, stored as JSON, and as a table when asked for."""

import json
import os
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

RESULTS: Final = Path(__file__).parent / "RESULTS.md"
RUN: Final = '`make bench ARGS="'
HEAD: Final = """# Benchmarks

Server, sidecar, worker and load share the machine, which does other work as well, durable commits
throughout: read the ratios. Each table is one run.
"""
_HEAD_LINES: Final = 4  # of a run, before its rows


@dataclass(frozen=True)
class Result:
    """One line: a name, its numbers in words, and the ratio or value that a budget is about."""

    name: str
    numbers: str
    value: float
    unit: str
    budget: str = ""

    @property
    def shown(self) -> str:
        """The value as people read it."""
        if self.unit == "ratio":
            return f"{self.value:.2f}"
        return (
            f"{self.value:,.0f} {self.unit}"
            if self.value >= 100
            else f"{self.value:.1f} {self.unit}"
        )


def rate(values: Sequence[float], unit: str) -> str:
    """The median of some rates with its spread."""
    return f"{median(values):,.0f} {unit} ({min(values):,.0f} to {max(values):,.0f})"


def store(results: Sequence[Result], server: str, folder: Path, *, write: bool) -> Path:
    """Store the results as JSON in a folder; when `write` is set, put them into RESULTS.md."""
    now = datetime.now(UTC)
    about = {
        "at": now.isoformat(timespec="seconds"),
        "server": server,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    path = folder / f"{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    if write:
        known = RESULTS.read_text() if RESULTS.exists() else ""
        RESULTS.write_text(merge(known, results, about))
    return path


def merge(page: str, results: Sequence[Result], about: Mapping[str, str | int | None]) -> str:
    """Return the page with these results as its last part, and without older ones of their names.

    A part is a run: when, where, and a table. Parts that have no row left are left out.
    """
    names = {result.name for result in results}
    parts = page.partition(RUN)[1:]
    kept = [_without(RUN + part, names) for part in "".join(parts).split(RUN) if part]
    return "\n".join([HEAD, *filter(None, kept), _part(results, about)])


def _part(results: Sequence[Result], about: Mapping[str, str | int | None]) -> str:
    """A run as Markdown."""
    where = f"PostgreSQL {about['server']}, Python {about['python']}, {about['cores']} cores"
    lines = [
        f'{RUN}{" ".join(sys.argv[1:])}"`, {str(about["at"])[:10]}: {where}.',
        "",
        "| what | measured | value | budget |",
        "|---|---|---|---|",
        *(f"| {r.name} | {r.numbers} | {r.shown} | {r.budget} |" for r in results),
    ]
    return "\n".join(lines) + "\n"


def _without(part: str, names: Collection[str]) -> str:
    """A run without the rows of these names; empty when none is left."""
    lines = part.strip().splitlines()
    head, rows = lines[:_HEAD_LINES], lines[_HEAD_LINES:]
    kept = [row for row in rows if row.removeprefix("| ").partition(" | ")[0] not in names]
    return "\n".join([*head, *kept]) + "\n" if kept else ""
