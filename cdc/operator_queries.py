"""The SQL of operators' commands that no running sidecar needs (`queries` has all the rest)."""

from typing import Final

from psycopg import sql

from cdc.queries import SLOT_FIELDS

# --- source: slots ----------------------------------------------------------------------------

SLOTS: Final = sql.SQL("{} where s.slot_type = 'logical' order by s.slot_name").format(SLOT_FIELDS)

ADVANCE_SLOT: Final = sql.SQL(
    "select end_lsn::text from pg_replication_slot_advance(%(slot)s, %(lsn)s)"
)


def alter_failover(slot: str, *, failover: bool) -> sql.Composed:
    """Let a slot survive a failover, or not (a replication command, from PostgreSQL 17)."""
    return sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER {})").format(
        sql.Identifier(slot), sql.SQL("true" if failover else "false")
    )


# --- source: publications ----------------------------------------------------------------------

OTHER_PUBLICATIONS: Final = sql.SQL("""
    select p.pubname as name, p.puballtables as all_tables,
        p.puballtables or exists (
            select from pg_publication_namespace pn
            join pg_namespace n on n.oid = pn.pnnspid
            where pn.pnpubid = p.oid and n.nspname = 'conductor'
        ) or exists (
            select from pg_publication_rel pr
            join pg_class c on c.oid = pr.prrelid
            join pg_namespace n on n.oid = c.relnamespace
            where pr.prpubid = p.oid and n.nspname = 'conductor'
        ) as publishes_queue,
        coalesce((
            select array_agg(format('%%I.%%I', w.schema, w.name) order by w.schema, w.name)
            from unnest(%(schemas)s::text[], %(names)s::text[]) as w (schema, name)
            join pg_namespace n on n.nspname = w.schema
            join pg_class c on c.relnamespace = n.oid and c.relname = w.name
            join pg_publication_rel pr on pr.prpubid = p.oid and pr.prrelid = c.oid
            where pr.prattrs is not null or pr.prqual is not null), '{}') as partial_tables
    from pg_publication p
    where p.pubname <> all (%(publications)s)
    order by 1
""")

# --- queue: slots -----------------------------------------------------------------------------

# Each sidecar listens on one connection to the queue; what other roles run is not shown to ours.
SIDECARS: Final = sql.SQL("""
    select coalesce(host(a.client_addr), 'local') as address, a.backend_start::text as since,
        a.pid
    from pg_stat_activity a
    where a.datname = current_database() and a.application_name = %(name)s
    order by a.backend_start
""")

PROGRESS_SLOTS: Final = sql.SQL("select slot from conductor.progress order by slot")

RECORD_GAP: Final = sql.SQL("""
    with ended as (
        update conductor.gaps
        set closed_at = clock_timestamp(), policy = %(policy)s,
            from_lsn = case condition when %(condition)s then %(from)s::pg_lsn else from_lsn end,
            to_lsn = %(to)s::pg_lsn
        where slot = %(slot)s and closed_at is null
            and (%(all)s or condition = %(condition)s)
        returning condition
    )
    insert into conductor.gaps (
        slot, generation, condition, policy, from_lsn, to_lsn, detail, closed_at)
    select %(slot)s, %(generation)s, %(condition)s, %(policy)s, %(from)s, %(to)s, %(detail)s::json,
        clock_timestamp()
    where not exists (select from ended where ended.condition = %(condition)s)
""")
"""What an operator gave up, knowingly: in the row that a sidecar has left, or else in a new one."""

CLOSE_GAP: Final = sql.SQL("""
    update conductor.gaps set closed_at = clock_timestamp(), to_lsn = %(to)s
    where slot = %(slot)s and condition = %(condition)s and closed_at is null
""")

SKIP_PROGRESS: Final = sql.SQL("""
    update conductor.progress
    set routed_lsn = %(to)s, acknowledged_lsn = greatest(acknowledged_lsn, %(to)s),
        epoch = epoch + 1, updated_at = clock_timestamp()
    where slot = %(slot)s and generation = %(generation)s and routed_lsn = %(from)s
""")

FORGET_PROGRESS: Final = sql.SQL("""
    with activations as (delete from conductor.activations where slot = %(slot)s)
    delete from conductor.progress where slot = %(slot)s and generation = %(generation)s
""")

# --- queue: dead letters ----------------------------------------------------------------------

DEAD_LETTERS: Final = sql.SQL("""
    select d.id, d.generation, d.commit_lsn::text, d.ordinal, d.subscription, s.task,
        (d.relation ->> 'schema') || '.' || (d.relation ->> 'table') as table, d.error,
        octet_length(d.raw) as size_bytes, d.created_at::text
    from conductor.dead_letters d
    left join conductor.subscriptions s on s.id = d.subscription
    where d.slot = %(slot)s
    order by d.id
    limit %(limit)s
""")

_DEAD_LETTER: Final = sql.SQL("""
    select d.id, d.generation, d.commit_lsn::text,
        coalesce((extract(epoch from d.committed_at) * 1000000)::bigint, 0) as commit_time_us,
        d.ordinal, d.subscription, d.relation, d.error, d.raw, d.created_at::text,
        (extract(epoch from conductor.now()) * 1000000)::bigint as now_us
    from conductor.dead_letters d
    where d.slot = %(slot)s and d.id = %(id)s
""")

DEAD_LETTER: Final = _DEAD_LETTER

LOCK_DEAD_LETTER: Final = sql.SQL("{} for update skip locked").format(_DEAD_LETTER)

DEAD_LETTER_IDS: Final = sql.SQL(
    "select id from conductor.dead_letters where slot = %(slot)s order by id"
)

DELETE_DEAD_LETTER: Final = sql.SQL(
    "delete from conductor.dead_letters where slot = %(slot)s and id = %(id)s"
)

KEEP_DEAD_LETTER: Final = sql.SQL(
    "update conductor.dead_letters set error = %(error)s where slot = %(slot)s and id = %(id)s"
)

_SUBSCRIPTION_FIELDS: Final = sql.SQL(
    "s.app, s.task, s.trigger, s.kind, s.source, s.queue, s.version, s.rank, s.definition"
)

SUBSCRIPTION_OF_LETTER: Final = sql.SQL("""
    select own.id, {fields}
    from conductor.subscriptions own
    join conductor.subscriptions s on s.id = own.id or (
        own.retired_at is not null and s.retired_at is null
        and (s.app, s.task, s.trigger) = (own.app, own.task, own.trigger)
        and s.definition ->> 'schema' = own.definition ->> 'schema'
        and s.definition ->> 'table' = own.definition ->> 'table'
        and not exists (
            select from conductor.activations a
            where a.subscription = s.id and a.slot = %(slot)s
                and a.start_lsn < %(commit_lsn)s::pg_lsn))
    where own.id = %(subscription)s
    order by s.id = own.id, s.id desc
    limit 1
""").format(fields=_SUBSCRIPTION_FIELDS)
"""What a letter's subscription has become, under the id that it had. Not one that routed when the
letter was written: that has a job of its own, or a letter."""

SUBSCRIPTIONS_AT: Final = sql.SQL("""
    select s.id, {fields}
    from conductor.subscriptions s
    join conductor.activations a on a.subscription = s.id and a.slot = %(slot)s
    where s.kind = 'change' and a.start_lsn < %(commit_lsn)s::pg_lsn
        and (a.end_lsn is null or a.end_lsn >= %(commit_lsn)s::pg_lsn)
    order by s.id
""").format(fields=_SUBSCRIPTION_FIELDS)
