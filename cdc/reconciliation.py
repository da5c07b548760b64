"""`cdc plan` and `cdc apply`: what publication and slot lack, and how they get it.

A plan changes nothing and is SQL that a database administrator can run. Applying runs it, with the
rights of CDC_ADMIN_DSN for the publication and the sidecar's own for the slot. Both look with the
eyes of `cdc run`, so that it has nothing left to do.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from cdc import operator_queries, queries
from cdc.catalog import (
    Server,
    insert_only_name,
    read_publications,
    read_server,
    read_server_lsn,
)
from cdc.conditions import Situation, judge
from cdc.config import Settings
from cdc.connection import Connection, connect_queue, connect_source, queue_errors, source_errors
from cdc.errors import CdcError, PublicationDrift, PublicationMissing, SlotBusy
from cdc.lsn import Lsn
from cdc.preflight import can_fail_over, refuse_server, refuse_unlimited_wal
from cdc.publication import Plan, PublicationKeeper, apply_plan
from cdc.slots import Loss, SlotKeeper
from cdc.source import ReplicationStream
from cdc.subscriptions import SubscriptionBook

_NAME: Final = "cdc apply"
_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Proposal:
    """What there is to do. Empty lists and None: nothing.

    `drift` says what was captured and is no longer, `misfit` what nothing was captured through yet,
    `missing` which captured tables are gone; `refused` which tasks' tables cannot be
    published, and why; `slot` what becomes of the slot, with the command for it if there is one;
    `condition` what stands against streaming from it.
    """

    statements: list[str]
    drift: list[str]
    misfit: list[str]
    missing: list[str]
    refused: dict[str, str]
    slot: str | None
    slot_command: str | None
    condition: str | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class _Connections:
    source: Connection
    admin: Connection  # to the source as well
    queue: Connection
    lock: Connection  # to the queue as well
    stream: ReplicationStream


class Reconciliation:
    """A look at source and queue; `open` one, then `propose` or `apply`."""

    def __init__(self, settings: Settings, connections: _Connections, server: Server) -> None:
        self._settings = settings
        self._connections = connections
        self._server = server
        self._book = SubscriptionBook(connections.queue, slot=settings.slot, source=settings.source)
        self._keeper = PublicationKeeper(
            settings.publication,
            connections.source,
            manage=False,
            tolerate_missing=settings.gap_policy == "recreate",
            narrowing=settings.narrowing,
        )
        self._slots = SlotKeeper(
            settings.slot,
            settings.source,
            connections.source,
            connections.queue,
            settings.slot_creation_deadline_s,
            settings.plugin,
            failover=settings.failover and can_fail_over(server),
        )

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> "AsyncIterator[Reconciliation]":
        """Connect. Raises what `cdc run` would refuse to start with."""
        async with AsyncExitStack() as stack:
            connections = await _connect(settings, stack)
            server = await read_server(connections.source)
            if (refusal := refuse_server(server, settings.plugin)) is not None:
                raise refusal
            yield cls(settings, connections, server)

    async def propose(self) -> Proposal:
        """Compare, and change nothing."""
        change, situation = await self._plan(), await self._situation()
        problem = judge(situation)
        tasks = {e.subscription.id: e.subscription.task for e in self._book.entries}
        command = self._slot_command(situation)
        return Proposal(
            statements=[s.as_string(self._connections.source) for s in change.statements],
            drift=list(change.drift),
            misfit=list(change.misfit),
            missing=[f"{error}; {error.hint}" for error in change.missing.values()],
            refused={tasks[i]: f"{error}; {error.hint}" for i, error in change.refused.items()},
            slot=_describe(situation, command),
            slot_command=None if command is None else command.as_string(self._connections.source),
            condition=None if problem is None else problem.condition,
            problem=None if problem is None else f"{problem}; {problem.hint}",
        )

    async def apply(self, *, accept_gap: bool = False) -> list[str]:
        """Bring publication and slot to what is needed; return what was done, a line each.

        Args:
            accept_gap: put right what somebody took out of the publication, though its changes
                since then are lost: the gap is recorded, and closed when it is over. When all of
                it was gone, the slot is made anew: it cannot go on from before its publication.

        Raises:
            PublicationDrift, PublicationMissing: changes are being lost, and it was not accepted.
            TableMissing: a captured table is gone, and the policy is not to go on without it.
            PublicationError, PrivilegeMissing: the publication cannot be changed as it must be.
            SlotError: the condition that stands against streaming, or the slot is busy.
        """
        done = await self._apply_publication(accept_gap=accept_gap)
        situation = await self._situation()
        if (problem := judge(situation)) is not None:
            raise problem
        command = self._slot_command(situation)
        if command is None:
            return done
        if situation.progress is None or situation.progress.state == "creating":
            allowed = self._settings.allow_unlimited_wal
            if refusal := refuse_unlimited_wal(self._server, allowed=allowed):
                raise refusal
            start = await self._slots.create(self._connections.stream, self._connections.lock)
            await self._note_inserts(start)
            return [*done, f"slot {self._settings.slot}: created at {start}"]
        await self._slots.alter_failover(self._connections.stream)
        return [*done, command.as_string(self._connections.source)]

    async def _apply_publication(self, *, accept_gap: bool) -> list[str]:
        change = await self._plan()
        if change.missing and self._settings.gap_policy != "recreate":
            raise next(iter(change.missing.values()))
        loss = change.loss
        if loss is not None:
            if not accept_gap:
                raise type(loss)(
                    str(loss),
                    hint="changes since then are lost: `cdc apply --accept-gap` records that and "
                    "puts it back",
                )
            await self._slots.open_gap(loss, policy="accept")
        obstacle = await apply_plan(self._connections.admin, change)
        if obstacle is None and (left := (await self._plan()).statements):
            text = "; ".join(s.as_string(self._connections.source) for s in left)
            obstacle = SlotBusy(f"not had in time, for a lock: {text}", hint="run it again")
        if obstacle is not None:
            raise obstacle
        done = [s.as_string(self._connections.source) for s in change.statements]
        if accept_gap and (missing := await self._missing_before()) is not None:
            done += await self._start_anew(missing)
        elif accept_gap:
            await self._wait_for_writers()
        if accept_gap or change.refusal is not None:
            await self._close_gap()
        return done if loss is None else [*done, f"gap {loss.condition}: recorded and closed"]

    async def _start_anew(self, missing: Loss) -> list[str]:
        """Create the slot again, after its publication, and end the gap where it starts."""
        connections = self._connections
        start = await self._slots.recreate(connections.stream, connections.lock, missing)
        if start is None:  # somebody else was faster
            return []
        await self._note_inserts(start)
        return [f"slot {self._settings.slot}: created anew at {start}"]

    async def _note_inserts(self, start: Lsn) -> None:
        """Note that a new slot decodes with the second publication, if there is one."""
        second = insert_only_name(self._settings.publication)
        found = await read_publications(self._connections.source, [second])
        if second in found:
            await self._slots.note_inserts(found[second].oid, start)

    async def _missing_before(self) -> Loss | None:
        """Return the open gap of a publication that was gone: no slot goes on from before it."""
        progress = await self._slots.read_progress()
        if progress is None:
            return None
        condition, generation = PublicationMissing.condition, progress.generation
        if not await self._slots.is_gap_open(condition, generation):
            return None
        name = self._settings.publication
        return Loss(PublicationMissing(f"publication {name!r} was gone"), generation)

    async def _wait_for_writers(self) -> None:
        """Wait until every transaction that began before the repair has ended."""
        connections, book = self._connections, self._book
        wanted = [entry.wanted for entry in book.entries]
        # What was put back has other ones.
        past = replace(book.past, memberships={}, insert_memberships={})
        reconciled = await self._keeper.reconcile(wanted, past=past)
        oids = sorted(reconciled.published.values())
        deadline_s = asyncio.get_running_loop().time() + self._settings.slot_creation_deadline_s
        before: set[str] | None = None
        while before is None or before:
            with source_errors():
                cursor = await connections.source.execute(queries.WRITERS, {"oids": oids})
                now = {row["transaction"] for row in await cursor.fetchall()}
            before = now if before is None else before & now
            if before and asyncio.get_running_loop().time() > deadline_s:
                raise SlotBusy(
                    "the gap stays open: transactions that wrote before the repair still run",
                    hint="end them, then run it again",
                )
            await asyncio.sleep(_POLL_S if before else 0)
        progress = await self._slots.read_progress()
        if progress is not None:
            await self._slots.remember(
                reconciled.memberships,
                progress.marker_nonce,
                reconciled.insert_memberships,
                reconciled.applied,
            )

    async def _close_gap(self) -> None:
        """End the gap of what is put right."""
        connections = self._connections
        with queue_errors():
            await connections.queue.execute(
                operator_queries.CLOSE_GAP,
                {
                    "slot": self._settings.slot,
                    "condition": PublicationDrift.condition,
                    "to": str(await read_server_lsn(connections.source)),
                },
            )

    async def _plan(self) -> Plan:
        await self._book.refresh()
        wanted = [entry.wanted for entry in self._book.entries]
        return await self._keeper.plan(wanted, past=self._book.past)

    async def _situation(self) -> Situation:
        return await self._slots.situation(self._connections.stream)

    def _slot_command(self, situation: Situation) -> queries.Statement | None:
        """Return the replication command that the slot needs; None for none, or none that helps."""
        name, slot = self._settings.slot, situation.slot
        if judge(situation) is not None:
            return None
        if slot is None or situation.progress is None or situation.progress.state == "creating":
            return queries.create_slot(name, self._settings.plugin, failover=self._slots.failover)
        if slot.failover != self._slots.failover:
            return operator_queries.alter_failover(name, failover=self._slots.failover)
        return None


def _describe(situation: Situation, command: queries.Statement | None) -> str | None:
    if command is None:
        return None
    if situation.progress is None or situation.progress.state == "creating":
        return "`cdc apply` or `cdc run` creates it, with its progress; not by hand"
    return "`cdc apply` alters it while no sidecar streams; by hand on a replication connection"


async def _connect(settings: Settings, stack: AsyncExitStack) -> _Connections:
    source = await connect_source(settings.source_conninfo, application_name=_NAME)
    stack.push_async_callback(source.close)
    try:
        admin = await connect_source(settings.admin_conninfo, application_name=_NAME)
    except CdcError as error:
        if settings.admin_dsn.get_secret_value():  # not the source's, which let us in
            error.hint = error.hint.replace("CDC_SOURCE_DSN", "CDC_ADMIN_DSN")
        raise
    stack.push_async_callback(admin.close)
    with source_errors():
        await admin.execute(queries.WAIT_BRIEFLY_FOR_LOCKS)
    queue = await connect_queue(settings.queue_conninfo, application_name=_NAME)
    stack.push_async_callback(queue.close)
    lock = await connect_queue(settings.queue_conninfo, application_name=_NAME)
    stack.push_async_callback(lock.close)
    stream = await ReplicationStream.open(settings.source_conninfo, application_name=_NAME)
    stack.push_async_callback(stream.close)
    return _Connections(source, admin, queue, lock, stream)
