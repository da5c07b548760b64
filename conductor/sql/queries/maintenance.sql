-- Keeping the queue's tables small. One process at a time; nothing here may make a settle wait long.

-- name: try_lock
-- Held until the end of the transaction, so that it works behind a pooler.
select pg_catalog.pg_try_advisory_xact_lock(
    pg_catalog.hashtextextended('conductor.maintenance', 0))

-- name: plan_days
-- Today in UTC, the longest retention in days, and the days that have a partition.
select (conductor.now() at time zone 'UTC')::date as today,
    coalesce((select extract(epoch from max(t.retention)) / 86400 from conductor.tasks t), 0)::float8
        as longest_days,
    array(
        select c.relname::text
        from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
        where i.inhparent = 'conductor.history'::regclass and c.relname like 'history\_2%%'
        order by 1
    ) as partitions

-- name: defaulted_days
-- Days of which the default partition holds rows: no partition can be attached for them.
select distinct expires_on
from conductor.history_default
where expires_on = any (%(days)s::date[])

-- name: set_lock_timeout
select pg_catalog.set_config('lock_timeout', %(timeout_ms)s::text, true)

-- name: create_partition
-- Beside the parent first: attaching takes a lock that lets inserts go on, creating in it does not.
create table conductor.{partition} (like conductor.history including defaults including constraints)

-- name: attach_partition
alter table conductor.history attach partition conductor.{partition}
    for values from ({day}) to ({next_day})

-- name: drop_partition
drop table conductor.{partition}

-- name: purge_default
delete from conductor.history_default h
where h.ctid = any (array(
    select d.ctid from conductor.history_default d
    where d.expires_on <= (conductor.now() at time zone 'UTC')::date
    limit %(batch)s
    for update skip locked))

-- name: purge_dedupe_keys
delete from conductor.dedupe_keys k
where k.ctid = any (array(
    select d.ctid from conductor.dedupe_keys d
    where d.expires_at <= conductor.now()
    order by d.expires_at
    limit %(batch)s
    for update skip locked))

-- name: stray_lanes
-- Tasks that are not ordered (any more), of which jobs stand in lanes: from a client of an earlier
-- version, or by a trigger as it was, after the task was registered. Skips from task to task.
with recursive parked as (
    (select j.queue, j.task from conductor.jobs j where j.state = 'parked'
     order by j.queue, j.task limit 1)
    union all
    select n.queue, n.task
    from parked p
    cross join lateral (
        select j.queue, j.task from conductor.jobs j
        where j.state = 'parked' and (j.queue, j.task) > (p.queue, p.task)
        order by j.queue, j.task limit 1
    ) n
)
select p.queue, p.task
from parked p
where not (
    select t.ordered from conductor.tasks t
    where t.name = p.task and t.queue = p.queue order by t.registered_at desc limit 1)

-- name: call_stalled_lanes
select conductor.call_stalled_lanes()

-- name: purge_steps
-- Steps of jobs that are no longer there. A settle deletes its own; this is for what a hand deleted.
delete from conductor.steps s
where s.ctid = any (array(
    select o.ctid from conductor.steps o
    where not exists (select from conductor.jobs j where j.id = o.job)
    limit %(batch)s
    for update skip locked))
