"""The gauges of the whole queue: exported by one process at a time, a sidecar before a worker."""

from __future__ import annotations

import asyncio
import math

import psycopg
import pytest

from conductor.connections import Connections
from conductor.errors import MigrationMismatch
from conductor.gauges import EVERY_S, SIDECAR, Gauges, SidecarGauges
from conductor.metrics import STATES, Metrics
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio
READ = "conductor_gauges_read_timestamp_seconds"


class Exporter:
    """One process that may export the gauges."""

    def __init__(self, connections: Connections, precedence: int) -> None:
        self.metrics = Metrics()
        self.gauges = Gauges(connections, self.metrics, precedence=precedence)

    def shows(self, name: str = READ, **labels: str) -> float | None:
        """The value of a gauge; None when it is not shown."""
        value = self.metrics.registry.get_sample_value(name, labels)
        return None if value is None or math.isnan(value) else value


@pytest.fixture
async def worker(queue: Queue) -> Exporter:
    return Exporter(queue.connections, 0)


@pytest.fixture
async def sidecar(queue: Queue) -> Exporter:
    return Exporter(queue.connections, SIDECAR)


@pytest.fixture
async def stocked(queue: Queue) -> Queue:
    await queue.rows("insert into conductor.queues (name) values ('mail')")
    await queue.rows("insert into conductor.progress (slot) values ('orders'), ('calm')")
    await queue.rows(
        "insert into conductor.gaps (slot, condition, policy, closed_at) values"
        " ('orders', 'slot_lost', 'stop', null), ('orders', 'slot_lost', 'recreate', now())"
    )
    await queue.rows(
        "insert into conductor.dead_letters (slot, generation, commit_lsn, ordinal, error, raw)"
        " select 'orders', 1, '0/1', n, 'x', '' from generate_series(1, 3) n"
    )
    return queue


async def test_only_one_of_two_workers_shows_them(queue: Queue, worker: Exporter) -> None:
    other = Exporter(queue.connections, 0)
    for exporter in (worker, other, worker):
        await exporter.gauges.tick()
    assert worker.shows()
    assert other.shows() is None


async def test_a_sidecar_takes_the_duty_from_a_worker(
    stocked: Queue, worker: Exporter, sidecar: Exporter
) -> None:
    await worker.gauges.tick()
    assert worker.shows("conductor_workers", queue="mail") == 0
    await sidecar.gauges.tick()
    await worker.gauges.tick()
    assert sidecar.shows("conductor_workers", queue="mail") == 0
    assert worker.shows("conductor_workers", queue="mail") is None
    assert worker.shows() is None
    assert await stocked.value("select precedence from conductor.duties") == SIDECAR


async def test_a_duty_that_is_not_renewed_is_free(
    queue: Queue, worker: Exporter, sidecar: Exporter
) -> None:
    await sidecar.gauges.tick()
    await queue.rows("update conductor.duties set expires_at = now() - interval '1 ms'")
    await worker.gauges.tick()
    assert worker.shows()


async def test_who_stops_leaves_the_duty(queue: Queue, worker: Exporter) -> None:
    sidecar = SidecarGauges(queue.database.dsn)
    running = asyncio.create_task(sidecar.run())
    await queue.until("select exists (select from conductor.duties)")
    sidecar.stop()
    await asyncio.wait_for(running, 60)
    assert await queue.rows("select * from conductor.duties") == []
    await worker.gauges.tick()
    assert worker.shows()


async def test_what_the_router_left_behind_is_shown(stocked: Queue, worker: Exporter) -> None:
    await worker.gauges.tick()
    assert worker.shows("conductor_gaps_open", slot="orders", condition="slot_lost") == 1
    assert worker.shows("conductor_gaps_open", slot="calm", condition="none") == 0
    assert worker.shows("conductor_dead_letters", slot="orders") == 3
    assert worker.shows("conductor_dead_letters", slot="calm") == 0
    await stocked.rows("update conductor.gaps set closed_at = now()")
    await worker.gauges.tick()
    assert worker.shows("conductor_gaps_open", slot="orders", condition="slot_lost") is None
    assert worker.shows("conductor_gaps_open", slot="orders", condition="none") == 0


OLDEST = "conductor_oldest_ready_timestamp_seconds"
SINCE = "2026-01-01T00:00:00Z"
SINCE_S = 1767225600.0
JOB = (
    "insert into conductor.jobs (queue, task, payload, run_at, state, worker, key, ordered) values"
)
CALL = "insert into conductor.lane_calls (queue, task, key) values ('mail', 'send', 'k')"
SCHEDULE = "insert into conductor.schedules (app, task, name, queue, expression, timezone, next_at"
WORKER = (
    "insert into conductor.workers (app, queue, tasks, host, pid, slots, renewals)"
    " values ('shop', 'mail', '{send}', 'gone', 1, 5, 7) returning id"
)


@pytest.mark.parametrize(
    "statement",
    [
        f"{JOB} ('mail', 'send', '{{}}', '{SINCE}', 'scheduled', null, null, null)",
        f"{JOB} ('mail', 'send', '{{}}', '{SINCE}', 'waiting', null, null, null)",
        f"{JOB} ('mail', 'send', '{{}}', '{SINCE}', 'suspect', null, null, null)",
        f"{SCHEDULE}) values ('shop', 'send', 'nightly', 'mail', '0 3 * * *', 'UTC', '{SINCE}')",
    ],
    ids=["scheduled", "waiting", "suspect", "schedule"],
)
async def test_what_is_due_shows_though_no_worker_marked_it_ready(
    queue: Queue, worker: Exporter, statement: str
) -> None:
    await queue.rows("insert into conductor.queues (name) values ('mail'), ('idle')")
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == 0
    await queue.rows(statement)
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == SINCE_S
    assert worker.shows(OLDEST, queue="idle") == 0
    assert worker.shows("conductor_workers", queue="mail") == 0


async def test_a_lane_that_nobody_looks_at_is_due_since_it_was_seen(
    queue: Queue, worker: Exporter
) -> None:
    """Not since its job came: behind others of a busy lane it may have waited for hours."""
    await queue.rows("insert into conductor.queues (name) values ('mail')")
    await queue.rows(f"{JOB} ('mail', 'send', '{{}}', '{SINCE}', 'parked', null, 'k', true)")
    await queue.rows(CALL)
    began_s = float(await queue.value("select extract(epoch from now())"))
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == 0
    await worker.gauges.tick()
    since_s = worker.shows(OLDEST, queue="mail") or 0
    assert since_s >= began_s
    await queue.rows(CALL)
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == since_s
    await queue.rows("delete from conductor.lane_calls where id = 1")  # a worker has taken one
    for _ in range(2):
        await worker.gauges.tick()
    assert (worker.shows(OLDEST, queue="mail") or 0) > since_s
    await queue.rows("delete from conductor.lane_calls")
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == 0


async def test_what_has_come_for_a_waiting_job_is_due_until_it_is_told(
    queue: Queue, worker: Exporter
) -> None:
    """The router leaves word of a change; only a worker wakes the job that waits for it."""
    await queue.rows("insert into conductor.queues (name) values ('mail')")
    job = await queue.value(
        f"{JOB} ('mail', 'send', '{{}}', 'infinity', 'waiting', null, null, null) returning id"
    )
    began_s = float(await queue.value("select extract(epoch from now())"))
    await queue.rows("insert into conductor.wakeups (job, step) values (%s, 'paid')", job)
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == 0
    await worker.gauges.tick()
    assert (worker.shows(OLDEST, queue="mail") or 0) >= began_s
    running = "update conductor.jobs set state = 'running', worker = 1, run_at = now()"
    await queue.rows(running)  # it is told once its row can be locked
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == 0
    waiting = "update conductor.jobs set state = 'waiting', worker = null, run_at = 'infinity'"
    await queue.rows(waiting)
    await worker.gauges.tick()
    assert (worker.shows(OLDEST, queue="mail") or 0) >= began_s
    await queue.rows("delete from conductor.wakeups")
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == 0


async def test_what_is_not_due_yet_does_not_show(queue: Queue, worker: Exporter) -> None:
    await queue.rows("insert into conductor.queues (name) values ('mail')")
    await queue.rows(
        f"{JOB} ('mail', 'send', '{{}}', now() + interval '1 hour', 'scheduled', null, null, null),"
        " ('mail', 'send', '{}', 'infinity', 'waiting', null, null, null)"
    )
    await queue.rows(  # made at run time, for a task nobody has registered: it rests
        f"{SCHEDULE}, payload)"
        f" values ('', 'send', 'x', 'mail', '* * * * *', 'UTC', '{SINCE}', '{{}}')"
    )
    await worker.gauges.tick()
    assert worker.shows(OLDEST, queue="mail") == 0


async def test_workers_whose_counters_stand_still_are_gone(
    queue: Queue, worker: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were killed at once: their rows stay, for nobody is left to declare them dead."""
    passed_s = 0.0
    monkeypatch.setattr("conductor.gauges.monotonic", lambda: passed_s)
    exporter = Exporter(queue.connections, SIDECAR)
    await queue.rows("insert into conductor.queues (name) values ('mail'), ('conductor.internal')")
    lease = await queue.value(WORKER)
    await queue.rows(f"{JOB} ('mail', 'send', '{{}}', '{SINCE}', 'running', {lease}, null, null)")
    for renewed in (0, 1, 0):
        await queue.rows("update conductor.workers set renewals = renewals + %s", renewed)
        await exporter.gauges.tick()
        assert exporter.shows("conductor_workers", queue="mail") == 1
        assert exporter.shows("conductor_workers", queue="conductor.internal") == 1
        assert exporter.shows(OLDEST, queue="mail") == 0
        passed_s += EVERY_S
    await exporter.gauges.tick()
    assert exporter.shows("conductor_workers", queue="mail") == 0
    assert exporter.shows("conductor_workers", queue="conductor.internal") == 0
    assert exporter.shows(OLDEST, queue="mail") == SINCE_S


XMIN_AGE = "conductor_oldest_xmin_age_transactions"


async def test_a_forgotten_prepared_transaction_is_an_old_snapshot(
    queue: Queue, worker: Exporter
) -> None:
    await queue.rows("create table public.notes (id int)")
    with psycopg.connect(queue.database.dsn, autocommit=True) as connection:
        connection.execute("begin")
        connection.execute("insert into public.notes values (1)")
        connection.execute(b"prepare transaction '%s'" % queue.database.name.encode())
    try:
        await use_up_transactions(queue)
        await worker.gauges.tick()
        assert (worker.shows(XMIN_AGE) or 0) >= USED_UP
    finally:
        with psycopg.connect(queue.database.dsn, autocommit=True) as connection:
            connection.execute(b"rollback prepared '%s'" % queue.database.name.encode())
    await worker.gauges.tick()
    assert (worker.shows(XMIN_AGE) or 0) < USED_UP


async def test_a_writer_that_stands_idle_without_a_snapshot_counts(
    queue: Queue, worker: Exporter
) -> None:
    await queue.rows("create table public.notes (id int)")
    with psycopg.connect(queue.database.dsn) as connection:
        connection.execute("insert into public.notes values (1)")
        await use_up_transactions(queue)
        await worker.gauges.tick()
        assert (worker.shows(XMIN_AGE) or 0) >= USED_UP


USED_UP = 50


async def use_up_transactions(queue: Queue) -> None:
    for _ in range(USED_UP):
        await queue.rows("select pg_current_xact_id()")


async def test_every_state_of_jobs_is_there_from_the_start(queue: Queue, worker: Exporter) -> None:
    await queue.rows("insert into conductor.queues (name) values ('mail')")
    await worker.gauges.tick()
    states = await queue.column("select unnest(enum_range(null::conductor.job_state))::text")
    assert sorted(STATES) == sorted(states)
    for state in states:
        assert worker.shows("conductor_jobs", queue="mail", state=state) == 0


async def test_gauges_that_cannot_be_read_are_not_shown(queue: Queue, worker: Exporter) -> None:
    await worker.gauges.tick()
    assert worker.shows()
    await queue.rows("alter table conductor.queues rename to hidden")
    with pytest.raises(MigrationMismatch, match="queues"):
        await worker.gauges.tick()
    assert worker.shows() is None


async def test_a_sidecar_serves_nothing_of_a_worker(queue: Queue) -> None:
    families = {family.name for family in SidecarGauges(queue.database.dsn).registry.collect()}
    assert "conductor_jobs" in families
    assert "conductor_jobs_started" not in families
    assert "conductor_cron_last_tick_timestamp_seconds" not in families
