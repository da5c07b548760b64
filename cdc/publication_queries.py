"""The SQL about tables and publications of the source: what there is, and how it is published."""

from collections.abc import Iterable, Sequence
from typing import Final

from psycopg import sql

TABLES: Final = sql.SQL("""
    select w.schema, w.name, c.oid::bigint as oid, c.relkind::text as kind,
        c.relpersistence::text as persistence,
        c.relreplident::text as replica_identity,
        i.indexrelid is not null as has_identity_index,
        pg_has_role(c.relowner, 'usage') as owned,
        coalesce((
            select array_agg(a.attname::text order by a.attnum) from pg_attribute a
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '{}') as columns,
        coalesce((
            select array_agg(a.attname::text order by a.attnum) from pg_attribute a
            where a.attrelid = c.oid
                and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])), '{}')
            as identity_columns,
        coalesce((
            select array_agg(format('%%I.%%I', n2.nspname, c2.relname) order by t.level desc)
            from pg_partition_ancestors(c.oid) with ordinality as t (relid, level)
            join pg_class c2 on c2.oid = t.relid join pg_namespace n2 on n2.oid = c2.relnamespace
            where t.relid <> c.oid), '{}') as ancestors,
        coalesce((
            select array_agg(format('%%I.%%I', n2.nspname, c2.relname) order by c2.oid)
            from pg_partition_tree(c.oid) t
            join pg_class c2 on c2.oid = t.relid join pg_namespace n2 on n2.oid = c2.relnamespace
            where c.relkind = 'p' and t.isleaf and c2.relkind = 'r' and (
                c2.relreplident = 'n' or (c2.relreplident in ('d', 'i') and not exists (
                    select from pg_index i2 where i2.indrelid = c2.oid and i2.indisvalid
                        and i2.indimmediate and case c2.relreplident
                            when 'd' then i2.indisprimary else i2.indisreplident end)))
            ), '{}') as leaves_without_identity
    from unnest(%(schemas)s::text[], %(names)s::text[]) as w (schema, name)
    join pg_namespace n on n.nspname = w.schema
    join pg_class c on c.relnamespace = n.oid and c.relname = w.name
        and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
    left join pg_index i on i.indrelid = c.oid and i.indisvalid and i.indimmediate
        and case c.relreplident when 'd' then i.indisprimary
            when 'i' then i.indisreplident else false end
""")

TABLE_SHAPE: Final = sql.SQL("""
    with own as (
        select c.oid, c.relreplident from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = %(schema)s and c.relname = %(name)s and c.relkind in ('r', 'p')
    ), published as (
        select c.oid, c.relname, c.relnamespace, c.relreplident,
            own.oid as own_oid, own.relreplident as own_identity
        from own join pg_class c on c.oid = coalesce((
            select a.relid
            from pg_partition_ancestors(own.oid) with ordinality as a (relid, level)
            join pg_class ac on ac.oid = a.relid
            where exists (
                select from pg_publication p
                left join pg_publication_rel pr on pr.prpubid = p.oid and pr.prrelid = a.relid
                left join pg_publication_namespace pn
                    on pn.pnpubid = p.oid and pn.pnnspid = ac.relnamespace
                where p.pubname = any (%(publications)s)
                    and (pr.oid is not null or pn.oid is not null))
            order by a.level desc limit 1), own.oid)
    ), identity as (
        select (i.indkey::int2[])[0:i.indnkeyatts - 1] as attnums
        from published p join pg_index i on i.indrelid = p.oid
        where i.indisvalid and i.indimmediate and case p.relreplident
            when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
    )
    select p.oid::bigint as oid, n.nspname as schema, p.relname as name,
        p.relreplident::text as replica_identity, p.own_identity::text as own_identity,
        coalesce((
            select json_agg(json_build_object(
                'name', a.attname, 'type_oid', a.atttypid::bigint,
                'is_key', coalesce(a.attnum = any ((select attnums from identity)::int2[]), false),
                'is_toastable', a.attlen = -1, 'is_generated', a.attgenerated <> '',
                'is_not_null', a.attnotnull) order by a.attnum)
            from pg_attribute a
            where a.attrelid = p.oid and a.attnum > 0 and not a.attisdropped), '[]') as columns,
        coalesce((
            select array_agg(a.attname::text) from pg_attribute a
            where a.attrelid = p.own_oid and a.attnum > 0 and not a.attisdropped
                and a.attgenerated <> ''), '{}') as own_generated
    from published p join pg_namespace n on n.oid = p.relnamespace
""")
"""A table as what it is published: its topmost ancestor in the publication, or itself."""

BASE_TYPES: Final = sql.SQL("""
    with recursive chain as (
        select oid as type_oid, oid as base_oid from pg_type where oid = any (%(oids)s::oid[])
        union all
        select c.type_oid, t.typbasetype from chain c join pg_type t on t.oid = c.base_oid
        where t.typtype = 'd'
    )
    select c.type_oid::bigint as oid, n.nspname as schema, t.typname as name
    from chain c join pg_type t on t.oid = c.base_oid join pg_namespace n on n.oid = t.typnamespace
    where t.typtype <> 'd' and c.type_oid >= 10000  -- the first that pgoutput describes
    order by 1
""")

TABLE_NAMES: Final = sql.SQL("""
    select n.nspname || '.' || c.relname as name
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p') and c.relpersistence = 'p'
        and n.nspname not in ('pg_catalog', 'information_schema', 'conductor')
        and n.nspname not like 'pg\\_%%'
    order by 1 limit 10000
""")

PUBLICATIONS: Final = sql.SQL("""
    select p.pubname as name, p.oid::bigint as oid, p.puballtables as all_tables,
        p.pubviaroot as via_root, p.pubinsert and p.pubtruncate as publishes_inserts,
        p.pubupdate or p.pubdelete as publishes_updates,
        p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate as all_operations,
        pg_has_role(p.pubowner, 'usage') as owned,
        coalesce((
            select array_agg(n.nspname::text order by n.nspname::text)
            from pg_publication_namespace pn
            join pg_namespace n on n.oid = pn.pnnspid where pn.pnpubid = p.oid), '{}') as schemas,
        coalesce((
            select array_agg(pn.oid::bigint order by n.nspname::text)
            from pg_publication_namespace pn
            join pg_namespace n on n.oid = pn.pnnspid where pn.pnpubid = p.oid), '{}')
            as schema_memberships
    from pg_publication p
    where p.pubname = any (%(publications)s)
""")

PUBLICATION_TABLES: Final = sql.SQL("""
    select p.pubname as publication, n.nspname as schema, c.relname as name,
        pr.prqual is not null as has_row_filter, pr.prattrs is not null as has_column_list,
        pr.oid::bigint as membership, (
            select array_agg(a.attname::text order by a.attnum) from pg_attribute a
            where a.attrelid = c.oid and a.attnum = any (pr.prattrs::int2[])) as columns
    from pg_publication p
    join pg_publication_rel pr on pr.prpubid = p.oid
    join pg_class c on c.oid = pr.prrelid
    join pg_namespace n on n.oid = c.relnamespace
    where p.pubname = any (%(publications)s)
    order by 1, 2, 3
""")

PartOfTable = tuple[Sequence[str] | None, str | None]
"""Columns (None: all) and an SQL condition (None: every row)."""

_INSERTS: Final = "publish = 'insert, truncate', publish_via_partition_root = true"


def create_publication(publication: str) -> sql.Composed:
    """Create our publication, empty: all operations, partitions as their root."""
    return sql.SQL("create publication {} with (publish_via_partition_root = true)").format(
        sql.Identifier(publication)
    )


def create_insert_only(publication: str) -> sql.Composed:
    """Create our second publication, empty: what never needs a replica identity."""
    return sql.SQL("create publication {} with ({})").format(
        sql.Identifier(publication), sql.SQL(_INSERTS)
    )


def restore_insert_only(publication: str) -> sql.Composed:
    """Publish inserts and truncates again, partitions as their root, and nothing else."""
    return sql.SQL("alter publication {} set ({})").format(
        sql.Identifier(publication), sql.SQL(_INSERTS)
    )


def move_table(
    table: tuple[str, str], source: str, target: str, definition: PartOfTable = (None, None)
) -> sql.Composed:
    """Publish a table by another publication, at one moment: no row of it is missed.

    Or by the same one, as it is defined now.
    """
    return sql.SQL("begin; {}; {}; commit").format(
        drop_tables(source, [table]), add_table(target, table, definition)
    )


def add_table(
    publication: str, table: tuple[str, str], definition: PartOfTable = (None, None)
) -> sql.Composed:
    """Publish another table: whole, or these columns, and rows for which this SQL is true."""
    columns, condition = definition
    listed = sql.SQL(", ").join(map(sql.Identifier, columns or ()))
    return sql.SQL("alter publication {} add table {}{}{}").format(
        sql.Identifier(publication),
        _tables([table]),
        sql.SQL(" ({})").format(listed) if columns else sql.SQL(""),
        sql.SQL(" where ({})").format(sql.SQL(condition)) if condition else sql.SQL(""),
    )


def drop_tables(publication: str, tables: Iterable[tuple[str, str]]) -> sql.Composed:
    """Publish these tables no longer."""
    return sql.SQL("alter publication {} drop table {}").format(
        sql.Identifier(publication), _tables(tables)
    )


def restore_publication(publication: str) -> sql.Composed:
    """Publish all operations again, and partitions as their root."""
    return sql.SQL(
        "alter publication {} set (publish = 'insert, update, delete, truncate', "
        "publish_via_partition_root = true)"
    ).format(sql.Identifier(publication))


def _tables(tables: Iterable[tuple[str, str]]) -> sql.Composed:
    """`only`, so that plain inheritance children are never published by the way."""
    return sql.SQL(", ").join(
        sql.SQL("only {}").format(sql.Identifier(schema, name)) for schema, name in tables
    )
