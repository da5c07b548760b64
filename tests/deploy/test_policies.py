"""Each policy and each schema is broken once: a check that cannot fail checks nothing."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import schemas
from tests.deploy.kustomize import Manifest, combine, copy_tree, name_of
from tests.deploy.policies import (
    Check,
    check_availability,
    check_commands,
    check_grace,
    check_images,
    check_pod_security,
    check_ports,
    check_probes,
    check_references,
    check_resources,
    check_secrets,
    check_settings,
    check_waves,
)

WORKER = "Deployment conductor-worker"
CDC = "Deployment cdc"

Break = Callable[[Any], object]
"""Changes a manifest, or (of a workload) its pod's spec, in place."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    tree = copy_tree(tmp_path_factory.mktemp("kubernetes"))
    return combine(tree, ["cdc-deployment", "keda", "monitoring", "networkpolicy"])


@pytest.fixture
def manifests(sound: list[Manifest]) -> list[Manifest]:
    return deepcopy(sound)


def manifest_named(manifests: list[Manifest], name: str) -> Manifest:
    return next(manifest for manifest in manifests if name_of(manifest) == name)


def first(spec: Manifest) -> Manifest:
    """The pod's first container."""
    container: Manifest = spec["containers"][0]
    return container


def probe(spec: Manifest, name: str) -> Manifest:
    """What a probe of the first container asks."""
    asked: Manifest = first(spec)[name]["httpGet"]
    return asked


def settle_text(manifests: list[Manifest], old: str, new: str) -> None:
    """Replace a line of the settings files."""
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            for file, text in manifest["data"].items():
                manifest["data"][file] = text.replace(old, new)


POD_BREAKS: list[tuple[Check, str, Break, str]] = [
    (check_probes, WORKER, lambda s: probe(s, "livenessProbe").update(path="/healthz"), "/healthz"),
    (check_probes, WORKER, lambda s: probe(s, "readinessProbe").update(path="/livez"), "/livez"),
    (check_probes, CDC, lambda s: probe(s, "startupProbe").update(port=8080), "port 8080"),
    (check_probes, CDC, lambda s: first(s).pop("livenessProbe"), "livenessProbe asks None"),
    (check_ports, WORKER, lambda s: first(s)["ports"][0].update(containerPort=80), "serves"),
    (check_ports, CDC, lambda s: first(s)["ports"][0].update(name="http"), "serves"),
    (
        check_settings,
        CDC,
        lambda s: first(s)["env"].append({"name": "CDC_SLOTT", "value": "x"}),
        "no setting CDC_SLOTT",
    ),
    (check_commands, WORKER, lambda s: first(s).update(args=["conductor", "work"]), "no command"),
    (check_commands, CDC, lambda s: first(s).update(args=["cdc"]), "no command cdc"),
    (check_grace, WORKER, lambda s: s.update(terminationGracePeriodSeconds=30), "30 s"),
    (check_grace, CDC, lambda s: s.update(terminationGracePeriodSeconds=5), "killed after 5 s"),
    (
        check_secrets,
        WORKER,
        lambda s: first(s)["env"].append({"name": "CONDUCTOR_DSN", "value": "host=db"}),
        "in clear",
    ),
    (
        check_secrets,
        WORKER,
        lambda s: first(s)["args"].append("postgresql://app:hunter2@db/shop"),
        "credentials",
    ),
    (check_images, WORKER, lambda s: first(s).update(image="worker"), "not pinned"),
    (check_images, CDC, lambda s: first(s).update(image="host:5000/cdc:latest"), "not pinned"),
    (check_pod_security, CDC, lambda s: s.update(hostNetwork=True), "hostNetwork"),
    (check_pod_security, CDC, lambda s: s["volumes"][0].update(hostPath={}), "hostPath"),
    (check_pod_security, CDC, lambda s: s.pop("automountServiceAccountToken"), "token"),
    (check_pod_security, CDC, lambda s: s["securityContext"].update(runAsUser=0), "root"),
    (check_pod_security, CDC, lambda s: s["securityContext"].pop("seccompProfile"), "seccomp"),
    (
        check_pod_security,
        WORKER,
        lambda s: first(s)["securityContext"].update(capabilities={"add": ["SYS_ADMIN"]}),
        "capabilities",
    ),
    (
        check_pod_security,
        WORKER,
        lambda s: first(s)["securityContext"].update(readOnlyRootFilesystem=False),
        "write",
    ),
    (
        check_pod_security,
        WORKER,
        lambda s: first(s)["securityContext"].pop("allowPrivilegeEscalation"),
        "gain",
    ),
    (check_references, CDC, lambda s: s.update(serviceAccountName="nobody"), "nobody"),
    (check_references, CDC, lambda s: first(s)["volumeMounts"].pop(), "volume tmp"),
    (check_availability, WORKER, lambda s: s["topologySpreadConstraints"].pop(), "spread"),
    (check_resources, CDC, lambda s: first(s)["resources"].pop("limits"), "limited"),
    (check_resources, CDC, lambda s: first(s)["resources"]["requests"].pop("cpu"), "needs"),
]


@pytest.mark.parametrize(("check", "name", "damage", "finding"), POD_BREAKS)
def test_a_check_finds_what_is_wrong_in_a_pod(
    manifests: list[Manifest], check: Check, name: str, damage: Break, finding: str
) -> None:
    assert check(manifests) == []
    damage(manifest_named(manifests, name)["spec"]["template"]["spec"])
    found = check(manifests)
    assert found
    assert all(finding in line for line in found), found


MANIFEST_BREAKS: list[tuple[Check, str, Break, str]] = [
    (
        check_ports,
        "PodMonitor cdc",
        lambda m: m["spec"]["podMetricsEndpoints"][0].update(port="x"),
        "asks port x",
    ),
    (
        check_references,
        "PodDisruptionBudget cdc",
        lambda m: m["spec"].update(selector={"matchLabels": {"a": "b"}}),
        "selects no pod",
    ),
    (
        check_references,
        "NetworkPolicy pgconductor-dns",
        lambda m: m["spec"].update(podSelector={"matchLabels": {"a": "b"}}),
        "selects no pod",
    ),
    (
        check_references,
        "ScaledObject conductor-worker",
        lambda m: m["spec"].update(scaleTargetRef={"name": "workers"}),
        "no Deployment workers",
    ),
    (
        check_availability,
        "PodDisruptionBudget cdc",
        lambda m: m["spec"].update(maxUnavailable=2),
        "other than one",
    ),
    (check_availability, CDC, lambda m: m["spec"].update(replicas=1), "no hot standby"),
    (check_secrets, CDC, lambda m: m.update(kind="Secret", spec={}), "made elsewhere"),
    (
        check_waves,
        "Job conductor-migrate",
        lambda m: m["metadata"]["annotations"].update({"argocd.argoproj.io/hook": "PreSync"}),
        "ServiceAccount conductor does not come before",
    ),
    (
        check_waves,
        "ServiceAccount conductor",
        lambda m: m["metadata"].pop("annotations"),
        "ServiceAccount conductor does not come before",
    ),
]


@pytest.mark.parametrize(("check", "name", "damage", "finding"), MANIFEST_BREAKS)
def test_a_check_finds_what_is_wrong_in_a_manifest(
    manifests: list[Manifest], check: Check, name: str, damage: Break, finding: str
) -> None:
    damage(manifest_named(manifests, name))
    found = check(manifests)
    assert found
    assert all(finding in line for line in found), found


@pytest.mark.parametrize(
    ("check", "old", "new", "finding"),
    [
        (check_ports, "metrics_port = 9465", "metrics_port = 9999", "on 9999"),
        (check_probes, "metrics_port = 9464", "", "settings say"),
        (check_grace, "drain_timeout_s = 30", "drain_timeout_s = 300", "needs 305 s"),
        (check_settings, "gap_policy", "gap_polisy", "gap_polisy"),
        (check_secrets, 'log_format = "json"', 'dsn = "host=db password=x"', "credentials"),
    ],
)
def test_a_check_finds_what_is_wrong_in_the_settings(
    manifests: list[Manifest], check: Check, old: str, new: str, finding: str
) -> None:
    settle_text(manifests, old, new)
    assert any(finding in line for line in check(manifests))


def test_a_workload_without_a_budget_is_found(manifests: list[Manifest]) -> None:
    manifests.remove(manifest_named(manifests, "PodDisruptionBudget cdc"))
    assert check_availability(manifests) == ["Deployment cdc: no PodDisruptionBudget selects it"]


def test_a_missing_config_map_is_found(manifests: list[Manifest]) -> None:
    kept = [m for m in manifests if not m["metadata"]["name"].startswith("cdc-config")]
    assert any("there is no ConfigMap cdc-config" in line for line in check_references(kept))


@pytest.mark.parametrize(
    ("name", "damage", "finding"),
    [
        (CDC, lambda m: m["spec"].update(replica=2), "replica"),
        (CDC, lambda m: m["spec"].update(replicas="two"), "two"),
        ("NetworkPolicy pgconductor-dns", lambda m: m["spec"].pop("podSelector"), "podSelector"),
        ("PodMonitor cdc", lambda m: m["spec"].update(sellector={}), "sellector: no such key"),
        ("PodMonitor cdc", lambda m: m["spec"].update(podMetricsEndpoints=3), "valid list"),
        ("PrometheusRule pgconductor", lambda m: m["spec"]["groups"][0].pop("name"), "name"),
        (
            "ScaledObject conductor-worker",
            lambda m: m["spec"].update(minReplicaCount="none"),
            "valid integer",
        ),
        (
            "TriggerAuthentication conductor-worker",
            lambda m: m["spec"]["secretTargetRef"][0].pop("name"),
            "name",
        ),
        (CDC, lambda m: m.update(kind="Deploiment"), "unknown kind"),
    ],
)
def test_a_schema_finds_what_is_wrong(
    manifests: list[Manifest], name: str, damage: Break, finding: str
) -> None:
    manifest = manifest_named(manifests, name)
    assert schemas.judge(manifest) == []
    damage(manifest)
    found = schemas.judge(manifest)
    assert found
    assert all(finding in line for line in found), found


def test_what_cannot_be_rendered_is_an_error(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    with pytest.raises(AssertionError, match="no such file"):
        combine(tree, ["missing"])
