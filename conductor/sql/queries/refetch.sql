-- Rows of the source, read again by their key, rendered as the router renders them.

-- name: render
-- For this transaction: every setting that changes how values are written.
select pg_catalog.set_config(s.name, s.value, true)
from (values
    ('datestyle', 'ISO,MDY'),
    ('timezone', 'UTC'),
    ('intervalstyle', 'postgres'),
    ('extra_float_digits', '3'),
    ('bytea_output', 'hex'),
    ('lc_monetary', 'C'),
    ('search_path', 'pg_catalog'),
    ('quote_all_identifiers', 'off'),
    ('transaction_read_only', 'on')
) as s (name, value)

-- name: log_end
select pg_catalog.pg_current_wal_insert_lsn()::text

-- name: row_key
-- The columns that a table's rows are found by: of its primary key, else of the index of its replica
-- identity; none when it has neither. No row: there is no such table.
select coalesce((
        select array_agg(a.attname::text order by k.place)
        from (
            select i.indkey, i.indnkeyatts
            from pg_catalog.pg_index i
            where i.indrelid = c.oid and i.indisvalid and (i.indisprimary or i.indisreplident)
            order by i.indisprimary desc
            limit 1
        ) i
        cross join lateral unnest(i.indkey::int2[]) with ordinality as k (attnum, place)
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum
        where k.place <= i.indnkeyatts
    ), '{}')
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where n.nspname = %(schema)s and c.relname = %(table)s and c.relkind in ('r', 'p')

-- name: row_by_key
-- A template: names of columns, of the table, and the comparison of its key.
select {columns} from {table} where {key} limit 1
