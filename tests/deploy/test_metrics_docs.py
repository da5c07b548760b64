"""docs/metrics.md is current and says what the programs really export."""

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest

import cdc.metrics
import conductor.metrics
from tools.monitoring.__main__ import PROJECT, outdated
from tools.monitoring.catalog import all_metrics
from tools.prometheus import find_prometheus

PAGE = PROJECT / "docs" / "metrics.md"
ROW = re.compile(r"\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<unit>[^|]+) \| (?P<labels>[^|]+) \|")


def documented() -> dict[str, re.Match[str]]:
    """The rows of the page's tables by metric."""
    return {row["name"]: row for row in ROW.finditer(PAGE.read_text())}


def registries() -> Iterator[CollectorRegistry]:
    """What both programs serve, every label set made once."""
    yield cdc.metrics.Metrics("1", "orders").registry
    worker = conductor.metrics.Metrics()
    for metric in conductor.metrics.TABLE:
        worker.get(metric, *("x" for _ in metric.labels))
    yield worker.registry


def test_the_page_is_current() -> None:
    assert "docs/metrics.md" not in outdated()


def test_every_metric_is_documented() -> None:
    assert set(documented()) == set(all_metrics())


def test_it_says_what_is_exported() -> None:
    seen = set()
    for registry in registries():
        for family in registry.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            row = documented()[name]
            assert row["kind"] == family.type
            assert family.documentation in PAGE.read_text()
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert labels <= set(re.findall(r"`(\w+)`", row["labels"])), name
            seen.add(name)
    assert seen == set(documented())


def test_prometheus_has_nothing_against_names_and_helps() -> None:
    shown = "".join(generate_latest(registry).decode() for registry in registries())
    assert find_prometheus().check("check", "metrics", text=shown) == ""


def test_units_are_base_units() -> None:
    units = {row["unit"] for row in documented().values()}
    assert units == {"1", "count", "bytes", "seconds", "transactions", "Unix time, seconds"}
