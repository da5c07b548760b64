"""`python -m tools.monitoring [--check]`: write what is generated, or say what is out of date."""

import json
import sys
from pathlib import Path
from typing import Final

from tools.monitoring import grafana, metrics_page
from tools.monitoring.overview import OVERVIEW
from tools.monitoring.queue import QUEUES
from tools.monitoring.router import ROUTER
from tools.monitoring.task import TASKS

PROJECT: Final = Path(__file__).resolve().parents[2]
DASHBOARDS: Final = (OVERVIEW, ROUTER, QUEUES, TASKS)


def generated() -> dict[Path, str]:
    """Every generated file and what belongs into it."""
    files = {PROJECT / "docs" / "metrics.md": metrics_page.render()}
    for dashboard in DASHBOARDS:
        name = dashboard.uid.removeprefix("pgconductor-")
        model = json.dumps(grafana.render(dashboard), indent=1, ensure_ascii=False)
        files[PROJECT / "grafana" / "dashboards" / f"{name}.json"] = f"{model}\n"
    return files


def outdated() -> list[str]:
    """The generated files whose content is not current, by their path in the project."""
    return [
        path.relative_to(PROJECT).as_posix()
        for path, text in generated().items()
        if not path.is_file() or path.read_text() != text
    ]


def main() -> None:
    """Write the files, or with --check exit with 1 when one is out of date."""
    if "--check" in sys.argv[1:]:
        if names := outdated():
            sys.exit(f"out of date, run `python -m tools.monitoring`: {', '.join(names)}")
        return
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(PROJECT))


if __name__ == "__main__":
    main()
