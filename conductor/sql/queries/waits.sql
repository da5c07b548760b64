-- What jobs wait for: which of them a message concerns, and telling them.

-- name: wait_fields
-- By which fields jobs wait for these topics. Skips from one to the next of the index.
with recursive found as (
    select t.topic, f.fields
    from unnest(%(topics)s::text[]) as t (topic)
    cross join lateral (
        select s.fields from conductor.steps s
        where s.topic = t.topic and s.outcome is null
        order by s.fields limit 1
    ) f
    union all
    select f.topic, n.fields
    from found f
    cross join lateral (
        select s.fields from conductor.steps s
        where s.topic = f.topic and s.outcome is null and s.fields > f.fields
        order by s.fields limit 1
    ) n
)
select topic, fields from found

-- name: waiting_for
-- The steps that wait for these messages (place is which), as far as topic and fields decide. Not
-- for what was emitted before they were written.
select m.place::integer, s.job, s.name, s.condition::text
from unnest(
    %(topics)s::text[], %(fields)s::text[], %(matched)s::text[], %(emitted_by)s::xid8[],
    %(places)s::integer[]
) as m (topic, fields, matched, emitted_by, place)
cross join lateral (
    select c.job, c.name, c.condition, c.seen
    from conductor.steps c
    where c.topic = m.topic and c.fields = m.fields and c.matched = m.matched and c.outcome is null
) s
where not pg_visible_in_snapshot(m.emitted_by, s.seen)
order by m.place, s.job, s.name

-- name: add_wakeups
-- A payload is taken out of its envelope as text: to the digit what subscribers get.
insert into conductor.wakeups (job, step, outcome, result)
select u.job, u.step, u.outcome,
    case u.outcome when 'completed' then u.result -> 'payload' else u.result end
from unnest(%(jobs)s::bigint[], %(steps)s::text[], %(outcomes)s::text[], %(results)s::json[])
    with ordinality as u (job, step, outcome, result, place)
order by u.place

-- name: wake_jobs
select conductor.wake(%(jobs)s::bigint[])
