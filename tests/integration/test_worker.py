from __future__ import annotations

import asyncio
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from prometheus_client import generate_latest
from psycopg import AsyncConnection
from pydantic import BaseModel

from conductor.errors import NonRetryable
from conductor.maintenance import partition_name
from conductor.metrics import Metrics
from conductor.retry import RetryPolicy
from conductor.store.maintenance import MaintenanceStore
from conductor.worker import claiming
from tests.integration.conftest import Queue, eventually
from tests.integration.workers import Workshop, task

pytestmark = pytest.mark.anyio


class Item(BaseModel):
    number: int


class Doubled(BaseModel):
    value: int


@pytest.fixture
def workshop(queue: Queue, metrics: Metrics) -> Workshop:
    return Workshop(queue, metrics)


async def double(event: Any, _ctx: Any) -> Doubled:
    return Doubled(value=event.payload.number * 2)


DOUBLE = task(double, payload=Item, returns=Doubled)


async def test_jobs_run_and_their_results_are_kept(workshop: Workshop, metrics: Metrics) -> None:
    jobs = await workshop.invoke_many({"number": n} for n in range(3000))
    async with workshop.worker([DOUBLE], slots=20):
        await workshop.drained()
    rows = await workshop.queue.rows("select * from conductor.history order by id")
    assert [row["id"] for row in rows] == jobs
    assert [row["result"]["value"] for row in rows] == [2 * n for n in range(3000)]
    assert {row["outcome"] for row in rows} == {"completed"}
    assert {(row["fence"], row["attempt"], row["error"]) for row in rows} == {(1, 0, None)}
    assert all(row["run_at"] <= row["started_at"] <= row["finished_at"] for row in rows)
    in_a_week = datetime.now(UTC).date() + timedelta(days=8)
    assert {row["expires_on"] for row in rows} <= {in_a_week, in_a_week - timedelta(days=1)}
    assert await workshop.queue.value("select count(*) from conductor.workers") == 0
    shown = generate_latest(metrics.registry).decode()
    assert (
        'conductor_jobs_finished_total{outcome="completed",queue="default",task="work"} 3000.0'
        in shown
    )
    assert 'conductor_job_duration_seconds_count{queue="default",task="work"} 3000.0' in shown


async def test_two_workers_share_the_jobs_and_run_each_once(workshop: Workshop) -> None:
    ran: Counter[int] = Counter()

    async def handler(event: Any, _ctx: Any) -> None:
        ran[event.payload["n"]] += 1
        await asyncio.sleep(0)

    await workshop.invoke_many({"n": n} for n in range(4000))
    count = task(handler)
    async with workshop.worker([count], slots=10), workshop.worker([count], slots=10):
        await workshop.drained()
    assert ran == Counter(dict.fromkeys(range(4000), 1))


async def test_a_job_knows_what_it_is(workshop: Workshop) -> None:
    seen: list[Any] = []

    async def handler(_event: Any, ctx: Any) -> None:
        seen.append(ctx.job)
        assert ctx.deps == "deps"
        ctx.logger.info("seen")

    plain = await workshop.invoke(key="k", rank=-7, app="shop", version="v3")
    routed = await workshop.invoke(
        source_generation=3, source_lsn="0/16B3748", source_ordinal=9, subscription=12
    )
    async with workshop.worker([task(handler)], deps="deps"):
        await workshop.drained()
    first, second = sorted(seen, key=lambda job: job.id)
    assert (first.id, first.task, first.queue, first.trigger) == (
        plain, "work", "default", "invoke",
    )  # fmt: skip
    assert (first.key, first.priority, first.app, first.version) == ("k", 7, "shop", "v3")
    assert (first.attempt, first.crashes, first.fence) == (0, 0, 1)
    assert first.idempotency_key == f"job:{plain}"
    assert second.id == routed
    assert second.idempotency_key == "3:0/16B3748:9:12"


async def test_a_failure_is_tried_again_until_it_succeeds(workshop: Workshop) -> None:
    attempts: list[int] = []

    async def handler(_event: Any, ctx: Any) -> str:
        attempts.append(ctx.job.attempt)
        if ctx.job.attempt < 2:
            raise ValueError("not yet")
        return "done"

    job = await workshop.invoke()
    async with workshop.worker([task(handler, max_attempts=3)]):
        row = await workshop.ended(job)
    assert attempts == [0, 1, 2]
    assert (row["state"], row["result"], row["attempt"], row["fence"]) == (
        "completed",
        "done",
        2,
        3,
    )


async def test_a_job_without_attempts_left_has_failed(workshop: Workshop) -> None:
    async def handler(_event: Any, _ctx: Any) -> None:
        raise ValueError("no \0 \ud800 luck")

    job = await workshop.invoke()
    async with workshop.worker([task(handler, max_attempts=3)]):
        row = await workshop.ended(job)
    assert (row["state"], row["attempt"], row["fence"]) == ("failed", 3, 3)
    assert row["error"]["type"] == "ValueError"
    assert row["error"]["message"] == "no  ? luck"
    assert row["error"]["attempt"] == 3
    assert "in handler" in row["error"]["traceback"]


async def test_some_errors_are_final(workshop: Workshop) -> None:
    async def handler(_event: Any, _ctx: Any) -> None:
        raise NonRetryable("refused")

    job = await workshop.invoke()
    async with workshop.worker([task(handler, max_attempts=3)]):
        row = await workshop.ended(job)
    assert (row["state"], row["attempt"]) == ("failed", 1)


async def test_a_stored_payload_that_does_not_validate_fails_for_good(workshop: Workshop) -> None:
    job = await workshop.invoke({"number": "many"})
    async with workshop.worker([DOUBLE]):
        row = await workshop.ended(job)
    assert row["state"] == "failed"
    assert row["error"]["type"] == "PayloadInvalid"
    assert row["error"]["errors"][0]["loc"] == ["number"]


async def test_a_wrong_result_fails_for_good(workshop: Workshop) -> None:
    async def handler(_event: Any, _ctx: Any) -> Any:
        return {"value": "many"}

    job = await workshop.invoke()
    async with workshop.worker([task(handler, returns=Doubled)]):
        row = await workshop.ended(job)
    assert (row["state"], row["error"]["type"]) == ("failed", "ResultInvalid")


async def test_a_result_that_cannot_be_stored_fails_for_good(workshop: Workshop) -> None:
    async def handler(event: Any, _ctx: Any) -> Any:
        return {"city": event.payload["text"].replace("-", "\0").replace("+", "\ud800")}

    jobs = await workshop.invoke_many([{"text": "a-b"}, {"text": "a+b"}, {"text": "fine"}])
    async with workshop.worker([task(handler)]):
        rows = [await workshop.ended(job) for job in jobs]
    assert [row["state"] for row in rows] == ["failed", "failed", "completed"]
    for row in rows[:2]:
        assert row["error"]["type"] == "ResultInvalid"
        assert "result of task 'work': city: the text holds" in row["error"]["message"]
    found = "select error ->> 'message' from conductor.history where outcome = 'failed'"
    assert len(await workshop.queue.column(found)) == 2  # SQL reads what was stored


@pytest.mark.parametrize(
    "columns",
    [
        {"run_at": "infinity"},
        {"run_at": "-infinity"},
        {"run_at": "10000-01-01", "state": "scheduled"},
        {"run_at": "0044-03-15 BC", "state": "suspect"},
        {"created_at": "infinity"},
    ],
    ids=str,
)
async def test_a_job_at_no_time_is_refused_and_disturbs_no_claim(
    workshop: Workshop, columns: dict[str, str]
) -> None:
    async with workshop.worker([DOUBLE]):
        with pytest.raises(psycopg.errors.CheckViolation):
            await workshop.invoke({"number": 1}, **columns)
        await workshop.ended(await workshop.invoke({"number": 1}))
    with pytest.raises(psycopg.errors.CheckViolation):
        await workshop.queue.rows(
            "select conductor.invoke('t', queue => 'q', run_at => '10000-01-01')"
        )
    await workshop.queue.rows("select conductor.invoke('t', queue => 'q', run_at => 'infinity')")


async def test_a_retry_waits_its_turn(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> None:
        if not ctx.job.attempt:
            raise ValueError("later")

    policy = RetryPolicy(initial_s=3600, max_s=3600, jitter=0)
    job = await workshop.invoke()
    async with workshop.worker([task(handler, retry=policy)]):
        await workshop.queue.until(
            "select state = 'scheduled' from conductor.job where id = %s", job
        )
        waiting = await workshop.job(job)
        await workshop.queue.pass_by(hours=1)
        row = await workshop.ended(job)
    assert waiting["error"]["message"] == "later"
    assert waiting["run_at"] > datetime.now(UTC) + timedelta(minutes=50)
    assert row["state"] == "completed"


async def test_delayed_jobs_run_when_they_are_due(workshop: Workshop) -> None:
    due = await workshop.queue.value("select conductor.now() + interval '0.4 seconds'")
    job = await workshop.invoke({"number": 1}, run_at=due, state="scheduled")
    async with workshop.worker([DOUBLE]):
        row = await workshop.ended(job)
    assert due <= row["started_at"]


async def test_higher_priority_runs_first(workshop: Workshop) -> None:
    order: list[int] = []

    async def handler(event: Any, _ctx: Any) -> None:
        order.append(event.payload["n"])

    for n, rank in enumerate((5, 0, -3, 0)):
        await workshop.invoke({"n": n}, rank=rank)
    async with workshop.worker([task(handler)], slots=1):
        await workshop.drained()
    assert order == [2, 1, 3, 0]


async def test_an_urgent_job_overtakes_a_backlog(workshop: Workshop) -> None:
    order: list[str] = []
    release = asyncio.Event()

    async def handler(event: Any, _ctx: Any) -> None:
        order.append(event.payload["n"])
        await release.wait()

    await workshop.invoke_many({"n": "dull"} for _ in range(50))
    async with workshop.worker([task(handler)], slots=1):
        await eventually(lambda: _is(len(order) == 1))
        await workshop.invoke({"n": "urgent"}, rank=-100)
        release.set()
        await workshop.drained()
    assert "urgent" in order[1:4]


async def _is(value: bool) -> bool:
    return value


async def test_jobs_of_unknown_tasks_and_paused_queues_stay(workshop: Workshop) -> None:
    await workshop.invoke({"number": 1}, name="unknown")
    job = await workshop.invoke({"number": 1})
    await workshop.queue.rows("insert into conductor.queues values ('default', true)")
    async with workshop.worker([DOUBLE]):
        await workshop.queue.until("select count(*) = 1 from conductor.workers")
        await asyncio.sleep(0.3)
        assert (await workshop.job(job))["state"] == "ready"
        await workshop.queue.rows("update conductor.queues set paused = false")
        await workshop.ended(job)
    assert await workshop.queue.column("select task from conductor.jobs") == ["unknown"]


async def test_late_commits_behind_the_cursor_are_found(workshop: Workshop) -> None:
    past = await workshop.queue.value("select conductor.now() - interval '1 second'")
    long_past = past - timedelta(hours=1)
    async with workshop.worker([DOUBLE]):
        await workshop.ended(await workshop.invoke({"number": 1}))
        await workshop.ended(await workshop.invoke({"number": 1}, run_at=past))
        await workshop.ended(await workshop.invoke({"number": 1}, run_at=long_past))


async def test_a_hint_wakes_an_idle_worker(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHORTEST_POLL_S", "LONGEST_POLL_S"):  # only a hint can end this pause
        monkeypatch.setattr(claiming, name, 3600.0)
    async with workshop.worker([DOUBLE], listen=True):
        await workshop.queue.until(
            "select exists (select from pg_stat_activity where query = 'listen conductor_jobs')"
        )
        for _ in range(3):
            job = await workshop.invoke({"number": 1})
            await workshop.queue.rows("select pg_notify('conductor_jobs', 'default')")
            await workshop.ended(job)


async def test_nothing_is_kept_without_retention(workshop: Workshop) -> None:
    await workshop.invoke_many({} for _ in range(10))

    async def handler(_event: Any, _ctx: Any) -> None:
        return None

    async with workshop.worker([task(handler, retention=timedelta(0))]):
        await workshop.drained()
    assert await workshop.queue.value("select count(*) from conductor.history") == 0


# --- cancellation and timeouts --------------------------------------------------------------------


async def test_a_running_handler_is_cancelled(workshop: Workshop) -> None:
    cleaned = asyncio.Event()

    async def handler(_event: Any, _ctx: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    job = await workshop.invoke()
    async with workshop.worker([task(handler)]):
        await workshop.queue.until(
            "select state = 'running' from conductor.jobs where id = %s", job
        )
        assert await workshop.queue.value("select conductor.cancel(%s, 'changed my mind')", job)
        row = await workshop.ended(job)
    assert cleaned.is_set()
    assert (row["state"], row["error"]["type"]) == ("cancelled", "JobCancelled")
    assert row["error"]["message"] == "changed my mind"


async def test_a_claimed_job_that_waits_for_a_slot_is_cancelled(workshop: Workshop) -> None:
    release = asyncio.Event()

    async def handler(event: Any, _ctx: Any) -> None:
        if event.payload["n"] == 500:
            await release.wait()

    jobs = await workshop.invoke_many({"n": n} for n in range(502))
    async with workshop.worker([task(handler)], slots=1):
        await workshop.queue.until(
            "select state = 'running' from conductor.job where id = %s", jobs[501]
        )
        await workshop.queue.value("select conductor.cancel(%s)", jobs[501])
        await workshop.ended(jobs[501])
        release.set()
        await workshop.drained()
    assert (await workshop.job(jobs[500]))["state"] == "completed"


async def test_an_attempt_that_takes_too_long_fails(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> str:
        if not ctx.job.attempt:
            await asyncio.sleep(60)
        return "done"

    job = await workshop.invoke()
    async with workshop.worker([task(handler, timeout_s=0.1)]):
        row = await workshop.ended(job)
    assert (row["state"], row["attempt"]) == ("completed", 1)


async def test_a_handler_that_cancels_itself_has_failed(workshop: Workshop) -> None:
    async def handler(_event: Any, _ctx: Any) -> None:
        raise asyncio.CancelledError

    job = await workshop.invoke()
    async with workshop.worker([task(handler, max_attempts=1)]):
        row = await workshop.ended(job)
    assert (row["state"], row["error"]["type"]) == ("failed", "CancelledError")


# --- threads --------------------------------------------------------------------------------------


async def test_sync_handlers_run_side_by_side_in_threads(workshop: Workshop) -> None:
    together = threading.Barrier(4, timeout=60)

    def handler(_event: Any, ctx: Any) -> str:
        together.wait()
        ctx.checkpoint()
        return threading.current_thread().name

    jobs = await workshop.invoke_many({} for _ in range(4))
    async with workshop.worker([task(handler)]):
        names = {(await workshop.ended(job))["result"] for job in jobs}
    assert len(names) == 4


async def test_a_cancelled_thread_keeps_its_slot_until_it_returns(workshop: Workshop) -> None:
    release, stopped = threading.Event(), threading.Event()

    def handler(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 0:
            release.wait(100)
            if ctx.cancelled:
                stopped.set()

    first, second = await workshop.invoke_many({"n": n} for n in range(2))
    async with workshop.worker([task(handler)], slots=1):
        await workshop.queue.until(
            "select state = 'running' from conductor.jobs where id = %s", first
        )
        await workshop.queue.value("select conductor.cancel(%s)", first)
        assert (await workshop.ended(first))["state"] == "cancelled"
        assert (await workshop.job(second))["state"] in {"ready", "running"}
        release.set()
        assert (await workshop.ended(second))["state"] == "completed"
    assert stopped.is_set()


# --- stopping -------------------------------------------------------------------------------------


async def test_a_drain_lets_handlers_finish_and_gives_the_rest_back(workshop: Workshop) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def handler(event: Any, _ctx: Any) -> None:
        if event.payload["n"] >= 500:
            started.set()
            await release.wait()

    jobs = await workshop.invoke_many({"n": n} for n in range(600))
    async with workshop.worker([task(handler)], slots=2) as worker:
        await started.wait()
        worker.stop()
        await workshop.queue.until("select draining from conductor.workers")
        release.set()
    rows = await workshop.queue.rows("select state, count(*) from conductor.job group by state")
    counts = {row["state"]: row["count"] for row in rows}
    assert counts.keys() == {"completed", "ready"}
    assert 501 <= counts["completed"] <= 503
    left = await workshop.queue.rows("select * from conductor.jobs order by id")
    assert [row["id"] for row in left] == jobs[-len(left) :]
    assert {(row["worker"], row["attempt"], row["crashes"]) for row in left} == {(None, 0, 0)}


async def test_handlers_that_do_not_finish_in_time_are_stopped(workshop: Workshop) -> None:
    async def handler(_event: Any, _ctx: Any) -> None:
        await asyncio.sleep(60)

    job = await workshop.invoke()
    async with workshop.worker([task(handler)], drain_timeout_s=0.1):
        await workshop.queue.until(
            "select state = 'running' from conductor.jobs where id = %s", job
        )
    row = await workshop.job(job)
    assert (row["state"], row["attempt"], row["fence"]) == ("ready", 0, 1)


async def test_a_stuck_thread_does_not_hold_up_the_end(workshop: Workshop) -> None:
    release = threading.Event()

    def handler(_event: Any, _ctx: Any) -> None:
        release.wait(30)

    job = await workshop.invoke()
    async with workshop.worker([task(handler)], drain_timeout_s=0.1):
        await workshop.queue.until(
            "select state = 'running' from conductor.jobs where id = %s", job
        )
    release.set()
    assert (await workshop.job(job))["state"] == "ready"


# --- lost connections -----------------------------------------------------------------------------


async def test_terminated_connections_lose_and_repeat_nothing(workshop: Workshop) -> None:
    ran: Counter[int] = Counter()

    async def handler(event: Any, _ctx: Any) -> None:
        ran[event.payload["n"]] += 1
        await asyncio.sleep(0.001)

    total = 6000
    await workshop.invoke_many({"n": n} for n in range(total))
    database = workshop.queue.database
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        async with workshop.worker([task(handler)], slots=50):
            for share in (0.2, 0.4, 0.6, 0.8):
                await workshop.queue.until(
                    "select count(*) >= %s from conductor.history", int(total * share)
                )
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = %s and application_name like 'conductor %%'"
                    " and application_name <> 'conductor services'",
                    [database.name],
                )
            await workshop.drained()
    assert await workshop.queue.value("select count(*) from conductor.history") == total
    assert set(ran) == set(range(total))
    rows = await workshop.queue.rows("select distinct attempt, crashes from conductor.history")
    assert rows == [{"attempt": 0, "crashes": 0}]


async def test_a_job_whose_claim_was_never_heard_of_is_given_back(workshop: Workshop) -> None:
    database = workshop.queue.database
    async with workshop.worker([DOUBLE]) as worker:
        job = await workshop.invoke({"number": 1}, state="running", worker=worker.id, fence=1)
        await workshop.ended(await workshop.invoke({"number": 2}))
        assert (await workshop.job(job))["state"] == "running"
        with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = %s and application_name like 'conductor worker%%'",
                [database.name],
            )
        row = await workshop.ended(job)
    assert (row["state"], row["fence"], row["attempt"]) == ("completed", 2, 0)


# --- what a job cannot do to its worker -----------------------------------------------------------


class Odd(BaseException):
    """Neither an Exception nor a way to stop a process."""


class MuteError(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise Odd


@pytest.mark.parametrize("error", [Odd, MuteError, GeneratorExit, StopIteration])
@pytest.mark.parametrize("is_sync", [False, True])
async def test_whatever_a_handler_raises_ends_its_job_and_frees_its_slot(
    workshop: Workshop, error: type[BaseException], is_sync: bool
) -> None:
    def fail(event: Any) -> None:
        if event.payload["n"] == 1:
            raise error

    async def handler(event: Any, _ctx: Any) -> None:
        fail(event)

    def handler_in_thread(event: Any, _ctx: Any) -> None:
        fail(event)

    first, second = await workshop.invoke_many([{"n": 1}, {"n": 2}])
    bound = task(handler_in_thread if is_sync else handler, max_attempts=1)
    async with workshop.worker([bound], slots=1):
        assert (await workshop.ended(first))["state"] == "failed"
        assert (await workshop.ended(second))["state"] == "completed"


async def test_metadata_that_cannot_be_read_fails_its_job_alone(workshop: Workshop) -> None:
    seen: list[Any] = []

    async def handler(_event: Any, ctx: Any) -> None:
        seen.append(ctx.metadata)

    ending = "select outcome || ':' || coalesce(error ->> 'type', '') from conductor.history"
    odd = await workshop.invoke(metadata=r'{"a":"\ud800"}')
    deep = await workshop.invoke(metadata='{"a":' + "[" * 4000 + "]" * 4000 + "}")
    plain = await workshop.invoke(metadata='{"a": 1}')
    async with workshop.worker([task(handler)], slots=1):
        await workshop.drained()
    endings = [await workshop.queue.value(f"{ending} where id = %s", j) for j in (odd, deep, plain)]
    assert endings == ["completed:", "failed:PayloadInvalid", "completed:"]
    assert seen == [{"a": "\ud800"}, {"a": 1}]


async def test_a_day_that_gets_its_partition_fails_no_job(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    """A settle that waits for the default partition finds its day gone from there."""
    queue, retention = workshop.queue, timedelta(days=40)
    async with (
        workshop.worker([task(lambda _event, _ctx: "kept", retention=retention)]),
        await AsyncConnection.connect(queue.database.dsn) as connection,
    ):
        store, today = MaintenanceStore(connection), datetime.now(UTC).date()
        for day in (today + retention + timedelta(days=n) for n in range(3)):
            await store.add_partition(name=partition_name(day), day=day)
        job = await workshop.invoke({"secret": "in the row"})
        await queue.until(
            "select exists (select from pg_catalog.pg_locks where not granted"
            " and relation = 'conductor.history_default'::regclass)"
        )
        await connection.commit()
        ended = await workshop.ended(job)
    assert (ended["state"], ended["result"]) == ("completed", "kept")
    assert "violates partition constraint" in caplog.text
    assert "in the row" not in caplog.text
