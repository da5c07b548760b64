"""What happens to workers and their server, whatever they were at: each step once, nothing lost.

Through the public API, on workers in processes of their own.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from conductor import Conductor, JobHandle
from conductor.errors import DatabaseUnavailable, JobFailed
from conductor.migrations import migrate
from conductor.sql import load
from tests.e2e.durable_worker import TABLES, WAITS, Go, create, fault, freeze, go, rest
from tests.e2e.severing_proxy import Loss, SeveringProxy
from tests.e2e.worker_processes import Workers
from tests.integration.conftest import Queue, eventually
from tests.integration.sidecar import drop_slot, running
from tests.servers import ScratchDatabase, StartServer
from tools.localpg.server import StopMode

pytestmark = [pytest.mark.anyio, pytest.mark.pg(18)]

MODULE = "tests.e2e.durable_worker"
SETTLING = load("jobs")["finish_jobs"].splitlines()[0]  # the statement's first line


class Site:
    """A queue with the application of `tests.e2e.durable_worker`."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.client: Conductor[None] = create(queue.database.dsn)

    def workers(self, count: int) -> Workers:
        return Workers(MODULE, self.queue.database.dsn, count)

    async def rest(self, *waits: str) -> list[JobHandle[str]]:
        """Start a job for each kind of wait; return when all wait."""
        handles = [await self.client.invoke(rest, wait) for wait in waits]
        children = sum(wait == "child" for wait in waits)
        await self.queue.until(
            "select count(*) = %s from conductor.jobs where state in ('waiting', 'scheduled')",
            len(waits) + children,
            within_s=60,
        )
        return handles

    async def bring(self, handles: list[JobHandle[str]]) -> None:
        """Bring to each job what it waits for."""
        await self.client.emit_many(go, [Go(job=handle.id) for handle in handles])
        for handle in handles:
            await self.queue.rows("insert into signals (job) values (%s)", handle.id)

    async def counts(self, table: str) -> Counter[tuple[int, str]]:
        rows = await self.queue.rows(f"select job, name from {table}")
        return Counter((row["job"], row["name"]) for row in rows)

    async def answers(self) -> bool:
        try:
            return bool(await self.queue.value("select true"))
        except DatabaseUnavailable:
            return False

    async def nothing_is_left(self) -> None:
        for table in ("jobs", "steps", "wakeups"):
            assert await self.queue.value(f"select count(*) from conductor.{table}") == 0
        twice = "select count(*) - count(distinct id) from conductor.history"
        assert await self.queue.value(twice) == 0


@pytest.fixture
async def site(migrated: ScratchDatabase) -> AsyncIterator[Site]:
    site = Site(Queue(migrated))
    await site.queue.rows(TABLES)
    yield site
    await site.client.close()
    await site.queue.close()


def once(handles: list[JobHandle[Any]], *names: str) -> Counter[tuple[int, str]]:
    return Counter((handle.id, name) for handle in handles for name in names)


async def is_true(value: object) -> bool:
    return bool(value)


async def test_workers_are_killed_while_jobs_wait(site: Site) -> None:
    async with running(site.queue.database), site.workers(2).running() as workers:
        captured = "select count(*) = 1 from conductor.activations where start_lsn is not null"
        await site.queue.until(captured, within_s=60)
        handles = await site.rest(*WAITS)
        for process in list(workers.processes):
            process.kill()
        await site.bring(handles)
        assert [await handle.result(timeout_s=60) for handle in handles] == list(WAITS)
        await site.queue.until("select count(*) = 0 from conductor.jobs")
    drop_slot(site.queue.database)
    assert await site.counts("effects") == once(handles, "before", "after")
    assert await site.counts("traces") == once(handles, "before")
    await site.nothing_is_left()


async def test_the_server_restarts_while_jobs_wait_and_run(start_server: StartServer) -> None:
    server = start_server(durable=True)
    dsn = server.dsn()
    migrate(dsn)
    own = Site(Queue(ScratchDatabase("postgres", dsn, dsn, dsn)))
    await own.queue.rows(TABLES)
    waits = ["event", "child", "sleep"] * 5
    async with own.workers(2).running() as workers:
        waiting = await own.rest(*waits)
        lingering = [await own.client.invoke(fault, "linger") for _ in range(5)]
        await own.queue.until("select count(*) = 5 from deaths")
        await asyncio.to_thread(server.stop, StopMode.IMMEDIATE)
        await asyncio.to_thread(server.start)
        await eventually(own.answers)
        for handle in lingering:
            await own.queue.rows("insert into deaths values (%s)", f"over {handle.id}")
        await own.bring(waiting)
        assert [await handle.result(timeout_s=60) for handle in waiting] == waits
        for handle in lingering:
            await handle.result(timeout_s=60)
        await own.queue.until("select count(*) = 0 from conductor.jobs")
        assert workers.started == 2
    crashes = await own.queue.value("select sum(crashes) from conductor.history")
    assert crashes == 0
    effects = once(waiting, "before", "after") + once(lingering, "book")
    assert await own.counts("effects") == effects
    assert await own.counts("traces") == once(waiting, "before") + once(
        lingering, "before", "after"
    )
    await own.nothing_is_left()
    await own.client.close()
    await own.queue.close()


@pytest.mark.parametrize("how", ["SIGSTOP", "the interpreter's lock"])
async def test_a_worker_that_froze_longer_than_its_lease_is_fenced(site: Site, how: str) -> None:
    paused = how == "SIGSTOP"
    async with site.workers(2).running() as workers:
        await eventually(lambda: is_true(len(workers.processes) == 2))
        both = "select count(*) = 2 from conductor.workers where renewals > 0"
        await site.queue.until(both, within_s=60)
        invoke = site.client.invoke
        handle = await (invoke(fault, "linger") if paused else invoke(freeze))
        await site.queue.until("select count(*) = 1 from deaths")
        pid = await site.queue.value(
            "select w.pid from conductor.jobs j join conductor.workers w on w.id = j.worker"
        )
        frozen = next(process for process in workers.processes if process.pid == pid)
        if paused:
            frozen.send_signal(signal.SIGSTOP)
        assert await handle.result(timeout_s=60) != pid
        if paused:
            await site.queue.rows("insert into deaths values (%s)", f"over {handle.id}")
            frozen.send_signal(signal.SIGCONT)
        fresh = "select exists (select from conductor.workers where pid = %s and renewals >= 0)"
        await site.queue.until(fresh, pid)  # it has come to, and starts over under another id
        again = await site.client.invoke(fault, "nothing")
        await again.result(timeout_s=60)
        assert workers.started == 2
    assert await site.counts("effects") == once([handle, again], "book")
    assert await site.counts("traces") == once([handle, again], "before", "after")
    rows = await site.queue.rows("select id, outcome, crashes from conductor.history order by id")
    assert [tuple(row.values()) for row in rows] == [
        (handle.id, "completed", 1),
        (again.id, "completed", 0),
    ]
    await site.nothing_is_left()


@pytest.mark.parametrize("then", ["it is killed", "the connection breaks"])
@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_between_a_settle_and_the_reply_to_it(site: Site, lost: Loss, then: str) -> None:
    """The worker has sent how a job has ended and never learns whether that was heard."""
    killed = then == "it is killed"
    async with (
        SeveringProxy(site.queue.database.dsn).running() as proxy,
        Workers(MODULE, proxy.dsn, 1).running() as workers,
    ):
        handle = await site.client.invoke(fault, "linger")
        await site.queue.until("select count(*) = 1 from deaths", within_s=60)
        proxy.watch(SETTLING, lost)
        await site.queue.rows("insert into deaths values (%s)", f"over {handle.id}")
        await asyncio.wait_for(proxy.severed.wait(), 30)
        if lost == "reply":
            await site.queue.until("select count(*) = 1 from conductor.history")
        else:
            assert await site.queue.value("select count(*) from conductor.history") == 0
        if killed:
            workers.processes[0].kill()
        else:
            proxy.hang_up()
        await handle.result(timeout_s=60)
        again = await site.client.invoke(fault, "nothing")
        await again.result(timeout_s=60)
        assert workers.started == (2 if killed else 1)
    assert await site.counts("effects") == once([handle, again], "book")
    assert await site.counts("traces") == once([handle, again], "before", "after")
    rows = await site.queue.rows("select id, outcome, crashes from conductor.history order by id")
    assert [tuple(row.values()) for row in rows] == [
        (handle.id, "completed", int(killed and lost == "request")),
        (again.id, "completed", 0),
    ]
    await site.nothing_is_left()


async def test_a_payload_that_kills_its_process_takes_nothing_with_it(site: Site) -> None:
    others = [await site.client.invoke(fault, "nothing") for _ in range(40)]
    poison = await site.client.invoke(fault, "poison")
    more = [await site.client.invoke(fault, "nothing") for _ in range(40)]
    async with site.workers(2).running() as workers:
        with pytest.raises(JobFailed, match="WorkerCrashed"):
            await poison.result(timeout_s=60)
        for handle in (*others, *more):
            await handle.result(timeout_s=60)
        assert workers.started >= 5
    ended = await site.queue.rows("select * from conductor.history where id = %s", poison.id)
    assert [(row["crashes"], row["attempt"]) for row in ended] == [(3, 0)]
    assert await site.counts("effects") == once([*others, *more], "book")
    before = await site.counts("traces")
    assert before[poison.id, "before"] == 1
    await site.nothing_is_left()
