from __future__ import annotations

import pytest

from conductor.store.dispatch import _readable


def test_a_subscription_that_cannot_be_read_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = {"id": 1, "app": "shop", "task": "greet", "trigger": "event:a", "queue": "q"}
    good |= {"version": None, "rank": 0, "source": "main", "kind": "event"}
    rows = [{**good, "id": 987, "definition": {}}, {**good, "definition": {"event": "a"}}]
    for _ in range(2):
        assert [subscription.id for subscription in _readable(rows)] == [1]
    assert caplog.text.count("subscription 987 cannot be read") == 1
