"""Arbitrary messages, as any server could send them."""

from typing import Final

from hypothesis import strategies as st

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
    Origin,
    Relation,
    Row,
    Truncate,
    Type,
    Update,
)

u32s: Final = st.integers(0, 2**32 - 1)
lsns: Final = st.integers(0, 2**64 - 1)
times_us: Final = st.integers(-(2**63), 2**63 - 1).map(lambda us: us + POSTGRES_EPOCH_US)
names: Final = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
rows: Final[st.SearchStrategy[Row]] = st.lists(
    st.none() | st.just(UNCHANGED) | st.binary(max_size=300), max_size=8
)
columns: Final = st.builds(Column, names, u32s, st.integers(-(2**31), 2**31 - 1), st.booleans())
relations: Final = st.builds(
    Relation,
    u32s,
    names,
    names,
    st.sampled_from("dnfi"),
    st.lists(columns, max_size=6).map(tuple),
)
inserts: Final = st.builds(Insert, u32s, rows)
updates: Final = st.builds(Update, u32s, st.none(), st.none(), rows) | st.builds(
    Update, u32s, st.sampled_from("KO"), rows, rows
)
deletes: Final = st.builds(Delete, u32s, st.sampled_from("KO"), rows)
truncates: Final = st.builds(
    Truncate, st.lists(u32s, max_size=5).map(tuple), st.booleans(), st.booleans()
)
logical_messages: Final = st.builds(
    LogicalMessage, st.booleans(), lsns, names, st.binary(max_size=50)
)

messages: Final[st.SearchStrategy[Message]] = st.one_of(
    st.builds(Begin, lsns, times_us, u32s),
    st.builds(Commit, st.integers(0, 255), lsns, lsns, times_us),
    st.builds(Origin, lsns, names),
    relations,
    st.builds(Type, u32s, names, names),
    inserts,
    updates,
    deletes,
    truncates,
    logical_messages,
)
