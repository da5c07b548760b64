"""A transaction's changes in one job, and what becomes of those that are too many for one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cdc import groups
from cdc.groups import TransactionGroups
from cdc.relations import RelationCache
from cdc.routing import Routed, Router
from cdc.wire.messages import Delete, Insert
from conductor.contract import JobSpec, encode_head

from .test_routing import COMMIT_LSN, COMMIT_TIME_US, describe, payloads, subscribe


def head(subscription: int, version: str = "1") -> bytes:
    return encode_head(
        queue="q",
        task="t",
        app=None,
        version=version,
        trigger="change",
        rank=0,
        subscription=subscription,
    )


def spec(subscription: int, ordinal: int, size_bytes: int = 3) -> JobSpec:
    text = json.dumps(str(ordinal).zfill(size_bytes - 2)).encode()
    return JobSpec(head(subscription), b"position", ordinal, text)


def parts(specs: list[JobSpec]) -> list[tuple[int, int, int, bool, list[int]]]:
    """Subscription, ordinal, part, whether it is the last, and the ordinals of the changes."""
    found = []
    for made in specs:
        payload = json.loads(made.payload)
        assert payload["op"] == "transaction"
        subscription = int.from_bytes(made.head[-8:], "big")
        changes = [int(change) for change in payload["changes"]]
        found.append((subscription, made.ordinal, payload["part"], payload["last"], changes))
    return found


def grouped(*specs: JobSpec) -> list[JobSpec]:
    collected = TransactionGroups()
    made = [part for one in specs for part in collected.add(one)]
    made += collected.end()
    assert collected.size_bytes == 0
    return made


def test_each_subscription_has_its_group() -> None:
    made = grouped(spec(1, 10), spec(2, 10), spec(2, 20), spec(1, 30))
    assert parts(made) == [(1, 10, 0, True, [10, 30]), (2, 10, 0, True, [10, 20])]


def test_too_many_changes_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUP_CHANGES", 2)
    made = grouped(*(spec(1, ordinal) for ordinal in range(5)))
    assert parts(made) == [
        (1, 0, 0, False, [0, 1]),
        (1, 2, 1, False, [2, 3]),
        (1, 4, 2, True, [4]),
    ]


def test_too_large_changes_are_split_and_one_larger_stands_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "GROUP_BYTES", 100)
    made = grouped(spec(1, 0, 50), spec(1, 1, 50), spec(1, 2, 500), spec(1, 3, 50))
    assert [(part, last, changes) for _, _, part, last, changes in parts(made)] == [
        (0, False, [0, 1]),
        (1, False, [2]),
        (2, True, [3]),
    ]


def test_all_groups_together_are_bounded_by_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "ALL_GROUPS_BYTES", 100)
    made = grouped(spec(1, 0, 60), spec(2, 1, 30), spec(2, 2, 30), spec(2, 3, 30), spec(1, 4, 5))
    assert parts(made) == [
        (2, 1, 0, False, [1]),
        (2, 2, 1, False, [2]),
        (1, 0, 0, True, [0, 4]),
        (2, 3, 2, True, [3]),
    ]


def test_a_new_version_in_the_middle_does_not_part_a_group() -> None:
    newer = JobSpec(head(1, "2"), b"position", 20, b"20")
    assert parts(grouped(spec(1, 10), newer)) == [(1, 10, 0, True, [10, 20])]


def test_the_router_makes_one_job_of_a_transaction() -> None:
    shape = describe(RelationCache())
    plain, group = subscribe(1), subscribe(2, group="transaction", operations=["insert"])
    router, out = Router(7, [plain, group]), Routed()
    assert router.wants(shape)
    for transaction in range(2):
        router.begin(COMMIT_LSN + transaction, COMMIT_TIME_US)
        for number in range(2):
            row: list[Any] = [str(number).encode(), b"e", None]
            router.route(shape, Insert(shape.oid, row), number, b"raw", out)
        router.route(shape, Delete(shape.oid, "K", [b"0", None, None]), 2, b"raw", out)
        router.end(out)
    router.begin(COMMIT_LSN + 9, COMMIT_TIME_US)
    router.end(out)
    of_group = [p for p in payloads(out) if p["op"] == "transaction"]
    of_plain = [p for p in payloads(out) if p["op"] == "insert"]
    assert [change for payload in of_group for change in payload["changes"]] == of_plain
    assert len(of_group) == 2
    assert out.unmatched == 0


def test_a_change_that_cannot_be_read_is_a_dead_letter_and_the_others_a_group() -> None:
    shape = describe(RelationCache())
    router, out = Router(7, [subscribe(2, group="transaction")]), Routed()
    router.begin(COMMIT_LSN, COMMIT_TIME_US)
    for number, text in enumerate((b"\xff", b"good", b"\xfe")):
        router.route(shape, Insert(shape.oid, [b"1", text, None]), number, b"raw", out)
    router.end(out)
    assert [letter.ordinal for letter in out.dead_letters] == [0, 2]
    (payload,) = payloads(out)
    assert [change["new"]["email"] for change in payload["changes"]] == ["good"]
