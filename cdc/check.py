"""`cdc check`: everything that `cdc run` would trip over, found without changing anything.

One `Finding` a fact, each with its fix. It looks with the eyes of `cdc run`: the same roles, the
same comparisons, the same errors.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Literal

from cdc import gap_queries
from cdc.catalog import (
    OtherPublication,
    Publication,
    Server,
    Slot,
    Table,
    TableName,
    publication_names,
    read_other_publications,
    read_publications,
    read_server,
    read_table_names,
    read_tables,
)
from cdc.conditions import Situation, judge
from cdc.config import Settings
from cdc.connection import (
    Connection,
    connect_queue,
    connect_source,
    describe_dsn,
    is_same_server,
    queue_errors,
)
from cdc.errors import CdcError
from cdc.narrowing import Narrowing
from cdc.pooling import find_shared_backend
from cdc.preflight import (
    can_fail_over,
    limits_of,
    refuse_narrowing,
    refuse_server,
    refuse_streaming,
    refuse_unlimited_wal,
    warn_of_failover,
    warn_of_release,
)
from cdc.publication import Plan, plan
from cdc.slots import SlotKeeper
from cdc.source import PGOUTPUT, ReplicationStream
from cdc.subscriptions import SubscriptionBook
from cdc.wanted import dotted

Level = Literal["ok", "warning", "error"]
_NAME: Final = "cdc check"
_WORST_FIRST: Final = (69, 78, 65, 70)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what is so, and what to do about it."""

    level: Level
    message: str
    fix: str | None = None
    exit_code: int = 0


def exit_code(findings: list[Finding]) -> int:
    """Return what `cdc check` ends with: 0 when nothing stands against `cdc run`."""
    codes = {finding.exit_code for finding in findings if finding.level == "error"}
    return next((code for code in _WORST_FIRST if code in codes), 0)


async def check(settings: Settings) -> list[Finding]:
    """Look at both databases and return what was found, in the order in which it matters."""
    findings: list[Finding] = []
    async with AsyncExitStack() as stack:
        source = server = stream = queue = slots = book = None
        try:
            source = await connect_source(settings.source_conninfo, application_name=_NAME)
            stack.push_async_callback(source.close)
            server = await read_server(source)
            findings += _judge_server(server, settings)
            stream = await ReplicationStream.open(settings.source_conninfo, application_name=_NAME)
            stack.push_async_callback(stream.close)
            findings.append(Finding("ok", "the role can open a replication connection"))
        except CdcError as error:
            findings.append(_error(error))
        try:
            queue = await connect_queue(settings.queue_conninfo, application_name=_NAME)
            stack.push_async_callback(queue.close)
            other = await connect_queue(settings.queue_conninfo, application_name=_NAME)
            stack.push_async_callback(other.close)
            if (refusal := await find_shared_backend(queue, other)) is not None:
                findings.append(_error(refusal))
            book = SubscriptionBook(queue, slot=settings.slot, source=settings.source)
            await book.refresh()
            count = len(book.entries)
            where = describe_dsn(settings.queue_conninfo)
            findings.append(Finding("ok", f"queue {where}: {count} subscriptions to changes"))
            if source is not None:
                slots = SlotKeeper(
                    settings.slot, settings.source, source, queue, plugin=settings.plugin
                )
        except CdcError as error:
            findings.append(_error(error))
        try:
            if source is not None and server is not None and book is not None:
                findings += await _check_publication(settings, source, server, book)
            if stream is not None and slots is not None and server is not None:
                findings += await _check_slot(settings, slots, stream, server)
            if queue is not None:
                findings += await _check_gaps(settings, queue)
        except CdcError as error:
            findings.append(_error(error))
    return findings


def _judge_server(server: Server, settings: Settings) -> list[Finding]:
    where = describe_dsn(settings.source_conninfo)
    refusal = (
        refuse_server(server, settings.plugin)
        or refuse_streaming(server, settings.plugin, settings.streaming)
        or refuse_narrowing(settings.plugin, settings.narrowing)
    )
    if refusal is not None:
        return [_error(refusal)]
    findings = [Finding("ok", f"source {where}: PostgreSQL {server.version}, wal_level logical")]
    if warning := warn_of_release(server):
        findings.append(Finding("warning", warning, "upgrade the server"))
    if server.in_recovery:
        findings.append(
            Finding(
                "warning",
                "the source is a standby, where nothing can be written: no subscription begins or "
                "ends there, and no heartbeat is seen (CdcStalled)",
                "point CDC_SOURCE_DSN at the primary, or promote it",
            )
        )
    if unlimited := refuse_unlimited_wal(server, allowed=False):
        if settings.allow_unlimited_wal:
            findings.append(Finding("warning", str(unlimited), unlimited.hint))
        else:
            findings.append(_error(unlimited))
    findings += [
        Finding("warning", f"{settings.plugin}: {limit}") for limit in limits_of(settings.plugin)
    ]
    if settings.plugin != PGOUTPUT and not server.can_read_settings:
        findings.append(
            Finding(
                "warning",
                f"role {server.role!r} cannot see whether {settings.plugin} may be used",
                f"show output_plugin_libraries: where there is such a setting, it must name "
                f"{settings.plugin}",
            )
        )
    if server.encoding == "SQL_ASCII":
        findings.append(
            Finding(
                "warning",
                "the database's encoding is SQL_ASCII: rows that are not UTF-8 are set aside",
            )
        )
    return findings


async def _check_publication(
    settings: Settings, source: Connection, server: Server, book: SubscriptionBook
) -> list[Finding]:
    wanted = [entry.wanted for entry in book.entries]
    names = {w.table for w in wanted}
    tables = await read_tables(source, names)
    found = await read_publications(source, publication_names(settings.publication))
    actual, second = (found.get(name) for name in publication_names(settings.publication))
    others = await read_other_publications(source, settings.publication, names)
    change = plan(
        settings.publication,
        wanted,
        actual,
        tables,
        await read_table_names(source),
        book.past,
        second,
        is_carried=second is not None and book.past.carries(second.oid),
        narrowing=settings.narrowing,
        trusts=not (settings.manage_publication and book.past.is_blank),
    )
    by_id = {w.subscription.id: w.subscription for w in wanted}
    findings = [
        Finding("error", f"task {by_id[i].task!r}: {e}", e.hint, e.exit_code)
        for i, e in change.refused.items()
    ]
    findings += _judge_publication(settings, change)
    for publication in found.values():
        findings += _judge_strange(publication, book.past.named)
    findings += _judge_others(settings, others)
    findings += _warn_of_narrowing(settings.narrowing, change)
    unfit = settings.narrowing.why_unfit(tables)
    if unfit is not None and str(unfit) not in map(str, change.refused.values()):
        findings.append(_error(unfit))
    if not change.statements:
        findings.append(Finding("ok", f"publication {settings.publication!r} has all it needs"))
        return findings
    obstacle = _obstacle(settings, server, found, tables, change)
    text = "; ".join(statement.as_string(source) for statement in change.statements)
    if obstacle is None:
        findings.append(Finding("ok", f"`cdc run` will run: {text}"))
    else:
        findings.append(Finding("error", obstacle, f"let the owner run: {text}", 78))
    return findings


def _judge_publication(settings: Settings, change: Plan) -> list[Finding]:
    """Say what was captured and is no longer, or must not begin."""
    hint = None if change.loss is None else change.loss.hint
    findings = [
        Finding(
            "error",
            f"publication {settings.publication!r}: {drift}, and its changes were captured before",
            hint,
            65,
        )
        for drift in change.drift
    ]
    if (refusal := change.refusal) is not None:
        findings.append(_error(refusal))
    goes_on = settings.gap_policy == "recreate"
    findings += [
        Finding("warning", str(gone), gone.hint) if goes_on else _error(gone)
        for gone in change.missing.values()
    ]
    return findings


def _judge_strange(ours: Publication, named: Collection[TableName]) -> list[Finding]:
    """Name what our publication carries besides ours. None of it is ever routed."""
    strange = sorted(ours.table_names.difference(named))
    if not strange:
        return []
    names = ", ".join(map(dotted, strange[:5]))
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    return [
        Finding(
            "warning",
            f"publication {ours.name!r} also publishes {names}{more}, which no subscription has "
            "ever named: decoded and sent, never routed",
            "take them out, unless another subscriber needs them",
        )
    ]


def _warn_of_narrowing(narrowing: Narrowing, change: Plan) -> list[Finding]:
    """Say what it costs to leave something out, and where nothing can be left out."""
    lists, second = narrowing.column_lists, change.inserts
    whole = sorted(lists.keys() - second.main_definitions.keys() - second.tables)
    listed = sorted(lists.keys() - set(whole))
    findings = []
    if listed:
        findings.append(
            Finding(
                "warning",
                f"CDC_COLUMN_LISTS has {', '.join(map(dotted, listed))}: in the application, DROP "
                "COLUMN of a listed column fails",
                "take the column out of CDC_COLUMN_LISTS first, and run `cdc apply`",
            )
        )
    if whole:
        findings.append(
            Finding(
                "warning",
                f"CDC_COLUMN_LISTS has {', '.join(map(dotted, whole))}, but every column leaves "
                "the database: no such table, or partitioned, or with REPLICA IDENTITY FULL",
            )
        )
    if unfiltered := sorted(narrowing.row_filters.keys() - second.tables):
        findings.append(
            Finding(
                "warning",
                f"CDC_ROW_FILTERS: {', '.join(map(dotted, unfiltered))} is not filtered: it is not "
                "captured, or its updates are, or the sidecar has still to move it",
            )
        )
    return findings


def _judge_others(settings: Settings, others: Sequence[OtherPublication]) -> list[Finding]:
    """Name what other publications do to ours."""
    findings = []
    for other in others:
        if other.partial_tables:
            findings.append(
                Finding(
                    "warning",
                    f"publication {other.name!r} publishes {', '.join(other.partial_tables)} in "
                    f"part: who subscribes to it and to {settings.publication!r} together fails",
                    "leave our publication to cdc alone",
                )
            )
        if other.publishes_queue:
            what = "is FOR ALL TABLES: it" if other.all_tables else "publishes schema conductor: it"
            findings.append(
                Finding(
                    "warning",
                    f"publication {other.name!r} {what} sends every job to its subscribers"
                    + (", and makes updates of tables without a key fail" * other.all_tables),
                    "publish the application's schemas only",
                )
            )
    return findings


def _obstacle(
    settings: Settings,
    server: Server,
    found: Mapping[str, Publication],
    tables: dict[TableName, Table],
    change: Plan,
) -> str | None:
    """Say why our role could not run the plan."""
    if not settings.manage_publication:
        return "the publication is not as it must be, and CDC_MANAGE_PUBLICATION is off"
    if (change.create or change.inserts.create) and not server.can_create:
        return f"role {server.role!r} may not create a publication in {server.database!r}"
    strange = [repr(name) for name, publication in found.items() if not publication.owned]
    if strange:
        return f"role {server.role!r} does not own publication {' and '.join(strange)}"
    second = change.inserts
    added = {*change.add, *second.add, *second.from_main, *second.to_main}
    foreign = [dotted(table) for table in sorted(added) if not tables[table].owned]
    if foreign and not server.is_superuser:
        return f"role {server.role!r} does not own {', '.join(foreign)}"
    return None


async def _check_slot(
    settings: Settings, slots: SlotKeeper, stream: ReplicationStream, server: Server
) -> list[Finding]:
    situation = await slots.situation(stream)
    idle = [
        Finding(
            "warning",
            f"slot {name!r} of the same source has progress, and nobody streams from it (last "
            f"{seen_at}): new subscriptions wait for it too",
            f"start its sidecar; if it is out of service: cdc slot drop {name}",
        )
        for name, seen_at in (await slots.idle_slots()).items()
    ]
    if (problem := judge(situation)) is not None:
        return [*idle, _error(problem)]
    return idle + _describe_slot(settings, situation, server)


async def _check_gaps(settings: Settings, queue: Connection) -> list[Finding]:
    """Name what may have been lost, though everything may be well again by now."""
    with queue_errors():
        cursor = await queue.execute(gap_queries.RECENT_GAPS, {"slot": settings.slot})
        gaps = await cursor.fetchall()
    return [
        Finding(
            "warning",
            f"gap {gap['id']} is open: {gap['condition']} since {gap['opened_at']}, "
            f"from {gap['from_lsn']}",
            "make up for what it left out, then end it: deploy/runbooks/cdc-gap.md",
        )
        for gap in gaps
        if gap["closed_at"] is None
    ]


def _describe_slot(settings: Settings, situation: Situation, server: Server) -> list[Finding]:
    slot, name = situation.slot, situation.slot_name
    if slot is None:
        if server.used_replication_slots >= server.max_replication_slots:
            return [
                Finding(
                    "error",
                    f"all {server.max_replication_slots} replication slots are in use",
                    "raise max_replication_slots, or drop a slot that nobody reads",
                    78,
                )
            ]
        findings = [Finding("ok", f"`cdc run` will create slot {name!r}")]
        return findings + _check_failover(settings, server, None)
    findings = []
    who = "nobody streams" if slot.active_pid is None else f"PID {slot.active_pid} streams"
    findings.append(
        Finding("ok", f"slot {name!r} fits the progress at {slot.confirmed_flush_lsn}; {who}")
    )
    if slot.wal_status == "unreserved":
        findings.append(
            Finding(
                "warning",
                f"slot {name!r} is about to lose WAL that it needs",
                "let cdc catch up now, or raise max_slot_wal_keep_size",
            )
        )
    return findings + _check_failover(settings, server, slot)


def _check_failover(settings: Settings, server: Server, slot: Slot | None) -> list[Finding]:
    """Say what a failover of the source will cost; `slot` is None when it is still to be made."""
    wanted = settings.failover and can_fail_over(server)
    findings = []
    if slot is not None and slot.failover != wanted:
        does = "survives a failover" if slot.failover else "does not survive a failover"
        findings.append(
            Finding(
                "warning",
                f"slot {slot.name!r} {does}, against CDC_FAILOVER",
                "stop the sidecars, then: cdc apply",
            )
        )
    if wanted if slot is None else slot.failover:
        same_queue = is_same_server(settings.source_conninfo, settings.queue_conninfo)
        findings += [
            Finding("warning", warning, fix)
            for warning, fix in warn_of_failover(server, same_queue=same_queue)
        ]
    return findings


def _error(error: CdcError) -> Finding:
    return Finding("error", str(error), error.hint, error.exit_code)
