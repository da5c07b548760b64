-- The steps of jobs: what their runs have written, and what they wait for. Fenced and locked as the
-- statements of jobs.sql are.

-- name: load_steps
-- What earlier runs of these jobs have written.
select s.job, s.name, s.position, s.kind, s.result, s.wake_at,
    coalesce(s.wake_at <= conductor.now(), false) as due, s.outcome, s.child
from conductor.steps s
where s.job = any (%(jobs)s::bigint[])

-- name: lock_job
-- Waits until no transaction that writes a step of the job is under way.
select j.id from conductor.jobs j where j.id = %(job)s for no key update

-- name: write_steps
-- Writes steps of several jobs under their row locks and returns those that were the worker's to
-- write. A step that is there already was written by the same claim, whose reply was lost.
with written as materialized (
    select *
    from unnest(
        %(jobs)s::bigint[], %(fences)s::integer[], %(names)s::text[], %(positions)s::integer[],
        %(kinds)s::text[], %(results)s::json[], %(delays)s::float8[], %(wake_ats)s::timestamptz[]
    ) as w (job, fence, name, position, kind, result, delay_s, wake_at)
),
owned as materialized (
    select j.id, j.fence
    from (select distinct w.job, w.fence from written w order by w.job, w.fence) f
    cross join lateral (
        select c.id, c.fence, c.worker
        from conductor.jobs c
        where c.id = f.job
        limit 1
        for no key update
    ) j
    where j.fence = f.fence and j.worker = %(worker)s
)
insert into conductor.steps as s (job, name, position, kind, result, wake_at)
select w.job, w.name, w.position, w.kind, w.result,
    coalesce(w.wake_at, conductor.now() + make_interval(secs => w.delay_s))
from written w
join owned o on o.id = w.job and o.fence = w.fence
on conflict (job, name) do update set created_at = s.created_at
returning s.job, s.name, s.position, s.kind, s.result, s.wake_at,
    coalesce(s.wake_at <= conductor.now(), false) as due, s.outcome, s.child

-- name: write_calls
-- Likewise steps that make a job, wait for something, or give up waiting; all in one transaction with
-- what they make. The outcome of a step that is there already stays. cancels: when the wait is given
-- up, the job that it waited for is to be cancelled. What was committed in the source before a wait
-- for a change never matches: seen_lsn says how far that goes, of a source elsewhere that the worker
-- could ask; of one that it could not there is no such wait.
with asked as materialized (
    select c.*, case when c.task is not null then nextval('conductor.jobs_id_seq') end as made
    from rows from (
        json_to_recordset(%(calls)s::json) as (
            job bigint, fence integer, name text, position integer, kind text, outcome text,
            delay_s float8, wake_at timestamptz, cancels bigint, topic text, fields text,
            matched text, queue text, task text, trigger text, rank smallint, key text,
            after_s float8, ordered boolean, seen_lsn pg_lsn),
        unnest(%(results)s::json[], %(conditions)s::json[], %(payloads)s::json[], %(metadata)s::json[])
    ) as c (
        job, fence, name, position, kind, outcome, delay_s, wake_at, cancels, topic, fields, matched,
        queue, task, trigger, rank, key, after_s, ordered, seen_lsn, result, condition, payload,
        metadata)
),
owned as materialized (
    select j.id, j.fence
    from (select distinct a.job, a.fence from asked a order by a.job, a.fence) f
    cross join lateral (
        select c.id, c.fence, c.worker
        from conductor.jobs c
        where c.id = f.job
        limit 1
        for no key update
    ) j
    where j.fence = f.fence and j.worker = %(worker)s
),
stepped as (
    insert into conductor.steps as s (
        job, name, position, kind, result, outcome, wake_at, child, topic, fields, matched, condition,
        seen, seen_lsn)
    select a.job, a.name, a.position, a.kind, a.result,
        case
            when a.kind = 'change' and a.topic is not null and a.seen_lsn is null and exists (
                select from conductor.progress p
                where p.source = 'default' and (
                    p.database <> current_database()
                    or p.system_identifier <> (
                        select c.system_identifier::text from pg_control_system() c)))
            then 'unavailable'
            else a.outcome end,
        coalesce(a.wake_at, conductor.now() + make_interval(secs => a.delay_s)), a.made, a.topic,
        a.fields, a.matched, a.condition,
        case when a.topic is not null then pg_current_snapshot() end,
        case when a.kind = 'change' then coalesce(a.seen_lsn, pg_current_wal_insert_lsn()) end
    from asked a
    join owned o on o.id = a.job and o.fence = a.fence
    on conflict (job, name) do update set outcome = coalesce(s.outcome, excluded.outcome)
    returning s.*
),
made as (
    insert into conductor.jobs (
        id, queue, task, trigger, payload, rank, key, metadata, parent, emitted_by, run_at, state,
        ordered)
    select a.made, a.queue, a.task, a.trigger::conductor.job_trigger, a.payload, a.rank, a.key,
        a.metadata, case when a.kind = 'invoke' then a.job end,
        case when a.trigger = 'event' then pg_current_xact_id() end,
        conductor.now() + make_interval(secs => greatest(a.after_s, 0)),
        case when a.ordered then 'parked' when a.after_s > 0 then 'scheduled'
            else 'ready' end::conductor.job_state,
        a.ordered
    from asked a
    join stepped s on s.job = a.job and s.child = a.made
    order by a.made
    returning queue, task, key, ordered
),
called as (
    insert into conductor.lane_calls (queue, task, key)
    select distinct m.queue, m.task, m.key from made m where m.ordered
),
doomed as (
    insert into conductor.wakeups (job, cancel_reason)
    select a.cancels, format('job %%s has asked for it', a.job)
    from asked a
    join stepped s on s.job = a.job and s.name = a.name
    where a.cancels is not null and s.outcome is not distinct from a.outcome
)
select s.job, s.name, s.position, s.kind, s.result, s.wake_at,
    coalesce(s.wake_at <= conductor.now(), false) as due, s.outcome, s.child
from stepped s

-- name: write_schedules
-- Likewise steps that begin or end (without an expression) a schedule, together with it. A step that
-- is there already was written by the same claim, and so was its schedule.
with asked as materialized (
    select c.*
    from rows from (
        json_to_recordset(%(calls)s::json) as (
            job bigint, fence integer, name text, position integer, kind text, schedule text,
            task text, queue text, rank smallint, expression text, timezone text),
        unnest(%(payloads)s::json[], %(metadata)s::json[])
    ) as c (
        job, fence, name, position, kind, schedule, task, queue, rank, expression, timezone, payload,
        metadata)
),
owned as materialized (
    select j.id, j.fence
    from (select distinct a.job, a.fence from asked a order by a.job, a.fence) f
    cross join lateral (
        select c.id, c.fence, c.worker
        from conductor.jobs c
        where c.id = f.job
        limit 1
        for no key update
    ) j
    where j.fence = f.fence and j.worker = %(worker)s
),
stepped as (
    insert into conductor.steps as s (job, name, position, kind, outcome)
    select a.job, a.name, a.position, a.kind, 'completed'
    from asked a
    join owned o on o.id = a.job and o.fence = a.fence
    on conflict (job, name) do update set created_at = s.created_at
    returning s.*, s.xmax = 0 as is_new
),
wanted as (
    select distinct on (a.task, a.schedule) a.*
    from asked a
    join stepped s on s.job = a.job and s.name = a.name
    where s.is_new
    order by a.task, a.schedule, a.job desc
),
begun as (
    insert into conductor.schedules as c (
        app, task, name, queue, rank, expression, timezone, payload, metadata, next_at, is_planned)
    select '', w.task, w.schedule, w.queue, w.rank, w.expression, w.timezone, w.payload, w.metadata,
        conductor.now(), false
    from wanted w
    where w.expression is not null
    order by w.task, w.schedule
    on conflict (app, task, name) do update set
        queue = excluded.queue, rank = excluded.rank, expression = excluded.expression,
        timezone = excluded.timezone, payload = excluded.payload, metadata = excluded.metadata,
        next_at = case when c.expression = excluded.expression and c.timezone = excluded.timezone
            then c.next_at else excluded.next_at end,
        is_planned = c.is_planned and c.expression = excluded.expression
            and c.timezone = excluded.timezone,
        registered_at = conductor.now()
),
ended as (
    delete from conductor.schedules c
    using wanted w
    where w.expression is null and c.app = '' and c.task = w.task and c.name = w.schedule
)
select s.job, s.name, s.position, s.kind, s.result, s.wake_at, false as due, s.outcome, s.child
from stepped s

-- name: limit_idle
-- For the rest of the transaction.
select pg_catalog.set_config(
    'idle_in_transaction_session_timeout', (%(timeout_s)s::float8 * 1000)::integer::text, true)
