"""The replication commands and the SQL of a running sidecar.

The other modules named `…_queries` have the rest, and no other module holds SQL. Statements for the
source database come first, those for the queue database after them. Values travel as parameters;
the few places where the grammar wants an identifier or a literal compose them with `psycopg.sql`.
"""

from collections.abc import Sequence
from typing import Final

from psycopg import sql

from cdc.lsn import Lsn

Statement = sql.SQL | sql.Composed
FROM_THE_SLOT: Final = Lsn(0)

# --- the session (every connection that renders values) ---------------------------------------

SESSION_SETTINGS: Final = (
    ("datestyle", "ISO,MDY"),
    ("timezone", "UTC"),
    ("intervalstyle", "postgres"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    ("search_path", "pg_catalog"),
    ("quote_all_identifiers", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_isolation", "read committed"),
)
"""Given at connection time: a database or role may set any of these otherwise."""

WAIT_BRIEFLY_FOR_LOCKS: Final = sql.SQL("set lock_timeout = '3s'")

# --- replication commands ---------------------------------------------------------------------

IDENTIFY_SYSTEM: Final = sql.SQL("IDENTIFY_SYSTEM")


def timeline_history(timeline: int) -> sql.Composed:
    """Ask for the history file of a timeline (there is none for timeline 1)."""
    return sql.SQL("TIMELINE_HISTORY {}").format(sql.SQL(_digits(timeline)))


def create_slot(
    slot: str, plugin: str, *, temporary: bool = False, failover: bool = False
) -> sql.Composed:
    """Create our slot. No snapshot is exported: nobody reads one, and it would hold xmin."""
    kind = sql.SQL("TEMPORARY " if temporary else "")
    options = sql.SQL(", FAILOVER true" if failover else "")  # from PostgreSQL 17
    return sql.SQL("CREATE_REPLICATION_SLOT {} {}LOGICAL {} (SNAPSHOT 'nothing'{})").format(
        sql.Identifier(slot), kind, sql.Identifier(plugin), options
    )


_PROTOCOLS: Final = {
    "off": sql.SQL("proto_version '1'"),
    "on": sql.SQL("proto_version '2', streaming 'on'"),
    "parallel": sql.SQL("proto_version '4', streaming 'parallel'"),
}


def start_replication(
    slot: str, publications: Sequence[str], streaming: str = "off", from_lsn: Lsn = FROM_THE_SLOT
) -> sql.Composed:
    """Start at 0/0: the server begins at the slot's own position, and we skip ourselves.

    `from_lsn`: or there, if the slot stands before it, and everything below was routed.
    """
    names = sql.SQL(",").join(sql.Identifier(name) for name in publications)
    return sql.SQL(
        "START_REPLICATION SLOT {} LOGICAL {} ({}, publication_names {}, messages 'true')"
    ).format(
        sql.Identifier(slot),
        sql.SQL(str(from_lsn)),
        _PROTOCOLS[streaming],
        sql.Literal(names.as_string()),
    )


_WAL2JSON_OPTIONS: Final = (
    ("format-version", "2"),
    ("include-xids", "1"),
    ("include-timestamp", "1"),
    ("include-lsn", "1"),
    ("include-types", "0"),
    ("include-type-oids", "1"),
    ("filter-tables", "conductor.*"),
)
"""Every schema but the queue's own is streamed, and the router chooses: a list of tables would be
fixed for the session, and lose the rows of what begins to be captured, or is partitioned, later."""

WAL2JSON_NUMBERS_AS_TEXT: Final = ("numeric-data-types-as-string", "1")
"""From wal2json 2.6: NaN and the infinities are not lost."""


def start_wal2json(slot: str, *optional: tuple[str, str]) -> sql.Composed:
    """Start at 0/0, with these options besides: the plugin refuses any that it does not know."""
    options = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in (*_WAL2JSON_OPTIONS, *optional)
    )
    return sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 ({})").format(
        sql.Identifier(slot), options
    )


def _digits(number: int) -> str:
    return str(int(number))


# --- source: the server and the slot ----------------------------------------------------------

SERVER: Final = sql.SQL("""
    select current_setting('server_version_num')::int as version_number,
        current_setting('server_version') as version,
        current_setting('wal_level') as wal_level,
        current_setting('max_replication_slots')::int as max_replication_slots,
        (select count(*)::int from pg_replication_slots) as used_replication_slots,
        (select setting::bigint * 1048576 from pg_settings where name = 'max_slot_wal_keep_size')
            as max_slot_wal_keep_bytes,
        current_setting('synchronized_standby_slots', true) as synchronized_standby_slots,
        current_setting('synchronous_standby_names') as synchronous_standby_names,
        (select count(*)::int from pg_replication_slots where slot_type = 'physical')
            as physical_slots,
        pg_is_in_recovery() as in_recovery,
        current_database() as database,
        pg_encoding_to_char(d.encoding) as encoding,
        current_user as role,
        r.rolsuper as is_superuser,
        r.rolreplication or r.rolsuper or exists (  -- RDS gives the right by membership
            select from pg_roles where rolname = 'rds_replication' and pg_has_role(oid, 'member')
        ) as can_replicate,
        has_database_privilege(d.oid, 'create') as can_create,
        pg_has_role('pg_read_all_settings', 'usage') as can_read_settings,
        case when pg_has_role('pg_read_all_settings', 'usage')
            then current_setting('output_plugin_libraries', true) end as output_plugin_libraries
    from pg_database d, pg_roles r
    where d.datname = current_database() and r.rolname = current_user
""")

SLOT_FIELDS: Final = sql.SQL("""
    select s.slot_name, s.plugin, s.slot_type, s.database, s.temporary, s.two_phase, s.active_pid,
        s.restart_lsn::text, s.confirmed_flush_lsn::text, s.wal_status, s.safe_wal_size,
        to_jsonb(s) ->> 'invalidation_reason' as invalidation_reason,
        coalesce((to_jsonb(s) ->> 'failover')::boolean, false) as failover,
        coalesce((
            select a.wait_event = 'WaitForStandbyConfirmation' from pg_stat_activity a
            where a.pid = s.active_pid), false) as waits_for_standbys,
        case when pg_is_in_recovery() then pg_last_wal_receive_lsn() else pg_current_wal_lsn() end
            - s.restart_lsn as retained_bytes
    from pg_replication_slots s
""")

SLOT: Final = sql.SQL("{} where s.slot_name = %(slot)s").format(SLOT_FIELDS)

DROP_SLOT: Final = sql.SQL("select pg_drop_replication_slot(%(slot)s)")

SLOT_STATISTICS: Final = sql.SQL("""
    select spill_txns, spill_bytes, stream_txns, stream_bytes
    from pg_stat_replication_slots where slot_name = %(slot)s
""")

SERVER_LSN: Final = sql.SQL("""
    select (case when pg_is_in_recovery() then pg_last_wal_replay_lsn()
        else pg_current_wal_flush_lsn() end)::text as lsn
""")

BLOCKING_TRANSACTIONS: Final = sql.SQL("""
    select b.pid, a.application_name, a.usename::text as role, a.xact_start::text as since
    from unnest(pg_blocking_pids(%(pid)s)) as b (pid)
    left join pg_stat_activity a on a.pid = b.pid
    order by a.xact_start nulls last, b.pid
""")

# --- source: writers, marks -------------------------------------------------------------------

WRITERS: Final = sql.SQL("""
    select w.oid::bigint as oid, l.virtualtransaction as transaction, l.pid
    from unnest(%(oids)s::bigint[]) as w (oid)
    cross join lateral (
        select w.oid::oid as relid
        union select t.relid::oid from pg_partition_tree(w.oid::oid) t) as r
    join pg_locks l on l.locktype = 'relation' and l.relation = r.relid and l.granted
        and l.database = (select oid from pg_database where datname = current_database())
    where l.mode in (
        'RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
        and l.pid is distinct from pg_backend_pid()
""")
"""Who may have written to a table and has not ended: what CREATE INDEX CONCURRENTLY waits for, but
looked at instead of queued behind (a queued lock would stop later writers)."""

TRANSACTION_ID: Final = sql.SQL("select pg_current_xact_id()::text::bigint as xid")

HORIZON: Final = sql.SQL("""
    select pg_snapshot_xmin(pg_current_snapshot())::text::bigint as xid,
        pg_current_wal_insert_lsn()::text as lsn
""")
"""Every transaction below has ended, with its commit below that position."""

OLDER_TRANSACTIONS: Final = sql.SQL("""
    select l.pid
    from pg_snapshot_xip(pg_current_snapshot()) as x (xid)
    join pg_locks l on l.locktype = 'transactionid' and l.transactionid = x.xid::xid
        and l.mode = 'ExclusiveLock' and l.granted
    where x.xid <= %(xid)s::text::xid8 and l.pid is not null
    order by l.pid
""")
"""Who has written something, and has not ended, of those that began before."""

EMIT_MARK: Final = sql.SQL("""
    select pg_logical_emit_message(true, %(prefix)s, %(content)s)::text as lsn
""")

EMIT_HEARTBEAT: Final = sql.SQL("""
    select (case when not pg_is_in_recovery()
        then pg_logical_emit_message(true, %(prefix)s, '') end)::text as lsn
""")

# --- queue: progress, subscriptions ------------------------------------------------------------

# A row when schema conductor is there, but not for us: what would let us in.
SCHEMA_CLOSED: Final = sql.SQL("""
    select current_user as role, r.rolname as owner, r.rolsuper as is_superuser,
        format('grant %I to %I', r.rolname, current_user) as statement
    from pg_namespace n
    join pg_roles r on r.oid = n.nspowner
    where n.nspname = 'conductor' and not has_schema_privilege(n.oid, 'usage')
""")

BACKEND_PID: Final = sql.SQL("select pg_backend_pid() as pid")

PROGRESS: Final = sql.SQL("""
    select slot, generation, state, epoch, routed_lsn::text, acknowledged_lsn::text, source,
        database, system_identifier, timeline, plugin, marker_nonce::text, leader, emits,
        (options -> 'inserts' ->> 0)::bigint as inserts_oid,
        options -> 'inserts' ->> 1 as inserts_lsn
    from conductor.progress
    where slot = %(slot)s
""")

RIVAL: Final = sql.SQL("""
    select p.slot, p.database
    from conductor.progress p
    left join conductor.progress o on o.slot = %(slot)s
    where p.source = %(source)s and p.slot <> %(slot)s
        and (o.slot is null or (p.created_at, p.slot) < (o.created_at, o.slot))
    order by p.created_at, p.slot
    limit 1
""")
"""The slot that routes a source, when ours is not the oldest that ever did."""

IDLE_SLOTS: Final = sql.SQL("""
    select p.slot, p.updated_at::text as seen_at
    from conductor.progress p
    where p.source = %(source)s and p.slot <> %(slot)s and not exists (
        select from pg_catalog.pg_stat_activity a
        where a.pid = p.sink_pid and a.application_name = left('cdc sink ' || p.slot, 63))
    order by p.slot
""")
"""Other slots of a source from which nobody streams: new subscriptions wait for them too."""

TRY_SLOT_LOCK: Final = sql.SQL("""
    select pg_try_advisory_xact_lock(hashtextextended('conductor.slot:' || %(slot)s, 0)) as locked,
        set_config('idle_in_transaction_session_timeout', '0', true)
""")

INSERT_PROGRESS: Final = sql.SQL("""
    insert into conductor.progress (slot, source, database, plugin, system_identifier, timeline)
    values (%(slot)s, %(source)s, %(database)s, %(plugin)s, %(system_identifier)s, %(timeline)s)
""")

RESTART_PROGRESS: Final = sql.SQL("""
    update conductor.progress
    set state = 'creating', generation = nextval('conductor.generation'), epoch = epoch + 1,
        routed_lsn = '0/0', acknowledged_lsn = '0/0', source = %(source)s,
        database = %(database)s, plugin = %(plugin)s, options = null,
        system_identifier = %(system_identifier)s, timeline = %(timeline)s,
        marker_nonce = gen_random_uuid(), updated_at = clock_timestamp()
    where slot = %(slot)s and generation = %(generation)s
""")

START_PROGRESS: Final = sql.SQL("""
    update conductor.progress
    set state = 'streaming', routed_lsn = %(lsn)s, acknowledged_lsn = %(lsn)s,
        updated_at = clock_timestamp()
    where slot = %(slot)s and state = 'creating'
""")

FOLLOW_TIMELINE: Final = sql.SQL("""
    update conductor.progress set timeline = %(timeline)s, updated_at = clock_timestamp()
    where slot = %(slot)s and generation = %(generation)s
        and timeline is distinct from %(timeline)s
""")

FORGET_ACTIVATIONS: Final = sql.SQL("delete from conductor.activations where slot = %(slot)s")

SUBSCRIPTIONS_REVISION: Final = sql.SQL("""
    select (
        select (count(*), max(s.id), count(s.retired_at),
            sum(hashtextextended(coalesce(s.version, ''), s.id)::numeric))::text
        from conductor.subscriptions s
        where s.kind = 'change' and s.source = %(source)s or s.kind = 'event' and %(emits)s
    ) || (
        select (count(a.start_lsn), count(a.end_lsn))::text from conductor.activations a
        where a.slot = %(slot)s
    ) || (
        select (count(*), max(g.id))::text from conductor.gaps g
        where g.slot = %(slot)s and g.closed_at is null
    ) || coalesce((
        select md5(p.options::text) from conductor.progress p where p.slot = %(slot)s
    ), '') as revision
""")
"""Differs whenever `SUBSCRIPTIONS`, `MEMBERSHIPS` or `INTERRUPTED_TABLES` would: definitions never
change, stamps and retirements are never taken back, versions are hashed."""

SUBSCRIPTIONS: Final = sql.SQL("""
    select s.id, s.app, s.task, s.trigger, s.kind, s.source, s.queue, s.version, s.rank,
        s.definition, s.retired_at is not null as retired,
        a.start_lsn::text as start_lsn, a.end_lsn::text as end_lsn
    from conductor.subscriptions s
    left join conductor.activations a on a.subscription = s.id and a.slot = %(slot)s
    where (s.kind = 'change' and s.source = %(source)s or s.kind = 'event' and %(emits)s)
        and a.end_lsn is null and (a.start_lsn is not null or s.retired_at is null)
    order by s.id
""")
"""What can still match: not what has ended (the stamp is committed with the position), nor what
was retired before it began. What is about events, only for the slot that routes them."""

NAMED_TABLES: Final = sql.SQL("""
    select distinct s.definition ->> 'schema' as schema, s.definition ->> 'table' as name
    from conductor.subscriptions s
    where s.kind = 'change' and s.source = %(source)s
""")
"""Every table that a subscription has ever named, also one that has ended."""

MEMBERSHIPS: Final = sql.SQL("""
    select m ->> 0 as schema, m ->> 1 as name, (m ->> 2)::bigint as membership,
        coalesce((m ->> 3)::boolean, false) as is_insert_only
    from conductor.progress p, json_array_elements(coalesce(p.options -> 'memberships', '[]')) m
    where p.slot = %(slot)s
""")
"""By which row of its catalog the source published each captured table, as last seen."""

APPLIED: Final = sql.SQL("""
    select a ->> 0 as schema, a ->> 1 as name, (a ->> 2)::bigint as membership,
        a ->> 3 as condition
    from conductor.progress p, json_array_elements(coalesce(p.options -> 'applied', '[]')) a
    where p.slot = %(slot)s
""")
"""By which row of its catalog the source has what operators narrow, and with which condition."""

REMEMBER_MEMBERSHIPS: Final = sql.SQL("""
    update conductor.progress
    set options = json_build_object(
        'memberships', %(memberships)s::json, 'applied', %(applied)s::json,
        'inserts', options -> 'inserts')
    where slot = %(slot)s and marker_nonce = %(nonce)s::uuid
""")

NOTE_INSERTS: Final = sql.SQL("""
    update conductor.progress
    set options = json_build_object(
        'memberships', coalesce(options -> 'memberships', '[]'),
        'applied', coalesce(options -> 'applied', '[]'),
        'inserts', json_build_array(%(oid)s::bigint, %(lsn)s::text))
    where slot = %(slot)s and generation = %(generation)s
""")
"""From where on the server can decode with the second publication of that OID."""

NOTE_CARRIED: Final = sql.SQL("""
    update conductor.progress
    set options = json_build_object(
        'memberships', coalesce(options -> 'memberships', '[]'),
        'applied', coalesce(options -> 'applied', '[]'),
        'inserts', json_build_array(%(oid)s::bigint, options -> 'inserts' ->> 1, true))
    where slot = %(slot)s and (options -> 'inserts' ->> 0)::bigint = %(oid)s
        and options -> 'inserts' ->> 2 is null
""")
"""That a stream was started with it: every later one will be."""

CARRIED: Final = sql.SQL("""
    select case when p.plugin <> 'pgoutput' then -1
        when options -> 'inserts' ->> 2 is not null then (options -> 'inserts' ->> 0)::bigint
        end as oid
    from conductor.progress p
    where p.slot = %(slot)s
""")
"""The OID of the second publication that the stream carries; -1: no plugin's stream needs one."""

LISTEN_SUBSCRIPTIONS: Final = sql.SQL("listen conductor_subscriptions")

# --- queue: the sink ---------------------------------------------------------------------------

SINK_SETTINGS: Final = sql.SQL("""
    set synchronous_commit = off;
    set idle_in_transaction_session_timeout = 0;
    set statement_timeout = 0
""")

PREVIOUS_SINK: Final = sql.SQL("""
    select p.sink_pid
    from conductor.progress p
    join pg_catalog.pg_stat_activity a on a.pid = p.sink_pid and a.application_name = %(name)s
    where p.slot = %(slot)s and p.sink_pid <> pg_backend_pid()
""")

TERMINATE_BACKEND: Final = sql.SQL("select pg_terminate_backend(%(pid)s, %(timeout_ms)s)")

# Committed synchronously: what an earlier leader routed is durable with it, so it may be
# acknowledged, and is stored as such before it is.
RAISE_EPOCH: Final = sql.SQL("""
    update conductor.progress
    set epoch = epoch + 1, acknowledged_lsn = greatest(acknowledged_lsn, routed_lsn),
        sink_pid = pg_backend_pid(), leader = %(leader)s, updated_at = clock_timestamp()
    where slot = %(slot)s
    returning generation, epoch, routed_lsn, acknowledged_lsn, marker_nonce::text,
        coalesce(system_identifier = (
            select c.system_identifier::text from pg_control_system() c), false)
""")

BEGIN: Final = sql.SQL("begin; select (extract(epoch from conductor.now()) * 1000000)::bigint")

SAVEPOINT: Final = sql.SQL("savepoint chunk")
ROLLBACK_TO_SAVEPOINT: Final = sql.SQL("rollback to savepoint chunk")
RELEASE_SAVEPOINT: Final = sql.SQL("release savepoint chunk")

INSERT_DEAD_LETTERS: Final = sql.SQL("""
    insert into conductor.dead_letters (
        slot, generation, commit_lsn, committed_at, ordinal, subscription, relation, error, raw)
    select %(slot)s, %(generation)s, l.commit_lsn,
        timestamptz 'epoch' + nullif(l.commit_time_us, 0) * interval '1 microsecond',
        l.ordinal, l.subscription, l.relation, l.error, l.raw
    from unnest(%(commit_lsns)s::pg_lsn[], %(commit_times_us)s::bigint[], %(ordinals)s::bigint[],
        %(subscriptions)s::bigint[], %(relations)s::text[]::json[], %(errors)s::text[],
        %(raws)s::bytea[])
        as l (commit_lsn, commit_time_us, ordinal, subscription, relation, error, raw)
""")

STAMP_START: Final = sql.SQL("""
    insert into conductor.activations as a (subscription, slot, start_lsn)
    select s.id, %(slot)s, %(lsn)s::pg_lsn from conductor.subscriptions s where s.id = any(%(ids)s)
    on conflict on constraint activations_pkey do update set start_lsn = excluded.start_lsn
    where a.start_lsn is null
""")

STAMP_END: Final = sql.SQL("""
    insert into conductor.activations as a (subscription, slot, end_lsn)
    select s.id, %(slot)s, %(lsn)s::pg_lsn from conductor.subscriptions s where s.id = any(%(ids)s)
    on conflict on constraint activations_pkey do update set end_lsn = excluded.end_lsn
    where a.end_lsn is null
""")

# The last statement of every sink transaction, a compare-and-swap: a leader that was paused, or an
# asynchronously committed tail that was lost, finds another epoch or position and writes nothing.
FENCE: Final = sql.SQL("""
    update conductor.progress
    set routed_lsn = %(to)s::pg_lsn, updated_at = clock_timestamp(),
        acknowledged_lsn = case when %(durable)s then greatest(acknowledged_lsn, %(to)s::pg_lsn)
            else acknowledged_lsn end
    where slot = %(slot)s and epoch = %(epoch)s and routed_lsn = %(from)s::pg_lsn
""")

BEGIN_DURABLE: Final = sql.SQL("begin; set local synchronous_commit = on")
COMMIT: Final = sql.SQL("commit")
COMMIT_DURABLY: Final = sql.SQL("set local synchronous_commit = on; commit")

# Its commit makes every earlier one of this session durable too.
PERSIST_ACKNOWLEDGED: Final = sql.SQL("""
    update conductor.progress
    set acknowledged_lsn = greatest(acknowledged_lsn, %(acknowledged)s::pg_lsn),
        updated_at = clock_timestamp()
    where slot = %(slot)s and epoch = %(epoch)s and routed_lsn = %(routed)s::pg_lsn
""")

WAKE: Final = sql.SQL("select conductor.wake(%(jobs)s::bigint[])")

HINT: Final = sql.SQL("select pg_notify('conductor_jobs', q) from unnest(%(queues)s::text[]) q")
