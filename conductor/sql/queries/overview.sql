-- What `conductor top` shows. Every count is bounded (%(bound)s means that many or more), and each
-- part goes by an index of its own, so that watching a queue of millions costs the queue nothing.

-- name: limit_reading
-- For the rest of the transaction. Whatever the estimates: only a scan in an index's order stops at a
-- limit, a bitmap is made of everything first.
select pg_catalog.set_config('statement_timeout', (%(timeout_s)s::float8 * 1000)::integer::text, true),
    pg_catalog.set_config('enable_bitmapscan', 'off', true),
    pg_catalog.set_config('enable_seqscan', 'off', true),
    pg_catalog.set_config('enable_sort', 'off', true),
    extract(epoch from conductor.now())::float8 as at

-- name: task_rows
-- The tasks that are registered, and what is ready of each.
select t.queue, t.name as task, c.ready, o.oldest_ready_s
from (
    select distinct k.queue, k.name from conductor.tasks k
    union
    select 'conductor.internal', 'conductor.dispatch'
    order by 1, 2
    limit %(tasks)s
) t
cross join lateral (
    select count(*) as ready from (
        select from conductor.jobs j
        where j.state = 'ready' and j.queue = t.queue and j.task = t.name
        order by j.queue, j.task, j.rank, j.run_at, j.id
        limit %(bound)s
    ) b
) c
left join lateral (
    with recursive heads as (
        (select j.rank, j.run_at
         from conductor.jobs j
         where j.state = 'ready' and j.queue = t.queue and j.task = t.name
         order by j.queue, j.task, j.rank, j.run_at, j.id limit 1)
        union all
        select n.rank, n.run_at
        from heads h
        cross join lateral (
            select j.rank, j.run_at
            from conductor.jobs j
            where j.state = 'ready' and j.queue = t.queue and j.task = t.name and j.rank > h.rank
            order by j.queue, j.task, j.rank, j.run_at, j.id limit 1
        ) n
    )
    select extract(epoch from conductor.now() - min(h.run_at))::float8 as oldest_ready_s from heads h
) o on true

-- name: task_states
-- What runs, what is put off and what failed lately, by task. Of what is put off the nearest count.
-- due_s: for how long the oldest could have run, though nobody has marked it ready.
select b.queue, b.task, b.what, count(*) as jobs,
    extract(epoch from conductor.now() - min(b.due_at))::float8 as due_s
from (
    (select j.queue, j.task, 'running' as what, null::timestamptz as due_at from conductor.jobs j
     where j.state = 'running' limit %(bound)s)
    union all
    (select j.queue, j.task, 'suspect', j.run_at from conductor.jobs j
     where j.state = 'suspect' limit %(bound)s)
    union all
    (select j.queue, j.task, 'parked', null from conductor.jobs j
     where j.state = 'parked'
     order by j.queue, j.task, j.key limit %(bound)s)
    union all
    (select j.queue, j.task,
         case when j.state = 'waiting' then 'waiting' when j.attempt > 0 then 'retrying'
             else 'scheduled' end,
         case when j.run_at <= conductor.now() then j.run_at end
     from conductor.jobs j
     where j.state in ('scheduled', 'waiting') order by j.run_at limit %(bound)s)
    union all
    (select h.queue, h.task, 'failed', null from conductor.history h
     where h.outcome = 'failed' and h.finished_at > conductor.now() - interval '1 minute'
     limit %(bound)s)
) b
group by 1, 2, 3

-- name: queue_rows
select q.name as queue, q.paused from conductor.queues q order by q.name limit %(queues)s

-- name: worker_rows
-- The workers that hold a lease. busy: jobs they hold, with those claimed ahead.
select w.id, w.queue, w.app, w.version, w.host, w.pid, w.slots, coalesce(r.busy, 0) as busy,
    w.draining, w.renewals, extract(epoch from clock_timestamp() - w.started_at)::float8 as up_s
from (
    select * from conductor.workers where renewals >= 0 order by queue, id limit %(workers)s
) w
left join (
    select b.worker, count(*) as busy
    from (select j.worker from conductor.jobs j where j.state = 'running' limit %(bound)s) b
    group by 1
) r on r.worker = w.id
order by w.queue, w.id

-- name: slot_rows
-- The router's slots. What only the source's server knows is null where that is another one, and
-- lag_s where this role may not see it.
select p.slot, p.source, p.leader, p.epoch, p.state, p.routed_lsn::text, p.acknowledged_lsn::text,
    extract(epoch from clock_timestamp() - p.updated_at)::float8 as progress_age_s,
    h.here, h.here and s.slot_name is null as missing, s.active, s.wal_status,
    s.safe_wal_size as safe_wal_bytes,
    (h.lsn - s.restart_lsn)::bigint as retained_wal_bytes,
    case when h.lsn is not null then greatest(h.lsn - p.acknowledged_lsn, 0)::bigint end as lag_bytes,
    extract(epoch from r.flush_lag)::float8 as lag_s,
    (select count(*) from (
        select from conductor.gaps g where g.slot = p.slot and g.closed_at is null
        limit %(bound)s) b) as open_gaps,
    (select count(*) from (
        select from conductor.dead_letters d where d.slot = p.slot limit %(bound)s) b) as dead_letters
from (select * from conductor.progress order by slot limit %(slots)s) p
cross join lateral (
    select here, case
        when here and pg_is_in_recovery() then pg_last_wal_replay_lsn()
        when here then pg_current_wal_flush_lsn() end as lsn
    from (
        select p.database = current_database() and p.system_identifier = (
            select c.system_identifier::text from pg_control_system() c) as here
    ) i
) h
left join pg_replication_slots s on h.here and s.slot_name = p.slot
left join pg_stat_replication r on r.pid = s.active_pid
order by p.slot
