"""A rolling deploy and a rollback under traffic: each change routed once, and run by who can.

Two versions of an application, each a process, beside a sidecar that stays.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import psycopg
import pytest

from tests.e2e.versioned_worker import TABLES, create, go
from tests.integration.conftest import Queue, eventually
from tests.integration.sidecar import drop_slot, running
from tests.servers import ScratchDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.pg(18), pytest.mark.timeout(600)]

A_WHILE = 40  # orders
WAITING = (1, 2, 3)

CAPTURED = """
select count(*) = %s from conductor.subscriptions s
join conductor.activations a on a.subscription = s.id
where s.version = %s and a.start_lsn is not null and s.retired_at is null and a.end_lsn is null
"""


LEFT = """
select count(*) = 0 from conductor.jobs
where task = any(%s) and version = coalesce(%s, version)
"""


@pytest.fixture
async def queue(migrated: ScratchDatabase) -> AsyncIterator[Queue]:
    queue = Queue(migrated)
    yield queue
    await queue.close()


class Traffic:
    """Orders that are placed, and now and then deleted, by the phase in which that was."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.phase = ""
        self.placed: defaultdict[str, list[int]] = defaultdict(list)
        self.deleted: defaultdict[str, list[int]] = defaultdict(list)
        self.count = 0
        self._writing = asyncio.Lock()

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        flow = asyncio.create_task(self._flow())
        try:
            yield
        finally:
            flow.cancel()
            await asyncio.gather(flow, return_exceptions=True)

    async def pass_by(self, phase: str) -> None:
        """Return after some orders of a phase that begins now."""
        await self._settled()
        self.phase = phase
        await eventually(lambda: self._has(len(self.placed[phase]) >= A_WHILE), within_s=60)
        await self._settled()
        self.phase = f"after {phase}"

    async def _has(self, found: object) -> bool:
        return bool(found)

    async def _settled(self) -> None:
        """Return when what was begun under this phase is committed."""
        async with self._writing:
            pass

    async def _flow(self) -> None:
        async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as connection:
            while True:
                async with self._writing:
                    self.count += 1
                    await connection.execute(
                        "insert into orders values (%s, 'lamp', 'x')", [self.count]
                    )
                    self.placed[self.phase].append(self.count)
                    if self.count % 4 == 0:
                        gone = self.count - 2
                        await connection.execute("delete from orders where id = %s", [gone])
                        self.deleted[self.phase].append(gone)
                await asyncio.sleep(0.01)


class Version:
    """A process of a version; it drains when it is stopped."""

    def __init__(self, queue: Queue, number: str, subscriptions: int) -> None:
        self._queue, self._number, self._subscriptions = queue, number, subscriptions
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it; return when it has taken over."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.e2e.versioned_worker",
            self._queue.database.dsn,
            self._number,
        )
        await self._queue.until(CAPTURED, self._subscriptions, self._number, within_s=60)

    async def stop(self) -> None:
        """Stop it, and see that it ends well."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(self._process.wait(), 60) == 0

    async def kill(self) -> None:
        """See that it does not outlive the test."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def deploy_and_roll_back(queue: Queue, traffic: Traffic, stack: AsyncExitStack) -> None:
    async def start(number: str, subscriptions: int) -> Version:
        version = Version(queue, number, subscriptions)
        stack.push_async_callback(version.kill)
        await version.start()
        return version

    one = await start("1", 3)
    async with traffic.flowing():
        await traffic.pass_by("one")
        two = await start("2", 4)
        await traffic.pass_by("one and two")
        await one.stop()
        await traffic.pass_by("two")
        one = await start("1", 3)
        await traffic.pass_by("back to one, and two")
        await queue.until(LEFT, ["pack"], "2", within_s=60)  # what only that version can run
        await two.stop()
        await traffic.pass_by("one again")
    client = create(queue.database.dsn, "1")
    await client.emit(go, 0)
    await client.close()
    await queue.until(LEFT, ["pack", "old", "slow"], None, within_s=60)
    await one.stop()


async def test_a_rolling_deploy_and_a_rollback(queue: Queue) -> None:
    await queue.rows(TABLES)
    traffic = Traffic(queue.database.dsn)
    async with AsyncExitStack() as stack, running(queue.database):
        await deploy_and_roll_back(queue, traffic, stack)
    drop_slot(queue.database)
    await judge(queue, traffic)


async def judge(queue: Queue, traffic: Traffic) -> None:
    every = Counter(range(1, traffic.count + 1))
    seen = await queue.rows("select * from seen")
    ids: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for row in seen:
        ids[row["task"]][row["id"]] += 1
    assert ids["pack insert"] == every
    assert ids["old"] == every
    assert ids["slow 1"] + ids["slow 2"] == every
    # (what the second version alone had is routed on, in case it comes back: nobody runs it)
    waiting = await queue.column(
        "select (payload -> 'new' ->> 'id')::bigint from conductor.jobs where task = 'new'"
    )
    judge_part(ids["new"] + Counter(waiting), traffic.placed, {"one and two", "two"}, on=True)
    judge_part(ids["pack delete"], traffic.deleted, {"one and two", "two"}, on=False)
    routed_for = {
        (row["task"], row["id"]): row["routed_for"] for row in seen if row["task"] != "new"
    }
    for phase, newest in (("one", "1"), ("one and two", "2"), ("two", "2"), ("one again", "1")):
        for order in traffic.placed[phase]:
            assert routed_for["pack insert", order] == newest, (phase, order)
    for row in seen:
        if row["task"].startswith("slow"):  # finished by who has begun it
            assert row["task"] == f"slow {row['code']}" == f"slow {row['run_by']}"
        elif row["task"] == "pack delete":
            assert row["run_by"] == "2"
    assert {row["code"] for row in seen if row["id"] in WAITING and "slow" in row["task"]} == {"1"}
    outcomes = await queue.column("select distinct outcome::text from conductor.history")
    assert outcomes == ["completed"]
    kept = "select count(*) from conductor.history where task = 'slow' and code is null"
    assert await queue.value(kept) == 0


def judge_part(
    found: Counter[int], made: dict[str, list[int]], phases: set[str], *, on: bool
) -> None:
    """What was made in these phases is there once; in phases before never; between at most once.

    ``on``: from then on always.
    """
    order = ["one", "one and two", "two", "back to one, and two", "one again"]
    assert not found or max(found.values()) == 1
    for phase in order:
        expected = phase in phases or (on and order.index(phase) > 0)
        for number in made[phase]:
            assert found[number] == int(expected), (phase, number)
