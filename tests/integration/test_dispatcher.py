from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from prometheus_client import generate_latest
from psycopg.types.json import Json

from conductor import dispatcher as module
from conductor.dispatcher import Dispatcher
from conductor.errors import DatabaseUnavailable
from conductor.metrics import Metrics
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio


async def subscribe(
    queue: Queue, task: str, event: str, target: str = "default", when: str | None = None
) -> int:
    number: int = await queue.value(
        "insert into conductor.subscriptions (app, task, trigger, kind, queue, version, rank,"
        " definition) values ('shop', %s, %s, 'event', %s, 'v1', -3, %s) returning id",
        task,
        f"event:{event}",
        target,
        Json({"event": event, "when": when}),
    )
    return number


async def emit(queue: Queue, event: str, payload: Any = None, metadata: Any = None) -> int:
    number: int = await queue.value(
        "select conductor.emit(%s, %s, %s)", event, Json(payload), metadata and Json(metadata)
    )
    return number


def dispatcher(queue: Queue, metrics: Metrics | None = None, hints: list[str] | None = None) -> Any:
    told: list[str] = [] if hints is None else hints
    return Dispatcher(queue.connections, metrics or Metrics(), told.append)


async def drain(*dispatchers: Any) -> None:
    while any(await asyncio.gather(*(one.dispatch() for one in dispatchers))):
        pass


JOBS = "select * from conductor.jobs where trigger = 'event' and task <> 'conductor.dispatch'"
PENDING = "select count(*) from conductor.jobs where task = 'conductor.dispatch'"


async def test_each_subscriber_gets_a_job(queue: Queue, metrics: Metrics) -> None:
    greet = await subscribe(queue, "greet", "user.created", "mail")
    await subscribe(queue, "count", "user.created")
    await subscribe(queue, "other", "user.deleted")
    await emit(queue, "user.created", {"id": 7}, {"traceparent": "00-1"})
    hints: list[str] = []
    assert await dispatcher(queue, metrics, hints).dispatch() == 1
    first, second = await queue.rows(f"{JOBS} order by id")
    assert (first["task"], first["queue"], first["app"]) == ("greet", "mail", "shop")
    assert (first["version"], first["rank"], first["state"]) == ("v1", -3, "ready")
    assert first["subscription"] == greet
    assert first["payload"] == {"event": "user.created", "payload": {"id": 7}}
    assert first["metadata"] == {"traceparent": "00-1"}
    assert second["task"] == "count"
    assert await queue.value(PENDING) == 0
    assert sorted(hints) == ["default", "mail"]
    shown = generate_latest(metrics.registry).decode()
    assert "conductor_events_dispatched_total 1.0" in shown
    assert "conductor_events_unmatched_total 0.0" in shown


async def test_an_event_that_nobody_wants_is_counted(queue: Queue, metrics: Metrics) -> None:
    await emit(queue, "user.created")
    await drain(dispatcher(queue, metrics))
    assert await queue.value(PENDING) == 0
    assert await queue.rows(JOBS) == []
    assert "conductor_events_unmatched_total 1.0" in generate_latest(metrics.registry).decode()


async def test_a_retired_subscription_gets_nothing(queue: Queue) -> None:
    number = await subscribe(queue, "greet", "user.created")
    await queue.rows("update conductor.subscriptions set retired_at = now() where id = %s", number)
    await emit(queue, "user.created")
    await drain(dispatcher(queue))
    assert await queue.rows(JOBS) == []


async def test_a_subscription_counts_from_its_commit(queue: Queue) -> None:
    one = dispatcher(queue)
    await emit(queue, "user.created", 1)
    await drain(one)
    await subscribe(queue, "greet", "user.created")
    await emit(queue, "user.created", 2)
    await drain(one)
    assert [job["payload"]["payload"] for job in await queue.rows(JOBS)] == [2]


async def test_jobs_come_in_the_order_of_their_events(queue: Queue) -> None:
    await subscribe(queue, "greet", "user.created")
    await subscribe(queue, "count", "user.created")
    for number in range(20):
        await emit(queue, "user.created", number)
    await drain(dispatcher(queue))
    jobs = await queue.rows(f"{JOBS} order by id")
    assert [job["payload"]["payload"] for job in jobs] == [n for n in range(20) for _ in range(2)]


async def test_many_dispatchers_dispatch_each_event_once(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 50)
    await subscribe(queue, "greet", "user.created")
    await queue.rows(
        "select conductor.emit('user.created', to_json(n)) from generate_series(1, 1000) n"
    )
    await drain(*(dispatcher(queue) for _ in range(6)))
    counts = Counter(job["payload"]["payload"] for job in await queue.rows(JOBS))
    assert counts == dict.fromkeys(range(1, 1001), 1)
    assert await queue.value(PENDING) == 0


async def test_a_batch_that_is_rolled_back_is_dispatched_again(queue: Queue) -> None:
    await subscribe(queue, "greet", "user.created")
    one = dispatcher(queue)
    await drain(one)
    await emit(queue, "user.created")
    await queue.rows(
        "create function conductor.die() returns trigger language plpgsql as $$ begin"
        " if new.task = 'greet' then perform pg_terminate_backend(pg_backend_pid()); end if;"
        " return new; end $$"
    )
    await queue.rows(
        "create trigger die before insert on conductor.jobs"
        " for each row execute function conductor.die()"
    )
    with pytest.raises(DatabaseUnavailable):
        await one.dispatch()
    assert await queue.value(PENDING) == 1
    await queue.rows("drop trigger die on conductor.jobs")
    await drain(one)
    assert len(await queue.rows(JOBS)) == 1


async def test_what_was_committed_late_is_found(queue: Queue) -> None:
    await subscribe(queue, "greet", "user.created")
    one = dispatcher(queue)
    async with queue.connections.lend() as slow, slow.transaction():
        await slow.execute(
            "insert into conductor.jobs (queue, task, trigger, payload, run_at) select"
            " 'conductor.internal', 'conductor.dispatch', 'event',"
            ' \'{"event": "user.created", "payload": "late"}\', now() - interval \'1 minute\''
            " from generate_series(1, 1200)"
        )
        await emit(queue, "user.created", "early")
        await drain(one)
        assert len(await queue.rows(JOBS)) == 1
    running = asyncio.create_task(one.run())
    await queue.until(f"select ({PENDING}) = 0")
    one.stop()
    await running
    assert len(await queue.rows(JOBS)) == 1201


async def test_what_cannot_be_read_fails_and_stops_nothing(queue: Queue, metrics: Metrics) -> None:
    await subscribe(queue, "greet", "user.created")
    bad = await queue.value(
        "insert into conductor.jobs (queue, task, trigger, payload) values"
        " ('conductor.internal', 'conductor.dispatch', 'event', '[1]') returning id"
    )
    await emit(queue, "user.created")
    await drain(dispatcher(queue, metrics))
    assert len(await queue.rows(JOBS)) == 1
    (failed,) = await queue.rows("select * from conductor.history")
    assert (failed["id"], failed["outcome"], failed["payload"]) == (bad, "failed", [1])
    assert failed["error"]["type"] == "PayloadInvalid"
    assert "conductor_events_refused_total 1.0" in generate_latest(metrics.registry).decode()


async def test_events_that_an_unreadable_subscription_misses_are_counted(
    queue: Queue, metrics: Metrics
) -> None:
    await subscribe(queue, "greet", '["odd"]')
    unreadable = await subscribe(queue, "broken", "user.created")
    await queue.rows(
        "update conductor.subscriptions set definition = %s where id = %s",
        Json({"event": ["odd"]}),
        unreadable,
    )
    for _ in range(2):
        await emit(queue, '["odd"]')
    await drain(dispatcher(queue, metrics))
    assert [row["task"] for row in await queue.rows(JOBS)] == ["greet", "greet"]
    assert await queue.value(PENDING) == 0
    shown = generate_latest(metrics.registry).decode()
    assert "conductor_events_undelivered_total 2.0" in shown


async def test_a_paused_internal_queue_keeps_its_events(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.queues (name, paused) values ('conductor.internal', true)"
    )
    await emit(queue, "user.created")
    await drain(dispatcher(queue))
    assert await queue.value(PENDING) == 1


async def test_a_wake_ends_the_pause_of_an_idle_one(queue: Queue) -> None:
    await subscribe(queue, "greet", "user.created")
    one = dispatcher(queue)
    one._idle_s = 3600  # only a hint can end this pause
    running = asyncio.create_task(one.run())
    async with asyncio.timeout(60):
        await emit(queue, "user.created")
        while not await queue.rows(JOBS):
            one.wake()
            await asyncio.sleep(0.02)
    one.stop()
    await asyncio.wait_for(running, 60)


async def test_the_scan_is_one_range_of_the_ready_index(queue: Queue) -> None:
    await queue.rows("analyze conductor.jobs")  # empty, as it mostly is when it is analysed
    await queue.rows("select conductor.emit('x', 'null') from generate_series(1, 20000)")
    plan = "\n".join(
        await queue.column(
            "explain select c.ctid from conductor.jobs c where c.state = 'ready'"
            " and c.queue = 'conductor.internal' and c.task = 'conductor.dispatch'"
            " and (c.rank, c.run_at, c.id) > (0::smallint, now(), 5)"
            " order by c.rank, c.run_at, c.id limit 500 for update skip locked"
        )
    )
    assert "Index Scan using jobs_ready" in plan
    assert "ROW(rank, run_at, id) >" in plan
    assert "Sort" not in plan


async def test_a_filter_decides_who_gets_a_job(queue: Queue, metrics: Metrics) -> None:
    when = 'event.email.endsWith("@example.com")'
    await subscribe(queue, "greet", "user.created", when=when)
    await subscribe(queue, "count", "user.created")
    for email in ("a@example.com", "b@example.org"):
        await emit(queue, "user.created", {"email": email})
    await drain(dispatcher(queue, metrics))
    tasks = Counter(row["task"] for row in await queue.rows(JOBS))
    assert tasks == {"greet": 1, "count": 2}


async def test_a_filter_that_fails_leaves_a_failed_job_of_its_task(
    queue: Queue, metrics: Metrics
) -> None:
    greet = await subscribe(queue, "greet", "user.created", when="event.age > 17")
    await subscribe(queue, "broken", "user.created", when="event.age >")
    await subscribe(queue, "count", "user.created")
    await emit(queue, "user.created", {"email": "a"}, {"traceparent": "00-1"})
    await drain(dispatcher(queue, metrics))
    assert [row["task"] for row in await queue.rows(JOBS)] == ["count"]
    failed, broken = await queue.rows("select * from conductor.history order by id")
    assert (failed["task"], failed["subscription"], failed["app"]) == ("greet", greet, "shop")
    assert failed["payload"] == {"event": "user.created", "payload": {"email": "a"}}
    assert failed["metadata"] == {"traceparent": "00-1"}
    assert failed["error"]["type"] == broken["error"]["type"] == "FilterFailed"
    assert "no such key: 'age'" in failed["error"]["message"]
    assert "is not CEL" in broken["error"]["message"]
    assert "conductor_events_refused_total 2.0" in generate_latest(metrics.registry).decode()


async def test_a_filter_that_fails_over_a_nul_stops_no_other_event(
    queue: Queue, metrics: Metrics
) -> None:
    """The library quotes the pattern that it cannot compile, and PostgreSQL cannot hold that."""
    await subscribe(queue, "greet", "said", when='"a".matches(event.x)')
    for pattern in ("(\0", "a"):
        await emit(queue, "said", {"x": pattern})
    await drain(dispatcher(queue, metrics))
    assert [row["task"] for row in await queue.rows(JOBS)] == ["greet"]
    (failed,) = await queue.rows("select * from conductor.history")
    assert failed["error"]["type"] == "FilterFailed"
