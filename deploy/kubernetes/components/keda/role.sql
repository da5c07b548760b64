-- What the scaler may do. Create the role first: create role keda login password '…' connection limit 5;
grant usage on schema conductor to keda;
grant execute on function conductor.now() to keda;
grant select on conductor.jobs, conductor.lane_calls, conductor.schedules,
    conductor.tasks, conductor.wakeups to keda;
