"""What was measured: printed, stored as JSON, and as a table when asked for."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "RESULTS.md"


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
    """Store the results as JSON in a folder, and as RESULTS.md when `write` is set."""
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
        RESULTS.write_text(table(results, about))
    return path


def table(results: Sequence[Result], about: dict[str, str | int | None]) -> str:
    """The results as a Markdown page."""
    where = f"PostgreSQL {about['server']}, Python {about['python']}, {about['cores']} cores"
    lines = [
        "# Benchmarks",
        "",
        f'`make bench ARGS="{" ".join(sys.argv[1:])}"`, {str(about["at"])[:10]}: {where}.',
        "Server, sidecar, worker and load share the machine, durable commits throughout: read the",
        "ratios.",
        "",
        "| what | measured | value | budget |",
        "|---|---|---|---|",
        *(f"| {r.name} | {r.numbers} | {r.shown} | {r.budget} |" for r in results),
    ]
    return "\n".join(lines) + "\n"
