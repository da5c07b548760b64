"""One source transaction is one job where a trigger asks for that: from SQL to the handler."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from cdc import groups
from conductor import (
    Conductor,
    Context,
    Delete,
    Insert,
    OnChange,
    Orchestrator,
    TableRow,
    Transaction,
    Update,
)
from tests.integration.conftest import Queue
from tests.integration.sidecar import drop_slot, running

pytestmark = pytest.mark.anyio


class Lines(TableRow, table="public.lines"):
    id: int
    amount: int


async def test_a_handler_gets_a_transaction_at_once(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "GROUP_CHANGES", 100)
    await queue.rows("create table lines (id int primary key, amount int not null)")
    conductor = Conductor(queue.database.dsn)
    seen: list[tuple[int, bool, list[Any]]] = []

    @conductor.task(
        "book", OnChange(Lines, when="op != 'insert' || new.amount > 0", group="transaction")
    )
    async def book(
        event: Transaction[Insert[Lines] | Update[Lines] | Delete[Lines]], _ctx: Context[None]
    ) -> None:
        changes = [
            (change.op, change.old.id if change.op == "delete" else change.new.id)
            for change in event
        ]
        seen.append((event.part, event.is_last, changes))

    orchestrator = Orchestrator(conductor, slots=1)
    async with running(queue.database):
        await orchestrator.start(wait_captured_s=30)
        with psycopg.connect(queue.database.dsn) as connection:
            connection.execute("insert into lines values (1, 1), (2, 0), (3, 3)")
            connection.execute("update lines set amount = 5 where id = 3")
            connection.execute("delete from lines where id = 1")
        await queue.rows("insert into lines values (9, 0)")  # nothing that it wants
        await queue.rows("insert into lines select i, 1 from generate_series(1001, 1250) i")
        await queue.until("select count(*) = 4 from conductor.history where outcome = 'completed'")
        await orchestrator.stop()
    drop_slot(queue.database)
    await conductor.close()
    changes = [("insert", 1), ("insert", 3), ("update", 3), ("delete", 1)]
    assert seen[0] == (0, True, changes)
    many = [("insert", i) for i in range(1001, 1251)]
    assert seen[1:] == [
        (0, False, many[:100]),
        (1, False, many[100:200]),
        (2, True, many[200:]),
    ]
    identities = "select count(distinct (source_lsn, source_ordinal)) from conductor.history"
    assert await queue.value(identities) == 4
