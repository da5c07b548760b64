-- What the shop's application, its handlers and its supervisor say to the database.

-- name: create_role
create role shop login replication;

-- name: create_database
create database shop owner shop;

-- name: take_block
-- A block of keys for one writer, so that writers never touch each other's rows.
select nextval('shop.writer');

-- name: add_user
insert into shop.users (id, email, name, tags, bio)
values (%(id)s, %(email)s, %(name)s, %(tags)s, %(bio)s);

-- name: change_email
update shop.users set email = %(email)s where id = %(id)s;

-- name: change_name
update shop.users set name = %(name)s, tags = %(tags)s where id = %(id)s;

-- name: change_bio
update shop.users set bio = %(bio)s where id = %(id)s;

-- name: rewrite_bio
-- Stores the same text anew: a large value that is in the WAL and has not changed.
update shop.users set bio = bio || '' where id = %(id)s;

-- name: touch_user
update shop.users set joined_at = joined_at where id = %(id)s;

-- name: remove_user
delete from shop.users where id = %(id)s;

-- name: add_order
insert into shop.orders (id, user_id, status, total, note)
values (%(id)s, %(user_id)s, 'placed', %(total)s, %(note)s);

-- name: add_items
insert into shop.order_items (order_id, position, sku, quantity, price)
select %(order_id)s, i.position, i.sku, i.quantity, i.price
from unnest(%(positions)s::integer[], %(skus)s::text[], %(quantities)s::integer[], %(prices)s::numeric[])
    i (position, sku, quantity, price);

-- name: change_quantities
update shop.order_items set quantity = quantity + 1 where order_id = %(order_id)s;

-- name: move_items
-- Changes keys: the only updates that carry an old row under the default identity.
update shop.order_items set position = position + 1000 where order_id = %(order_id)s;

-- name: remove_items
delete from shop.order_items where order_id = %(order_id)s and quantity > %(quantity)s;

-- name: advance_order
update shop.orders set status = %(status)s where id = %(id)s;

-- name: annotate_order
update shop.orders set note = %(note)s where id = %(id)s;

-- name: remove_order
delete from shop.orders where id = %(id)s;

-- name: add_payment
insert into shop.payments (id, order_id, amount, captured, details, receipt)
select %(id)s, o.id, o.total, false, %(details)s::jsonb, %(receipt)s
from shop.orders o where o.id = %(order_id)s;

-- name: capture_payment
update shop.payments set captured = not captured, details = details || '{"attempts": 1.10}'
where order_id = %(order_id)s;

-- name: empty_stock
truncate shop.stock_counts;

-- name: load_stock
copy shop.stock_counts (sku, warehouse, shelf, counted, weight_kg, counted_on) from stdin;

-- name: sell_stock
update shop.stock_counts set counted = counted - 1 where sku %% 100 = %(residue)s;

-- name: write_off_stock
delete from shop.stock_counts where sku %% 1000 = %(residue)s;

-- name: expect_call
insert into oracle.calls (task, token) values (%(task)s, %(token)s);

-- name: emit_paid
-- As an application in any language emits: in its own transaction.
select conductor.emit('order.paid', json_build_object('order_id', %(order_id)s::bigint, 'token', %(token)s::text));

-- name: record_deliveries
insert into shop.ledger as l (key, job, task)
select * from unnest(%(keys)s::text[], %(jobs)s::bigint[], %(tasks)s::text[])
on conflict (key) do update set deliveries = l.deliveries + 1;

-- name: is_captured
-- Whether every subscription is stamped: from then on each change and each event gives its jobs.
select count(*) > 0 and count(a.start_lsn) = count(*)
from conductor.subscriptions s
left join conductor.activations a on a.subscription = s.id
where s.retired_at is null;

-- name: close_traffic
-- The last change: once its job is there, so are those of all earlier commits.
insert into shop.users (id, email, name)
values (-nextval('shop.writer'), 'last@example.com', 'last') returning revision;

-- name: is_routed
select exists (
    select from conductor.job j
    where j.task = 'welcome-user' and j.trigger = 'change'
        and j.payload -> 'new' ->> 'revision' = %(revision)s::text);

-- name: count_pending
-- Jobs that are not done. A delayed one counts, too: it is between two attempts.
select count(*) from conductor.jobs;

-- name: read_counts
select (select count(*) from oracle.changes) as changes,
    (select count(*) from conductor.jobs) as pending,
    (select count(*) from shop.ledger) as handled;

-- name: refresh_expected
refresh materialized view oracle.expected;

-- name: refresh_delivered
refresh materialized view oracle.delivered;

-- name: analyze_record
analyze oracle.changes, oracle.calls, shop.ledger, conductor.jobs, conductor.history;

-- name: analyze_views
analyze oracle.expected, oracle.delivered;

-- name: read_verdict
select * from oracle.verdict;
