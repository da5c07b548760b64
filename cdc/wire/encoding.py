"""Messages to bytes, as pgoutput version 1 writes them: the inverse of `pgoutput.decode`.

For streams of other plugins, which join the router's only path in this form (`translation`).
Layouts: PostgreSQL documentation, "Logical Replication Message Formats".
"""

import struct
from collections.abc import Callable
from typing import Any, Final

from cdc.wire.frames import POSTGRES_EPOCH_US
from cdc.wire.messages import (
    UNCHANGED,
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Relation,
    Row,
    Truncate,
    Type,
    Update,
)

_BEGIN = struct.Struct(">cQqI").pack
_COMMIT = struct.Struct(">cBQQq").pack
_TAG_OID = struct.Struct(">cI").pack
_LENGTH = struct.Struct(">cI").pack
_U16 = struct.Struct(">H").pack
_U32 = struct.Struct(">I").pack
_COLUMN = struct.Struct(">Ii").pack


def encode(message: Message) -> bytes:
    r"""Return the payload that decodes to this message.

    >>> encode(Type(16385, "shop", "mood"))
    b'Y\x00\x00@\x01shop\x00mood\x00'
    """
    return _ENCODERS[type(message)](message)


def _begin(message: Begin) -> bytes:
    time = message.commit_time_us - POSTGRES_EPOCH_US
    return _BEGIN(b"B", message.final_lsn, time, message.xid)


def _commit(message: Commit) -> bytes:
    time = message.commit_time_us - POSTGRES_EPOCH_US
    return _COMMIT(b"C", message.flags, message.commit_lsn, message.end_lsn, time)


def _origin(message: Origin) -> bytes:
    return struct.pack(">cQ", b"O", message.lsn) + _string(message.name)


def _relation(message: Relation) -> bytes:
    parts = [_TAG_OID(b"R", message.oid), _string(message.schema), _string(message.name)]
    parts += [message.replica_identity.encode(), _U16(len(message.columns))]
    for column in message.columns:
        parts += [b"\1" if column.is_key else b"\0", _string(column.name)]
        parts.append(_COLUMN(column.type_oid, column.type_modifier))
    return b"".join(parts)


def _type(message: Type) -> bytes:
    return _TAG_OID(b"Y", message.oid) + _string(message.schema) + _string(message.name)


def _insert(message: Insert) -> bytes:
    return _TAG_OID(b"I", message.relation_oid) + b"N" + _row(message.new)


def _update(message: Update) -> bytes:
    head = _TAG_OID(b"U", message.relation_oid)
    if message.old_kind is not None and message.old is not None:
        head += message.old_kind.encode() + _row(message.old)
    return head + b"N" + _row(message.new)


def _delete(message: Delete) -> bytes:
    head = _TAG_OID(b"D", message.relation_oid)
    return head + message.old_kind.encode() + _row(message.old)


def _truncate(message: Truncate) -> bytes:
    options = message.cascade | message.restart_identity << 1
    count = len(message.relation_oids)
    return struct.pack(f">cIB{count}I", b"T", count, options, *message.relation_oids)


def _message(message: LogicalMessage) -> bytes:
    head = struct.pack(">cBQ", b"M", message.transactional, message.lsn) + _string(message.prefix)
    return head + _U32(len(message.content)) + message.content


def _row(values: Row) -> bytes:
    parts = [_U16(len(values))]
    for value in values:
        if value is None:
            parts.append(b"n")
        elif value is UNCHANGED:
            parts.append(b"u")
        else:
            parts.append(_LENGTH(b"t", len(value)) + value)
    return b"".join(parts)


def _string(text: str) -> bytes:
    return text.encode() + b"\0"


_ENCODERS: Final[dict[type, Callable[[Any], bytes]]] = {
    Begin: _begin,
    Commit: _commit,
    Origin: _origin,
    Relation: _relation,
    Type: _type,
    Insert: _insert,
    Update: _update,
    Delete: _delete,
    Truncate: _truncate,
    LogicalMessage: _message,
}
