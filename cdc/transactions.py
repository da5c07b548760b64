"""Messages to committed transactions: what is new, in which transaction, under which ordinal.

The reader works on payloads rather than messages, so that rows of a transaction that was routed
before, or of a relation that nobody wants, are never decoded. It holds no rows: a transaction of
any size passes through one event at a time.

Skipped (router-rules 2) is a transaction whose commit record starts below `routed_lsn`, and a
non-transactional message whose record ends at or below it. Relation and Type messages are applied
wherever they stand: the server sends them once a session.

An *ordinal* tells the changes of a transaction apart and is part of a job's identity, so it must
not depend on what is wanted or decodable: it counts the messages I, U, D and T as they come, in
steps of `ORDINAL_STEP`; relation i of a Truncate has the ordinal of its message + i. Nor may it
depend on how a transaction comes, whole or in pieces, and of a logical message in a piece nobody
may be able to tell whether it was rolled back. So those do not count: the ordinal of one is where
it stands in the WAL, relative to the commit, and negative.
"""

import struct
from collections.abc import Callable, Container
from typing import Final, TypeAlias, cast

from cdc.errors import ProtocolError, UndecodableMessage
from cdc.lsn import Lsn
from cdc.relations import RelationCache
from cdc.wire.messages import (
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Relation,
    Truncate,
    Type,
    Update,
)
from cdc.wire.pgoutput import decode
from cdc.wire.wal2json import lsn_of

ORDINAL_STEP: Final = 1 << 20  # a message may truncate a million tables; 2**43 messages fit bigint
STANDALONE_ORDINAL: Final = -1  # a message may end where a commit record starts: no clash with 0
_LAST_MESSAGE_ORDINAL: Final = -2  # of one that ends right where the commit record starts

_UNTRANSLATED_MESSAGE: Final = b'{"action":"M"'

UNCERTAIN: Final = b"?"
"""Stands before a logical message that may have been rolled back: nobody can tell (`spool`)."""

Event: TypeAlias = Begin | Commit | Relation | Insert | Update | Delete | Truncate | LogicalMessage

_Handler: TypeAlias = Callable[[bytes], Event | None]

_message_header = struct.Struct(">xBQ").unpack_from
_relation_oid = struct.Struct(">xI").unpack_from


class TransactionReader:
    """Turns the payloads of one session, in order, into events.

    Give every payload to `feed`. It returns what happened, or None when there is nothing to do:
    `Begin` … row events … `Commit` for a transaction that is to be routed, `Relation` when a table
    was described (already applied to `relations`), `LogicalMessage` in or between transactions.

    `xid`, `commit_lsn` (where the commit record starts), `commit_time_us` and `ordinal` tell about
    the latest transaction and the latest change in it, `message_ordinal` about the latest logical
    message. A message that is not transactional belongs
    to none: it is identified by its own `lsn` and `STANDALONE_ORDINAL`.

    `wanted` limits row events to those relation OIDs (None: all); it may be replaced, or changed
    in place, between any two calls. A Truncate is always an event.

    >>> reader = TransactionReader(routed_lsn=0x16B3748)
    >>> reader.feed(b"Y" + bytes([0, 0, 64, 1]) + b"shop" + bytes(1) + b"mood" + bytes(1))
    """

    __slots__ = (
        "_between",
        "_handlers",
        "_inside",
        "_routed_lsn",
        "_skipped",
        "commit_lsn",
        "commit_time_us",
        "message_ordinal",
        "ordinal",
        "relations",
        "wanted",
        "xid",
    )

    def __init__(self, routed_lsn: int, *, wanted: Container[int] | None = None) -> None:
        self.relations = RelationCache()
        self.wanted = wanted
        self.xid = 0
        self.commit_lsn = 0
        self.commit_time_us = 0
        self.ordinal = 0
        self.message_ordinal = _LAST_MESSAGE_ORDINAL
        self._routed_lsn = routed_lsn
        always: dict[bytes, _Handler] = {b"R": self._relation, b"Y": self._type}
        self._between = always | {
            b"B": self._begin,
            b"M": self._message_standalone,
            b"{": self._untranslated_standalone,
        }
        self._inside = always | {
            b"C": self._commit,
            b"I": self._row,
            b"U": self._row,
            b"D": self._row,
            b"T": self._truncate,
            b"M": self._message,
            b"O": _check,
            b"{": self._untranslated,
            UNCERTAIN: self._uncertain,
        }
        self._skipped = always | dict.fromkeys(
            (b"I", b"U", b"D", b"T", b"O", b"{", UNCERTAIN), _ignore
        )
        self._skipped |= {b"C": self._commit_skipped, b"M": self._message_skipped}
        self._handlers = self._between

    @property
    def in_transaction(self) -> bool:
        """Whether a Begin has come and its Commit has not, those skipped included."""
        return self._handlers is not self._between

    def feed(self, payload: bytes) -> Event | None:
        """Take in the next payload.

        Raises `ProtocolError` when the stream cannot go on, and `UndecodableMessage` for a row or
        logical message whose body is broken: it has its ordinal like any other, and the reader is
        ready for the next payload.
        """
        handler = self._handlers.get(payload[:1])
        if handler is None:
            decode(payload)  # when it is no message at all, this says so
            place = "in" if self.in_transaction else "between"
            tag = payload[:1].decode()
            raise ProtocolError(tag, 0, f"a message that belongs {place} transactions", repr(tag))
        return handler(payload)

    def _begin(self, payload: bytes) -> Begin | None:
        begin = cast("Begin", decode(payload))
        self.xid = begin.xid
        self.commit_lsn = begin.final_lsn
        self.commit_time_us = begin.commit_time_us
        self.ordinal = -ORDINAL_STEP
        if begin.final_lsn < self._routed_lsn:
            self._handlers = self._skipped
            return None
        self._handlers = self._inside
        return begin

    def _commit(self, payload: bytes) -> Commit:
        commit = cast("Commit", decode(payload))
        if commit.commit_lsn != self.commit_lsn:
            begun, ended = Lsn(self.commit_lsn), Lsn(commit.commit_lsn)
            raise ProtocolError("C", 2, f"commit LSN {begun}", f"{ended}")
        self._handlers = self._between
        return commit

    def _commit_skipped(self, payload: bytes) -> None:
        self._commit(payload)

    def _row(self, payload: bytes) -> Insert | Update | Delete | None:
        self.ordinal += ORDINAL_STEP
        wanted = self.wanted
        if wanted is not None and len(payload) > 4 and _relation_oid(payload)[0] not in wanted:
            return None
        try:
            return cast("Insert | Update | Delete", decode(payload))
        except ProtocolError as error:
            oid = _relation_oid(payload)[0] if len(payload) > 4 else None
            raise self._undecodable(error, oid) from error

    def _truncate(self, payload: bytes) -> Truncate:
        self.ordinal += ORDINAL_STEP
        try:
            return cast("Truncate", decode(payload))
        except ProtocolError as error:
            raise self._undecodable(error) from error

    def _message(self, payload: bytes) -> LogicalMessage | None:
        if not _is_transactional(payload):
            return self._message_standalone(payload)
        self._place_message(payload)
        try:
            return cast("LogicalMessage", decode(payload))
        except ProtocolError as error:
            raise self._undecodable_message(error) from error

    def _message_skipped(self, payload: bytes) -> LogicalMessage | None:
        return None if _is_transactional(payload) else self._message_standalone(payload)

    def _message_standalone(self, payload: bytes) -> LogicalMessage | None:
        """Handle a message that counts whatever becomes of the transaction that sent it."""
        lsn = 0
        if len(payload) > 9:
            _, lsn = _message_header(payload)
            if lsn <= self._routed_lsn:
                return None
        try:
            return cast("LogicalMessage", decode(payload))
        except ProtocolError as error:
            raise UndecodableMessage(
                error, relation_oid=None, ordinal=STANDALONE_ORDINAL, commit_lsn=lsn
            ) from error

    def _untranslated(self, payload: bytes) -> None:
        """Set aside a change that came from another plugin and could not be translated."""
        if payload.startswith(_UNTRANSLATED_MESSAGE):
            self._place_message_at(lsn_of(payload) or 0)
            raise self._undecodable_message(_untranslatable(payload))
        self.ordinal += ORDINAL_STEP
        raise self._undecodable(_untranslatable(payload))

    def _uncertain(self, payload: bytes) -> None:
        """Set aside a message that may have been rolled back with a part of its transaction."""
        self._place_message(payload.removeprefix(UNCERTAIN))
        whose = "none (it came in a piece, and a part of the transaction was rolled back)"
        problem = ProtocolError("M", 1, "the subtransaction that wrote it", whose)
        raise self._undecodable_message(problem)

    def _place_message(self, payload: bytes) -> None:
        _, lsn = _message_header(payload) if len(payload) > 9 else (0, 0)
        self._place_message_at(lsn)

    def _place_message_at(self, lsn: int) -> None:
        """Tell a message by where its record ends: of any two in a transaction, the later by more.

        One whose position cannot be read is told by 0.
        """
        self.message_ordinal = lsn - self.commit_lsn + _LAST_MESSAGE_ORDINAL

    def _untranslated_standalone(self, payload: bytes) -> None:
        lsn = lsn_of(payload)
        if lsn is None:
            raise _untranslatable(payload)
        if lsn > self._routed_lsn:
            raise UndecodableMessage(
                _untranslatable(payload),
                relation_oid=None,
                ordinal=STANDALONE_ORDINAL,
                commit_lsn=lsn,
            )

    def _relation(self, payload: bytes) -> Relation:
        relation = cast("Relation", decode(payload))
        self.relations.apply(relation)
        return relation

    def _type(self, payload: bytes) -> None:
        self.relations.apply(cast("Type", decode(payload)))

    def _undecodable_message(self, error: ProtocolError) -> UndecodableMessage:
        return UndecodableMessage(
            error, relation_oid=None, ordinal=self.message_ordinal, commit_lsn=self.commit_lsn
        )

    def _undecodable(
        self, error: ProtocolError, relation_oid: int | None = None
    ) -> UndecodableMessage:
        return UndecodableMessage(
            error, relation_oid=relation_oid, ordinal=self.ordinal, commit_lsn=self.commit_lsn
        )


def _is_transactional(payload: bytes) -> bool:
    """Tell by the flags; a message too short to have any counts for the open transaction."""
    return len(payload) < 2 or bool(payload[1] & 1)


def _untranslatable(payload: bytes) -> ProtocolError:
    return ProtocolError("{", 0, "a frame that can be translated", repr(payload[:60]))


def _check(payload: bytes) -> None:
    decode(payload)


def _ignore(_payload: bytes) -> None:
    return
