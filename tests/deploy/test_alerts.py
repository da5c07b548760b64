"""Alerts and recording rules: promtool accepts them, and each fires and ends on written series."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.alert_scenarios import SCENARIOS, Scenario
from tools.debs import PackagesUnavailable
from tools.monitoring.__main__ import DASHBOARDS, PROJECT
from tools.prometheus import Prometheus, find_prometheus

RULES = PROJECT / "deploy" / "monitoring"
NAMED = re.compile(r"(Cdc|Conductor)[A-Z]\w+")


def alerts() -> dict[str, dict[str, Any]]:
    """Every alert by its name."""
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


@pytest.fixture(scope="module")
def prometheus() -> Prometheus:
    try:
        return find_prometheus()
    except PackagesUnavailable as error:
        pytest.fail(str(error))


def unit_test(scenario: Scenario, severity: str) -> dict[str, Any]:
    """The scenario in promtool's words."""
    labels = {"alertname": scenario.alert, "severity": severity, **scenario.labels}
    shown = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    firing = {"labels": f'ALERTS{{alertstate="firing",{shown}}}', "value": 1}

    def at(minute: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
        expr = f'ALERTS{{alertname="{scenario.alert}",alertstate="firing"}}'
        return {"expr": expr, "eval_time": f"{minute}m", "exp_samples": samples}

    return {
        "name": scenario.alert,
        "interval": "1m",
        "input_series": [{"series": s, "values": v} for s, v in scenario.series.items()],
        "promql_expr_test": [
            at(scenario.quiet, []),
            at(scenario.fires, [firing]),
            at(scenario.over, []),
        ],
    }


def run_unit_tests(prometheus: Prometheus, tests: list[dict[str, Any]], folder: Path) -> str:
    """Let promtool run the tests on the rules of the project."""
    file = folder / "tests.yml"
    rule_files = [str(path) for path in sorted(RULES.glob("*.yml"))]
    content = {"rule_files": rule_files, "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return prometheus.check("test", "rules", file)


def test_promtool_accepts_the_rules(prometheus: Prometheus) -> None:
    shown = prometheus.check("check", "rules", *sorted(RULES.glob("*.yml")))
    assert shown.count("SUCCESS") == 2


def test_promtool_accepts_the_configuration_of_compose(
    prometheus: Prometheus, tmp_path: Path
) -> None:
    text = (PROJECT / "deploy" / "compose" / "prometheus.yml").read_text()
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace("/etc/prometheus/rules", str(RULES)))
    assert "SUCCESS" in prometheus.check("check", "config", config)


def test_each_alert_fires_and_ends(prometheus: Prometheus, tmp_path: Path) -> None:
    known = alerts()
    tests = [unit_test(s, known[s.alert]["labels"]["severity"]) for s in SCENARIOS]
    assert "SUCCESS" in run_unit_tests(prometheus, tests, tmp_path)


def test_every_alert_has_a_scenario() -> None:
    assert {scenario.alert for scenario in SCENARIOS} == set(alerts())


def test_a_scenario_can_fail(prometheus: Prometheus, tmp_path: Path) -> None:
    calm = Scenario("CdcNoLeader", {'cdc_leader{slot="orders"}': "1x30"}, 3, 8, 28)
    with pytest.raises(AssertionError, match="FAILED"):
        run_unit_tests(prometheus, [unit_test(calm, "critical")], tmp_path)


@pytest.mark.parametrize("name", alerts())
def test_alerts_say_how_bad_it_is_and_where_to_look(name: str) -> None:
    alert = alerts()[name]
    assert NAMED.fullmatch(name)
    assert alert["labels"]["severity"] in {"critical", "warning"}
    texts = alert["annotations"]
    assert set(texts) == {"summary", "description", "runbook", "dashboard"}
    assert len(texts["summary"]) <= 100
    assert texts["description"].endswith(".")
    assert (PROJECT / texts["runbook"]).is_file()
    assert texts["dashboard"] in {dashboard.uid for dashboard in DASHBOARDS}
    labels = set(re.findall(r"\$labels\.(\w+)", texts["summary"]))
    scenario = next(s for s in SCENARIOS if s.alert == name)
    assert labels <= set(scenario.labels), "a summary names a label that the alert does not have"
