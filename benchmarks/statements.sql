-- name: is_captured
select count(*) > 0 and count(a.start_lsn) = count(*)
from conductor.subscriptions s
left join conductor.activations a on a.subscription = s.id
where s.kind = 'change' and s.retired_at is null;

-- name: commit_asynchronously
set synchronous_commit = off;

-- name: commit_durably
set synchronous_commit = on;

-- name: fill
call bench.fill(%(transactions)s, %(rows_each)s);

-- name: read_lsn
select pg_current_wal_insert_lsn()::text;

-- name: flush_wal
-- A durable commit: everything before it is on disk, and may be decoded.
insert into bench.accounts (id, owner, balance) values (0, 'nobody', 0)
on conflict (id) do update set balance = bench.accounts.balance + 1;

-- name: drop_slot
select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = %(slot)s;

-- name: create_slot
select lsn::text from pg_create_logical_replication_slot(%(slot)s, 'pgoutput');

-- name: copy_slot
select pg_copy_logical_replication_slot(%(source)s, %(slot)s);

-- name: slot_is_active
select active from pg_replication_slots where slot_name = %(slot)s;

-- name: reset_progress
update conductor.progress
set routed_lsn = %(lsn)s::pg_lsn, acknowledged_lsn = %(lsn)s::pg_lsn
where slot = %(slot)s;

-- name: is_routed
select routed_lsn > %(lsn)s::pg_lsn from conductor.progress where slot = %(slot)s;

-- name: empty_queue
truncate conductor.jobs, conductor.history;

-- name: count_jobs
select count(*) from conductor.jobs;

-- name: is_idle
select not exists (select from conductor.jobs);

-- name: enqueue
insert into conductor.jobs (queue, task, payload)
select 'bench', 'noop', json_build_object('user_id', n, 'email', 'user' || n || '@example.com')
from generate_series(1, %(count)s) n;

-- name: enqueue_two_steps
insert into conductor.jobs (queue, task, payload)
select 'bench', 'two-steps', json_build_object('user_id', n, 'email', 'user' || n || '@example.com')
from generate_series(1, %(count)s) n;

-- name: analyze_jobs
analyze conductor.jobs;

-- name: read_pace
select count(*) / nullif(extract(epoch from max(finished_at) - min(started_at)), 0)::float8
from conductor.history;

-- name: read_latencies
select percentile_cont(0.5) within group (order by (result #>> '{}')::float8),
    percentile_cont(0.99) within group (order by (result #>> '{}')::float8), count(*)
from conductor.history where task = 'late';

-- name: empty_raw
truncate bench.queue;

-- name: enqueue_raw
insert into bench.queue (payload)
select json_build_object('user_id', n, 'email', 'user' || n || '@example.com')
from generate_series(1, %(count)s) n;

-- name: analyze_raw
analyze bench.queue;

-- name: claim_raw
with claimed as (
    select ctid from bench.queue where state = 'ready' order by id limit %(limit)s
    for update skip locked
)
update bench.queue set state = 'running' where ctid = any (array(select ctid from claimed))
returning id, payload;

-- name: delete_raw
delete from bench.queue where id = any (%(ids)s);

-- name: hold_snapshot
select count(*) from conductor.queues;

-- name: create_role
do $$
begin
    if not exists (select from pg_roles where rolname = 'bench') then
        create role bench login replication;
    end if;
end
$$;

-- name: retire
delete from conductor.workers where id = %(worker)s;

-- name: analyze_peer
analyze pgqueuer;

-- name: read_peer_pace
-- From when the first job was picked until the last was logged as done.
select count(*) filter (where status = 'successful')
    / nullif(extract(epoch from max(created) filter (where status = 'successful')
        - min(created) filter (where status = 'picked')), 0)::float8
from pgqueuer_log;
