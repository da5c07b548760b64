-- What an application registers when its workers start, and the catalog it is checked against.

-- name: lock_app
-- One registration of an application at a time; everything below runs under it.
select pg_catalog.pg_advisory_xact_lock(
    pg_catalog.hashtextextended('conductor.registration:' || %(app)s::text, 0))

-- name: current_instant
select conductor.now()

-- name: add_queues
insert into conductor.queues (name)
select distinct name from unnest(%(names)s::text[]) as name order by name
on conflict do nothing

-- name: put_tasks
insert into conductor.tasks as t (
    app, name, queue, version, max_attempts, retention, payload_schema, returns_schema, ordered,
    on_failure)
select %(app)s, r.name, r.queue, %(version)s, r.max_attempts,
    make_interval(secs => r.retention_s), r.payload_schema, r.returns_schema, r.ordered,
    r.on_failure
from json_to_recordset(%(rows)s) as r (
    name text, queue text, max_attempts smallint, retention_s double precision,
    payload_schema json, returns_schema json, ordered boolean, on_failure text)
order by r.name
on conflict (app, name) do update set
    queue = excluded.queue, version = excluded.version, max_attempts = excluded.max_attempts,
    retention = excluded.retention, payload_schema = excluded.payload_schema,
    returns_schema = excluded.returns_schema, ordered = excluded.ordered,
    on_failure = excluded.on_failure, registered_at = excluded.registered_at,
    seen_at = excluded.seen_at

-- name: open_lanes
-- Jobs of tasks that are not ordered (any more) stand behind nobody.
with opened as (
    update conductor.jobs j set state = 'ready', ordered = null, run_at = conductor.now()
    where j.ctid = any (array(
        select c.ctid from conductor.jobs c
        where c.state = 'parked' and c.queue = any (%(queues)s::text[])
            and c.task = any (%(tasks)s::text[])
        order by c.id
        for update skip locked))
    returning j.task
),
resumed as (
    delete from conductor.halted_lanes s
    where s.queue = any (%(queues)s::text[]) and s.task = any (%(tasks)s::text[])
)
delete from conductor.lane_calls c
where c.queue = any (%(queues)s::text[]) and c.task = any (%(tasks)s::text[])

-- name: put_events
insert into conductor.events as e (app, name, payload_schema)
select %(app)s, r.name, r.payload_schema
from json_to_recordset(%(rows)s) as r (name text, payload_schema json)
order by r.name
on conflict (app, name) do update set
    payload_schema = excluded.payload_schema, registered_at = excluded.registered_at

-- name: drop_schedules
-- Schedules of these tasks that the newest registration does not have.
delete from conductor.schedules s
where s.app = %(app)s and s.task = any(%(tasks)s::text[])
    and not exists (
        select from json_to_recordset(%(rows)s) as r (task text, name text)
        where r.task = s.task and r.name = s.name)

-- name: put_schedules
-- An unchanged schedule keeps its next instant: registering again neither skips nor repeats one.
insert into conductor.schedules as s (
    app, task, name, queue, version, rank, expression, timezone, next_at)
select %(app)s, r.task, r.name, r.queue, %(version)s, r.rank, r.expression, r.timezone, r.next_at
from json_to_recordset(%(rows)s) as r (
    task text, name text, queue text, rank smallint, expression text, timezone text,
    next_at timestamptz)
order by r.task, r.name
on conflict (app, task, name) do update set
    queue = excluded.queue, version = excluded.version, rank = excluded.rank,
    expression = excluded.expression, timezone = excluded.timezone,
    next_at = case
        when s.expression = excluded.expression and s.timezone = excluded.timezone then s.next_at
        else excluded.next_at end,
    registered_at = excluded.registered_at

-- name: live_subscriptions
select id, task, trigger, kind, source, queue, rank, definition
from conductor.subscriptions
where app = %(app)s and task = any(%(tasks)s::text[]) and retired_at is null
order by id
for update

-- name: retire_subscriptions
-- What jobs are woken by stays while one waits for it, and for another version: retire_unawaited.
update conductor.subscriptions s set retired_at = conductor.now()
where s.id = any(%(ids)s::bigint[]) and s.retired_at is null
    and not (
        starts_with(s.trigger, 'wait:')
        and (
            s.version is distinct from %(version)s
            or exists (
                select from conductor.steps w
                where w.topic = substr(s.trigger, 6) and w.outcome is null)))

-- name: keep_subscriptions
-- The definition stays; whose version routes is not part of it.
update conductor.subscriptions set version = %(version)s
where id = any(%(ids)s::bigint[]) and version is distinct from %(version)s

-- name: add_subscriptions
insert into conductor.subscriptions (
    app, task, trigger, kind, source, queue, version, rank, definition)
select %(app)s, r.task, r.trigger, r.kind, r.source, r.queue, %(version)s, r.rank, r.definition
from json_to_recordset(%(rows)s) as r (
    task text, trigger text, kind text, source text, queue text, rank smallint, definition json)
order by r.task, r.trigger
returning id

-- name: notify_subscriptions
-- In the registering transaction: it is delivered after the commit, and only then.
select pg_catalog.pg_notify('conductor_subscriptions', %(app)s)

-- name: uncaptured
-- Change subscriptions that a slot of their source does not route yet; slot is null when there is
-- no such slot. `led`: somebody streams from it now (its sink's backend is there). Of events likewise,
-- where a slot routes those that are emitted through the WAL, and is led: the queue needs no slot.
select s.id, s.task, s.source, coalesce(s.definition ->> 'schema', 'event') as schema,
    coalesce(s.definition ->> 'table', s.definition ->> 'event') as table, p.slot,
    p.updated_at as seen_at, coalesce(p.led, false) as led
from conductor.subscriptions s
left join (
    select p.*, exists (
        select from pg_catalog.pg_stat_activity b
        where b.pid = p.sink_pid and b.application_name = left('cdc sink ' || p.slot, 63)) as led
    from conductor.progress p
) p on case s.kind when 'change' then p.source = s.source else p.emits and p.led end
left join conductor.activations a on a.subscription = s.id and a.slot = p.slot
where s.id = any(%(ids)s::bigint[]) and s.retired_at is null and a.start_lsn is null
    and (s.kind = 'change' or p.slot is not null)
order by s.id

-- name: mark_seen
-- About when a worker last offered a task: written at most once in 30 s. Waits for nobody.
update conductor.tasks t set seen_at = conductor.now()
where t.ctid = any (array(
    select c.ctid from conductor.tasks c
    where c.seen_at < conductor.now() - interval '30 seconds'
        and exists (
            select from conductor.workers w
            where w.app = c.app and c.name = any(w.tasks) and w.renewals >= 0)
    for update skip locked))

-- name: abandoned_apps
-- Applications with tasks that their newest version lacks and that nobody has offered for a while.
select distinct t.app
from conductor.tasks t
join (
    select distinct on (app) app, version, registered_at
    from conductor.tasks order by app, registered_at desc
) n on n.app = t.app
where t.registered_at < n.registered_at and t.version is distinct from n.version
    and t.seen_at < conductor.now() - make_interval(secs => %(grace_s)s)
    and not exists (select from conductor.workers w where w.app = t.app and t.name = any(w.tasks) and w.renewals >= 0)
order by t.app

-- name: retire_abandoned
with newest as (
    select version, registered_at from conductor.tasks
    where app = %(app)s order by registered_at desc limit 1
), abandoned as (
    delete from conductor.tasks t using newest n
    where t.app = %(app)s
        and t.registered_at < n.registered_at and t.version is distinct from n.version
        and t.seen_at < conductor.now() - make_interval(secs => %(grace_s)s)
        and not exists (select from conductor.workers w where w.app = t.app and t.name = any(w.tasks) and w.renewals >= 0)
    returning t.name
), unscheduled as (
    delete from conductor.schedules s using abandoned a where s.app = %(app)s and s.task = a.name
), retired as (
    update conductor.subscriptions s set retired_at = conductor.now()
    from abandoned a
    where s.app = %(app)s and s.task = a.name and s.retired_at is null
)
select name from abandoned order by name

-- name: app_names
select distinct app from conductor.tasks order by app

-- name: retire_unawaited
-- What jobs of a version are woken by that is not the newest of its task, has no worker any more, and
-- no job that waits.
update conductor.subscriptions s set retired_at = conductor.now()
where s.app = %(app)s and s.retired_at is null and starts_with(s.trigger, 'wait:')
    and exists (
        select from conductor.tasks t
        where t.app = s.app and t.name = s.task and t.version is distinct from s.version)
    and not exists (
        select from conductor.workers w
        where w.app = s.app and w.version is not distinct from s.version and s.task = any(w.tasks)
            and w.renewals >= 0)
    and not exists (
        select from conductor.steps w
        where w.topic = substr(s.trigger, 6) and w.outcome is null)

-- name: source_is_elsewhere
-- Whether a sidecar has said that this source is another database than this one.
select exists (
    select from conductor.progress p
    where p.source = %(source)s
        and (p.database <> current_database()
            or p.system_identifier <> (select c.system_identifier::text from pg_control_system() c)))

-- name: describe_tables
-- The tables asked for, each with what the server needs to name its rows in the WAL; likewise the
-- partitions at the bottom of a partitioned one, under the name asked for.
with wanted as (
    select w.schema, w.name, c.oid, c.relkind
    from unnest(%(schemas)s::text[], %(names)s::text[]) as w (schema, name)
    join pg_catalog.pg_namespace n on n.nspname = w.schema
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.name
    where c.relkind in ('r', 'p', 'v', 'm', 'f')
), parts as (
    select w.schema, w.name, w.oid, true as asked from wanted w
    union all
    select w.schema, w.name, t.relid, false
    from wanted w cross join lateral pg_catalog.pg_partition_tree(w.oid) t
    where w.relkind = 'p' and t.isleaf and t.relid <> w.oid
)
select p.schema, p.name, p.asked, c.relkind::text as kind, c.relpersistence::text as persistence,
    c.relreplident::text as identity, format('%%I.%%I', n.nspname, c.relname) as quoted,
    exists (
        select from pg_catalog.pg_index i
        where i.indrelid = c.oid and i.indisvalid and i.indimmediate
            and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident
                else false end
    ) as has_key,
    array(
        select a.attname::text
        from pg_catalog.pg_index i
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey)
        where i.indrelid = c.oid
            and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident
                else false end
        order by a.attnum
    ) as key,
    array(
        select a.attname::text
        from pg_catalog.pg_index i
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey)
        where i.indrelid = c.oid and i.indisprimary
        order by a.attnum
    ) as primary_key,
    array(
        select a.attname::text from pg_catalog.pg_attribute a
        where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
        order by a.attnum
    ) as columns,
    array(
        select case when b.oid is null then t.oid when b.typtype = 'd' then 0 else b.oid end::bigint
        from pg_catalog.pg_attribute a
        join pg_catalog.pg_type t on t.oid = a.atttypid
        left join pg_catalog.pg_type b on b.oid = t.typbasetype
        where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
        order by a.attnum
    ) as types,
    array(
        select a.attname::text from pg_catalog.pg_attribute a
        where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> ''
    ) as generated
from parts p
join pg_catalog.pg_class c on c.oid = p.oid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
order by p.schema, p.name, not p.asked, quoted

-- name: table_keys
-- Every table of the application: schema and name.
select n.nspname::text, c.relname::text
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and n.nspname not in ('pg_catalog', 'information_schema', 'conductor')
    and n.nspname not like 'pg\_toast%%' and n.nspname not like 'pg\_temp%%'
order by 1, 2

-- name: other_relations
-- What has columns and no changes: views and composite types, schema and name.
select n.nspname::text, c.relname::text
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('v', 'm', 'c', 'f') and n.nspname not in ('pg_catalog', 'information_schema')
order by 1, 2

-- name: table_names
select n.nspname || '.' || c.relname
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and n.nspname not in ('pg_catalog', 'information_schema', 'conductor')
    and n.nspname not like 'pg\_toast%%' and n.nspname not like 'pg\_temp%%'
order by 1
