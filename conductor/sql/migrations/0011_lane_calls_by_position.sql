-- workers from 0004 go on
-- Calls of lanes are looked at from a position on, which the worker keeps: those before it are gone, but
-- while a snapshot is held nothing may remove them, and each look would walk over all of them.

-- The turn of whoever is first in each lane that was called for after this position, unless a job has
-- it. One process at a time for a queue: so two can never see a lane free at once. What comes later than
-- this looks has a call of its own. again: how many lanes are left to look at; looked: at how many calls
-- this has; last: the position of the last of them.
create function conductor.offer_heads(
    queue text, batch integer, after bigint, out again integer, out looked integer, out last bigint
)
    language plpgsql
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_custom_plan
    set enable_bitmapscan = off         -- a sort would read all calls for a few
as $$
declare
    tasks text[];
    keys text[];
    heads bigint[];
    offered bigint[];
begin
    again := 0;
    looked := 0;
    perform from conductor.lane_calls c
    where c.queue = offer_heads.queue and c.id > offer_heads.after
    order by c.id limit 1;
    if not found then
        return;
    end if;
    perform pg_advisory_xact_lock(hashtextextended('conductor.lanes:' || offer_heads.queue, 0));
    with taken as (
        delete from conductor.lane_calls c
        where c.ctid = any (array(
            select t.ctid from conductor.lane_calls t
            where t.queue = offer_heads.queue and t.id > offer_heads.after
            order by t.id
            limit offer_heads.batch
            for update skip locked))
        returning c.task, c.key, c.id
    ),
    lanes as (
        select t.task, t.key, count(*) as calls, max(t.id) as last_id
        from taken t group by t.task, t.key order by t.task, t.key
    )
    select array_agg(l.task), array_agg(l.key), coalesce(sum(l.calls), 0), max(l.last_id)
    into tasks, keys, looked, last
    from lanes l;
    -- From here on with a snapshot that is later than the lock.
    select array_agg(h.id), array_agg(h.task), array_agg(h.key) into heads, tasks, keys
    from (
        select l.task, l.key, p.id
        from unnest(tasks, keys) as l (task, key)
        cross join lateral (
            select c.id from conductor.jobs c
            where c.state = 'parked' and c.queue = offer_heads.queue and c.task = l.task
                and c.key = l.key
            order by coalesce(c.place, c.id)
            limit 1
        ) p
        where (
            select a.id from conductor.jobs a
            where a.ordered and a.state <> 'parked' and a.queue = offer_heads.queue
                and a.task = l.task and a.key = l.key
            limit 1
        ) is null and (
            select s.job from conductor.halted_lanes s
            where s.queue = offer_heads.queue and s.task = l.task and s.key = l.key
        ) is null
    ) h;
    with mine as materialized (
        select j.ctid from conductor.jobs j
        where j.id = any (heads) and j.state = 'parked'
        order by j.id
        for update skip locked
    ),
    freed as (
        update conductor.jobs j
        set state = case when j.run_at > conductor.now() then 'scheduled'
                else 'ready' end::conductor.job_state,
            run_at = greatest(j.run_at, conductor.now())
        where j.ctid = any (array(select m.ctid from mine m))
        returning j.id
    )
    select coalesce(array_agg(f.id), '{}') into offered from freed f;
    -- Somebody has the first one locked, to cancel it presumably: whatever becomes of it, look again.
    insert into conductor.lane_calls (queue, task, key)
    select offer_heads.queue, h.task, h.key
    from unnest(heads, tasks, keys) as h (id, task, key)
    where h.id <> all (offered);
    get diagnostics again = row_count;
end
$$;

-- As before: from the beginning.
create or replace function conductor.offer_heads(queue text, batch integer) returns integer
    language sql
    set search_path = pg_catalog, pg_temp
as $$
    select o.again from conductor.offer_heads(offer_heads.queue, offer_heads.batch, 0::bigint) o
$$;
