"""Renders the manifests: overlays as they are, and any combination of components on the base."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
KUBERNETES = PROJECT / "deploy" / "kubernetes"
ROUTERS = ("cdc-deployment", "cdc-sidecar")
EXTRAS = ("keda", "monitoring", "networkpolicy")
OVERLAYS = ("dev", "prod")

Manifest = dict[str, Any]

_APPLICATION: Manifest = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {
        "name": "application",
        "labels": {"app.kubernetes.io/name": "application", "pgconductor/cdc": "sidecar"},
    },
    "spec": {
        "selector": {"matchLabels": {"app.kubernetes.io/name": "application"}},
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": "application"}},
            "spec": {
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "application",
                        "image": "application:1",
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                            "readOnlyRootFilesystem": True,
                        },
                    }
                ],
            },
        },
    },
}
"""A stranger's Deployment, for the sidecar to be put beside."""


def component_sets() -> list[tuple[str, ...]]:
    """Every combination of components: one shape of the sidecar, and any of the rest."""
    extras = chain.from_iterable(combinations(EXTRAS, n) for n in range(len(EXTRAS) + 1))
    return [(router, *chosen) for chosen in extras for router in ROUTERS]


def copy_tree(folder: Path) -> Path:
    """Copy what kustomize may read into a folder; return where `deploy/kubernetes` is in it."""
    for part in ("deploy/kubernetes", "grafana"):
        shutil.copytree(PROJECT / part, folder / part)
    return folder / "deploy" / "kubernetes"


def combine(tree: Path, components: Sequence[str], **files: str) -> list[Manifest]:
    """Render the base with these components, beside an application, in a copy of the tree.

    Args:
        tree: what `copy_tree` returned.
        components: their folders' names.
        files: text of settings files (`cdc`, `conductor`) to use instead of the base's.
    """
    folder = tree / "overlays" / "-".join(["combined", *components])
    folder.mkdir(exist_ok=True)
    (folder / "application.yaml").write_text(yaml.safe_dump(_APPLICATION))
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "combined",
        "resources": ["../../base", "application.yaml"],
        "components": [f"../../components/{name}" for name in components],
        "images": [{"name": name, "newTag": "1"} for name in ("pgconductor", "worker")],
        "configMapGenerator": [
            {"name": f"{name}-config", "behavior": "merge", "files": [f"{name}.toml"]}
            for name in files
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)


@cache
def render_overlay(name: str) -> tuple[Manifest, ...]:
    """Render an overlay of the project."""
    return tuple(render(KUBERNETES / "overlays" / name))


def render(folder: Path) -> list[Manifest]:
    """Run `kubectl kustomize`; a failure shows what it says."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of what it will refuse some day
    return list(yaml.safe_load_all(done.stdout))


def name_of(manifest: Manifest) -> str:
    """`Kind name`, as messages call it."""
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pod_specs(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Every pod: its owner's name, its metadata, its spec."""
    for manifest in manifests:
        template = manifest.get("spec", {}).get("template", {})
        if isinstance(template, dict) and "containers" in template.get("spec", {}):
            yield name_of(manifest), template["metadata"], template["spec"]


def containers(spec: Manifest) -> Iterator[Manifest]:
    """Every container of a pod, native sidecars included."""
    yield from spec["containers"]
    yield from spec.get("initContainers", ())
