-- What conductor.migrations needs; the migrations themselves are numbered files beside this folder.

-- name: set_session
-- Names in a migration mean what they say, whatever the role's defaults are; its waits are its own.
select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
    pg_catalog.set_config('statement_timeout', '0', true)

-- name: lock_migrations
-- One process migrates at a time. Transaction level, so that it holds behind a pooler as well.
select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('conductor.migrations', 0))

-- name: has_schema
-- Asked first: "if not exists" demands CREATE on the database even where the schema is there.
select pg_catalog.to_regnamespace('conductor') is not null

-- name: create_schema
create schema if not exists conductor

-- name: create_record
create table if not exists conductor.migrations (
    number integer primary key,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default pg_catalog.clock_timestamp(),
    workers_from integer    -- the oldest migration whose workers may go on; null: none older
)

-- name: extend_record
-- For a record that is older than this column.
alter table conductor.migrations add column if not exists workers_from integer

-- name: has_record
select pg_catalog.to_regclass('conductor.migrations') is not null

-- name: recorded
select number, name, checksum from conductor.migrations order by number

-- name: record
insert into conductor.migrations (number, name, checksum, workers_from)
values (%(number)s, %(name)s, %(checksum)s, %(workers_from)s)

-- name: ending
-- The first migration that ends workers which know no more than this many.
select number, name from conductor.migrations
where number > %(known)s and coalesce(workers_from, number) > %(known)s
order by number limit 1
