"""The statements with which routed jobs come into the queue (`queries` has all the rest)."""

from typing import Final

from psycopg import sql

from conductor.contract import COPY_COLUMNS, KEYED_COLUMNS


def _copy(columns: tuple[str, ...]) -> sql.Composed:
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("copy conductor.jobs ({}) from stdin (format binary)").format(names)


COPY_JOBS: Final = _copy(COPY_COLUMNS)

COPY_KEYED_JOBS: Final = _copy(KEYED_COLUMNS)

CALL_LANES: Final = sql.SQL("""
    insert into conductor.lane_calls (queue, task, key)
    select queue, task, key
    from unnest(%(queues)s::text[], %(tasks)s::text[], %(keys)s::text[]) as l (queue, task, key)
""")

COALESCING_JOBS: Final = sql.SQL("""
    select w.place, j.at::text, j.payload::text
    from unnest(%(subscriptions)s::bigint[], %(keys)s::text[], %(lsns)s::pg_lsn[],
        %(ordinals)s::bigint[]) with ordinality as w (subscription, key, lsn, ordinal, place)
    cross join lateral (
        select c.ctid as at, c.payload
        from conductor.jobs c
        where c.coalescing and c.fence = 0 and c.subscription = w.subscription and c.key = w.key
            and (c.source_lsn, c.source_ordinal) < (w.lsn, w.ordinal)
        order by c.source_lsn desc, c.source_ordinal desc
        limit 1
        for update skip locked
    ) j
""")
"""Jobs that have not begun and can take these changes in: the latest before each, if any; locked.

Not in the order of the ids: the server would walk the primary key for a key that is common.
"""

RENEW_JOBS: Final = sql.SQL("""
    update conductor.jobs j
    set payload = r.payload, source_lsn = r.lsn, source_ordinal = r.ordinal
    from unnest(
        %(ats)s::text[]::tid[], %(payloads)s::json[], %(lsns)s::pg_lsn[], %(ordinals)s::bigint[]
    ) as r (at, payload, lsn, ordinal)
    where j.ctid = r.at and j.ctid = any (%(ats)s::text[]::tid[])
""")
"""Found by where they stand, as all that was just locked is."""
