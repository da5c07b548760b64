"""Protocols 2 and 4 against version 1: the same transactions, whichever way they come."""

from __future__ import annotations

import asyncio
import os
import tempfile
import tracemalloc
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc import emission
from cdc.errors import ProtocolError, SpoolFailed, UndecodableMessage
from cdc.spool import Spool, SpoolMemory
from cdc.streaming import StreamedStream, StreamedTransactions
from cdc.transactions import UNCERTAIN, TransactionReader
from cdc.wire.frames import XLOG_DATA_HEADER_SIZE, keepalive
from cdc.wire.messages import (
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Relation,
    StreamAbort,
    StreamCommit,
    StreamMessage,
    StreamStart,
    StreamStop,
    Truncate,
    Update,
)
from cdc.wire.pgoutput import decode
from cdc.wire.streamed import decode_streamed, split_xid

from .pgoutput_encoder import encode, encode_streamed, in_piece
from .strategies import (
    deletes,
    inserts,
    logical_messages,
    lsns,
    relations,
    times_us,
    truncates,
    u32s,
    updates,
)

STREAMED: Final[st.SearchStrategy[StreamMessage]] = st.one_of(
    st.builds(StreamStart, u32s, st.booleans()),
    st.builds(StreamStop),
    st.builds(StreamCommit, u32s, st.integers(0, 255), lsns, lsns, times_us),
    st.builds(StreamAbort, u32s, u32s),
    st.builds(StreamAbort, u32s, u32s, lsns, times_us),
)
CHANGES: Final[st.SearchStrategy[Message]] = st.one_of(
    inserts, updates, deletes, truncates, relations, logical_messages
)


@given(STREAMED)
def test_every_message_survives_the_round_trip(message: StreamMessage) -> None:
    assert decode_streamed(encode_streamed(message)) == message


@given(STREAMED, st.data())
def test_a_damaged_message_is_refused(message: StreamMessage, data: st.DataObject) -> None:
    whole = encode_streamed(message)
    if len(whole) > 1:
        size = data.draw(st.integers(1, len(whole) - 1))
        if not (whole[:1] == b"A" and size == 9):  # the short form of an abort
            with pytest.raises(ProtocolError):
                decode_streamed(whole[:size])
    with pytest.raises(ProtocolError):
        decode_streamed(whole + b"\0")


@given(u32s, CHANGES)
def test_a_message_of_a_piece_is_one_of_version_1(subxid: int, message: Message) -> None:
    assert split_xid(in_piece(subxid, message)) == (subxid, encode(message))


def test_a_message_of_a_piece_without_its_transaction_is_refused() -> None:
    with pytest.raises(ProtocolError):
        split_xid(b"I\0\0")


# --- a server, in both tongues ----------------------------------------------------------------


@dataclass
class Block:
    """What a (sub)transaction does, in order, and whether that is kept."""

    does: list[Message | Block]
    kept: bool = True


@dataclass
class Transaction:
    """A top-level transaction, flattened into what the server sees of it."""

    xid: int
    block: Block
    streamed: bool
    pieces: list[int]  # lengths of its pieces, as far as they say
    actions: list[tuple[int, Message | None]] = field(default_factory=list)
    """(subtransaction, message), or (subtransaction, None): it is rolled back."""

    survives: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        ids = iter(range(self.xid, self.xid + 10_000))
        next(ids)
        self.survives = self._flatten(self.block, self.xid, ids)

    def _flatten(self, block: Block, xid: int, ids: Iterator[int]) -> list[Message]:
        survives: list[Message] = []
        for step in block.does:
            if not isinstance(step, Block):
                self.actions.append((xid, step))
                survives.append(step)
                continue
            first = len(self.actions)
            subxid = next(ids) % 2**32
            inner = self._flatten(step, subxid, ids)
            if step.kept:
                survives += inner
            else:  # children first, as an abort record lists them; those that wrote nothing not
                within = {x for x, _ in self.actions[first:]}
                gone = {x for x, message in self.actions[first:] if message is None}
                base = self.xid
                order = sorted(within - gone, key=lambda x: (x - base) % 2**32)
                own = [subxid] if subxid in order else []
                rest = [x for x in order if x != subxid]
                self.actions += [(x, None) for x in rest + own]
        return survives


def small_message(kind: str, number: int) -> Message:
    """A message that can be told from others of its kind."""
    text = str(number).encode()
    made: dict[str, Message] = {
        "insert": Insert(number, [text]),
        "update": Update(number, "K", [text], [text, None]),
        "delete": Delete(number, "K", [text]),
        "truncate": Truncate((number,), cascade=False, restart_identity=False),
        "relation": Relation(number, "s", "t", "d", ()),
        "message": LogicalMessage(transactional=True, lsn=number, prefix="app", content=text),
        "event": LogicalMessage(
            transactional=True, lsn=number, prefix=emission.PREFIX, content=text
        ),
    }
    return made[kind]


SMALL: Final = st.builds(
    small_message,
    st.sampled_from(["insert", "event", "update", "delete", "truncate", "relation", "message"]),
    st.integers(0, 99),
)


def blocks() -> st.SearchStrategy[Block]:
    leaf = st.builds(Block, st.lists(SMALL, max_size=3), st.booleans())
    return st.recursive(
        leaf,
        lambda inner: st.builds(Block, st.lists(SMALL | inner, max_size=4), st.booleans()),
        max_leaves=8,
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Transaction], list[int]]:
    """Transactions, and whose turn it is at each step."""
    count = draw(st.integers(1, 4))
    start = draw(st.sampled_from([700, 2**32 - 3]))
    transactions = [
        Transaction(
            (start + 20_000 * number) % 2**32,
            draw(blocks()),
            draw(st.booleans()),
            draw(st.lists(st.integers(1, 3), max_size=3)),
        )
        for number in range(count)
    ]
    steps = sum(len(t.actions) + 1 for t in transactions)
    random = draw(st.randoms())
    return transactions, [random.randrange(count) for _ in range(3 * steps)]


def sent(history: tuple[list[Transaction], list[int]]) -> tuple[list[bytes], list[bytes]]:
    """What the server sends by protocol 1, and in pieces."""
    transactions, turns = history
    plain: list[bytes] = []
    streamed: list[bytes] = []
    done = dict.fromkeys(range(len(transactions)), 0)
    ended: set[int] = set()
    lsn = 1000
    rest = [turn for turn, t in enumerate(transactions) for _ in range(len(t.actions) + 1)]
    for turn in [*turns, *rest]:
        transaction = transactions[turn]
        if turn in ended:
            continue
        position, actions = done[turn], transaction.actions
        if position < len(actions):
            pieces = transaction.pieces
            size = pieces[position % len(pieces)] if pieces else len(actions)
            done[turn] = position + size
            if transaction.streamed:
                streamed += piece(transaction, position, size)
            continue
        ended.add(turn)
        lsn += 100
        xid, kept = transaction.xid, transaction.block.kept
        whole = [
            encode(Begin(lsn, lsn, xid)),
            *map(encode, transaction.survives),
            encode(Commit(0, lsn, lsn + 8, lsn)),
        ]
        if kept:
            plain += whole
        if transaction.streamed and actions:
            end = StreamCommit(xid, 0, lsn, lsn + 8, lsn) if kept else StreamAbort(xid, xid)
            streamed.append(encode_streamed(end))
        elif kept:
            streamed += whole
    assert len(ended) == len(transactions)
    return plain, streamed


def piece(transaction: Transaction, position: int, size: int) -> list[bytes]:
    """Some of a transaction's actions: pieces of rows, with the rollbacks between them."""
    payloads: list[bytes] = []
    is_open, is_first = False, position == 0
    for subxid, message in transaction.actions[position : position + size]:
        if message is not None and not is_open:
            payloads.append(encode_streamed(StreamStart(transaction.xid, is_first)))
            is_open, is_first = True, False
        if message is not None:
            # Whatever subtransaction wrote it, the server gives a logical message the whole's id.
            of = transaction.xid if isinstance(message, LogicalMessage) else subxid
            payloads.append(in_piece(of, message))
            continue
        if is_open:
            payloads.append(encode_streamed(StreamStop()))
            is_open = False
        payloads.append(encode_streamed(StreamAbort(transaction.xid, subxid)))
    if is_open:
        payloads.append(encode_streamed(StreamStop()))
    return payloads


@given(histories(), st.sampled_from([0, 200, 1 << 20]))
def test_pieces_give_what_protocol_1_gives(
    history: tuple[list[Transaction], list[int]], limit_bytes: int
) -> None:
    plain, streamed = sent(history)
    memory = SpoolMemory(limit_bytes)
    transactions = StreamedTransactions(memory)
    came = [out for payload in streamed for out in transactions.feed(payload)]
    # How much of the plain stream may have come: of two alike, one kept and one rolled back, nobody
    # can tell which is which.
    reached = {0}
    for payload in came:
        is_uncertain = payload[:1] == UNCERTAIN
        body = payload[1:] if is_uncertain else payload
        passed = {n + 1 for n in reached if n < len(plain) and plain[n] == body}
        # Kept or rolled back, nobody can tell; or likewise, and nobody wants it.
        may_be_extra = is_uncertain or is_other_message(body)
        reached = passed | (reached if may_be_extra else set())
        assert reached, payload
    assert len(plain) in reached
    assert (memory.transactions, memory.held_bytes, memory.disk_bytes) == (0, 0, 0)


def is_other_message(payload: bytes) -> bool:
    message = decode(payload)
    return isinstance(message, LogicalMessage) and message.prefix != emission.PREFIX


# --- single cases -----------------------------------------------------------------------------


def rows(*numbers: int) -> list[Insert]:
    return [Insert(1, [str(number).encode()]) for number in numbers]


def start(xid: int = 7, *, first: bool = True) -> bytes:
    return encode_streamed(StreamStart(xid, first))


STOP: Final = encode_streamed(StreamStop())


def event(text: bytes) -> bytes:
    """An emitted event in a piece."""
    return in_piece(
        7, LogicalMessage(transactional=True, lsn=1, prefix="conductor.emit", content=text)
    )


def test_an_event_right_before_a_part_that_is_rolled_back_is_uncertain() -> None:
    def row(subxid: int) -> bytes:
        return in_piece(subxid, rows(subxid)[0])

    transactions = StreamedTransactions(SpoolMemory(0))
    stream = [start(), event(b"before"), row(7), event(b"perhaps"), row(9), event(b"gone"), row(9)]
    stream += [STOP, encode_streamed(StreamAbort(7, 9)), start(first=False), event(b"after"), STOP]
    stream += [start(first=False), row(11), STOP, encode_streamed(StreamAbort(7, 11))]
    stream += [start(first=False), row(7), event(b"sure"), STOP]
    stream.append(encode_streamed(StreamCommit(7, 0, 100, 108, 5)))
    came = [out for payload in stream for out in transactions.feed(payload)]
    ends = [payload.rpartition(b"\0")[2][1:] for payload in came if b"M\1" in payload]
    assert ends == [b"before", b"perhaps", b"after", b"sure"]
    assert [payload[:1] for payload in came] == [b"B", b"M", b"I", b"?", b"?", b"I", b"M", b"C"]
    reader = TransactionReader(0)
    for payload in came[:3]:
        reader.feed(payload)
    with pytest.raises(UndecodableMessage, match="a part of the transaction was rolled back"):
        reader.feed(came[3])
    assert reader.ordinal == 0  # nobody knows whether it counts, so it does not


def test_memory_is_bounded_and_the_rest_is_on_disk() -> None:
    memory = SpoolMemory(10_000)
    small, large = Spool(1, memory), Spool(2, memory)
    small.append(1, b"small")
    for number in range(1000):
        large.append(3 + number % 6 if number else 2, bytes(100))
        assert memory.held_bytes <= 10_000
    assert memory.disk_bytes > 90_000
    for subxid in (8, 7, 6, 5, 4, 3):
        large.cut(subxid)  # as when each is a child of the one before: all of it but the first row
    assert list(large.drain()) == [(bytes(100), True, 0)]
    assert list(small.drain()) == [(b"small", True, 0)]
    assert (memory.held_bytes, memory.disk_bytes) == (0, 0)


def test_a_part_is_rolled_back_in_few_steps_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(7, SpoolMemory(1000))
    spool.append(7, b"Ifirst")
    for _ in range(3000):
        spool.append(9, b"Igone")
    reads: list[int] = []

    def read(descriptor: int, size: int, offset: int) -> bytes:
        reads.append(offset)
        return pread(descriptor, size, offset)

    pread = os.pread
    monkeypatch.setattr(os, "pread", read)
    spool.cut(9)
    assert len(reads) < 10
    assert list(spool.drain()) == [(b"Ifirst", True, 0)]


def test_nothing_is_kept_in_memory_of_savepoints_however_many() -> None:
    """An event before each of ten thousand parts that are rolled back: uncertain, one by one."""
    memory = SpoolMemory(0)
    spool = Spool(7, memory)
    spool.append(7, b"Irow")
    tracemalloc.start()
    for number in range(10_000):
        spool.append(7, b"Mevent")
        spool.append(8 + number, b"Igone")
        spool.cut(8 + number)
        spool.append(7, b"Irow")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000
    came = list(spool.drain())
    assert len(came) == 20_001
    assert {certain for message, certain, _ in came if message == b"Mevent"} == {False}
    assert {certain for message, certain, _ in came if message == b"Irow"} == {True}


def described(name: str) -> Relation:
    return Relation(1, "s", name, "d", ())


def relations_of(payloads: list[bytes]) -> list[str]:
    """As what each row that comes is read: the table's name by then."""
    reader = TransactionReader(0)
    names = []
    for payload in payloads:
        change = reader.feed(payload)
        if isinstance(change, Insert):
            names.append(reader.relations.get(change.relation_oid).name)
    return names


def whole(*messages: Message, lsn: int) -> list[bytes]:
    """A transaction that comes at its commit."""
    return [encode(m) for m in (Begin(lsn, 0, lsn), *messages, Commit(0, lsn, lsn + 8, 0))]


def test_rows_are_read_as_they_were_described_and_no_newer_description_is_lost() -> None:
    (row,) = rows(1)
    stream = [
        *whole(described("first"), row, lsn=100),
        start(7),
        in_piece(7, described("first")),
        in_piece(7, row),
        STOP,
        start(9),  # described before the change of shape, committed after that of the other
        in_piece(9, described("first")),
        in_piece(9, row),
        STOP,
        *whole(described("second"), row, lsn=200),
        start(11),
        in_piece(11, described("third")),
        in_piece(11, row),
        STOP,
        encode_streamed(StreamCommit(7, 0, 300, 308, 5)),
        *whole(row, lsn=400),
        encode_streamed(StreamCommit(11, 0, 500, 508, 5)),
        *whole(row, lsn=600),
        encode_streamed(StreamCommit(9, 0, 700, 708, 5)),
        *whole(row, lsn=800),
    ]
    transactions = StreamedTransactions(SpoolMemory(0))
    came = [out for payload in stream for out in transactions.feed(payload)]
    assert relations_of(came) == [
        *("first", "second"),  # whole
        *("first", "second"),  # in pieces, and what follows
        *("third", "third"),
        *("first", "third"),
    ]


def test_what_is_described_in_a_part_that_is_rolled_back_is_nothing_to_others() -> None:
    (row,) = rows(1)
    stream = [
        *whole(described("first"), row, lsn=100),
        start(7),
        in_piece(7, described("first")),
        in_piece(7, row),
        in_piece(8, described("renamed")),
        in_piece(8, row),
        STOP,
        encode_streamed(StreamAbort(7, 8)),
        encode_streamed(StreamCommit(7, 0, 300, 308, 5)),
        *whole(row, lsn=400),
    ]
    transactions = StreamedTransactions(SpoolMemory(0))
    came = [out for payload in stream for out in transactions.feed(payload)]
    assert relations_of(came) == ["first", "first", "first"]


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    spool = Spool(7, SpoolMemory(10))
    with pytest.raises(SpoolFailed, match="transaction 7 cannot be kept"):
        spool.append(7, bytes(100))


def test_no_folder_that_can_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    spool = Spool(7, SpoolMemory(10))
    with pytest.raises(SpoolFailed, match="cannot be kept: No usable"):
        spool.append(7, bytes(100))


def test_a_message_larger_than_memory_allows_comes_whole() -> None:
    memory = SpoolMemory(1000)
    spool = Spool(1, memory)
    messages = [b"a", bytes(3 << 20), b"b", bytes(1 << 20)]
    for message in messages:
        spool.append(1, message)
    spool.append(5, bytes(2 << 20))
    spool.cut(5)
    assert [message for message, _, _ in spool.drain()] == messages


@pytest.mark.parametrize(
    "payloads",
    [
        [start(), start(8)],
        [start(first=False)],
        [start(), STOP, start()],
        [encode_streamed(StreamCommit(7, 0, 1, 2, 3))],
    ],
)
def test_pieces_out_of_order_are_refused(payloads: list[bytes]) -> None:
    transactions = StreamedTransactions(SpoolMemory(1 << 20))
    with pytest.raises(ProtocolError):
        deque(chain.from_iterable(map(transactions.feed, payloads)))


def test_a_rollback_of_what_was_never_sent_is_nothing() -> None:
    transactions = StreamedTransactions(SpoolMemory(1 << 20))
    assert list(transactions.feed(encode_streamed(StreamAbort(7, 7)))) == []


class Frames:
    """A stream that has a list of frames, and then no more."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames = frames
        self.reads = 0

    async def read(self, limit: int, limit_bytes: int) -> list[bytes]:
        assert limit_bytes > 0
        self.reads += 1
        taken, self.frames = self.frames[:limit], self.frames[limit:]
        if not taken:
            raise EOFError
        return taken

    async def send_status(
        self, write_lsn: int, flush_lsn: int, apply_lsn: int, *, reply_requested: bool = False
    ) -> None:
        raise AssertionError("no status is due", write_lsn, flush_lsn, apply_lsn, reply_requested)


class Counts:
    transactions = 0

    def spooled(self, *, transactions: int, memory_bytes: int, disk_bytes: int) -> None:
        self.transactions = max(self.transactions, transactions)
        assert memory_bytes + disk_bytes >= 0


def test_a_large_transaction_is_handed_on_within_the_limits_of_a_read() -> None:
    header = b"w" + bytes(XLOG_DATA_HEADER_SIZE - 1)
    inserts = rows(*range(1000))
    pieces = [start(), *(in_piece(7, row) for row in inserts), STOP]
    pieces.append(encode_streamed(StreamCommit(7, 0, 100, 108, 5)))
    beat = keepalive(wal_end=1, sent_at_us=0)
    counts = Counts()
    stream = StreamedStream(
        Frames([*(header + p for p in pieces), beat]), counts, SpoolMemory(5000)
    )

    async def read_all() -> list[list[bytes]]:
        found = []
        try:
            while True:
                found.append(await stream.read(64, 1000))
        except EOFError:
            return found

    reads = asyncio.run(read_all())
    assert max(map(len, reads)) <= 64
    assert max(sum(len(frame) - XLOG_DATA_HEADER_SIZE for frame in read) for read in reads) < 1100
    frames = [frame for read in reads for frame in read]
    whole: list[Message] = [Begin(100, 5, 7), *inserts, Commit(0, 100, 108, 5)]
    expected = [encode(message) for message in whole]
    assert [frame[XLOG_DATA_HEADER_SIZE:] for frame in frames[:-1]] == expected
    assert frames[-1] == beat
    assert counts.transactions == 1
