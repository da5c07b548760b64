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
    select name, kind, case when position >= 0 then position end as position, result, wake_at,
        created_at
    from conductor.steps where job = %(id)s order by created_at, name
) s

-- name: ended_job
-- Locks nothing: history does not change.
select outcome::text as outcome, metadata from conductor.history where id = %(id)s

-- name: retry_job
-- Puts an ended job into its queue again, as a new job of the same identity. One of an ordered task
-- goes to the end of its lane; the one that has halted a lane to where it stood, and the lane goes on.
with ended as (
    select h.*, (
        select t.ordered from conductor.tasks t
        where t.name = h.task and h.key is not null order by t.registered_at desc limit 1
    ) as ordered
    from conductor.history h
    where h.id = %(id)s and h.outcome in ('failed', 'cancelled')
),
resumed as (
    delete from conductor.halted_lanes s where s.job = %(id)s returning s.place
),
retried as (
    insert into conductor.jobs (
        queue, task, trigger, app, version, rank, key, payload, metadata, source_generation,
        source_lsn, source_ordinal, subscription, state, ordered, place)
    select e.queue, e.task, e.trigger, e.app, e.version, e.rank, e.key, e.payload,
        %(metadata)s::json, e.source_generation, e.source_lsn, e.source_ordinal, e.subscription,
        case when e.ordered then 'parked' else 'ready' end::conductor.job_state,
        case when e.ordered then true end,
        case when e.ordered then (select r.place from resumed r) end
    from ended e
    returning id, queue, task, key, ordered
),
called as (
    insert into conductor.lane_calls (queue, task, key)
    select r.queue, r.task, r.key from retried r where r.ordered
)
select id, queue from retried

-- name: halted_lanes
-- Those that have stood longest first.
select row_to_json(h)
from (
    select s.queue, s.task, s.key, s.job, s.halted_at, (
        select count(*) from (
            select from conductor.jobs j
            where j.state = 'parked' and j.queue = s.queue and j.task = s.task and j.key = s.key
            limit 1001
        ) b
    ) as parked
    from conductor.halted_lanes s
    where %(task)s::text is null or s.task = %(task)s
    order by s.halted_at, s.queue, s.task, s.key
    limit %(limit)s
) h

-- name: resume_lane
select conductor.resume_lane(%(task)s, %(key)s)

-- name: count_halted_lanes
select q.name, (
    select count(*) from (
        select from conductor.halted_lanes s where s.queue = q.name limit %(bound)s
    ) b
)
from conductor.queues q

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
    union all
    (select j.queue, j.state from conductor.jobs j where j.state = 'parked' limit %(bound)s)
) b
group by 1, 2

-- name: oldest_due
-- Since when the oldest work of a queue could run, whether or not a worker was there to mark it ready.
-- Skips from one (queue, task, rank) of the ready index to the next instead of reading all of it; of
-- the rest the oldest %(bound)s count, and jobs that workers of %(dead)s left behind.
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
),
due as (
    select queue, run_at as due_at from heads
    union all
    (select j.queue, j.run_at from conductor.jobs j
     where j.state = 'suspect'
     order by j.queue, j.task, j.rank, j.run_at, j.id limit %(bound)s)
    union all
    (select j.queue, j.run_at from conductor.jobs j
     where j.state in ('scheduled', 'waiting') and j.run_at <= conductor.now()
     order by j.run_at limit %(bound)s)
    union all
    (select j.queue, j.run_at from conductor.jobs j
     where j.state = 'running' and j.worker = any (%(dead)s::bigint[]) limit %(bound)s)
    union all
    select s.queue, s.next_at from conductor.schedules s
    where s.next_at <= conductor.now()
        and (s.payload is null or exists (select from conductor.tasks t where t.name = s.task))
)
select queue, extract(epoch from min(due_at))::double precision from due group by queue

-- name: first_calls
-- The first call of a lane in each queue that has one, looked for from a position on; and the time.
select q.name, c.id, extract(epoch from conductor.now())::double precision
from unnest(%(queues)s::text[], %(positions)s::bigint[]) as q (name, position)
cross join lateral (
    select l.id from conductor.lane_calls l
    where l.queue = q.name and l.id >= q.position
    order by l.id limit 1
) c

-- name: first_words
-- The first word in each queue that has come for a job and that the job was not told yet; and the time.
-- Not for jobs that run: theirs is taken when they can be locked.
select j.queue, min(w.id), extract(epoch from conductor.now())::double precision
from (select u.id, u.job from conductor.wakeups u order by u.id limit %(bound)s) w
cross join lateral (select k.queue, k.state from conductor.jobs k where k.id = w.job limit 1) j
where j.state <> 'running'
group by j.queue

-- name: list_leases
select id, queue, renewals from conductor.workers

-- name: oldest_xmin
-- Of what this role may see: sessions of other roles are hidden from an ordinary one. A transaction
-- that has written holds rows by its xid, snapshot or not; a standby without a slot has no database. Not
-- the catalog_xmin of slots: it holds rows of system catalogs alone.
select greatest(
    coalesce((select max(greatest(pg_catalog.age(a.backend_xmin), pg_catalog.age(a.backend_xid)))
              from pg_catalog.pg_stat_activity a
              where coalesce(a.datname = current_database(), true)
                  and a.pid <> pg_catalog.pg_backend_pid()), 0),
    coalesce((select max(pg_catalog.age(p.transaction)) from pg_catalog.pg_prepared_xacts p
              where p.database = current_database()), 0),
    coalesce((select max(pg_catalog.age(r.xmin)) from pg_catalog.pg_replication_slots r), 0))

-- name: has_unfinished
-- Whether there is a job that a worker of these (queue, task) pairs could run now, is running, or will
-- as soon as somebody notices that it is due or that something has come for it; a schedule that is due, a
-- lane to look at, or an event to dispatch.
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
        union all
        (select from conductor.jobs j
         where j.state in ('scheduled', 'waiting') and j.run_at <= conductor.now()
            and j.queue = p.queue and j.task = p.task
         order by j.run_at limit 1)
        union all
        (select from conductor.wakeups w
         cross join lateral (
            select j.queue, j.task from conductor.jobs j where j.id = w.job limit 1) j
         where j.queue = p.queue and j.task = p.task limit 1)
        union all
        (select from conductor.schedules s
         where s.queue = p.queue and s.task = p.task and s.next_at <= conductor.now() limit 1)
        union all
        (select from conductor.lane_calls l where l.queue = p.queue limit 1)
    ) found)

-- name: unfinished_jobs
-- How many jobs of these (queue, task) pairs are in the way of that, by task and state.
select u.task, u.state, count(*) as jobs
from (
    select j.task,
        case when j.state in ('scheduled', 'waiting') then 'due' else j.state::text end as state
    from unnest(%(queues)s::text[], %(tasks)s::text[]) as p (queue, task)
    join conductor.jobs j on j.queue = p.queue and j.task = p.task
    where j.state in ('ready', 'suspect', 'running')
        or (j.state in ('scheduled', 'waiting') and j.run_at <= conductor.now())
) u
group by u.task, u.state
order by u.task, u.state
