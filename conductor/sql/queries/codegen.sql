-- The catalog as row models need it: tables, their columns, and every type these are made of.

-- name: existing_schemas
select n.nspname::text from pg_catalog.pg_namespace n
where n.nspname = any (%(schemas)s::text[])

-- name: schema_names
select n.nspname::text from pg_catalog.pg_namespace n
where n.nspname not in ('pg_catalog', 'information_schema', 'conductor')
    and n.nspname not like 'pg\_toast%%' and n.nspname not like 'pg\_temp%%'

-- name: tables_of_schemas
-- Tables whose changes can be read: a partition's arrive under the name of its root.
select c.oid, n.nspname::text as schema, c.relname::text as name,
    pg_catalog.obj_description(c.oid, 'pg_class') as comment
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where n.nspname = any (%(schemas)s::text[]) and c.relkind in ('r', 'p') and not c.relispartition
    and c.relpersistence <> 't'

-- name: named_tables
select c.oid, n.nspname::text as schema, c.relname::text as name,
    pg_catalog.obj_description(c.oid, 'pg_class') as comment
from unnest(%(schemas)s::text[], %(names)s::text[]) as w (schema, name)
join pg_catalog.pg_namespace n on n.nspname = w.schema
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.name
where c.relkind in ('r', 'p')

-- name: attributes
-- Columns of tables and attributes of composite types, in their order. From PostgreSQL 18 a not-null
-- constraint can be `not valid`: rows from before it may hold null.
select a.attrelid as relation, a.attname::text as name, a.atttypid as type,
    a.attnotnull and not exists (
        select from pg_catalog.pg_constraint k
        where k.conrelid = a.attrelid and k.contype = 'n' and not k.convalidated
            and k.conkey = array[a.attnum]
    ) as not_null, a.attndims as dimensions, a.attgenerated <> '' as generated,
    pg_catalog.col_description(a.attrelid, a.attnum) as comment
from pg_catalog.pg_attribute a
where a.attrelid = any (%(relations)s::oid[]) and a.attnum > 0 and not a.attisdropped
order by a.attrelid, a.attnum

-- name: types
-- The types of these relations' columns, the enums of these schemas, and what those are made of.
with recursive reached (oid) as (
    select a.atttypid from pg_catalog.pg_attribute a
    where a.attrelid = any (%(relations)s::oid[]) and a.attnum > 0 and not a.attisdropped
    union
    select t.oid from pg_catalog.pg_type t
    join pg_catalog.pg_namespace n on n.oid = t.typnamespace
    where n.nspname = any (%(schemas)s::text[]) and t.typtype = 'e'
    union
    select part.oid
    from reached
    join pg_catalog.pg_type t on t.oid = reached.oid
    cross join lateral (
        select t.typelem as oid where t.typelem <> 0 and t.typlen = -1
        union all
        select t.typbasetype where t.typtype = 'd'
        union all
        select a.atttypid from pg_catalog.pg_attribute a
        where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
        union all
        select r.rngsubtype from pg_catalog.pg_range r where t.oid in (r.rngtypid, r.rngmultitypid)
    ) as part
)
select t.oid, n.nspname::text as schema, t.typname::text as name, t.typtype::text as kind,
    case when t.typlen = -1 and t.typelem <> 0 then t.typelem else 0 end as element,
    t.typbasetype as base, t.typnotnull as not_null, t.typndims as dimensions,
    coalesce((
        select r.rngsubtype from pg_catalog.pg_range r where t.oid in (r.rngtypid, r.rngmultitypid)
    ), 0) as subtype,
    t.typrelid as relation,
    coalesce((
        select c.relkind <> 'c' from pg_catalog.pg_class c where c.oid = t.typrelid
    ), false) as is_row,
    array(
        select e.enumlabel::text from pg_catalog.pg_enum e
        where e.enumtypid = t.oid order by e.enumsortorder
    ) as labels,
    pg_catalog.obj_description(t.oid, 'pg_type') as comment
from reached
join pg_catalog.pg_type t on t.oid = reached.oid
join pg_catalog.pg_namespace n on n.oid = t.typnamespace
