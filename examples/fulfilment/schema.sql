-- The tables of the example. Stock is counted and parcels are booked by the workflow itself.

create table orders (
    id bigint primary key,
    item text not null,
    quantity integer not null,
    placed_at timestamptz not null default now()
);

create table payments (
    id bigint generated always as identity primary key,
    order_id bigint not null,
    amount integer not null
);

create table stock (item text primary key, units_left integer not null);

-- What the workflow did, one row an effect: it must be there once an order.
create table reservations (order_id bigint not null, item text not null, quantity integer not null);
create table parcels (order_id bigint not null, weight_g integer not null);
create table mails (order_id bigint not null, text text not null);
