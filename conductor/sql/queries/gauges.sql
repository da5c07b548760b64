-- The gauges of the whole queue that nobody else asks for, and whose duty it is to read them.

-- name: take_duty
-- Takes or keeps a duty; a row is returned to its holder. It is free when nobody has renewed it in
-- time, and goes at once to whoever comes before its holder.
insert into conductor.duties as d (name, holder, precedence, expires_at)
values (%(name)s, %(holder)s, %(precedence)s,
    conductor.now() + make_interval(secs => %(seconds)s))
on conflict (name) do update
    set holder = excluded.holder, precedence = excluded.precedence, expires_at = excluded.expires_at
    where d.holder = excluded.holder or d.precedence < excluded.precedence
        or d.expires_at <= conductor.now()
returning true

-- name: give_up_duty
delete from conductor.duties where name = %(name)s and holder = %(holder)s

-- name: open_gaps
-- By slot and condition; every slot of the router has a row.
select p.slot, g.condition, count(g.id)
from conductor.progress p
left join conductor.gaps g on g.slot = p.slot and g.closed_at is null
group by 1, 2

-- name: count_dead_letters
-- Bounded: a count of %(bound)s means that many or more. Every slot of the router has a row.
select p.slot, c.letters
from conductor.progress p
cross join lateral (
    select count(*) as letters from (
        select from conductor.dead_letters d where d.slot = p.slot limit %(bound)s
    ) b
) c
