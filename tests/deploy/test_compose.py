"""The compose file: read by Compose itself, then compared with what it mounts, builds and sets."""

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from cdc.config import Settings as CdcSettings
from conductor.config import Settings as ConductorSettings
from examples.shop.__main__ import main as make_shop
from tests.deploy.kustomize import PROJECT
from tests.deploy.policies import CLOSING_S, COMMANDS
from tests.deploy.test_image import STAGES
from tests.servers import ScratchDatabase
from tools.prometheus import find_prometheus

FILE = PROJECT / "deploy" / "compose.yaml"
PROMETHEUS = PROJECT / "deploy" / "compose" / "prometheus.yml"
PROVISIONING = PROJECT / "grafana" / "provisioning"

Project = dict[str, Any]
Prometheus = dict[str, Any]


def read_by_compose(text: str) -> subprocess.CompletedProcess[str]:
    """What Compose makes of the file: anchors, variables and short forms resolved."""
    compose = Path(sys.executable).parent / "docker-compose"
    return subprocess.run(
        [compose, "--project-directory", FILE.parent, "-f", "-", "config", "--format", "json"],
        input=text,
        env={},
        capture_output=True,
        check=False,
        text=True,
    )


@pytest.fixture(scope="module")
def sound() -> Project:
    done = read_by_compose(FILE.read_text())
    assert (done.returncode, done.stderr) == (0, "")
    project: Project = json.loads(done.stdout)
    return project


@pytest.fixture
def project(sound: Project) -> Project:
    return deepcopy(sound)


@pytest.fixture
def prometheus() -> Prometheus:
    content: Prometheus = yaml.safe_load(PROMETHEUS.read_text())
    return content


# --- the checks -------------------------------------------------------------------------------


def check_images(project: Project) -> list[str]:
    """Pinned by tag; our own are built from a stage that exists."""
    findings = []
    for name, service in project["services"].items():
        if service["image"].endswith(":latest") or ":" not in service["image"]:
            findings.append(f"{name}: {service['image']} is not pinned")
        build = service.get("build")
        if build and build["target"] not in STAGES:
            findings.append(f"{name}: there is no stage {build['target']}")
        if build and not Path(build["context"], build["dockerfile"]).is_file():
            findings.append(f"{name}: there is no {build['dockerfile']}")
    return findings


def check_mounts(project: Project) -> list[str]:
    """Mounted files are there, and cannot be written from inside."""
    findings = []
    for name, service in project["services"].items():
        for mount in service.get("volumes", ()):
            if mount["type"] == "volume":
                continue
            if not Path(mount["source"]).exists():
                findings.append(f"{name}: there is no {mount['source']}")
            if not mount.get("read_only"):
                findings.append(f"{name}: can write to {mount['source']}")
    return findings


def check_dependencies(project: Project) -> list[str]:
    """Who is waited for can reach the condition: healthy needs a check, completed needs an end."""
    findings = []
    services = project["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            health = services[other].get("healthcheck", {})
            match how["condition"]:
                case "service_healthy" if "test" not in health:
                    findings.append(f"{name}: {other} has no health check")
                case "service_completed_successfully" if services[other]["restart"] != "no":
                    findings.append(f"{name}: {other} is restarted when it ends")
    return findings


def check_settings(project: Project) -> list[str]:
    """Variables are settings that exist, connection strings lead to a service by a role."""
    fields = {f"CDC_{n.upper()}" for n in CdcSettings.model_fields}
    fields |= {f"CONDUCTOR_{n.upper()}" for n in ConductorSettings.model_fields}
    findings = []
    for name, service in project["services"].items():
        for variable, value in service.get("environment", {}).items():
            if not variable.startswith(("CDC_", "CONDUCTOR_")):
                continue
            if variable not in fields:
                findings.append(f"{name}: there is no setting {variable}")
            if variable.endswith("_DSN"):
                host = conninfo_to_dict(value).get("host")
                if host not in project["services"]:
                    findings.append(f"{name}: {variable} leads to {host}")
    return findings


def check_commands(project: Project) -> list[str]:
    """What a service runs of ours is a command that exists."""
    return [
        f"{name}: there is no command {' '.join(command[:2])}"
        for name, command in ((n, s["command"] or []) for n, s in project["services"].items())
        if command
        and command[0] in COMMANDS
        and not COMMANDS[command[0]].intersection(command[1:2])
    ]


def check_confinement(project: Project) -> list[str]:
    """Ports are open on the loopback only; our containers can neither write nor gain rights."""
    findings = []
    for name, service in project["services"].items():
        findings += [
            f"{name}: port {port['target']} is open to everybody"
            for port in service.get("ports", ())
            if port.get("host_ip") != "127.0.0.1"
        ]
        if "build" in service and not (
            service.get("read_only")
            and service.get("cap_drop") == ["ALL"]
            and service.get("security_opt") == ["no-new-privileges:true"]
        ):
            findings.append(f"{name}: is not confined")
    return findings


def check_stops(project: Project) -> list[str]:
    """The time to stop is longer than the program's own."""
    findings = []
    services = project["services"]
    needed_s = {
        "cdc": CdcSettings.model_fields["stop_timeout_s"].default,
        "worker": float(services["worker"]["environment"]["CONDUCTOR_DRAIN_TIMEOUT_S"]),
    }
    for name, least_s in needed_s.items():
        grace_s = seconds(services[name].get("stop_grace_period", "10s"))
        if grace_s < least_s + CLOSING_S:
            findings.append(f"{name}: killed after {grace_s} s, needs {least_s + CLOSING_S:g} s")
    return findings


def seconds(duration: str) -> int:
    """Compose writes `1m0s`."""
    minutes, _, rest = duration.rpartition("m")
    return int(minutes or 0) * 60 + int(rest.removesuffix("s") or 0)


def check_targets(project: Project, prometheus: Prometheus) -> list[str]:
    """What is scraped is a service, at the port that its settings open."""
    findings = []
    for job in prometheus["scrape_configs"]:
        for target in job["dns_sd_configs"]:
            for name in target["names"]:
                service = project["services"].get(name, {})
                ports = {
                    int(value)
                    for variable, value in service.get("environment", {}).items()
                    if variable.endswith("_METRICS_PORT")
                }
                if ports != {target["port"]}:
                    findings.append(f"{job['job_name']}: {name} serves {ports or 'nothing'}")
    return findings


CHECKS = (
    check_commands,
    check_confinement,
    check_dependencies,
    check_images,
    check_mounts,
    check_settings,
    check_stops,
)

# --- the file keeps them ----------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_holds(project: Project, check: Callable[[Project], list[str]]) -> None:
    assert check(project) == []


def test_everything_is_there(project: Project) -> None:
    services = {"cdc", "grafana", "migrate", "postgres", "prometheus", "worker"}
    assert services <= set(project["services"])
    command = project["services"]["postgres"]["command"]
    assert "wal_level=logical" in command
    assert project["services"]["cdc"]["deploy"]["replicas"] == 2


def test_prometheus_finds_what_it_scrapes(project: Project, prometheus: Prometheus) -> None:
    assert check_targets(project, prometheus) == []
    assert {job["job_name"] for job in prometheus["scrape_configs"]} == {"cdc", "conductor"}


def test_prometheus_finds_its_rules(project: Project, prometheus: Prometheus) -> None:
    mounts = {m["target"]: m["source"] for m in project["services"]["prometheus"]["volumes"]}
    found = set()
    for pattern in prometheus["rule_files"]:
        folder, _, name = pattern.rpartition("/")
        found |= {path.name for path in Path(mounts[folder]).glob(name)}
    assert {"alerts.yml", "recording.yml"} <= found


def test_grafana_finds_its_dashboards_and_its_data_source(project: Project) -> None:
    mounts = {m["target"]: m["source"] for m in project["services"]["grafana"]["volumes"]}
    assert mounts["/etc/grafana/provisioning"] == str(PROVISIONING)
    provider = yaml.safe_load((PROVISIONING / "dashboards" / "pgconductor.yaml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert list(Path(mounts[path]).glob("*.json"))
    sources = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())
    url = sources["datasources"][0]["url"]
    assert url == "http://prometheus:9090"
    assert "prometheus" in project["services"]


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    text = PROMETHEUS.read_text().replace("/etc/prometheus/rules", f"{PROJECT}/deploy/monitoring")
    (tmp_path / "prometheus.yml").write_text(text)
    assert "SUCCESS" in find_prometheus().check("check", "config", tmp_path / "prometheus.yml")
    (tmp_path / "prometheus.yml").write_text(text.replace("names:", "nomes:"))
    with pytest.raises(AssertionError, match="nomes"):
        find_prometheus().check("check", "config", tmp_path / "prometheus.yml")


def test_the_shops_tables_are_made_once(
    migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONDUCTOR_DSN", migrated.dsn)
    make_shop()
    make_shop()
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["the shop's tables are there", "the shop is there already"]
    with psycopg.connect(migrated.dsn) as connection:
        assert connection.execute("select count(*) from shop.users").fetchone() == (0,)


def test_passwords_can_be_changed() -> None:
    text = FILE.read_text()
    project = json.loads(read_by_compose(text.replace("${SHOP_PASSWORD:-shop}", "other")).stdout)
    dsns = [
        conninfo_to_dict(value)["password"]
        for service in project["services"].values()
        for name, value in service.get("environment", {}).items()
        if name == "CONDUCTOR_DSN"
    ]
    assert set(dsns) == {"other"}
    assert project["services"]["postgres"]["environment"]["POSTGRES_SHOP_PASSWORD"] == "other"


# --- each of them broken once -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "service", "damage", "finding"),
    [
        (check_images, "grafana", {"image": "grafana/grafana"}, "not pinned"),
        (check_images, "cdc", {"build": {"target": "x", "context": "/", "dockerfile": "D"}}, "no "),
        (
            check_mounts,
            "grafana",
            {"volumes": [{"type": "bind", "source": "/missing", "read_only": True}]},
            "there is no /missing",
        ),
        (check_mounts, "grafana", {"volumes": [{"type": "bind", "source": "/"}]}, "can write to /"),
        (check_dependencies, "postgres", {"healthcheck": {}}, "no health check"),
        (check_dependencies, "migrate", {"restart": "always"}, "restarted"),
        (check_settings, "cdc", {"environment": {"CDC_SLOTT": "x"}}, "no setting CDC_SLOTT"),
        (
            check_settings,
            "worker",
            {"environment": {"CONDUCTOR_DSN": "postgresql://shop@db/shop"}},
            "leads to db",
        ),
        (check_commands, "cdc", {"command": ["cdc", "start"]}, "no command cdc start"),
        (check_confinement, "grafana", {"ports": [{"target": 3000}]}, "open to everybody"),
        (check_confinement, "traffic", {"read_only": False}, "not confined"),
        (check_stops, "worker", {"stop_grace_period": "30s"}, "needs 35 s"),
        (check_stops, "cdc", {"stop_grace_period": "5s"}, "killed after 5 s"),
    ],
)
def test_a_check_finds_what_is_wrong(
    project: Project,
    check: Callable[[Project], list[str]],
    service: str,
    damage: Project,
    finding: str,
) -> None:
    project["services"][service] |= damage
    found = check(project)
    assert found
    assert all(finding in line for line in found), found


def test_a_target_that_serves_nothing_is_found(project: Project, prometheus: Prometheus) -> None:
    project["services"]["cdc"]["environment"]["CDC_METRICS_PORT"] = "1"
    del project["services"]["worker"]
    assert check_targets(project, prometheus) == [
        "cdc: cdc serves {1}",
        "conductor: worker serves nothing",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("healthcheck: *ready", "healthchek: *ready", "healthchek"),
        ("migrate: {condition", "migrated: {condition", "undefined service"),
        ("service_healthy", "service_helthy", "condition"),
        ("postgres: {}", "postgresql: {}", "undefined volume"),
    ],
)
def test_compose_refuses_what_is_wrong(old: str, new: str, message: str) -> None:
    done = read_by_compose(FILE.read_text().replace(old, new))
    assert done.returncode != 0
    assert message in done.stderr
