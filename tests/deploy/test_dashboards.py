"""The dashboards, as Grafana loads them: complete, current, and about metrics that exist."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.monitoring.__main__ import DASHBOARDS, PROJECT, generated, outdated
from tools.monitoring.catalog import all_metrics
from tools.monitoring.layout import draw
from tools.monitoring.panels import NAMESPACE, SLOT, filtered

FILES = sorted((PROJECT / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((PROJECT / "deploy" / "monitoring").glob("*.yml"))
UIDS = {
    "overview": "pgconductor-overview",
    "router": "pgconductor-router",
    "queue": "pgconductor-queue",
    "task": "pgconductor-task",
}
NEEDED_VARIABLES = {"datasource", "namespace", "slot", "queue", "task"}
OF_PROMETHEUS = {"ALERTS", "up"}
WIDTH = 24
MODELS = {path.stem: json.loads(path.read_text()) for path in FILES}
PANELS: list[tuple[str, dict[str, Any]]] = [
    (name, panel)
    for name, model in MODELS.items()
    for panel in model["panels"]
    if panel["type"] != "row"
]
CHARTS = [(name, panel) for name, panel in PANELS if panel["type"] != "text"]
OF_THE_DATA_SOURCE = re.compile(r"\.annotations\.list\[\d\]\.(titleFormat|textFormat|step)")


def titles(panels: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The names of the tests of these panels."""
    return [f"{name}: {panel['title']}" for name, panel in panels]


def parsed(expr: str) -> Any:
    """The syntax tree of a query, Grafana's words replaced by what they may stand for."""
    text = re.sub(r"\$__rate_interval|\$__interval", "5m", expr)
    return promql_parser.parse(re.sub(r'"\$\w+"', '".*"', text))


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector below a node of a syntax tree."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (below := getattr(node, name, None)) is not None and not isinstance(below, str):
            yield from selectors(below)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def names(expr: str) -> set[str]:
    """The metrics that a query reads."""
    return {selector.name for selector in selectors(parsed(expr)) if selector.name}


def rules() -> list[dict[str, Any]]:
    """Every rule."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def recorded() -> set[str]:
    """The series that rules record."""
    return {rule["record"] for rule in rules() if "record" in rule}


def exported() -> set[str]:
    """The series that the programs export."""
    return {series for metric in all_metrics().values() for series in metric.series}


def queries() -> Iterator[str]:
    """Every query of every panel and of every rule."""
    for _, panel in CHARTS:
        yield from (target["expr"] for target in panel["targets"])
    yield from (rule["expr"] for rule in rules())


def test_the_files_are_current() -> None:
    assert outdated() == []
    assert {path for path in generated() if path.suffix == ".json"} == set(FILES)


def test_uids_never_change() -> None:
    assert {name: model["uid"] for name, model in MODELS.items()} == UIDS


def test_every_variable_is_offered_somewhere() -> None:
    offered = {v["name"] for model in MODELS.values() for v in model["templating"]["list"]}
    assert offered == NEEDED_VARIABLES
    assert all(
        "datasource" in {v["name"] for v in m["templating"]["list"]} for m in MODELS.values()
    )


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=titles(PANELS))
def test_panels_are_complete(name: str, panel: dict[str, Any]) -> None:
    assert re.fullmatch(r"[A-Z].{3,60}", panel["title"])
    assert re.fullmatch(r".{4,}[.]", panel["description"], re.DOTALL)
    place = panel["gridPos"]
    assert place["x"] + place["w"] <= WIDTH
    if panel["type"] != "text":
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert MODELS[name]["description"]


@pytest.mark.parametrize(("name", "panel"), CHARTS, ids=titles(CHARTS))
def test_queries_parse_and_are_filtered(name: str, panel: dict[str, Any]) -> None:
    variables = {v["name"] for v in MODELS[name]["templating"]["list"]} - {"datasource"}
    for target in panel["targets"]:
        expr = target["expr"]
        assert not re.search(r"\brate\((?![^\[]*\[\$__rate_interval\])", expr), expr
        tree = parsed(expr)
        for selector in selectors(tree):
            if selector.name in OF_PROMETHEUS:
                continue
            labels = {m.name for m in selector.matchers.matchers}
            own = next((m.labels for m in all_metrics().values() if selector.name in m.series), ())
            expected = {"namespace", *own} & variables
            assert expected <= labels, f"{selector.name} is not filtered by {expected - labels}"
        used = set(re.findall(r"\$(\w+)", expr)) - {"__rate_interval", "__interval"}
        assert used <= variables


def test_every_metric_that_is_shown_exists() -> None:
    known = exported() | recorded() | OF_PROMETHEUS
    unknown = {name for query in queries() for name in names(query)} - known
    assert unknown == set()


def test_every_exported_metric_is_shown_or_watched() -> None:
    shown = {name for query in queries() for name in names(query)}
    unseen = [n for n, metric in all_metrics().items() if not shown.intersection(metric.series)]
    assert unseen == []


def test_what_is_recorded_is_used() -> None:
    used = {name for query in queries() for name in names(query)}
    assert recorded() - used == set()


@pytest.mark.parametrize("name", MODELS)
def test_panels_do_not_overlap(name: str) -> None:
    cells = Counter(
        (x, y)
        for panel in MODELS[name]["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert [cell for cell, count in cells.items() if count > 1] == []
    ids = [panel["id"] for panel in MODELS[name]["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", MODELS)
def test_grafana_knows_every_key(name: str) -> None:
    """What Grafana's own model drops on a round trip is a key that it does not know."""
    model = MODELS[name]
    understood = Dashboard.from_json(json.loads(json.dumps(model)))
    back = json.loads(JSONEncoder(sort_keys=True).encode(understood))
    assert [key for key in lost_keys(model, back) if not OF_THE_DATA_SOURCE.fullmatch(key)] == []


def lost_keys(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict):
        for key, value in before.items():
            if isinstance(after, dict) and key in after:
                yield from lost_keys(value, after[key], f"{path}.{key}")
            elif value not in ({}, [], None, "", False):
                yield f"{path}.{key}"
    elif isinstance(before, list):
        for number, value in enumerate(before):
            there = after[number] if isinstance(after, list) and number < len(after) else None
            yield from lost_keys(value, there, f"{path}[{number}]")


def test_a_lost_key_is_found() -> None:
    assert list(lost_keys({"a": [{"b": 1}]}, {"a": [{}]})) == [".a[0].b"]


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_can_be_drawn(name: str) -> None:
    image = draw(MODELS[name])
    bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in MODELS[name]["panels"])
    assert image.height > 30 * bottom
    assert len(image.getcolors(image.width * image.height) or ()) > 10


def test_filters_are_added_to_each_metric_by_its_labels() -> None:
    query = 'max(cdc_lag_bytes{stage="route"}) / sum(conductor_slots)'
    assert filtered(query, [NAMESPACE, SLOT]) == (
        'max(cdc_lag_bytes{stage="route",namespace=~"$namespace",slot=~"$slot"})'
        ' / sum(conductor_slots{namespace=~"$namespace"})'
    )


def test_provisioning_matches_the_dashboards() -> None:
    folder = PROJECT / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = yaml.safe_load((folder / "dashboards/pgconductor.yaml").read_text())["providers"]
    compose = (PROJECT / "deploy" / "compose.yaml").read_text()
    assert f"../grafana/dashboards:{provider['options']['path']}" in compose
    kustomization = yaml.safe_load((PROJECT / "grafana" / "kustomization.yaml").read_text())
    shipped = {f for generator in kustomization["configMapGenerator"] for f in generator["files"]}
    assert shipped == {f"dashboards/{Path(path).name}" for path in FILES}
    assert len(DASHBOARDS) == len(FILES)
