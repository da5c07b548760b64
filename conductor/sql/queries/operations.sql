-- What operators ask and do, and what the gauges show.

-- name: list_jobs
-- The newest first, as JSON: an instant may be infinite. State: of a job that is alive, or the
-- outcome of one that has ended.
select row_to_json(j)
from (
    select id, queue, task, state, trigger, priority, key, attempt, crashes, run_at, created_at,
        started_at, finished_at
    from conductor.job
    where (%(queue)s::text is null or queue = %(queue)s)
        and (%(task)s::text is null or task = %(task)s)
        and (%(state)s::text is null or state = %(state)s)
    order by id desc
    limit %(limit)s
) j

-- name: show_job
select row_to_json(j) from conductor.job j where j.id = %(id)s

-- name: show_steps
select row_to_json(s)
from (
    select name, kind, position, result, wake_at, created_at
    from conductor.steps where job = %(id)s order by created_at, name
) s

-- name: ended_job
-- Locks nothing: history does not change.
select outcome::text as outcome, metadata from conductor.history where id = %(id)s

-- name: retry_job
-- Puts an ended job into its queue again, as a new job of the same identity.
insert into conductor.jobs (
    queue, task, trigger, app, version, rank, key, payload, metadata, source_generation, source_lsn,
    source_ordinal, subscription)
select queue, task, trigger, app, version, rank, key, payload, %(metadata)s::json,
    source_generation, source_lsn, source_ordinal, subscription
from conductor.history
where id = %(id)s and outcome in ('failed', 'cancelled')
returning id, queue

-- name: cancel_job
select conductor.cancel(%(id)s::bigint, %(reason)s::text)

-- name: invoke_task
select conductor.invoke(
    task => %(task)s, payload => %(payload)s::json, run_at => %(run_at)s,
    priority => %(priority)s, key => %(key)s, dedupe_key => %(dedupe_key)s)

-- name: emit_event
select conductor.emit(event => %(event)s, payload => %(payload)s::json, via => 'queue')

-- name: list_schedules
-- The next first, as JSON. made: by whom, the trigger of a task or somebody at run time.
select row_to_json(s)
from (
    select task, name, expression, timezone, next_at, last_at, missed,
        case when payload is null then 'trigger' else 'run time' end as made,
        nullif(app, '') as app, queue, payload
    from conductor.schedules
    where (%(task)s::text is null or task = %(task)s)
    order by next_at, task, name
    limit %(limit)s
) s

-- name: task_queue
-- Where a task's jobs wait; null when nobody has registered it.
select queue from conductor.tasks where name = %(task)s order by registered_at desc limit 1

-- name: task_names
select distinct name from conductor.tasks order by name

-- name: event_names
select distinct name from conductor.events order by name

-- name: queue_names
select name from conductor.queues order by name

-- name: count_jobs
-- Bounded: a count of %(bound)s means that many or more. Ready ones a queue at a time, the others
-- together, each part by its own index.
-- (In the index's order and from an array, so that estimates can choose neither a scan of the table
-- nor to compile the query.)
select q.name as queue, 'ready' as state, c.jobs
from unnest(array(select name from conductor.queues)) as q (name)
cross join lateral (
    select count(*) as jobs from (
        select from conductor.jobs j
        where j.state = 'ready' and j.queue = q.name
        order by j.queue, j.task, j.rank, j.run_at, j.id
        limit %(bound)s
    ) b
) c
union all
select b.queue, b.state::text, count(*)
from (
    (select j.queue, j.state from conductor.jobs j
     where j.state in ('scheduled', 'waiting') limit %(bound)s)
    union all
    (select j.queue, j.state from conductor.jobs j where j.state = 'running' limit %(bound)s)
    union all
    (select j.queue, j.state from conductor.jobs j where j.state = 'suspect' limit %(bound)s)
) b
group by 1, 2

-- name: oldest_ready
-- Since when the oldest ready job of a queue could run. Skips from one (queue, task, rank) of the
-- ready index to the next instead of reading all of it.
with recursive heads as (
    (select j.queue, j.task, j.rank, j.run_at
     from conductor.jobs j where j.state = 'ready'
     order by j.queue, j.task, j.rank, j.run_at, j.id limit 1)
    union all
    select n.queue, n.task, n.rank, n.run_at
    from heads h
    cross join lateral (
        select j.queue, j.task, j.rank, j.run_at
        from conductor.jobs j
        where j.state = 'ready' and (j.queue, j.task, j.rank) > (h.queue, h.task, h.rank)
        order by j.queue, j.task, j.rank, j.run_at, j.id limit 1
    ) n
)
select queue, extract(epoch from min(run_at))::double precision from heads group by queue

-- name: count_workers
select queue, count(*) from conductor.workers where renewals >= 0 group by queue

-- name: oldest_xmin
-- Of what this role may see: sessions of other roles are hidden from an ordinary one.
select greatest(
    coalesce((select max(pg_catalog.age(a.backend_xmin)) from pg_catalog.pg_stat_activity a
              where a.datname = current_database() and a.pid <> pg_catalog.pg_backend_pid()), 0),
    coalesce((select max(pg_catalog.age(r.xmin)) from pg_catalog.pg_replication_slots r), 0))

-- name: has_unfinished
-- Whether there is a job that a worker of these (queue, task) pairs could run now or is running, or
-- an event to dispatch.
select exists (
    select
    from (
        select p.queue, p.task from unnest(%(queues)s::text[], %(tasks)s::text[]) as p (queue, task)
        union all
        select 'conductor.internal', 'conductor.dispatch'
    ) p
    cross join lateral (
        (select from conductor.jobs j
         where j.state = 'ready' and j.queue = p.queue and j.task = p.task
         order by j.queue, j.task, j.rank, j.run_at, j.id limit 1)
        union all
        (select from conductor.jobs j
         where j.state = 'suspect' and j.queue = p.queue and j.task = p.task
         order by j.queue, j.task, j.rank, j.run_at, j.id limit 1)
        union all
        (select from conductor.jobs j
         where j.state = 'running' and j.queue = p.queue and j.task = p.task limit 1)
    ) found)
