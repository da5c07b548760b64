-- What the benchmarks write to.

create schema bench;

create table bench.rows (
    id bigint generated always as identity primary key,
    customer bigint not null,
    status text not null,
    amount numeric(10, 2) not null,
    note text,
    active boolean not null,
    created_at timestamptz not null default now()
);

create table bench.accounts (
    id integer primary key,
    owner text not null,
    balance bigint not null,
    updated_at timestamptz not null default now()
);
insert into bench.accounts select n, 'owner ' || n, 0 from generate_series(1, 10000) n;

-- The least that a queue in a table can be.
create table bench.queue (
    id bigint generated always as identity primary key,
    state text not null default 'ready',
    payload json not null
);
create index queue_ready on bench.queue (id) where state = 'ready';

-- So many transactions of so many rows.
create procedure bench.fill(transactions integer, rows_each integer)
    language plpgsql
as $$
begin
    for number in 1 .. transactions loop
        insert into bench.rows (customer, status, amount, note, active)
        select n, 'placed', n + 0.25, 'a note of some length', n % 2 = 0
        from generate_series(1, rows_each) n;
        commit;
    end loop;
end
$$;
