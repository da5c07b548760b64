-- Worker rows (leases), and what happens to the jobs of a worker that has died.
-- renewals counts up while its process lives; below zero the worker has been declared dead.

-- name: register_worker
insert into conductor.workers (app, version, queue, tasks, host, pid, slots)
values (
    %(app)s, %(version)s, %(queue)s, %(tasks)s::text[], %(host)s, %(pid)s, %(slots)s)
returning id

-- name: drain_worker
-- Says that the worker takes no more jobs.
update conductor.workers set draining = true where id = %(worker)s

-- name: retire_worker
-- Removes a worker that has nothing left to run.
delete from conductor.workers w
where w.id = %(worker)s
    and not exists (select from conductor.jobs j where j.state = 'running' and j.worker = w.id)

-- name: offered_by
-- Whether jobs that were routed for this version of a task have somebody to wait for: a live worker of
-- it, or the newest version, which may be about to start (its triggers are stamped before it works)
-- and is never given up.
select true
where exists (
        select from conductor.workers w
        where w.app = %(app)s and w.version = %(version)s and %(task)s = any (w.tasks)
            and w.renewals >= 0)
    or exists (
        select from conductor.tasks t
        where t.app = %(app)s and t.name = %(task)s and t.version = %(version)s)

-- name: renew_leases
-- Renews the leases of one process; those not returned are gone.
update conductor.workers w
set renewals = w.renewals + 1
where w.id = any (%(workers)s::bigint[]) and w.renewals >= 0
returning w.id

-- name: watch_leases
select w.id, w.renewals from conductor.workers w

-- name: declare_dead
-- Declares a worker dead whose counter still stands where it was seen. Skips a row that is locked:
-- the worker is claiming, or another process declares.
update conductor.workers w
set renewals = -1
where w.ctid = any (array(
    select c.ctid
    from conductor.workers c
    where c.id = %(worker)s and c.renewals = %(renewals)s
    for update skip locked
))
returning w.id

-- name: rescue_jobs
-- Takes up to %(limit)s jobs from a dead worker. Those that have now crashed %(max_crashes)s
-- processes end as failed, those whose cancellation was requested as cancelled; the others may be claimed again, each alone.
with orphaned as materialized (
    select c.ctid, c.crashes + 1 as crashes, c.cancel_reason
    from conductor.jobs c
    where c.state = 'running' and c.worker = %(worker)s
    order by c.id
    limit %(limit)s
    for update skip locked
),
returned as (
    update conductor.jobs j
    set state = 'suspect', run_at = conductor.now(), crashes = j.crashes + 1,
        worker = null, started_at = null
    where j.ctid = any (array(
        select o.ctid from orphaned o
        where o.crashes < %(max_crashes)s and o.cancel_reason is null))
    returning j.queue
),
gone as (
    delete from conductor.jobs j
    where j.ctid = any (array(
        select o.ctid from orphaned o
        where o.crashes >= %(max_crashes)s or o.cancel_reason is not null))
    returning j.*,
        (case when j.cancel_reason is null then 'failed' else 'cancelled' end)::conductor.job_outcome
            as outcome,
        coalesce(
            j.cancel_reason,
            format('%%s processes died while they ran this job', j.crashes + 1)) as message,
        case when j.cancel_reason is null then 'WorkerCrashed' else 'JobCancelled' end as error_type
),
kept as (
    insert into conductor.history (
        id, run_at, created_at, started_at, finished_at, parent, expires_on, fence, rank, attempt,
        crashes, outcome, trigger, queue, task, app, version, key, dedupe_key, payload, metadata,
        error, source_generation, source_lsn, source_ordinal, subscription, code)
    select g.id, g.run_at, g.created_at, g.started_at, conductor.now(), g.parent,
        conductor.expiry(g.task), g.fence, g.rank, g.attempt, g.crashes + 1, g.outcome, g.trigger,
        g.queue, g.task, g.app, g.version, g.key, g.dedupe_key, g.payload, g.metadata,
        json_build_object('type', g.error_type, 'message', g.message, 'attempt', g.attempt),
        g.source_generation, g.source_lsn, g.source_ordinal, g.subscription, g.code
    from gone g
    returning queue, task, outcome
),
answered as (
    insert into conductor.wakeups (job, child, outcome, result)
    select g.parent, g.id, g.outcome,
        json_build_object('type', g.error_type, 'message', g.message)
    from gone g
    where g.parent is not null
),
forgotten as (
    delete from conductor.steps s where s.job = any (array(select g.id from gone g))
    returning s.kind, s.outcome, s.child
),
abandoned as (
    insert into conductor.wakeups (job, cancel_reason)
    select f.child, 'its parent has ended' from forgotten f
    where f.kind = 'invoke' and f.outcome is null and f.child is not null
),
hints as materialized (
    select pg_notify('conductor_jobs', r.queue) from (select distinct queue from returned) r
)
select
    (select count(*) from returned) as rescued,
    (
        select coalesce(json_agg(json_build_array(e.queue, e.task, e.outcome, e.jobs)), '[]')
        from (select queue, task, outcome, count(*) as jobs from kept group by 1, 2, 3) e
    ) as ended,
    (select count(*) from hints) as queues,
    (
        select count(conductor.free_lane(g.queue, g.task, g.key, g.id, g.place, g.outcome::text))
        from gone g
        where g.ordered
    ) as lanes

-- name: bury_worker
-- Removes a dead worker once no job is left to it.
delete from conductor.workers w
where w.id = %(worker)s and w.renewals < 0
    and not exists (select from conductor.jobs j where j.state = 'running' and j.worker = w.id)
returning w.id

-- name: listen
-- Hints: the payload is the queue that has new jobs.
listen conductor_jobs
