"""`cdc decode`: a recording as typed changes, without a server.

The same decoder, transactions and values as in `cdc run`; nothing is skipped and nothing routed.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson

from cdc.catalog import Shape
from cdc.errors import CdcError, RelationUnknown, UndecodableMessage, ValueUndecodable
from cdc.lsn import Lsn
from cdc.marker import PREFIX
from cdc.recording import Entry, Header
from cdc.relations import RelationShape
from cdc.source import PGOUTPUT
from cdc.transactions import Event, TransactionReader
from cdc.translation import reframe
from cdc.wire.frames import XLOG_DATA, XLOG_DATA_HEADER_SIZE
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
from cdc.wire.wal2json import CatalogRequest, Decoder

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FLAGS: Final = orjson.OPT_PASSTHROUGH_DATACLASS

Line = dict[str, Any]
"""One event; values of rows are JSON already (`orjson.Fragment`)."""


def render(line: Line) -> str:
    """Return an event as one line of JSON."""
    return orjson.dumps(line, option=_FLAGS).decode()


def summarise(line: Line) -> str:
    """Return an event as one line for people."""
    facts = dict(line)
    what, where = facts.pop("op"), facts.pop("commit_lsn", facts.get("lsn", ""))
    if "table" in facts:
        what += f" {facts.pop('schema')}.{facts.pop('table')}"
    facts.pop("ordinal", None)
    return f"{where:<12} {what}  {render(facts)}"


def replay(header: Header, entries: Iterable[Entry]) -> Iterator[Line]:
    """Yield what happened: begin, relation, insert, update, delete, truncate, message, commit.

    What cannot be decoded is an event as well (`undecodable`, with its bytes in hex).

    Raises:
        ProtocolError: the recording cannot go on, as the stream could not.
    """
    reader = TransactionReader(0)
    for frame in _frames(header, entries):
        if frame[0] != XLOG_DATA:
            continue
        payload = frame[XLOG_DATA_HEADER_SIZE:]
        try:
            event = reader.feed(payload)
            lines = [] if event is None else _describe(reader, event)
        except (UndecodableMessage, ValueUndecodable, RelationUnknown) as error:
            lines = [_undecodable(reader, error, payload)]
        yield from lines


def _frames(header: Header, entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the frames as pgoutput's."""
    decoder = None if header.plugin == PGOUTPUT else Decoder(PREFIX)
    shapes: deque[Shape] = deque()
    for entry in entries:
        if isinstance(entry, Shape):
            shapes.append(entry)
        elif decoder is None or entry.frame[0] != XLOG_DATA:
            yield entry.frame
        else:
            yield from _translate(decoder, entry.frame, shapes)
            shapes.clear()


def _translate(decoder: Decoder, frame: bytes, shapes: deque[Shape]) -> Iterator[bytes]:
    decoded = decoder.decode(frame[XLOG_DATA_HEADER_SIZE:])
    while isinstance(decoded, CatalogRequest):
        shape = shapes.popleft() if shapes else Shape(None, ())
        decoder.describe(decoded, shape.table, shape.types)
        decoded = decoder.decode(frame[XLOG_DATA_HEADER_SIZE:])
    yield from reframe(frame, decoded)


def _describe(reader: TransactionReader, event: Event) -> list[Line]:
    if isinstance(event, Begin):
        return [{"op": "begin", "xid": event.xid, **_commit_of(reader)}]
    if isinstance(event, Commit):
        return [{"op": "commit", "end_lsn": str(Lsn(event.end_lsn)), **_commit_of(reader)}]
    if isinstance(event, Relation):
        return [_relation(reader.relations.get(event.oid))]
    if isinstance(event, LogicalMessage):
        return [_message(reader, event)]
    if isinstance(event, Truncate):
        flags = {"cascade": event.cascade, "restart_identity": event.restart_identity}
        return [
            {
                "op": "truncate",
                **_table(reader.relations.get(oid)),
                **flags,
                **_place(reader, index),
            }
            for index, oid in enumerate(event.relation_oids)
        ]
    return [_row_change(reader, event)]


def _row_change(reader: TransactionReader, change: Insert | Update | Delete) -> Line:
    shape = reader.relations.get(change.relation_oid)
    line: Line = {"op": type(change).__name__.lower(), **_table(shape)}
    if not isinstance(change, Delete):
        line["new"] = _object(shape, change.new, range(len(change.new)))
        unchanged = [
            name
            for name, field in zip(shape.column_names, change.new, strict=True)
            if field is UNCHANGED
        ]
        line |= {"unchanged": unchanged} if unchanged else {}
    if not isinstance(change, Insert) and change.old is not None:
        is_whole = change.old_kind == "O"
        indexes = range(len(change.old)) if is_whole else shape.key_indexes
        line["old"] = _object(shape, change.old, indexes)
    return line | _place(reader)


def _object(shape: RelationShape, row: Row, indexes: Iterable[int]) -> dict[str, orjson.Fragment]:
    fragments = shape.fragments(row)
    return {
        shape.column_names[i]: orjson.Fragment(fragment)
        for i in indexes
        if (fragment := fragments[i]) is not UNCHANGED
    }


def _relation(shape: RelationShape) -> Line:
    columns = [
        {"name": name, "type_oid": oid, "is_key": i in shape.key_indexes}
        for i, (name, oid) in enumerate(zip(shape.column_names, shape.type_oids, strict=True))
    ]
    identity = {"oid": shape.oid, "replica_identity": shape.replica_identity}
    return {"op": "relation", **_table(shape), **identity, "columns": columns}


def _message(reader: TransactionReader, message: LogicalMessage) -> Line:
    line: Line = {"op": "message", "prefix": message.prefix, "lsn": str(Lsn(message.lsn))}
    try:
        line["content"] = message.content.decode()
    except UnicodeDecodeError:
        line["content_hex"] = message.content.hex()
    if not message.transactional:
        return line
    return line | _place(reader) | {"ordinal": reader.message_ordinal}


def _undecodable(reader: TransactionReader, error: CdcError, payload: bytes) -> Line:
    return {"op": "undecodable", "error": str(error), "raw": payload.hex(), **_place(reader)}


def _table(shape: RelationShape) -> Line:
    return {"schema": shape.schema, "table": shape.name}


def _commit_of(reader: TransactionReader) -> Line:
    time = _EPOCH + timedelta(microseconds=reader.commit_time_us)
    return {"commit_lsn": str(Lsn(reader.commit_lsn)), "commit_time": time.isoformat()}


def _place(reader: TransactionReader, index: int = 0) -> Line:
    return {"commit_lsn": str(Lsn(reader.commit_lsn)), "ordinal": reader.ordinal + index}
