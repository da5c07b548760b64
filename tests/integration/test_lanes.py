"""Jobs of an ordered task: one at a time for each key, in order, whatever becomes of them."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import psycopg
import pytest

from cdc.sink import Batch, Sink
from conductor import Conductor, Context, Cron, Invocation, OnChange, Orchestrator, define_task
from conductor.contract import JobSpec, encode_head, encode_position
from conductor.definitions import Task
from conductor.errors import OptionInvalid
from conductor.gauges import Gauges
from conductor.maintenance import Maintenance
from conductor.metrics import HALTED_LANES, Metrics
from conductor.retry import RetryPolicy
from conductor.store.jobs import OFFER_BATCH, Claim, JobStore
from conductor.store.operations import OperationStore
from tests.integration.conftest import Queue
from tests.integration.lane_worker import application, note
from tests.integration.sidecar import drop_slot, running
from tests.integration.workers import AT_ONCE, Workshop

pytestmark = pytest.mark.anyio

work = define_task("work", payload=Any, returns=Any, ordered=True)
NEVER = RetryPolicy(initial_s=3600, max_s=3600, jitter=0)


class Yard(Workshop):
    """A workshop whose task is ordered."""

    def __init__(self, queue: Queue, metrics: Metrics) -> None:
        super().__init__(queue, metrics)
        self.app = Conductor(queue.database.dsn, tasks=[work])
        self.ran: list[Any] = []

    def task(self, handler: Callable[..., Any], **options: Any) -> Task[Any, Any]:
        options = {"retry": AT_ONCE, **options}
        bound: Task[Any, Any] = Conductor(self.dsn, tasks=[work]).task(work, **options)(handler)
        return bound

    async def register(self, handler: Callable[..., Any], **options: Any) -> Task[Any, Any]:
        """Store the task, as an orchestrator does when it starts."""
        bound = self.task(handler, **options)
        app = Conductor(self.dsn, tasks=[work])
        app.tasks[bound.name] = bound
        async with Orchestrator(app):
            pass
        return bound

    async def put(self, key: str, *payloads: Any) -> list[int]:
        handles = await self.app.invoke_many(work, payloads, keys=[key] * len(payloads))
        return [handle.id for handle in handles]

    async def note(self, event: Invocation[Any], _ctx: Context[None]) -> None:
        self.ran.append(event.payload)

    async def states(self) -> list[tuple[int, str]]:
        rows = await self.queue.rows("select id, state::text from conductor.jobs order by id")
        return [(row["id"], row["state"]) for row in rows]


@pytest.fixture
async def yard(queue: Queue, metrics: Metrics) -> AsyncIterator[Yard]:
    yard = Yard(queue, metrics)
    yield yard
    await yard.app.close()


async def test_many_workers_run_each_key_in_order_and_alone(yard: Yard) -> None:
    violations: list[str] = []  # an assertion in the handler would only be retried
    running_keys: set[str] = set()
    last_ended: dict[str, int] = defaultdict(int)
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)

    async def handler(event: Invocation[Any], ctx: Context[None]) -> None:
        key, number = ctx.job.key or "", event.payload
        if key in running_keys or last_ended[key] != number - 1:
            violations.append(f"{key}: {number}, after {last_ended[key]}, beside {running_keys}")
        running_keys.add(key)
        try:
            await asyncio.sleep(chance.random() / 500)
            if chance.random() < 0.2:
                raise RuntimeError("for once")
        finally:
            running_keys.discard(key)
        if chance.random() < 0.2:
            await ctx.sleep("nap", 0.005)
        last_ended[key] = number

    counts: dict[str, int] = defaultdict(int)

    async def invoke() -> None:
        for _ in range(20):
            keys = [f"key-{chance.randrange(7)}" for _ in range(chance.randrange(1, 8))]
            numbers = []
            for key in keys:
                counts[key] += 1
                numbers.append(counts[key])
            await yard.app.invoke_many(work, numbers, keys=keys)

    bound = yard.task(handler, max_attempts=1000)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(yard.worker([bound], slots=5))
        await invoke()
        await yard.drained()
    assert not violations, f"seed {seed}"
    assert last_ended == counts
    assert await yard.queue.value("select bool_and(outcome = 'completed') from conductor.history")


async def test_inserts_race_with_ends_and_no_lane_stands_still(yard: Yard) -> None:
    """Each job comes while the one before it ends: the worst moment for a lost call."""
    bound = yard.task(yard.note)

    async def invoke(number: int) -> None:
        for _ in range(100):
            await yard.put(f"key-{number % 3}", number)

    async with yard.worker([bound]), yard.worker([bound]):
        await asyncio.gather(*(invoke(number) for number in range(8)))
        await yard.drained()
    assert len(yard.ran) == 800


@contextmanager
def process(dsn: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.integration.lane_worker", dsn]
    with subprocess.Popen(command) as child:
        try:
            yield child
        finally:
            child.kill()


async def test_a_killed_worker_breaks_no_order_and_repeats_nothing(queue: Queue) -> None:
    for table in ("began", "ended"):
        await queue.rows(
            f"create table {table} (id serial, key text, number int, pid int, unique (key, number))"
        )
    async with application(queue.database.dsn) as app:
        numbers = [number for number in range(60) for _ in range(4)]
        keys = [f"key-{n % 4}" for n in range(240)]
        with process(queue.database.dsn) as doomed, process(queue.database.dsn):
            await queue.until("select count(*) = 2 from conductor.workers")
            await app.invoke_many(note, numbers, keys=keys)
            await queue.until("select count(*) > 20 from ended")
            await queue.until(
                "select exists (select from began b where pid = %s and not exists"
                " (select from ended e where (e.key, e.number) = (b.key, b.number)))",
                doomed.pid,
            )
            doomed.send_signal(signal.SIGKILL)
            await queue.until("select count(*) = 0 from conductor.jobs")
    for table in ("began", "ended"):
        rows = await queue.rows(
            f"select key, array_agg(number order by id) as numbers from {table} group by key"
        )
        assert {row["key"]: row["numbers"] for row in rows} == {
            f"key-{n}": list(range(60)) for n in range(4)
        }
    assert await queue.value("select bool_or(crashes > 0) from conductor.history")
    assert await queue.value("select bool_and(outcome = 'completed') from conductor.history")


@pytest.mark.parametrize("count", [3, 600], ids=["one by one", "by COPY"])
async def test_the_first_of_a_key_has_its_turn_and_the_others_wait(yard: Yard, count: int) -> None:
    jobs = await yard.put("a", *range(count))
    assert {state for _, state in await yard.states()} == {"parked"}
    await yard.queue.rows("select conductor.offer_heads('default', 10)")
    assert [job for job, state in await yard.states() if state != "parked"] == [jobs[0]]
    await yard.queue.rows("select conductor.offer_heads('default', 10)")  # nothing was called for
    await yard.put("a", count)
    await yard.queue.rows("select conductor.offer_heads('default', 10)")
    assert [job for job, state in await yard.states() if state != "parked"] == [jobs[0]]
    async with yard.worker([yard.task(yard.note)]):
        await yard.drained()
    assert yard.ran == list(range(count + 1))


async def test_the_database_allows_no_second_active_job_of_a_key(yard: Yard) -> None:
    await yard.put("a", 1, 2)
    with pytest.raises(psycopg.errors.UniqueViolation):
        await yard.queue.rows("update conductor.jobs set state = 'ready'")


async def test_a_job_between_attempts_keeps_its_key(yard: Yard) -> None:
    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        if event.payload == "fails":
            raise ValueError("again later")
        yard.ran.append(event.payload)

    first, second = await yard.put("a", "fails", "waits")
    await yard.put("b", "free")
    async with yard.worker([yard.task(handler, retry=NEVER)]):
        await yard.queue.until("select count(*) = 1 from conductor.history")
        await yard.queue.until("select count(*) = 1 from conductor.jobs where state = 'scheduled'")
        await yard.put("a", "waits too")
        assert yard.ran == ["free"]
        assert (await yard.states())[:2] == [(first, "scheduled"), (second, "parked")]
        await yard.queue.until("select count(*) = 0 from conductor.lane_calls")
        assert await yard.app.cancel(first)
        await yard.drained()
    assert yard.ran == ["free", "waits", "waits too"]


async def test_a_failed_job_frees_its_key_unless_the_lane_halts(yard: Yard) -> None:
    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        if event.payload == "fails":
            raise ValueError("for good")
        yard.ran.append(event.payload)

    await yard.put("a", "fails", "next")
    async with yard.worker([await yard.register(handler, max_attempts=1)]):
        await yard.drained()
    assert yard.ran == ["next"]

    halting = await yard.register(handler, max_attempts=1, on_failure="halt")
    await yard.put("a", 1, "fails", 2, 3)
    await yard.put("b", "other")
    async with yard.worker([halting]):
        await yard.queue.until("select count(*) = 1 from conductor.halted_lanes")
        await yard.queue.until("select count(*) = 2 from conductor.jobs")
        await yard.put("a", 4)
        await yard.put("b", "another")
        await yard.queue.until("select count(*) = 3 from conductor.jobs")
    assert set(yard.ran[1:]) == {1, "other", "another"}
    assert {state for _, state in await yard.states()} == {"parked"}


async def halted(yard: Yard) -> tuple[Task[Any, Any], int]:
    """A lane that job ``2`` has halted, with ``3`` and ``4`` behind it; it would now succeed."""
    broken = True

    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        if event.payload == 2 and broken:
            raise ValueError("for good")
        yard.ran.append(event.payload)

    bound = await yard.register(handler, max_attempts=1, on_failure="halt")
    jobs = await yard.put("a", 1, 2, 3, 4)
    async with yard.worker([bound]):
        await yard.queue.until("select count(*) = 1 from conductor.halted_lanes")
    broken = False
    return bound, jobs[1]


async def test_a_halted_lane_goes_on_with_the_job_that_failed(yard: Yard) -> None:
    bound, failed = await halted(yard)
    async with yard.queue.connections.lend() as connection:
        store = OperationStore(connection)
        (shown,) = await store.halted_lanes("work", 5)
        assert (shown["key"], shown["job"], shown["parked"]) == ("a", failed, 2)
        assert await store.count_halted_lanes(10) == {"default": 1, "conductor.internal": 0}
        assert await store.retry_job(failed, {})
    async with yard.worker([bound]):
        await yard.drained()
    assert yard.ran == [1, 2, 3, 4]
    assert await yard.queue.value("select count(*) from conductor.halted_lanes") == 0


async def test_a_halted_lane_goes_on_without_it(yard: Yard) -> None:
    bound, _ = await halted(yard)
    async with yard.queue.connections.lend() as connection:
        store = OperationStore(connection)
        assert not await store.resume_lane("work", "b")
        assert await store.resume_lane("work", "a")
    async with yard.worker([bound]):
        await yard.drained()
    assert yard.ran == [1, 3, 4]


async def test_a_retried_job_of_a_lane_that_went_on_stands_at_its_end(yard: Yard) -> None:
    broken = True

    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        if event.payload == 1 and broken:
            raise ValueError("for good")
        yard.ran.append(event.payload)

    bound = await yard.register(handler, max_attempts=1)
    failed, _ = await yard.put("a", 1, 2)
    async with yard.worker([bound]):
        await yard.drained()
    broken = False
    await yard.put("a", 3)
    async with yard.queue.connections.lend() as connection:
        assert await OperationStore(connection).retry_job(failed, {})
    async with yard.worker([bound]):
        await yard.drained()
    assert yard.ran == [2, 3, 1]


async def test_cancelled_jobs_leave_their_lane(yard: Yard) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        if event.payload == "runs":
            started.set()
            await release.wait()
        yard.ran.append(event.payload)

    running_job, parked, _ = await yard.put("a", "runs", "parked", "last")
    async with yard.worker([yard.task(handler)]):
        await started.wait()
        assert await yard.app.cancel(parked)
        assert await yard.app.cancel(running_job)
        await yard.drained()
    assert yard.ran == ["last"]
    outcomes = await yard.queue.column("select outcome::text from conductor.history order by id")
    assert outcomes == ["cancelled", "cancelled", "completed"]


async def test_a_first_that_somebody_holds_locked_is_looked_at_again(yard: Yard) -> None:
    first, second = await yard.put("a", 1, 2)
    with psycopg.connect(yard.dsn) as canceller:
        canceller.execute("select conductor.cancel(%s)", [first])
        assert await yard.queue.value("select conductor.offer_heads('default', 10)") == 1
        assert {state for _, state in await yard.states()} == {"parked"}
        canceller.commit()
    assert await yard.queue.value("select conductor.offer_heads('default', 10)") == 0
    assert await yard.states() == [(second, "ready")]


async def test_a_job_that_dies_for_the_last_time_frees_its_key(yard: Yard) -> None:
    await yard.put("a", 1, 2)
    await yard.queue.rows("select conductor.offer_heads('default', 10)")
    await yard.queue.rows(
        "insert into conductor.workers (app, queue, tasks, host, pid, slots, renewals)"
        " values ('a', 'default', '{}', 'h', 1, 1, -1)"
    )
    await yard.queue.rows(
        "update conductor.jobs set state = 'running', crashes = 2,"
        " worker = (select id from conductor.workers) where state = 'ready'"
    )
    async with yard.worker([yard.task(yard.note)]):
        await yard.drained()
    assert yard.ran == [2]


async def test_a_zombies_late_settle_frees_nothing(yard: Yard) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        started.set()
        await release.wait()

    first, second = await yard.put("a", 1, 2)
    async with yard.worker([yard.task(handler)]):
        await started.wait()
        await yard.queue.rows(  # declared dead, rescued and claimed elsewhere meanwhile
            "update conductor.jobs set fence = fence + 1, worker = 999 where id = %s", first
        )
        release.set()
        await yard.queue.until("select count(*) = 0 from conductor.lane_calls")
    assert await yard.states() == [(first, "running"), (second, "parked")]


async def test_sql_puts_jobs_into_the_same_lanes(yard: Yard) -> None:
    bound = await yard.register(yard.note)
    await yard.put("a", 1)
    await yard.queue.rows("select conductor.invoke('work', '2', key => 'a')")
    await yard.put("a", 3)
    refused = (
        "select conductor.invoke('work', '0')",
        "select conductor.invoke('work', '0', key => 'a', priority => 1)",
        "select conductor.invoke('work', '0', key => 'a', run_at => now())",
        "select conductor.invoke('work', '0', key => repeat('a', 501))",
    )
    for statement in refused:
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            await yard.queue.rows(statement)
    async with yard.worker([bound]):
        await yard.drained()
    assert yard.ran == [1, 2, 3]


@pytest.mark.parametrize(
    "options",
    [{}, {"key": "a", "delay": 1}, {"key": "a", "priority": 1}, {"key": "a" * 501}],
)
async def test_ordered_jobs_have_a_key_and_no_time(yard: Yard, options: Any) -> None:
    with pytest.raises(OptionInvalid):
        await yard.app.invoke(work, 1, **options)


async def test_no_jobs_need_no_keys(yard: Yard) -> None:
    assert await yard.app.invoke_many(work, [], keys=[]) == []


async def test_a_schedule_has_no_key(yard: Yard) -> None:
    with pytest.raises(OptionInvalid, match="a schedule has none"):
        await yard.app.schedule("s", work, Cron("* * * * *"), 1)


async def test_dedupe_keys_and_callers_transactions_go_with_lanes(yard: Yard) -> None:
    async with yard.queue.connections.lend() as connection, connection.transaction():
        await yard.app.invoke(work, 1, key="a", dedupe_key="x", connection=connection)
        again = await yard.app.invoke(work, 2, key="a", dedupe_key="x", connection=connection)
        await yard.app.invoke(work, 3, key="a", dedupe_key="y", connection=connection)
    assert again.status == "dropped"
    async with yard.worker([yard.task(yard.note)]):
        await yard.drained()
    assert yard.ran == [1, 3]


async def test_children_stand_in_lanes_too(yard: Yard) -> None:
    parent = define_task("parent", payload=list[int], returns=list[int])
    app = Conductor(yard.dsn, tasks=[parent, work])

    @app.task(parent)
    async def call(event: Invocation[list[int]], ctx: Context[None]) -> list[int]:
        calls = [ctx.invoke(f"child-{n}", work, n, key="a") for n in event.payload]
        return list(await ctx.gather(*calls))

    @app.task(work)
    async def double(event: Invocation[Any], _ctx: Context[None]) -> Any:
        yard.ran.append(event.payload)
        return event.payload * 2

    async with app, Orchestrator(app):
        handle = await app.invoke(parent, [1, 2, 3])
        assert await handle.result(timeout_s=60) == [2, 4, 6]
    assert sorted(yard.ran) == [1, 2, 3]


async def test_a_task_that_is_ordered_no_more_opens_its_lanes(yard: Yard) -> None:
    await yard.put("a", 1, 2, 3)
    free = define_task("work", payload=Any)
    app = Conductor(yard.dsn, tasks=[free])

    @app.task(free)
    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        yard.ran.append(event.payload)

    async with app:
        await Orchestrator(app).drain()
    assert sorted(yard.ran) == [1, 2, 3]


async def test_jobs_of_a_client_that_still_orders_them_are_let_go(
    yard: Yard, queue: Queue, metrics: Metrics
) -> None:
    free = define_task("work", payload=Any)
    app = Conductor(yard.dsn, tasks=[free])

    @app.task(free)
    async def handler(event: Invocation[Any], _ctx: Context[None]) -> None:
        yard.ran.append(event.payload)

    async with app:
        async with Orchestrator(app):
            pass
        await yard.put("a", 1, 2)
        await Maintenance(queue.connections, metrics).tick()
        assert {state for _, state in await yard.states()} == {"ready"}
        await Orchestrator(app).drain()
    assert sorted(yard.ran) == [1, 2]


async def test_maintenance_leaves_lanes_of_ordered_tasks_alone(
    yard: Yard, queue: Queue, metrics: Metrics
) -> None:
    await yard.register(yard.note)
    await yard.put("a", 1, 2)
    await Maintenance(queue.connections, metrics).tick()
    assert {state for _, state in await yard.states()} == {"parked"}


async def test_a_claim_says_when_lanes_are_left_to_look_at(yard: Yard, queue: Queue) -> None:
    await yard.put("a", *range(3))
    await yard.queue.rows(
        "insert into conductor.lane_calls (queue, task, key)"
        " select 'default', 'work', 'a' from generate_series(2, %s)",
        OFFER_BATCH + 1,
    )
    claim = Claim("default", ["work"], [], limit=0, lanes_after=0)
    async with queue.connections.lend() as connection:
        store = JobStore(connection)
        left = [(await store.exchange(0, [], claim)).lanes_left for _ in range(3)]
    assert left == [True, False, False]


async def test_a_lane_that_a_hand_has_emptied_is_found(yard: Yard) -> None:
    first, second = await yard.put("a", 1, 2)
    await yard.put("b", 3)
    await yard.queue.rows("select conductor.offer_heads('default', 10)")
    await yard.queue.rows("delete from conductor.jobs where id = %s", first)
    for called in (1, 0):  # not again before somebody has looked
        assert await yard.queue.value("select conductor.call_stalled_lanes()") == called
    await yard.queue.rows("select conductor.offer_heads('default', 10)")
    assert (second, "ready") in await yard.states()
    assert await yard.queue.value("select conductor.call_stalled_lanes()") == 0


async def test_queues_without_ordered_tasks_never_look_at_lanes(yard: Yard, queue: Queue) -> None:
    name = queue.database.name
    with psycopg.connect(queue.database.admin_dsn, autocommit=True) as admin:
        admin.execute(f"alter database {name} set track_functions = 'all'".encode())

    free = define_task("free", payload=int)
    app = Conductor(yard.dsn, tasks=[free])

    @app.task(free)
    async def handler(event: Invocation[int], _ctx: Context[None]) -> None:
        yard.ran.append(event.payload)

    async with app:
        await app.invoke_many(free, range(100), key="a")
        await Orchestrator(app).drain()
    assert len(yard.ran) == 100
    with psycopg.connect(yard.dsn) as control:
        control.execute("select conductor.wake('{}')")
    calls = "select funcname::text from pg_stat_user_functions"
    await queue.until(f"select 'wake' in ({calls})")
    called = await queue.column(calls)
    assert not {"offer_heads", "free_lane"} & set(called)


HEAD = encode_head(
    queue="default", task="work", app="a", version=None, trigger="invoke", rank=0, subscription=9
)


async def test_routed_jobs_stand_in_lanes_in_the_order_of_the_stream(yard: Yard) -> None:
    await yard.queue.rows("insert into conductor.progress (slot, state) values ('s', 'streaming')")
    sink = await Sink.open(yard.dsn, "s", leader="test")
    position = encode_position(1, 0x100)
    specs = [
        JobSpec(HEAD, position, n, b"%d" % n)
        if n % 5 == 0
        else JobSpec(HEAD, position, n, b"%d" % n, f"key-{n % 2}", ordered=True)
        for n in range(20)
    ]
    await sink.write(Batch(specs[:10]))
    await sink.write(Batch(specs[10:], end_lsn=0x200))
    await sink.close()
    rows = await yard.queue.rows("select * from conductor.jobs order by source_ordinal")
    assert [(row["source_ordinal"], row["key"], row["state"], row["ordered"]) for row in rows] == [
        (n, None, "ready", None) if n % 5 == 0 else (n, f"key-{n % 2}", "parked", True)
        for n in range(20)
    ]
    async with yard.worker([yard.task(yard.note)], slots=5):
        await yard.drained()
    for parity in (0, 1):
        ran = [n for n in yard.ran if n % 2 == parity and n % 5]
        assert ran == sorted(ran)
    assert sorted(yard.ran) == list(range(20))


async def test_changes_of_a_row_run_in_the_order_of_their_commits(queue: Queue) -> None:
    app = Conductor(queue.database.dsn)
    seen: dict[int, list[int]] = defaultdict(list)

    @app.task("follow", OnChange("public.accounts", key="id"), ordered=True, retry=AT_ONCE)
    async def follow(event: Any, ctx: Context[None]) -> None:
        row = event.old if event.op == "delete" else event.new
        await asyncio.sleep(random.random() / 200)
        if ctx.job.attempt == 0 and random.random() < 0.2:
            raise RuntimeError("for once")
        seen[row["id"]].append(-1 if event.op == "delete" else row["balance"])

    await queue.rows("create table accounts (id bigint primary key, balance int)")
    orchestrator = Orchestrator(app)
    async with app, running(queue.database):
        await orchestrator.start(wait_captured_s=30)
        for account in range(5):
            await queue.rows("insert into accounts values (%s, 0)", account)
        for balance in range(1, 20):
            await queue.rows("update accounts set balance = %s", balance)
        await queue.rows("delete from accounts")
        await queue.until("select count(*) = 105 from conductor.history")
        await orchestrator.stop()
    drop_slot(queue.database)
    assert seen == {account: [*range(20), -1] for account in range(5)}


async def test_halted_lanes_are_counted(yard: Yard, metrics: Metrics) -> None:
    await halted(yard)
    gauges = Gauges(yard.queue.connections, metrics)
    await gauges.tick()
    assert metrics.get(HALTED_LANES, "default")._value.get() == 1
    counted = metrics.registry.get_sample_value(
        "conductor_jobs", {"queue": "default", "state": "parked"}
    )
    assert counted == 2
