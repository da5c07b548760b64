-- What the scaler may do. Create the role first: create role keda login password '…' connection limit 5;
-- (Usage of the schema lets it emit events as well: docs/postgres says how to take that away.)
grant usage on schema conductor to keda;
grant execute on function conductor.now() to keda;
-- Columns, not tables: what is counted, and no payload of a job.
grant select (state, run_at) on conductor.jobs to keda;
grant select (queue) on conductor.lane_calls to keda;
grant select (task, next_at, payload) on conductor.schedules to keda;
grant select (name) on conductor.tasks to keda;
grant select (job) on conductor.wakeups to keda;
