-- Putting jobs into the queue from an application: in a transaction of its own or of the caller.

-- name: enqueue_jobs
-- One job for each payload, in their order; returns id and true for each, in the same order.
with clock as materialized (
    select conductor.now() as now, greatest(
        %(run_at)s::timestamptz, conductor.now() + %(delay)s::interval, conductor.now()) as due
)
insert into conductor.jobs (
    queue, task, trigger, payload, run_at, state, rank, key, metadata, emitted_by)
select %(queue)s, %(task)s, %(trigger)s::conductor.job_trigger, u.payload::json, c.due,
    case when c.due > c.now then 'scheduled' else 'ready' end::conductor.job_state,
    %(rank)s, u.key, %(metadata)s::json,
    case when %(trigger)s = 'event' then pg_current_xact_id() end
from clock c
cross join unnest(%(payloads)s::text[], %(keys)s::text[]) with ordinality as u (payload, key, n)
order by u.n
returning id, true

-- name: enqueue_ordered_jobs
-- Likewise jobs of an ordered task, each into the lane of its key.
with input as materialized (
    select u.payload, u.key, u.n
    from unnest(%(payloads)s::text[], %(keys)s::text[]) with ordinality as u (payload, key, n)
),
called as (
    insert into conductor.lane_calls (queue, task, key)
    select distinct %(queue)s, %(task)s, i.key from input i
)
insert into conductor.jobs (queue, task, trigger, payload, state, ordered, key, metadata)
select %(queue)s, %(task)s, %(trigger)s::conductor.job_trigger, i.payload::json, 'parked', true, i.key,
    %(metadata)s::json
from input i
order by i.n
returning id, true

-- name: reserve_jobs
-- Ids for jobs that are about to be copied in, in this transaction, with their time and state.
with clock as materialized (
    select conductor.now() as now, greatest(
        %(run_at)s::timestamptz, conductor.now() + %(delay)s::interval, conductor.now()) as due
)
select nextval('conductor.jobs_id_seq'), c.due::text,
    case when c.due > c.now then 'scheduled' else 'ready' end,
    case when %(trigger)s = 'event' then pg_current_xact_id()::text end
from clock c
cross join generate_series(1, %(count)s)

-- name: call_lanes
insert into conductor.lane_calls (queue, task, key)
select distinct %(queue)s, %(task)s, k from unnest(%(keys)s::text[]) as k

-- name: copy_ordered_jobs
copy conductor.jobs (
    id, run_at, state, emitted_by, queue, task, trigger, rank, metadata, ordered, payload, key)
    from stdin

-- name: copy_jobs
copy conductor.jobs (
    id, run_at, state, emitted_by, queue, task, trigger, rank, metadata, payload, key) from stdin

-- name: enqueue_jobs_once
-- Likewise, but a job whose dedupe key is taken is not made: its place in the answer has the id of
-- the job that holds the key, and false. Keys are locked in sorted order, until the transaction ends.
-- ordered: true for jobs of an ordered task, else null.
with clock as materialized (
    select conductor.now() as now, greatest(
        %(run_at)s::timestamptz, conductor.now() + %(delay)s::interval, conductor.now()) as due
),
input as materialized (
    select nextval('conductor.jobs_id_seq') as id, u.n, u.payload, u.key, u.dedupe_key
    from unnest(%(payloads)s::text[], %(keys)s::text[], %(dedupe_keys)s::text[])
        with ordinality as u (payload, key, dedupe_key, n)
),
held as (
    insert into conductor.dedupe_keys as d (task, key, job, expires_at)
    select %(task)s, i.dedupe_key, min(i.id), min(c.now) + %(dedupe_for)s::interval
    from input i
    cross join clock c
    group by i.dedupe_key
    order by i.dedupe_key collate "C"
    on conflict on constraint dedupe_keys_pkey do update set
        job = case when d.expires_at <= conductor.now() then excluded.job else d.job end,
        expires_at = case when d.expires_at <= conductor.now()
            then excluded.expires_at else d.expires_at end
    returning d.key, d.job
),
enqueued as (
    insert into conductor.jobs (
        id, queue, task, trigger, payload, run_at, state, rank, key, dedupe_key, metadata, ordered)
    select i.id, %(queue)s, %(task)s, %(trigger)s::conductor.job_trigger, i.payload::json, c.due,
        case when %(ordered)s then 'parked' when c.due > c.now then 'scheduled'
            else 'ready' end::conductor.job_state,
        %(rank)s, i.key, i.dedupe_key, %(metadata)s::json, %(ordered)s::boolean
    from input i
    join held h on h.job = i.id
    cross join clock c
    order by i.n
    returning key
),
called as (
    insert into conductor.lane_calls (queue, task, key)
    select distinct %(queue)s, %(task)s, e.key from enqueued e where %(ordered)s
)
select h.job, h.job = i.id
from input i
join held h on h.key = i.dedupe_key
order by i.n

-- name: emit_events
-- Emits an event many times, in order, by way of the WAL where `via` says so.
select conductor.emit(
    event => %(event)s, payload => u.payload::json, metadata => %(metadata)s::json, via => %(via)s)
from unnest(%(payloads)s::text[]) with ordinality as u (payload, n)
order by u.n

-- name: cancel_job
select conductor.cancel(%(job)s, %(reason)s)

-- name: fetch_outcomes
-- How jobs have ended. A job that has not ended gives no row, one that is not known (never was, not
-- committed yet, or not kept in history) a row without an outcome.
select w.id, h.outcome::text, h.result::text, h.error::text
from unnest(%(jobs)s::bigint[]) as w (id)
left join lateral (
    select f.outcome, f.result, f.error from conductor.history f where f.id = w.id limit 1
) h on true
where h.outcome is not null or not exists (select from conductor.jobs j where j.id = w.id)

-- name: hint_queue
-- Tells waiting workers that a queue has something. Never needed: they also poll.
select pg_notify('conductor_jobs', %(queue)s)
