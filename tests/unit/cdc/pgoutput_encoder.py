"""The server's side of pgoutput: messages to bytes, for round trips.

Written from PostgreSQL's "Logical Replication Message Formats", not from the decoder.
"""

import struct

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
    StreamAbort,
    StreamCommit,
    StreamMessage,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    Update,
)


def in_piece(subxid: int, message: Message) -> bytes:
    """Encode a message of a transaction in progress: its id comes after the tag."""
    encoded = encode(message)
    return encoded[:1] + struct.pack(">I", subxid) + encoded[1:]


def encode_streamed(message: StreamMessage) -> bytes:
    match message:
        case StreamStart(xid, is_first):
            return b"S" + struct.pack(">IB", xid, is_first)
        case StreamStop():
            return b"E"
        case StreamCommit(xid, flags, commit_lsn, end_lsn, commit_time_us):
            time = commit_time_us - POSTGRES_EPOCH_US
            return b"c" + struct.pack(">IBQQq", xid, flags, commit_lsn, end_lsn, time)
        case StreamAbort(xid, subxid, abort_lsn, abort_time_us):
            encoded = b"A" + struct.pack(">II", xid, subxid)
            if abort_lsn is None or abort_time_us is None:
                return encoded
            return encoded + struct.pack(">Qq", abort_lsn, abort_time_us - POSTGRES_EPOCH_US)


def encode(message: Message) -> bytes:
    match message:
        case Insert(relation_oid, new):
            return b"I" + struct.pack(">I", relation_oid) + b"N" + row(new)
        case Update():
            return update(message)
        case Delete(relation_oid, old_kind, old):
            return b"D" + struct.pack(">I", relation_oid) + old_kind.encode() + row(old)
        case Truncate(relation_oids, cascade, restart_identity):
            options = cascade | restart_identity << 1
            count = len(relation_oids)
            return b"T" + struct.pack(f">IB{count}I", count, options, *relation_oids)
        case LogicalMessage(transactional, lsn, prefix, content):
            head = struct.pack(">BQ", transactional, lsn) + string(prefix)
            return b"M" + head + struct.pack(">I", len(content)) + content
        case _:
            return control(message)


def control(message: Begin | Commit | Origin | Relation | Type) -> bytes:
    match message:
        case Begin(final_lsn, commit_time_us, xid):
            return b"B" + struct.pack(">QqI", final_lsn, commit_time_us - POSTGRES_EPOCH_US, xid)
        case Commit(flags, commit_lsn, end_lsn, commit_time_us):
            time = commit_time_us - POSTGRES_EPOCH_US
            return b"C" + struct.pack(">BQQq", flags, commit_lsn, end_lsn, time)
        case Origin(lsn, name):
            return b"O" + struct.pack(">Q", lsn) + string(name)
        case Type(oid, schema, name):
            return b"Y" + struct.pack(">I", oid) + string(schema) + string(name)
        case Relation():
            return relation(message)


def update(message: Update) -> bytes:
    encoded = b"U" + struct.pack(">I", message.relation_oid)
    if message.old_kind is not None and message.old is not None:
        encoded += message.old_kind.encode() + row(message.old)
    return encoded + b"N" + row(message.new)


def relation(message: Relation) -> bytes:
    encoded = b"R" + struct.pack(">I", message.oid) + string(message.schema) + string(message.name)
    encoded += message.replica_identity.encode() + struct.pack(">H", len(message.columns))
    for column in message.columns:
        encoded += bytes([column.is_key]) + string(column.name)
        encoded += struct.pack(">Ii", column.type_oid, column.type_modifier)
    return encoded


def row(values: Row) -> bytes:
    encoded = struct.pack(">H", len(values))
    for value in values:
        if value is None:
            encoded += b"n"
        elif value is UNCHANGED:
            encoded += b"u"
        else:
            encoded += b"t" + struct.pack(">I", len(value)) + value
    return encoded


def string(text: str) -> bytes:
    return text.encode() + b"\0"
