-- The cron tick.

-- name: due_schedules
-- Locks what is due, so that each instant is fired by one process. Without those that this process
-- cannot compute.
select id, app, task, name, expression, timezone, next_at, conductor.now() as seen_at
from conductor.schedules
where next_at <= conductor.now() and id <> all(%(excluded)s::bigint[])
order by next_at, id
limit %(batch)s
for update skip locked

-- name: fire_schedules
-- Moves each schedule from the instant it stands at and makes the job of that move.
with fired as (
    update conductor.schedules s
    set next_at = f.next_at, last_at = f.fired_at, missed = s.missed + f.missed
    from json_to_recordset(%(firings)s) as f (
        id bigint, due_at timestamptz, fired_at timestamptz, next_at timestamptz,
        missed bigint, payload json)
    where s.id = f.id and s.next_at = f.due_at
    returning s.queue, s.task, s.app, s.version, s.rank, f.payload, f.fired_at, s.id
)
insert into conductor.jobs (queue, task, app, version, rank, trigger, payload)
select queue, task, app, version, rank, 'cron', payload from fired order by fired_at, id
returning queue, task

-- name: until_next
-- Seconds until the next schedule is due, by the database's clock.
select extract(epoch from min(next_at) - conductor.now())::double precision
from conductor.schedules where id <> all(%(excluded)s::bigint[])
