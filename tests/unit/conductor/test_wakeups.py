from __future__ import annotations

import json
from typing import Any

import pytest
from orjson import dumps, loads

from conductor.matching import ChangeFilter, change_topic, match_key, matched_values
from conductor.store.waits import Probe, Waiting
from conductor.wakeups import Message, judge, probes


def message(payload: Any, event: str = "paid") -> Message:
    envelope = {"event": event, "payload": payload}
    return Message(event, payload, "700", json.dumps(envelope))


@pytest.mark.parametrize(
    "match, payload, matches",
    [
        ({"order": 5}, {"order": 5, "city": "Bonn"}, True),
        ({"order": 5}, {"order": 6}, False),
        ({"order": 5}, {"order": "5"}, False),
        ({"order": 5.0}, {"order": 5}, True),
        ({"order": 5}, {"order": 5.0}, True),
        ({"order": 1e300}, {"order": 1e300}, True),
        ({"order": 5}, {"order": 5.5}, False),
        ({"order": 5}, {}, False),
        ({"order": 5}, [5], False),
        ({"order": 5}, None, False),
        ({"b": {"y": 1, "x": 2}, "a": None}, {"a": None, "b": {"x": 2, "y": 1}}, True),
        (None, 3, True),
        ({}, None, True),
    ],
)
def test_fields_and_values(match: Any, payload: Any, matches: bool) -> None:
    fields, matched = match_key(match)
    assert (matched_values(fields, payload) == matched) is matches


def test_each_message_is_looked_up_by_the_fields_that_jobs_wait_by() -> None:
    known = [("event:paid", ""), ("event:paid", '["order"]'), ("event:other", '["order"]')]
    found = probes([message({"order": 5}), message(3), message({}, "unwanted")], known)
    assert found == [
        Probe("event:paid", "", "", "700", 0),
        Probe("event:paid", '["order"]', "[5]", "700", 0),
        Probe("event:paid", "", "", "700", 1),
    ]


@pytest.mark.parametrize(
    "when, outcome",
    [(None, "completed"), ("event.order > 4", "completed"), ("event.order > 5", None),
     ("event.nothing > 5", "failed")],
)  # fmt: skip
def test_a_filter_decides(when: str | None, outcome: str | None) -> None:
    condition = None if when is None else dumps({"when": when}).decode()
    word = judge(Waiting(0, 7, "paid", condition), message({"order": 5}))
    assert (word and word.outcome) == outcome
    if word is not None:
        assert (word.job, word.step) == (7, "paid")
        result = loads(word.result)
        given = result["payload"] if outcome == "completed" else result["type"]
        assert given == ({"order": 5} if outcome == "completed" else "FilterFailed")


def test_topics_tell_definitions_apart() -> None:
    one = ChangeFilter("public", "payments", frozenset({"insert"}))
    other = ChangeFilter("public", "payments", frozenset({"insert"}), when="new.amount > 0")
    stored = ChangeFilter.from_json(one.to_json() | {"waits": True})
    assert stored.waits
    assert change_topic(one) == change_topic(stored) != change_topic(other)
    assert "waits" not in one.to_json()


def test_what_is_nested_deeper_than_can_be_written_fails_who_waits_for_it_and_nobody_else() -> None:
    deep = loads(b'{"order": 5, "tree": ' + b"[" * 500 + b"]" * 500 + b"}")
    word = judge(Waiting(0, 7, "paid", None), message(deep))
    assert word is not None
    assert (word.outcome, loads(word.result)["type"]) == ("failed", "EventUnreadable")
    assert matched_values('["order"]', deep) == "[5]"
    assert matched_values('["tree"]', deep) is None
