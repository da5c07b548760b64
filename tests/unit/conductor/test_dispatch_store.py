from __future__ import annotations

import pytest

from conductor.store.dispatch import read_subscriptions


def test_a_subscription_that_cannot_be_read_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = {"id": 1, "app": "shop", "task": "greet", "trigger": "event:a", "queue": "q"}
    good |= {"version": None, "rank": 0, "source": "main", "kind": "event"}
    rows = [
        {**good, "id": 987, "definition": {"event": 5}, "event": "5"},
        {**good, "definition": {"event": "a"}, "event": "a"},
    ]
    for _ in range(2):
        found = read_subscriptions(rows)
        assert [subscription.id for subscription in found.read] == [1]
        assert found.unreadable == {"5": 1}
    assert caplog.text.count("subscription 987 cannot be read") == 1
