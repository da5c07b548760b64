"""wal2json frames become what pgoutput would have sent."""

import json
from typing import Any

import pytest

from cdc.errors import ProtocolError
from cdc.wire.messages import (
    UNCHANGED,
    Begin,
    Column,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Relation,
    Row,
    Truncate,
    Type,
    Update,
)
from cdc.wire.wal2json import (
    CatalogColumn,
    CatalogRequest,
    CatalogTable,
    Decoded,
    Decoder,
    EmptyTransaction,
    Undecodable,
)

INT4, INT8, TEXT, BYTEA, BOOL, NUMERIC, FLOAT8 = 23, 20, 25, 17, 16, 1700, 701
AT = {"xid": 7, "timestamp": "2026-01-02 03:04:05.67+00"}
AT_US = 1_767_323_045_670_000
BEGIN = {"action": "B", **AT, "lsn": "0/10", "nextlsn": "0/20"}
COMMIT = BEGIN | {"action": "C"}


def column(name: str, oid: int, **facts: bool) -> CatalogColumn:
    defaults = {"is_key": False, "is_toastable": oid in {TEXT, BYTEA, NUMERIC}}
    defaults |= {"is_generated": False, "is_not_null": False}
    return CatalogColumn(name, oid, **{**defaults, **facts})


def table(*columns: CatalogColumn, identity: str = "d", **changes: Any) -> CatalogTable:
    facts: dict[str, Any] = {
        "oid": 500,
        "schema": "shop",
        "name": "users",
        "replica_identity": identity,
        "columns": columns,
        "own_identity": identity,
        "own_generated": frozenset(c.name for c in columns if c.is_generated),
    }
    return CatalogTable(**{**facts, **changes})


USERS = table(column("id", INT8, is_key=True), column("note", TEXT), column("karma", INT4))


def raw(frame: dict[str, Any]) -> bytes:
    return json.dumps(frame, separators=(",", ":"), ensure_ascii=False).encode()


def values(**columns: tuple[int, Any]) -> list[dict[str, Any]]:
    return [{"name": n, "typeoid": oid, "value": v} for n, (oid, v) in columns.items()]


def change(action: str, name: str = "users", **parts: Any) -> dict[str, Any]:
    return {"action": action, **AT, "lsn": "0/8", "schema": "shop", "table": name, **parts}


class Session:
    """A decoder and the catalog that answers it."""

    def __init__(self, *tables: CatalogTable, types: tuple[Type, ...] = ()) -> None:
        self.decoder = Decoder("mark")
        self.tables = {(t.schema, t.name): t for t in tables}
        self.types = types
        self.requests: list[CatalogRequest] = []

    def feed(self, *payloads: bytes | dict[str, Any]) -> list[Decoded]:
        decoded: list[Decoded] = []
        for payload in payloads:
            frame = raw(payload) if isinstance(payload, dict) else payload
            answer = self.decoder.decode(frame)
            if isinstance(answer, CatalogRequest):
                self.requests.append(answer)
                self.decoder.describe(answer, self.tables.get(answer.table), self.types)
                answer = self.decoder.decode(frame)
            assert not isinstance(answer, CatalogRequest)
            decoded += answer
        return decoded

    def row(self, frame: dict[str, Any]) -> Any:
        """Feed a change in a transaction; return what it became."""
        return self.feed(BEGIN, frame, COMMIT)[-2]


def insert(**columns: tuple[int, Any]) -> dict[str, Any]:
    return change("I", columns=values(**columns))


def test_a_transaction_with_an_insert() -> None:
    frame = insert(id=(INT8, 1), note=(TEXT, "hé"), karma=(INT4, None))
    relation = Relation(
        500,
        "shop",
        "users",
        "d",
        (
            Column("id", INT8, -1, is_key=True),
            Column("note", TEXT, -1, is_key=False),
            Column("karma", INT4, -1, is_key=False),
        ),
    )
    row = Insert(500, [b"1", "hé".encode(), None])
    session = Session(USERS)
    assert session.feed(BEGIN, frame, frame, COMMIT) == [
        Begin(0x10, AT_US, 7),
        relation,
        row,
        row,
        Commit(0, 0x10, 0x20, AT_US),
    ]
    assert session.requests == [CatalogRequest(("shop", "users"), frozenset((INT8, TEXT, INT4)))]
    assert session.feed(BEGIN, frame, COMMIT)[1] == row  # a relation is described once


def test_an_empty_transaction_is_only_a_position() -> None:
    assert Session().feed(BEGIN, COMMIT) == [EmptyTransaction(0x20)]


def test_numbers_stay_the_text_they_were() -> None:
    payload = raw(insert(a=(NUMERIC, 0), b=(FLOAT8, 0), c=(INT8, 0)))
    texts = (b"1.10", b"-0", b"123456789012345678901234567890")
    for text in texts:
        payload = payload.replace(b'"value":0', b'"value":' + text, 1)
    session = Session(table(column("a", NUMERIC), column("b", FLOAT8), column("c", INT8)))
    assert session.feed(BEGIN, payload)[-1] == Insert(500, list(texts))


def test_numbers_as_strings_are_the_same() -> None:
    session = Session(table(column("a", FLOAT8)))
    assert session.row(insert(a=(FLOAT8, "NaN"))) == Insert(500, [b"NaN"])


def test_booleans_and_bytes() -> None:
    session = Session(table(column("a", BOOL), column("b", BOOL), column("c", BYTEA)))
    frame = insert(a=(BOOL, True), b=(BOOL, False), c=(BYTEA, "00ff"))
    assert session.row(frame) == Insert(500, [b"t", b"f", b"\\x00ff"])


def test_bytes_that_are_not_utf8_stay_what_they_are() -> None:
    session = Session(table(column("a", TEXT)))
    payload = raw(insert(a=(TEXT, "?"))).replace(b"?", b"\xff\xe9")
    assert session.feed(BEGIN, payload)[-1] == Insert(500, [b"\xff\xe9"])


def test_an_oid_of_the_upper_half_is_printed_negative() -> None:
    session = Session(table(column("a", 0xFFFF_0000)))
    assert session.row(insert(a=(-65536, "x"))) == Insert(500, [b"x"])
    assert session.requests[0].type_oids == {0xFFFF_0000}
    assert session.decoder.divergences["shape_guessed"] == 0


def test_the_types_of_a_relation_come_before_it() -> None:
    cents = Type(16400, "pg_catalog", "int8")
    session = Session(table(column("a", 16400)), types=(cents,))
    decoded = session.feed(BEGIN, insert(a=(16400, "7")))
    assert decoded[1] == cents
    assert isinstance(decoded[2], Relation)


def test_an_unchanged_key_means_no_old_row() -> None:
    frame = change(
        "U",
        columns=values(id=(INT8, 1), note=(TEXT, "b"), karma=(INT4, 2)),
        identity=values(id=(INT8, 1)),
    )
    assert Session(USERS).row(frame) == Update(500, None, None, [b"1", b"b", b"2"])


def test_a_changed_key_is_an_old_row_of_the_key() -> None:
    frame = change(
        "U",
        columns=values(id=(INT8, 2), note=(TEXT, "b"), karma=(INT4, 2)),
        identity=values(id=(INT8, 1)),
    )
    old: Row = [b"1", None, None]
    assert Session(USERS).row(frame) == Update(500, "K", old, [b"2", b"b", b"2"])


def test_absent_columns_are_unchanged() -> None:
    frame = change(
        "U", columns=values(id=(INT8, 1), karma=(INT4, 2)), identity=values(id=(INT8, 1))
    )
    session = Session(USERS)
    assert session.row(frame) == Update(500, None, None, [b"1", UNCHANGED, b"2"])
    assert session.decoder.has_assumed_unchanged
    assert session.decoder.divergences["shape_guessed"] == 0


def test_full_identity_always_has_the_old_row() -> None:
    full = table(column("id", INT8), column("note", TEXT), identity="f")
    row = values(id=(INT8, 1), note=(TEXT, None))
    session = Session(full)
    update = session.row(change("U", columns=row, identity=row))
    assert update == Update(500, "O", [b"1", None], [b"1", None])
    assert session.row(change("D", identity=row)) == Delete(500, "O", [b"1", None])
    assert session.decoder.divergences["shape_guessed"] == 0


def test_a_delete_has_the_key() -> None:
    frame = change("D", identity=values(id=(INT8, 3)))
    assert Session(USERS).row(frame) == Delete(500, "K", [b"3", None, None])


def test_generated_columns_are_left_out() -> None:
    users = table(column("id", INT8, is_key=True), column("g", INT4, is_generated=True))
    session = Session(users)
    assert session.row(insert(id=(INT8, 1), g=(INT4, 2))) == Insert(500, [b"1"])
    assert session.decoder.divergences["shape_guessed"] == 0


def test_a_partition_appears_as_what_is_published() -> None:
    root = table(column("id", INT8, is_key=True), column("a", TEXT, is_not_null=True), name="users")
    session = Session()
    session.tables["shop", "users_2026"] = root
    session.tables["shop", "users"] = root
    frame = change("I", "users_2026", columns=values(a=(TEXT, "x"), id=(INT8, 1)))
    assert session.row(frame) == Insert(500, [b"1", b"x"])  # in the order of the root
    truncated = session.feed(BEGIN, change("T"), change("T", "users_2026"), COMMIT)
    assert [t for t in truncated if isinstance(t, Truncate)] == [
        Truncate((500,), cascade=False, restart_identity=False)
    ]
    assert session.decoder.divergences == {"truncate_options": 1}


def test_a_new_set_of_columns_is_looked_up() -> None:
    session = Session(USERS)
    session.row(insert(id=(INT8, 1), note=(TEXT, "a"), karma=(INT4, 0)))
    session.tables["shop", "users"] = table(*USERS.columns, column("city", TEXT))
    frame = insert(id=(INT8, 1), note=(TEXT, "a"), karma=(INT4, 0), city=(TEXT, "Rome"))
    decoded = session.feed(BEGIN, frame)
    assert [type(d) for d in decoded] == [Begin, Relation, Insert]
    assert session.decoder.divergences["shape_guessed"] == 0


def test_a_table_that_is_gone_is_still_captured() -> None:
    session = Session()
    assert session.row(insert(id=(INT8, 1))) == Insert(0xFFFF_FFFF, [b"1"])
    other = change("I", "other", columns=values(id=(INT8, 1)))
    assert session.row(other) == Insert(0xFFFF_FFFE, [b"1"])
    assert session.decoder.divergences["shape_guessed"] == 2


def test_a_row_older_than_the_catalog() -> None:
    session = Session(table(column("id", INT8, is_key=True), column("renamed", TEXT)))
    frame = insert(id=(INT8, 1), note=(TEXT, "a"))
    relation, row = session.feed(BEGIN, frame)[1:]
    assert isinstance(relation, Relation)
    assert [c.name for c in relation.columns] == ["id", "note"]
    assert row == Insert(500, [b"1", b"a"])
    assert session.decoder.divergences["shape_guessed"] == 1


def test_a_column_that_was_added_later_is_not_unchanged() -> None:
    """The catalog has it by now; what the stream said last has it not."""
    session = Session(table(*USERS.columns, column("city", TEXT)))
    session.row(insert(id=(INT8, 1), note=(TEXT, "a"), karma=(INT4, 0)))
    update = change(
        "U", columns=values(id=(INT8, 1), karma=(INT4, 2)), identity=values(id=(INT8, 1))
    )
    delete = change("D", identity=values(id=(INT8, 1)))
    for _ in range(2):
        assert session.row(update) == Update(500, None, None, [b"1", UNCHANGED, b"2"])
        assert session.row(delete) == Delete(500, "K", [b"1", None, None])
    session.row(insert(id=(INT8, 1), note=(TEXT, "a"), karma=(INT4, 0), city=(TEXT, "Rome")))
    assert session.row(update) == Update(500, None, None, [b"1", UNCHANGED, b"2", UNCHANGED])
    assert len(session.requests) == 4  # one for each set of columns


def test_an_old_row_tells_all_columns_of_its_time() -> None:
    session = Session(table(column("id", INT8), column("note", TEXT), column("city", TEXT)))
    frame = change(
        "U", columns=values(id=(INT8, 2)), identity=values(id=(INT8, 1), note=(TEXT, "a"))
    )
    assert session.row(frame) == Update(500, "O", [b"1", b"a"], [b"2", UNCHANGED])


def test_a_row_older_than_its_replica_identity() -> None:
    session = Session(table(*USERS.columns, identity="f"))
    frame = change("D", identity=values(id=(INT8, 3)))
    assert session.row(frame) == Delete(500, "K", [b"3"])
    assert session.decoder.divergences["shape_guessed"] == 1


def test_a_number_that_was_lost_is_counted() -> None:
    session = Session(table(column("a", FLOAT8, is_not_null=True), column("b", FLOAT8)))
    session.row(insert(a=(FLOAT8, None), b=(FLOAT8, None)))
    session.row(insert(a=(FLOAT8, 1), b=(FLOAT8, None)))
    assert session.decoder.divergences["number_lost"] == 1


def test_messages() -> None:
    message = {"action": "M", **AT, "lsn": "0/30", "prefix": "p", "content": "a\x01"}
    alone = message | {"xid": None, "timestamp": None, "transactional": False}
    assert Session().feed(alone) == [LogicalMessage(False, 0x30, "p", b"a\x01")]
    decoded = Session().feed(BEGIN, message | {"transactional": True}, COMMIT)
    assert [type(d) for d in decoded] == [Begin, LogicalMessage, Commit]


def test_a_mark_makes_the_catalog_be_read_again() -> None:
    session = Session(USERS)
    frame = insert(id=(INT8, 1), note=(TEXT, "a"), karma=(INT4, 0))
    mark = {
        "action": "M",
        **AT,
        "lsn": "0/30",
        "prefix": "mark",
        "content": "",
        "transactional": True,
    }
    session.feed(BEGIN, frame, COMMIT)
    session.feed(BEGIN, mark | {"prefix": "other"}, frame, COMMIT)
    assert len(session.requests) == 1
    session.feed(BEGIN, mark, frame, COMMIT)
    assert len(session.requests) == 2


@pytest.mark.parametrize(
    "broken",
    [
        b'{"action":"I","xid":7',
        raw(change("I", columns=[{"name": "id"}])),
        raw(change("U", columns=7)),
        raw({"action": "T"}),
        raw({"action": "M", "lsn": "x", "transactional": True}),
        raw(change("I", "?", columns=[])).replace(b"?", b"\xff"),
    ],
)
def test_a_broken_change_is_set_aside(broken: bytes) -> None:
    session = Session(USERS)
    decoded = session.feed(BEGIN, broken, COMMIT)
    assert [type(d) for d in decoded] == [Begin, Undecodable, Commit]


@pytest.mark.parametrize("broken", [b"", b"{}", b"C\0", b'{"action":"B"', raw({"action": "C"})])
def test_a_broken_stream_stops(broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder("mark").decode(broken)
