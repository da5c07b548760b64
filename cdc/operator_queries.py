"""The SQL of operators' commands that no running sidecar needs (`queries` has all the rest)."""

from typing import Final

from psycopg import sql

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
