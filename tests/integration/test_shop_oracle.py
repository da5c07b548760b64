"""The oracle of the demo must notice what it is there for: jobs are forged here, well and badly."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import LiteralString

import psycopg
import pytest

from examples.shop.oracle import create_shop, judge
from tests.servers import ScratchDatabase

LARGE = "x" * 9_000

# As the router writes them: from the oracle's own images, one position a transaction.
FORGE = """
    insert into conductor.history (id, run_at, created_at, finished_at, expires_on, fence, rank,
        attempt, crashes, outcome, trigger, queue, task, source_lsn, source_ordinal, payload)
    select row_number() over (order by e.change), now(), clock_timestamp(), now(), 'infinity', 1, 0,
        0, 0, 'completed',
        case e.operation when 'call' then 'invoke' else 'change' end::conductor.job_trigger,
        'default', e.task, ('0/' || to_hex(c.xid::text::bigint))::pg_lsn, e.change,
        case when e.operation = 'call' then json_build_object('token', substr(e.token, 7)) else
        json_strip_nulls(json_build_object(
            'op', e.operation, 'schema', 'shop', 'table', e.relation,
            'new', oracle.project(c.new, r.columns) - case when e.relation = 'payments'
                and e.operation = 'update' then 'receipt' else '' end,
            'old', case when i.full_identity then oracle.project(c.old, r.columns)
                when e.operation = 'delete' or i.key && c.changed
                then oracle.project(oracle.project(c.old, i.key), r.columns) end,
            'changed', case when i.full_identity then c.changed end,
            'unchanged', case when e.relation = 'payments' and e.operation = 'update'
                then array['receipt'] end,
            'cascade', case when e.operation = 'truncate' then false end,
            'restart_identity', case when e.operation = 'truncate' then false end,
            'commit_time', c.recorded_at, 'commit_lsn', '0/' || to_hex(c.xid::text::bigint))) end
    from oracle.expected e
    left join oracle.changes c on c.id = e.change and e.operation <> 'call'
    left join oracle.rules r on r.task = e.task and r.relation = e.relation
    left join oracle.relations i on i.relation = e.relation
"""
TRAFFIC = (
    f"insert into shop.users (id, email, name, bio) values (1, 'a', 'a', '{LARGE}')",
    "insert into shop.users (id, email, name) values (2, 'b', 'b')",
    "update shop.users set email = 'c@x' where id = 1",
    "update shop.users set name = 'd' where id = 1",
    "insert into shop.orders values (1, 1, 'placed', 12.50, 'n')",
    "insert into shop.order_items values (1, 1, 's', 2, 6.25), (1, 2, 't', 2, 6.25)",
    "update shop.order_items set position = position + 1000",
    "delete from shop.order_items where position = 1001",
    f"insert into shop.payments values (gen_random_uuid(), 1, 12.50, false, '[1.10]', '{LARGE}')",
    "update shop.payments set captured = true",
    "insert into oracle.calls (task, token) values ('send-receipt', 't1')",
    "truncate shop.stock_counts; insert into shop.stock_counts values (1, 'w', 's', 1, 0.1, now())",
    "truncate shop.stock_counts; insert into shop.stock_counts values (1, 'w', 's', 2, 0.1, now())",
    "delete from shop.users where id = 1",
)


@pytest.fixture
def connection(migrated: ScratchDatabase) -> Iterator[psycopg.Connection]:
    """A database with committed traffic, and the jobs a faultless router would have made of it."""
    create_shop(migrated.dsn)
    with psycopg.connect(migrated.dsn, autocommit=True) as connection:
        for statement in TRAFFIC:
            with connection.transaction():
                connection.execute(statement.encode())
            with connection.transaction(force_rollback=True):
                connection.execute(b"update shop.users set email = 'never', revision = 0")
                connection.execute(b"insert into shop.users values (77, 'never', 'never')")
        connection.execute("refresh materialized view oracle.expected")
        connection.execute(FORGE)
        connection.execute(
            "insert into shop.ledger select id::text, id, task from conductor.history"
        )
        yield connection


def count(connection: psycopg.Connection, relation: LiteralString) -> int:
    row = connection.execute(f"select count(*) from {relation}").fetchone()
    assert row is not None
    return int(row[0])


def test_a_faultless_record_has_no_faults(connection: psycopg.Connection) -> None:
    verdict = judge(connection)
    assert verdict.faults == 0, connection.execute("table oracle.wrong").fetchall()
    expected = count(connection, "oracle.expected")
    assert (verdict.changes, verdict.jobs, verdict.handled) == (20, expected, expected)
    assert verdict.summary == (
        f"20 changes committed, {expected} jobs enqueued, {expected} handled, 0 lost, 0 duplicated"
    )


def test_a_firing_that_is_under_way_is_not_judged(connection: psycopg.Connection) -> None:
    connection.execute(
        "insert into conductor.jobs (queue, task, trigger, state, payload) values"
        " ('default', 'report-sales', 'cron', 'running', '{\"scheduled_at\": \"x\"}')"
    )
    assert judge(connection).faults == 0
    connection.execute("update conductor.jobs set state = 'scheduled'")  # it has failed
    assert judge(connection).unhandled == 1


def alter(task: str, op: str, expression: str) -> str:
    """A statement that changes the payload of one job of a task."""
    return (
        f"update conductor.history set payload = ({expression})::json where id = (select min(id)"
        f" from conductor.history where task = '{task}' and payload ->> 'op' = '{op}')"
    )


P = "payload::jsonb"
FAULTS = {
    "a job is missing": (
        "delete from conductor.history where task = 'welcome-user' and id < 3",
        {"lost"},
    ),
    "a delete by key is missing": (
        "delete from conductor.history where task = 'reserve-item' and payload ->> 'op' = 'delete'",
        {"lost"},
    ),
    "one of two truncates is missing": (
        """delete from conductor.history where id = (
            select max(id) from conductor.history where payload ->> 'op' = 'truncate')""",
        {"lost"},
    ),
    "an invocation is missing": (
        "delete from conductor.history where trigger = 'invoke'",
        {"lost"},
    ),
    "a change came twice": (
        """insert into conductor.jobs (queue, task, trigger, payload, source_lsn, source_ordinal)
            select queue, task, trigger, payload, source_lsn, source_ordinal from conductor.history
            where payload ->> 'op' = 'truncate' limit 1""",
        {"duplicated", "unhandled"},
    ),
    "rolled-back work came": (
        """update conductor.history
            set payload = (payload::jsonb || '{"new": {"revision": 999}}')::json
            where task = 'ship-order' or id = 1""",
        {"lost", "duplicated"},
    ),
    "a large value became null": (
        alter(
            "settle-payment",
            "update",
            P + " #- '{unchanged}' || jsonb_build_object('new',"
            " payload::jsonb -> 'new' || '{\"receipt\": null}')",
        ),
        {"wrong"},
    ),
    "a large value is missing": (
        alter("settle-payment", "update", P + " - 'unchanged'"),
        {"wrong"},
    ),
    "a full old row lost its large value": (
        alter("index-profile", "update", P + " #- '{old,bio}'"),
        {"wrong"},
    ),
    "a column that changed is left out": (
        alter(
            "reserve-item",
            "update",
            P + " #- '{new,quantity}' || '{\"unchanged\": [\"quantity\"]}'",
        ),
        {"wrong"},
    ),
    "changed names a column too few": (
        alter("confirm-email", "update", P + ' || \'{"changed": ["revision"]}\''),
        {"wrong"},
    ),
    "changed lets another update through": (
        alter("index-profile", "update", P).replace("set ", "set task = 'confirm-email', "),
        {"lost", "duplicated", "stray", "unhandled"},
    ),
    "an old row shows more than the key": (
        alter(
            "reserve-item",
            "delete",
            P + ' || \'{"old": {"order_id": 1, "position": 1001, "sku": "s"}}\'',
        ),
        {"wrong"},
    ),
    "a numeric lost its scale": (
        alter("follow-order", "insert", "jsonb_set(payload::jsonb, '{new,total}', '\"12.5\"')"),
        {"wrong"},
    ),
    "a projection shows a column too many": (
        alter("welcome-user", "insert", "jsonb_set(payload::jsonb, '{new,bio}', '\"b\"')"),
        {"wrong"},
    ),
    "two transactions became one": (
        "update conductor.history set source_lsn = '0/1' where payload ->> 'table' = 'payments'",
        {"wrong", "misframed"},
    ),
    "a job failed": (
        "update conductor.history set outcome = 'failed' where id = 3",
        {"unhandled"},
    ),
    "a handler did nothing": ("delete from shop.ledger where job = 3", {"unhandled"}),
    "a handler ran for no job": (
        "insert into shop.ledger values ('k', 99999, 'welcome-user')",
        {"stray"},
    ),
}


def test_every_fault_is_found(connection: psycopg.Connection) -> None:
    for name, (statement, expected) in FAULTS.items():
        with connection.transaction(force_rollback=True):
            assert connection.execute(statement.encode()).rowcount > 0, name
            verdict = judge(connection)
        found = {field for field, value in asdict(verdict).items() if value}
        assert expected <= found, name
        assert not verdict.summary.endswith(" 0 lost, 0 duplicated"), name
