"""The SQL of `conductor.gaps`: what may have been lost, and when it was over."""

from typing import Final

from psycopg import sql

OPEN_GAP: Final = sql.SQL("""
    insert into conductor.gaps (slot, generation, condition, policy, from_lsn, to_lsn, detail)
    select %(slot)s, %(generation)s, %(condition)s, %(policy)s, %(from_lsn)s, %(to_lsn)s,
        %(detail)s::json
    where not exists (
        select from conductor.gaps
        where slot = %(slot)s and generation is not distinct from %(generation)s
            and condition = %(condition)s and closed_at is null
            and (detail ->> 'schema', detail ->> 'table') is not distinct from
                (%(detail)s::json ->> 'schema', %(detail)s::json ->> 'table'))
    returning id
""")
"""One open gap a condition, or table: a sidecar that is restarted into the same refusal adds no
rows."""

CLOSE_GAPS: Final = sql.SQL("""
    update conductor.gaps
    set closed_at = clock_timestamp(), to_lsn = %(to_lsn)s, policy = %(policy)s
    where slot = %(slot)s and closed_at is null
""")
"""A new slot: nothing before its start is delivered, wherever the old one stood."""

CLOSE_TABLE_GAPS: Final = sql.SQL("""
    update conductor.gaps g set closed_at = clock_timestamp(), to_lsn = %(to_lsn)s
    from unnest(%(schemas)s::text[], %(tables)s::text[]) as t (schema, name)
    where g.slot = %(slot)s and g.condition = %(condition)s and g.closed_at is null
        and (g.detail ->> 'schema', g.detail ->> 'table') = (t.schema, t.name)
""")

INTERRUPTED_TABLES: Final = sql.SQL("""
    select distinct detail ->> 'schema' as schema, detail ->> 'table' as name
    from conductor.gaps
    where slot = %(slot)s and condition = %(condition)s and closed_at is null
""")
"""Whose gap is open until they are captured again."""

IS_GAP_OPEN: Final = sql.SQL("""
    select from conductor.gaps
    where slot = %(slot)s and generation = %(generation)s and condition = %(condition)s
        and closed_at is null
""")

CLOSE_GAP_UNHARMED: Final = sql.SQL("""
    update conductor.gaps g set closed_at = clock_timestamp(), to_lsn = g.from_lsn
    from conductor.progress p
    where p.slot = %(slot)s and g.slot = p.slot and g.generation = p.generation
        and g.condition = %(condition)s and g.closed_at is null
""")
"""The condition passed, and nothing was missed."""

CLOSE_CONTINUED: Final = sql.SQL("""
    update conductor.gaps set closed_at = clock_timestamp(), to_lsn = %(to_lsn)s
    where slot = %(slot)s and condition = %(condition)s and policy = 'continue'
        and closed_at is null
""")
"""What the stream lacked while it went on, and has again."""

RECENT_GAPS: Final = sql.SQL("""
    select id, condition, policy, from_lsn::text, to_lsn::text, detail, opened_at::text,
        closed_at::text
    from conductor.gaps
    where slot = %(slot)s
    order by closed_at is null desc, id desc limit 20
""")

RECENT_RECREATIONS: Final = sql.SQL("""
    select count(distinct generation)::int as recreations from conductor.gaps
    where slot = %(slot)s and policy = 'recreate'
        and closed_at > clock_timestamp() - interval '1 hour'
""")
