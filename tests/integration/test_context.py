from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

from conductor.metrics import Metrics
from tests.integration.conftest import Queue
from tests.integration.workers import Workshop, task

pytestmark = pytest.mark.anyio


class Receipt(BaseModel):
    amount: int
    at: datetime


@pytest.fixture
def workshop(queue: Queue, metrics: Metrics) -> Workshop:
    return Workshop(queue, metrics)


class Tally:
    """Counts how often each step really ran."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def step(self, name: str, value: Any = None) -> Callable[[], Any]:
        def run() -> Any:
            self.ran[name] += 1
            return value

        return run


async def finish(workshop: Workshop, handler: Callable[..., Any], **options: Any) -> dict[str, Any]:
    job = await workshop.invoke()
    async with workshop.worker([task(handler, **options)]):
        return await workshop.ended(job)


async def test_a_finished_step_is_not_run_again(workshop: Workshop, metrics: Metrics) -> None:
    tally = Tally()

    async def handler(_event: Any, ctx: Any) -> list[Any]:
        one = await ctx.step("one", tally.step("one", 1))
        two = await ctx.step("two", lambda: asyncio.sleep(0, result="zwei"))
        if not ctx.job.attempt:
            raise ValueError("after two steps")
        three = await ctx.step("three", tally.step("three", {"x": [None]}))
        return [one, two, three]

    row = await finish(workshop, handler)
    assert row["result"] == [1, "zwei", {"x": [None]}]
    assert tally.ran == {"one": 1, "three": 1}
    assert await workshop.queue.value("select count(*) from conductor.steps") == 0
    written = metrics.registry.get_sample_value("conductor_steps_total", {"queue": "default"})
    assert written == 3


async def test_both_runs_see_what_reading_back_gives(workshop: Workshop) -> None:
    seen: list[Any] = []
    at = datetime(2026, 1, 1, tzinfo=UTC)

    def charge() -> Receipt:
        return Receipt(amount=7, at=at)

    async def handler(_event: Any, ctx: Any) -> None:
        seen.append(await ctx.step("annotated", charge))
        seen.append(await ctx.step("declared", lambda: {"amount": "8", "at": at}, returns=Receipt))
        seen.append(await ctx.step("set", lambda: [3, 3], returns=set[int]))
        seen.append(await ctx.step("json", lambda: {"t": (1, 2)}, returns=dict[str, Any]))
        if not ctx.job.attempt:
            raise ValueError("again")

    await finish(workshop, handler)
    first, second = seen[:4], seen[4:]
    assert first == second
    assert first[:3] == [Receipt(amount=7, at=at), Receipt(amount=8, at=at), {3}]
    assert isinstance(first[3]["t"], list)


async def test_a_result_that_is_not_json_needs_a_type(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> None:
        await ctx.step("now", lambda: datetime.now(UTC))

    row = await finish(workshop, handler)
    assert (row["state"], row["error"]["type"]) == ("failed", "ResultInvalid")
    assert "'now'" in row["error"]["message"]


async def test_a_step_that_fails_is_tried_again(workshop: Workshop) -> None:
    runs: list[int] = []

    async def handler(_event: Any, ctx: Any) -> Any:
        def flaky() -> str:
            runs.append(1)
            if len(runs) < 3:
                raise OSError("flaky")
            return "well"

        return await ctx.step("flaky", flaky)

    row = await finish(workshop, handler)
    assert (row["result"], row["attempt"], len(runs)) == ("well", 2, 3)


async def test_a_failure_that_the_handler_goes_on_from_is_kept(workshop: Workshop) -> None:
    tally = Tally()

    async def handler(_event: Any, ctx: Any) -> Any:
        def fail() -> None:
            tally.ran["pay"] += 1
            raise FileNotFoundError(2, f"for the {tally.ran['pay']}. time")

        async def book(db: Any) -> None:
            tally.ran["book"] += 1
            await db.execute("select 1 / 0")

        said = []
        try:
            await ctx.step("pay", fail)
        except OSError as error:
            said = [error.errno, error.strerror]
        await ctx.sleep("pause", 0.1)
        try:
            await ctx.transaction("book", book)
        except psycopg.errors.DivisionByZero as error:
            await ctx.step("note", tally.step("note"))
            said.append(str(error))
        if not ctx.job.attempt:
            raise ValueError("again")
        return said

    row = await finish(workshop, handler)
    assert row["result"] == [2, "for the 1. time", "division by zero"]
    assert tally.ran == {"pay": 1, "book": 1, "note": 1}
    assert (row["attempt"], row["fence"]) == (1, 3)


async def test_a_job_whose_failure_is_kept_is_not_tried_again(workshop: Workshop) -> None:
    tally = Tally()

    async def handler(_event: Any, ctx: Any) -> Any:
        def fail() -> None:
            raise OSError("no luck")

        await ctx.step("take", tally.step("take"))
        try:
            await ctx.step("pay", fail)
        except OSError:
            await ctx.step("give back", tally.step("give back"))
            raise

    row = await finish(workshop, handler, max_attempts=10)
    assert (row["state"], row["error"]["type"], row["attempt"]) == ("failed", "OSError", 1)
    assert tally.ran == {"take": 1, "give back": 1}


async def test_a_failure_is_not_kept_of_an_attempt_that_was_stopped(workshop: Workshop) -> None:
    """The step has failed because of that, and the next attempt takes it up."""

    async def handler(_event: Any, ctx: Any) -> Any:
        async def slow() -> str:
            try:
                await asyncio.sleep(0 if ctx.job.attempt else 3600)
            except asyncio.CancelledError:
                raise ConnectionError("the connection was closed") from None
            return "done"

        try:
            return await ctx.step("slow", slow)
        finally:
            await ctx.step("release", lambda: None)

    row = await finish(workshop, handler, timeout_s=0.3)
    assert (row["result"], row["attempt"]) == ("done", 1)


async def test_a_failure_is_not_kept_of_what_has_committed(workshop: Workshop) -> None:
    """A commit without an answer, say, and nobody could say then whether it had been one."""

    async def handler(_event: Any, ctx: Any) -> Any:
        def fail() -> None:
            raise OSError("no answer")

        try:
            if not ctx.job.attempt:
                await ctx.step("pay", fail)
        except OSError:
            await workshop.queue.rows(
                "insert into conductor.steps (job, name, position, kind, result)"
                " values (%s, 'pay', 0, 'step', '1')",
                ctx.job.id,
            )
            await ctx.step("note", lambda: None)
            return "refused"
        return await ctx.step("pay", fail, returns=int)

    row = await finish(workshop, handler)
    assert (row["state"], row["error"]["type"]) == ("failed", "StepOrderChanged")


async def test_a_name_used_twice_is_an_error(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> None:
        for _ in range(2):
            await ctx.step("same", lambda: 1)

    row = await finish(workshop, handler)
    assert (row["state"], row["error"]["type"]) == ("failed", "StepNameReused")


async def test_a_changed_order_is_an_error(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> None:
        names = ["a", "b"] if not ctx.job.attempt else ["b", "a"]
        for name in names:
            await ctx.step(name, lambda: 1)
        raise ValueError("again")

    row = await finish(workshop, handler)
    assert (row["state"], row["error"]["type"]) == ("failed", "StepOrderChanged")
    assert row["error"]["message"] == "step 1 is 'b', but was 'a' in an earlier run"


async def test_concurrent_steps_have_no_order(workshop: Workshop) -> None:
    tally = Tally()

    async def handler(_event: Any, ctx: Any) -> list[Any]:
        async def branch(name: str) -> Any:
            await asyncio.sleep(0.01 * (int(name) if ctx.job.attempt else 5 - int(name)))
            return await ctx.step(name, tally.step(name, name))

        results = await asyncio.gather(*(branch(str(n)) for n in range(5)))
        await ctx.step("after", tally.step("after"))
        if not ctx.job.attempt:
            raise ValueError("again")
        return results

    row = await finish(workshop, handler)
    assert row["result"] == ["0", "1", "2", "3", "4"]
    assert set(tally.ran.values()) == {1}


# --- sleeping -------------------------------------------------------------------------------------


async def test_a_sleeping_job_holds_no_slot_and_replays(workshop: Workshop) -> None:
    tally = Tally()
    cleanups: list[int] = []

    async def handler(_event: Any, ctx: Any) -> str:
        try:
            await ctx.step("before", tally.step("before"))
            await ctx.sleep("nap", timedelta(hours=1))
            await ctx.step("after", tally.step("after"))
            return "rested"
        finally:
            cleanups.append(ctx.job.fence)

    job, other = await workshop.invoke_many([{}, {}])
    async with workshop.worker([task(handler)], slots=1):
        await workshop.queue.until(
            "select count(*) = 2 from conductor.jobs where state = 'scheduled'"
        )
        asleep = await workshop.job(job)
        await workshop.queue.pass_by(hours=1)
        row = await workshop.ended(job)
        await workshop.ended(other)
    assert (asleep["attempt"], asleep["worker"]) == (0, None)
    assert (row["result"], row["attempt"], row["fence"]) == ("rested", 0, 2)
    assert asleep["run_at"] > datetime.now(UTC) + timedelta(minutes=50)
    assert tally.ran == {"before": 2, "after": 2}
    assert sorted(cleanups) == [1, 1, 2, 2]


async def test_sleep_until_and_sleeps_that_are_over(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> int:
        await ctx.sleep("none", 0)
        await ctx.sleep_until("past", datetime(2020, 1, 1, tzinfo=UTC))
        await ctx.sleep_until("soon", datetime.now(UTC) + timedelta(seconds=0.3))
        fence: int = ctx.job.fence
        return fence

    row = await finish(workshop, handler)
    assert row["state"] == "completed"
    assert row["result"] in {2, 3}


async def test_running_steps_finish_before_a_suspension(workshop: Workshop) -> None:
    tally = Tally()

    async def handler(_event: Any, ctx: Any) -> list[Any]:
        async def slow() -> Any:
            await asyncio.sleep(0.2)
            return tally.step("slow", "done")()

        async def steps() -> Any:
            first = await ctx.step("slow", slow)
            return [first, await ctx.step("next", tally.step("next", "too"))]

        _, results = await asyncio.gather(ctx.sleep("nap", 0.4), steps())
        return list(results)

    row = await finish(workshop, handler)
    assert row["result"] == ["done", "too"]
    assert tally.ran == {"slow": 1, "next": 1}
    assert row["fence"] == 2


async def test_the_first_of_two_sleeps_wakes_the_job(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> str:
        done, pending = await asyncio.wait(
            [
                asyncio.ensure_future(ctx.sleep("long", 3600)),
                asyncio.ensure_future(ctx.sleep("short", 0.3)),
            ],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for one in pending:
            one.cancel()
        return f"{len(done)} over"

    row = await finish(workshop, handler)
    assert (row["result"], row["fence"]) == ("1 over", 2)


async def test_a_sleeping_job_can_be_cancelled(workshop: Workshop) -> None:
    async def handler(_event: Any, ctx: Any) -> None:
        await ctx.sleep("nap", timedelta(days=400))

    job = await workshop.invoke()
    async with workshop.worker([task(handler)]):
        await workshop.queue.until(
            "select state = 'scheduled' from conductor.job where id = %s", job
        )
        await workshop.queue.value("select conductor.cancel(%s)", job)
    assert (await workshop.job(job))["state"] == "cancelled"
    assert await workshop.queue.value("select count(*) from conductor.steps") == 0


# --- leaving --------------------------------------------------------------------------------------


async def test_what_a_handler_cleans_up_waits_for_its_end(workshop: Workshop) -> None:
    log: list[str] = []

    async def handler(_event: Any, ctx: Any) -> list[str]:
        try:
            await ctx.sleep("nap", 0.1)
            await ctx.step("work", lambda: log.append("work"), returns=None)
        finally:
            await ctx.step("release", lambda: log.append("release"), returns=None)
            await ctx.transaction("free", lambda db: db.execute("select 1"), returns=None)
        return log

    row = await finish(workshop, handler)
    assert (row["result"], row["attempt"], row["fence"]) == (["work", "release"], 0, 2)


async def test_what_a_thread_cleans_up_waits_for_its_end(workshop: Workshop) -> None:
    """What goes wrong in its ``finally`` meanwhile is no failure, as in a coroutine."""
    log: list[str] = []

    def handler(_event: Any, ctx: Any) -> list[str]:
        try:
            ctx.sleep("nap", 0.1)
            ctx.step("work", lambda: log.append("work"), returns=None)
        finally:
            try:
                ctx.step("release", lambda: log.append("release"), returns=None)
                ctx.transaction("free", lambda db: db.execute("select 1"), returns=None)
            except BaseException as error:
                raise RuntimeError("not to be released yet") from error
        return log

    row = await finish(workshop, handler)
    assert (row["result"], row["attempt"], row["fence"]) == (["work", "release"], 0, 2)


async def test_a_job_that_is_given_back_cleans_nothing_up(workshop: Workshop) -> None:
    began = asyncio.Event()

    async def handler(_event: Any, ctx: Any) -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await ctx.step("release", lambda: None)

    job = await workshop.invoke()
    async with workshop.worker([task(handler)], drain_timeout_s=0) as worker:
        await asyncio.wait_for(began.wait(), 60)
        worker.stop()
    row = await workshop.job(job)
    assert (row["state"], row["attempt"]) == ("ready", 0)
    assert await workshop.queue.value("select count(*) from conductor.steps") == 0


async def test_a_cancelled_handler_may_clean_up(workshop: Workshop) -> None:
    log: list[str] = []

    async def handler(_event: Any, ctx: Any) -> None:
        await ctx.step("reserve", lambda: log.append("reserve"), returns=None)
        try:
            await asyncio.Event().wait()
        finally:
            await ctx.step("release", lambda: log.append("release"), returns=None)

    job = await workshop.invoke()
    async with workshop.worker([task(handler)]):
        await workshop.queue.until("select count(*) = 1 from conductor.steps")
        await workshop.queue.value("select conductor.cancel(%s)", job)
        row = await workshop.ended(job)
    assert (row["state"], log) == ("cancelled", ["reserve", "release"])


# --- threads --------------------------------------------------------------------------------------


async def test_steps_and_sleep_in_a_thread(workshop: Workshop) -> None:
    tally = Tally()
    threads: set[str] = set()

    def handler(_event: Any, ctx: Any) -> list[Any]:
        threads.add(threading.current_thread().name)
        one = ctx.step("one", tally.step("one", 1))
        ctx.sleep("nap", 0.3)
        two = ctx.step("two", lambda: {2}, returns=set[int])
        return [one, sorted(two)]

    row = await finish(workshop, handler)
    assert (row["result"], row["fence"], row["attempt"]) == ([1, [2]], 2, 0)
    assert tally.ran == {"one": 1}
    assert all(name.startswith("conductor-default") for name in threads)


# --- durability -----------------------------------------------------------------------------------


async def test_many_jobs_write_their_steps_together(workshop: Workshop) -> None:
    async def handler(event: Any, ctx: Any) -> int:
        first = await ctx.step("first", lambda: event.payload["n"])
        second: int = await ctx.step("second", lambda: first + 1)
        return second

    await workshop.invoke_many({"n": n} for n in range(2000))
    async with workshop.worker([task(handler)], slots=200):
        await workshop.drained()
    results = await workshop.queue.column("select result from conductor.history order by id")
    assert results == list(range(1, 2001))


async def test_steps_survive_a_lost_connection(workshop: Workshop) -> None:
    tally: Counter[int] = Counter()

    async def handler(event: Any, ctx: Any) -> None:
        for name in ("a", "b", "c"):
            await ctx.step(name, lambda: tally.update([event.payload["n"]]))
            await asyncio.sleep(0.001)

    await workshop.invoke_many({"n": n} for n in range(1000))
    database = workshop.queue.database
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        async with workshop.worker([task(handler)], slots=50):
            for done in (200, 400, 600):
                await workshop.queue.until("select count(*) >= %s from conductor.history", done)
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = %s and application_name like 'conductor steps%%'",
                    [database.name],
                )
            await workshop.drained()
    assert tally == Counter(dict.fromkeys(range(1000), 3))
    rows = await workshop.queue.rows(
        "select outcome, attempt, count(*) from conductor.history group by 1, 2"
    )
    assert rows == [{"outcome": "completed", "attempt": 0, "count": 1000}]


@pytest.mark.parametrize("wait", [False, True])
async def test_no_step_and_no_wait_inside_a_step(workshop: Workshop, wait: bool) -> None:
    """A wait in there would hold its slot for ever."""

    async def handler(_event: Any, ctx: Any) -> Any:
        inner = ctx.sleep("inner", 0.01) if wait else ctx.step("inner", lambda: 1)
        await ctx.step("outer", lambda: inner)

    job = await workshop.invoke()
    async with workshop.worker([task(handler, max_attempts=1)]):
        row = await workshop.ended(job)
    assert row["error"]["type"] == "StepMisplaced"
    assert "inside step 'outer'" in row["error"]["message"]


async def test_no_step_inside_a_step_of_a_thread(workshop: Workshop) -> None:
    def handler(_event: Any, ctx: Any) -> Any:
        ctx.step("outer", lambda: ctx.step("inner", lambda: 1))

    job = await workshop.invoke()
    async with workshop.worker([task(handler, max_attempts=1)]):
        row = await workshop.ended(job)
    assert row["error"]["type"] == "StepMisplaced"


async def test_a_zombie_writes_no_step(workshop: Workshop) -> None:
    stolen, stopped = asyncio.Event(), asyncio.Event()

    async def handler(_event: Any, ctx: Any) -> None:
        if ctx.job.fence > 1:
            return
        try:
            await stolen.wait()
            await ctx.step("late", lambda: 1)
        finally:
            stopped.set()

    job = await workshop.invoke()
    async with workshop.worker([task(handler)]):
        await workshop.queue.until("select state = 'running' from conductor.job where id = %s", job)
        await workshop.queue.rows("update conductor.jobs set fence = 7, worker = 0")
        stolen.set()
        await asyncio.wait_for(stopped.wait(), 60)
    assert await workshop.queue.value("select count(*) from conductor.steps") == 0
    row = await workshop.job(job)
    assert (row["state"], row["fence"], row["worker"]) == ("running", 7, 0)


async def test_a_def_that_gives_a_coroutine_says_so(workshop: Workshop) -> None:
    async def inner(_event: Any, _ctx: Any) -> None: ...

    def outer(event: Any, ctx: Any) -> Any:
        return inner(event, ctx)

    bound = task(outer, max_attempts=1)
    [job] = await workshop.invoke_many([{}])
    async with workshop.worker([bound]):
        ended = await workshop.ended(job)
    assert ended["state"] == "failed"
    assert "make it async def" in ended["error"]["message"]
