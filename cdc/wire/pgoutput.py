"""Decode pgoutput, protocol version 1: one payload in, one message out, no state.

Layouts: PostgreSQL documentation, "Logical Replication Message Formats". Numbers are big-endian,
strings end with a zero byte, values are text (binary format is never asked for).

Anything but a whole, well-formed message raises `ProtocolError`. A message that stops short
is noticed by the read that runs off its end (`struct.error`, `IndexError`), so the common case
pays for no checks; every decoder then compares where it stopped with the payload's length.
"""

import struct
from collections.abc import Callable
from functools import cache
from typing import Any, cast

from cdc.errors import ProtocolError
from cdc.wire.frames import POSTGRES_EPOCH_US
from cdc.wire.messages import (
    UNCHANGED,
    Begin,
    Column,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    OldKind,
    Origin,
    Relation,
    Row,
    Truncate,
    Type,
    Update,
)

_NULL, _UNCHANGED, _TEXT = b"nut"
_KEY, _OLD, _NEW = b"KON"

_U16 = struct.Struct(">H").unpack_from
_U32 = struct.Struct(">I").unpack_from
_U64 = struct.Struct(">Q").unpack_from
_BEGIN = struct.Struct(">QqI")
_COMMIT = struct.Struct(">BQQq")
_ROW_HEADER = struct.Struct(">IB").unpack_from  # relation, then K, O or N
_COLUMN = struct.Struct(">Ii")  # type OID, type modifier
_TRUNCATE = struct.Struct(">IB").unpack_from
_MESSAGE = struct.Struct(">BQ").unpack_from
_VALUE = struct.Struct(">BI").unpack_from  # kind, length of a text

_UNROLLED_COLUMNS = 64

_TRUNCATE_CASCADE = 1
_TRUNCATE_RESTART_IDENTITY = 2
_COLUMN_IS_KEY = 1
_MESSAGE_TRANSACTIONAL = 1


def decode(payload: bytes) -> Message:
    """Decode the payload of one XLogData; raise `ProtocolError` when it is not one message.

    >>> decode(b"Y" + bytes([0, 0, 64, 1]) + b"shop" + bytes(1) + b"mood" + bytes(1))
    Type(oid=16385, schema='shop', name='mood')
    """
    decoder = _DECODERS.get(payload[:1])
    if decoder is None:
        raise _error(payload, 0, "a message of pgoutput version 1", repr(payload[:1]))
    try:
        return decoder(payload)
    except (struct.error, IndexError):
        raise _error(payload, len(payload), "more bytes", "the end") from None


def _begin(payload: bytes) -> Begin:
    final_lsn, commit_time, xid = _BEGIN.unpack_from(payload, 1)
    _check_end(payload, 1 + _BEGIN.size)
    return Begin(final_lsn, commit_time + POSTGRES_EPOCH_US, xid)


def _commit(payload: bytes) -> Commit:
    flags, commit_lsn, end_lsn, commit_time = _COMMIT.unpack_from(payload, 1)
    _check_end(payload, 1 + _COMMIT.size)
    return Commit(flags, commit_lsn, end_lsn, commit_time + POSTGRES_EPOCH_US)


def _origin(payload: bytes) -> Origin:
    (lsn,) = _U64(payload, 1)
    name, position = _string(payload, 9)
    _check_end(payload, position)
    return Origin(lsn, name)


def _relation(payload: bytes) -> Relation:
    (oid,) = _U32(payload, 1)
    schema, position = _string(payload, 5)
    name, position = _string(payload, position)
    replica_identity = chr(payload[position])
    if replica_identity not in "dnfi":
        raise _error(payload, position, "d, n, f or i", repr(replica_identity))
    (count,) = _U16(payload, position + 1)
    position += 3
    columns: list[Column] = []
    for _ in range(count):
        is_key = bool(payload[position] & _COLUMN_IS_KEY)
        column, position = _string(payload, position + 1)
        type_oid, type_modifier = _COLUMN.unpack_from(payload, position)
        columns.append(Column(column, type_oid, type_modifier, is_key))
        position += _COLUMN.size
    _check_end(payload, position)
    return Relation(oid, schema, name, replica_identity, tuple(columns))


def _type(payload: bytes) -> Type:
    (oid,) = _U32(payload, 1)
    schema, position = _string(payload, 5)
    name, position = _string(payload, position)
    _check_end(payload, position)
    return Type(oid, schema, name)


def _insert(payload: bytes) -> Insert:
    relation_oid, kind = _ROW_HEADER(payload, 1)
    if kind != _NEW:
        raise _error(payload, 5, "N", repr(chr(kind)))
    new, position = _row(payload, 6)
    if position != len(payload):
        _check_end(payload, position)
    return Insert(relation_oid, new)


def _update(payload: bytes) -> Update:
    relation_oid, kind = _ROW_HEADER(payload, 1)
    old_kind: OldKind | None = None
    old: Row | None = None
    position = 6
    if kind != _NEW:
        old_kind = _old_kind(payload, kind)
        old, position = _row(payload, 6)
        if payload[position] != _NEW:
            raise _error(payload, position, "N", repr(chr(payload[position])))
        position += 1
    new, position = _row(payload, position)
    if position != len(payload):
        _check_end(payload, position)
    return Update(relation_oid, old_kind, old, new)


def _delete(payload: bytes) -> Delete:
    relation_oid, kind = _ROW_HEADER(payload, 1)
    old_kind = _old_kind(payload, kind)
    old, position = _row(payload, 6)
    _check_end(payload, position)
    return Delete(relation_oid, old_kind, old)


def _truncate(payload: bytes) -> Truncate:
    count, options = _TRUNCATE(payload, 1)
    _check_end(payload, 6 + 4 * count)
    return Truncate(
        struct.unpack_from(f">{count}I", payload, 6),
        cascade=bool(options & _TRUNCATE_CASCADE),
        restart_identity=bool(options & _TRUNCATE_RESTART_IDENTITY),
    )


def _message(payload: bytes) -> LogicalMessage:
    flags, lsn = _MESSAGE(payload, 1)
    prefix, position = _string(payload, 10)
    (length,) = _U32(payload, position)
    position += 4
    _check_end(payload, position + length)
    return LogicalMessage(bool(flags & _MESSAGE_TRANSACTIONAL), lsn, prefix, payload[position:])


_DECODERS: dict[bytes, Callable[[bytes], Message]] = {
    b"B": _begin,
    b"C": _commit,
    b"O": _origin,
    b"R": _relation,
    b"Y": _type,
    b"I": _insert,
    b"U": _update,
    b"D": _delete,
    b"T": _truncate,
    b"M": _message,
}


def _row(payload: bytes, position: int) -> tuple[Row, int]:
    """Read a row; return it and where it ends, which may be past a payload that was cut."""
    (count,) = _U16(payload, position)
    position += 2
    try:
        return _row_of_texts(count)(payload, position) or _row_of_any(payload, position, count)
    except struct.error:  # it read ahead behind a last value that is no text
        return _row_of_any(payload, position, count)


def _row_of_any(payload: bytes, position: int, count: int) -> tuple[Row, int]:
    row: Row = []
    for _ in range(count):
        kind = payload[position]
        if kind == _TEXT:
            start = position + 5
            position = start + _U32(payload, position + 1)[0]
            row.append(payload[start:position])
        elif kind == _NULL:
            position += 1
            row.append(None)
        elif kind == _UNCHANGED:
            position += 1
            row.append(UNCHANGED)
        else:
            raise _error(payload, position, "a value as text (t, n or u)", repr(chr(kind)))
    return row, position


@cache
def _row_of_texts(count: int) -> Callable[[bytes, int], tuple[Row, int] | None]:
    """Return a reader of rows of so many values, all of them text; it returns None for others.

    Most rows are, and this is the hottest loop of the router: unrolled it takes 60 % of the time.
    The source is made of column numbers alone.
    """
    if not 0 < count <= _UNROLLED_COLUMNS:
        return lambda _payload, _position: None
    lines, end = ["def read(payload, position):"], "position"
    for i in range(count):
        lines.append(f"    k{i}, n = value_at(payload, {end}); s{i} = {end} + 5; e{i} = s{i} + n")
        end = f"e{i}"
    kinds = " == ".join(f"k{i}" for i in range(count))
    values = ", ".join(f"payload[s{i}:e{i}]" for i in range(count))
    lines.append(f"    if {kinds} == {_TEXT}: return [{values}], {end}")
    namespace: dict[str, Any] = {"value_at": _VALUE}
    exec("\n".join(lines), namespace)  # noqa: S102 — see above
    return cast("Callable[[bytes, int], tuple[Row, int] | None]", namespace["read"])


def _old_kind(payload: bytes, kind: int) -> OldKind:
    if kind == _KEY:
        return "K"
    if kind == _OLD:
        return "O"
    raise _error(payload, 5, "K, O or N", repr(chr(kind)))


def _string(payload: bytes, start: int) -> tuple[str, int]:
    end = payload.find(0, start)
    if end < 0:
        raise _error(payload, len(payload), "a zero byte", "the end")
    try:
        return payload[start:end].decode(), end + 1
    except UnicodeDecodeError as error:
        raise _error(payload, start + error.start, "UTF-8", error.reason) from None


def _check_end(payload: bytes, end: int) -> None:
    size = len(payload)
    if end != size:
        raise _error(payload, min(end, size), f"a message of {end} bytes", f"{size} bytes")


def _error(payload: bytes, offset: int, expected: str, actual: str) -> ProtocolError:
    return ProtocolError(payload[:1].decode("latin-1"), offset, expected, actual)
