-- The hot path: what workers do to jobs. Every write is fenced by (worker, fence), locks rows in the
-- order of their ids without waiting, and finds the rows it writes by ctid: estimates of a table
-- that is mostly empty, or was when it was analysed, can then not turn a probe into a scan.
-- Sent unprepared, so that the server plans each execution with its values.

-- name: claim_jobs
-- Claims the first %(limit)s ready jobs of the given ranges (task, rank, run_at, id, last_rank), each
-- an exclusive start in the ready index and the last rank it covers. %(look_back)s: start no later
-- than this long ago. %(codes)s: the versions of handlers, by task; a job keeps the one that it has
-- taken a step with. %(variants)s: all versions that are here, by task: jobs that keep another are left
-- to workers that have it. Nothing for a worker whose lease is gone (the share lock keeps a rescuer from
-- finishing under a claim) or a paused queue.
with lease as materialized (
    select 1
    from conductor.workers w
    where w.id = %(worker)s and w.renewals >= 0
        and not exists (select from conductor.queues q where q.name = %(queue)s and q.paused)
    for share of w
),
claimed as materialized (
    select j.ctid
    from (
        select u.task, u.rank, u.last_rank,
            least(u.run_at, conductor.now() - %(look_back)s::interval) as run_at,
            case when u.run_at < conductor.now() - %(look_back)s::interval then u.id
                else 0 end as id
        from unnest(
            %(tasks)s::text[], %(ranks)s::smallint[], %(run_ats)s::timestamptz[],
            %(ids)s::bigint[], %(last_ranks)s::smallint[]
        ) as u (task, rank, run_at, id, last_rank)
    ) p
    cross join lateral (
        select c.ctid, c.rank, c.run_at, c.id
        from conductor.jobs c
        where c.state = 'ready' and c.queue = %(queue)s and c.task = p.task
            and (c.rank, c.run_at, c.id) > (p.rank, p.run_at, p.id)
            and c.rank <= p.last_rank and c.run_at <= conductor.now()
            and (
                c.code is null or (%(variants)s::jsonb -> c.task) ? c.code
                or not exists (select from conductor.steps s where s.job = c.id))
        order by c.rank, c.run_at, c.id
        limit %(limit)s
        for update skip locked
    ) j
    where exists (select from lease)
    order by j.rank, j.run_at, j.id
    limit %(limit)s
)
update conductor.jobs j
set state = 'running', worker = %(worker)s, fence = j.fence + 1, woken = false,
    started_at = conductor.now(),
    code = case
        when j.fence > 0 and exists (select from conductor.steps s where s.job = j.id) then j.code
        else %(codes)s::jsonb ->> j.task end
where j.ctid = any (array(select c.ctid from claimed c))
returning j.id, j.task, j.trigger::text, j.attempt, j.crashes, j.fence, j.rank, j.key, j.run_at,
    j.created_at, j.metadata, j.app, j.version, j.source_generation, j.source_lsn::text,
    j.source_ordinal, j.subscription, j.payload, j.started_at, j.parent, j.code

-- name: claim_suspect
-- Claims one job that processes have died with, at most %(crashes)s times.
with lease as materialized (
    select 1
    from conductor.workers w
    where w.id = %(worker)s and w.renewals >= 0
        and not exists (select from conductor.queues q where q.name = %(queue)s and q.paused)
    for share of w
),
claimed as materialized (
    select c.ctid
    from conductor.jobs c
    where c.state = 'suspect' and c.queue = %(queue)s and c.task = any (%(tasks)s::text[])
        and c.crashes <= %(crashes)s and exists (select from lease)
        and (
            c.code is null or (%(variants)s::jsonb -> c.task) ? c.code
            or not exists (select from conductor.steps s where s.job = c.id))
    order by c.rank, c.run_at, c.id
    limit 1
    for update skip locked
)
update conductor.jobs j
set state = 'running', worker = %(worker)s, fence = j.fence + 1, woken = false,
    started_at = conductor.now(),
    code = case
        when j.fence > 0 and exists (select from conductor.steps s where s.job = j.id) then j.code
        else %(codes)s::jsonb ->> j.task end
where j.ctid = any (array(select c.ctid from claimed c))
returning j.id, j.task, j.trigger::text, j.attempt, j.crashes, j.fence, j.rank, j.key, j.run_at,
    j.created_at, j.metadata, j.app, j.version, j.source_generation, j.source_lsn::text,
    j.source_ordinal, j.subscription, j.payload, j.started_at, j.parent, j.code

-- name: finish_jobs
-- Moves jobs that ended alike (%(outcome)s) into history and returns the ids of those that were the
-- worker's. documents: results, or errors. retentions: the distinct ones, null to keep nothing;
-- retention is a job's place among them. stepped: those that may have steps. failures: 1 counts one
-- more failed attempt. The row is looked up with a limit, so that no other condition can make the
-- server prefer another index than the primary key's.
with finished as materialized (
    select *
    from unnest(
        %(ids)s::bigint[], %(fences)s::integer[], %(retention)s::smallint[], %(documents)s::json[]
    ) as f (id, fence, retention, document)
),
owned as materialized (
    select j.ctid as at, f.retention, f.document
    from finished f
    cross join lateral (
        select c.ctid, c.fence, c.worker
        from conductor.jobs c
        where c.id = f.id
        limit 1
        for update skip locked
    ) j
    where j.fence = f.fence and j.worker = %(worker)s
),
gone as (
    delete from conductor.jobs j
    using owned o
    where j.ctid = o.at
    returning j.*, o.document,
        (array(select conductor.expiry(r) from unnest(%(retentions)s::interval[]) r))[o.retention]
            as expires_on
),
kept as (
    insert into conductor.history (
        id, run_at, created_at, started_at, finished_at, parent, expires_on, fence, rank, attempt,
        crashes, outcome, trigger, queue, task, app, version, key, dedupe_key, payload, metadata,
        result, error, source_generation, source_lsn, source_ordinal, subscription, code)
    select g.id, g.run_at, g.created_at, g.started_at, conductor.now(), g.parent, g.expires_on,
        g.fence, g.rank, g.attempt + %(failures)s, g.crashes, %(outcome)s::conductor.job_outcome,
        g.trigger, g.queue, g.task, g.app, g.version, g.key, g.dedupe_key, g.payload, g.metadata,
        case when %(outcome)s = 'completed' then g.document end,
        case when %(outcome)s <> 'completed' then g.document end,
        g.source_generation, g.source_lsn, g.source_ordinal, g.subscription, g.code
    from gone g
    where g.expires_on is not null
),
answered as (
    insert into conductor.wakeups (job, child, outcome, result)
    select g.parent, g.id, %(outcome)s, g.document from gone g where g.parent is not null
),
forgotten as (
    delete from conductor.steps s
    where s.job = any (%(stepped)s::bigint[]) and s.job in (select g.id from gone g)
    returning s.kind, s.outcome, s.child
),
abandoned as (
    insert into conductor.wakeups (job, cancel_reason)
    select f.child, 'its parent has ' || %(outcome)s
    from forgotten f
    where f.kind = 'invoke' and f.outcome is null and f.child is not null
        and %(outcome)s <> 'completed'
)
select g.id,
    case when g.ordered
        then conductor.free_lane(g.queue, g.task, g.key, g.id, g.place, %(outcome)s::text) end as lane
from gone g

-- name: reschedule_jobs
-- Lets jobs go until wake_at, or else delay_s from now: after a failure that is to be tried again
-- (failures 1, with its error), asleep, given back (0 from now), or waiting for something, which may
-- have come already. Those whose cancellation was requested meanwhile end instead. Returns the ids of
-- those that were the worker's.
with rescheduled as materialized (
    select r.id, r.fence, r.failures, r.error, r.waits,
        greatest(
            conductor.now(),
            coalesce(r.wake_at, conductor.now() + make_interval(secs => r.delay_s))) as due
    from unnest(
        %(ids)s::bigint[], %(fences)s::integer[], %(failures)s::smallint[], %(delays)s::float8[],
        %(wake_ats)s::timestamptz[], %(errors)s::json[], %(waits)s::boolean[]
    ) as r (id, fence, failures, delay_s, wake_at, error, waits)
),
owned as materialized (
    select j.ctid as at, r.failures, r.error, r.waits, j.cancel_reason,
        case when r.waits and j.woken then conductor.now() else r.due end as due
    from rescheduled r
    cross join lateral (
        select c.ctid, c.fence, c.worker, c.woken, c.cancel_reason
        from conductor.jobs c
        where c.id = r.id
        limit 1
        for update skip locked
    ) j
    where j.fence = r.fence and j.worker = %(worker)s
),
left_to_run as (
    update conductor.jobs j
    set state = case
            when o.due > conductor.now() then case when o.waits then 'waiting' else 'scheduled' end
            when j.crashes > 0 then 'suspect'
            else 'ready' end::conductor.job_state,
        run_at = o.due, attempt = j.attempt + o.failures,
        last_error = coalesce(o.error, j.last_error), worker = null, started_at = null
    from owned o
    where j.ctid = o.at and o.cancel_reason is null
    returning j.id
),
gone as (
    delete from conductor.jobs j
    using owned o
    where j.ctid = o.at and o.cancel_reason is not null
    returning j.*, o.failures
),
kept as (
    insert into conductor.history (
        id, run_at, created_at, started_at, finished_at, parent, expires_on, fence, rank, attempt,
        crashes, outcome, trigger, queue, task, app, version, key, dedupe_key, payload, metadata,
        error, source_generation, source_lsn, source_ordinal, subscription, code)
    select g.id, g.run_at, g.created_at, g.started_at, conductor.now(), g.parent,
        conductor.expiry(g.task), g.fence, g.rank, g.attempt + g.failures, g.crashes, 'cancelled',
        g.trigger, g.queue, g.task, g.app, g.version, g.key, g.dedupe_key, g.payload, g.metadata,
        json_build_object(
            'type', 'JobCancelled', 'message', g.cancel_reason, 'attempt', g.attempt + 1),
        g.source_generation, g.source_lsn, g.source_ordinal, g.subscription, g.code
    from gone g
    where conductor.expiry(g.task) is not null
),
answered as (
    insert into conductor.wakeups (job, child, outcome, result)
    select g.parent, g.id, 'cancelled',
        json_build_object('type', 'JobCancelled', 'message', g.cancel_reason)
    from gone g
    where g.parent is not null
),
forgotten as (
    delete from conductor.steps s where s.job = any (array(select g.id from gone g))
    returning s.kind, s.outcome, s.child
),
abandoned as (
    insert into conductor.wakeups (job, cancel_reason)
    select f.child, 'its parent was cancelled' from forgotten f
    where f.kind = 'invoke' and f.outcome is null and f.child is not null
)
select l.id, null::boolean as lane from left_to_run l
union all
select g.id,
    case when g.ordered
        then conductor.free_lane(g.queue, g.task, g.key, g.id, g.place, 'cancelled') end
from gone g

-- name: promote_jobs
-- Makes due jobs ready, those after %(after)s first come. They land where cursors look: a late one
-- no further back than a second. Hints at their queues. Returns how many, and how long until the
-- next is due.
with due as materialized (
    select c.ctid
    from conductor.jobs c
    where c.state in ('scheduled', 'waiting') and c.run_at > %(after)s
        and c.run_at <= conductor.now()
    order by c.run_at
    limit %(limit)s
    for update skip locked
),
promoted as (
    update conductor.jobs j
    set state = case when j.crashes > 0 then 'suspect' else 'ready' end::conductor.job_state,
        run_at = greatest(j.run_at, conductor.now() - interval '1 second')
    where j.ctid = any (array(select d.ctid from due d))
    returning j.queue
),
hints as materialized (
    select pg_notify('conductor_jobs', p.queue) from (select distinct queue from promoted) p
)
select
    (select count(*) from promoted) as promoted,
    (select count(*) from hints) as queues,
    conductor.now() as promoted_at,
    (
        select extract(epoch from n.run_at - conductor.now())::float8
        from conductor.jobs n
        where n.state in ('scheduled', 'waiting') and n.run_at > conductor.now()
            and n.run_at < conductor.now() + interval '1 minute'
        order by n.run_at
        limit 1
    ) as next_due_s

-- name: cancelled_jobs
-- The worker's running jobs whose cancellation was requested. (Not "worker =": the index of running
-- jobs must not look useful here, it may hold many dead entries.)
select j.id, j.fence, j.cancel_reason
from conductor.jobs j
where j.state = 'running' and j.cancel_reason is not null
    and j.worker is not distinct from %(worker)s

-- name: held_jobs
-- What the database believes the worker to run.
select j.id, j.fence
from conductor.jobs j
where j.state = 'running' and j.worker = %(worker)s

-- name: owned_jobs
-- Which of these jobs are still the worker's, with their fences.
select j.id, j.fence
from unnest(%(ids)s::bigint[]) as w (id)
cross join lateral (
    select c.id, c.fence, c.worker from conductor.jobs c where c.id = w.id limit 1
) j
where j.worker = %(worker)s

-- name: offer_heads
-- Gives whoever is first in a lane its turn, in the lanes that were called for. Only for workers with
-- ordered tasks, before their claim. How many calls were looked at after this position, and the last.
select o.looked, o.last from conductor.offer_heads(%(queue)s, %(limit)s, %(after)s::bigint) o

-- name: wake_jobs
-- Brings jobs what has come for them; returns the queues of those that were woken.
select conductor.wake(%(jobs)s::bigint[])

-- name: jobs_to_wake
-- Jobs that something has come for: for what was not brought at once. Those that are there alone.
select distinct u.job from (
    select w.job from conductor.wakeups w order by w.id limit %(limit)s
) u
order by u.job
