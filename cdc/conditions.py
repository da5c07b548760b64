"""Whether slot, server and progress fit: every way in which they can disagree is a condition.

Each condition is a `CdcError` of its own, by which an operator and a policy can tell it from the
others. Pure: what was read in, the first condition that stands against streaming out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cdc.catalog import Slot
from cdc.errors import (
    CdcError,
    ServerBehind,
    SlotAhead,
    SlotForeign,
    SlotLost,
    SlotMissing,
    SlotTwoPhase,
    SourceTaken,
    StandbySlotsWaiting,
    SystemChanged,
    TimelineSwitched,
)
from cdc.lsn import Lsn
from cdc.source import PGOUTPUT, SystemIdentity


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """A row of conductor.progress."""

    slot: str
    generation: int
    state: str  # creating, streaming
    epoch: int
    routed_lsn: Lsn
    acknowledged_lsn: Lsn
    source: str
    database: str | None
    system_identifier: str | None
    timeline: int | None
    plugin: str
    marker_nonce: str
    leader: str | None
    emits: bool = False  # it routes what is emitted through the WAL
    inserts_oid: int | None = None  # of the second publication, and from where on the server
    inserts_lsn: Lsn | None = None  # can decode with it

    @property
    def inserts(self) -> tuple[int, Lsn] | None:
        """Both, if they are known."""
        if self.inserts_oid is None or self.inserts_lsn is None:
            return None
        return self.inserts_oid, self.inserts_lsn


@dataclass(frozen=True, slots=True)
class Rival:
    """Another slot that routes our source into the queue, and has done so for longer."""

    slot: str
    database: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that decides whether streaming may go on."""

    slot_name: str
    system: SystemIdentity
    slot: Slot | None
    progress: ProgressRow | None
    timeline_history: Sequence[tuple[int, Lsn]] = ()  # of the server's timeline
    plugin: str = PGOUTPUT  # ours
    rival: Rival | None = None


def judge(situation: Situation) -> CdcError | None:
    """Return what stands against streaming on; None when slot and progress fit, or both are new."""
    progress, slot, name = situation.progress, situation.slot, situation.slot_name
    if (rival := situation.rival) is not None:
        return SourceTaken(
            f"source {rival.source!r} is routed by slot {rival.slot!r} of database "
            f"{rival.database!r} already: by slot {name!r} too, each change would be two jobs"
        )
    if progress is None:
        return (
            None
            if slot is None
            else SlotForeign(f"slot {name!r} exists, but the queue database has no progress for it")
        )
    if progress.state == "creating":
        return None if slot is None else judge_kind(situation, slot)
    problem = _judge_system(situation, progress)
    if problem is not None:
        return problem
    if slot is None:
        return SlotMissing(f"slot {name!r} is gone; progress stands at {progress.routed_lsn}")
    return judge_kind(situation, slot) or _judge_state(slot, progress)


def judge_kind(situation: Situation, slot: Slot) -> SlotForeign | None:
    """Return why a slot of our name is none that we would make; None when it may be ours."""
    name = slot.name
    if slot.slot_type != "logical" or slot.plugin != situation.plugin or slot.temporary:
        kind = "temporary" if slot.temporary else f"{slot.slot_type} ({slot.plugin or 'no plugin'})"
        return SlotForeign(f"slot {name!r} is {kind}, not a permanent one of {situation.plugin}")
    if slot.database != situation.system.database:
        return SlotForeign(
            f"slot {name!r} belongs to database {slot.database!r}, "
            f"not to {situation.system.database!r}"
        )
    if slot.two_phase:
        return SlotTwoPhase(f"slot {name!r} has two_phase on")
    return None


def _judge_system(situation: Situation, progress: ProgressRow) -> CdcError | None:
    system = situation.system
    if progress.system_identifier not in {None, system.system_identifier}:
        return SystemChanged(
            f"the source is system {system.system_identifier}, the progress of slot "
            f"{progress.slot!r} belongs to {progress.system_identifier}"
        )
    known = progress.timeline
    if known is not None and system.timeline != known:
        left = dict(situation.timeline_history).get(known)
        if left is None or left < progress.routed_lsn:
            where = f"left it at {left}" if left is not None else "does not come from it"
            return TimelineSwitched(
                f"progress is {progress.routed_lsn} on timeline {known}; "
                f"the source is on timeline {system.timeline}, which {where}"
            )
    if system.flush_lsn < progress.routed_lsn:
        return ServerBehind(
            f"the source's WAL ends at {system.flush_lsn}, below progress {progress.routed_lsn}"
        )
    return None


def _judge_state(slot: Slot, progress: ProgressRow) -> CdcError | None:
    if slot.is_lost:
        reason = slot.invalidation_reason or "its WAL was removed"
        return SlotLost(f"slot {slot.name!r} is lost: {reason}")
    confirmed = slot.confirmed_flush_lsn
    if confirmed is not None and confirmed > progress.acknowledged_lsn:
        return SlotAhead(
            f"slot {slot.name!r} stands at {confirmed}, "
            f"but only {progress.acknowledged_lsn} was acknowledged"
        )
    return None


def judge_waiting(slot: Slot | None) -> CdcError | None:
    """Return the condition of a stream that stands still, at this moment, for a standby."""
    if slot is None or not slot.waits_for_standbys:
        return None
    return StandbySlotsWaiting(
        f"slot {slot.name!r} waits for a standby that is named in synchronized_standby_slots"
    )
