"""docs/logs.md, from the tables of log events of the two programs: `python -m tools.logs_page`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cdc.logs import EVENTS as CDC_EVENTS
from conductor.logs import EVENTS as CONDUCTOR_EVENTS

PAGE: Final = Path(__file__).parent.parent / "docs" / "logs.md"
_HEAD: Final = """\
# Logs

Both programs log to standard error: one JSON object a line, or readable lines where that is a
terminal (`CDC_LOG_FORMAT`, `CONDUCTOR_LOG_FORMAT`: `auto`, `json`, `console`). `CDC_LOG_LEVEL` and
`CONDUCTOR_LOG_LEVEL` choose the least level.

Every line has `event`, `level` and `timestamp`. The names below are stable: search and alert by
them. `sentence` says the same for people. No line holds a payload, a row, a result or a password.
What a handler logs through `ctx.logger` has `job`, `task` and `attempt`; its `event` is what the
handler said, as is that of other libraries.

This page is made by `python -m tools.logs_page`.
"""


def table(title: str, rows: Iterable[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    """Return the section of one program."""
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def page() -> str:
    """Return the page."""
    worker = [
        (f"`{e.name}`", ", ".join(f"`{f}`" for f in e.fields), e.meaning) for e in CONDUCTOR_EVENTS
    ]
    sidecar = [(f"`{name}`", meaning) for name, meaning in CDC_EVENTS.items()]
    return "\n".join(
        (
            _HEAD,
            table("`cdc run`", sidecar, ("event", "meaning")),
            "It serves gauges of the queue as well, whose troubles have names of the next table.\n",
            table("`conductor worker`", worker, ("event", "fields", "meaning")),
        )
    )


if __name__ == "__main__":
    PAGE.write_text(page())
