-- workers from 0004 go on
-- Where logical messages are kept from the owner of schema conductor, events are rows, as before 0010:
-- the application's transaction does not fail.

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
