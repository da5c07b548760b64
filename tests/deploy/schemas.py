"""Judges manifests by Kubernetes' schemas for its kinds, by models for the operators' kinds."""

import json
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped]  # it has no annotations
from pydantic import BaseModel, ValidationError

from tests.deploy.kustomize import Manifest

KUBERNETES_VERSIONS: Final = ("1.31", "1.34")
"""The oldest and the newest that the manifests are written for."""


@cache
def models() -> dict[tuple[str, str], type[BaseModel]]:
    """The models of the operators' kinds.

    Imported when a manifest is judged: that takes seconds, and every process collects these tests.
    """
    from cloudcoil.models.keda.v1alpha1 import (  # noqa: PLC0415
        ScaledObject,
        TriggerAuthentication,
    )
    from cloudcoil.models.prometheus_operator.v1 import (  # noqa: PLC0415
        PodMonitor,
        PrometheusRule,
    )

    return {
        ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject,
        ("keda.sh/v1alpha1", "TriggerAuthentication"): TriggerAuthentication,
        ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitor,
        ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRule,
    }


def judge(manifest: Manifest) -> list[str]:
    """Say what is wrong with a manifest by its schema."""
    return list(_judge_once(json.dumps(manifest)))


@cache
def _judge_once(text: str) -> tuple[str, ...]:
    """Schemas take their time, and the same manifest comes in many combinations."""
    manifest = json.loads(text)
    if model := models().get((manifest["apiVersion"], manifest["kind"])):
        return tuple(_judge_by_model(manifest, model))
    return tuple(_judge_by_schema(manifest))


def _judge_by_schema(manifest: Manifest) -> Iterator[str]:
    for version in KUBERNETES_VERSIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{version}: {error.message}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield f"{version}: unknown kind {error.kind} of {error.api_version}"


def _judge_by_model(manifest: Manifest, model: type[BaseModel]) -> Iterator[str]:
    """The models refuse wrong values but drop keys they do not know: compare what comes back."""
    try:
        parsed = model.model_validate(manifest)
    except ValidationError as error:
        for problem in error.errors():
            yield f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        return
    returned = parsed.model_dump(mode="json", by_alias=True, exclude_unset=True)
    yield from _missing(manifest, returned, "")


def _missing(given: Any, returned: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(returned, dict):
        for key, value in given.items():
            if key not in returned:
                yield f"{path}{key}: no such key"
            else:
                yield from _missing(value, returned[key], f"{path}{key}.")
    elif isinstance(given, list) and isinstance(returned, list):
        for index, (one, other) in enumerate(zip(given, returned, strict=True)):
            yield from _missing(one, other, f"{path}{index}.")
