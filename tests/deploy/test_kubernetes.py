"""The manifests: every overlay and every combination of components, by schema and by policy."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from cdc.config import Settings as CdcSettings
from tests.deploy import schemas
from tests.deploy.kustomize import (
    KUBERNETES,
    OVERLAYS,
    PROJECT,
    Manifest,
    combine,
    component_sets,
    containers,
    copy_tree,
    name_of,
    pod_specs,
    render_overlay,
)
from tests.deploy.policies import CHECKS, Check
from tools.prometheus_rule import TARGET, prometheus_rule, rule_files

VERSION = importlib.metadata.version("pgconductor")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("kubernetes"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_the_policies(overlay: str, check: Check) -> None:
    assert check(render_overlay(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_valid(overlay: str) -> None:
    assert judge_all(render_overlay(overlay)) == {}


@pytest.mark.parametrize("components", component_sets(), ids="+".join)
def test_components_combine(tree: Path, components: tuple[str, ...]) -> None:
    manifests = combine(tree, components)
    assert judge_all(manifests) == {}
    assert {check.__name__: check(manifests) for check in CHECKS} == {
        check.__name__: [] for check in CHECKS
    }


def test_the_sidecar_is_put_beside_the_application_alone(tree: Path) -> None:
    manifests = combine(tree, ["cdc-sidecar"])
    homes = {
        owner: [(c["name"], c.get("restartPolicy")) for c in spec.get("initContainers", ())]
        for owner, _, spec in pod_specs(manifests)
    }
    assert homes.pop("Deployment application") == [("cdc", "Always")]
    assert set(homes) == {"Deployment conductor-worker", "Job conductor-migrate"}
    assert not any(homes.values())


def test_the_scaler_owns_the_number_of_replicas(tree: Path) -> None:
    for components, owned in (((), False), (("keda",), True)):
        manifests = combine(tree, ["cdc-deployment", *components])
        worker = next(m for m in manifests if name_of(m) == "Deployment conductor-worker")
        assert ("replicas" not in worker["spec"]) == owned


def test_what_no_policy_allows_is_denied_to_all_our_pods(tree: Path) -> None:
    manifests = combine(tree, ["cdc-deployment", "networkpolicy"])
    denied = [
        policy["spec"]["podSelector"]["matchLabels"].items()
        for policy in manifests
        if policy["kind"] == "NetworkPolicy"
        and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not {"ingress", "egress"} & policy["spec"].keys()
    ]
    ours = {
        owner: any(labels <= metadata["labels"].items() for labels in denied)
        for owner, metadata, _ in pod_specs(manifests)
    }
    del ours["Deployment application"]  # a stranger's
    assert len(ours) == 3
    assert all(ours.values())


def test_a_changed_setting_rolls_the_pods(tree: Path) -> None:
    before = config_maps_of(combine(tree, ["cdc-deployment"]))
    text = (KUBERNETES / "base" / "cdc.toml").read_text()
    after = config_maps_of(combine(tree, ["cdc-deployment"], cdc=f'{text}log_level = "debug"\n'))
    assert before["Deployment conductor-worker"] == after["Deployment conductor-worker"]
    assert before["Deployment cdc"] != after["Deployment cdc"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_images_have_the_version_of_the_project(overlay: str) -> None:
    tags = {
        container["image"].rpartition(":")[2]
        for _, _, spec in pod_specs(render_overlay(overlay))
        for container in containers(spec)
        if container["image"].startswith("pgconductor")
    }
    assert tags == {VERSION}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_enforces_restricted_pods(overlay: str) -> None:
    namespaces = [m for m in render_overlay(overlay) if m["kind"] == "Namespace"]
    labels = [m["metadata"]["labels"] for m in namespaces]
    assert [x["pod-security.kubernetes.io/enforce"] for x in labels] == ["restricted"]


def test_the_operators_copy_of_the_rules_is_current() -> None:
    assert rule_files()
    assert TARGET.read_text() == prometheus_rule(), "run python -m tools.prometheus_rule"


def test_every_dashboard_is_a_config_map_that_grafana_finds() -> None:
    found: dict[str, str] = {}
    for manifest in render_overlay("prod"):
        if manifest["metadata"].get("labels", {}).get("grafana_dashboard") == "1":
            found |= manifest["data"]
    kept = (PROJECT / "grafana" / "dashboards").glob("*.json")
    assert found == {path.name: path.read_text() for path in kept}


def test_the_secrets_of_the_overlay_dev_are_those_it_mounts() -> None:
    done = subprocess.run(
        [KUBERNETES / "overlays" / "dev" / "secrets.sh"],
        capture_output=True,
        check=True,
        text=True,
    )
    manifests: list[Manifest] = list(yaml.safe_load_all(done.stdout))
    assert judge_all(manifests) == {}
    secrets = {m["metadata"]["name"]: m["stringData"] for m in manifests if m["kind"] == "Secret"}
    assert set(secrets) == secrets_used(render_overlay("dev"))
    passwords = secrets["postgres"]
    assert len(set(passwords.values())) == len(passwords) == 3
    for secret, key, role in (
        ("conductor-database", "conductor_dsn", "shop"),
        ("cdc-database", "cdc_source_dsn", "cdc"),
    ):
        parts = conninfo_to_dict(secrets[secret][key])
        assert (parts["user"], parts["password"]) == (role, passwords[f"{role}_password"])


def judge_all(manifests: tuple[Manifest, ...] | list[Manifest]) -> dict[str, list[str]]:
    """What the schemas say, of each manifest they say something of."""
    findings = {name_of(manifest): schemas.judge(manifest) for manifest in manifests}
    return {name: found for name, found in findings.items() if found}


def config_maps_of(manifests: list[Manifest]) -> dict[str, set[str]]:
    """The config maps that each workload mounts."""
    return {
        owner: {v["configMap"]["name"] for v in spec.get("volumes", ()) if "configMap" in v}
        for owner, _, spec in pod_specs(manifests)
    }


def secrets_used(manifests: tuple[Manifest, ...]) -> set[str]:
    """The secrets that pods mount or read variables from."""
    used = set()
    for _, _, spec in pod_specs(manifests):
        used |= {v["secret"]["secretName"] for v in spec.get("volumes", ()) if "secret" in v}
        used |= {
            entry["valueFrom"]["secretKeyRef"]["name"]
            for container in containers(spec)
            for entry in container.get("env", ())
            if "secretKeyRef" in entry.get("valueFrom", {})
        }
    return used


def test_the_page_names_the_secrets_and_keys_that_are_read() -> None:
    page = (KUBERNETES / "README.md").read_text()
    overlays = [manifest for overlay in OVERLAYS for manifest in render_overlay(overlay)]
    triggers = [m for m in overlays if m["kind"] == "TriggerAuthentication"]
    wanted = {m["spec"]["secretTargetRef"][0]["name"] for m in triggers}
    wanted |= secrets_used(render_overlay("prod"))
    assert wanted == set(re.findall(r"^ *\| `([a-z-]+)` \|", page, re.MULTILINE))
    keys = set(re.findall(r"\| `([a-z_]+)` \|", page))
    assert keys == {"conductor_dsn", "cdc_source_dsn", "cdc_queue_dsn", "connection"}
    assert {f"CDC_{name}".lower() for name in CdcSettings.model_fields} >= {
        key for key in keys if key.startswith("cdc_")
    }


@pytest.mark.parametrize("page", ["deploy/README.md", "deploy/kubernetes/README.md"])
def test_a_pages_links_lead_somewhere(page: str) -> None:
    path = PROJECT / page
    for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link
