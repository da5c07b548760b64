"""A recording is read back as it was written, and replays as typed changes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.catalog import Shape
from cdc.recording import (
    Entry,
    Header,
    RecordedFrame,
    RecordingInvalid,
    read,
    write_frame,
    write_header,
    write_shape,
)
from cdc.replay import render, replay, summarise
from cdc.wire.messages import Type
from cdc.wire.wal2json import CatalogColumn, CatalogTable

GOLDEN = Path(__file__).with_name("golden")
HEADER = Header("conductor", "pgoutput", "p", "15.18", "7", 1, "shop", "UTF8", "2026-01-01")
COLUMN = CatalogColumn(
    "ü", 23, is_key=True, is_toastable=False, is_generated=True, is_not_null=True
)
TABLE = CatalogTable(500, "shop", "users", "d", (COLUMN,), "d", frozenset(("b", "a")))


def write(header: Header, *entries: Entry) -> list[str]:
    return [
        write_header(header),
        *(
            write_shape(e) if isinstance(e, Shape) else write_frame(e.at_us, e.frame)
            for e in entries
        ),
    ]


def replayed(lines: list[str]) -> list[dict[str, Any]]:
    header, entries = read(lines)
    return [json.loads(render(line)) for line in replay(header, entries)]


def golden() -> list[str]:
    frames = map(bytes.fromhex, (GOLDEN / "postgresql-15.hex").read_text().split())
    return write(HEADER, *(RecordedFrame(7, frame) for frame in frames))


@given(st.lists(st.builds(RecordedFrame, st.integers(0, 2**60), st.binary())))
def test_round_trip(frames: list[RecordedFrame]) -> None:
    shapes = [Shape(TABLE, (Type(1, "a", "b"),)), Shape(None, ())]
    header, entries = read(write(HEADER, *frames, *shapes))
    assert header == HEADER
    assert list(entries) == [*frames, *shapes]


def test_a_last_line_that_was_cut_off_is_left_out() -> None:
    lines = write(HEADER, RecordedFrame(1, b"k"), RecordedFrame(2, b"w"))
    _, entries = read([*lines[:-1], lines[-1][:-5]])
    assert list(entries) == [RecordedFrame(1, b"k")]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["not JSON\n"],
        ["[]\n"],
        ['{"format": "other"}\n'],
        [write_header(HEADER).replace('"version": 1', '"version": 2')],
        [write_header(HEADER), "{}\n"],
        [write_header(HEADER), '{"at_us": 1, "frame": "%"}\n'],
        [write_header(HEADER), '{"shape": {"table": {}, "types": []}}\n'],
    ],
)
def test_what_is_no_recording(lines: list[str]) -> None:
    with pytest.raises(RecordingInvalid):
        list(read(lines)[1])


def test_a_captured_stream_replays() -> None:
    events = replayed(golden())
    changes = [e for e in events if e["op"] in {"insert", "update", "delete", "truncate"}]
    assert [(e["op"], e["table"]) for e in changes[:4]] == [
        ("insert", "users"),
        ("insert", "users"),
        ("update", "users"),
        ("update", "users"),
    ]
    toast, key = changes[2], changes[3]
    assert (toast["unchanged"], toast["new"]["karma"]) == (["note"], 1)
    assert "note" not in toast["new"]
    assert (key["old"], key["new"]["id"]) == ({"id": 2}, 3)
    ops = {e["op"] for e in events}
    assert ops == {"begin", "commit", "relation", "message", *(e["op"] for e in changes)}
    assert sum(e["op"] == "begin" for e in events) == sum(e["op"] == "commit" for e in events)


def rows(lines: list[str]) -> list[dict[str, Any]]:
    kept = ("op", "table", "new", "old", "unchanged", "prefix", "content")
    return [
        {name: event[name] for name in kept if name in event}
        for event in replayed(lines)
        if event["op"] not in {"begin", "commit", "relation"}
    ]


def test_wal2json_replays_as_pgoutput_does() -> None:
    """Recordings of the same SQL; a column was added while it had not been read."""
    ours = (GOLDEN / "wal2json-15.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    theirs = rows(golden())
    for event in theirs:
        if event.get("table") == "type_cases":
            lost = ("NaN", "Infinity", "-Infinity")
            event["new"] = {k: None if v in lost else v for k, v in event["new"].items()}
    assert rows(ours) == theirs


def test_a_summary_is_one_line() -> None:
    header, entries = read(golden())
    lines = [summarise(line) for line in replay(header, entries)]
    assert all("\n" not in line for line in lines)
    assert any("insert shop.users" in line for line in lines)


def test_what_cannot_be_decoded_is_shown() -> None:
    lines = golden()
    spoilt = []
    for line in lines[1:]:
        entry = next(read([lines[0], line])[1])
        assert isinstance(entry, RecordedFrame)
        is_row = entry.frame[25:26] == b"I"
        frame = entry.frame[:-3] if is_row else entry.frame
        spoilt.append(RecordedFrame(1, frame))
    events = replayed(write(HEADER, *spoilt))
    assert not [e for e in events if e["op"] == "insert"]
    assert [e["raw"][:2] for e in events if e["op"] == "undecodable"]
    assert [e for e in events if e["op"] == "update"]
