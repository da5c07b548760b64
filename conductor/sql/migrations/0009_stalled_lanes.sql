-- workers from 0004 go on
-- As before, but a lane that is called for already is not called for again: while nobody works on a
-- queue, its lanes would have one more call each with every look.
create or replace function conductor.call_stalled_lanes() returns bigint
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
    stalled as (
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
        except
        select c.queue, c.task, c.key from conductor.lane_calls c
    ),
    called as (
        insert into conductor.lane_calls (queue, task, key)
        select s.queue, s.task, s.key from stalled s
        returning 1
    )
    select count(*) from called
$$;
