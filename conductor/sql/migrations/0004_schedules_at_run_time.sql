-- Schedules that jobs and clients make while an application runs. They are nobody's registration:
-- app is empty, a name is unique in its task.
alter table conductor.schedules
    add column payload json,            -- what their jobs get; null: the schedule of a task's own trigger
    add column metadata json,
    add column is_planned boolean not null default true;    -- false: next_at is no instant of it, only where to look from
