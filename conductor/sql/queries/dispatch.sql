-- Emitted events: dispatch jobs in, the subscribers' jobs out, in one transaction.

-- name: take_dispatches
-- Takes the first dispatch jobs behind a position of the ready index. They are deleted: what they
-- were for exists when this transaction commits, and they are back when it does not. By ctid, as
-- every write of the hot path: see jobs.sql.
with taken as materialized (
    select c.ctid
    from conductor.jobs c
    where c.state = 'ready' and c.queue = 'conductor.internal' and c.task = 'conductor.dispatch'
        and (c.rank, c.run_at, c.id) > (%(rank)s::smallint, %(run_at)s::timestamptz, %(id)s::bigint)
        and c.run_at <= conductor.now()
        and not exists (
            select from conductor.queues q where q.name = 'conductor.internal' and q.paused)
    order by c.rank, c.run_at, c.id
    limit %(batch)s
    for update skip locked
)
delete from conductor.jobs j
where j.ctid = any (array(select t.ctid from taken t))
returning j.id, j.rank, j.run_at, j.created_at, j.payload::text, j.metadata::text,
    j.emitted_by::text

-- name: subscriptions_of
-- The live subscriptions of some events, as of now: one that was committed before an event was
-- emitted is always among them.
select id, app, task, trigger, kind, source, queue, version, rank, definition,
    definition ->> 'event' as event
from conductor.subscriptions
where kind = 'event' and retired_at is null and definition ->> 'event' = any (%(events)s::text[])
order by id

-- name: add_event_jobs
insert into conductor.jobs (queue, task, app, version, trigger, rank, subscription, payload, metadata)
select s.queue, s.task, s.app, s.version, 'event', s.rank, s.id, r.payload, r.metadata
from unnest(%(subscriptions)s::bigint[], %(payloads)s::json[], %(metadata)s::json[])
    with ordinality as r (subscription, payload, metadata, place)
join conductor.subscriptions s on s.id = r.subscription
order by r.place

-- name: fail_event_jobs
-- Failed jobs of subscribers whose filter could not be evaluated: an operator may run them again.
-- They pass through the queue, for its ids; `drop_failed_jobs` follows in the transaction.
with made as (
    insert into conductor.jobs (
        queue, task, app, version, trigger, rank, subscription, payload, metadata, last_error)
    select s.queue, s.task, s.app, s.version, 'event', s.rank, s.id, r.payload, r.metadata,
        json_build_object('type', 'FilterFailed', 'message', r.reason, 'attempt', 0)
    from unnest(
        %(subscriptions)s::bigint[], %(payloads)s::json[], %(metadata)s::json[], %(reasons)s::text[]
    ) with ordinality as r (subscription, payload, metadata, reason, place)
    join conductor.subscriptions s on s.id = r.subscription
    order by r.place
    returning *
)
insert into conductor.history (
    id, run_at, created_at, finished_at, expires_on, fence, rank, attempt, crashes, outcome, trigger,
    queue, task, app, version, subscription, payload, metadata, error)
select m.id, m.run_at, m.created_at, conductor.now(), conductor.expiry(m.task), 0, m.rank, 0, 0,
    'failed', m.trigger, m.queue, m.task, m.app, m.version, m.subscription, m.payload, m.metadata,
    m.last_error
from made m
returning id

-- name: drop_failed_jobs
delete from conductor.jobs where id = any (%(ids)s::bigint[])

-- name: refuse_dispatches
-- Keeps dispatch jobs that cannot be read as failed ones.
insert into conductor.history (
    id, run_at, created_at, finished_at, expires_on, fence, rank, attempt, crashes, outcome, trigger,
    queue, task, payload, metadata, error)
select r.id, r.run_at, r.created_at, conductor.now(), conductor.expiry('conductor.dispatch'), 0,
    r.rank, 0, 0, 'failed', 'event', 'conductor.internal', 'conductor.dispatch', r.payload,
    r.metadata, json_build_object('type', 'PayloadInvalid', 'message', r.reason, 'attempt', 0)
from unnest(
    %(ids)s::bigint[], %(ranks)s::smallint[], %(run_ats)s::timestamptz[],
    %(created_ats)s::timestamptz[], %(payloads)s::json[], %(metadata)s::json[], %(reasons)s::text[]
) as r (id, rank, run_at, created_at, payload, metadata, reason)
