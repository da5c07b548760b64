-- workers from 0004 go on
-- Coalescing: a job that has not begun may take in later changes of its row.

alter table conductor.jobs add column coalescing boolean;   -- true: it stands for all changes of its key until it begins

create index jobs_coalescing on conductor.jobs (subscription, key) where coalescing and fence = 0;
