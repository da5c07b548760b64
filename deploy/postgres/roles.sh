# Read once by the postgres image, when it creates its database: two ordinary roles, and a database.
# shop owns it: migrates, runs workers, has the tables. cdc reads the log, and is a member of shop so
# that it can publish its tables.
psql --no-psqlrc --set ON_ERROR_STOP=1 --username postgres --dbname postgres \
    --set shop_password="${POSTGRES_SHOP_PASSWORD:-$(cat "$POSTGRES_SHOP_PASSWORD_FILE")}" \
    --set cdc_password="${POSTGRES_CDC_PASSWORD:-$(cat "$POSTGRES_CDC_PASSWORD_FILE")}" <<'SQL'
create role shop login password :'shop_password';
create role cdc login replication password :'cdc_password' in role shop;
create database shop owner shop;
\connect shop
-- By default every role may write any logical message. Here only conductor.emit_wal (as its owner) and
-- the sidecar do: whoever may use schema conductor emits through that function.
do $$
declare
    emit regprocedure;
begin
    for emit in
        select oid from pg_proc
        where proname = 'pg_logical_emit_message' and pronamespace = 'pg_catalog'::regnamespace
    loop
        execute format('revoke execute on function %s from public', emit);
        execute format('grant execute on function %s to shop, cdc', emit);
    end loop;
end
$$;
SQL
