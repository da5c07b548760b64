from __future__ import annotations

from datetime import date, timedelta

import pytest

from conductor.maintenance import (
    PARTITIONED_DAYS,
    expired_partitions,
    missing_days,
    partition_day,
    partition_name,
)
from conductor.store.maintenance import Days

TODAY = date(2026, 2, 27)


def test_a_partition_is_named_after_its_day() -> None:
    assert partition_name(TODAY) == "history_20260227"
    assert partition_day("history_20260227") == TODAY


@pytest.mark.parametrize(
    "longest_days, reach",
    [(0.0, 15), (1.0, 15), (7.0, 15), (7.5, 16), (30.0, 38), (90.0, 98), (92.0, PARTITIONED_DAYS)],
)
def test_days_ahead_cover_the_longest_retention_and_a_week(longest_days: float, reach: int) -> None:
    days = missing_days(Days(TODAY, longest_days, []))
    assert days[0] == TODAY + timedelta(days=1)
    assert days[-1] == TODAY + timedelta(days=reach)
    assert len(days) == reach


def test_a_retention_without_an_end_needs_no_partitions_without_one() -> None:
    assert len(missing_days(Days(TODAY, 100_000.0, []))) == PARTITIONED_DAYS


def test_only_missing_days_are_added() -> None:
    existing = [partition_name(TODAY + timedelta(days=n)) for n in range(1, 15)]
    assert missing_days(Days(TODAY, 7.0, existing)) == [TODAY + timedelta(days=15)]


def test_a_day_is_dropped_when_it_has_come() -> None:
    names = [partition_name(TODAY + timedelta(days=n)) for n in (-9, 0, 1)]
    assert expired_partitions(Days(TODAY, 7.0, names)) == names[:2]
