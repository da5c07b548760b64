"""`OnChange(…, refetch=True)`: what a change does not carry, read again by the row's key."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import JsonValue

from conductor import (
    Batch,
    BatchContext,
    Change,
    Conductor,
    Context,
    Insert,
    OnChange,
    Orchestrator,
    SyncContext,
    TableRow,
)
from conductor.errors import ColumnNotCaptured, ColumnUnchanged, RegistrationRefused
from tests.integration.sidecar import eventually, query, running
from tests.servers import NewDatabase, ScratchDatabase

pytestmark = pytest.mark.anyio

SETUP = """
create table docs (id int, part text, title text, body text, primary key (part, id));
alter table docs alter column body set storage external;
create table logs (line text);
alter table logs replica identity full;
create table "Odd %" ("the %s" text primary key, "a 'b" text, n int);
alter table "Odd %" alter column "a 'b" set storage external
"""
BODY = secrets.token_hex(8_000)


class Docs(TableRow, table="public.docs"):
    id: int
    part: str
    title: str
    body: str


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    query(migrated.dsn, SETUP)
    return migrated


@asynccontextmanager
async def collecting(
    database: ScratchDatabase,
    *triggers: Any,
    sync: bool = False,
    fails: bool = False,
    **options: Any,
) -> AsyncIterator[list[Change[Any]]]:
    """Run a worker whose task collects its events, until the end of the block."""
    events: list[Change[Any]] = []

    async def collect(event: Change[Any], _: Context[None]) -> None:
        events.append(event)

    def collect_in_a_thread(event: Change[Any], _: SyncContext[None]) -> None:
        events.append(event)

    async with Conductor(database.dsn, **options) as conductor:
        handler: Any = collect_in_a_thread if sync else collect
        conductor.task("collect", *triggers, max_attempts=1)(handler)
        orchestrator = Orchestrator(conductor)
        await orchestrator.start(wait_captured_s=30)
        try:
            yield events
            failed = (
                "select error ->> 'message' from conductor.history where outcome <> 'completed'"
            )
            assert fails or query(database.dsn, failed) == []
        finally:
            await orchestrator.stop()


async def collected(events: list[Change[Any]], count: int) -> list[Change[Any]]:
    await eventually(lambda: len(events) >= count, f"{count} events")
    assert len(events) == count
    return events


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
async def test_a_toasted_value_is_read_from_the_table(shop: ScratchDatabase, *, sync: bool) -> None:
    async with (
        running(shop),
        collecting(shop, OnChange(Docs, refetch=True), sync=sync) as events,
    ):
        query(shop.dsn, "insert into docs values (1, 'a', 'first', %s)", BODY)
        await collected(events, 1)
        query(shop.dsn, "update docs set title = 'second'")
        await collected(events, 2)
        query(shop.dsn, "delete from docs")
        inserted, updated, deleted = await collected(events, 3)
    assert (inserted.refetched, inserted.gone, inserted.new.body) == (False, False, BODY)
    assert (updated.refetched, updated.gone) == (True, False)
    assert (updated.new.title, updated.new.body) == ("second", BODY)
    assert (deleted.refetched, deleted.gone, deleted.old.id) == (False, False, 1)


async def test_what_is_not_captured_is_read_as_it_is_by_then(shop: ScratchDatabase) -> None:
    trigger = OnChange(Docs, "insert", columns=lambda d: (d.id, d.part), refetch=True)
    async with running(shop), collecting(shop, trigger) as events:
        query(shop.dsn, "insert into conductor.queues values ('default', true)"
              " on conflict (name) do update set paused = true")  # fmt: skip
        query(shop.dsn, "insert into docs values (1, 'a', 'first', ''), (2, 'it''s', '2', '')")
        jobs = "select count(*) = 2 as done from conductor.jobs where task = 'collect'"
        await eventually(lambda: query(shop.dsn, jobs)[0]["done"], "the jobs")
        query(shop.dsn, "update docs set title = 'later' where id = 2")
        query(shop.dsn, "delete from docs where id = 1")
        query(shop.dsn, "update conductor.queues set paused = false")
        gone, late = sorted(await collected(events, 2), key=lambda event: event.new.id)
    assert (late.refetched, late.gone, late.new.part, late.new.title) == (
        True, False, "it's", "later",
    )  # fmt: skip
    assert (gone.refetched, gone.gone, gone.new.part) == (False, True, "a")
    with pytest.raises(ColumnNotCaptured, match="gone when it was to be read again") as absent:
        _ = gone.new.title
    assert "event.gone" in absent.value.hint


async def test_a_table_without_a_model_is_read_again_too(shop: ScratchDatabase) -> None:
    trigger = OnChange('public."Odd %"', "update", refetch=True)
    async with running(shop), collecting(shop, trigger) as events:
        query(shop.dsn, 'insert into "Odd %%" values (%s, %s, 1)', "k%", BODY)
        query(shop.dsn, 'update "Odd %" set n = 2')
        (event,) = await collected(events, 1)
    found: dict[str, JsonValue] = event.new
    assert (found["the %s"], found["a 'b"], found["n"]) == ("k%", BODY, 2)
    assert event.refetched


async def test_without_it_the_errors_say_what_to_do(shop: ScratchDatabase) -> None:
    trigger = OnChange(Docs, "update", columns=lambda d: (d.id, d.part, d.body))
    async with running(shop), collecting(shop, trigger) as events:
        query(shop.dsn, "insert into docs values (1, 'a', 'first', %s)", BODY)
        query(shop.dsn, "update docs set title = 'second'")
        (event,) = await collected(events, 1)
    with pytest.raises(ColumnUnchanged, match=r"'body' of public\.docs") as unchanged:
        _ = event.new.body
    with pytest.raises(ColumnNotCaptured, match=r"'title' of public\.docs") as absent:
        _ = event.new.title
    assert "refetch=True" in unchanged.value.hint
    assert "refetch=True" in absent.value.hint


async def test_a_batch_has_its_rows_read_again(shop: ScratchDatabase) -> None:
    seen: list[Sequence[Insert[Docs]]] = []
    async with Conductor(shop.dsn) as conductor:
        trigger = OnChange(Docs, "insert", columns=("id", "part"), refetch=True)

        @conductor.task("collect", trigger, batch=Batch(size=100, wait_s=5.0))
        async def collect(events: Sequence[Insert[Docs]], _: BatchContext[None]) -> None:
            seen.append(events)

        orchestrator = Orchestrator(conductor)
        async with running(shop):
            await orchestrator.start(wait_captured_s=30)
            query(shop.dsn, "insert into docs select n, 'a', 'title ' || n, ''"
                  " from generate_series(1, 100) n")  # fmt: skip
            await eventually(lambda: sum(map(len, seen)) == 100, "the rows")
            await orchestrator.stop()
    titles = {event.new.id: event.new.title for events in seen for event in events}
    assert titles == {n: f"title {n}" for n in range(1, 101)}
    assert all(event.refetched for events in seen for event in events)


async def test_a_row_that_must_not_be_read_fails_the_attempt(shop: ScratchDatabase) -> None:
    trigger = OnChange(Docs, "insert", columns=("id", "part"), refetch=True)
    async with running(shop), collecting(shop, trigger, fails=True) as events:
        query(shop.dsn, "revoke select on docs from current_user")
        query(shop.dsn, "insert into docs values (1, 'a', '', '')")
        failed = "select error ->> 'type' as type, error ->> 'message' as message"
        rows = await eventually(
            lambda: query(shop.dsn, f"{failed} from conductor.history"), "the failure"
        )
    assert events == []
    assert rows[0]["type"] == "RefetchFailed"
    assert "permission denied for table docs" in rows[0]["message"]


async def test_rows_of_another_database_are_read_there(new_database: NewDatabase) -> None:
    source, queue = new_database(), new_database(migrated=True)
    query(source.dsn, SETUP)
    trigger = OnChange(Docs, "insert", columns=("id", "part"), refetch=True)
    async with running(source, queue_dsn=queue.source_dsn, slot=queue.name):
        ready = "select database from conductor.progress where state = 'streaming'"
        await eventually(lambda: query(queue.dsn, ready), "the sidecar")
        with pytest.raises(RegistrationRefused, match="is in another database") as refused:
            async with collecting(queue, trigger):
                pass
        assert "source_dsn" in refused.value.hint
        async with collecting(queue, trigger, source_dsn=source.dsn) as events:
            query(source.dsn, "insert into docs values (1, 'a', 'first', '')")
            (event,) = await collected(events, 1)
    query(source.admin_dsn, "select pg_drop_replication_slot(%s)", queue.name)
    assert (event.new.title, event.refetched) == ("first", True)


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        (OnChange("public.logs", "insert", refetch=True), "has no key to read a row again by"),
        (OnChange(Docs, "insert", columns=("id",), refetch=True), "'part' is not captured"),
    ],
)
async def test_registration_refuses_what_could_not_be_read(
    shop: ScratchDatabase, trigger: Any, message: str
) -> None:
    with pytest.raises(RegistrationRefused, match=message):
        async with collecting(shop, trigger):
            pass
