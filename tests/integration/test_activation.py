"""A subscription begins and ends at one point of the WAL, never in the middle of a transaction."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import psycopg
import pytest

from cdc.activation import Activator
from cdc.connection import connect_queue, connect_source
from cdc.cut_over import CutOver
from cdc.metrics import Metrics
from cdc.publication import PublicationKeeper
from cdc.slots import SlotKeeper
from cdc.subscriptions import SubscriptionBook
from tests.integration.sidecar import (
    captured,
    eventually,
    jobs,
    published,
    query,
    routed,
    running,
    stamps,
    subscribe,
    value,
)
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop(migrated: ScratchDatabase) -> ScratchDatabase:
    """A database with two tables."""
    for table in ("a", "b"):
        query(migrated.dsn, f"create table {table} (id int primary key, body text)")
    return migrated


@contextmanager
def transaction(database: ScratchDatabase) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database.dsn) as connection:
        yield connection


@asynccontextmanager
async def leading(database: ScratchDatabase) -> AsyncIterator[None]:
    """A service that leads: from here on open transactions delay no slot."""
    async with running(database) as (service, _):
        await eventually(lambda: service.why_not_ready() is None, "a leader")
        yield


async def test_a_registered_subscription_is_stamped_at_once(shop: ScratchDatabase) -> None:
    async with running(shop):
        subscription = subscribe(shop.dsn, "public.a", ["insert"])
        await captured(shop, subscription)
        query(shop.dsn, "insert into a values (1, 'x')")
        query(shop.dsn, "update a set body = 'y'")
        query(shop.dsn, "insert into b values (1, 'x')")
        query(shop.dsn, "insert into a values (2, 'x')")
        found = await routed(shop, 2)
    assert [payload["new"]["id"] for payload in found] == [1, 2]


async def test_it_waits_for_a_writer_that_began_before(shop: ScratchDatabase) -> None:
    async with leading(shop):
        with transaction(shop) as writer:
            writer.execute("insert into a values (1, 'before')")
            subscription = subscribe(shop.dsn, "public.a")
            await eventually(lambda: "public.a" in published(shop), "a published")
            other = subscribe(shop.dsn, "public.b")
            await captured(shop, other)  # the wait is for one table only
            query(shop.dsn, "insert into a values (2, 'another writer, who is not held up')")
            writer.execute("insert into a values (3, 'after the publication changed')")
            assert stamps(shop, subscription) == (None, None)
            writer.commit()
        await captured(shop, subscription)
        query(shop.dsn, "insert into a values (4, 'captured')")
        found = await routed(shop, 1)
    assert found[0]["new"]["id"] == 4


async def test_a_rolled_back_or_prepared_writer_is_waited_for(shop: ScratchDatabase) -> None:
    async with leading(shop):
        with transaction(shop) as writer:
            writer.execute("insert into a values (1, 'x')")
            writer.execute(f"prepare transaction '{shop.name}'")
        subscription = subscribe(shop.dsn, "public.a")
        other = subscribe(shop.dsn, "public.b")
        try:
            await captured(shop, other)
            assert stamps(shop, subscription) == (None, None)
        finally:
            query(shop.dsn, f"rollback prepared '{shop.name}'")
        await captured(shop, subscription)


async def test_a_retired_subscription_ends_and_its_table_leaves(shop: ScratchDatabase) -> None:
    async with running(shop):
        first = subscribe(shop.dsn, "public.a", task="first")
        second = subscribe(shop.dsn, "public.b", task="second")
        await captured(shop, first)
        await captured(shop, second)
        query(shop.dsn, "insert into a values (1, 'x')")
        query(
            shop.dsn, "update conductor.subscriptions set retired_at = now() where id = %s", first
        )
        await eventually(lambda: stamps(shop, first)[1], "an end stamp")
        await eventually(lambda: published(shop) == {"public.b"}, "the table to leave")
        query(shop.dsn, "insert into a values (2, 'x')")
        query(shop.dsn, "insert into b values (3, 'x')")
        found = await routed(shop, 2)
    assert [payload["new"]["id"] for payload in found] == [1, 3]


async def test_retired_before_it_began_it_never_begins(shop: ScratchDatabase) -> None:
    subscription = subscribe(shop.dsn, "public.a", task="old")
    query(shop.dsn, "update conductor.subscriptions set retired_at = now()")
    other = subscribe(shop.dsn, "public.b", task="new")
    async with running(shop):
        await captured(shop, other)
        assert stamps(shop, subscription) == (None, None)
        assert published(shop) == {"public.b"}


async def test_a_marker_that_was_lost_with_its_leader_is_sent_again(
    shop: ScratchDatabase,
) -> None:
    async with leading(shop):
        pass
    subscription = subscribe(shop.dsn, "public.a")
    async with activating(shop) as activator:  # a leader that marks, and dies before it routes
        await eventually(lambda: _step(activator), "a marker")
        assert stamps(shop, subscription) == (None, None)
    async with running(shop):
        await captured(shop, subscription)
        start = stamps(shop, subscription)
        await eventually(lambda: "public.a" in published(shop), "still published")
        query(shop.dsn, "insert into a values (1, 'x')")
        await routed(shop, 1)
        assert stamps(shop, subscription) == start  # the first marker counts


async def _step(activator: Activator) -> bool:
    await activator.step()
    return bool(activator._marked_start)


@asynccontextmanager
async def activating(database: ScratchDatabase) -> AsyncIterator[Activator]:
    """An activator without a pump."""
    source = await connect_source(database.source_dsn, application_name="test")
    queue = await connect_queue(database.source_dsn, application_name="test")
    nonce = value(database.dsn, "select marker_nonce::text from conductor.progress")
    book = SubscriptionBook(queue, slot=database.name, source="default")
    keeper = PublicationKeeper("conductor", source)
    slots = SlotKeeper(database.name, "default", source, queue)
    try:
        yield Activator(
            book=book,
            keeper=keeper,
            source=source,
            listener=queue,
            slots=slots,
            nonce=nonce,
            metrics=Metrics("test", database.name),
            routed_lsn=lambda: 0,
            cut_over=CutOver(slots, source, nonce, lambda: 0, lambda: None),
        )
    finally:
        await source.close()
        await queue.close()


async def test_a_forged_marker_is_ignored(shop: ScratchDatabase) -> None:
    async with running(shop):
        other = subscribe(shop.dsn, "public.b")
        await captured(shop, other)
        with transaction(shop) as writer:
            writer.execute("insert into a values (1, 'holds the subscription back')")
            subscription = subscribe(shop.dsn, "public.a")
            forged = (
                f'{{"slot": "{shop.name}", "nonce": "x", "start": [{subscription}], "end": []}}'
            )
            query(shop.dsn, "select pg_logical_emit_message(true, 'conductor.mark', %s)", forged)
            query(shop.dsn, "insert into b values (1, 'x')")
            await routed(shop, 1)
            assert stamps(shop, subscription) == (None, None)
        await captured(shop, subscription)


async def test_what_cannot_be_captured_stops_nothing_else(shop: ScratchDatabase) -> None:
    query(shop.dsn, "create table nokey (id int)")
    query(shop.admin_dsn, "create table theirs (id int primary key)")
    refused = subscribe(shop.dsn, "public.nokey", task="refused")
    forbidden = subscribe(shop.dsn, "public.theirs", task="forbidden")
    unreadable = subscribe(shop.dsn, "public.a", task="unreadable")
    query(
        shop.dsn,
        "update conductor.subscriptions set definition = '{}' where id = %s",
        unreadable,
    )
    fine = subscribe(shop.dsn, "public.b", task="fine")
    async with running(shop) as (service, _):
        await captured(shop, fine)
        query(shop.dsn, "insert into b values (1, 'x')")
        await routed(shop, 1)
        query(shop.dsn, "alter table nokey add primary key (id)")
        await captured(shop, refused)  # mended without a restart
        query(shop.admin_dsn, f"alter table theirs owner to {_owner(shop)}")
        await captured(shop, forbidden)
        assert service.why_not_ready() is None
    assert stamps(shop, unreadable) == (None, None)


def _owner(database: ScratchDatabase) -> str:
    return str(value(database.dsn, "select quote_ident(current_user)"))


async def test_jobs_begin_exactly_at_the_stamp_under_traffic(shop: ScratchDatabase) -> None:
    """Every transaction that committed after the stamp is routed whole, none before it."""
    async with leading(shop):
        stop = asyncio.Event()

        async def write() -> None:
            connection = await psycopg.AsyncConnection.connect(shop.dsn)
            async with connection:
                number = 0
                while not stop.is_set():
                    for _ in range(3):
                        number += 1
                        await connection.execute("insert into a values (%s, 'x')", [number])
                    await connection.commit()

        writing = asyncio.create_task(write())
        subscription = subscribe(shop.dsn, "public.a")
        await captured(shop, subscription)
        await eventually(lambda: len(jobs(shop)) > 30, "some jobs")
        stop.set()
        await writing
        last = value(shop.dsn, "select max(id) from a")
        await eventually(lambda: jobs(shop)[-1]["new"]["id"] == last, "the last one")
    ids = [payload["new"]["id"] for payload in jobs(shop)]
    assert ids == list(range(ids[0], last + 1))
    assert (ids[0] - 1) % 3 == 0  # the first transaction came whole


def redefine(database: ScratchDatabase, old: int) -> int:
    """Register another definition of a subscription's trigger; return its id."""
    new = value(
        database.dsn,
        "with retired as ("
        " update conductor.subscriptions set retired_at = now() where id = %s returning *)"
        " insert into conductor.subscriptions (app, task, trigger, kind, queue, definition)"
        " select app, task, trigger || '', kind, queue, jsonb_set(definition::jsonb, '{columns}',"
        " '[\"id\"]')::json from retired returning id",
        old,
    )
    query(database.dsn, "select pg_notify('conductor_subscriptions', '')")
    return int(new)


async def test_another_definition_takes_over_at_once_while_somebody_writes(
    shop: ScratchDatabase,
) -> None:
    query(shop.dsn, "drop index conductor.subscriptions_live")  # both live for one statement
    async with running(shop):
        old = subscribe(shop.dsn, "public.a", ["insert"])
        await captured(shop, old)
        query(shop.dsn, "insert into a values (1)")
        await routed(shop, 1)
    async with running(shop):  # a new leader knows no table as captured yet
        query(shop.dsn, "insert into a values (2)")
        await routed(shop, 2)
        with transaction(shop) as writer:
            writer.execute("insert into a values (3)")
            new = redefine(shop, old)
            for number in range(4, 10):
                query(shop.dsn, "insert into a values (%s)", number)
            await captured(shop, new)
            query(shop.dsn, "insert into a values (10)")
            writer.commit()
        await routed(shop, 10)
    ids = [row["new"]["id"] for row in jobs(shop)]
    assert sorted(ids) == list(range(1, 11))
    assert stamps(shop, old)[1] == stamps(shop, new)[0]


async def test_a_refused_definition_leaves_the_old_one_routing(shop: ScratchDatabase) -> None:
    async with running(shop):
        old = subscribe(shop.dsn, "public.a", ["insert"])
        await captured(shop, old)
        query(shop.dsn, "update conductor.subscriptions set retired_at = now()")
        subscribe(shop.dsn, "public.a", ["insert"], columns=["nonsense"])
        for number in range(5):
            query(shop.dsn, "insert into a values (%s)", number)
        await routed(shop, 5)
    assert stamps(shop, old)[1] is None


async def test_a_retired_subscription_ends_though_its_table_is_gone(shop: ScratchDatabase) -> None:
    async with running(shop):
        old, other = (subscribe(shop.dsn, f"public.{t}", task=t) for t in "ab")
        await captured(shop, old)
        await captured(shop, other)
    query(shop.dsn, "update conductor.subscriptions set retired_at = now() where id = %s", old)
    query(shop.dsn, "drop table a")
    async with running(shop):
        query(shop.dsn, "insert into b values (1, 'x')")
        await routed(shop, 1)
        await eventually(lambda: stamps(shop, old)[1], "the end of the retired one")
