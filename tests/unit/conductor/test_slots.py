from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import pytest

from conductor.definitions import Batch, Task, define_task
from conductor.job import JobInfo
from conductor.store.jobs import ClaimedJob, Finished, Rescheduled
from conductor.triggers import Invocable
from conductor.worker import slots as module
from conductor.worker.execution import Surroundings
from conductor.worker.slots import Slots
from conductor.worker.threads import Threads

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 1, 1, tzinfo=UTC)
VALUE: ContextVar[int] = ContextVar("VALUE", default=0)


def job(id_: int, crashes: int = 0) -> ClaimedJob:
    info = JobInfo(
        id_, "t", "q", "invoke", 0, crashes, 1, 0, None, NOW, NOW, None, None, None, f"job:{id_}"
    )
    return ClaimedJob(info, b"{}", 0.0, 0.0)


async def _never(_job: JobInfo) -> bool:
    return False


class Rig:
    """Slots without a database, and a handler that waits until it is let go."""

    def __init__(self, limit: int, batch: Batch | None = None) -> None:
        self.order: list[int] = []
        self.batches: list[list[int]] = []
        self.release = asyncio.Event()
        self.woken = 0
        self.twice_crashed: set[int] = set()
        bound: Task[Any, Any] = Task(
            definition=define_task("t"),
            triggers=(Invocable(),),
            handler=self.handle if batch is None else self.handle_all,
            is_sync=False,
            batch=batch,
        )
        no_steps: Any = None
        surroundings = Surroundings({"t": bound}, no_steps, Threads("t"), None, _never)
        self.slots = Slots(limit, surroundings, twice_crashed=self.twice_crashed, wake=self.wake)

    def wake(self) -> None:
        self.woken += 1

    async def handle(self, _event: Any, ctx: Any) -> None:
        self.order.append(ctx.job.id)
        await self.release.wait()

    async def handle_all(self, events: Any, ctx: Any) -> None:
        assert len(events) == len(ctx.jobs)
        self.batches.append([job.id for job in ctx.jobs])
        await self.release.wait()

    async def rest(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


async def test_no_more_than_the_limit_runs_at_once() -> None:
    rig = Rig(2)
    rig.slots.take([job(1), job(2), job(3)])
    await rig.rest()
    assert rig.order == [1, 2]
    assert (rig.slots.busy, len(rig.slots.buffer)) == (2, 1)
    assert rig.slots.known() == {1, 2, 3}
    rig.release.set()
    await rig.rest()
    assert rig.order == [1, 2, 3]
    assert [outcome.id for outcome in rig.slots.next_outcomes(2)] == [1, 2]
    assert [outcome.id for outcome in rig.slots.next_outcomes(2)] == [3]
    assert rig.slots.busy == 0


async def test_suspects_go_before_what_waits() -> None:
    rig = Rig(1)
    rig.slots.take([job(1), job(2)])
    rig.slots.take([job(9, 1)], first=True)
    rig.release.set()
    await rig.rest()
    assert rig.order == [1, 9, 2]


async def test_slow_jobs_are_not_claimed_ahead() -> None:
    rig = Rig(3)
    assert rig.slots.room() == 3
    rig.slots.take([job(1)])
    assert rig.slots.room() == 2
    rig.slots.take([job(2), job(3)])
    assert rig.slots.room() == 0
    rig.release.set()


async def test_fast_jobs_are_claimed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    rig = Rig(10)
    rig.release.set()
    for batch in range(6):
        rig.slots.take([job(1000 * batch + n) for n in range(500)])
        for _ in range(200):
            await asyncio.sleep(0)
        assert rig.slots.busy == 0
        now += 0.05
        room = rig.slots.room()
    assert 900 < room <= 10 + 1000  # 10,000 a second, a tenth of a second ahead
    rig.slots.buffer.extend(job(n) for n in range(600))
    assert rig.slots.room() == 0  # until half of it is used up


async def test_what_has_not_started_is_given_back() -> None:
    rig = Rig(1)
    rig.twice_crashed.add(3)
    rig.slots.take([job(1), job(2), job(3, 2)])
    rig.slots.return_buffer()
    outcomes = rig.slots.next_outcomes(10)
    assert [(type(outcome), outcome.id) for outcome in outcomes] == [
        (Rescheduled, 2),
        (Rescheduled, 3),
    ]
    assert rig.twice_crashed == set()
    rig.slots.return_running()
    await rig.rest()
    assert [type(outcome) for outcome in rig.slots.next_outcomes(10)] == [Rescheduled]
    assert rig.slots.running == {}


async def test_what_is_abandoned_leaves_no_outcome() -> None:
    rig = Rig(1)
    rig.slots.take([job(1), job(2)])
    await rig.rest()
    rig.slots.abandon()
    await rig.rest()
    assert rig.slots.next_outcomes(10) == []
    assert rig.slots.busy == 0


async def test_cancellation_goes_by_the_fence() -> None:
    rig = Rig(1)
    rig.slots.take([job(1), job(2)])
    await rig.rest()
    for one in (1, 2):
        rig.slots.cancel(one, 99, "another claim's")
    await rig.rest()
    assert rig.slots.next_outcomes(10) == []
    for one in (1, 2):
        rig.slots.cancel(one, 1, "ours")
    await rig.rest()
    endings = {o.id: o.ending for o in rig.slots.next_outcomes(10) if isinstance(o, Finished)}
    assert endings == {1: "cancelled", 2: "cancelled"}


async def test_threads_are_reused_and_carry_the_callers_context() -> None:
    threads = Threads("t")
    VALUE.set(7)
    names = set()
    for _ in range(3):
        future = threads.submit(lambda: (threading.current_thread().name, VALUE.get()))
        name, value = await asyncio.wrap_future(future)
        names.add(name)
        assert value == 7
    assert len(names) == 1
    with pytest.raises(ZeroDivisionError):
        await asyncio.wrap_future(threads.submit(lambda: 1 // 0))
    threads.close()


async def test_jobs_that_wait_for_their_batch_hold_slots() -> None:
    rig = Rig(10, Batch(size=3, wait_s=3600))
    rig.slots.take([job(1), job(2)])
    await rig.rest()
    assert (rig.slots.busy, rig.slots.room(), rig.batches) == (2, 8, [])
    assert rig.slots.known() == {1, 2}
    rig.slots.take([job(3), job(4)])
    await rig.rest()
    assert (rig.slots.busy, rig.batches) == (4, [[1, 2, 3]])
    rig.release.set()
    await rig.rest()
    assert [outcome.id for outcome in rig.slots.next_outcomes(10)] == [1, 2, 3]
    assert rig.slots.busy == 1
    rig.slots.return_buffer()
    assert [(type(o), o.id) for o in rig.slots.next_outcomes(10)] == [(Rescheduled, 4)]
    assert rig.slots.busy == 0


async def test_an_abandoned_batch_writes_nothing() -> None:
    rig = Rig(10, Batch(size=2, wait_s=3600))
    rig.slots.take([job(1), job(2), job(3)])
    await rig.rest()
    rig.slots.abandon()
    await rig.rest()
    assert (rig.slots.busy, rig.slots.known(), rig.slots.next_outcomes(10)) == (0, set(), [])


async def test_a_cancelled_job_leaves_its_batch() -> None:
    rig = Rig(10, Batch(size=3, wait_s=3600))
    rig.slots.take([job(1), job(2)])
    rig.slots.cancel(1, 1, "why")
    (outcome,) = rig.slots.next_outcomes(10)
    assert isinstance(outcome, Finished)
    assert (outcome.id, outcome.ending, rig.slots.busy) == (1, "cancelled", 1)
    rig.slots.take([job(3), job(4)])
    await rig.rest()
    assert rig.batches == [[2, 3, 4]]
    rig.release.set()
    await rig.rest()


async def test_batches_that_hold_every_slot_wait_for_nobody() -> None:
    rig = Rig(2, Batch(size=100, wait_s=3600))
    rig.slots.take([job(1), job(2), job(3)])
    await rig.rest()
    assert rig.batches == [[1, 2]]
    rig.release.set()
    await rig.rest()
    assert rig.slots.busy == 1
    rig.slots.return_buffer()
