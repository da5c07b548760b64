"""What deciding about one change costs, as subscriptions become many.

Ten subscriptions of each table, of which two want an insert; the columns of each table are of other
types, or stand in another order, than those of all others. Transactions of one table each, the
tables in turn: the worst order for the processor's caches. No server and no clock but the
processor's; compiling what a table's subscriptions want happens once, and is measured apart.
"""

import gc
import time
from itertools import islice, permutations
from statistics import median
from typing import Any, Final

from benchmarks.report import Result
from cdc.relations import RelationCache, RelationShape
from cdc.routing import Routed, Router
from cdc.wire.messages import Column, Insert, Relation
from conductor.matching import Subscription

TABLES: Final = 1_000
EACH: Final = 10
CHANGES: Final = 100_000
ROWS_EACH: Final = (10, 1)
COLUMNS: Final = (
    ("id", 20, b"42"),
    ("customer", 20, b"7"),
    ("status", 25, b"placed"),
    ("amount", 1700, b"12.50"),
    ("note", 25, b"a note of some length"),
    ("active", 16, b"t"),
    ("created_at", 1184, b"2026-01-02 03:04:05.678901+00"),
)


async def measure(runs: int, scale: float) -> list[Result]:
    """Time a router with few and one with many subscriptions, in turn."""
    changes = max(round(CHANGES * scale), 1_000)
    few, many = Load(1), Load(TABLES)
    few.compile()
    first_us = many.compile()
    times_us: dict[tuple[Load, int], list[float]] = {}
    gc.collect()
    gc.freeze()  # as the sidecar does: what lives on is not looked at
    try:
        for _ in range(runs):
            for rows in ROWS_EACH:
                for load in (few, many):
                    times_us.setdefault((load, rows), []).append(load.route(changes, rows))
    finally:
        gc.unfreeze()
    (ten, one), (ten_of_many, one_of_many) = (
        [median(times_us[load, rows]) for rows in ROWS_EACH] for load in (few, many)
    )
    numbers = (
        f"{ten_of_many:.2f} µs a change with {TABLES * EACH:,} subscriptions of {TABLES:,} tables, "
        f"{ten:.2f} µs with {EACH}; a table at its first change {first_us:,.0f} µs"
    )
    alone = f"{one_of_many:.2f} µs; {one:.2f} µs"
    name = "routing of a change, many subscriptions against few"
    return [
        Result(f"{name}, 10 rows a transaction", numbers, ten_of_many / ten, "ratio", "≤ 1.2"),
        Result(f"{name}, each of another table than the last", alone, one_of_many / one, "ratio"),
    ]


class Load:
    """A router with the subscriptions of so many tables, and changes for it."""

    def __init__(self, tables: int) -> None:
        cache = RelationCache()
        self.shapes: list[RelationShape] = []
        self.inserts: list[Insert] = []
        for oid, columns in enumerate(islice(permutations(COLUMNS), tables), 1):
            described = tuple(Column(name, kind, -1, name == "id") for name, kind, _ in columns)
            cache.apply(Relation(oid, "shop", f"table_{oid}", "d", described))
            self.shapes.append(cache.get(oid))
            self.inserts.append(Insert(oid, [value for _, _, value in columns]))
        self.router = Router(1, [subscription(n) for n in range(tables * EACH)])

    def compile(self) -> float:
        """Route one change of each table; return the microseconds of one."""
        return self.route(len(self.shapes), 1)

    def route(self, changes: int, rows_each: int) -> float:
        """Route transactions of so many rows of one table; return the microseconds of a change."""
        transactions = changes // rows_each
        route, out = self.router.route, Routed()
        started_s = time.process_time()
        for lsn in range(transactions):
            place = lsn % len(self.shapes)
            shape, insert = self.shapes[place], self.inserts[place]
            self.router.begin(lsn, lsn)
            for ordinal in range(rows_each):
                route(shape, insert, ordinal, b"", out)
            self.router.end(out)
            out.specs.clear()
        return 1e6 * (time.process_time() - started_s) / (transactions * rows_each)


def subscription(number: int) -> Subscription:
    """Return one of the table's ten: two want inserts, all want a few columns."""
    operations = ["insert", "update"] if number % EACH < 2 else ["delete", "update"]
    definition: dict[str, Any] = {
        "schema": "shop",
        "table": f"table_{number // EACH + 1}",
        "operations": operations,
        "columns": ["id", "customer", "status", "amount"],
    }
    return Subscription.from_row(
        {
            "id": number + 1,
            "app": "bench",
            "task": f"task-{number}",
            "trigger": "change",
            "queue": "default",
            "version": None,
            "rank": 0,
            "source": "default",
            "kind": "change",
            "definition": definition,
        }
    )
