from __future__ import annotations

from datetime import UTC, datetime, timedelta

from conductor.dispatcher import MovingCursor, read_events
from conductor.store.dispatch import START, Dispatch, Position

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(second: float, number: int = 1) -> Position:
    return Position(0, NOON + timedelta(seconds=second), number)


def dispatch(payload: str) -> Dispatch:
    return Dispatch(1, 0, NOON, NOON, payload, None)


def test_the_first_scan_looks_everywhere_and_the_next_goes_on() -> None:
    cursor = MovingCursor()
    assert cursor.start(100.0) == START
    cursor.moved(at(5), 0.001, 100.0, more=False)
    assert cursor.start(100.0) == at(3, 0)  # the first look back
    cursor.moved(at(6), 0.001, 100.0, more=False)
    assert cursor.start(100.1) == at(6)


def test_it_looks_back_every_250_ms_without_moving_back() -> None:
    cursor = MovingCursor()
    cursor.start(100.0)
    cursor.moved(at(5), 0.001, 100.0, more=False)
    cursor.start(100.0)
    assert cursor.start(100.2) == at(5)
    assert cursor.start(100.26) == at(3, 0)
    cursor.moved(at(4), 0.001, 100.26, more=False)
    assert cursor.start(100.3) == at(5)


def test_a_full_batch_from_behind_is_followed_up() -> None:
    cursor = MovingCursor()
    cursor.start(100.0)
    cursor.moved(at(50), 0.001, 100.0, more=False)
    assert cursor.start(101.5) == START
    cursor.moved(at(7), 0.001, 101.5, more=True)
    cursor.start(101.5)  # a look back
    assert cursor.start(101.6) == at(7)


def test_a_slow_full_scan_is_rare() -> None:
    cursor = MovingCursor()
    cursor.start(100.0)
    cursor.moved(at(5), 2.0, 102.0, more=False)
    assert cursor.start(141.0) != START
    assert cursor.start(142.0) == START


def test_an_empty_scan_leaves_the_cursor() -> None:
    cursor = MovingCursor()
    cursor.start(100.0)
    cursor.moved(at(5), 0.001, 100.0, more=False)
    cursor.start(100.0)
    cursor.moved(None, 0.001, 100.1, more=False)
    assert cursor.start(100.1) == at(5)


def test_envelopes_are_read_and_others_are_refused_with_a_reason() -> None:
    good = dispatch('{"event": "user.created", "payload": null}')
    bad = [
        dispatch(text)
        for text in (
            "[]",
            '"user.created"',
            '{"event": 1, "payload": {}}',
            '{"event": "user.created"}',
            '{"event": "user.created", "payload": "\\ud800"}',
        )
    ]
    events, refused = read_events([bad[0], good, *bad[1:]])
    assert events == [("user.created", good)]
    assert [one for one, _ in refused] == bad
    assert all(reason for _, reason in refused)
