from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from conductor.store.arrays import JsonArray
from conductor.store.jobs import Claim, ClaimRange, Exchange, Finished, JobStore, Rescheduled
from conductor.store.leases import WorkerRow, WorkerStore
from conductor.store.sessions import connect
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio

WEEK = timedelta(days=7)


class Hand:
    """A worker played by hand."""

    def __init__(self, connection: AsyncConnection[Any], worker: int) -> None:
        self.connection, self.worker = connection, worker
        self.store = JobStore(connection)

    async def claim(self, limit: int = 10) -> Exchange:
        return await self.store.exchange(self.worker, [], everything(limit))

    async def settle(self, *outcomes: Any) -> Exchange:
        return await self.store.exchange(self.worker, outcomes, None)


def everything(limit: int = 10) -> Claim:
    return Claim("q", ["t"], [ClaimRange("t", -32768, None, 0, 32767)], limit, 0.0, 2)


def done(job: int, fence: int = 1, document: bytes | None = b"1", **other: Any) -> Finished:
    return Finished(
        job, fence, "t", **{"ending": "completed", "retention": WEEK, "stepped": False, **other},
        document=document,
    )  # fmt: skip


async def new_hand(queue: Queue) -> Hand:
    connection = await connect(queue.database.dsn, "hand")
    row = WorkerRow("app", None, "q", ["t"], "host", 1, 10)
    return Hand(connection, await WorkerStore(connection).register(row))


@pytest.fixture
async def hand(queue: Queue) -> AsyncIterator[Hand]:
    hand = await new_hand(queue)
    yield hand
    await hand.connection.close()


async def enqueue(queue: Queue, count: int = 1, **columns: Any) -> list[int]:
    names = "".join(f", {name}" for name in columns)
    return await queue.column(
        f"insert into conductor.jobs (queue, task, payload{names})"
        f" select 'q', 't', '{{}}'{', %s' * len(columns)} from generate_series(1, %s) returning id",
        *columns.values(),
        count,
    )


async def test_history_is_the_job_as_it_was(queue: Queue, hand: Hand) -> None:
    (job,) = await enqueue(
        queue, rank=-2, key="k", app="a", version="v", metadata=json.dumps({"trace": 1}),
        dedupe_key="d", source_generation=1, source_lsn="0/10", source_ordinal=2, subscription=3,
        parent=9,
    )  # fmt: skip
    await hand.claim()
    (before,) = await queue.rows("select * from conductor.jobs")
    assert (await hand.settle(done(job, document=b'{"a":1}'))).settled == {job}
    (after,) = await queue.rows("select * from conductor.history")
    gone = {"worker", "state", "last_error", "cancel_reason", "woken", "emitted_by"}
    gone |= {"ordered", "place", "coalescing"}
    assert {name: after[name] for name in before.keys() - gone} == {
        name: value for name, value in before.items() if name not in gone
    }
    assert (after["result"], after["error"], after["outcome"]) == ({"a": 1}, None, "completed")
    assert before.keys() - gone == after.keys() - {
        "result", "error", "outcome", "finished_at", "expires_on",
    }  # fmt: skip


async def test_each_outcome_ends_its_own_way(queue: Queue, hand: Hand) -> None:
    jobs = await enqueue(queue, 6)
    await hand.claim()
    one, two, three, four, five, six = jobs
    wake_at = await queue.value("select conductor.now() + interval '1 hour'")
    reply = await hand.settle(
        done(one, document=None, retention=timedelta(hours=1)),
        done(two, ending="failed", document=b'"why"', retention=timedelta.max),
        done(three, ending="cancelled", document=b'"why"', retention=timedelta(0)),
        Rescheduled(four, 1, "t", failures=1, delay_s=60.0, error=b'"later"'),
        Rescheduled(five, 1, "t", wake_at=wake_at),
        Rescheduled(six, 1, "t"),
    )
    assert reply.settled == set(jobs)
    kept = await queue.rows("select outcome, attempt, error from conductor.history order by id")
    assert [(row["outcome"], row["attempt"], row["error"]) for row in kept] == [
        ("completed", 0, None),
        ("failed", 1, "why"),
    ]
    assert await queue.value(
        "select expires_on = 'infinity' from conductor.history where outcome = 'failed'"
    )
    left = await queue.rows("select * from conductor.jobs order by id")
    assert [(row["state"], row["attempt"], row["last_error"]) for row in left] == [
        ("scheduled", 1, "later"),
        ("scheduled", 0, None),
        ("ready", 0, None),
    ]
    assert left[1]["run_at"] == wake_at
    assert {(row["worker"], row["started_at"], row["fence"]) for row in left} == {(None, None, 1)}


async def test_a_lost_fence_writes_nothing(queue: Queue, hand: Hand) -> None:
    (job,) = await enqueue(queue)
    await hand.claim()
    await hand.settle(Rescheduled(job, 1, "t"))
    again = await hand.claim()
    assert again.jobs[0].info.fence == 2
    for late in (done(job, 1), Rescheduled(job, 1, "t", failures=1)):
        assert (await hand.settle(late)).settled == set()
    other = await new_hand(queue)
    assert (await other.settle(done(job, 2))).settled == set()
    await other.connection.close()
    assert await queue.rows("select attempt, fence, state from conductor.jobs") == [
        {"attempt": 0, "fence": 2, "state": "running"}
    ]
    assert (await hand.settle(done(job, 2))).settled == {job}


async def test_a_locked_row_is_skipped_and_settled_later(queue: Queue, hand: Hand) -> None:
    one, two = await enqueue(queue, 2)
    await hand.claim()
    async with await psycopg.AsyncConnection.connect(queue.database.dsn) as other:
        await other.execute("select from conductor.jobs where id = %s for update", [one])
        async with asyncio.timeout(60):
            assert (await hand.settle(done(one), done(two))).settled == {two}
    assert await hand.store.owned(hand.worker, [one, two]) == {one: 1}
    assert (await hand.settle(done(one))).settled == {one}


async def test_a_bad_settle_does_not_take_the_claim_with_it(queue: Queue, hand: Hand) -> None:
    one, two = await enqueue(queue, 2)
    await hand.claim(1)
    reply = await hand.store.exchange(hand.worker, [done(one, document=b"not json")], everything())
    assert isinstance(reply.error, psycopg.DataError)
    assert [outcome.id for outcome in reply.refused] == [one]
    assert [job.info.id for job in reply.jobs] == [two]
    assert (await hand.settle(done(one), done(two))).settled == {one, two}


async def test_a_failing_claim_does_not_roll_back_the_settle(queue: Queue, hand: Hand) -> None:
    one, two = await enqueue(queue, 2)
    await hand.claim(1)
    broken = everything()
    broken.limit = 2**80
    reply = await hand.store.exchange(hand.worker, [done(one)], broken)
    assert reply.error is not None
    assert reply.settled == {one}
    assert await queue.column("select id from conductor.history") == [one]
    assert [job.info.id for job in (await hand.claim()).jobs] == [two]


async def test_a_claim_sees_what_the_settle_before_it_frees(queue: Queue, hand: Hand) -> None:
    (job,) = await enqueue(queue)
    await hand.claim()
    reply = await hand.store.exchange(hand.worker, [Rescheduled(job, 1, "t")], everything())
    assert [claimed.info.fence for claimed in reply.jobs] == [2]


async def test_steps_go_with_their_job(queue: Queue, hand: Hand) -> None:
    one, two = await enqueue(queue, 2)
    await hand.claim()
    await queue.rows(
        "insert into conductor.steps (job, name, position, result)"
        " select j, 'a', 0, '1' from unnest(%s::bigint[]) j",
        [one, two],
    )
    await hand.settle(done(one, stepped=True))
    assert await queue.column("select job from conductor.steps") == [two]


async def test_looking_back_finds_what_came_late(queue: Queue, hand: Hand) -> None:
    now = await queue.value("select conductor.now()")

    async def found(ago_s: float, cursor_ago_s: float, look_back_s: float) -> bool:
        (job,) = await enqueue(queue, run_at=now - timedelta(seconds=ago_s))
        cursor = ClaimRange("t", 0, now - timedelta(seconds=cursor_ago_s), 10**9, 0)
        claim = Claim("q", ["t"], [cursor], 10, look_back_s)
        reply = await hand.store.exchange(hand.worker, [], claim)
        await queue.rows("delete from conductor.jobs where id = %s", job)
        return [claimed.info.id for claimed in reply.jobs] == [job]

    assert await found(ago_s=0.5, cursor_ago_s=1.0, look_back_s=0.0)
    assert not await found(ago_s=1.5, cursor_ago_s=1.0, look_back_s=0.0)
    assert not await found(ago_s=1.0, cursor_ago_s=1.0, look_back_s=0.0)
    assert await found(ago_s=60.0, cursor_ago_s=1.0, look_back_s=90.0)
    assert await found(ago_s=1.0, cursor_ago_s=1.0, look_back_s=90.0)
    assert not await found(ago_s=120.0, cursor_ago_s=1.0, look_back_s=90.0)
    assert not await found(ago_s=200.0, cursor_ago_s=100.0, look_back_s=90.0)
    assert await found(ago_s=99.0, cursor_ago_s=100.0, look_back_s=90.0)


async def test_suspects_are_claimed_alone(queue: Queue, hand: Hand) -> None:
    await enqueue(queue, 3)
    await enqueue(queue, 3, state="suspect", crashes=1)
    reply = await hand.claim()
    assert [job.info.crashes for job in reply.jobs] == [0, 0, 0]
    assert [job.info.crashes for job in reply.suspects] == [1]


async def test_a_worker_without_a_lease_claims_nothing(queue: Queue, hand: Hand) -> None:
    await enqueue(queue)
    await enqueue(queue, state="suspect", crashes=1)
    await queue.rows("update conductor.workers set renewals = -1")
    reply = await hand.claim()
    assert reply.jobs == []
    assert reply.suspects == []


async def test_nothing_is_prepared(queue: Queue, hand: Hand) -> None:
    for _ in range(12):
        (job,) = await enqueue(queue)
        await hand.claim()
        await hand.settle(done(job))
        await hand.store.promote(None, 10)
    cursor = await hand.connection.execute("select count(*) from pg_prepared_statements")
    assert await cursor.fetchone() == (0,)


async def test_json_arrays_arrive_as_they_are(hand: Hand) -> None:
    documents = [b'{"a": [1, "\xc3\xa9"]}', None, b"null", b'"\\u0000"', b" 1 "]
    cursor = hand.connection.cursor(binary=True)
    await cursor.execute("select unnest(%s::json[])", [JsonArray(documents)])
    assert [row[0] for row in await cursor.fetchall()] == documents


async def test_a_job_to_be_cancelled_is_not_left_to_run_again(queue: Queue, hand: Hand) -> None:
    jobs = one, two, three, four = await enqueue(queue, 4, parent=9)
    await hand.claim()
    for job in jobs[:3]:
        await queue.value("select conductor.cancel(%s, 'enough')", job)
    reply = await hand.settle(
        Rescheduled(one, 1, "t", failures=1, delay_s=60.0, error=b'"later"'),
        Rescheduled(two, 1, "t", waits=True),
        Rescheduled(three, 1, "t"),
        Rescheduled(four, 1, "t"),
    )
    assert reply.settled == set(jobs)
    ended = await queue.rows("select * from conductor.history order by id")
    assert [(row["id"], row["outcome"], row["attempt"]) for row in ended] == [
        (one, "cancelled", 1),
        (two, "cancelled", 0),
        (three, "cancelled", 0),
    ]
    assert {row["error"]["message"] for row in ended} == {"enough"}
    assert await queue.column("select id from conductor.jobs") == [four]
    told = "select child from conductor.wakeups where outcome = 'cancelled' order by child"
    assert await queue.column(told) == [one, two, three]
