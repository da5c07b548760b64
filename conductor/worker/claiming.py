"""Where a worker's next claim looks, and when. Pure: positions and times in, ranges out.

Jobs of a task lie in the ready index by rank (minus the priority), run_at and id. A claim starts
at a cursor, the last position claimed in each rank, so that it never walks over the dead entries
of what was claimed before. What may land behind a cursor (late commits, equal times) is found by
looking back: from where the cursor is or two seconds ago, whichever is earlier. (New jobs are due
when they are inserted. A cursor that is further behind than that, with a backlog before it, has
nothing to look back for, and a look back would walk over all that was claimed of one large insert.)
Transactions that take longer are left to a full scan now and then. Ranks without a cursor are
covered whole, so that an urgent job of a rank not seen before is found at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Final

from conductor.store.jobs import Claim, ClaimRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from conductor.store.jobs import ClaimedJob

LOWEST_RANK: Final = -32768
HIGHEST_RANK: Final = 32767
LOOK_BACK_S: Final = 2.0
SHORTEST_POLL_S: Final = 0.05  # half of the longest idle poll that is allowed at first
LONGEST_POLL_S: Final = 1.0
SUSPECTS_INTERVAL_S: Final = 0.25
MAX_CLAIM: Final = 1000
LANES_LOOK_BACK: Final = 2000
"""Calls of lanes, by number: what is walked over again by each look."""
MAX_CURSORS: Final = 16  # a task; more ranks than that share the ranges between them

Position = tuple[datetime, int]


class Scan(Enum):
    """How far back a claim looks."""

    CURSOR = "cursor"
    LOOK_BACK = "look back"
    FULL = "full"


class Cursors:
    """The positions a worker has reached, by task and rank."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self._positions: dict[str, dict[int, Position]] = {task: {} for task in sorted(tasks)}

    def ranges(self, scan: Scan) -> list[ClaimRange]:
        """Return what a claim of this kind has to look at."""
        ranges: list[ClaimRange] = []
        for task, positions in self._positions.items():
            if scan is Scan.FULL:
                ranges.append(ClaimRange(task, LOWEST_RANK, None, 0, HIGHEST_RANK))
                continue
            first = LOWEST_RANK
            for rank in sorted(positions):
                if first < rank:
                    ranges.append(ClaimRange(task, first, None, 0, rank - 1))
                run_at, id_ = positions[rank]
                ranges.append(ClaimRange(task, rank, run_at, id_, rank))
                first = rank + 1
            if first <= HIGHEST_RANK:
                ranges.append(ClaimRange(task, first, None, 0, HIGHEST_RANK))
        return ranges

    def advance(self, jobs: Sequence[ClaimedJob], *, more: bool) -> None:
        """Move to what was claimed, given in claim order.

        With ``more`` to come (the claim came back full) a cursor also moves back: further jobs may
        lie right behind what a look back or a full scan has found.
        """
        reached = {
            (job.info.task, -job.info.priority): (job.info.run_at, job.info.id) for job in jobs
        }
        for (task, rank), position in reached.items():
            positions = self._positions[task]
            before = positions.pop(rank, None)  # to be the most recent one
            positions[rank] = position if more or before is None else max(before, position)
            if len(positions) > MAX_CURSORS:
                del positions[next(iter(positions))]


@dataclass(slots=True)
class Pace:
    """When something is due again: after a share of its own cost, within limits."""

    shortest_s: float
    longest_s: float
    factor: float = 20.0  # at most a twentieth of the time
    due_s: float = 0.0

    def ran(self, now_s: float, duration_s: float) -> None:
        """Take note of a run that took this long."""
        wait_s = self.factor * duration_s
        self.due_s = now_s + min(max(wait_s, self.shortest_s), self.longest_s)


class ScanSchedule:
    """Which kind of scan is due. Times are seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._look_back = Pace(0.0, 0.25)
        self._full = Pace(1.0, float("inf"))

    def due(self, now_s: float) -> Scan:
        """Return the widest scan that is due."""
        if now_s >= self._full.due_s:
            return Scan.FULL
        return Scan.LOOK_BACK if now_s >= self._look_back.due_s else Scan.CURSOR

    def ran(self, scan: Scan, now_s: float, duration_s: float) -> None:
        """Take note of a scan that took this long."""
        if scan is Scan.CURSOR:
            return
        self._look_back.ran(now_s, duration_s)
        if scan is Scan.FULL:
            self._full.ran(now_s, duration_s)


class Polling:
    """When to ask for jobs: at once while there are some, then less and less often.

    A hint asks at once. Times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._interval_s = SHORTEST_POLL_S
        self.due_s = 0.0

    def found(self, now_s: float, *, busy: bool, more: bool) -> None:
        """Take note of a claim: whether the worker is busy, and whether there are more jobs."""
        self._interval_s = SHORTEST_POLL_S if busy else min(self._interval_s * 2, LONGEST_POLL_S)
        self.due_s = now_s if more else now_s + self._interval_s

    def hint(self) -> None:
        """Take note that there are new jobs."""
        self._interval_s, self.due_s = SHORTEST_POLL_S, 0.0


@dataclass(slots=True)
class PlannedClaim:
    """A claim to be sent. ``riding``: it goes with outcomes that are sent anyway."""

    claim: Claim
    scan: Scan
    riding: bool

    @property
    def alone(self) -> bool:
        """Whether it is sent without outcomes, because what it costs decides when it is due."""
        return self.scan is not Scan.CURSOR


class Claiming:
    """When a worker claims, what, and how much."""

    def __init__(
        self,
        queue: str,
        tasks: Iterable[str],
        codes: str = "{}",
        variants: str = "{}",
        *,
        has_lanes: bool = False,
    ) -> None:
        self._codes, self._variants = codes, variants
        self._lanes_after = 0 if has_lanes else None
        self.polling = Polling()
        self._queue, self._tasks = queue, sorted(tasks)
        self._cursors = Cursors(self._tasks)
        self._scans = ScanSchedule()
        self._suspects_due_s = 0.0

    def plan(
        self, now_s: float, *, room: int, riding: bool, suspect_crashes: int
    ) -> PlannedClaim | None:
        """Return the next claim, if there is room for jobs and it is time.

        ``suspect_crashes``: the most crashes a suspect may have.
        """
        if room <= 0 or not (riding or now_s >= self.polling.due_s):
            return None
        scan = self._scans.due(now_s)
        claim = Claim(
            self._queue,
            self._tasks,
            self._cursors.ranges(scan),
            min(room, MAX_CLAIM),
            LOOK_BACK_S if scan is Scan.LOOK_BACK else 0.0,
            suspect_crashes if now_s >= self._suspects_due_s else None,
            self._codes,
            self._variants,
            self._lanes_from(scan),
        )
        return PlannedClaim(claim, scan, riding)

    def claimed(
        self,
        planned: PlannedClaim,
        jobs: list[ClaimedJob],
        suspects: list[ClaimedJob],
        *,
        now_s: float,
        duration_s: float,
        lanes_left: bool = False,
        lanes_last: int | None = None,
    ) -> None:
        """Take note of what a claim came back with; puts the jobs in claim order.

        ``lanes_left``: there are lanes that it has not looked at yet; ``lanes_last``: the position
        of the last call that it has.
        """
        jobs.sort(key=_order)
        more = len(jobs) >= planned.claim.limit
        self._cursors.advance(jobs, more=more)
        self._scans.ran(planned.scan, now_s, duration_s)
        if self._lanes_after is not None and lanes_last is not None:
            self._lanes_after = max(self._lanes_after, lanes_last)
        busy = bool(jobs or suspects) or planned.riding
        self.polling.found(now_s, busy=busy, more=more or bool(suspects) or lanes_left)
        if planned.claim.suspect_crashes is not None and not suspects:
            self._suspects_due_s = now_s + SUSPECTS_INTERVAL_S

    def _lanes_from(self, scan: Scan) -> int | None:
        """Return after which call of a lane to look: what was committed late stands before others.

        Calls are numbered when they are written; a full scan finds even what came very late.
        """
        if self._lanes_after is None:
            return None
        return 0 if scan is Scan.FULL else max(0, self._lanes_after - LANES_LOOK_BACK)


def _order(job: ClaimedJob) -> tuple[int, datetime, int]:
    info = job.info
    return -info.priority, info.run_at, info.id
