"""`cdc status`: where source, slot, progress and subscriptions stand, from the outside.

Needs no running sidecar and changes nothing.
"""

from collections.abc import Collection
from contextlib import AsyncExitStack
from typing import Any, Final

from cdc import gap_queries, operator_queries
from cdc.catalog import TableName
from cdc.conditions import Situation, judge, judge_waiting
from cdc.config import Settings
from cdc.connection import Connection, connect_queue, connect_source, listener_name, queue_errors
from cdc.errors import CdcError, PublicationError
from cdc.publication import PublicationKeeper
from cdc.slots import SlotKeeper
from cdc.source import ReplicationStream
from cdc.subscriptions import Entry, SubscriptionBook

_NAME: Final = "cdc status"
_NAME_LENGTH: Final = 63  # of application_name; the server cuts off what is more


async def read_status(settings: Settings) -> dict[str, Any]:
    """Return everything as JSON values; LSNs as text, sizes in bytes.

    Raises:
        SourceUnavailable, QueueUnavailable, ConfigError: a database cannot be asked.
    """
    async with AsyncExitStack() as stack:
        source = await connect_source(settings.source_conninfo, application_name=_NAME)
        stack.push_async_callback(source.close)
        queue = await connect_queue(settings.queue_conninfo, application_name=_NAME)
        stack.push_async_callback(queue.close)
        stream = await ReplicationStream.open(settings.source_conninfo, application_name=_NAME)
        stack.push_async_callback(stream.close)
        situation = await SlotKeeper(
            settings.slot, settings.source, source, queue, plugin=settings.plugin
        ).situation(stream)
        book = SubscriptionBook(queue, slot=settings.slot, source=settings.source)
        await book.refresh()
        with queue_errors():
            cursor = await queue.execute(gap_queries.RECENT_GAPS, {"slot": settings.slot})
            gaps = await cursor.fetchall()
            name = listener_name(settings.slot)[:_NAME_LENGTH]
            cursor = await queue.execute(operator_queries.SIDECARS, {"name": name})
            sidecars = await cursor.fetchall()
        publication, problem = await _compare_publication(settings, source, book)
    problem = judge(situation) or judge_waiting(situation.slot) or problem
    facts = _positions(situation)
    return {
        **facts,
        "condition": None if problem is None else problem.condition,
        "problem": None if problem is None else str(problem),
        "hint": None if problem is None else problem.hint,
        "standbys": max(0, len(sidecars) - (facts["leader"] is not None)),
        **publication,
        "sidecars": sidecars,
        "gaps": gaps,
        "subscriptions": [_describe(entry, book.past.interrupted) for entry in book.entries],
    }


async def _compare_publication(
    settings: Settings, source: Connection, book: SubscriptionBook
) -> tuple[dict[str, Any], CdcError | None]:
    """Return what somebody took out of the publication, what it lacks, and if that is a condition.

    A publication that only lacks something is none: the sidecar puts it right.
    """
    wanted = [entry.wanted for entry in book.entries]
    keeper = PublicationKeeper(
        settings.publication, source, manage=False, narrowing=settings.narrowing
    )
    problem: CdcError | None = None
    unusable, drift, statements = None, list[str](), list[str]()
    try:
        change = await keeper.plan(wanted, past=book.past)
    except PublicationError as error:
        problem, unusable = error, str(error)
    else:
        problem = change.loss or next(iter(change.missing.values()), None) or change.refusal
        drift += [*change.drift, *change.misfit, *map(str, change.missing.values())]
        statements += (statement.as_string(source) for statement in change.statements)
    facts = {
        "publication": settings.publication,
        "publication_problem": unusable,
        "publication_drift": [{"drift": what} for what in drift],
        "publication_lacks": [{"statement": statement} for statement in statements],
    }
    return facts, problem


def _positions(situation: Situation) -> dict[str, Any]:
    slot, progress = situation.slot, situation.progress
    server_lsn = situation.system.flush_lsn
    streaming = slot is not None and slot.active_pid is not None
    return {
        "slot": situation.slot_name,
        "database": situation.system.database,
        "leader": progress.leader if streaming and progress is not None else None,
        "active_pid": None if slot is None else slot.active_pid,
        "generation": None if progress is None else progress.generation,
        "epoch": None if progress is None else progress.epoch,
        "state": None if progress is None else progress.state,
        "routes_events": progress is not None and progress.emits,
        "server_lsn": str(server_lsn),
        "routed_lsn": None if progress is None else str(progress.routed_lsn),
        "acknowledged_lsn": None if progress is None else str(progress.acknowledged_lsn),
        "confirmed_flush_lsn": None if slot is None else _text(slot.confirmed_flush_lsn),
        "lag_bytes": None if progress is None else max(0, server_lsn - progress.acknowledged_lsn),
        "wal_status": None if slot is None else slot.wal_status,
        "retained_wal_bytes": None if slot is None else slot.retained_bytes,
        "safe_wal_bytes": None if slot is None else slot.safe_wal_bytes,
    }


def _describe(entry: Entry, interrupted: Collection[TableName]) -> dict[str, Any]:
    subscription, wanted = entry.subscription, entry.wanted
    state = "interrupted" if wanted.table in interrupted else "active"
    state = "ending" if entry.retired else state
    return {
        "id": subscription.id,
        "app": subscription.app,
        "task": subscription.task,
        "table": ".".join(wanted.table),
        "operations": sorted(wanted.filter.operations),
        "state": "pending" if entry.start_lsn is None else state,
        "start_lsn": _text(entry.start_lsn),
    }


def _text(lsn: object) -> str | None:
    return None if lsn is None else str(lsn)
