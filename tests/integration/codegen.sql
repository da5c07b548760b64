-- A schema for generated row models: every kind of type, odd names.

create schema shop;
create schema "Odd ""schema""";
create type shop.mood as enum ('sad', 'it''s "fine"', '', '2nd', 'in progress', 'In Progress');
comment on type shop.mood is 'How it feels.';
create type shop.pair as (a int4, "class" text, data jsonb);
create type shop.nested as (pair shop.pair, pairs shop.pair[], moods shop.mood[], span int4range,
    at timestamptz, total numeric, photo bytea, yes bool, shop shop.mood);
create type shop.floats as range (subtype = float8, multirange_type_name = shop.many_floats);
create domain shop.cents as int8;
create domain shop.price as numeric(12, 2);
create domain shop.tags as text[];
create domain shop.small_cents as shop.cents not null check (value < 1000);
create domain shop.feeling as shop.mood;
create domain shop.data as jsonb;
create table shop.users (
    id bigint generated always as identity primary key,
    email text not null,
    bio text,
    size bigint generated always as (length(email)) stored
);
comment on table shop.users is E'People who "buy".\n\n  Since \\ 2026, """always"""';
comment on column shop.users.email is 'Where to write to: "x"';
create table shop.odd_names (
    "class" text, "Odd name" int primary key, odd_name int, "from" int, json json, dict text,
    model_config text, model_name text, register int, _id int, id int, "2fa" bool, int int,
    "Date" date, "TableRow" int, "a""b'c" int, "größe" numeric, "ﬁ" int, self int, "%s" int,
    "a very long name of a column that goes on for many characters!" shop.nested[],
    a_very_long_name_of_a_column_that_goes_on_for_many_characters shop.nested[] not null
);
create table "Odd ""schema"""."Odd table" (id int primary key, "user" shop.users);
create table "Odd ""schema"""."Odd-table" (id int primary key);
create table "Odd ""schema""".empty ();
create view shop.user_emails as select email from shop.users;
create materialized view shop.user_count as select count(*) from shop.users;
create table shop.parted (id int primary key, at date not null default now()) partition by range (id);
create table shop.parted_1 partition of shop.parted for values from (0) to (10);
