"""The traffic generator: a seed says the same again, and rolled-back work has no witness."""

import asyncio
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from examples.shop.oracle import create_shop
from examples.shop.traffic import Plan, Totals, Traffic
from tests.servers import NewDatabase

PLAN = Plan(
    seconds=60, writers=2, transactions=60, transactions_per_s=10_000, loads=1, load_rows=50
)


def run(new_database: NewDatabase, plan: Plan) -> tuple[list[Any], Totals]:
    """The witnessed changes, writer by writer, without what time and interleaving decide."""
    database = new_database(migrated=True)
    create_shop(database.dsn)
    traffic = Traffic(database.dsn, plan)
    asyncio.run(traffic.run())
    with psycopg.connect(database.dsn) as connection:
        changes = connection.execute(
            "select relation, operation, old - array['revision', 'joined_at', 'placed_at'],"
            " new - array['revision', 'joined_at', 'placed_at'], array_remove(changed, 'revision')"
            " from oracle.changes where relation <> 'stock_counts'"
            " order by coalesce(new, old) ->> 'id', coalesce(new, old) ->> 'order_id', id"
        ).fetchall()
        gone = connection.execute(
            "select (select count(*) from shop.users)"
            " = count(*) filter (where operation = 'insert')"
            " - count(*) filter (where operation = 'delete')"
            " from oracle.changes where relation = 'users'"
        ).fetchone()
    assert gone == (True,)  # what the witness saw is what is there
    return changes, traffic.totals


@pytest.mark.pg(18)
def test_a_seed_gives_the_same_traffic_again(new_database: NewDatabase) -> None:
    first, totals = run(new_database, PLAN)
    assert (first, totals) == run(new_database, PLAN)
    assert totals.committed + totals.rolled_back >= 120
    assert totals.rolled_back > 0
    assert totals.savepoints > 0
    assert {(relation, operation) for relation, operation, *_ in first} >= {
        (relation, operation)
        for relation in ("users", "orders", "order_items", "payments")
        for operation in ("insert", "update")
    }


@pytest.mark.pg(18)
def test_another_seed_gives_other_traffic(new_database: NewDatabase) -> None:
    assert run(new_database, PLAN)[0] != run(new_database, replace(PLAN, seed=2))[0]
