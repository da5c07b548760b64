-- A job that may be claimed has a time that every client can read. What lies beyond (infinity, BC, the
-- year 10000) came in by hand, and broke each claim that met it. What waits may wait for ever.

update conductor.jobs
set run_at = case
        when run_at = 'infinity' and state in ('scheduled', 'waiting') then run_at
        when run_at > '0001-01-02 00:00+00' and run_at < '9999-12-31 00:00+00' then run_at
        else conductor.now() end,
    created_at = case
        when created_at > '0001-01-02 00:00+00' and created_at < '9999-12-31 00:00+00' then created_at
        else pg_catalog.statement_timestamp() end
where not (run_at > '0001-01-02 00:00+00' and run_at < '9999-12-31 00:00+00')
    or not (created_at > '0001-01-02 00:00+00' and created_at < '9999-12-31 00:00+00');

alter table conductor.jobs
    add constraint jobs_run_at check (
        run_at > '0001-01-02 00:00+00'
        and (run_at < '9999-12-31 00:00+00' or run_at = 'infinity' and state in ('scheduled', 'waiting'))),
    add constraint jobs_created_at check (
        created_at > '0001-01-02 00:00+00' and created_at < '9999-12-31 00:00+00');
