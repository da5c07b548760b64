"""What is routed and not yet written: whole transactions, and what has come of the next.

The reader fills it. The writer takes the whole transactions, or, when one alone outgrows the
memory, a piece of it. This module must not write anything, nor wait.
"""

import time
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from cdc.routing import Routed
from cdc.sink import Batch, Stamp

if TYPE_CHECKING:
    from opentelemetry.trace import Span

PENDING_LIMIT_BYTES: Final = 4 << 20
"""Jobs and dead letters held in memory: beyond it the reader waits for the writer."""

_OVERHEAD_BYTES: Final = 128  # of the objects that hold a job

_payload_of = attrgetter("payload")


@dataclass(slots=True)
class Pending:
    """`cut` of its jobs belong to whole transactions, the last of which ends at `end_lsn`.

    `dead_cut` and `wait_cut` say the same of dead letters and of what jobs wait for; `since_s` is
    when the first of them was whole, by the monotonic clock; `commit_time_us` when the oldest that
    gave a job was committed, `spans` are theirs.
    """

    routed: Routed = field(default_factory=Routed)
    stamps: list[Stamp] = field(default_factory=list)
    size_bytes: int = 0
    cut: int = 0
    dead_cut: int = 0
    wait_cut: int = 0
    end_lsn: int | None = None
    since_s: float = 0.0
    commit_time_us: int = 0
    spans: list["Span"] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        """Whether the reader has to wait, and a piece is to be written if nothing is whole."""
        return self.size_bytes >= PENDING_LIMIT_BYTES

    @property
    def has_whole(self) -> bool:
        """Whether a whole transaction has left more than its position."""
        return bool(self.cut or self.dead_cut or self.wait_cut or self.stamps)

    def grow(self, since: tuple[int, int, int]) -> None:
        """Count in what was routed after `Routed.lengths` were these."""
        self.size_bytes += _held_bytes(self.routed, since)

    def cut_at(self, end_lsn: int) -> None:
        """Note that everything routed so far belongs to whole transactions."""
        routed = self.routed
        self.cut = len(routed.specs)
        self.dead_cut = len(routed.dead_letters)
        self.wait_cut = len(routed.waits)
        if self.end_lsn is None:
            self.since_s = time.monotonic()
        self.end_lsn = end_lsn

    def take(self) -> tuple[Batch, "Pending"]:
        """Return the whole transactions, or else the piece of a large one, and what is left."""
        routed = self.routed
        if self.end_lsn is None:
            return Batch(routed.specs, routed.dead_letters, waits=routed.waits), Pending()
        rest = Routed(
            routed.specs[self.cut :],
            routed.dead_letters[self.dead_cut :],
            routed.waits[self.wait_cut :],
        )
        batch = Batch(
            routed.specs[: self.cut],
            routed.dead_letters[: self.dead_cut],
            self.stamps,
            self.end_lsn,
            routed.waits[: self.wait_cut],
        )
        return batch, Pending(rest, size_bytes=_held_bytes(rest, (0, 0, 0)))


def _held_bytes(routed: Routed, since: tuple[int, int, int]) -> int:
    """Return about how much memory is held by what was routed after the lengths `since`."""
    specs, letters, waits = since
    jobs = routed.specs[specs:]
    jobs += (spec for _, spec in routed.waits[waits:])
    size = sum(map(len, map(_payload_of, jobs))) + _OVERHEAD_BYTES * len(jobs)
    if len(routed.dead_letters) > letters:
        for letter in routed.dead_letters[letters:]:
            size += len(letter.raw) + len(letter.error) + 2 * _OVERHEAD_BYTES
    return size
