"""From a commit to a handler: an orchestrator and a sidecar on one database."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from conductor.client import Conductor
from conductor.orchestrator import Orchestrator
from conductor.triggers import OnChange
from tests.integration.conftest import Queue
from tests.integration.sidecar import drop_slot, running

pytestmark = pytest.mark.anyio


class Shop:
    """One version of an application that notes the users it sees."""

    def __init__(self, queue: Queue, seen: list[tuple[str, int]], **trigger: Any) -> None:
        self.conductor = Conductor(queue.database.dsn, app="shop", version=str(trigger))
        self.seen = seen
        on_users = OnChange("public.users", "insert", **trigger)
        self.conductor.task("greet", on_users)(self._greet)
        self.orchestrator = Orchestrator(self.conductor)

    async def _greet(self, event: Any, _ctx: Any) -> None:
        self.seen.append((",".join(sorted(event.new)), event.new["id"]))


async def test_started_means_captured(queue: Queue) -> None:
    await queue.rows("create table users (id bigint primary key, email text)")
    seen: list[tuple[str, int]] = []
    shop = Shop(queue, seen)
    async with running(queue.database):
        await shop.orchestrator.start(wait_captured_s=30)
        await queue.rows("insert into users values (1, 'a@example.com')")
        await queue.until("select count(*) = 1 from conductor.history where outcome = 'completed'")
        await shop.orchestrator.stop()
    drop_slot(queue.database)
    assert seen == [("email,id", 1)]


async def test_another_definition_takes_over_between_two_commits(queue: Queue) -> None:
    await queue.rows("create table users (id bigint primary key, email text)")
    seen: list[tuple[str, int]] = []
    inserted = 0
    done = asyncio.Event()

    async def traffic() -> None:
        nonlocal inserted
        while not done.is_set():
            inserted += 1
            await queue.rows("insert into users values (%s, 'a@example.com')", inserted)

    async with running(queue.database):
        old = Shop(queue, seen)
        await old.orchestrator.start(wait_captured_s=30)
        writing = asyncio.create_task(traffic())
        new = Shop(queue, seen, columns=("id",))
        await new.orchestrator.start(wait_captured_s=30)
        mark = inserted
        await queue.until("select max(id) > %s from users", mark)
        done.set()
        await writing
        await queue.until(
            "select count(*) = %s from conductor.history where outcome = 'completed'", inserted
        )
        await old.orchestrator.stop()
        await new.orchestrator.stop()
    drop_slot(queue.database)
    assert Counter(number for _, number in seen) == dict.fromkeys(range(1, inserted + 1), 1)
    by_number = {number: columns for columns, number in seen}
    columns = [by_number[number] for number in range(1, inserted + 1)]
    assert columns == sorted(columns)  # first those of the old definition, then those of the new
    assert set(columns) == {"email,id", "id"}
