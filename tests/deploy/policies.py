"""What must hold of rendered manifests, beside their schemas: each check returns what is wrong.

Pure: manifests in, findings out, one line each; `test_policies` breaks each of them once.
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import typer.main
from pydantic_settings import BaseSettings

import cdc.cli
import conductor.cli
from cdc.config import Settings as CdcSettings
from conductor.config import Settings as ConductorSettings
from conductor.orchestrator import DRAIN_TIMEOUT_S
from tests.deploy.kustomize import Manifest, containers, name_of, pod_specs

Check = Callable[[Sequence[Manifest]], list[str]]

PROBES: Final = ("livenessProbe", "readinessProbe", "startupProbe")
SETTINGS: Final[Mapping[str, type[BaseSettings]]] = {
    "cdc": CdcSettings,
    "conductor": ConductorSettings,
}
STOP_TIMES: Final = {"cdc": "stop_timeout_s", "conductor": "drain_timeout_s"}
"""The setting that says how long each program takes to stop."""

DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    program: {name: field.default for name, field in settings.model_fields.items()}
    for program, settings in SETTINGS.items()
} | {"conductor": {"drain_timeout_s": DRAIN_TIMEOUT_S}}

NUMBERS: Final = frozenset({"metrics_port", *STOP_TIMES.values()})
"""The settings that the checks compare with."""

CLOSING_S: Final = 5
"""What a process needs beside that: two seconds for handlers told to stop, closing connections."""

COMMANDS: Final = {
    program: set(typer.main.get_group(app).commands)
    for program, app in (("cdc", cdc.cli.app), ("conductor", conductor.cli.app))
}
"""What each console script knows."""

VARIABLES_BESIDE_SETTINGS: Final = frozenset({"CONFIG", "SECRETS_DIR"})
_CREDENTIALS_IN_URI: Final = re.compile(r"\w+://[^\s/:@]*:[^\s/@$]+@")
_CREDENTIALS_IN_TEXT: Final = re.compile(r"(?i)password\s*(?:=|:\s)\s*['\"]?[^\s'\"$]")
_SECRET_NAME: Final = re.compile(r"(?i)password|secret(?!s_dir)|token|dsn|api_?key")


def program_of(container: Manifest) -> str | None:
    """`cdc` or `conductor`, when the container runs one for good."""
    arguments = [*container.get("command", ()), *container.get("args", ())]
    match arguments:
        case ["cdc", "run", *_]:
            return "cdc"
        case ["conductor", "worker", *_]:
            return "conductor"
    return None


def settings_of(
    manifests: Sequence[Manifest], container: Manifest, spec: Manifest
) -> dict[str, Any]:
    """What a container's variables and settings file say; what they leave out is the default."""
    program = program_of(container)
    assert program is not None
    prefix = f"{program.upper()}_"
    environment = {entry["name"]: entry.get("value") for entry in container.get("env", ())}
    given: dict[str, Any] = {}
    if path := environment.get(f"{prefix}CONFIG"):
        folder, _, file = path.rpartition("/")
        given = tomllib.loads(_config_map(manifests, container, spec, folder)[file])
    for name in NUMBERS & {name.removeprefix(prefix).lower() for name in environment}:
        given[name] = float(environment[f"{prefix}{name.upper()}"])
    return {**DEFAULTS[program], **given}


def _config_map(
    manifests: Sequence[Manifest], container: Manifest, spec: Manifest, folder: str
) -> dict[str, str]:
    volume = next(m["name"] for m in container["volumeMounts"] if m["mountPath"] == folder)
    name = next(v["configMap"]["name"] for v in spec["volumes"] if v["name"] == volume)
    found = [m for m in manifests if name_of(m) == f"ConfigMap {name}"]
    assert found, f"there is no ConfigMap {name}"
    data: dict[str, str] = found[0]["data"]
    return data


def _ours(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest, Manifest, str]]:
    """Every container that runs `cdc run` or `conductor worker`: owner, container, pod, program."""
    for owner, _, spec in pod_specs(manifests):
        for container in containers(spec):
            if (program := program_of(container)) is not None:
                yield f"{owner}, {container['name']}", container, spec, program


# --- the checks -------------------------------------------------------------------------------


def check_probes(manifests: Sequence[Manifest]) -> list[str]:
    """Liveness asks /livez and readiness /readyz, at the port that serves them."""
    findings = []
    for where, container, spec, _ in _ours(manifests):
        sidecar = container in spec.get("initContainers", ())
        wanted = {"livenessProbe": "/livez", "startupProbe": "/livez"}
        if (
            not sidecar
        ):  # a sidecar that cannot connect must not take its application out of service
            wanted["readinessProbe"] = "/readyz"
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
        port = settings_of(manifests, container, spec).get("metrics_port")
        for probe in PROBES:
            asked = container.get(probe, {}).get("httpGet", {})
            if asked.get("path") != wanted.get(probe):
                findings.append(f"{where}: {probe} asks {asked.get('path')}")
            elif asked and ports.get(asked["port"], asked["port"]) != port:
                findings.append(f"{where}: {probe} asks port {asked['port']}, settings say {port}")
    return findings


def check_ports(manifests: Sequence[Manifest]) -> list[str]:
    """The declared port is the one that the settings open, and has a name Prometheus looks for."""
    findings = []
    names = {"cdc": "cdc-metrics", "conductor": "worker-metrics"}
    for where, container, spec, program in _ours(manifests):
        port = settings_of(manifests, container, spec).get("metrics_port")
        declared = [(p["name"], p["containerPort"]) for p in container.get("ports", ())]
        if declared != [(names[program], port)]:
            findings.append(f"{where}: declares {declared}, serves {names[program]} on {port}")
    monitored = {
        endpoint["port"]
        for manifest in manifests
        if manifest["kind"] == "PodMonitor"
        for endpoint in manifest["spec"]["podMetricsEndpoints"]
    }
    findings += [f"a PodMonitor asks port {p}" for p in monitored - set(names.values())]
    return findings


def check_settings(manifests: Sequence[Manifest]) -> list[str]:
    """Every variable of ours, and every key of a settings file, is a setting that exists."""
    findings = []
    for owner, _, spec in pod_specs(manifests):
        for container in containers(spec):
            for entry in container.get("env", ()):
                program, _, setting = entry["name"].partition("_")
                settings = SETTINGS.get(program.lower())
                if settings is None or setting in VARIABLES_BESIDE_SETTINGS:
                    continue
                if setting.lower() not in settings.model_fields:
                    findings.append(f"{owner}: there is no setting {entry['name']}")
    for where, container, spec, program in _ours(manifests):
        unknown = settings_of(manifests, container, spec).keys() - SETTINGS[program].model_fields
        findings += [f"{where}: its file has no setting {name}" for name in sorted(unknown)]
    return findings


def check_commands(manifests: Sequence[Manifest]) -> list[str]:
    """What a container runs of ours is a command that exists."""
    return [
        f"{owner}: there is no command {' '.join(arguments[:2])}"
        for owner, _, spec in pod_specs(manifests)
        for arguments in (container.get("args", ()) for container in containers(spec))
        if arguments
        and arguments[0] in COMMANDS
        and not COMMANDS[arguments[0]].intersection(arguments[1:2])
    ]


def check_grace(manifests: Sequence[Manifest]) -> list[str]:
    """The pod is killed only after the process had its time to stop."""
    findings = []
    for where, container, spec, program in _ours(manifests):
        needed_s = settings_of(manifests, container, spec)[STOP_TIMES[program]] + CLOSING_S
        grace_s = spec.get("terminationGracePeriodSeconds", 30)
        if grace_s < needed_s:
            findings.append(f"{where}: killed after {grace_s} s, needs {needed_s:g} s to stop")
    return findings


def check_secrets(manifests: Sequence[Manifest]) -> list[str]:
    """No Secret is in the manifests, and nothing that looks like one is in clear."""
    findings = []
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            findings.append(f"{name_of(manifest)}: made elsewhere, never kept here")
        findings += [
            f"{name_of(manifest)}: credentials in clear"
            for text in _texts(manifest)
            if _CREDENTIALS_IN_URI.search(text) or _CREDENTIALS_IN_TEXT.search(text)
        ]
    for owner, _, spec in pod_specs(manifests):
        findings += [
            f"{owner}: {entry['name']} has its value in clear"
            for container in containers(spec)
            for entry in container.get("env", ())
            if _SECRET_NAME.search(entry["name"])
            and "value" in entry
            and not entry["name"].endswith("_FILE")
        ]
    return findings


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for item in value.values():
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


def check_images(manifests: Sequence[Manifest]) -> list[str]:
    """Every image has a tag that stays what it is."""
    findings = []
    for owner, _, spec in pod_specs(manifests):
        for container in containers(spec):
            _, _, tag = container["image"].rpartition("/")[2].partition(":")
            if not tag or tag == "latest":
                findings.append(f"{owner}: image {container['image']} is not pinned by tag")
    return findings


def check_pod_security(manifests: Sequence[Manifest]) -> list[str]:
    """The profile `restricted` of the pod security standards, and a read-only root beside it."""
    findings = []
    for owner, _, spec in pod_specs(manifests):
        findings += [f"{owner}: uses {key}" for key in _host_access(spec)]
        if spec.get("automountServiceAccountToken") is not False:
            findings.append(f"{owner}: mounts a token of the Kubernetes API")
        pod = spec.get("securityContext", {})
        for container in containers(spec):
            context = {**pod, **container.get("securityContext", {})}
            findings += [
                f"{owner}, {container['name']}: {finding}" for finding in _judge_context(context)
            ]
    return findings


def _host_access(spec: Manifest) -> Iterator[str]:
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected", "csi"}
    for volume in spec.get("volumes", ()):
        yield from (volume.keys() - {"name"}) - allowed


def _judge_context(context: Manifest) -> Iterator[str]:
    capabilities = context.get("capabilities", {})
    required = {
        "may run as root": context.get("runAsNonRoot") is True and context.get("runAsUser") != 0,
        "may gain privileges": context.get("allowPrivilegeEscalation") is False,
        "is privileged": not context.get("privileged", False),
        "keeps capabilities": capabilities.get("drop") == ["ALL"],
        "adds capabilities": not capabilities.get("add"),
        "has no seccomp profile": context.get("seccompProfile", {}).get("type") == "RuntimeDefault",
        "can write to its root": context.get("readOnlyRootFilesystem") is True,
    }
    yield from (finding for finding, holds in required.items() if not holds)


def check_references(manifests: Sequence[Manifest]) -> list[str]:
    """What is named is there: config maps, volumes, accounts, selected pods, scaled workloads."""
    names = {name_of(manifest) for manifest in manifests}
    pods = [metadata.get("labels", {}) for _, metadata, _ in pod_specs(manifests)]
    findings = []
    for owner, _, spec in pod_specs(manifests):
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        wanted = {
            f"ConfigMap {v['configMap']['name']}"
            for v in spec.get("volumes", ())
            if "configMap" in v
        }
        if account := spec.get("serviceAccountName"):
            wanted.add(f"ServiceAccount {account}")
        findings += [f"{owner}: there is no {name}" for name in sorted(wanted - names)]
        mounted = {m["name"] for c in containers(spec) for m in c.get("volumeMounts", ())}
        claims = {f"{template['metadata']['name']}" for template in _claims(manifests, owner)}
        findings += [
            f"{owner}: volume {name} is not both declared and mounted"
            for name in sorted((volumes | claims) ^ mounted)
        ]
    for manifest in manifests:
        findings += [
            f"{name_of(manifest)}: selects no pod by {selector}"
            for selector in _selectors(manifest)
            if not any(selector.items() <= labels.items() for labels in pods)
        ]
        if manifest["kind"] == "ScaledObject":
            target = f"Deployment {manifest['spec']['scaleTargetRef']['name']}"
            if target not in names:
                findings.append(f"{name_of(manifest)}: there is no {target}")
    return findings


def check_waves(manifests: Sequence[Manifest]) -> list[str]:
    """What a hook of Argo CD needs is there when it runs: in the sync, in an earlier wave."""
    waves = {name_of(manifest): _wave(manifest) for manifest in manifests}
    findings = []
    for hook in manifests:
        phase = hook["metadata"].get("annotations", {}).get("argocd.argoproj.io/hook")
        if phase is None:
            continue
        spec = hook["spec"]["template"]["spec"]
        needed = {name for name in waves if name.startswith("Namespace ")}
        needed |= {f"ServiceAccount {spec.get('serviceAccountName', 'default')}"}
        needed |= {
            f"ConfigMap {v['configMap']['name']}"
            for v in spec.get("volumes", ())
            if "configMap" in v
        }
        findings += [
            f"{name_of(hook)}: {name} does not come before it"
            for name in sorted(needed & waves.keys())
            if phase != "Sync" or waves[name] >= _wave(hook)
        ]
    return findings


def _wave(manifest: Manifest) -> int:
    return int(manifest["metadata"].get("annotations", {}).get("argocd.argoproj.io/sync-wave", 0))


def _claims(manifests: Sequence[Manifest], owner: str) -> list[Manifest]:
    owners = [manifest for manifest in manifests if name_of(manifest) == owner]
    return [claim for m in owners for claim in m["spec"].get("volumeClaimTemplates", ())]


def _selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "PodDisruptionBudget" | "PodMonitor" | "Deployment" | "StatefulSet":
            yield spec["selector"].get("matchLabels", {})
        case "NetworkPolicy":
            yield spec["podSelector"]["matchLabels"]
        case "Service":
            yield spec["selector"]


def check_availability(manifests: Sequence[Manifest]) -> list[str]:
    """What runs for good beside no application of its own can lose a node: spread, and a budget."""
    budgets = [
        manifest["spec"] for manifest in manifests if manifest["kind"] == "PodDisruptionBudget"
    ]
    findings = [
        "a PodDisruptionBudget allows other than one pod to be away"
        for budget in budgets
        if budget.get("maxUnavailable") != 1
    ]
    for owner, metadata, spec in pod_specs(manifests):
        if not any(program_of(container) for container in spec["containers"]):
            continue
        keys = {c["topologyKey"] for c in spec.get("topologySpreadConstraints", ())}
        if keys != {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
            findings.append(f"{owner}: spread over {sorted(keys)}")
        selectors = [budget["selector"]["matchLabels"] for budget in budgets]
        if not any(selector.items() <= metadata["labels"].items() for selector in selectors):
            findings.append(f"{owner}: no PodDisruptionBudget selects it")
    alone = [
        f"{name_of(manifest)}: no hot standby"
        for manifest in manifests
        if name_of(manifest) == "Deployment cdc" and manifest["spec"].get("replicas", 1) < 2
    ]
    return findings + alone


def check_resources(manifests: Sequence[Manifest]) -> list[str]:
    """Every container of ours asks for what it needs, and its memory is limited."""
    findings = []
    for where, container, _, _ in _ours(manifests):
        resources = container.get("resources", {})
        if resources.get("requests", {}).keys() != {"cpu", "memory"}:
            findings.append(f"{where}: does not say what it needs")
        if "memory" not in resources.get("limits", {}):
            findings.append(f"{where}: its memory is not limited")
    return findings


CHECKS: Final[tuple[Check, ...]] = (
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
