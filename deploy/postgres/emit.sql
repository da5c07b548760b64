-- For a source database that is not the queue's: what emits events through its WAL. Run by its owner,
-- as often as you like. The sidecar's role needs usage of schema conductor, and select, insert and
-- update of conductor.emit_owner; who emits needs usage of the schema.
-- (The functions are those of conductor/sql/migrations; the tests compare them.)
do $$
begin
    if to_regclass('conductor.jobs') is not null then
        raise exception 'this is a queue database: `conductor migrate` has installed all this';
    end if;
end
$$;
create schema if not exists conductor;

-- The slot that routes what is emitted through the WAL of this database. One: every slot of a
-- database sees every message. Written by the sidecar; the secret tells our messages from what
-- anybody else may write with pg_logical_emit_message.
create table if not exists conductor.emit_owner (
    singleton boolean primary key default true check (singleton),
    slot text collate "C" not null,
    secret uuid not null default gen_random_uuid(),
    registered_at timestamptz not null default pg_catalog.clock_timestamp()
);

-- Why nothing can be emitted through the WAL here now; null: it can.
create or replace function conductor.why_no_wal() returns text
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select case
        when pg_is_in_recovery() then 'this server is a standby'
        when current_setting('wal_level') <> 'logical' then 'wal_level is below logical'
        when not exists (select from conductor.emit_owner) then 'no sidecar streams from this database'
        when not exists (
            select from conductor.emit_owner o
            join pg_replication_slots s on s.slot_name = o.slot and s.database = current_database()
            where s.wal_status is distinct from 'lost')
            then 'the slot of the sidecar that routes emitted events is gone'
        when not exists (
            select from pg_proc p
            where p.proname = 'pg_logical_emit_message' and p.pronamespace = 'pg_catalog'::regnamespace
                and p.proargtypes[2] = 'bytea'::regtype and has_function_privilege(p.oid, 'execute'))
            then 'role ' || quote_ident(current_user) || ' may not write logical messages'
    end
$$;

-- Emits an event as a logical message of the caller's transaction: no row, and the sidecar routes it
-- in commit order. Lost in a gap of the slot. Raises where no slot would ever see it.
create or replace function conductor.emit_wal(event text, payload json, metadata json default null) returns pg_lsn
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    refusal text := conductor.why_no_wal();
    header text;
begin
    if refusal is not null then
        raise exception 'event % cannot be emitted through the WAL: %', quote_literal(event), refusal
            using errcode = 'object_not_in_prerequisite_state',
            hint = 'Emit it on a connection to the source database of a sidecar, or with via => ''queue''.';
    end if;
    -- Texts only, so that it is one line; the envelope after it is the job's payload.
    select json_build_object(
        'secret', o.secret, 'xid', pg_current_xact_id()::text, 'metadata', metadata::text)::text
    into header from conductor.emit_owner o;
    return pg_logical_emit_message(true, 'conductor.emit', convert_to(
        header || e'\n' || json_build_object('event', event, 'payload', payload)::text, 'UTF8'));
end
$$;

-- Emits an event through the WAL: as in the queue database, but there is no queue to fall back on.
create or replace function conductor.emit(
    event text, payload json default '{}', metadata json default null, via text default 'wal')
    returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    if emit.via not in ('wal', 'auto') then
        raise exception 'events are not emitted via % here: this is not the queue database',
            quote_literal(emit.via) using errcode = 'invalid_parameter_value', hint = 'wal is.';
    end if;
    perform conductor.emit_wal(emit.event, emit.payload, emit.metadata);
    return null;
end
$$;
