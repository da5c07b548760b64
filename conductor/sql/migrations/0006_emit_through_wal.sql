-- Emitting through the WAL: a logical message in place of a row, for who has a sidecar.

-- Whether this slot routes what is emitted through the WAL of its database. The sidecar says so.
alter table conductor.progress add column emits boolean not null default false;

-- The slot that routes what is emitted through the WAL of this database. One: every slot of a
-- database sees every message. Written by the sidecar; the secret tells our messages from what
-- anybody else may write with pg_logical_emit_message.
create table conductor.emit_owner (
    singleton boolean primary key default true check (singleton),
    slot text collate "C" not null,
    secret uuid not null default gen_random_uuid(),
    registered_at timestamptz not null default pg_catalog.clock_timestamp()
);

-- Why nothing can be emitted through the WAL here now; null: it can.
create function conductor.why_no_wal() returns text
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
    end
$$;

-- Emits an event as a logical message of the caller's transaction: no row, and the sidecar routes it
-- in commit order. Lost in a gap of the slot. Raises where no slot would ever see it.
create function conductor.emit_wal(event text, payload json, metadata json default null) returns pg_lsn
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

-- Emits an event: every task subscribed to it gets a job, once the caller's transaction is committed.
-- via: `queue` writes a dispatch job (needs no sidecar, is never lost); `wal` a logical message (no
-- row; raises where no sidecar would see it); `auto` a message where that can be, else a job. When it
-- is not given, the setting conductor.emit_via decides, else `queue`. Returns the dispatch job, or null.
drop function conductor.emit(text, json, json);
create function conductor.emit(
    event text, payload json default '{}', metadata json default null, via text default null)
    returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    way text := coalesce(emit.via, nullif(current_setting('conductor.emit_via', true), ''), 'queue');
    job bigint;
begin
    if way = 'wal' or (way = 'auto' and conductor.why_no_wal() is null) then
        perform conductor.emit_wal(emit.event, emit.payload, emit.metadata);
    elsif way in ('queue', 'auto') then
        insert into conductor.jobs (queue, task, trigger, payload, metadata, emitted_by)
        values ('conductor.internal', 'conductor.dispatch', 'event',
            json_build_object('event', emit.event, 'payload', emit.payload), emit.metadata,
            pg_current_xact_id())
        returning id into job;
    else
        raise exception 'events are not emitted via %', quote_literal(way)
            using errcode = 'invalid_parameter_value', hint = 'One of queue, wal, auto.';
    end if;
    return job;
end
$$;
