from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from conductor.job import JobInfo
from conductor.store.jobs import ClaimedJob, ClaimRange
from conductor.worker.claiming import (
    HIGHEST_RANK,
    LANES_LOOK_BACK,
    LOOK_BACK_S,
    LOWEST_RANK,
    MAX_CLAIM,
    MAX_CURSORS,
    Claiming,
    Cursors,
    Polling,
    Scan,
    ScanSchedule,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
S = timedelta(seconds=1)


def job(id_: int, *, task: str = "t", rank: int = 0, at: datetime = NOW) -> ClaimedJob:
    info = JobInfo(
        id_, task, "q", "invoke", 0, 0, 1, -rank, None, at, at, None, None, None, f"job:{id_}"
    )
    return ClaimedJob(info, b"{}", 0.0, 0.0)


def test_at_first_everything_is_looked_at() -> None:
    for scan in Scan:
        assert Cursors(["b", "a"]).ranges(scan) == [
            ClaimRange("a", LOWEST_RANK, None, 0, HIGHEST_RANK),
            ClaimRange("b", LOWEST_RANK, None, 0, HIGHEST_RANK),
        ]


def test_a_known_rank_starts_at_its_cursor_and_the_others_are_open() -> None:
    cursors = Cursors(["t"])
    cursors.advance([job(7), job(9, rank=5)], more=False)
    assert cursors.ranges(Scan.CURSOR) == [
        ClaimRange("t", LOWEST_RANK, None, 0, -1),
        ClaimRange("t", 0, NOW, 7, 0),
        ClaimRange("t", 1, None, 0, 4),
        ClaimRange("t", 5, NOW, 9, 5),
        ClaimRange("t", 6, None, 0, HIGHEST_RANK),
    ]
    assert cursors.ranges(Scan.LOOK_BACK) == cursors.ranges(Scan.CURSOR)
    assert cursors.ranges(Scan.FULL) == [ClaimRange("t", LOWEST_RANK, None, 0, HIGHEST_RANK)]


def test_a_cursor_goes_back_only_when_more_is_to_come() -> None:
    cursors = Cursors(["t"])
    cursors.advance([job(7, at=NOW)], more=False)
    cursors.advance([job(3, at=NOW - S)], more=False)
    assert cursors.ranges(Scan.CURSOR)[1].id == 7
    cursors.advance([job(3, at=NOW - S)], more=True)
    assert cursors.ranges(Scan.CURSOR)[1].id == 3
    cursors.advance([job(4, at=NOW - S)], more=True)
    assert cursors.ranges(Scan.CURSOR)[1] == ClaimRange("t", 0, NOW - S, 4, 0)


ranks = st.lists(st.integers(LOWEST_RANK, HIGHEST_RANK), max_size=40)


@given(ranks)
def test_every_rank_is_covered_once(seen: list[int]) -> None:
    cursors = Cursors(["t"])
    for id_, rank in enumerate(seen):
        cursors.advance([job(id_, rank=rank)], more=False)
    ranges = cursors.ranges(Scan.CURSOR)
    assert ranges[0].rank == LOWEST_RANK
    assert ranges[-1].last_rank == HIGHEST_RANK
    assert all(a.last_rank + 1 == b.rank for a, b in pairwise(ranges))
    assert sum(r.run_at is not None for r in ranges) == min(len(set(seen)), MAX_CURSORS)


def test_scans_cost_a_twentieth_of_the_time() -> None:
    scans = ScanSchedule()
    assert scans.due(0.0) is Scan.FULL
    scans.ran(Scan.FULL, 0.1, 0.1)
    assert scans.due(0.34) is Scan.CURSOR
    assert scans.due(0.36) is Scan.LOOK_BACK  # at least every 250 ms
    scans.ran(Scan.LOOK_BACK, 0.36, 0.001)
    assert scans.due(0.37) is Scan.CURSOR
    assert scans.due(0.381) is Scan.LOOK_BACK  # more often while it is cheap
    assert scans.due(2.09) is Scan.LOOK_BACK
    assert scans.due(2.11) is Scan.FULL  # at most a twentieth of the time
    scans.ran(Scan.FULL, 3.0, 0.001)
    assert scans.due(3.99) is Scan.LOOK_BACK  # and at most once a second
    assert scans.due(4.01) is Scan.FULL


def test_a_cursor_scan_changes_nothing() -> None:
    scans = ScanSchedule()
    scans.ran(Scan.CURSOR, 0.0, 5.0)
    assert scans.due(0.0) is Scan.FULL


def test_idle_polls_grow_apart_up_to_a_second() -> None:
    polling, now, delays = Polling(), 0.0, []
    for _ in range(8):
        polling.found(now, busy=False, more=False)
        delays.append(round(polling.due_s - now, 3))
        now = polling.due_s
    assert delays[0] == 0.1
    assert delays == sorted(delays)
    assert delays[-1] == 1.0
    polling.hint()
    assert polling.due_s <= now
    polling.found(now, busy=False, more=False)
    assert round(polling.due_s - now, 3) == 0.1


def test_while_there_are_jobs_the_next_claim_is_due_at_once() -> None:
    polling = Polling()
    polling.found(5.0, busy=True, more=True)
    assert polling.due_s == 5.0
    polling.found(5.0, busy=True, more=False)
    assert polling.due_s < 5.1


def test_a_claim_is_planned_when_there_is_room_and_it_is_time() -> None:
    claiming = Claiming("q", ["t"])
    assert claiming.plan(1.0, room=0, riding=True, suspect_crashes=2) is None
    planned = claiming.plan(1.0, room=5000, riding=False, suspect_crashes=2)
    assert planned is not None
    assert planned.alone
    assert (planned.claim.limit, planned.claim.suspect_crashes) == (MAX_CLAIM, 2)
    claiming.claimed(planned, [], [], now_s=1.0, duration_s=0.001)
    assert claiming.plan(1.01, room=10, riding=False, suspect_crashes=2) is None
    planned = claiming.plan(1.01, room=10, riding=True, suspect_crashes=2)
    assert planned is not None
    assert not planned.alone
    assert planned.claim.suspect_crashes is None
    assert planned.claim.look_back_s == 0.0
    planned = claiming.plan(1.3, room=10, riding=True, suspect_crashes=1)
    assert planned is not None
    assert (planned.alone, planned.claim.look_back_s) == (True, LOOK_BACK_S)
    assert planned.claim.suspect_crashes == 1


def test_lanes_that_are_left_are_looked_at_at_once() -> None:
    claiming = Claiming("q", ["t"], has_lanes=True)
    planned = claiming.plan(1.0, room=10, riding=False, suspect_crashes=2)
    assert planned is not None
    claiming.claimed(planned, [], [], now_s=1.0, duration_s=0.001, lanes_left=True)
    assert claiming.plan(1.0, room=10, riding=False, suspect_crashes=2) is not None


def test_calls_of_lanes_are_looked_at_from_where_the_last_look_ended() -> None:
    claiming = Claiming("q", ["t"], has_lanes=True)
    looks = []
    for now_s, last in ((1.0, 10_000), (1.1, None), (1.2, 9000), (1.3, 12_000), (2.5, None)):
        planned = claiming.plan(now_s, room=10, riding=True, suspect_crashes=2)
        assert planned is not None
        looks.append((planned.scan, planned.claim.lanes_after))
        claiming.claimed(planned, [], [], now_s=now_s, duration_s=0.001, lanes_last=last)
    scans = [scan for scan, _ in looks]
    assert (scans[0], scans[-1]) == (Scan.FULL, Scan.FULL)
    afters = [after for _, after in looks]
    assert afters == [0, *(10_000 - LANES_LOOK_BACK,) * 3, 0]
    claiming = Claiming("q", ["t"])
    planned = claiming.plan(1.0, room=10, riding=True, suspect_crashes=2)
    assert planned is not None
    assert planned.claim.lanes_after is None


def test_claimed_jobs_come_in_claim_order() -> None:
    claiming = Claiming("q", ["t"])
    planned = claiming.plan(1.0, room=10, riding=False, suspect_crashes=2)
    assert planned is not None
    jobs = [job(3), job(1, rank=4), job(2), job(9, at=NOW - S), job(5, rank=-4)]
    claiming.claimed(planned, jobs, [], now_s=1.0, duration_s=0.001)
    assert [one.info.id for one in jobs] == [5, 9, 2, 3, 1]
