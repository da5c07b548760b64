"""Every way in which slot, server and progress can disagree."""

from dataclasses import replace
from typing import Any

import pytest

from cdc.catalog import Slot
from cdc.conditions import ProgressRow, Situation, judge
from cdc.errors import (
    CdcError,
    ServerBehind,
    SlotAhead,
    SlotForeign,
    SlotLost,
    SlotMissing,
    SlotTwoPhase,
    SystemChanged,
    TimelineSwitched,
)
from cdc.lsn import Lsn
from cdc.source import SystemIdentity, parse_timeline_history

SYSTEM = SystemIdentity("7", 1, Lsn(5000), "shop")
SLOT = Slot(
    name="conductor",
    plugin="pgoutput",
    slot_type="logical",
    database="shop",
    temporary=False,
    two_phase=False,
    active_pid=None,
    restart_lsn=Lsn(900),
    confirmed_flush_lsn=Lsn(1000),
    wal_status="reserved",
    safe_wal_bytes=None,
    invalidation_reason=None,
    failover=False,
    retained_bytes=4100,
)
PROGRESS = ProgressRow(
    slot="conductor",
    generation=1,
    state="streaming",
    epoch=1,
    routed_lsn=Lsn(2000),
    acknowledged_lsn=Lsn(1000),
    source="default",
    database="shop",
    system_identifier="7",
    timeline=1,
    plugin="pgoutput",
    marker_nonce="n",
    leader=None,
)
FITTING = Situation("conductor", SYSTEM, SLOT, PROGRESS)


def test_what_fits_or_is_new() -> None:
    assert judge(FITTING) is None
    assert judge(Situation("conductor", SYSTEM, None, None)) is None
    assert judge(replace(FITTING, progress=replace(PROGRESS, state="creating"), slot=None)) is None
    assert judge(replace(FITTING, progress=replace(PROGRESS, acknowledged_lsn=Lsn(1001)))) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"plugin": "wal2json"}, SlotForeign),
        ({"slot_type": "physical", "plugin": None, "database": None}, SlotForeign),
        ({"temporary": True}, SlotForeign),
        ({"database": "other"}, SlotForeign),
        ({"two_phase": True}, SlotTwoPhase),
        ({"wal_status": "lost", "restart_lsn": None}, SlotLost),
        ({"invalidation_reason": "idle_timeout"}, SlotLost),
        ({"confirmed_flush_lsn": Lsn(1001)}, SlotAhead),
    ],
)
def test_conditions_of_the_slot(changes: dict[str, Any], expected: type[CdcError]) -> None:
    problem = judge(replace(FITTING, slot=replace(SLOT, **changes)))
    assert type(problem) is expected


@pytest.mark.parametrize(
    ("changes", "history", "expected"),
    [
        ({"system_identifier": "8"}, (), SystemChanged),
        ({"flush_lsn": Lsn(1999)}, (), ServerBehind),
        ({"timeline": 2}, (), TimelineSwitched),
        ({"timeline": 2}, ((1, Lsn(1999)),), TimelineSwitched),
        ({"timeline": 2}, ((1, Lsn(2000)),), type(None)),
        ({"timeline": 3}, ((1, Lsn(4000)), (2, Lsn(4500))), type(None)),
    ],
)
def test_conditions_of_the_server(
    changes: dict[str, Any], history: tuple[tuple[int, Lsn], ...], expected: type[CdcError]
) -> None:
    system = replace(SYSTEM, **changes)
    problem = judge(replace(FITTING, system=system, timeline_history=history))
    assert type(problem) is expected


@pytest.mark.parametrize("changes", [{"plugin": "wal2json"}, {"database": "other"}])
def test_a_slot_that_is_to_be_created_may_only_be_one_of_ours(changes: dict[str, Any]) -> None:
    creating = replace(FITTING, progress=replace(PROGRESS, state="creating"))
    assert judge(creating) is None
    problem = judge(replace(creating, slot=replace(SLOT, **changes)))
    assert type(problem) is SlotForeign


def test_slot_and_progress_need_each_other() -> None:
    assert type(judge(replace(FITTING, slot=None))) is SlotMissing
    assert type(judge(replace(FITTING, progress=None))) is SlotForeign


def test_reads_a_timeline_history() -> None:
    content = "1\t0/3000000\tno recovery target specified\n\n2\t1/A\tbefore 2024-01-01\n"
    assert parse_timeline_history(content) == [(1, Lsn(0x3000000)), (2, Lsn(0x1_0000_000A))]
