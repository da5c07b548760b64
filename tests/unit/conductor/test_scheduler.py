from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from conductor import scheduler
from conductor.errors import CronInvalid
from conductor.scheduler import Move, first_move, plan_move

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def test_the_instant_that_is_due_fires_at_once() -> None:
    move = plan_move("*/5 * * * *", "UTC", NOON, NOON + timedelta(milliseconds=3))
    assert move == Move(NOON, NOON + 5 * MINUTE, missed=0)


@pytest.mark.parametrize(
    ("minutes", "move"),
    [
        (3, Move(None, NOON + 5 * MINUTE, missed=0)),
        (5, Move(NOON + 5 * MINUTE, NOON + 10 * MINUTE, missed=0)),
        (12, Move(NOON + 10 * MINUTE, NOON + 15 * MINUTE, missed=1)),
    ],
)
def test_a_schedule_begins_after_the_instant_it_was_made_at(minutes: int, move: Move) -> None:
    assert first_move("*/5 * * * *", "UTC", NOON, NOON + minutes * MINUTE) == move


def test_only_the_latest_missed_instant_fires() -> None:
    move = plan_move("*/5 * * * *", "UTC", NOON, NOON + 17 * MINUTE)
    assert move == Move(NOON + 15 * MINUTE, NOON + 20 * MINUTE, missed=3)


def test_an_instant_that_is_now_is_not_missed() -> None:
    move = plan_move("*/5 * * * *", "UTC", NOON, NOON + 5 * MINUTE)
    assert move == Move(NOON + 5 * MINUTE, NOON + 10 * MINUTE, missed=1)


def test_a_very_long_downtime_is_counted_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "COUNTED_AT_MOST", 10)
    move = plan_move("*/5 * * * *", "UTC", NOON, NOON + timedelta(days=40, minutes=7))
    assert move.fires_at == NOON + timedelta(days=40, minutes=5)
    assert move.next_at == NOON + timedelta(days=40, minutes=10)
    assert move.missed == 10


def test_the_bound_is_kept_where_firings_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "COUNTED_AT_MOST", 2)
    move = plan_move("0 12 1 * *", "UTC", NOON, datetime(2026, 6, 20, tzinfo=UTC))
    assert move.fires_at == datetime(2026, 6, 1, 12, tzinfo=UTC)
    assert move.next_at == datetime(2026, 7, 1, 12, tzinfo=UTC)


def test_an_unknown_zone_is_an_error_of_its_own() -> None:
    with pytest.raises(CronInvalid, match="Mars/Olympus"):
        plan_move("* * * * *", "Mars/Olympus", NOON, NOON)
