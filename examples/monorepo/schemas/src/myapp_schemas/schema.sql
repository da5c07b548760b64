-- The application's tables; database_types.py is generated from them.

create table users (
    id uuid primary key default gen_random_uuid(),
    email text not null unique,
    name text,
    created_at timestamptz not null default now()
);
comment on table users is 'Everybody who has signed up.';

-- Who was greeted, and why: rows that the worker writes.
create table greetings (
    id bigint generated always as identity primary key,
    email text not null,
    reason text not null
);
