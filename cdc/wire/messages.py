"""What an output plugin says: one class a message, the same for every plugin.

Instances are mutable only because frozen ones take three times as long to build: treat them as
immutable. LSNs are plain integers, `…_us` is microseconds of the Unix epoch.
"""

import enum
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias


class Unchanged(enum.Enum):
    """The type of `UNCHANGED`: a TOASTed value that an update did not touch and does not carry."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED

Field: TypeAlias = bytes | Unchanged | None
"""A column's value: its text as the server's output function wrote it, or SQL's null."""

Row: TypeAlias = list[Field]

OldKind: TypeAlias = Literal["K", "O"]
"""What an old row holds: K the replica identity's columns (others null), O all columns."""


@dataclass(slots=True)
class Begin:
    """A transaction starts; `final_lsn` is where its commit record starts."""

    final_lsn: int
    commit_time_us: int
    xid: int


@dataclass(slots=True)
class Commit:
    """It ends; `end_lsn` is where its commit record ends: the position that progress takes."""

    flags: int
    commit_lsn: int
    end_lsn: int
    commit_time_us: int


@dataclass(slots=True)
class Origin:
    """The transaction was replicated here from elsewhere."""

    lsn: int
    name: str


@dataclass(slots=True)
class Column:
    """A column of a relation; `is_key` when it belongs to the replica identity."""

    name: str
    type_oid: int
    type_modifier: int
    is_key: bool


@dataclass(slots=True)
class Relation:
    """A table's shape, sent before its first row and after each change of it.

    `schema` is empty for pg_catalog; `replica_identity` is pg_class.relreplident: d, n, f or i.
    """

    oid: int
    schema: str
    name: str
    replica_identity: str
    columns: tuple[Column, ...]


@dataclass(slots=True)
class Type:
    """A type that is not built in. For a domain: its own OID, its *base type's* names.

    (logicalrep_write_typ in PostgreSQL's proto.c; `schema` is empty for pg_catalog.)
    """

    oid: int
    schema: str
    name: str


@dataclass(slots=True)
class Insert:
    """A new row."""

    relation_oid: int
    new: Row


@dataclass(slots=True)
class Update:
    """A changed row. `old` is there when the key changed (K) or the identity is full (O)."""

    relation_oid: int
    old_kind: OldKind | None
    old: Row | None
    new: Row


@dataclass(slots=True)
class Delete:
    """A deleted row: its key (K), or all of it when the identity is full (O)."""

    relation_oid: int
    old_kind: OldKind
    old: Row


@dataclass(slots=True)
class Truncate:
    """Tables emptied by one statement."""

    relation_oids: tuple[int, ...]
    cascade: bool
    restart_identity: bool


@dataclass(slots=True)
class LogicalMessage:
    """What pg_logical_emit_message wrote. `lsn` is where its WAL record *ends*."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


Message: TypeAlias = (
    Begin | Commit | Origin | Relation | Type | Insert | Update | Delete | Truncate | LogicalMessage
)


@dataclass(slots=True)
class StreamStart:
    """What follows, up to `StreamStop`, is of one transaction that has not ended yet."""

    xid: int
    is_first: bool


@dataclass(slots=True)
class StreamStop:
    """The piece of a transaction in progress is over."""


@dataclass(slots=True)
class StreamCommit:
    """A transaction that came in pieces has committed; positions as in `Commit`."""

    xid: int
    flags: int
    commit_lsn: int
    end_lsn: int
    commit_time_us: int


@dataclass(slots=True)
class StreamAbort:
    """One that came in pieces was rolled back, or a part of it: `subxid` is the part.

    Where and when is told only by protocol 4 (streaming `parallel`).
    """

    xid: int
    subxid: int
    abort_lsn: int | None = None
    abort_time_us: int | None = None


StreamMessage: TypeAlias = StreamStart | StreamStop | StreamCommit | StreamAbort
"""What protocols 2 and 4 say besides."""
