"""The slot and the progress that belongs to it: how both come to be, and are made anew.

`SlotKeeper` creates, re-creates and re-reads them; whether they fit is for `conditions` to judge.
One sidecar at a time changes a slot: a transaction-level advisory lock on the queue database says
whose turn it is.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from cdc import gap_queries, operator_queries, queries
from cdc.catalog import TableName, read_server_lsn, read_slot
from cdc.conditions import ProgressRow, Rival, Situation, judge, judge_kind
from cdc.connection import Connection, queue_errors, source_errors
from cdc.errors import (
    CdcError,
    PublicationDrift,
    PublicationError,
    PublicationMissing,
    ServerBehind,
    SlotAhead,
    SlotBusy,
    SlotError,
    SlotLost,
    SlotMissing,
    SystemChanged,
    TableMissing,
    TimelineSwitched,
)
from cdc.lsn import Lsn
from cdc.source import PGOUTPUT, ReplicationStream, SystemIdentity

RECREATIONS_AN_HOUR: Final = 3
RECREATABLE: Final = (
    SlotMissing,
    SlotLost,
    SlotAhead,
    ServerBehind,
    SystemChanged,
    TimelineSwitched,
    PublicationMissing,
    PublicationDrift,
)
"""What a new slot cures. A foreign slot is not ours to drop."""

NOTHING_APPLIED: Final[Mapping[TableName, tuple[int, str]]] = {}
NO_MEMBERSHIPS: Final[Mapping[TableName, int]] = {}
_BLOCKER_POLL_S: Final = 0.5
_CANCEL_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Loss:
    """An error that a new slot cures, and the generation that met it."""

    error: CdcError
    generation: int


Mend = Callable[[], Awaitable[CdcError | None]]


def _well_until(problem: CdcError, progress: ProgressRow) -> Lsn:
    routed_lsn = progress.routed_lsn
    return routed_lsn if problem.since is None else min(problem.since, routed_lsn)


@dataclass(slots=True)
class SlotKeeper:
    """Brings one slot and its progress row into being, together.

    Args:
        name: the slot.
        source: the name of the source that subscriptions give.
        source_control: an ordinary connection to the source database.
        queue_control: an ordinary connection to the queue database.
        creation_deadline_s: how long creating the slot may wait for running writers.
        plugin: what decodes the slot's WAL.
        failover: whether a new slot is to survive a failover; the server must be able to.
    """

    name: str
    source: str
    source_control: Connection
    queue_control: Connection
    creation_deadline_s: float = 60.0
    plugin: str = PGOUTPUT
    failover: bool = False

    async def situation(self, stream: ReplicationStream) -> Situation:
        """Read what `judge` needs, on a replication connection that does not stream yet.

        In this order: a leader at work acknowledges only what its progress has, and routes only
        what the server has, so what is read later is never behind what was read before.
        """
        slot = await read_slot(self.source_control, self.name)
        progress = await self.read_progress()
        system = await stream.identify()
        history: Sequence[tuple[int, Lsn]] = ()
        if progress is not None and progress.timeline not in {None, system.timeline}:
            history = await stream.timeline_history(system.timeline)
        rival = await self._read_rival()
        return Situation(self.name, system, slot, progress, history, self.plugin, rival)

    async def reread(self, before: Situation) -> Situation:
        """Read all that can have moved again: once streaming has begun, the slot is ours."""
        slot = await read_slot(self.source_control, self.name)
        progress = await self.read_progress()
        system = replace(before.system, flush_lsn=await read_server_lsn(self.source_control))
        rival = await self._read_rival()
        return replace(before, system=system, slot=slot, progress=progress, rival=rival)

    async def read_progress(self) -> ProgressRow | None:
        """Read the progress row; None when there is none yet."""
        with queue_errors():
            cursor = await self.queue_control.execute(queries.PROGRESS, {"slot": self.name})
            row = await cursor.fetchone()
        if row is None:
            return None
        positions = {key: Lsn.parse(row[key]) for key in ("routed_lsn", "acknowledged_lsn")}
        inserts_lsn = None if row["inserts_lsn"] is None else Lsn.parse(row["inserts_lsn"])
        return ProgressRow(**{**row, **positions, "inserts_lsn": inserts_lsn})

    async def _read_rival(self) -> Rival | None:
        """Return who routes this source already. Of two that begin at once, the first has it."""
        with queue_errors():
            parameters = {"slot": self.name, "source": self.source}
            cursor = await self.queue_control.execute(queries.RIVAL, parameters)
            row = await cursor.fetchone()
        return None if row is None else Rival(row["slot"], row["database"], self.source)

    async def idle_slots(self) -> dict[str, str]:
        """Return the other slots of this source that nobody streams from, and since when."""
        with queue_errors():
            cursor = await self.queue_control.execute(
                queries.IDLE_SLOTS, {"slot": self.name, "source": self.source}
            )
            return {row["slot"]: row["seen_at"] for row in await cursor.fetchall()}

    async def create(self, stream: ReplicationStream, lock: Connection) -> Lsn:
        """Create the slot and its progress; return where both start.

        Args:
            stream: a replication connection that does not stream yet.
            lock: a second connection to the queue database, with nothing open on it.

        Raises:
            SlotBusy: another sidecar is at it.
            SlotError: running writers did not end within the deadline; it names them.
        """
        async with self.turn(lock):
            situation = await self.situation(stream)
            if (problem := judge(situation)) is not None:
                raise problem
            if situation.progress is None:
                await self._queue(queries.INSERT_PROGRESS, **self._identity(situation.system))
            elif situation.progress.state == "streaming":
                raise SlotBusy(f"slot {self.name!r} was just created by another sidecar")
            return await self._create_slot(stream, situation)

    async def recreate(
        self, stream: ReplicationStream, lock: Connection, loss: Loss, mend: Mend | None = None
    ) -> Lsn | None:
        """Give up what the slot has lost: a new generation from here on, and its gaps closed.

        Everything is judged again in our turn: what is over, or was dealt with by another sidecar
        or an operator, costs no slot.

        Args:
            stream: a replication connection that does not stream yet.
            lock: a second connection to the queue database, with nothing open on it.
            loss: what is to be accepted.
            mend: puts the publication right, before the slot; returns what it had lost.

        Returns where it starts; None when there is nothing to give up any more.

        Raises:
            CdcError: another condition than that of `loss` stands against the slot by now.
            SlotError: it was done `RECREATIONS_AN_HOUR` times within an hour.
        """
        async with self.turn(lock):
            situation = await self.situation(stream)
            progress = situation.progress
            if progress is None or progress.generation != loss.generation:
                return None
            lost = None if mend is None else await mend()
            problem = judge(situation) or lost
            if problem is None and await self._is_over(loss):
                return None
            self._refuse_another(situation, problem, loss)
            recent = await self._queue_value(gap_queries.RECENT_RECREATIONS, "recreations")
            if recent >= RECREATIONS_AN_HOUR:
                raise SlotError(
                    f"slot {self.name!r} was re-created {recent} times within an hour; "
                    f"now: {loss.error}",
                    hint="find out who removes it; CDC_GAP_POLICY=stop until then",
                )
            if isinstance(loss.error, SystemChanged):
                await self._queue(queries.FORGET_ACTIVATIONS)
            await self._queue(
                queries.RESTART_PROGRESS,
                generation=loss.generation,
                **self._identity(situation.system),
            )
            return await self._create_slot(stream, situation)

    async def _is_over(self, loss: Loss) -> bool:
        """Tell whether a loss that cannot be seen any more has cost nothing, and end its gap.

        A slot that fits its progress again has everything. What was out of the publication for a
        while is lost though it is back: unless an operator has accepted that already.
        """
        if not isinstance(loss.error, PublicationError):
            await self.close_unharmed(loss.error.condition)
            return True
        return not await self.is_gap_open(loss.error.condition, loss.generation)

    async def is_gap_open(self, condition: str | None, generation: int) -> bool:
        """Tell whether a gap of that condition is open."""
        keys = {"slot": self.name, "generation": generation, "condition": condition}
        with queue_errors():
            cursor = await self.queue_control.execute(gap_queries.IS_GAP_OPEN, keys)
            return await cursor.fetchone() is not None

    def _refuse_another(self, situation: Situation, problem: CdcError | None, loss: Loss) -> None:
        """Raise what has taken the place of a loss: it has no gap yet, or is not ours to drop."""
        slot = situation.slot
        if slot is not None and (foreign := judge_kind(situation, slot)) is not None:
            raise foreign
        if problem is not None and type(problem) is not type(loss.error):
            raise problem

    async def open_gap(self, problem: CdcError, *, policy: str) -> Loss | None:
        """Leave a row that says what may have been lost, unless it is there already."""
        progress = await self.read_progress()
        slot = await read_slot(self.source_control, self.name)
        to_lsn = None if slot is None else slot.confirmed_flush_lsn or slot.restart_lsn
        await self._queue(
            gap_queries.OPEN_GAP,
            generation=None if progress is None else progress.generation,
            condition=problem.condition,
            policy=policy,
            from_lsn=None if progress is None else str(_well_until(problem, progress)),
            to_lsn=None if to_lsn is None else str(to_lsn),
            detail=json.dumps({"message": str(problem), "hint": problem.hint, **problem.facts}),
        )
        return None if progress is None else Loss(problem, progress.generation)

    async def remember(
        self,
        memberships: Mapping[TableName, int],
        nonce: str,
        insert_memberships: Mapping[TableName, int] = NO_MEMBERSHIPS,
        applied: Mapping[TableName, tuple[int, str]] = NOTHING_APPLIED,
    ) -> None:
        """Note how captured tables are published: whoever puts one back changes that."""
        rows = [[*table, membership] for table, membership in sorted(memberships.items())]
        rows += [[*table, m, True] for table, m in sorted(insert_memberships.items())]
        narrowed = [[*table, *how] for table, how in sorted(applied.items())]
        await self._queue(
            queries.REMEMBER_MEMBERSHIPS,
            memberships=json.dumps(rows),
            applied=json.dumps(narrowed),
            nonce=nonce,
        )

    async def note_inserts(self, oid: int, lsn: Lsn) -> None:
        """Note from where on the server can decode with the second publication of that OID."""
        progress = await self.read_progress()
        if progress is not None:
            await self._queue(
                queries.NOTE_INSERTS, generation=progress.generation, oid=oid, lsn=str(lsn)
            )

    async def note_carried(self, oid: int) -> None:
        """Note that a stream was started with the second publication of that OID."""
        await self._queue(queries.NOTE_CARRIED, oid=oid)

    async def end_continued(self) -> None:
        """Close the gap of a changed publication under which the stream went on."""
        await self._queue(
            gap_queries.CLOSE_CONTINUED,
            condition=PublicationDrift.condition,
            to_lsn=str(await read_server_lsn(self.source_control)),
        )

    async def close_unharmed(self, condition: str | None) -> None:
        """Close the gap of a condition that passed, and nothing was missed."""
        await self._queue(gap_queries.CLOSE_GAP_UNHARMED, condition=condition)

    async def end_interruptions(self, tables: Collection[TableName]) -> None:
        """Close the gaps of tables that are captured again, or that nobody wants any more."""
        await self._queue(
            gap_queries.CLOSE_TABLE_GAPS,
            condition=TableMissing.condition,
            schemas=[schema for schema, _ in tables],
            tables=[name for _, name in tables],
            to_lsn=str(await read_server_lsn(self.source_control)),
        )

    async def alter_failover(self, stream: ReplicationStream) -> None:
        """Make the slot what `failover` says. From PostgreSQL 17.

        Raises:
            SlotBusy: somebody streams from it; the server would wait for them without end.
        """
        command = operator_queries.alter_failover(self.name, failover=self.failover)
        slot = await read_slot(self.source_control, self.name)
        try:
            if slot is None or slot.active_pid is None:
                async with asyncio.timeout(_CANCEL_TIMEOUT_S):
                    return await stream.command(command)
        except TimeoutError:
            pass
        raise SlotBusy(
            f"slot {self.name!r} is in use", hint="stop every sidecar of it, then try again"
        )

    async def follow_timeline(self, progress: ProgressRow, timeline: int) -> None:
        """Note that the source went on, without loss, on another timeline."""
        await self._queue(
            queries.FOLLOW_TIMELINE, generation=progress.generation, timeline=timeline
        )

    # --- creating ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def turn(self, lock: Connection) -> AsyncIterator[None]:
        """Hold the slot's lock, in a transaction without an xid: slot creation waits for xids."""
        with queue_errors():
            async with lock.transaction():
                cursor = await lock.execute(queries.TRY_SLOT_LOCK, {"slot": self.name})
                row = await cursor.fetchone()
                if row is None or not row["locked"]:
                    raise SlotBusy(f"another sidecar is creating slot {self.name!r}")
                yield

    async def _create_slot(self, stream: ReplicationStream, situation: Situation) -> Lsn:
        """Create the slot for a progress row in state `creating`; then the row starts with it.

        One that is there was left by a sidecar that died between creating and starting, or is the
        one to give up. What we would not have made ourselves is not ours to drop.
        """
        existing = situation.slot
        if existing is not None:
            if (foreign := judge_kind(situation, existing)) is not None:
                raise foreign
            if existing.active_pid is not None:
                raise SlotBusy(f"slot {self.name!r} is active for PID {existing.active_pid}")
            with source_errors():
                await self.source_control.execute(queries.DROP_SLOT, {"slot": self.name})
        start = await self._create_within_deadline(stream)
        await self._queue(queries.START_PROGRESS, lsn=str(start))
        await self._queue(gap_queries.CLOSE_GAPS, to_lsn=str(start), policy="recreate")
        return start

    async def _create_within_deadline(self, stream: ReplicationStream) -> Lsn:
        creation = asyncio.create_task(
            stream.create_slot(self.name, self.plugin, failover=self.failover), name="create slot"
        )
        deadline_s = asyncio.get_running_loop().time() + self.creation_deadline_s
        blockers = ""
        while True:
            done, _ = await asyncio.wait((creation,), timeout=_BLOCKER_POLL_S)
            if done:
                return await creation
            blockers = await self._blockers(stream.backend_pid) or blockers
            if asyncio.get_running_loop().time() > deadline_s:
                break
        with contextlib.suppress(CdcError):
            await stream.cancel()
        with contextlib.suppress(CdcError, TimeoutError):
            await asyncio.wait_for(creation, _CANCEL_TIMEOUT_S)
        raise SlotBusy(
            f"slot {self.name!r} could not be created within {self.creation_deadline_s:.0f} s: "
            f"it waits for transactions that are open: {blockers or 'unknown'}",
            hint="end those transactions; cdc tries again",
        )

    async def _blockers(self, pid: int) -> str:
        with source_errors():
            cursor = await self.source_control.execute(queries.BLOCKING_TRANSACTIONS, {"pid": pid})
            rows = await cursor.fetchall()
        return ", ".join(
            f"PID {row['pid']} ({row['application_name'] or row['role'] or 'prepared'}, "
            f"since {row['since'] or '?'})"
            for row in rows
        )

    def _identity(self, system: SystemIdentity) -> dict[str, Any]:
        return {
            "source": self.source,
            "database": system.database,
            "plugin": self.plugin,
            "system_identifier": system.system_identifier,
            "timeline": system.timeline,
        }

    async def _queue(self, query: queries.Statement, **parameters: Any) -> None:
        with queue_errors():
            await self.queue_control.execute(query, {"slot": self.name, **parameters})

    async def _queue_value(self, query: queries.Statement, column: str) -> int:
        with queue_errors():
            cursor = await self.queue_control.execute(query, {"slot": self.name})
            row = await cursor.fetchone()
        return int(row[column]) if row else 0
