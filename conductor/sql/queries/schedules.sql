-- The cron tick, and schedules that are made while an application runs. Those have a payload; while
-- nobody has registered their task they rest.

-- name: due_schedules
-- Locks what is due, so that each instant is fired by one process. Without those that this process
-- cannot compute.
select s.id, s.app, s.task, s.name, s.expression, s.timezone, s.next_at, s.is_planned,
    s.payload is not null as has_payload, s.metadata, conductor.now() as seen_at
from conductor.schedules s
where s.next_at <= conductor.now() and s.id <> all(%(excluded)s::bigint[])
    and (s.payload is null or exists (select from conductor.tasks t where t.name = s.task))
order by s.next_at, s.id
limit %(batch)s
for update of s skip locked

-- name: fire_schedules
-- Moves each schedule from where it stands and makes the job of that move, if it has passed an
-- instant. A job with a payload of its own is routed for the version of its task registered last.
with fired as (
    update conductor.schedules s
    set next_at = f.next_at, is_planned = true, last_at = coalesce(f.fired_at, s.last_at),
        missed = s.missed + f.missed
    from json_to_recordset(%(firings)s) as f (
        id bigint, due_at timestamptz, fired_at timestamptz, next_at timestamptz,
        missed bigint, payload json, metadata json)
    where s.id = f.id and s.next_at = f.due_at
    returning s.queue, s.task, s.app, s.version, s.rank, s.id, s.payload as given, f.payload,
        f.metadata, f.fired_at
)
insert into conductor.jobs (queue, task, app, version, rank, trigger, payload, metadata)
select f.queue, f.task, coalesce(t.app, f.app), case when f.given is null then f.version else t.version end,
    f.rank, case when f.given is null then 'cron' else 'invoke' end::conductor.job_trigger,
    coalesce(f.given, f.payload), f.metadata
from fired f
left join lateral (
    select t.app, t.version from conductor.tasks t
    where f.given is not null and t.name = f.task order by t.registered_at desc limit 1
) t on true
where f.fired_at is not null
order by f.fired_at, f.id
returning queue, task

-- name: until_next
-- Seconds until the next schedule is due, by the database's clock.
select extract(epoch from min(s.next_at) - conductor.now())::double precision
from conductor.schedules s
where s.id <> all(%(excluded)s::bigint[])
    and (s.payload is null or exists (select from conductor.tasks t where t.name = s.task))

-- name: put_schedule
-- Begins a schedule, or replaces that of its name; an unchanged one keeps its next instant.
insert into conductor.schedules as s (
    app, task, name, queue, rank, expression, timezone, payload, metadata, next_at, is_planned)
values (
    '', %(task)s, %(name)s, %(queue)s, %(rank)s, %(expression)s, %(timezone)s, %(payload)s::json,
    %(metadata)s::json, conductor.now(), false)
on conflict (app, task, name) do update set
    queue = excluded.queue, rank = excluded.rank, expression = excluded.expression,
    timezone = excluded.timezone, payload = excluded.payload, metadata = excluded.metadata,
    next_at = case when s.expression = excluded.expression and s.timezone = excluded.timezone
        then s.next_at else excluded.next_at end,
    is_planned = s.is_planned and s.expression = excluded.expression
        and s.timezone = excluded.timezone,
    registered_at = conductor.now()

-- name: drop_schedule
-- Ends a schedule that was made while the application ran.
delete from conductor.schedules where app = '' and task = %(task)s and name = %(name)s
returning true
