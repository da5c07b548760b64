-- The oracle: what was committed, written by triggers in the very transaction that changed the rows,
-- so that rolled-back work leaves nothing here by construction. Its tables are not published.
--
-- `oracle.expected` derives from it, by rules of its own, the jobs that must exist;
-- `oracle.delivered` is the queue's own record. Both name a job by (task, token, nth), and
-- `oracle.verdict` compares them job by job, with the content of every payload.

create schema oracle;

-- the witness -------------------------------------------------------------------------------------

create table oracle.changes (
    id bigint generated always as identity,
    xid xid8 not null default pg_current_xact_id(),
    recorded_at timestamptz not null default clock_timestamp(),
    relation text not null,
    operation text not null,
    old jsonb,
    new jsonb,
    changed text[]                      -- columns that differ, of an update
);

create table oracle.calls (             -- invocations and events of committed transactions
    id bigint generated always as identity,
    task text not null,
    token text not null
);

-- A row as a payload shows it: numeric columns (named in the trigger) as text.
create function oracle.image(image jsonb, numeric_columns text[]) returns jsonb
    language plpgsql immutable
as $$
declare
    name text;
begin
    foreach name in array coalesce(numeric_columns, '{}') loop
        image := image || jsonb_build_object(name, image ->> name);
    end loop;
    return image;
end
$$;

create function oracle.record() returns trigger
    language plpgsql
    set timezone = 'UTC'
as $$
declare
    before jsonb;
    after jsonb;
    differing text[];
begin
    if tg_op in ('UPDATE', 'DELETE') then
        before := oracle.image(to_jsonb(old), tg_argv);
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        after := oracle.image(to_jsonb(new), tg_argv);
    end if;
    if tg_op = 'UPDATE' then
        differing := array(
            select a.key from jsonb_each(after) a
            where a.value is distinct from before -> a.key order by a.key collate "C");
    end if;
    insert into oracle.changes (relation, operation, old, new, changed)
    values (tg_table_name, lower(tg_op), before, after, differing);
    return null;
end
$$;

create trigger oracle after insert or update or delete on shop.users
    for each row execute function oracle.record();
create trigger oracle after insert or update or delete on shop.orders
    for each row execute function oracle.record('total');
create trigger oracle after insert or update or delete on shop.order_items
    for each row execute function oracle.record('price');
create trigger oracle after insert or update or delete on shop.payments
    for each row execute function oracle.record('amount');
create trigger oracle after insert or update or delete on shop.stock_counts
    for each row execute function oracle.record();
create trigger oracle_truncate after truncate on shop.stock_counts
    for each statement execute function oracle.record();

-- the rules ---------------------------------------------------------------------------------------

create table oracle.relations (
    relation text primary key,
    key text[] not null,
    full_identity boolean not null
);
insert into oracle.relations values
    ('users', '{id}', true),
    ('orders', '{id}', true),
    ('order_items', '{order_id,position}', false),
    ('payments', '{id}', false),
    ('stock_counts', '{sku}', false);

-- The subscriptions of tasks.py, said once more and independently.
create table oracle.rules (
    task text not null,
    relation text not null references oracle.relations,
    operations text[] not null,
    columns text[],                     -- null: all
    changed text[]                      -- null: any
);
insert into oracle.rules values
    ('welcome-user', 'users', '{insert}', '{id,email,name,revision}', null),
    ('confirm-email', 'users', '{update}', '{id,email,revision}', '{email}'),
    ('index-profile', 'users', '{update}', null, '{bio,name,tags}'),
    ('forget-user', 'users', '{delete}', null, null),
    ('follow-order', 'orders', '{insert,update,delete}', null, null),
    ('ship-order', 'orders', '{update}', '{id,status,revision}', '{status}'),
    ('reserve-item', 'order_items', '{insert,update,delete}', null, null),
    ('settle-payment', 'payments', '{insert,update}', null, null),
    ('settle-payment', 'orders', '{delete}', '{id,total,revision}', null),
    ('track-stock', 'stock_counts', '{insert,update,delete,truncate}', '{sku,counted,revision}', null);

-- expectation -------------------------------------------------------------------------------------

create function oracle.project(image jsonb, columns text[]) returns jsonb
    language sql immutable
as $$
    select case when image is null or columns is null then image else
        (select jsonb_object_agg(c.name, image -> c.name)
         from unnest(columns) c (name) where image ? c.name) end
$$;

-- The write a row image comes from. A delete under the default identity shows the key alone; a
-- truncate shows no row, and is named by its transaction.
create function oracle.token(operation text, image jsonb, key text[], xid xid8) returns text
    language sql immutable
as $$
    select case
        when operation = 'truncate' then 'transaction ' || coalesce(xid::text, 'unknown')
        when image ? 'revision' then operation || ' of revision ' || (image ->> 'revision')
        else operation || ' of key ' || oracle.project(image, key)::text end
$$;

create materialized view oracle.expected as
select e.task, e.token,
    row_number() over (partition by e.task, e.token order by e.change) as nth,
    e.change, e.xid, e.relation, e.operation
from (
    select r.task, c.id as change, c.xid, c.relation, c.operation,
        oracle.token(c.operation,
            case when c.operation = 'delete' and not i.full_identity then oracle.project(c.old, i.key)
                else coalesce(c.new, c.old) end,
            i.key, c.xid) as token
    from oracle.changes c
    join oracle.rules r on r.relation = c.relation and c.operation = any (r.operations)
        and (c.operation <> 'update' or r.changed is null or r.changed && c.changed)
    join oracle.relations i on i.relation = c.relation
    union all
    select k.task, k.id, null, null, 'call', 'token ' || k.token from oracle.calls k
) e
with no data;

-- the queue's record --------------------------------------------------------------------------------

create materialized view oracle.delivered as
with jobs as materialized (
    select j.id, j.task, j.trigger, j.state, j.created_at, j.source_lsn, j.source_ordinal, j.subscription,
        j.payload::jsonb as payload
    from conductor.job j
    where j.queue <> 'conductor.internal'   -- nor a firing that is under way just now
        and not (j.trigger = 'cron' and j.state in ('ready', 'running'))
), transactions as materialized (       -- which transaction committed there: told by a row it wrote
    select j.source_lsn, max(c.xid) as xid
    from jobs j
    join oracle.changes c on (c.new ->> 'revision') = (j.payload -> 'new' ->> 'revision')
    where j.trigger = 'change'
    group by j.source_lsn
), named as (
    select j.*, t.xid, coalesce(j.payload -> 'new', j.payload -> 'old') as image,
        j.payload ->> 'op' as operation, j.payload ->> 'table' as relation
    from jobs j
    left join transactions t on t.source_lsn = j.source_lsn
), tokens as (
    select n.*, case n.trigger
        when 'change' then oracle.token(n.operation, n.image, i.key, n.xid)
        when 'cron' then 'instant ' || (n.payload ->> 'scheduled_at')
        when 'event' then 'token ' || (n.payload -> 'payload' ->> 'token')
        else 'token ' || (n.payload ->> 'token') end as token
    from named n
    left join oracle.relations i on i.relation = n.relation
)
select t.task, t.token,
    row_number() over (partition by t.task, t.token order by t.source_lsn, t.source_ordinal, t.id) as nth,
    t.id as job, t.trigger, t.state, t.created_at, t.source_lsn, t.source_ordinal, t.xid, t.relation,
    t.operation, t.payload
from tokens t
with no data;

-- comparison ----------------------------------------------------------------------------------------

create view oracle.lost as
select e.* from oracle.expected e
where not exists (
    select from oracle.delivered d where (d.task, d.token, d.nth) = (e.task, e.token, e.nth));

-- A job too many: a second one of the same write, one of rolled-back work, one that no rule asks for.
-- A firing has no witness but its instant: there may be one.
create view oracle.duplicated as
select d.* from oracle.delivered d
where case when d.trigger = 'cron' then d.nth > 1 else not exists (
    select from oracle.expected e where (e.task, e.token, e.nth) = (d.task, d.token, d.nth)) end;

-- A job whose payload does not say what its change was, and in what.
create view oracle.wrong as
select p.job, p.task, p.relation, p.operation, p.change, p.payload, p.old, p.new, p.changed,
    array_remove(array[
        case when p.payload -> 'new' is distinct from
            oracle.project(p.new, p.columns) - p.unchanged then 'new' end,
        case when p.payload -> 'old' is distinct from p.visible_old then 'old' end,
        case when p.visible_changed is distinct from p.payload_changed then 'changed' end,
        case when exists (              -- only a large value that did not change may be left out
            select from unnest(p.unchanged) u (name)
            where p.full_identity or p.operation <> 'update' or length(p.new ->> u.name) < 1000
                or p.new -> u.name is distinct from p.old -> u.name) then 'unchanged' end,
        case when p.payload ->> 'schema' is distinct from 'shop' then 'schema' end,
        case when p.operation = 'truncate'
            and not p.payload @> '{"cascade": false, "restart_identity": false}' then 'flags' end,
        case when (p.payload ->> 'commit_lsn')::pg_lsn is distinct from p.source_lsn then 'commit_lsn' end,
        case when not coalesce((p.payload ->> 'commit_time')::timestamptz
            between p.recorded_at and p.created_at, false) then 'commit_time' end
    ], null) as aspects
from (
    select d.job, d.task, d.relation, d.operation, d.payload, d.source_lsn, d.created_at, c.id as change,
        c.old, c.new, c.changed, c.recorded_at, r.columns, i.full_identity,
        array(select jsonb_array_elements_text(coalesce(d.payload -> 'unchanged', '[]'))) as unchanged,
        case when c.operation = 'update' and i.full_identity then c.changed end as visible_changed,
        case when d.payload ? 'changed' then array(
            select v collate "C" from jsonb_array_elements_text(d.payload -> 'changed') v order by 1)
            end as payload_changed,
        case when i.full_identity then oracle.project(c.old, r.columns)
            when c.operation = 'delete' or i.key && c.changed
            then oracle.project(oracle.project(c.old, i.key), r.columns) end as visible_old
    from oracle.expected e
    join oracle.delivered d using (task, token, nth)
    join oracle.changes c on c.id = e.change
    join oracle.rules r on r.task = e.task and r.relation = e.relation
    join oracle.relations i on i.relation = e.relation
    where e.operation <> 'call'
) p;

-- Commits that were torn apart or glued together: one transaction, one position.
create view oracle.misframed as
with pairs as (
    select distinct e.xid, d.source_lsn
    from oracle.expected e join oracle.delivered d using (task, token, nth)
    where e.operation not in ('call', 'delete')
)
select count(*) over (partition by p.xid) as positions,
    count(*) over (partition by p.source_lsn) as transactions, p.xid, p.source_lsn
from pairs p;

-- Jobs of one row that do not follow its writes in (commit, place in the transaction).
create view oracle.misordered as
select o.* from (
    select d.job, d.task, (d.payload -> 'new' ->> 'revision')::bigint as revision,
        lag((d.payload -> 'new' ->> 'revision')::bigint) over (
            partition by d.task, d.relation, oracle.project(d.payload -> 'new', i.key)
            order by d.source_lsn, d.source_ordinal) as revision_before
    from oracle.delivered d join oracle.relations i on i.relation = d.relation
    where d.operation in ('insert', 'update')
) o
where o.revision < o.revision_before;

-- Handled: ended well, and its row is in the ledger under its own key.
create view oracle.unhandled as
select d.job, d.task, d.trigger, d.state, d.payload from oracle.delivered d
where d.state <> 'completed'
    or not exists (select from shop.ledger l where l.job = d.job and l.task = d.task);

create view oracle.verdict as
select (select count(*) from oracle.changes) as changes,
    (select count(*) from oracle.delivered) as jobs,
    (select count(*) from oracle.delivered) - (select count(*) from oracle.unhandled) as handled,
    (select count(*) from oracle.lost) as lost,
    (select count(*) from oracle.duplicated) as duplicated,
    (select count(*) from oracle.wrong where aspects <> '{}') as wrong,
    (select count(*) from oracle.misframed where positions > 1 or transactions > 1) as misframed,
    (select count(*) from oracle.misordered) as misordered,
    (select count(*) from oracle.unhandled) as unhandled,
    (select count(*) from shop.ledger l where not exists (
        select from oracle.delivered d where d.job = l.job and d.task = l.task)) as stray,
    (select coalesce(sum(deliveries - 1), 0) from shop.ledger)::bigint as redelivered;
