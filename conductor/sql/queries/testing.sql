-- Databases of tests, and time travel: what is to come is moved nearer.

-- name: move_jobs
update conductor.jobs set run_at = run_at - %(by)s::interval
where state in ('scheduled', 'waiting') and run_at < 'infinity'

-- name: move_steps
update conductor.steps set wake_at = wake_at - %(by)s::interval where wake_at is not null

-- name: move_schedules
update conductor.schedules set next_at = next_at - %(by)s::interval

-- name: move_dedupe_keys
update conductor.dedupe_keys set expires_at = expires_at - %(by)s::interval

-- name: create_database
create database {database}

-- name: drop_database
drop database {database} with (force)
