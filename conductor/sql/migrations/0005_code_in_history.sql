-- workers from 0004 go on
-- History keeps which version of its task's handler a job has begun with.
alter table conductor.history add column code text collate "C";

-- Cancels a job. One that is not running ends at once; a running one is told through its worker
-- within a second. True when the job had not ended yet.
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

create or replace view conductor.job as
select id, queue, task, state::text as state, trigger::text as trigger, -rank as priority, key,
    nullif(run_at, 'infinity') as run_at,   -- null: whenever what it waits for comes
    created_at, started_at, null::timestamptz as finished_at, attempt, crashes, fence, worker, parent, app,
    version, dedupe_key, payload, metadata, null::json as result, last_error as error, cancel_reason,
    source_generation, source_lsn, source_ordinal, subscription, code
from conductor.jobs
union all
select id, queue, task, outcome::text, trigger::text, -rank, key, run_at,
    created_at, started_at, finished_at, attempt, crashes, fence, null, parent, app,
    version, dedupe_key, payload, metadata, result, error, null,
    source_generation, source_lsn, source_ordinal, subscription, code
from conductor.history;
