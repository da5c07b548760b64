from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter, Gauge, Histogram, generate_latest

from conductor import metrics
from conductor.metrics import TABLE, WAIT, Metric, Metrics, observe_all

UNITS = ("_seconds", "_bytes", "_total", "_info", "_transactions")
COUNTS = {
    *("conductor_jobs", "conductor_slots", "conductor_slots_busy", "conductor_workers"),
    *("conductor_gaps_open", "conductor_dead_letters", "conductor_lanes_halted"),
}
BOUNDED_LABELS = {
    *("app", "version", "release"),
    *("queue", "task", "trigger", "outcome", "state", "part"),
    *("slot", "condition"),
}


@pytest.mark.parametrize("metric", TABLE, ids=lambda m: m.name)
def test_names_follow_the_conventions(metric: Metric[Any]) -> None:
    assert re.fullmatch(r"conductor_[a-z_]+", metric.name)
    assert metric.name.endswith(UNITS) or metric.name in COUNTS
    assert metric.name.endswith("_total") == (metric.instrument is Counter)
    assert metric.help.endswith(".")
    assert set(metric.labels) <= BOUNDED_LABELS


def test_known_values_are_those_of_the_code() -> None:
    package = Path(metrics.__file__).parent
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    assert set(re.findall(r'Periodic\("(\w+)", self', source)) == set(metrics.PARTS)
    others = set(re.findall(r'get\(RECONNECTS, "(\w+)"\)', source))
    assert {*others, *metrics.PARTS} == set(metrics.RECONNECTS.values)


def test_every_constant_is_in_the_table_once() -> None:
    constants = [v for k, v in vars(metrics).items() if isinstance(v, Metric) and k.isupper()]
    assert list(TABLE) == constants
    assert len({m.name for m in TABLE}) == len(TABLE)


def test_metrics_of_two_processes_do_not_meet() -> None:
    one, two = Metrics(), Metrics()
    one.get(metrics.RESCUED).inc(3)
    assert b"conductor_jobs_rescued_total 3.0" in generate_latest(one.registry)
    assert b"conductor_jobs_rescued_total 0.0" in generate_latest(two.registry)


def test_asking_for_an_instrument_starts_its_series_at_zero() -> None:
    process = Metrics()
    process.get(metrics.FINISHED, "default", "send-email", "failed")
    shown = generate_latest(process.registry).decode()
    assert (
        'conductor_jobs_finished_total{outcome="failed",queue="default",task="send-email"} 0.0'
        in shown
    )


def test_an_instrument_is_made_once() -> None:
    process = Metrics()
    assert process.get(metrics.SLOTS, "default") is process.get(metrics.SLOTS, "default")


def test_there_are_no_series_of_creation_times() -> None:
    process = Metrics()
    for metric in TABLE:
        process.get(metric, *("x" for _ in metric.labels))
    assert b"_created" not in generate_latest(process.registry)


def test_cleared_series_are_gone_and_can_come_back() -> None:
    process = Metrics()
    process.get(metrics.WORKERS, "default").set(2)
    process.clear(metrics.WORKERS)
    assert b"conductor_workers{" not in generate_latest(process.registry)
    process.get(metrics.WORKERS, "default").set(1)
    assert b'conductor_workers{queue="default"} 1.0' in generate_latest(process.registry)


def test_each_instrument_is_of_its_kind() -> None:
    process = Metrics()
    assert isinstance(process.get(metrics.RESCUED), Counter)
    assert isinstance(process.get(metrics.SLOTS, "default"), Gauge)
    assert isinstance(process.get(metrics.CLAIM, "default"), Histogram)


def test_many_observations_are_those_of_each() -> None:
    values = [0.0, 0.0005, 0.00051, 0.3, 0.3, 3600.0, 3601.0, 1e9]
    together, singly = Metrics(), Metrics()
    observe_all(together.get(WAIT, "default", "t"), values)
    for value in values:
        singly.get(WAIT, "default", "t").observe(value)
    observe_all(together.get(WAIT, "default", "idle"), [])
    singly.get(WAIT, "default", "idle")
    assert generate_latest(together.registry) == generate_latest(singly.registry)
