"""Events emitted through the WAL: routed in commit order, once, by the slot that owns them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql
from pydantic import BaseModel

from cdc.letters import redrive_letters
from cdc.metrics import Metrics
from conductor import (
    Conductor,
    Context,
    Emitted,
    OnEvent,
    Orchestrator,
    SyncConductor,
    define_event,
    define_task,
)
from conductor.errors import EmitRefused, JobFailed
from conductor.migrations import migrate
from tests.integration.conftest import Queue
from tests.integration.sidecar import (
    captured,
    cdc,
    drop_slot,
    eventually,
    query,
    running,
    settings_for,
    slot_row,
    subscribe,
    value,
)
from tests.servers import NewDatabase, ScratchDatabase, StartServer

pytestmark = pytest.mark.anyio

POSTGRES: Final = Path(__file__).resolve().parents[2] / "deploy" / "postgres"
EMIT: Final = "select conductor.emit(%s, %s, via => 'wal')"

KEEP_MESSAGES: Final = """
    do $$
    declare
        emit regprocedure;
    begin
        for emit in select oid from pg_proc where proname = 'pg_logical_emit_message' loop
            execute format('revoke execute on function %s from public', emit);
        end loop;
    end
    $$
"""


class Paid(BaseModel):
    order: int
    amount: int = 0


paid = define_event("order.paid", payload=Paid)
wait = define_task("wait", payload=int, returns=Any)


def on_event(dsn: str, event: str, *, task: str = "told", when: str | None = None) -> int:
    """Store a subscription to an event as registration does; return its id."""
    subscription = value(
        dsn,
        "insert into conductor.subscriptions (app, task, trigger, kind, queue, definition)"
        " values ('test', %s, %s, 'event', 'default', %s) returning id",
        task,
        f"event:{event}",
        json.dumps({"event": event, "when": when}),
    )
    query(dsn, "select pg_notify('conductor_subscriptions', '')")
    return int(subscription)


def jobs(database: ScratchDatabase) -> list[dict[str, Any]]:
    """The jobs in the order in which they were routed."""
    return query(
        database.dsn,
        "select task, trigger::text, payload::text, metadata, source_ordinal, source_lsn::text"
        " from conductor.jobs order by id",
    )


def letters(database: ScratchDatabase) -> list[dict[str, Any]]:
    return query(database.dsn, "select * from conductor.dead_letters order by id")


def user_of(dsn: str) -> str:
    with psycopg.connect(dsn) as connection:
        return connection.info.user


def refusal(dsn: str, statement: str, *parameters: Any) -> str:
    with pytest.raises(psycopg.Error) as refused:
        query(dsn, statement, *parameters)
    return str(refused.value)


def emitted(metrics: Metrics) -> dict[str, float]:
    samples = [s for family in metrics.registry.collect() for s in family.samples]
    return {s.labels["result"]: s.value for s in samples if s.name == "cdc_emitted_events_total"}


def leads(database: ScratchDatabase, slot: str) -> bool:
    active = "select active_pid from pg_replication_slots where slot_name = %s"
    return value(database.admin_dsn, active, slot) is not None


async def test_events_and_changes_of_a_transaction_are_routed_in_its_order(
    migrated: ScratchDatabase,
) -> None:
    query(migrated.dsn, "create table item (id int primary key)")
    metrics = Metrics("test", migrated.name)
    async with running(migrated, metrics=metrics):
        await captured(migrated, subscribe(migrated.dsn, "public.item", ["insert"], task="seen"))
        await captured(migrated, on_event(migrated.dsn, "order.paid"))
        with psycopg.connect(migrated.dsn) as connection:
            for number in (1, 2):
                connection.execute(EMIT, ("order.paid", f'{{"n": {number}.10}}'))
                connection.execute("insert into item values (%s)", (number,))
            connection.execute(EMIT, ("nobody.listens", "null"))
            assert connection.execute("select count(*) from conductor.jobs").fetchone() == (0,)
        with psycopg.connect(migrated.dsn) as connection:
            connection.execute(EMIT, ("order.paid", '"rolled back"'))
            connection.rollback()
            connection.execute(
                "select conductor.emit('order.paid', '3', '{\"traceparent\": \"00\"}', 'wal')"
            )
        await eventually(lambda: len(jobs(migrated)) >= 5, "the jobs")
    found = jobs(migrated)
    assert [job["task"] for job in found] == ["told", "seen", "told", "seen", "told"]
    assert [job["trigger"] for job in found[:2]] == ["event", "change"]
    assert found[0]["payload"] == '{"event" : "order.paid", "payload" : {"n": 1.10}}'
    assert [job["metadata"] for job in found] == [None] * 4 + [{"traceparent": "00"}]
    assert len({(job["source_lsn"], job["source_ordinal"]) for job in found}) == 5
    assert emitted(metrics) == {"matched": 3, "unmatched": 1}
    assert letters(migrated) == []


async def test_a_subscription_hears_what_is_emitted_while_it_lives(
    migrated: ScratchDatabase,
) -> None:
    async with running(migrated):
        first = on_event(migrated.dsn, "x")
        await captured(migrated, first)
        query(migrated.dsn, EMIT, "x", "1")
        query(
            migrated.dsn,
            "update conductor.subscriptions set retired_at = now() where id = %s",
            first,
        )
        second = on_event(migrated.dsn, "x", task="later")
        await captured(migrated, second)
        query(migrated.dsn, EMIT, "x", "2")
        await eventually(lambda: len(jobs(migrated)) >= 2, "the jobs")
    async with running(migrated):  # and once: also for a leader that comes later
        query(migrated.dsn, EMIT, "x", "3")
        await eventually(lambda: len(jobs(migrated)) >= 3, "the job")
    routed = [(job["task"], json.loads(job["payload"])["payload"]) for job in jobs(migrated)]
    assert routed == [("told", 1), ("later", 2), ("later", 3)]


async def test_what_is_no_event_of_ours_is_a_dead_letter(migrated: ScratchDatabase) -> None:
    """Every role may write logical messages: the secret tells ours from theirs."""
    forged = '{"secret": "?", "xid": "1", "metadata": null}\n{"event": "x", "payload": 1}'
    secret = "select secret::text from conductor.emit_owner"
    async with running(migrated):
        await captured(migrated, on_event(migrated.dsn, "x"))
        header = f'{{"secret": "{value(migrated.dsn, secret)}", "xid": "1", "metadata": null}}\n'
        emit = "select pg_logical_emit_message(true, 'conductor.emit', %s::bytea)"
        not_utf8 = header.encode() + b'{"event": "x", "payload": "\xff"}'
        nameless = header.encode() + b'{"event": null, "payload": 1}'
        for content in (forged.encode(), b"\xff", b"", not_utf8, nameless):
            query(migrated.dsn, emit, content)
        query(
            migrated.dsn,
            "select pg_logical_emit_message(false, 'conductor.emit', %s::bytea)",
            not_utf8,
        )
        query(migrated.dsn, EMIT, "x", "2")
        await eventually(lambda: jobs(migrated), "the event after them")
    assert [json.loads(job["payload"])["payload"] for job in jobs(migrated)] == [2]
    errors = [letter["error"] for letter in letters(migrated)]
    assert len(errors) == 5
    assert "was not written by conductor.emit_wal" in errors[0]


async def test_a_filter_decides_and_one_that_fails_can_be_asked_again(
    migrated: ScratchDatabase,
) -> None:
    async with running(migrated):
        await captured(migrated, on_event(migrated.dsn, "x", when="event.n > 1"))
        for payload in ('{"n": 1}', '{"n": 2}', '"text"'):
            query(migrated.dsn, EMIT, "x", payload)
        await eventually(lambda: letters(migrated), "the letter")
    assert [json.loads(job["payload"])["payload"] for job in jobs(migrated)] == [{"n": 2}]
    (letter,) = letters(migrated)
    assert "FilterFailed" in letter["error"]
    (kept,) = await redrive_letters(settings_for(migrated), None)
    assert kept.result == "kept"
    query(migrated.dsn, 'update conductor.subscriptions set definition = \'{"event": "x"}\'')
    (outcome,) = await redrive_letters(settings_for(migrated), None)
    assert (outcome.result, outcome.jobs) == ("routed", 1)
    assert json.loads(jobs(migrated)[-1]["payload"])["payload"] == "text"
    assert letters(migrated) == []


@pytest.mark.wal2json
async def test_the_other_plugin_routes_them_alike(migrated: ScratchDatabase) -> None:
    async with running(migrated, plugin="wal2json"):
        await captured(migrated, on_event(migrated.dsn, "x"))
        query(migrated.dsn, "select conductor.emit('x', '{\"ä\": 1.10}', '{\"m\": 1}', 'wal')")
        await eventually(lambda: jobs(migrated), "the job")
    (job,) = jobs(migrated)
    assert job["payload"] == '{"event" : "x", "payload" : {"ä": 1.10}}'
    assert job["metadata"] == {"m": 1}


MANY: Final = (
    "select conductor.emit('x', to_json(i), via => 'wal') from generate_series(%s::int, %s) i"
)


def numbers(database: ScratchDatabase) -> list[int]:
    """The payloads of the events' jobs."""
    return [json.loads(j["payload"])["payload"] for j in jobs(database) if j["trigger"] == "event"]


async def test_pieces_of_a_large_transaction_hold_them_too(migrated: ScratchDatabase) -> None:
    query(
        migrated.admin_dsn, f"alter database {migrated.name} set logical_decoding_work_mem = '64kB'"
    )
    query(migrated.dsn, "create table item (id int primary key)")
    other = f"{migrated.name}_2"
    async with running(migrated, streaming="on"):
        await captured(migrated, subscribe(migrated.dsn, "public.item", ["insert"]))
        await captured(migrated, on_event(migrated.dsn, "x"))
        async with running(
            migrated, streaming="on", slot=other, source="other", publication="other"
        ):
            await eventually(lambda: leads(migrated, other), "the second sidecar")
            with psycopg.connect(migrated.dsn) as connection:
                connection.execute(MANY, (1, 2000))
                connection.execute("insert into item values (1)")
                connection.execute("savepoint a")
                connection.execute("insert into item values (2)")
                connection.execute(MANY, (2001, 4000))
                connection.execute("rollback to a")
                connection.execute(MANY, (4001, 6000))
            await eventually(lambda: len(jobs(migrated)) >= 4001, "the jobs")
            assert numbers(migrated) == [*range(1, 2001), *range(4001, 6001)]
            assert letters(migrated) == []
            # With nothing between, the server does not tell what was rolled back: none is routed.
            with psycopg.connect(migrated.dsn) as connection:
                connection.execute(MANY, (10_001, 10_100))
                connection.execute("savepoint a")
                connection.execute(MANY, (12_001, 14_000))
                connection.execute("rollback to a")
                connection.execute(MANY, (14_001, 16_000))
            await eventually(lambda: len(jobs(migrated)) >= 6001, "the jobs")
            end = value(migrated.admin_dsn, "select pg_current_wal_insert_lsn()::text")
            behind = "select count(*) from conductor.progress where acknowledged_lsn < %s"
            await eventually(lambda: value(migrated.dsn, behind, end) == 0, "both to catch up")
    assert numbers(migrated)[4000:] == [*range(14_001, 16_001)]
    assert len(letters(migrated)) > 100
    assert {letter["slot"] for letter in letters(migrated)} == {migrated.name}  # who routes them
    assert "a part of the transaction was rolled back" in letters(migrated)[0]["error"]
    assert value(
        migrated.admin_dsn,
        "select stream_txns > 1 from pg_stat_replication_slots where slot_name = %s",
        migrated.name,
    )


async def test_sql_emits_through_the_wal_where_a_sidecar_routes_events(
    migrated: ScratchDatabase,
) -> None:
    plain = "select conductor.emit('x', %s)"
    assert value(migrated.dsn, plain, "0") is not None  # nobody would see it: a row
    query(migrated.dsn, "delete from conductor.jobs")
    async with running(migrated):
        await captured(migrated, on_event(migrated.dsn, "x"))
        assert value(migrated.dsn, plain, "1") is None
        await eventually(lambda: jobs(migrated), "the job")
        assert value(migrated.dsn, "select conductor.emit('x', '2', via => 'queue')") is not None
        query(
            migrated.admin_dsn, f"alter database {migrated.name} set conductor.emit_via = 'queue'"
        )
        assert value(migrated.dsn, plain, "3") is not None
    tasks = [job["task"] for job in jobs(migrated)]
    assert tasks == ["told", "conductor.dispatch", "conductor.dispatch"]


async def test_where_messages_are_kept_from_the_owner_events_are_rows(
    migrated: ScratchDatabase,
) -> None:
    async with running(migrated):
        await captured(migrated, on_event(migrated.dsn, "x"))
        query(migrated.admin_dsn, KEEP_MESSAGES)
        assert value(migrated.dsn, "select conductor.emit('x', '1')") is not None
        assert "may not write logical messages" in refusal(migrated.dsn, EMIT, "x", "2")


async def test_one_slot_of_a_database_routes_them(migrated: ScratchDatabase) -> None:
    other = f"{migrated.name}_2"
    owners = "select slot from conductor.progress where emits order by slot"
    async with running(migrated):
        subscription = on_event(migrated.dsn, "x")
        await captured(migrated, subscription)
        async with running(migrated, slot=other, source="other", publication="other"):
            await eventually(lambda: leads(migrated, other), "the second sidecar")
            query(migrated.dsn, EMIT, "x", "1")
            await eventually(lambda: jobs(migrated), "the job")
            assert [row["slot"] for row in query(migrated.dsn, owners)] == [migrated.name]
            assert json.loads(cdc(migrated, "status", "--json").stdout)["routes_events"] is True
    drop_slot(migrated)
    assert "is gone" in refusal(migrated.dsn, EMIT, "x", "2")
    async with running(migrated, slot=other, source="other", publication="other"):
        started = "select start_lsn from conductor.activations where slot = %s"
        await eventually(lambda: value(migrated.dsn, started, other), "the other slot's stamp")
        query(migrated.dsn, EMIT, "x", "3")
        await eventually(lambda: len(jobs(migrated)) >= 2, "the job of the other slot")
    assert [json.loads(job["payload"])["payload"] for job in jobs(migrated)] == [1, 3]


def test_nothing_is_emitted_where_nobody_would_see_it(migrated: ScratchDatabase) -> None:
    assert "no sidecar streams from this database" in refusal(migrated.dsn, EMIT, "x", "1")
    assert "not emitted via 'pigeon'" in refusal(
        migrated.dsn, "select conductor.emit('x', via => 'pigeon')"
    )
    assert value(migrated.dsn, "select conductor.emit('x', '1', via => 'auto')") is not None
    assert value(migrated.dsn, "select conductor.emit('x', '1')") is not None
    query(migrated.admin_dsn, f"alter database {migrated.name} set conductor.emit_via = 'wal'")
    assert "no sidecar" in refusal(migrated.dsn, "select conductor.emit('x', '1')")
    assert value(migrated.dsn, "select conductor.emit('x', '1', via => 'queue')") is not None


def test_nothing_is_emitted_below_wal_level_logical(start_server: StartServer) -> None:
    server = start_server(settings={"wal_level": "replica"})
    migrate(server.dsn())
    assert "wal_level is below logical" in refusal(server.dsn(), EMIT, "x", "1")


async def test_python_emits_on_any_connection_to_the_source(
    migrated: ScratchDatabase, database: ScratchDatabase
) -> None:
    conductor = Conductor(migrated.dsn, events=[paid])
    client = SyncConductor(Conductor(migrated.dsn, events=[paid]))
    with pytest.raises(EmitRefused, match="no sidecar"):
        await conductor.emit(paid, Paid(order=0), via="wal")
    async with running(migrated):
        await captured(migrated, on_event(migrated.dsn, "order.paid"))
        await conductor.emit(paid, Paid(order=1), via="wal", metadata={"a": "b"})
        async with await psycopg.AsyncConnection.connect(migrated.dsn) as connection:
            many = [Paid(order=2), Paid(order=3)]
            await conductor.emit_many(paid, many, connection=connection, via="wal")
        async with await psycopg.AsyncConnection.connect(database.dsn) as elsewhere:
            with pytest.raises(EmitRefused, match="conductor"):
                await conductor.emit(paid, Paid(order=9), connection=elsewhere, via="wal")
        with psycopg.connect(migrated.dsn) as connection:
            client.emit(paid, Paid(order=4), connection=connection, via="wal")
        client.emit(paid, Paid(order=5), via="auto")
        await eventually(lambda: len(jobs(migrated)) >= 5, "the jobs")
    await conductor.close()
    client.close()
    found = jobs(migrated)
    orders = [json.loads(job["payload"])["payload"]["order"] for job in found]
    assert orders == [1, 2, 3, 4, 5]
    assert found[0]["metadata"] == {"a": "b"}


async def test_a_job_waits_for_an_event_that_is_emitted_through_the_wal(queue: Queue) -> None:
    conductor = Conductor(queue.database.dsn, tasks=[wait], events=[paid])

    @conductor.task(wait)
    async def handler(event: Any, ctx: Context[None]) -> Any:
        got = await ctx.wait_for_event(
            "paid", paid, match={"order": event.payload}, when="event.amount > 1"
        )
        return got.amount

    waiting = "select count(*) = %s from conductor.jobs where state = 'waiting'"
    async with running(queue.database):
        await queue.until("select exists (select from conductor.emit_owner)")
    await conductor.emit(paid, Paid(order=1, amount=9), via="wal")  # committed, not routed yet
    async with Orchestrator(conductor):
        one, two = await conductor.invoke_many(wait, [1, 2])
        await queue.until(waiting, 2)
        async with running(queue.database):
            await conductor.emit(paid, Paid(order=1, amount=1), via="wal")  # the filter says no
            await conductor.emit(paid, Paid(order=1, amount=5), via="wal")
            assert await one.result(timeout_s=60) == 5
            await queue.until(waiting, 1)
            await conductor.emit(paid, Paid(order=2, amount=7), via="wal")
            assert await two.result(timeout_s=60) == 7
    drop_slot(queue.database)
    await conductor.close()


NUMBERS: Final = (
    '{"order": 1.10, "odd": [1e3, 1.7976931348623157e308, 123456789012345678901234567890]}'
)


@pytest.mark.parametrize("via", ["wal", "queue"])
async def test_who_waits_gets_what_subscribers_get_to_the_digit(queue: Queue, via: str) -> None:
    any_event = define_event("numbers", payload=Any)
    conductor = Conductor(queue.database.dsn, tasks=[wait], events=[any_event])

    @conductor.task(wait, max_attempts=1)
    async def handler(_event: Any, ctx: Context[None]) -> Any:
        got = await ctx.wait_for_event("got", any_event)
        await ctx.sleep("stay", 3600)
        return got

    @conductor.task("told", OnEvent(any_event))
    async def told(_event: Any, _ctx: Context[None]) -> None: ...

    orchestrator = Orchestrator(conductor)
    async with running(queue.database):
        await eventually(lambda: leads(queue.database, queue.database.name), "the sidecar")
        await orchestrator.start(wait_captured_s=20)
        await conductor.invoke(wait, 1)
        await queue.until("select exists (select from conductor.jobs where state = 'waiting')")
        emit = "select conductor.emit('numbers', %s::json, via => %s)"
        query(queue.database.dsn, emit, NUMBERS, via)
        got = "select from conductor.steps where name = 'got' and result is not null"
        await queue.until(f"select exists ({got})")
        await queue.until("select exists (select from conductor.history where task = 'told')")
        await orchestrator.stop()
    result = value(
        queue.database.dsn, "select result::text from conductor.steps where name = 'got'"
    )
    payload = value(
        queue.database.dsn,
        "select (payload -> 'payload')::text from conductor.history where task = 'told'",
    )
    assert result == payload == NUMBERS
    drop_slot(queue.database)
    await conductor.close()


async def test_an_event_nested_too_deep_fails_who_waits_and_the_stream_goes_on(
    queue: Queue,
) -> None:
    tree = define_event("tree", payload=Any)
    conductor = Conductor(queue.database.dsn, tasks=[wait], events=[tree])

    @conductor.task(wait, max_attempts=1)
    async def handler(event: Any, ctx: Context[None]) -> Any:
        return await ctx.wait_for_event("grown", tree)

    async with running(queue.database):
        await captured(queue.database, on_event(queue.database.dsn, "tree"))
        async with Orchestrator(conductor):
            one = await conductor.invoke(wait, 1)
            await queue.until("select exists (select from conductor.jobs where state = 'waiting')")
            query(queue.database.dsn, EMIT, "tree", "[" * 500 + "]" * 500)
            with pytest.raises(JobFailed, match="Recursion limit"):
                await one.result(timeout_s=60)
        query(queue.database.dsn, EMIT, "tree", "1")
        routed = "select count(*) = 2 from conductor.jobs where task = 'told'"
        await queue.until(routed)
    drop_slot(queue.database)
    await conductor.close()


async def test_started_means_heard_as_well(queue: Queue) -> None:
    conductor = Conductor(queue.database.dsn, events=[paid])

    @conductor.task("told", OnEvent(paid))
    async def told(_event: Emitted[Paid], _ctx: Context[None]) -> None: ...

    async with running(queue.database):
        await queue.until(
            "select exists (select from conductor.progress p join pg_stat_activity a"
            " on a.pid = p.sink_pid where p.emits)"
        )
        orchestrator = Orchestrator(conductor)
        await orchestrator.start(wait_captured_s=30)
        await conductor.emit(paid, Paid(order=1), via="wal")
        await queue.until("select count(*) = 1 from conductor.history where task = 'told'")
        await orchestrator.stop()
    again = Orchestrator(conductor)
    await again.start(wait_captured_s=30)  # nobody streams: the queue needs no sidecar
    await again.stop()
    drop_slot(queue.database)
    await conductor.close()


@pytest.fixture
def guarded(migrated: ScratchDatabase) -> Iterator[ScratchDatabase]:
    """A database with the rights of `deploy/postgres/roles.sh`, and a role that may emit."""
    block = (POSTGRES / "roles.sh").read_text().partition("\\connect shop\n")[2]
    roles = [user_of(migrated.dsn), user_of(migrated.source_dsn)]
    script = block.rpartition("SQL")[0].replace("to shop, cdc", f"to {', '.join(roles)}")
    assert roles[0] in script
    stranger = sql.Identifier(f"{migrated.name}_x")
    with psycopg.connect(migrated.admin_dsn, dbname=migrated.name, autocommit=True) as connection:
        connection.execute(script.encode())
        connection.execute(sql.SQL("create role {}").format(stranger))
        connection.execute(sql.SQL("grant usage on schema conductor to {}").format(stranger))
        yield migrated
        connection.execute(sql.SQL("drop owned by {}").format(stranger))
        connection.execute(sql.SQL("drop role {}").format(stranger))


async def test_roles_that_may_not_write_messages_still_emit(guarded: ScratchDatabase) -> None:
    def as_stranger(statement: str) -> str:
        with psycopg.connect(guarded.admin_dsn, dbname=guarded.name) as connection:
            connection.execute(sql.SQL("set role {}").format(sql.Identifier(f"{guarded.name}_x")))
            try:
                connection.execute(statement.encode())
            except psycopg.Error as error:
                return str(error)
        return ""

    async with running(guarded):
        await captured(guarded, on_event(guarded.dsn, "x"))
        assert "permission denied" in as_stranger("select pg_logical_emit_message(true, 'a', 'b')")
        assert "permission denied" in as_stranger("select secret from conductor.emit_owner")
        assert as_stranger("select conductor.emit('x', '1', via => 'wal')") == ""
        await eventually(lambda: jobs(guarded), "the stranger's event")


async def test_an_event_of_a_source_elsewhere(
    migrated: ScratchDatabase, new_database: NewDatabase
) -> None:
    """Where the queue is not, the owner installs what emits: a script of its own."""
    source = new_database()
    script = (POSTGRES / "emit.sql").read_text()
    query(source.dsn, script)
    query(source.dsn, script)  # again, as after an upgrade
    assert "no sidecar" in refusal(source.dsn, EMIT, "x", "0")
    async with running(source, queue_dsn=migrated.dsn):
        subscription = on_event(migrated.dsn, "x")
        stamped = "select start_lsn from conductor.activations where subscription = %s"
        await eventually(lambda: value(migrated.dsn, stamped, subscription), "the stamp")
        query(source.dsn, "select conductor.emit('x', '1')")
        query(source.dsn, EMIT, "x", "2")
        assert "queue database" in refusal(source.dsn, "select conductor.emit('x', via => 'queue')")
        await eventually(lambda: len(jobs(migrated)) >= 2, "the jobs")
    assert [json.loads(job["payload"])["payload"] for job in jobs(migrated)] == [1, 2]
    assert slot_row(source) is not None


def test_both_scripts_install_the_same_functions() -> None:
    migrations = files("conductor.sql").joinpath("migrations")
    script = (POSTGRES / "emit.sql").read_text().replace("create or replace", "create")
    for name, last in (
        ("why_no_wal()", "0012_emit_without_rights.sql"),
        ("emit_wal(event text, payload json", "0006_emit_through_wal.sql"),
    ):
        migration = migrations.joinpath(last).read_text().replace("create or replace", "create")
        body = migration[migration.index(f"create function conductor.{name}") :]
        assert body.partition("$$;")[0] in script
