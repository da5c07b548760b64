import math
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cdc.progress import IDLE_DISTANCE_BYTES, IDLE_INTERVAL_S, Progress

steps: Final = st.integers(1, 1000)


def test_only_durable_commits_are_acknowledgeable() -> None:
    progress = Progress(routed_lsn=100, acknowledged_lsn=100)
    progress.transaction_started()
    progress.transaction_ended(200)
    assert progress.outstanding
    progress.committed(200, durable=False)
    assert (progress.routed_lsn, progress.durable_lsn) == (200, 100)
    assert progress.acknowledgeable() == 100
    assert progress.outstanding
    progress.committed(200, durable=True)
    assert progress.acknowledgeable() == progress.durable_lsn == 200
    assert not progress.outstanding


def test_a_session_starts_at_the_higher_of_both_positions() -> None:
    assert Progress(100, 300).acknowledgeable() == 300
    assert Progress(300, 100).acknowledgeable() == 300
    assert not Progress(100, 300).outstanding


def test_an_idle_position_counts_once_it_is_stored() -> None:
    progress = Progress(100, 100)
    assert progress.idle_lsn_to_store(0.0) is None
    progress.keepalive(500)
    assert progress.acknowledgeable() == 100
    assert progress.idle_lsn_to_store(0.0) == 500
    progress.idle_stored(500, 0.0)
    assert progress.acknowledgeable() == 500
    assert progress.durable_lsn == 100


def test_keepalives_mean_nothing_while_work_is_outstanding() -> None:
    progress = Progress(100, 100)
    progress.transaction_started()  # its commit record may start at 100: the LSN tells nothing
    progress.keepalive(500)
    assert progress.idle_lsn_to_store(math.inf) is None
    progress.transaction_ended(200)
    progress.keepalive(500)
    progress.committed(200, durable=False)
    progress.keepalive(500)
    assert progress.idle_lsn_to_store(math.inf) is None
    progress.committed(200, durable=True)
    progress.keepalive(500)
    assert progress.idle_lsn_to_store(math.inf) == 500


def test_standalone_messages_are_outstanding_too() -> None:
    progress = Progress(100, 100)
    progress.received(150)
    assert progress.outstanding
    progress.committed(150, durable=True)
    assert progress.acknowledgeable() == 150


def test_idle_positions_are_stored_rarely() -> None:
    progress = Progress(0, 0)
    progress.keepalive(1)
    progress.idle_stored(1, 1000.0)
    progress.keepalive(2)
    assert progress.idle_lsn_to_store(1000.0 + IDLE_INTERVAL_S - 0.1) is None
    assert progress.idle_lsn_to_store(1000.0 + IDLE_INTERVAL_S) == 2
    progress.keepalive(IDLE_DISTANCE_BYTES)
    assert progress.idle_lsn_to_store(1000.1) is None
    progress.keepalive(IDLE_DISTANCE_BYTES + 1)
    assert progress.idle_lsn_to_store(1000.1) == IDLE_DISTANCE_BYTES + 1


def test_a_position_that_does_not_fit_is_a_bug() -> None:
    progress = Progress(100, 100)
    with pytest.raises(ValueError, match="committed 0/65, which is not between 0/64 and 0/64"):
        progress.committed(101, durable=True)
    with pytest.raises(ValueError, match="committed 0/63"):
        progress.committed(99, durable=True)


@given(steps, steps)
def test_nothing_moves_back(first: int, second: int) -> None:
    progress = Progress(first, second)
    progress.received(1)
    progress.keepalive(1)
    progress.idle_stored(1, 0.0)
    assert progress.acknowledgeable() == max(first, second)
    assert progress.received_lsn == first


class Session(RuleBasedStateMachine):
    """A server whose transactions follow each other without a gap, and a sink that crashes never.

    `undurable` is what would be lost: the ends of everything sent that no durable commit covers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress(100, 100)
        self.wal_end = 100
        self.undurable: list[int] = []
        self.committed_lsn = 100
        self.open_end: int | None = None
        self.now_s = 0.0
        self.acknowledged_lsn = 100

    @precondition(lambda self: self.open_end is None)
    @rule(size=steps)
    def begin(self, size: int) -> None:
        self.open_end = self.wal_end + size
        self.progress.transaction_started()

    @precondition(lambda self: self.open_end is not None)
    @rule()
    def commit(self) -> None:
        assert self.open_end is not None
        self.progress.transaction_ended(self.open_end)
        self.undurable.append(self.open_end)
        self.wal_end, self.open_end = self.open_end, None

    @precondition(lambda self: self.open_end is None)
    @rule(size=steps)
    def message(self, size: int) -> None:
        self.wal_end += size
        self.progress.received(self.wal_end)
        self.undurable.append(self.wal_end)

    @rule(unpublished=st.integers(0, 1000))
    def keepalive(self, unpublished: int) -> None:
        if self.open_end is None:
            self.wal_end += unpublished
            self.progress.keepalive(self.wal_end)
        else:
            self.progress.keepalive(self.open_end + unpublished)

    @precondition(lambda self: any(end > self.committed_lsn for end in self.undurable))
    @rule(durable=st.booleans(), data=st.data())
    def sink(self, durable: bool, data: st.DataObject) -> None:
        ends = [end for end in self.undurable if end > self.committed_lsn]
        self.committed_lsn = data.draw(st.sampled_from(ends))
        self.progress.committed(self.committed_lsn, durable=durable)
        if durable:
            self.undurable = [end for end in self.undurable if end > self.committed_lsn]

    @rule(pause_s=st.sampled_from([0.0, 31.0]))
    def store_idle(self, pause_s: float) -> None:
        self.now_s += pause_s
        lsn = self.progress.idle_lsn_to_store(self.now_s)
        if lsn is not None:
            self.progress.idle_stored(lsn, self.now_s)

    @invariant()
    def acknowledges_only_what_is_durable(self) -> None:
        lsn = self.progress.acknowledgeable()
        lost = [*self.undurable] + ([] if self.open_end is None else [self.open_end])
        assert all(lsn < end for end in lost)
        assert lsn >= self.acknowledged_lsn
        assert self.progress.outstanding == bool(lost)
        self.acknowledged_lsn = lsn


TestSession = Session.TestCase
