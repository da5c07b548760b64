"""Decode wal2json (format version 2) into the messages that pgoutput would have sent.

wal2json says less of a table than pgoutput: its frames name tables and columns, but neither the
table's OID and replica identity nor the base types of domains. Those come from the catalog, by
request: `Decoder.decode` returns a `CatalogRequest` when it meets a set of columns that it has not
seen, and is called again once `Decoder.describe` has had the answer. Pure; values stay the text
that the server wrote, numbers included (`1.10` is not `1.1`).

What is made equal: stored generated columns are left out, an old row is there only when pgoutput
would send one, partitions appear as the table that is published, empty transactions vanish, a
column that an update does not carry is unchanged TOAST.

What cannot be, and is counted in `divergences` where it can be noticed:

- `truncate_options`: a truncate does not tell CASCADE and RESTART IDENTITY (both false here).
- `number_lost`: NaN and the infinities of numbers come as null, before wal2json 2.6 (noticed in
  columns that are NOT NULL).
- `shape_guessed`: a row was written before, and read after, somebody altered or dropped its table:
  the catalog no longer tells its key, its replica identity or what it left out for TOAST.
- Logical messages end at their first zero byte (never noticed).

Frames: https://github.com/eulerto/wal2json, `pg_decode_*_v2` in wal2json.c.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from cdc.errors import ProtocolError
from cdc.lsn import Lsn
from cdc.wire.messages import (
    UNCHANGED,
    Begin,
    Column,
    Commit,
    Delete,
    Field,
    Insert,
    LogicalMessage,
    Message,
    OldKind,
    Relation,
    Row,
    Truncate,
    Type,
    Update,
)

DIVERGENCES: Final = ("number_lost", "shape_guessed", "truncate_options")

TableName: TypeAlias = tuple[str, str]
"""Schema and table."""

_HEAD: Final = b'{"action":"'
_LSN: Final = re.compile(rb'"lsn":"([0-9A-F]{1,8})/([0-9A-F]{1,8})"')
_BYTEA: Final = "17"
_NUMBERS: Final = frozenset((700, 701, 1700))  # float4, float8, numeric: those with a NaN
_UNKNOWN_OID: Final = 0xFFFF_FFFF  # and downwards: for tables that the catalog no longer has
_PARSER: Final = json.JSONDecoder(parse_int=str, parse_float=str, strict=False)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class CatalogColumn:
    """A column of a table as the catalog has it."""

    name: str
    type_oid: int
    is_key: bool  # belongs to the replica identity
    is_toastable: bool
    is_generated: bool
    is_not_null: bool


@dataclass(frozen=True, slots=True)
class CatalogTable:
    """A table, as what it is published: its topmost published ancestor, if it is a partition."""

    oid: int
    schema: str
    name: str
    replica_identity: str  # pg_class.relreplident of what is published
    columns: tuple[CatalogColumn, ...]  # of what is published, in its order
    own_identity: str  # of the table itself, which says what its WAL holds
    own_generated: frozenset[str]  # its generated columns

    @property
    def present(self) -> tuple[CatalogColumn, ...]:
        """The columns that are sent."""
        return tuple(column for column in self.columns if not column.is_generated)


@dataclass(frozen=True, slots=True)
class CatalogRequest:
    """What `Decoder.describe` must be told before the frame can be decoded."""

    table: TableName
    type_oids: frozenset[int]


@dataclass(frozen=True, slots=True)
class EmptyTransaction:
    """A transaction without a change; everything below `end_lsn` has been received."""

    end_lsn: int


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A change or logical message whose body is broken: for a dead letter."""

    error: ProtocolError


Decoded: TypeAlias = Message | EmptyTransaction | Undecodable
_Frame: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What frames with the same columns have in common."""

    relation: Relation
    names: tuple[str, ...]
    is_full: bool  # identity: the whole old row, whether or not a key column changed
    old_kind: OldKind
    not_null_numbers: tuple[str, ...]
    is_guessed: bool
    may_lack: bool  # columns were absent: taken for unchanged


@dataclass(frozen=True, slots=True)
class _Given:
    """What a frame tells of a table: its columns and their types, by name."""

    action: str
    table: TableName
    new: dict[str, int]
    old: dict[str, int]


class Decoder:
    """Decodes the payloads of one session, in order.

    Args:
        refresh_prefix: a transactional message with this prefix makes everything known be read
            again: what is published may have changed.

    Example:
        decoded = decoder.decode(payload)
        if isinstance(decoded, CatalogRequest):
            decoder.describe(decoded, table, types)         # read from the catalog
            decoded = decoder.decode(payload)
    """

    def __init__(self, refresh_prefix: str) -> None:
        self.divergences: Counter[str] = Counter()
        self.has_assumed_unchanged = False
        """Whether columns were absent since the catalog was last read: one dropped by now would
        look the same."""
        self._refresh_prefix = refresh_prefix
        self._begin: Begin | None = None  # not passed on yet
        self._tables: dict[TableName, CatalogTable | None] = {}
        self._types: dict[int, Type] = {}
        self._just_described: TableName | None = None
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._asked: set[tuple[object, ...]] = set()  # keys of shapes
        self._sent: dict[int, Relation] = {}
        self._unknown: dict[TableName, int] = {}
        self._decoders: dict[bytes, Callable[[_Frame], list[Decoded] | CatalogRequest]] = {
            b"B": self._decode_begin,
            b"C": self._decode_commit,
            b"I": self._decode_row,
            b"U": self._decode_row,
            b"D": self._decode_row,
            b"T": self._decode_truncate,
            b"M": self._decode_message,
        }

    def decode(self, payload: bytes) -> list[Decoded] | CatalogRequest:
        """Decode one frame.

        Raises:
            ProtocolError: it is no frame of wal2json, or a broken Begin or Commit.
        """
        tag = payload[len(_HEAD) : len(_HEAD) + 1]
        decoder = self._decoders.get(tag)
        if decoder is None or not payload.startswith(_HEAD):
            raise ProtocolError("{", 0, "a frame of wal2json, format version 2", repr(payload[:20]))
        try:
            return decoder(_parse(payload))
        except (ValueError, LookupError, TypeError, AttributeError) as cause:
            action = tag.decode()
            reason = f"{type(cause).__name__}: {cause}"
            error = ProtocolError(action, 0, "a frame of wal2json, format version 2", reason)
            if tag in b"BC":
                raise error from cause
            return [*self._flush_begin(), Undecodable(error)]

    def describe(
        self, request: CatalogRequest, table: CatalogTable | None, types: Iterable[Type]
    ) -> None:
        """Answer a request; None when the catalog has no such table (any more).

        `types` are the types of the request and of the table's columns; a domain has its own OID
        and the names of its base type.
        """
        name = request.table
        if name not in self._tables or self._tables[name] != table:
            self._tables[name] = table
            for key in [key for key in self._shapes if key[:2] == name]:
                del self._shapes[key]
            self._asked = {key for key in self._asked if key[:2] != name}
        self._types.update((learnt.oid, learnt) for learnt in types)
        self._just_described = name

    def forget(self) -> None:
        """Ask for everything again, as it is needed."""
        self._tables.clear()
        self._shapes.clear()
        self._asked.clear()
        self.has_assumed_unchanged = False

    # --- transactions --------------------------------------------------------------------------

    def _decode_begin(self, frame: _Frame) -> list[Decoded]:
        self._begin = Begin(Lsn.parse(frame["lsn"]), _time_us(frame), int(frame["xid"]))
        return []

    def _decode_commit(self, frame: _Frame) -> list[Decoded]:
        end_lsn = Lsn.parse(frame["nextlsn"])
        if self._begin is not None:
            self._begin = None
            return [EmptyTransaction(end_lsn)]
        return [Commit(0, Lsn.parse(frame["lsn"]), end_lsn, _time_us(frame))]

    def _flush_begin(self) -> list[Decoded]:
        """Pass the Begin on with the first thing in its transaction."""
        begin, self._begin = self._begin, None
        return [] if begin is None else [begin]

    def _decode_message(self, frame: _Frame) -> list[Decoded]:
        message = LogicalMessage(
            frame["transactional"] is True,
            Lsn.parse(frame["lsn"]),
            frame["prefix"],
            _bytes(frame["content"]),
        )
        if not message.transactional:
            return [message]
        if message.prefix == self._refresh_prefix:
            self.forget()
        return [*self._flush_begin(), message]

    # --- changes -------------------------------------------------------------------------------

    def _decode_row(self, frame: _Frame) -> list[Decoded] | CatalogRequest:
        shape = self._shape_of(frame)
        if isinstance(shape, CatalogRequest):
            return shape
        change = self._change(frame, shape)
        self._count(frame, shape)
        return [*self._flush_begin(), *self._introduce(shape.relation), change]

    def _change(self, frame: _Frame, shape: _Shape) -> Insert | Update | Delete:
        oid, names = shape.relation.oid, shape.names
        if frame["action"] == "I":
            return Insert(oid, _row(frame["columns"], names, UNCHANGED))
        if frame["action"] == "D":
            return Delete(oid, shape.old_kind, _row(frame["identity"], names, None))
        new = _row(frame["columns"], names, UNCHANGED)
        if not shape.is_full and not _key_changed(frame):
            return Update(oid, None, None, new)
        return Update(oid, shape.old_kind, _row(frame["identity"], names, None), new)

    def _decode_truncate(self, frame: _Frame) -> list[Decoded] | CatalogRequest:
        shape = self._shape_of(frame)
        if isinstance(shape, CatalogRequest):
            return shape
        relation = shape.relation
        if (relation.schema, relation.name) != (frame["schema"], frame["table"]):
            return self._flush_begin()  # of a partition: pgoutput says nothing
        self.divergences["truncate_options"] += 1
        truncate = Truncate((relation.oid,), cascade=False, restart_identity=False)
        return [*self._flush_begin(), *self._introduce(relation), truncate]

    def _count(self, frame: _Frame, shape: _Shape) -> None:
        if shape.is_guessed:
            self.divergences["shape_guessed"] += 1
        if shape.may_lack:
            self.has_assumed_unchanged = True
        if shape.not_null_numbers:
            values = {c["name"]: c["value"] for c in frame.get("columns") or frame["identity"]}
            lost = sum(values.get(name, 0) is None for name in shape.not_null_numbers)
            self.divergences["number_lost"] += lost

    def _introduce(self, relation: Relation) -> Iterator[Message]:
        """Describe a relation unless the last description of it still holds."""
        if self._sent.get(relation.oid) is not relation:
            self._sent[relation.oid] = relation
            for column in relation.columns:
                if (learnt := self._types.get(column.type_oid)) is not None:
                    yield learnt
            yield relation

    # --- shapes --------------------------------------------------------------------------------

    def _shape_of(self, frame: _Frame) -> _Shape | CatalogRequest:
        new, old = frame.get("columns", ()), frame.get("identity", ())
        name: TableName = (frame["schema"], frame["table"])
        key = (*name, frame["action"], _signature(new), _signature(old))
        shape = self._shapes.get(key)
        # What was guessed holds for as long as nothing else has been learnt of the table.
        if shape is not None and (
            not shape.is_guessed or self._sent.get(shape.relation.oid) is shape.relation
        ):
            return shape
        given = _Given(frame["action"], name, _types(new), _types(old))
        "".join((*name, *given.new, *given.old)).encode()  # ValueError: a name is not UTF-8
        if key not in self._asked and self._just_described != name:
            return CatalogRequest(name, frozenset((*given.new.values(), *given.old.values())))
        self._asked.add(key)
        self._just_described = None
        shape = self._shapes[key] = self._build(self._tables[name], given)
        return shape

    def _build(self, table: CatalogTable | None, given: _Given) -> _Shape:
        if table is None:
            oid = self._unknown.setdefault(given.table, _UNKNOWN_OID - len(self._unknown))
            return self._guessed(None, oid, given)
        for generated in table.own_generated:
            given.new.pop(generated, None)
            given.old.pop(generated, None)
        sent = self._sent.get(table.oid)
        if not _agree(table, sent, given):
            return self._guessed(table, table.oid, given)
        if given.action in "DT" and sent is not None and _still_holds(sent, table, given):
            return self._agreed(table, sent, given)
        is_full = table.replica_identity == "f"
        columns = [Column(c.name, c.type_oid, -1, c.is_key or is_full) for c in table.present]
        relation = Relation(
            table.oid, table.schema, table.name, table.replica_identity, tuple(columns)
        )
        return self._agreed(table, self._interned(relation), given)

    @staticmethod
    def _agreed(table: CatalogTable, relation: Relation, given: _Given) -> _Shape:
        """Build the shape of a frame that is as the catalog says."""
        return _Shape(
            relation=relation,
            names=tuple(c.name for c in relation.columns),
            is_full=table.own_identity == "f",
            old_kind="O" if table.replica_identity == "f" else "K",
            not_null_numbers=tuple(
                c.name for c in table.present if c.is_not_null and c.type_oid in _NUMBERS
            ),
            is_guessed=False,
            may_lack=given.action == "U" and len(given.new) < len(relation.columns),
        )

    def _guessed(self, table: CatalogTable | None, oid: int, given: _Given) -> _Shape:
        """Build a shape from the frame, for a table that is not (any more) as the catalog says."""
        schema, published = (table.schema, table.name) if table else given.table
        known_keys = {c.name for c in table.present if c.is_key} if table else set()
        keys = set(given.old) or known_keys
        if given.action == "U":
            is_full = keys >= set(given.new)
        else:
            is_full = bool(known_keys) and not keys <= known_keys
        columns = self._guessed_columns(table, oid, given, is_full=is_full)
        relation = Relation(
            oid,
            schema,
            published,
            "f" if is_full else "d",
            tuple(Column(n, o, -1, is_full or n in keys) for n, o in columns.items()),
        )
        return _Shape(
            relation=self._interned(relation),
            names=tuple(columns),
            is_full=is_full,
            old_kind="O" if is_full else "K",
            not_null_numbers=(),
            is_guessed=True,
            may_lack=len(columns) > len(given.new),
        )

    def _guessed_columns(
        self, table: CatalogTable | None, oid: int, given: _Given, *, is_full: bool
    ) -> dict[str, int]:
        """Return the columns at the time: those given, and those that it may have left out.

        What the stream last said of the table tells that best: a value that is left out was
        written before, and then it was there.
        """
        if given.action == "I" or is_full:
            return dict(given.old if is_full else given.new)
        if (sent := self._sent.get(oid)) is not None:
            candidates = {c.name: c.type_oid for c in sent.columns}
        else:
            candidates = (
                {c.name: c.type_oid for c in table.present if c.is_toastable} if table else {}
            )
        certain = given.new or given.old
        if given.action == "D":
            return candidates if certain.items() <= candidates.items() else dict(certain)
        return {**candidates, **certain}

    def _interned(self, relation: Relation) -> Relation:
        """Return the very object that was sent, if it says the same."""
        sent = self._sent.get(relation.oid)
        return sent if sent == relation and sent is not None else relation


def lsn_of(payload: bytes) -> int | None:
    """Return the LSN that a frame names, even if the rest of it is broken.

    >>> lsn_of(b'{"action":"M","xid":null,"timestamp":null,"lsn":"0/16B3748","prefix":')
    23803720
    """
    match = _LSN.search(payload)
    return None if match is None else int(match[1], 16) << 32 | int(match[2], 16)


def _agree(table: CatalogTable, sent: Relation | None, given: _Given) -> bool:
    """Tell whether a frame can have been written by the table as the catalog has it now."""
    known = {c.name: c.type_oid for c in table.present}
    if not (given.new.items() <= known.items() and given.old.items() <= known.items()):
        return False
    if given.action in "IU":
        absent = set(known) - set(given.new)
        can_be = {c.name for c in table.present if c.is_toastable and given.action == "U"}
        if sent is not None:
            can_be &= {c.name for c in sent.columns}
        if not absent <= can_be:
            return False
    if given.action in "IT":
        return True
    if table.own_identity == "f":
        return set(given.old) == set(known)
    is_itself = (table.schema, table.name) == given.table
    return not is_itself or set(given.old) == {c.name for c in table.present if c.is_key}


def _still_holds(sent: Relation, table: CatalogTable, given: _Given) -> bool:
    """Tell whether what was said of a table last will do for a delete or truncate."""
    columns = {c.name: c.type_oid for c in sent.columns}
    named = (sent.schema, sent.name, sent.replica_identity)
    return (
        named == (table.schema, table.name, table.replica_identity)
        and given.old.items() <= columns.items()
        and (sent.replica_identity == "f" or {c.name for c in sent.columns if c.is_key})
        == (sent.replica_identity == "f" or {c.name for c in table.present if c.is_key})
    )


def _parse(payload: bytes) -> _Frame:
    """Parse a frame with its numbers as text, and bytes that are not UTF-8 kept as they are."""
    text = payload.decode("utf-8", "surrogateescape")
    frame: _Frame = _PARSER.decode(text)
    return frame


def _row(columns: Sequence[Mapping[str, Any]], names: Iterable[str], absent: Field) -> Row:
    values = {column["name"]: _value(column) for column in columns}
    return [values.get(name, absent) for name in names]


def _value(column: Mapping[str, Any]) -> Field:
    """Return a column's value as the text of its type's output function."""
    value = column["value"]
    if value is None:
        return None
    if value is True:
        return b"t"
    if value is False:
        return b"f"
    text = _bytes(value)
    return b"\\x" + text if column["typeoid"] == _BYTEA else text


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _key_changed(frame: _Frame) -> bool:
    new = {column["name"]: column["value"] for column in frame["columns"]}
    return any(new.get(c["name"], c["value"]) != c["value"] for c in frame["identity"])


def _signature(columns: Iterable[Mapping[str, Any]]) -> tuple[Any, ...]:
    return tuple([(column["name"], column["typeoid"]) for column in columns])


def _types(columns: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the columns' types; wal2json prints OIDs of the upper half as negative numbers."""
    return {column["name"]: int(column["typeoid"]) & 0xFFFF_FFFF for column in columns}


def _time_us(frame: _Frame) -> int:
    return (datetime.fromisoformat(frame["timestamp"]) - _EPOCH) // _MICROSECOND
