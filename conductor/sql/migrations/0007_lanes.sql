-- workers from 0004 go on: what they end in a lane is found by those that know lanes.
-- Ordering by key: the jobs of an ordered task that share a key stand in a lane and run one at a time.
-- Which job of a lane is active is never noted beside the jobs, so that no note can go stale: it is
-- the one that is not parked, and an index sees to it that there is no second.

alter table conductor.jobs
    add column ordered boolean,         -- true: stands in the lane (queue, task, key) until it ends for good
    add column place bigint;            -- where in it, when that is not its id: run again after a halt
comment on column conductor.jobs.ordered is 'true: stands in the lane (queue, task, key); else null';

-- The job that has its lane's turn: claimed, to be claimed, asleep, waiting or between two attempts.
create unique index jobs_lane_active on conductor.jobs (queue, task, key)
    where ordered and state <> 'parked';
-- Those behind it, in order.
create index jobs_lane_parked on conductor.jobs (queue, task, key, (coalesce(place, id)))
    where state = 'parked';

alter table conductor.tasks
    add column ordered boolean not null default false,
    add column on_failure text not null default 'continue' check (on_failure in ('continue', 'halt'));

-- Lanes that something has happened in: a job has come, or the active one has ended. Written with
-- what has happened, in its transaction, and only ever inserted, so that nobody waits for a lane:
-- neither who enqueues nor who settles. conductor.offer_heads() takes them.
create table conductor.lane_calls (
    id bigint generated always as identity,
    queue text collate "C" not null,
    task text collate "C" not null,
    key text collate "C" not null
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
create index lane_calls_queue on conductor.lane_calls (queue, id);

-- Lanes that stand still since a job of a task with on_failure = 'halt' has failed in them.
create table conductor.halted_lanes (
    queue text collate "C" not null,
    task text collate "C" not null,
    key text collate "C" not null,
    job bigint not null,                -- the one that has failed
    place bigint not null,              -- where it stood: it has that place again when it is run again
    halted_at timestamptz not null default conductor.now(),
    primary key (queue, task, key)
);

-- The turn of whoever is first in each lane that was called for, unless a job has it. One process at
-- a time for a queue: so two can never see a lane free at once. What comes later than this looks
-- has a call of its own. Returns how many lanes are left to look at.
create function conductor.offer_heads(queue text, batch integer) returns integer
    language plpgsql
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_custom_plan
as $$
declare
    tasks text[];
    keys text[];
    heads bigint[];
    offered bigint[];
    again integer;
begin
    perform from conductor.lane_calls c where c.queue = offer_heads.queue limit 1;
    if not found then
        return 0;
    end if;
    perform pg_advisory_xact_lock(hashtextextended('conductor.lanes:' || offer_heads.queue, 0));
    with taken as (
        delete from conductor.lane_calls c
        where c.ctid = any (array(
            select t.ctid from conductor.lane_calls t
            where t.queue = offer_heads.queue
            order by t.id
            limit offer_heads.batch
            for update skip locked))
        returning c.task, c.key
    )
    select array_agg(l.task), array_agg(l.key) into tasks, keys
    from (select distinct t.task, t.key from taken t order by t.task, t.key) l;
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
    return again;
end
$$;

-- The active job of a lane has ended: the next one has its turn (true), or none, for the lane halts.
create function conductor.free_lane(
    queue text, task text, key text, job bigint, place bigint, outcome text
) returns boolean
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    if free_lane.outcome = 'failed' and 'halt' = (
        select t.on_failure from conductor.tasks t
        where t.name = free_lane.task order by t.registered_at desc limit 1)
    then
        insert into conductor.halted_lanes (queue, task, key, job, place)
        values (free_lane.queue, free_lane.task, free_lane.key, free_lane.job,
            coalesce(free_lane.place, free_lane.job))
        on conflict on constraint halted_lanes_pkey do nothing;
        return false;
    end if;
    insert into conductor.lane_calls (queue, task, key)
    values (free_lane.queue, free_lane.task, free_lane.key);
    return true;
end
$$;

-- Lets a halted lane go on without the job that has failed in it. True when it was halted.
create function conductor.resume_lane(task text, key text) returns boolean
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    with resumed as (
        delete from conductor.halted_lanes s
        where s.task = resume_lane.task and s.key = resume_lane.key
        returning s.queue
    )
    insert into conductor.lane_calls (queue, task, key)
    select r.queue, resume_lane.task, resume_lane.key from resumed r;
    return found;
end
$$;

-- As before, and for an ordered task into the lane of its key.
create or replace function conductor.invoke(
    task text,
    payload json default '{}',
    queue text default null,
    run_at timestamptz default null,
    priority integer default 0,
    key text default null,
    dedupe_key text default null,
    dedupe_for interval default interval '1 day',
    metadata json default null
) returns bigint
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    registered record;
    target text := invoke.queue;
    due timestamptz := greatest(invoke.run_at, conductor.now());
    job bigint;
begin
    select t.queue, t.ordered into registered from conductor.tasks t
    where t.name = invoke.task order by t.registered_at desc limit 1;
    if target is null then
        target := registered.queue;
        if target is null then
            raise exception 'unknown task %', quote_literal(invoke.task)
                using errcode = 'undefined_object',
                hint = 'Start a worker that has this task, or name its queue.';
        end if;
    end if;
    if registered.ordered and (
        invoke.key is null or length(invoke.key) > 500 or invoke.run_at is not null
        or invoke.priority <> 0)
    then
        raise exception 'task % is ordered by key', quote_literal(invoke.task)
            using errcode = 'invalid_parameter_value',
            hint = 'Give key (at most 500 characters), and neither run_at nor priority.';
    end if;
    job := nextval('conductor.jobs_id_seq');
    if invoke.dedupe_key is not null then
        insert into conductor.dedupe_keys as d (task, key, job, expires_at)
        values (invoke.task, invoke.dedupe_key, job, conductor.now() + invoke.dedupe_for)
        on conflict on constraint dedupe_keys_pkey do update
            set job = excluded.job, expires_at = excluded.expires_at
            where d.expires_at <= conductor.now();
        if not found then
            return null;
        end if;
    end if;
    insert into conductor.jobs (
        id, queue, task, payload, run_at, state, rank, key, dedupe_key, metadata, ordered)
    values (job, target, invoke.task, invoke.payload, due,
        case when registered.ordered then 'parked' when due > conductor.now() then 'scheduled'
            else 'ready' end::conductor.job_state,
        -invoke.priority, invoke.key, invoke.dedupe_key, invoke.metadata,
        case when registered.ordered then true end);
    if registered.ordered then
        insert into conductor.lane_calls (queue, task, key)
        values (target, invoke.task, invoke.key);
    end if;
    return job;
end
$$;

-- As before, and the next job of its lane has its turn.
create or replace function conductor.cancel(job bigint, reason text default null) returns boolean
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
declare
    j conductor.jobs;
    why text := coalesce(cancel.reason, 'cancelled');
begin
    select * into j from conductor.jobs where id = cancel.job for update;
    if not found then
        return false;
    end if;
    if j.state = 'running' then
        update conductor.jobs set cancel_reason = coalesce(cancel_reason, why) where id = j.id;
        return true;
    end if;
    delete from conductor.jobs where id = j.id;
    if j.ordered then
        perform conductor.free_lane(j.queue, j.task, j.key, j.id, j.place, 'cancelled');
    end if;
    with forgotten as (
        delete from conductor.steps s where s.job = j.id returning s.kind, s.outcome, s.child
    )
    insert into conductor.wakeups (job, cancel_reason)
    select f.child, 'its parent was cancelled' from forgotten f
    where f.kind = 'invoke' and f.outcome is null and f.child is not null;
    if j.parent is not null then
        insert into conductor.wakeups (job, child, outcome, result)
        values (j.parent, j.id, 'cancelled', json_build_object('type', 'JobCancelled', 'message', why));
    end if;
    insert into conductor.history (
        id, run_at, created_at, started_at, finished_at, parent, expires_on, fence, rank, attempt, crashes,
        outcome, trigger, queue, task, app, version, key, dedupe_key, payload, metadata, error,
        source_generation, source_lsn, source_ordinal, subscription, code)
    values (
        j.id, j.run_at, j.created_at, j.started_at, conductor.now(), j.parent,
        conductor.expiry(j.task), j.fence, j.rank, j.attempt, j.crashes,
        'cancelled', j.trigger, j.queue, j.task, j.app, j.version, j.key, j.dedupe_key, j.payload, j.metadata,
        json_build_object('type', 'JobCancelled', 'message', why),
        j.source_generation, j.source_lsn, j.source_ordinal, j.subscription, j.code);
    return true;
end
$$;

-- Lanes in which somebody waits and nobody has the turn, called for again: after a hand has deleted
-- jobs, or a worker from before there were lanes has ended some. Skips from one lane to the next.
create function conductor.call_stalled_lanes() returns bigint
    language sql
    set search_path = pg_catalog, pg_temp
as $$
    with recursive lanes as (
        (select j.queue, j.task, j.key from conductor.jobs j where j.state = 'parked'
         order by j.queue, j.task, j.key limit 1)
        union all
        select n.queue, n.task, n.key
        from lanes l
        cross join lateral (
            select j.queue, j.task, j.key from conductor.jobs j
            where j.state = 'parked' and (j.queue, j.task, j.key) > (l.queue, l.task, l.key)
            order by j.queue, j.task, j.key limit 1
        ) n
    ),
    called as (
        insert into conductor.lane_calls (queue, task, key)
        select l.queue, l.task, l.key
        from lanes l
        where (
            select a.id from conductor.jobs a
            where a.ordered and a.state <> 'parked' and a.queue = l.queue and a.task = l.task
                and a.key = l.key
            limit 1
        ) is null and not exists (
            select from conductor.halted_lanes s
            where s.queue = l.queue and s.task = l.task and s.key = l.key)
        returning 1
    )
    select count(*) from called
$$;
