"""What the sink says to the queue database."""

from typing import Final

from psycopg.sql import SQL, Identifier

from conductor.contract import COPY_COLUMNS

SINK_SETTINGS: Final = SQL("""
set synchronous_commit = off;
set idle_in_transaction_session_timeout = 0;
set statement_timeout = 0
""")

PREVIOUS_SINK: Final = SQL("""
select p.sink_pid
from conductor.progress p
join pg_catalog.pg_stat_activity a on a.pid = p.sink_pid and a.application_name = %(name)s
where p.slot = %(slot)s and p.sink_pid <> pg_backend_pid()
""")

TERMINATE_BACKEND: Final = SQL("select pg_terminate_backend(%(pid)s, %(timeout_ms)s)")

# Committed synchronously: what an earlier leader routed is durable with it, so it may be
# acknowledged, and is stored as such before it is.
RAISE_EPOCH: Final = SQL("""
update conductor.progress
set epoch = epoch + 1, acknowledged_lsn = greatest(acknowledged_lsn, routed_lsn),
    sink_pid = pg_backend_pid(), leader = %(leader)s, updated_at = clock_timestamp()
where slot = %(slot)s
returning generation, epoch, routed_lsn, acknowledged_lsn, marker_nonce::text
""")

BEGIN: Final = SQL("begin; select (extract(epoch from conductor.now()) * 1000000)::bigint")

COPY_JOBS: Final = SQL("copy conductor.jobs ({}) from stdin (format binary)").format(
    SQL(", ").join(map(Identifier, COPY_COLUMNS))
)

SAVEPOINT: Final = SQL("savepoint chunk")
ROLLBACK_TO_SAVEPOINT: Final = SQL("rollback to savepoint chunk")
RELEASE_SAVEPOINT: Final = SQL("release savepoint chunk")

INSERT_DEAD_LETTERS: Final = SQL("""
insert into conductor.dead_letters (
    slot, generation, commit_lsn, ordinal, subscription, relation, error, raw)
select %(slot)s, %(generation)s, l.commit_lsn, l.ordinal, l.subscription, l.relation, l.error, l.raw
from unnest(%(commit_lsns)s::pg_lsn[], %(ordinals)s::bigint[], %(subscriptions)s::bigint[],
    %(relations)s::text[]::json[], %(errors)s::text[], %(raws)s::bytea[])
    as l (commit_lsn, ordinal, subscription, relation, error, raw)
""")

STAMP_START: Final = SQL("""
insert into conductor.activations as a (subscription, slot, start_lsn)
select s.id, %(slot)s, %(lsn)s::pg_lsn from conductor.subscriptions s where s.id = any(%(ids)s)
on conflict on constraint activations_pkey do update set start_lsn = excluded.start_lsn
where a.start_lsn is null
""")

STAMP_END: Final = SQL("""
insert into conductor.activations as a (subscription, slot, end_lsn)
select s.id, %(slot)s, %(lsn)s::pg_lsn from conductor.subscriptions s where s.id = any(%(ids)s)
on conflict on constraint activations_pkey do update set end_lsn = excluded.end_lsn
where a.end_lsn is null
""")

# The last statement of every sink transaction, a compare-and-swap: a leader that was paused, or an
# asynchronously committed tail that was lost, finds another epoch or position and writes nothing.
FENCE: Final = SQL("""
update conductor.progress
set routed_lsn = %(to)s::pg_lsn, updated_at = clock_timestamp(),
    acknowledged_lsn = case when %(durable)s then greatest(acknowledged_lsn, %(to)s::pg_lsn)
        else acknowledged_lsn end
where slot = %(slot)s and epoch = %(epoch)s and routed_lsn = %(from)s::pg_lsn
""")

BEGIN_DURABLE: Final = SQL("begin; set local synchronous_commit = on")
COMMIT: Final = SQL("commit")
COMMIT_DURABLY: Final = SQL("set local synchronous_commit = on; commit")

# Its commit makes every earlier one of this session durable too.
PERSIST_ACKNOWLEDGED: Final = SQL("""
update conductor.progress
set acknowledged_lsn = greatest(acknowledged_lsn, %(acknowledged)s::pg_lsn),
    updated_at = clock_timestamp()
where slot = %(slot)s and epoch = %(epoch)s and routed_lsn = %(routed)s::pg_lsn
""")

HINT: Final = SQL("select pg_notify('conductor_jobs', q) from unnest(%(queues)s::text[]) q")
