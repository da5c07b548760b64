from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest

from conductor import lease
from conductor.lease import Leases
from conductor.metrics import Metrics
from conductor.migrations import migrate
from conductor.store.leases import LeaseStore, Rescue, WorkerRow, WorkerStore
from conductor.store.sessions import connect, connect_blocking
from conductor.worker import claiming
from tests.integration.conftest import Queue, eventually
from tests.integration.workers import Workshop, task
from tests.servers import ScratchDatabase, StartServer
from tools.localpg.server import StopMode

pytestmark = pytest.mark.anyio

RESCUED_WITHIN_S = 10.0
DEAD_AFTER_S = 4.0  # of a quick watch; workers renew every 2 s
DEAD_SOON_S = 2.0  # where the worker dies as soon as it has begun


@pytest.fixture
def workshop(queue: Queue, metrics: Metrics) -> Workshop:
    return Workshop(queue, metrics)


@contextmanager
def process(
    dsn: str, dead_after_s: float = lease.DEAD_AFTER_S
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own."""
    command = [sys.executable, "-m", "tests.integration.crash_worker", dsn, str(dead_after_s)]
    with subprocess.Popen(command) as child:
        try:
            yield child
        finally:
            child.kill()


async def work(event: Any, ctx: Any) -> str:
    if event.payload["do"] == "step":
        await ctx.step("pid", lambda: "another")
    return "here"


@asynccontextmanager
async def watching(workshop: Workshop, **options: Any) -> AsyncIterator[None]:
    """A worker in this process that begins to watch the others now."""
    with Leases(workshop.dsn, dead_after_s=DEAD_AFTER_S) as leases:
        async with workshop.worker([task(work)], leases=leases, **options):
            yield


def test_jobs_of_a_dead_worker_run_elsewhere_in_time() -> None:
    """What is waited for at most: the standstill, a look at it, a look for suspects."""
    noticed_s = lease.DEAD_AFTER_S + lease.WATCH_INTERVAL_S
    claimed_s = max(claiming.SUSPECTS_INTERVAL_S, claiming.LONGEST_POLL_S)
    assert noticed_s + claimed_s < RESCUED_WITHIN_S


async def test_jobs_of_a_killed_worker_run_elsewhere(workshop: Workshop) -> None:
    jobs = await workshop.invoke_many({"do": "wait"} for _ in range(20))
    with process(workshop.dsn) as child:
        await workshop.queue.until(
            "select count(*) = 20 from conductor.jobs where state = 'running'"
        )
        async with watching(workshop, slots=50):
            child.send_signal(signal.SIGKILL)
            await workshop.drained()
            await workshop.queue.until("select count(*) = 1 from conductor.workers")
    rows = await workshop.queue.rows("select * from conductor.history order by id")
    assert [row["id"] for row in rows] == jobs
    assert {(row["outcome"], row["crashes"], row["attempt"], row["fence"]) for row in rows} == {
        ("completed", 1, 0, 2)
    }


async def test_a_frozen_worker_is_rescued_and_fenced(workshop: Workshop) -> None:
    job = await workshop.invoke({"do": "freeze"})
    with process(workshop.dsn):
        await workshop.queue.until("select state = 'running' from conductor.jobs")
        async with watching(workshop):
            row = await workshop.ended(job)
    assert (row["state"], row["result"], row["crashes"]) == ("completed", "here", 1)


async def test_a_poison_job_ends_as_crashed_and_takes_no_other_with_it(workshop: Workshop) -> None:
    poison = await workshop.invoke({"do": "die"})
    others = await workshop.invoke_many({"do": "return"} for _ in range(200))
    with Leases(workshop.dsn, dead_after_s=DEAD_SOON_S):
        for crashes in (1, 2, 3):
            with process(workshop.dsn, DEAD_SOON_S) as child:
                await asyncio.to_thread(child.wait, 60)
            assert child.returncode == -signal.SIGKILL
            if crashes < 3:
                await workshop.queue.until(
                    "select state = 'suspect' and crashes = %s from conductor.jobs where id = %s",
                    crashes,
                    poison,
                )
        row = await workshop.ended(poison)
        await workshop.queue.until("select count(*) = 0 from conductor.workers")
    assert (row["state"], row["crashes"], row["attempt"]) == ("failed", 3, 0)
    assert row["error"]["type"] == "WorkerCrashed"
    async with workshop.worker([task(work)]):
        await workshop.drained()
    rows = await workshop.queue.rows(
        "select outcome, max(crashes) as crashes, count(*) from conductor.history"
        " where id = any(%s) group by outcome",
        others,
    )
    assert [(row["outcome"], row["count"]) for row in rows] == [("completed", 200)]
    assert rows[0]["crashes"] < 3


async def test_twice_crashed_jobs_run_one_at_a_time(workshop: Workshop) -> None:
    together, most = 0, 0

    async def handler(_event: Any, _ctx: Any) -> None:
        nonlocal together, most
        together += 1
        most = max(most, together)
        await asyncio.sleep(0.02)
        together -= 1

    await workshop.invoke_many([{}] * 10, state="suspect", crashes=2)
    async with workshop.worker([task(handler)]):
        await workshop.drained()
    assert most == 1


async def test_a_finished_step_is_not_run_again_after_a_crash(workshop: Workshop) -> None:
    job = await workshop.invoke({"do": "step"})
    with process(workshop.dsn) as child, Leases(workshop.dsn, dead_after_s=DEAD_AFTER_S) as leases:
        await workshop.queue.until("select count(*) = 1 from conductor.steps")
        child.kill()

        async def handler(_event: Any, ctx: Any) -> Any:
            return await ctx.step("pid", lambda: 0)

        async with workshop.worker([task(handler)], leases=leases):
            row = await workshop.ended(job)
    assert row["result"] == child.pid
    assert await workshop.queue.value("select count(*) from conductor.steps") == 0


async def test_a_worker_declared_dead_stops_and_starts_over(
    workshop: Workshop, metrics: Metrics
) -> None:
    stopped = asyncio.Event()
    runs: list[int] = []

    async def handler(_event: Any, ctx: Any) -> str:
        runs.append(ctx.job.fence)
        if len(runs) == 1:
            try:
                await asyncio.sleep(60)
            finally:
                stopped.set()
        return "second"

    job = await workshop.invoke()
    async with workshop.worker([task(handler)]) as worker:
        await eventually(lambda: _is(bool(runs)))
        first = worker.id
        await workshop.queue.rows("update conductor.workers set renewals = -1")
        await asyncio.wait_for(stopped.wait(), 60)
        row = await workshop.ended(job)
        assert worker.id != first
    assert (row["result"], row["crashes"], row["fence"]) == ("second", 1, 2)
    assert metrics.registry.get_sample_value(
        "conductor_leases_lost_total", {"queue": "default"}
    ) == 1  # fmt: skip


async def _is(value: bool) -> bool:
    return value


async def test_an_outage_of_the_database_kills_nobody(
    start_server: StartServer, metrics: Metrics
) -> None:
    release = asyncio.Event()
    runs: Counter[int] = Counter()

    async def handler(_event: Any, ctx: Any) -> None:
        runs[ctx.job.id] += 1
        await release.wait()

    server = start_server(durable=True)
    dsn = server.dsn()
    migrate(dsn)
    queue = Queue(ScratchDatabase("postgres", dsn, dsn, dsn))
    shop = Workshop(queue, metrics)
    jobs = await shop.invoke_many({} for _ in range(20))
    with (
        Leases(dsn, dead_after_s=DEAD_AFTER_S) as one,
        Leases(dsn, dead_after_s=DEAD_AFTER_S) as other,
    ):
        async with (
            shop.worker([task(handler)], leases=one, slots=10),
            shop.worker([task(handler)], leases=other, slots=10),
        ):
            await queue.until("select count(*) = 20 from conductor.jobs where state = 'running'")
            await asyncio.to_thread(server.stop, StopMode.IMMEDIATE)
            await asyncio.sleep(DEAD_AFTER_S + 1)
            await asyncio.to_thread(server.start)
            await asyncio.sleep(DEAD_AFTER_S / 2)
            release.set()
            await queue.until("select count(*) = 0 from conductor.jobs")
    rows = await queue.rows(
        "select outcome, crashes, fence, count(*) from conductor.history group by 1, 2, 3"
    )
    assert rows == [{"outcome": "completed", "crashes": 0, "fence": 1, "count": 20}]
    assert runs == Counter(dict.fromkeys(jobs, 1))
    await queue.close()


# --- who is dead --------------------------------------------------------------------------------


@pytest.fixture
async def member(queue: Queue) -> AsyncIterator[int]:
    """A worker that nobody renews."""
    async with await connect(queue.database.dsn, "member") as connection:
        row = WorkerRow("app", None, "q", ["t"], "host", 1, 10)
        yield await WorkerStore(connection).register(row)


@pytest.fixture
def store(queue: Queue) -> Iterator[LeaseStore]:
    with connect_blocking(queue.database.dsn, "rescuer") as connection:
        yield LeaseStore(connection)


async def run_jobs(queue: Queue, worker: int, crashes: list[int]) -> list[int]:
    return await queue.column(
        "insert into conductor.jobs (queue, task, payload, state, worker, fence, crashes)"
        " select 'q', 't', '{}', 'running', %s, 1, c from unnest(%s::int[]) c returning id",
        worker,
        crashes,
    )


async def test_only_a_worker_that_stood_still_can_be_declared_dead(
    queue: Queue, member: int, store: LeaseStore
) -> None:
    assert store.renew([member, 999]) == {member}
    assert not store.declare_dead(member, 0)
    assert store.declare_dead(member, 1)
    assert not store.declare_dead(member, 1)
    assert store.renew([member]) == set()
    assert store.watch() == {member: -1}


async def test_a_claiming_worker_cannot_be_declared_dead(
    queue: Queue, member: int, store: LeaseStore
) -> None:
    with psycopg.connect(queue.database.dsn) as claiming:
        claiming.execute("select from conductor.workers where id = %s for share", [member])
        assert not store.declare_dead(member, 0)
    assert store.declare_dead(member, 0)


async def test_rescue_is_bounded_skips_locked_rows_and_counts_crashes(
    queue: Queue, member: int, store: LeaseStore
) -> None:
    one, two, three, four = await run_jobs(queue, member, [0, 1, 2, 0])
    store.declare_dead(member, 0)
    with psycopg.connect(queue.database.dsn) as other:
        other.execute("select from conductor.jobs where id = %s for update", [one])
        crashed = {("q", "t", "failed"): 1}
        assert store.rescue(member, limit=2, max_crashes=3) == Rescue(1, crashed)
        assert store.rescue(member, limit=2, max_crashes=3) == Rescue(1, {})
        assert store.rescue(member, limit=2, max_crashes=3) == Rescue(0, {})
        assert not store.bury(member)
    assert store.rescue(member, limit=2, max_crashes=3) == Rescue(1, {})
    assert store.bury(member)
    rows = await queue.rows("select id, state, crashes, worker from conductor.job order by id")
    assert [(row["id"], row["state"], row["crashes"], row["worker"]) for row in rows] == [
        (one, "suspect", 1, None),
        (two, "suspect", 2, None),
        (three, "failed", 3, None),
        (four, "suspect", 1, None),
    ]
    (ended,) = await queue.rows("select error from conductor.history")
    assert ended["error"]["message"] == "3 processes died while they ran this job"


async def test_a_rescue_that_was_cut_short_is_finished_by_another(
    queue: Queue, member: int
) -> None:
    await run_jobs(queue, member, [0] * 5)
    await queue.rows("update conductor.workers set renewals = -1")
    rescued: list[Rescue] = []
    with Leases(queue.database.dsn, on_rescue=rescued.append, dead_after_s=3600):
        await queue.until("select count(*) = 0 from conductor.workers")
    assert rescued == [Rescue(5, {})]


async def test_a_job_to_be_cancelled_is_not_rescued(
    queue: Queue, member: int, store: LeaseStore
) -> None:
    (job,) = await run_jobs(queue, member, [0])
    await queue.value("select conductor.cancel(%s, 'enough')", job)
    store.declare_dead(member, 0)
    taken = store.rescue(member, limit=2, max_crashes=3)
    assert list(taken.ended) == [("q", "t", "cancelled")]
    (ended,) = await queue.rows("select outcome, error from conductor.history")
    assert (ended["outcome"], ended["error"]["type"]) == ("cancelled", "JobCancelled")
    assert ended["error"]["message"] == "enough"
    assert store.bury(member)
