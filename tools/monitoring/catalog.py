"""Every metric that the two programs export, read from their tables. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import cdc.metrics
import conductor.metrics

UNITS: Final = {
    "_timestamp_seconds": "Unix time, seconds",
    "_seconds_total": "seconds",
    "_seconds": "seconds",
    "_bytes_total": "bytes",
    "_bytes": "bytes",
    "_transactions": "transactions",
    "_info": "1",
}


@dataclass(frozen=True, slots=True)
class Described:
    """One metric, whichever package it comes from."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    labels: tuple[str, ...]
    valued: str = ""  # the label whose values are known beforehand
    values: tuple[str, ...] = ()
    whole_queue: bool = False  # it describes the queue, not the process

    @property
    def unit(self) -> str:
        """What it counts in; the end of the name says it."""
        return next((unit for end, unit in UNITS.items() if self.name.endswith(end)), "count")

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus stores it."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{part}" for part in ("bucket", "count", "sum"))


def sidecar_metrics() -> Iterator[Described]:
    """The metrics of `cdc run`."""
    for metric in cdc.metrics.TABLE:
        own = () if metric.label is None else (metric.label,)
        kind = metric.instrument.__name__.lower()
        yield Described(
            metric.name, kind, metric.help, (*own, "slot"), metric.label or "", metric.values
        )


def worker_metrics() -> Iterator[Described]:
    """The metrics of `conductor worker`."""
    for metric in conductor.metrics.TABLE:
        yield Described(
            metric.name,
            metric.instrument.__name__.lower(),
            metric.help,
            metric.labels,
            metric.labels[-1] if metric.values else "",
            metric.values,
            whole_queue=metric.scope != "process",
        )


def all_metrics() -> dict[str, Described]:
    """Every metric by its name."""
    return {metric.name: metric for metric in (*sidecar_metrics(), *worker_metrics())}
