-- workers from 0004 go on
-- What emits in SQL does so through the WAL, where a sidecar routes events; anywhere else a row, as before.

-- Emits an event: every task subscribed to it gets a job, once the caller's transaction is committed.
-- via: `wal` writes a logical message (no row; lost in a gap of the slot; raises where no sidecar would
-- see it); `queue` a dispatch job (needs no sidecar, is never lost); `auto` a message where that can be,
-- else a job. When it is not given, the setting conductor.emit_via decides, else `auto`. Returns the
-- dispatch job, or null.
create or replace function conductor.emit(
    event text, payload json default '{}', metadata json default null, via text default null)
    returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    way text := coalesce(emit.via, nullif(current_setting('conductor.emit_via', true), ''), 'auto');
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
