"""The SQL of emitted events, and of what jobs wait for (`queries` has all the rest)."""

from typing import Final

from psycopg import sql

# --- source: who routes them ------------------------------------------------------------------

EMITS_INSTALLED: Final = sql.SQL("""
    select to_regclass('conductor.emit_owner') is not null and not pg_is_in_recovery() as installed
""")

CLAIM_EMITS: Final = sql.SQL("""
    insert into conductor.emit_owner as o (slot) values (%(slot)s)
    on conflict (singleton) do update set slot = excluded.slot, registered_at = clock_timestamp()
    where o.slot <> excluded.slot and not exists (
        select from pg_replication_slots s
        where s.slot_name = o.slot and s.database = current_database())
""")
"""The first slot of a database owns the prefix of emitted events, until it is dropped."""

EMIT_SECRET: Final = sql.SQL("""
    select secret::text as secret from conductor.emit_owner where slot = %(slot)s
""")

# --- queue: who routes them, and who waits for them -------------------------------------------

NOTE_EMITS: Final = sql.SQL("""
    update conductor.progress set emits = %(emits)s where slot = %(slot)s and emits <> %(emits)s
""")

WAIT_FIELDS: Final = sql.SQL("""
    with recursive found as (
        select t.topic, f.fields
        from unnest(%(topics)s::text[]) as t (topic)
        cross join lateral (
            select s.fields from conductor.steps s
            where s.topic = t.topic and s.outcome is null
            order by s.fields limit 1
        ) f
        union all
        select f.topic, n.fields
        from found f
        cross join lateral (
            select s.fields from conductor.steps s
            where s.topic = f.topic and s.outcome is null and s.fields > f.fields
            order by s.fields limit 1
        ) n
    )
    select topic, fields from found
""")
"""By which fields jobs wait for these topics: skips from one to the next of the index."""

ADD_WAKEUPS: Final = sql.SQL("""
    insert into conductor.wakeups (job, step, outcome, result)
    select s.job, s.name, 'completed', m.payload
    from unnest(%(topics)s::text[], %(fields)s::text[], %(matched)s::text[], %(lsns)s::pg_lsn[],
        %(payloads)s::text[]::json[]) with ordinality
        as m (topic, fields, matched, lsn, payload, place)
    cross join lateral (
        select c.job, c.name, c.seen_lsn
        from conductor.steps c
        where c.topic = m.topic and c.fields = m.fields and c.matched = m.matched
            and c.outcome is null
    ) s
    where m.lsn > s.seen_lsn
    order by m.place
    returning job
""")
"""Leaves word for jobs that wait for these changes. Nothing else of them is locked or written."""

EVENT_WAITS: Final = sql.SQL("""
    select m.place::integer as place, s.job, s.name, s.condition::text as condition
    from unnest(%(topics)s::text[], %(fields)s::text[], %(matched)s::text[], %(xids)s::xid8[],
        %(places)s::integer[]) as m (topic, fields, matched, xid, place)
    cross join lateral (
        select c.job, c.name, c.condition, c.seen
        from conductor.steps c
        where c.topic = m.topic and c.fields = m.fields and c.matched = m.matched
            and c.outcome is null
    ) s
    where m.xid is null or not pg_visible_in_snapshot(m.xid, s.seen)
    order by m.place, s.job, s.name
""")
"""Which steps wait for these events, as far as topic and fields decide. Not for what was emitted
before they were written; where transactions cannot be compared (no xid), for whatever is routed
after that."""

ADD_EVENT_WAKEUPS: Final = sql.SQL("""
    insert into conductor.wakeups (job, step, outcome, result)
    select u.job, u.step, u.outcome,
        case u.outcome when 'completed' then u.result -> 'payload' else u.result end
    from unnest(%(jobs)s::bigint[], %(steps)s::text[], %(outcomes)s::text[],
        %(results)s::text[]::json[]) with ordinality as u (job, step, outcome, result, place)
    order by u.place
""")
