"""The instruments of a sidecar: what they say, when they say nothing, and what they cost."""

import math
import sys
from collections import Counter
from types import FrameType

import pytest
from prometheus_client import generate_latest

from cdc.catalog import Slot, SlotStatistics
from cdc.metrics import CAUSES, CONDITIONS, TABLE, Metrics
from cdc.pipeline import Committed
from cdc.wire.messages import Begin, Commit, Insert, Update


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2", "orders")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"slot": "orders", **labels})


def slot(**changes: object) -> Slot:
    facts: dict[str, object] = {
        "name": "orders",
        "plugin": "pgoutput",
        "slot_type": "logical",
        "database": "shop",
        "temporary": False,
        "two_phase": False,
        "active_pid": 7,
        "restart_lsn": None,
        "confirmed_flush_lsn": None,
        "wal_status": "reserved",
        "safe_wal_bytes": 500,
        "invalidation_reason": None,
        "failover": False,
        "retained_bytes": 100,
    }
    return Slot(**{**facts, **changes})  # type: ignore[arg-type]  # facts of several types


def test_every_series_says_which_slot(metrics: Metrics) -> None:
    lines = generate_latest(metrics.registry).decode().splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert len(samples) > len(TABLE)
    assert [line for line in samples if 'slot="orders"' not in line] == []
    assert value(metrics, "cdc_build_info", version="1.2") == 1


def test_what_is_bounded_starts_at_zero(metrics: Metrics) -> None:
    assert {value(metrics, "cdc_reconnects_total", cause=cause) for cause in CAUSES} == {0}
    assert {value(metrics, "cdc_conditions_total", condition=c) for c in CONDITIONS} == {0}
    assert value(metrics, "cdc_changes_total", operation="truncate") == 0


def test_reads_and_commits_are_counted(metrics: Metrics) -> None:
    metrics.task_of = {b"head": "welcome"}.get
    metrics.read(Counter({Begin: 1, Insert: 2, Commit: 1}), 300, unmatched=1)
    metrics.committed(Committed(Counter({b"head": 2}), 1, 0.002, 1, 200))
    assert value(metrics, "cdc_messages_total") == 4
    assert value(metrics, "cdc_received_bytes_total") == 300
    assert value(metrics, "cdc_transactions_total") == 1
    assert value(metrics, "cdc_changes_total", operation="insert") == 2
    assert value(metrics, "cdc_unmatched_changes_total") == 1
    assert value(metrics, "cdc_jobs_routed_total", task="welcome") == 2
    assert value(metrics, "cdc_dead_letters_total") == 1
    assert value(metrics, "cdc_flush_jobs_sum") == 2
    assert value(metrics, "cdc_commit_to_enqueue_seconds_count") == 1


def test_a_task_is_counted_from_its_first_job_on(metrics: Metrics) -> None:
    metrics.tasks(["welcome"])
    assert value(metrics, "cdc_jobs_routed_total", task="welcome") == 0


def test_lag_is_behind_the_server(metrics: Metrics) -> None:
    metrics.positions(received=90, routed=70, acknowledged=60, server=80)
    metrics.server(100)
    assert value(metrics, "cdc_position_bytes", stage="server") == 100
    lags = {stage: value(metrics, "cdc_lag_bytes", stage=stage) for stage in ("receive", "route")}
    assert lags == {"receive": 10, "route": 30}
    assert value(metrics, "cdc_lag_bytes", stage="acknowledge") == 40


def test_the_slot_is_described(metrics: Metrics) -> None:
    metrics.slot(slot(wal_status="extended"), SlotStatistics(3, 30, 4, 40))
    assert value(metrics, "cdc_slot_wal_status", status="extended") == 1
    assert value(metrics, "cdc_slot_wal_status", status="lost") == 0
    assert value(metrics, "cdc_slot_safe_wal_bytes") == 500
    assert value(metrics, "cdc_slot_spilled_bytes") == 30
    assert value(metrics, "cdc_slot_streamed_bytes") == 40
    metrics.slot(slot(safe_wal_bytes=None, invalidation_reason="wal_removed"), None)
    assert value(metrics, "cdc_slot_wal_status", status="lost") == 1
    assert value(metrics, "cdc_slot_safe_wal_bytes") == math.inf


def test_a_follower_does_not_repeat_what_it_knew_as_the_leader(metrics: Metrics) -> None:
    metrics.lead()
    metrics.positions(received=90, routed=70, acknowledged=60, server=80)
    metrics.slot(slot(), SlotStatistics(3, 30, 0, 0))
    metrics.subscriptions(active=1, pending=2, refused=0)
    assert value(metrics, "cdc_leader") == 1
    metrics.follow()
    assert value(metrics, "cdc_leader") == 0
    assert value(metrics, "cdc_lag_bytes", stage="route") is None
    assert value(metrics, "cdc_position_bytes", stage="server") is None
    assert value(metrics, "cdc_slot_wal_status", status="reserved") is None
    assert value(metrics, "cdc_subscriptions", state="pending") is None
    assert math.isnan(value(metrics, "cdc_slot_safe_wal_bytes") or 0)
    metrics.lead()
    metrics.server(50)
    assert value(metrics, "cdc_position_bytes", stage="server") == 50


def test_counting_costs_the_same_for_a_thousand_changes_as_for_one(metrics: Metrics) -> None:
    def calls(changes: int) -> int:
        kinds: Counter[type] = Counter({Begin: 1, Insert: changes, Update: changes, Commit: 1})
        committed = Committed(Counter({b"head": changes}), 0, 0.01, 1, 200)
        made = 0

        def count(_frame: FrameType, event: str, _argument: object) -> None:
            nonlocal made
            made += event in {"call", "c_call"}

        sys.setprofile(count)
        try:
            metrics.read(kinds, 100, unmatched=0)
            metrics.committed(committed)
        finally:
            sys.setprofile(None)
        return made

    metrics.committed(Committed(Counter({b"head": 1}), 0, 0.01, 1, 200))  # makes its instruments
    assert calls(1000) == calls(1) > 0
