"""Streams recorded from real servers (golden/capture.py made them)."""

from pathlib import Path

import pytest

from cdc.relations import RelationCache
from cdc.transactions import Event, TransactionReader
from cdc.wire.frames import XLogData, parse_frame
from cdc.wire.messages import (
    UNCHANGED,
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Relation,
    Row,
    Truncate,
    Update,
)
from cdc.wire.pgoutput import decode

from .pgoutput_encoder import encode
from .type_cases import TYPE_CASES

RECORDINGS = sorted((Path(__file__).parent / "golden").glob("*.hex"))


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def payloads(request: pytest.FixtureRequest) -> list[bytes]:
    path: Path = request.param
    frames = [parse_frame(bytes.fromhex(line)) for line in path.read_text().splitlines()]
    return [frame.payload for frame in frames if isinstance(frame, XLogData)]


def read(payloads: list[bytes], routed_lsn: int = 0) -> tuple[list[Event], RelationCache]:
    reader = TransactionReader(routed_lsn)
    events = [event for payload in payloads if (event := reader.feed(payload)) is not None]
    return events, reader.relations


def test_there_are_recordings() -> None:
    assert [path.stem for path in RECORDINGS] == ["postgresql-15", "postgresql-18"]


def test_the_encoder_writes_what_the_server_writes(payloads: list[bytes]) -> None:
    assert [encode(decode(payload)) for payload in payloads] == payloads


def test_every_type_becomes_the_expected_json(payloads: list[bytes]) -> None:
    events, relations = read(payloads)
    shape, row = next(
        (shape, event.new)
        for event in events
        if isinstance(event, Insert)
        and (shape := relations.get(event.relation_oid)).name == "type_cases"
    )
    fragments = [
        str(fragment, "utf-8") for fragment in shape.fragments(row) if fragment is not UNCHANGED
    ]
    expected = [json for _, _, json in TYPE_CASES]
    for (name, text, _), fragment, json in zip(TYPE_CASES, fragments, expected, strict=True):
        assert fragment == json, (name, text)
    singly = [
        convert(v) for convert, v in zip(shape.converters, row, strict=True) if isinstance(v, bytes)
    ]
    assert [fragment.encode() for fragment in fragments] == singly


def changes(payloads: list[bytes]) -> list[tuple[str, str, Row | None, Row | None]]:
    events, relations = read(payloads)
    found: list[tuple[str, str, Row | None, Row | None]] = []
    for event in events:
        match event:
            case Insert(oid, new):
                found.append(("insert", relations.get(oid).name, None, new))
            case Update(oid, _, old, new):
                found.append(("update", relations.get(oid).name, old, new))
            case Delete(oid, _, old):
                found.append(("delete", relations.get(oid).name, old, None))
            case _:
                pass
    return found


def test_rows_and_their_old_selves(payloads: list[bytes]) -> None:
    assert changes(payloads)[:9] == [
        ("insert", "users", None, [b"1", b"a@example.com", b"x" * 3000, None]),
        ("insert", "users", None, [b"2", b"", b"", b"0"]),
        ("update", "users", None, [b"1", b"a@example.com", UNCHANGED, b"1"]),
        ("update", "users", [b"2", None, None, None], [b"3", b"", b"", b"0"]),
        ("delete", "users", [b"3", None, None, None], None),
        ("insert", "events", None, [b"1", b"one"]),
        ("update", "events", [b"1", b"one"], [b"1", None]),
        ("delete", "events", [b"1", None], None),
        ("insert", "other", None, [b"1"]),
    ]


def test_a_rolled_back_savepoint_is_not_in_the_stream(payloads: list[bytes]) -> None:
    others = [new for _, table, _, new in changes(payloads) if table == "other"]
    assert others == [[b"1"], [b"3"]]


def test_a_table_that_changed_is_described_again(payloads: list[bytes]) -> None:
    events, relations = read(payloads)
    users = [e for e in events if isinstance(e, Relation) and e.name == "users"]
    assert [len(relation.columns) for relation in users[:2]] == [4, 5]
    shape = relations.get(users[-1].oid)
    assert shape.column_names == ("id", "email", "note", "karma", "city")
    assert (shape.schema, shape.replica_identity, shape.key_indexes) == ("shop", "d", (0,))


def test_truncate_and_messages(payloads: list[bytes]) -> None:
    events, relations = read(payloads)
    (truncate,) = [event for event in events if isinstance(event, Truncate)]
    assert {relations.get(oid).name for oid in truncate.relation_oids} == {"users", "other"}
    assert truncate.cascade
    assert truncate.restart_identity
    messages = [event for event in events if isinstance(event, LogicalMessage)]
    assert [(m.transactional, m.prefix, m.content) for m in messages] == [
        (False, "alone", b"not transactional"),
        (True, "within", b"transactional"),
        (False, "end", b""),
    ]


def test_any_restart_continues_with_the_next_transaction(payloads: list[bytes]) -> None:
    events, _ = read(payloads)
    changes_of = [event for event in events if not isinstance(event, Relation)]
    for index, event in enumerate(changes_of):
        if isinstance(event, Commit):
            rest, _ = read(payloads, routed_lsn=event.end_lsn)
            assert [e for e in rest if not isinstance(e, Relation)] == changes_of[index + 1 :]
            assert all(e.final_lsn >= event.end_lsn for e in rest if isinstance(e, Begin))
