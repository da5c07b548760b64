"""Write the Prometheus operator's copy of the rules: `python -m tools.prometheus_rule`.

The rules are kept once, as Prometheus reads them (`deploy/monitoring/`). The operator wants them in
a PrometheusRule; a test holds the two together.
"""

from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
RULES = PROJECT / "deploy" / "monitoring"
TARGET = PROJECT / "deploy" / "kubernetes" / "components" / "monitoring" / "prometheus-rule.yaml"
LABELS = {"app.kubernetes.io/name": "pgconductor", "app.kubernetes.io/part-of": "pgconductor"}
HEADER = "# Written from deploy/monitoring by `python -m tools.prometheus_rule`.\n"


def rule_files() -> list[Path]:
    """The files of rules: those with groups."""
    return [path for path in sorted(RULES.glob("*.yml")) if read_groups(path)]


def read_groups(path: Path) -> list[dict[str, Any]]:
    """The groups of a file of rules; none when it is another kind of file."""
    content = yaml.safe_load(path.read_text())
    groups: list[dict[str, Any]] = content.get("groups", [])
    return groups


def prometheus_rule() -> str:
    """The manifest, as it is kept."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "pgconductor", "labels": LABELS},
        "spec": {"groups": [group for path in rule_files() for group in read_groups(path)]},
    }
    return HEADER + yaml.safe_dump(manifest, sort_keys=False, width=100, allow_unicode=True)


def main() -> None:
    """Write the file."""
    TARGET.write_text(prometheus_rule())
    print(TARGET.relative_to(PROJECT))


if __name__ == "__main__":
    main()
