from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from conductor.errors import FenceLost, JobCancelled
from conductor.lease import DEAD_AFTER_S
from conductor.metrics import Metrics
from conductor.store.steps import StepWrite
from conductor.transactions import Transactions, _check
from tests.integration.conftest import Queue
from tests.integration.workers import Workshop, task

pytestmark = pytest.mark.anyio


@pytest.fixture
async def workshop(queue: Queue) -> AsyncIterator[Workshop]:
    workshop = Workshop(queue, Metrics())
    await queue.rows("create table ledger (id bigint generated always as identity, job bigint)")
    yield workshop
    await workshop.client.close()


async def book(connection: Any, ctx: Any) -> int:
    cursor = await connection.execute(
        "insert into ledger (job) values (%s) returning id", [ctx.job.id]
    )
    (number,) = await cursor.fetchone()
    return int(number)


async def finish(workshop: Workshop, handler: Callable[..., Any], **options: Any) -> dict[str, Any]:
    job = await workshop.invoke()
    async with workshop.worker([task(handler, **options)]):
        return await workshop.ended(job)


async def booked(workshop: Workshop) -> int:
    count: int = await workshop.queue.value("select count(*) from ledger")
    return count


async def test_writes_and_step_commit_together(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> Any:
        number = await ctx.transaction("book", lambda db: book(db, ctx), returns=int)
        if not ctx.job.attempt:
            raise ValueError("again")
        return number

    row = await finish(workshop, handler)
    assert (row["result"], row["attempt"]) == (1, 1)
    assert await booked(workshop) == 1


async def test_what_fails_is_rolled_back(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> Any:
        async def work(db: Any) -> None:
            await book(db, ctx)
            if not ctx.job.attempt:
                raise ValueError("in the transaction")

        await ctx.transaction("book", work, returns=None)

    row = await finish(workshop, handler)
    assert (row["state"], row["attempt"]) == ("completed", 1)
    assert await booked(workshop) == 1


async def test_a_thread_has_transactions_too(workshop: Workshop) -> None:
    def handler(_event: Any, ctx: Any) -> Any:
        def work(db: psycopg.Connection[Any]) -> int:
            db.execute("insert into ledger (job) values (%s)", [ctx.job.id])
            return 3

        number = ctx.transaction("book", work)
        if not ctx.job.attempt:
            raise ValueError("again")
        return number

    row = await finish(workshop, handler)
    assert row["result"] == 3
    assert await booked(workshop) == 1


async def test_rows_are_tuples_whatever_others_have_wanted(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> Any:
        async def one(db: Any) -> Any:
            found = await (await db.execute("select 1 as a")).fetchone()
            db.row_factory = dict_row
            return found

        return [await ctx.transaction("first", one), await ctx.transaction("second", one)]

    def in_a_thread(_event: Any, ctx: Any) -> Any:
        def one(db: Any) -> Any:
            found = db.execute("select 1 as a").fetchone()
            db.row_factory = dict_row
            return found

        return [ctx.transaction("first", one), ctx.transaction("second", one)]

    for each in (handler, in_a_thread):
        assert (await finish(workshop, each))["result"] == [[1], [1]]


async def test_threads_that_come_together_share_their_connections(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    """Each may have opened a pool, of which all but one stayed; closing complained of threads."""
    transactions = Transactions(workshop.queue.database.dsn, 1, lambda: 0, dead_after_s=8.0)
    together = threading.Barrier(5, timeout=20)
    step = StepWrite(0, 0, "one", 0, "transaction", b"null")

    def look(db: psycopg.Connection[Any]) -> bytes:
        counted = "select count(*) from pg_stat_activity where application_name = %s"
        found.append(db.execute(counted, ["conductor transactions"]).fetchone())
        return b"1"

    def come() -> None:
        together.wait()
        with pytest.raises(FenceLost):
            transactions.run_blocking(step, look)

    found: list[Any] = []
    often, seldom = 1e-6, sys.getswitchinterval()
    sys.setswitchinterval(often)
    try:
        await asyncio.gather(*(asyncio.to_thread(come) for _ in range(5)))
    finally:
        sys.setswitchinterval(seldom)
    await transactions.close()
    assert found == [(1,)] * 5
    assert "stop thread" not in caplog.text


async def test_a_connection_that_was_lost_meanwhile_costs_no_attempt(workshop: Workshop) -> None:
    """As after a restart of the server, in which no transaction was under way."""
    end = (
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where application_name = 'conductor transactions'"
    )

    async def handler(_event: Any, ctx: Any) -> None:
        await ctx.transaction("one", lambda db: book(db, ctx), returns=int)
        assert await workshop.queue.value(end)
        await ctx.transaction("two", lambda db: book(db, ctx), returns=int)

    def note(db: Any) -> None:
        db.execute("insert into ledger (job) values (0)")

    def blocking(_event: Any, ctx: Any) -> None:
        ctx.transaction("one", note)
        with psycopg.connect(workshop.queue.database.dsn) as connection:
            assert connection.execute(end).fetchall() == [(True,)]
        ctx.transaction("two", note)

    for each in (handler, blocking):
        row = await finish(workshop, each, max_attempts=1)
        assert row["state"] == "completed", row["error"]
    assert await booked(workshop) == 4


async def test_no_step_inside(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> Any:
        await ctx.transaction("book", lambda _: ctx.step("inner", lambda: 1), returns=int)

    row = await finish(workshop, handler)
    assert row["error"]["type"] == "StepMisplaced"


async def test_a_zombie_commits_nothing(workshop: Workshop) -> None:
    stopped = asyncio.Event()

    async def handler(_event: Any, ctx: Any) -> Any:
        async def work(db: Any) -> None:
            await book(db, ctx)
            await workshop.queue.rows("update conductor.jobs set fence = 7, worker = 0")

        try:
            await ctx.transaction("book", work, returns=None)
        finally:
            stopped.set()

    await workshop.invoke()
    async with workshop.worker([task(handler)]):
        await asyncio.wait_for(stopped.wait(), 60)
    assert await booked(workshop) == 0


async def test_a_zombie_thread_commits_nothing_and_begins_no_more(workshop: Workshop) -> None:
    stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def handler(_event: Any, ctx: Any) -> None:
        def work(db: psycopg.Connection[Any]) -> None:
            db.execute("insert into ledger (job) values (%s)", [ctx.job.id])
            with psycopg.connect(workshop.dsn) as other:
                other.execute("update conductor.jobs set fence = 7, worker = 0")

        with pytest.raises(FenceLost):
            ctx.transaction("book", work, returns=None)
        try:
            ctx.step("more", lambda: 1)
        except JobCancelled as error:
            loop.call_soon_threadsafe(stopped.set_result, type(error).__name__)

    job = await workshop.invoke()
    async with workshop.worker([task(handler)]):
        assert await asyncio.wait_for(stopped, 60) == "JobCancelled"
    assert await booked(workshop) == 0
    assert (await workshop.job(job))["state"] == "running"  # the other's, who has written nothing
    assert await workshop.queue.value("select count(*) from conductor.steps") == 0


@pytest.mark.parametrize("committed", [True, False])
async def test_a_commit_without_an_answer_is_looked_up(
    workshop: Workshop, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket is shut right before the COMMIT: for its answer, or for itself as well."""
    sockets: list[socket.socket] = []

    def check(step: Any, *, written: object) -> None:
        _check(step, written=written)
        if sockets[0].fileno() >= 0:
            sockets[0].shutdown(socket.SHUT_RD if committed else socket.SHUT_RDWR)
            sockets[0].close()

    monkeypatch.setattr("conductor.transactions._check", check)

    async def handler(_event: Any, ctx: Any) -> Any:
        async def work(db: Any) -> int:
            sockets.append(socket.socket(fileno=os.dup(db.fileno())))
            return await book(db, ctx)

        return await ctx.transaction("book", work)

    row = await finish(workshop, handler)
    for one in sockets:
        one.close()
    assert (row["state"], row["attempt"]) == ("completed", 0 if committed else 1)
    assert await booked(workshop) == 1


async def test_the_server_ends_an_idle_transaction(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.transactions.IDLE_SHARE", 1 / DEAD_AFTER_S)
    gone = "select not exists (select from pg_stat_activity where pid = %s)"
    ended: list[int] = []

    async def handler(_event: Any, ctx: Any) -> Any:
        async def work(db: Any) -> None:
            await book(db, ctx)
            if not ctx.job.attempt:
                await workshop.queue.until(gone, db.info.backend_pid)
                ended.append(db.info.backend_pid)

        await ctx.transaction("book", work, returns=None)

    row = await finish(workshop, handler)
    assert (row["state"], row["attempt"], len(ended)) == ("completed", 1, 1)
    assert await booked(workshop) == 1


@pytest.mark.parametrize(("transactions", "at_once"), [(None, 20), (3, 3), (30, 30)])
async def test_so_many_transactions_at_once(
    workshop: Workshop, transactions: int | None, at_once: int
) -> None:
    """A handler that finds no connection waits for one; nobody fails."""
    inside: set[int] = set()
    most = 0
    full = asyncio.Event()

    async def handler(_event: Any, ctx: Any) -> None:
        async def work(db: Any) -> None:
            nonlocal most
            inside.add(ctx.job.id)
            most = max(most, len(inside))
            if len(inside) == at_once:
                full.set()
            await full.wait()
            await book(db, ctx)
            inside.discard(ctx.job.id)

        await ctx.transaction("book", work, returns=None)

    jobs = await workshop.invoke_many({} for _ in range(45))
    async with workshop.worker([task(handler)], slots=40, transactions=transactions):
        await workshop.drained()
    assert most == at_once
    rows = await workshop.queue.rows("select outcome, attempt from conductor.history")
    assert [(row["outcome"], row["attempt"]) for row in rows] == [("completed", 0)] * len(jobs)
    assert await booked(workshop) == len(jobs)
