-- The shop's own tables. Every write stamps its row with a fresh `revision`, so that whoever sees a
-- row (the router, a handler, the oracle) can name the very write it comes from.

create schema shop;

create sequence shop.revision;
create sequence shop.writer;            -- each writer of the traffic generator takes its keys from a block

create function shop.stamp() returns trigger
    language plpgsql
as $$
begin
    new.revision := nextval('shop.revision');
    return new;
end
$$;

create table shop.users (
    id bigint primary key,
    email text not null,
    name text not null,
    tags text[] not null default '{}',
    bio text,                           -- large, and stored out of line as it is
    joined_at timestamptz not null default now(),
    revision bigint not null
);
alter table shop.users alter column bio set storage external;
alter table shop.users replica identity full;

create table shop.orders (
    id bigint primary key,
    user_id bigint not null references shop.users on delete cascade,
    status text not null,
    total numeric(12, 2) not null,
    note text,                          -- large at times; compressed, then stored out of line
    placed_at timestamptz not null default now(),
    revision bigint not null
);
create index orders_user on shop.orders (user_id);
alter table shop.orders replica identity full;

-- The tables below keep the default identity: their updates carry no old row, their deletes the key.
create table shop.order_items (
    order_id bigint not null references shop.orders on delete cascade,
    position integer not null,
    sku text not null,
    quantity integer not null,
    price numeric(10, 2) not null,
    revision bigint not null,
    primary key (order_id, position)
);

create table shop.payments (
    id uuid primary key,
    order_id bigint not null references shop.orders on delete cascade,
    amount numeric(12, 2) not null,
    captured boolean not null,
    details jsonb not null,
    receipt text not null,              -- large; later updates do not touch it
    revision bigint not null
);
create index payments_order on shop.payments (order_id);

-- Counted stock: emptied and loaded as a whole.
create table shop.stock_counts (
    sku bigint primary key,
    warehouse text not null,
    shelf text not null,
    counted integer not null,
    weight_kg double precision not null,
    counted_on date not null,
    revision bigint not null
);

create trigger stamp before insert or update on shop.users for each row execute function shop.stamp();
create trigger stamp before insert or update on shop.orders for each row execute function shop.stamp();
create trigger stamp before insert or update on shop.order_items for each row execute function shop.stamp();
create trigger stamp before insert or update on shop.payments for each row execute function shop.stamp();
create trigger stamp before insert or update on shop.stock_counts for each row execute function shop.stamp();

-- What the handlers have done: one row for each job, whatever number of times it was delivered.
create table shop.ledger (
    key text primary key,               -- the job's idempotency key
    job bigint not null,
    task text not null,
    deliveries integer not null default 1,
    handled_at timestamptz not null default now()
);
