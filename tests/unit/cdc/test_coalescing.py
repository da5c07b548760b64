"""Coalescing: two changes of a row as one, with the text of every value."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.coalescing import fold, members, merge
from conductor.contract import JobSpec, encode_head, encode_position

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
COLUMNS = ("id", "state", 'odd "name"', "note")
VALUES = (
    "1",
    "1.10",
    '"x"',
    '"a, }\\""',
    "null",
    '{"b": [1, "]"]}',
    "123456789012345678901234567890",
)


def text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf8", "surrogatepass")


@given(st.dictionaries(st.text(), JSON))
def test_an_object_is_split_into_the_texts_of_its_members(value: dict[str, Any]) -> None:
    found = members(text(value))
    assert found == {text(name): text(member) for name, member in value.items()}


def change(op: str, **parts: str) -> bytes:
    given = {"op": f'"{op}"', "table": '"t"', **parts}
    return b"{" + b",".join(b'"%b":%b' % (n.encode(), v.encode()) for n, v in given.items()) + b"}"


def row(values: dict[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in values.items()) + "}"


@st.composite
def updates(draw: st.DrawFn) -> list[dict[str, str]]:
    """Rows of successive updates; a column that is missing was not touched."""
    count = draw(st.integers(1, 5))
    value = st.sampled_from(VALUES)
    rows = [{name: draw(value) for name in COLUMNS}]
    for _ in range(count):
        touched = draw(st.sets(st.sampled_from(COLUMNS)))
        rows.append({name: draw(value) for name in COLUMNS if name in touched or name == "id"})
    return rows


@given(updates(), st.sampled_from(["insert", "update"]))
def test_a_chain_of_updates_is_the_last_row_and_loses_nothing(
    rows: list[dict[str, str]], first: str
) -> None:
    expected: dict[str, str] = {}
    payload = b""
    for number, values in enumerate(rows):
        expected |= values
        unchanged = json.dumps([name for name in COLUMNS if name not in values])
        parts = {"new": row(values), "commit_lsn": f'"0/{number}"'}
        latest = change("update" if number else first, **parts, unchanged=unchanged)
        payload = merge(payload, latest) if number else latest
    found = members(payload)
    assert found[b'"op"'] == f'"{first}"'.encode()
    assert found[b'"commit_lsn"'] == f'"0/{len(rows) - 1}"'.encode()
    assert {orjson.loads(k): v.decode() for k, v in members(found[b'"new"']).items()} == expected
    assert b'"unchanged"' not in found or len(rows) == 1


def test_what_no_change_had_stays_unknown() -> None:
    first = change("update", new='{"a":1}', unchanged='["note","big"]')
    second = change("update", new='{"note":"x"}', unchanged='["a","big"]')
    merged = json.loads(merge(first, second))
    assert (merged["new"], merged["unchanged"]) == ({"note": "x", "a": 1}, ["big"])


def test_what_may_have_changed_in_between_is_not_filled_in() -> None:
    first = change("insert", new='{"big":"old","a":1}')
    second = change("update", new='{"a":2}', unchanged='["big"]')
    merged = json.loads(merge(first, second, fills=False))
    assert (merged["op"], merged["new"], merged["unchanged"]) == ("insert", {"a": 2}, ["big"])


def test_two_updates_are_one_from_the_first_old_row_to_the_last() -> None:
    first = change("update", new='{"a":2,"b":1}', old='{"a":1,"b":1}', changed='["a"]')
    second = change("update", new='{"a":2,"b":3}', old='{"a":2,"b":1}', changed='["b"]')
    merged = json.loads(merge(first, second))
    assert (merged["old"], merged["new"]) == ({"a": 1, "b": 1}, {"a": 2, "b": 3})
    assert merged["changed"] == ["a", "b"]


@pytest.mark.parametrize("first, second, expected", [
    ("insert", "update", "insert"),
    ("insert", "delete", "delete"),
    ("update", "delete", "delete"),
    ("delete", "insert", "insert"),
    ("insert", "insert", "insert"),
    ("update", "insert", "insert"),
])  # fmt: skip
def test_what_becomes_of_two_changes(first: str, second: str, expected: str) -> None:
    def made(op: str, value: int) -> bytes:
        parts = {"old": f'{{"a":{value}}}'} if op != "insert" else {}
        parts |= {"new": f'{{"a":{value}}}'} if op != "delete" else {}
        return change(op, **parts)

    merged = json.loads(merge(made(first, 1), made(second, 2)))
    assert merged["op"] == expected
    assert merged["old" if expected == "delete" else "new"] == {"a": 2}
    assert ("old" in merged) == (expected == "delete")
    assert "changed" not in merged


HEADS = [
    encode_head(
        queue="q", task="t", app="a", version=None, trigger="change", rank=0, subscription=number
    )
    for number in (1, 2)
]


def test_changes_are_folded_by_subscription_and_key() -> None:
    def spec(head: bytes, ordinal: int, key: str) -> JobSpec:
        payload = change("update", new=f'{{"a":{ordinal}}}')
        position = encode_position(1, 0x100)
        return JobSpec(head, position, ordinal, payload, key, coalesce_us=1)

    one, other = HEADS
    given = [(one, "a"), (one, "b"), (other, "a"), (one, "a"), (other, "a"), (one, "a")]
    folded = fold([spec(head, ordinal, key) for ordinal, (head, key) in enumerate(given)])
    assert [(s.head, s.key, s.ordinal) for s in folded] == [
        (one, "a", 5),
        (one, "b", 1),
        (other, "a", 4),
    ]
    assert [json.loads(s.payload)["new"]["a"] for s in folded] == [5, 1, 4]


@pytest.mark.parametrize("gap", [1, 2])
def test_a_folded_change_fills_only_if_all_of_it_does(gap: int) -> None:
    def spec(number: int) -> JobSpec:
        payload = change("update", new=f'{{"a":{number}}}', unchanged='["big"]')
        position = encode_position(1, 0x100)
        return JobSpec(HEADS[0], position, number, payload, "a", fills=number != gap)

    assert [s.fills for s in fold([spec(1), spec(2)])] == [False]
    assert [s.fills for s in fold([spec(3), spec(4)])] == [True]
