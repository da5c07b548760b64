"""What an operator does to slots: list them, drop one for good, skip what the server cannot decode.

Each leaves slot, progress and gaps in agreement, so that `cdc run` goes on from there without a
condition. None touches a slot that somebody streams from.
"""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from cdc import operator_queries, queries
from cdc.catalog import read_server_lsn, read_slots
from cdc.conditions import ProgressRow, Situation, judge
from cdc.config import Settings
from cdc.connection import Connection, connect_queue, connect_source, queue_errors, source_errors
from cdc.errors import ConfigError, ServerDecodeError, SlotBusy, SlotForeign
from cdc.lsn import Lsn
from cdc.slots import SlotKeeper
from cdc.source import ReplicationStream

_NAME: Final = "cdc slot"
_DROPPED: Final = "slot_dropped"


@dataclass(frozen=True, slots=True)
class _Connections:
    """The connections of one command."""

    source: Connection
    queue: Connection
    lock: Connection
    stream: ReplicationStream

    def keeper(self, settings: Settings, slot: str, plugin: str) -> SlotKeeper:
        return SlotKeeper(slot, settings.source, self.source, self.queue, plugin=plugin)


async def list_slots(settings: Settings) -> list[dict[str, Any]]:
    """Return every logical slot of the server, and every slot that has progress in the queue.

    `condition` names what stands against streaming from a slot that has progress; for any other
    slot it is None: it is not ours to judge. LSNs are text, sizes bytes.
    """
    async with _connect(settings) as connections:
        with queue_errors():
            cursor = await connections.queue.execute(operator_queries.PROGRESS_SLOTS)
            ours = {row["slot"] for row in await cursor.fetchall()}
        there = {slot.name for slot in await read_slots(connections.source)}
        return [await _describe(connections, settings, name) for name in sorted(there | ours)]


async def drop_slot(settings: Settings, name: str) -> str:
    """Take a slot out of service, with its progress; return where its changes end.

    What is not routed by then is given up: that is the gap `slot_dropped`, closed at once. A
    sidecar that is started again begins anew, like the first one.

    Raises:
        SlotBusy: somebody streams from it.
        SlotForeign: it is not ours.
    """
    async with _connect(settings) as connections, _turn(connections, settings, name) as situation:
        progress, slot = situation.progress, situation.slot
        if progress is None or (slot is not None and slot.database != situation.system.database):
            raise SlotForeign(
                f"slot {name!r} has no progress in this queue, or belongs to another database",
                hint="see `cdc slot list`; pg_drop_replication_slot drops any slot",
            )
        if slot is not None:
            with source_errors():
                await connections.source.execute(queries.DROP_SLOT, {"slot": name})
        end = await read_server_lsn(connections.source)
        # In this order: a crash in between is the condition slot_missing, and can be repeated.
        with queue_errors():
            async with connections.queue.transaction():
                if progress.state == "streaming":
                    await _record_gap(connections.queue, progress, _DROPPED, "drop", end)
                key = {"slot": name, "generation": progress.generation}
                await connections.queue.execute(operator_queries.FORGET_PROGRESS, key)
    return str(end)


async def skip_to(settings: Settings, name: str, to: Lsn) -> str:
    """Give up everything from the progress to a position; return where the slot stands then.

    For `server_decode_error`: no transaction that committed below `to` is routed. That is a gap,
    closed at once.

    Raises:
        SlotBusy: somebody streams from it.
        ConfigError: the position is not between progress and the end of the server's WAL.
        CdcError: the condition that stands against streaming anyway.
    """
    async with _connect(settings) as connections, _turn(connections, settings, name) as situation:
        progress = situation.progress
        if (problem := judge(situation)) is not None:
            raise problem
        if progress is None or progress.state != "streaming":
            raise SlotForeign(f"slot {name!r} has no progress in this queue yet")
        if not progress.routed_lsn <= to <= situation.system.flush_lsn:
            raise ConfigError(
                f"{to} is not between the progress, {progress.routed_lsn}, and the end of the "
                f"server's WAL, {situation.system.flush_lsn}",
                hint="the error of the sidecar names the position to skip to",
            )
        # Progress first: a crash in between leaves nothing worse than the same error again.
        with queue_errors():
            async with connections.queue.transaction():
                condition = str(ServerDecodeError.condition)
                if progress.routed_lsn < to:
                    await _record_gap(connections.queue, progress, condition, "skip", to)
                await _move_progress(connections.queue, progress, to)
        with source_errors():
            cursor = await connections.source.execute(
                operator_queries.ADVANCE_SLOT, {"slot": name, "lsn": str(to)}
            )
            row = await cursor.fetchone()
    return str(row["end_lsn"] if row else to)


@asynccontextmanager
async def _connect(settings: Settings) -> AsyncIterator[_Connections]:
    async with AsyncExitStack() as stack:
        source = await connect_source(settings.source_conninfo, application_name=_NAME)
        stack.push_async_callback(source.close)
        queue = await connect_queue(settings.queue_conninfo, application_name=_NAME)
        stack.push_async_callback(queue.close)
        lock = await connect_queue(settings.queue_conninfo, application_name=_NAME)
        stack.push_async_callback(lock.close)
        stream = await ReplicationStream.open(settings.source_conninfo, application_name=_NAME)
        stack.push_async_callback(stream.close)
        yield _Connections(source, queue, lock, stream)


@asynccontextmanager
async def _turn(
    connections: _Connections, settings: Settings, name: str
) -> AsyncIterator[Situation]:
    """Hold the slot's lock, as long as nobody streams from it."""
    keeper = connections.keeper(settings, name, settings.plugin)
    async with keeper.turn(connections.lock):
        situation = await keeper.situation(connections.stream)
        pid = None if situation.slot is None else situation.slot.active_pid
        if pid is not None:
            raise SlotBusy(
                f"slot {name!r} is active for PID {pid}", hint="stop every sidecar of it first"
            )
        yield situation


async def _record_gap(
    queue: Connection, progress: ProgressRow, condition: str, policy: str, to: Lsn
) -> None:
    """Record what is given up. A dropped slot ends all gaps that were open, a skip only its own."""
    await queue.execute(
        operator_queries.RECORD_GAP,
        {
            "slot": progress.slot,
            "generation": progress.generation,
            "condition": condition,
            "all": condition == _DROPPED,
            "policy": policy,
            "from": str(progress.routed_lsn),
            "to": str(to),
            "detail": json.dumps({"message": f"given up by an operator: {policy}"}),
        },
    )


async def _move_progress(queue: Connection, progress: ProgressRow, to: Lsn) -> None:
    parameters = {
        "slot": progress.slot,
        "generation": progress.generation,
        "from": str(progress.routed_lsn),
        "to": str(to),
    }
    cursor = await queue.execute(operator_queries.SKIP_PROGRESS, parameters)
    if cursor.rowcount != 1:
        raise SlotBusy(
            f"the progress of slot {progress.slot!r} moved meanwhile",
            hint="stop every sidecar of it first",
        )


async def _describe(connections: _Connections, settings: Settings, name: str) -> dict[str, Any]:
    keeper = connections.keeper(settings, name, settings.plugin)
    progress = await keeper.read_progress()
    if progress is not None:
        keeper = replace(keeper, plugin=progress.plugin, source=progress.source)
    situation = await keeper.situation(connections.stream)
    slot = situation.slot
    problem = None if progress is None else judge(situation)
    return {
        "slot": name,
        "condition": None if problem is None else problem.condition,
        "problem": None if problem is None else str(problem),
        "ours": progress is not None,
        "database": None if slot is None else slot.database,
        "plugin": None if slot is None else slot.plugin,
        "active_pid": None if slot is None else slot.active_pid,
        "failover": None if slot is None else slot.failover,
        "wal_status": None if slot is None else slot.wal_status,
        "retained_wal_bytes": None if slot is None else slot.retained_bytes,
        "safe_wal_bytes": None if slot is None else slot.safe_wal_bytes,
        "routed_lsn": None if progress is None else str(progress.routed_lsn),
        "confirmed_flush_lsn": None if slot is None else _text(slot.confirmed_flush_lsn),
    }


def _text(lsn: Lsn | None) -> str | None:
    return None if lsn is None else str(lsn)
