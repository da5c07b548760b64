from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import ProtocolError, UndecodableMessage
from cdc.transactions import ORDINAL_STEP, STANDALONE_ORDINAL, Event, TransactionReader
from cdc.wire.messages import (
    Begin,
    Column,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Message,
    Origin,
    Relation,
    Truncate,
    Type,
    Update,
)

from .pgoutput_encoder import encode
from .strategies import deletes, inserts, logical_messages, truncates, updates

USERS = Relation(1, "shop", "users", "d", (Column("id", 20, -1, is_key=True),))
ROW = Insert(1, [b"1"])
STEP = ORDINAL_STEP


def begin(lsn: int = 100, xid: int = 7) -> Begin:
    return Begin(lsn, 5, xid)


def commit(lsn: int = 100) -> Commit:
    return Commit(0, lsn, lsn + 8, 5)


def within(lsn: int = 90) -> LogicalMessage:
    return LogicalMessage(transactional=True, lsn=lsn, prefix="p", content=b"c")


def alone(lsn: int) -> LogicalMessage:
    return LogicalMessage(transactional=False, lsn=lsn, prefix="p", content=b"c")


def feed(reader: TransactionReader, *messages: Message) -> list[Event | None]:
    return [reader.feed(encode(message)) for message in messages]


@dataclass(slots=True)
class Change:
    xid: int
    commit_lsn: int
    ordinal: int
    event: Event


def changes(reader: TransactionReader, payloads: Iterable[bytes]) -> list[Change]:
    found = []
    for payload in payloads:
        event = reader.feed(payload)
        if event is not None and not isinstance(event, Begin | Commit | Relation):
            found.append(Change(reader.xid, reader.commit_lsn, reader.ordinal, event))
    return found


def test_a_transaction_passes_event_by_event() -> None:
    reader = TransactionReader(0)
    sent: list[Message] = [
        begin(),
        USERS,
        ROW,
        Update(1, None, None, [b"2"]),
        Delete(1, "K", [b"2"]),
    ]
    sent += [Truncate((1, 2), cascade=False, restart_identity=False), within(), commit()]
    assert feed(reader, *sent) == sent
    assert (reader.xid, reader.commit_lsn, reader.commit_time_us) == (7, 100, 5)
    assert reader.relations.get(1).name == "users"


def test_ordinals_count_changes_only() -> None:
    reader = TransactionReader(0)
    feed(reader, begin(), Origin(1, "elsewhere"), USERS, Type(9, "shop", "mood"))
    ordinals = []
    for message in (
        ROW,
        within(),
        USERS,
        Truncate((1, 2, 3), cascade=False, restart_identity=False),
        ROW,
    ):
        feed(reader, message)
        ordinals.append(reader.ordinal)
    assert ordinals == [0, 0, 0, STEP, 2 * STEP]
    feed(reader, commit(), begin(200), ROW)
    assert reader.ordinal == 0


def test_a_message_has_the_ordinal_of_its_place_in_the_log() -> None:
    def event(lsn: int) -> LogicalMessage:
        return LogicalMessage(transactional=True, lsn=lsn, prefix="p", content=b"")

    reader = TransactionReader(0)
    ordinals = []
    feed(reader, begin(500))
    for message in (event(300), ROW, event(400), event(500)):
        feed(reader, message)
        ordinals.append((reader.ordinal, reader.message_ordinal))
    assert ordinals == [(-STEP, -202), (0, -202), (0, -102), (0, -2)]
    assert max(ordinal for _, ordinal in ordinals) < STANDALONE_ORDINAL


def test_rows_of_unwanted_relations_are_counted_but_not_decoded() -> None:
    wanted = {2}
    reader = TransactionReader(0, wanted=wanted)
    feed(reader, begin())
    assert feed(reader, ROW) == [None]
    assert reader.feed(encode(ROW)[:8]) is None
    wanted.add(1)
    assert feed(reader, ROW) == [ROW]
    assert reader.ordinal == 2 * STEP
    reader.wanted = frozenset()
    assert feed(reader, ROW, within()) == [None, within()]


@pytest.mark.parametrize(("routed_lsn", "skipped"), [(99, False), (100, False), (101, True)])
def test_a_transaction_is_skipped_by_the_start_of_its_commit_record(
    routed_lsn: int, skipped: bool
) -> None:
    reader = TransactionReader(routed_lsn)
    truncate = Truncate((1,), cascade=False, restart_identity=False)
    sent: list[Message] = [
        begin(),
        ROW,
        Update(1, None, None, []),
        Delete(1, "K", []),
        truncate,
        within(),
    ]
    events = feed(reader, *sent, commit())
    assert events == ([None] * 7 if skipped else [*sent, commit()])
    assert not reader.in_transaction


def test_a_skipped_transaction_still_describes_its_tables() -> None:
    reader = TransactionReader(1000)
    events = feed(reader, begin(), Origin(1, "o"), Type(9, "", "int4"), USERS, ROW, commit())
    assert events == [None, None, None, USERS, None, None]
    assert reader.relations.get(1).name == "users"


def test_rows_of_a_skipped_transaction_are_not_decoded() -> None:
    reader = TransactionReader(1000)
    feed(reader, begin())
    for broken in (b"I", b"U...", b"D", b"T", b"O", b"M", b"M\x01"):
        assert reader.feed(broken) is None
    feed(reader, commit())
    assert feed(reader, begin(1000)) == [begin(1000)]


def test_a_standalone_message_is_skipped_by_the_end_of_its_record() -> None:
    reader = TransactionReader(100)
    assert feed(reader, alone(99), alone(100), alone(101)) == [None, None, alone(101)]
    feed(reader, begin(50))
    assert feed(reader, within(), alone(100), alone(101)) == [None, None, alone(101)]
    feed(reader, commit(50), begin(200), ROW)
    assert feed(reader, alone(100), alone(101)) == [None, alone(101)]
    assert reader.ordinal == 0


def test_a_standalone_message_cannot_be_mistaken_for_a_change() -> None:
    assert STANDALONE_ORDINAL < 0


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ([], ROW),
        ([], commit()),
        ([], Origin(1, "o")),
        ([], Truncate((), cascade=False, restart_identity=False)),
        ([begin()], begin()),
        ([begin(1)], begin()),
        ([begin(), commit()], ROW),
    ],
)
def test_messages_where_they_cannot_be(before: list[Message], message: Message) -> None:
    reader = TransactionReader(50)
    feed(reader, *before)
    with pytest.raises(ProtocolError, match=r"a message that belongs (in|between) transactions"):
        feed(reader, message)


def test_a_commit_must_fit_its_begin() -> None:
    reader = TransactionReader(0)
    feed(reader, begin(100))
    with pytest.raises(ProtocolError, match="expected commit LSN 0/64, got 0/65"):
        feed(reader, commit(101))


@pytest.mark.parametrize("message", [begin(), USERS, Type(1, "a", "b"), Origin(1, "o"), commit()])
def test_a_broken_frame_of_the_stream_ends_it(message: Message) -> None:
    reader = TransactionReader(0)
    if isinstance(message, Commit | Origin):
        feed(reader, begin())
    with pytest.raises(ProtocolError, match="expected more bytes"):
        reader.feed(encode(message)[:4])


@pytest.mark.parametrize("payload", [b"", b"S", b"X123"])
def test_what_is_no_message_ends_the_stream(payload: bytes) -> None:
    reader = TransactionReader(0)
    with pytest.raises(ProtocolError, match="version 1"):
        reader.feed(payload)
    feed(reader, begin())
    with pytest.raises(ProtocolError, match="version 1"):
        reader.feed(payload)


@given(inserts | updates | deletes | truncates | logical_messages, st.data())
def test_a_broken_change_is_one_dead_letter(message: Message, data: st.DataObject) -> None:
    if isinstance(message, LogicalMessage):
        message.transactional = True
    payload = encode(message)
    cut = data.draw(st.integers(1, len(payload) - 1))
    reader = TransactionReader(0)
    feed(reader, begin(), ROW)
    with pytest.raises(UndecodableMessage) as raised:
        reader.feed(payload[:cut])
    is_message = isinstance(message, LogicalMessage)
    lsn = message.lsn if isinstance(message, LogicalMessage) and cut > 9 else 0
    ordinal = lsn - 100 - 2 if is_message else STEP
    assert (raised.value.commit_lsn, raised.value.ordinal) == (100, ordinal)
    oid = message.relation_oid if isinstance(message, Insert | Update | Delete) else None
    assert raised.value.relation_oid == (oid if cut > 4 else None)
    assert feed(reader, ROW) == [ROW]
    assert reader.ordinal == (STEP if is_message else 2 * STEP)


def test_a_broken_standalone_message_is_a_dead_letter_of_its_own_position() -> None:
    reader = TransactionReader(50)
    for cut, lsn in ((2, 0), (10, 60)):
        with pytest.raises(UndecodableMessage) as raised:
            reader.feed(encode(alone(60))[:cut])
        assert (raised.value.commit_lsn, raised.value.ordinal) == (lsn, STANDALONE_ORDINAL)
    assert reader.feed(encode(alone(50))[:10]) is None


bodies = st.lists(
    inserts | updates | deletes | truncates | st.builds(within, st.integers(1, 99)),
    max_size=4,
)


@given(st.lists(bodies, max_size=5), st.data())
def test_cutting_the_stream_anywhere_loses_and_repeats_nothing(
    transactions: list[list[Message]], data: st.DataObject
) -> None:
    """A commit record may start where the last one ended: the next session must tell them apart."""
    payloads: list[bytes] = []
    for number, body in enumerate(transactions):
        lsn = 100 + 8 * number
        payloads += [encode(m) for m in (begin(lsn, number), *body, commit(lsn))]
    whole = changes(TransactionReader(0), payloads)

    cut = data.draw(st.integers(0, len(payloads)))
    first = TransactionReader(0)
    routed_lsn = 0
    kept: list[Change] = []
    pending: list[Change] = []
    for payload in payloads[:cut]:
        event = first.feed(payload)
        if isinstance(event, Commit):
            routed_lsn = event.end_lsn
            kept += pending
            pending = []
        elif event is not None and not isinstance(event, Begin | Relation):
            pending.append(Change(first.xid, first.commit_lsn, first.ordinal, event))
    assert kept + changes(TransactionReader(routed_lsn), payloads) == whole


def test_what_could_not_be_translated_is_set_aside() -> None:
    broken = b'{"action":"I","xid":7,"lsn":"0/8"'
    reader = TransactionReader(routed_lsn=0)
    reader.feed(encode(Begin(final_lsn=0x10, commit_time_us=0, xid=7)))
    with pytest.raises(UndecodableMessage) as raised:
        reader.feed(broken)
    assert (raised.value.ordinal, raised.value.commit_lsn) == (0, 0x10)
    reader.feed(encode(Commit(0, 0x10, 0x20, 0)))
    with pytest.raises(UndecodableMessage) as raised:
        reader.feed(b'{"action":"M","lsn":"1/A","prefix":')
    assert (raised.value.ordinal, raised.value.commit_lsn) == (STANDALONE_ORDINAL, 0x1_0000_000A)
    with pytest.raises(ProtocolError):
        reader.feed(b'{"action":"M"')


def test_what_could_not_be_translated_is_skipped_with_its_transaction() -> None:
    reader = TransactionReader(routed_lsn=0x20)
    reader.feed(encode(Begin(final_lsn=0x10, commit_time_us=0, xid=7)))
    assert reader.feed(b'{"action":"I"') is None
    reader.feed(encode(Commit(0, 0x10, 0x20, 0)))
    assert reader.feed(b'{"action":"M","lsn":"0/20"') is None
