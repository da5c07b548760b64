from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client import generate_latest
from pydantic import BaseModel

from conductor.client import Conductor
from conductor.context import Context
from conductor.definitions import define_event, define_task
from conductor.errors import (
    CaptureTimeout,
    ConfigError,
    DatabaseUnavailable,
    MigrationMismatch,
    RegistrationRefused,
    UnknownTable,
)
from conductor.orchestrator import Orchestrator
from conductor.testing import travel
from conductor.triggers import Cron, OnChange, OnEvent
from tests.integration.conftest import Queue, eventually
from tests.servers import ScratchDatabase, dsn_for

pytestmark = pytest.mark.anyio


class Number(BaseModel):
    n: int


double = define_task("double", payload=Number, returns=int)
slow = define_task("slow", payload=Number, queue="slow")
counted = define_event("counted", payload=Number)


async def ignore(_event: Any, _ctx: Any) -> None: ...


class App:
    """An application whose handlers note what they got."""

    def __init__(self, dsn: str, **options: Any) -> None:
        self.conductor = Conductor(dsn, app="shop", version="v1")
        self.seen: list[Any] = []
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.conductor.task(double)(self._double)
        self.conductor.task(slow)(self._slow)
        self.conductor.task("note", OnEvent(counted), Cron("0 0 1 1 *"))(self._note)
        self.orchestrator = Orchestrator(self.conductor, **options)

    async def _double(self, event: Any, _ctx: Any) -> int:
        self.seen.append(event.payload.n)
        return 2 * int(event.payload.n)

    async def _slow(self, event: Any, _ctx: Any) -> None:
        self.started.set()
        await self.release.wait()
        self.seen.append(event.payload.n)

    async def _note(self, event: Any, _ctx: Any) -> None:
        self.seen.append(type(event).__name__)


async def finished(queue: Queue) -> list[dict[str, Any]]:
    return await queue.rows("select task, outcome, result from conductor.history order by id")


async def get(orchestrator: Orchestrator, path: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{orchestrator.address}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def test_an_invoked_task_runs(queue: Queue) -> None:
    app = App(queue.database.dsn)
    async with app.orchestrator, app.conductor:
        handle = await app.conductor.invoke(double, Number(n=21))
        assert await handle.result(timeout_s=60) == 42
    assert await finished(queue) == [{"task": "double", "outcome": "completed", "result": 42}]


async def test_what_was_due_before_the_start_finds_its_partition(queue: Queue) -> None:
    app = App(queue.database.dsn)
    handles = await app.conductor.invoke_many(double, [Number(n=n) for n in range(200)])
    async with app.orchestrator:
        await queue.until("select count(*) = %s from conductor.history", len(handles))
    assert await queue.value("select count(*) from conductor.history_default") == 0


async def test_an_emitted_event_reaches_its_task(queue: Queue) -> None:
    app = App(queue.database.dsn)
    async with app.conductor, app.orchestrator:
        await app.conductor.emit(counted, Number(n=1))
        await app.orchestrator.drain()
    assert app.seen == ["Emitted"]


async def test_a_due_schedule_reaches_its_task(queue: Queue) -> None:
    app = App(queue.database.dsn)
    async with app.orchestrator:
        await queue.rows("update conductor.schedules set next_at = now()")
        await queue.until("select count(*) = 1 from conductor.history")
    assert app.seen == ["Tick"]


async def test_drain_is_over_when_what_has_come_is(queue: Queue) -> None:
    """Time that has passed, an event that is waited for, the end of a child."""
    app = App(queue.database.dsn)
    nap = define_task("nap", payload=Number)

    @app.conductor.task(nap)
    async def _nap(event: Any, ctx: Context) -> None:
        await ctx.sleep("a day", 86_400)
        await ctx.wait_for_event("counted", counted, match={"n": event.payload.n})
        await ctx.invoke("double", double, event.payload)

    orchestrator = Orchestrator(app.conductor)
    async with app.conductor, orchestrator, queue.connections.lend() as connection:
        for n in range(3):
            await app.conductor.invoke(nap, Number(n=n))
            await orchestrator.drain()
            assert (await queue.column("select state::text from conductor.jobs")) == ["scheduled"]
            await travel(connection, timedelta(days=1, seconds=1))
            await orchestrator.drain()
            assert (await queue.column("select state::text from conductor.jobs")) == ["waiting"]
            await app.conductor.emit(counted, Number(n=n))
            await orchestrator.drain()
            assert (await queue.column("select state::text from conductor.jobs")) == []


async def test_drain_starts_and_stops_by_itself(queue: Queue) -> None:
    app = App(queue.database.dsn)
    await app.orchestrator.start()
    await app.orchestrator.stop()
    async with app.conductor:
        await app.conductor.invoke_many(double, [Number(n=n) for n in range(50)])
        await App(queue.database.dsn).orchestrator.drain()
    assert len(await finished(queue)) == 50
    assert await queue.rows("select * from conductor.workers") == []


async def test_a_drain_that_takes_too_long_says_what_is_left(queue: Queue) -> None:
    app = App(queue.database.dsn, slots={"slow": 1})
    async with app.conductor, app.orchestrator:
        await app.conductor.invoke_many(slow, [Number(n=n) for n in range(3)])
        await asyncio.wait_for(app.started.wait(), 60)
        left = "not drained after 0.1 s: 2 ready of task slow, 1 running of task slow"
        with pytest.raises(TimeoutError, match=left):
            await app.orchestrator.drain(timeout_s=0.1)
        app.release.set()


async def test_two_processes_share_the_work(queue: Queue) -> None:
    one, two = App(queue.database.dsn), App(queue.database.dsn)
    async with one.orchestrator, two.orchestrator, one.conductor:
        await one.conductor.invoke_many(double, [Number(n=n) for n in range(500)])
        await one.conductor.emit_many(counted, [Number(n=n) for n in range(100)])
        await two.orchestrator.drain()
    counts = Counter(one.seen + two.seen)
    assert counts.pop("Emitted") == 100
    assert counts == dict.fromkeys(range(500), 1)


async def test_probes_and_metrics(queue: Queue) -> None:
    app = App(queue.database.dsn, metrics_port=0, metrics_host="127.0.0.1", slots={"slow": 3})
    async with app.orchestrator, app.conductor:
        assert await get(app.orchestrator, "/readyz") == (200, "ok\n")
        assert await get(app.orchestrator, "/livez") == (200, "ok\n")
        assert (await get(app.orchestrator, "/healthz"))[0] == 404
        await app.conductor.invoke(double, Number(n=1))
        await app.orchestrator.drain()
        ended = 'finished_total{outcome="completed",queue="default",task="double"} 1.0'

        async def counted() -> bool:  # a moment after the database knows
            return ended in (await get(app.orchestrator, "/metrics"))[1]

        await eventually(counted)
        _, shown = await get(app.orchestrator, "/metrics")
        assert 'conductor_slots{queue="slow"} 3.0' in shown
        assert 'conductor_slots{queue="default"} 100.0' in shown
        assert 'conductor_build_info{app="shop",release="' in shown


async def test_a_port_that_is_taken_is_a_setting_to_correct(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "conductor")
    first = App(queue.database.dsn, metrics_port=0, metrics_host="127.0.0.1")
    async with first.orchestrator, first.conductor:
        port = int(first.orchestrator.address.rpartition(":")[2])
        assert f"serving metrics and probes on 127.0.0.1:{port}" in caplog.messages
        second = App(queue.database.dsn, metrics_port=port, metrics_host="127.0.0.1")
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: ") as caught:
            await second.orchestrator.start()
        assert "CONDUCTOR_METRICS_PORT" in caught.value.hint


async def test_gauges_of_the_queue(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.jobs (queue, task, payload, rank, run_at, state) values"
        " ('default', 'elsewhere', '{}', 0, '2026-01-01T00:00:10Z', 'ready'),"
        " ('default', 'elsewhere', '{}', -5, '2026-01-01T00:00:20Z', 'ready'),"
        " ('default', 'another', '{}', 0, '2026-01-01T00:00:00Z', 'ready'),"
        " ('slow', 'elsewhere', '{}', 0, now() + interval '1 day', 'scheduled')"
    )
    app = App(queue.database.dsn, metrics_port=0, metrics_host="127.0.0.1")
    async with app.orchestrator:

        async def refreshed() -> bool:
            shown = (await get(app.orchestrator, "/metrics"))[1]
            return {
                'conductor_workers{queue="default"} 1.0',
                'conductor_workers{queue="conductor.internal"} 2.0',  # they register one by one
            }.issubset(shown.splitlines())

        await eventually(refreshed)
        shown = (await get(app.orchestrator, "/metrics"))[1]
    assert 'conductor_jobs{queue="default",state="ready"} 3.0' in shown
    assert 'conductor_jobs{queue="slow",state="ready"} 0.0' in shown
    assert 'conductor_jobs{queue="slow",state="scheduled"} 1.0' in shown
    assert 'conductor_oldest_ready_timestamp_seconds{queue="default"} 1.7672256e+09' in shown
    assert 'conductor_oldest_ready_timestamp_seconds{queue="slow"} 0.0' in shown


async def test_what_crashed_for_good_is_counted_by_who_found_it(queue: Queue) -> None:
    worker = await queue.value(
        "insert into conductor.workers (app, queue, tasks, host, pid, slots, renewals)"
        " values ('shop', 'default', '{poison}', 'gone', 1, 5, -1) returning id"
    )
    await queue.rows(
        "insert into conductor.jobs (queue, task, payload, state, worker, fence, crashes) values"
        " ('default', 'poison', '{}', 'running', %s, 1, 2),"
        " ('default', 'poison', '{}', 'running', %s, 1, 0)",
        worker,
        worker,
    )
    app = App(queue.database.dsn, metrics_port=0, metrics_host="127.0.0.1")
    async with app.orchestrator:
        await queue.until("select not exists (select from conductor.workers where renewals < 0)")

        async def counted() -> bool:
            shown = (await get(app.orchestrator, "/metrics"))[1]
            return "conductor_jobs_rescued_total 1.0" in shown

        await eventually(counted)
        shown = (await get(app.orchestrator, "/metrics"))[1]
    assert 'conductor_jobs_crashed_total{queue="default",task="poison"} 1.0' in shown
    failed = 'conductor_jobs_finished_total{outcome="failed",queue="default",task="poison"} 1.0'
    assert failed in shown
    assert 'conductor_jobs_crashed_total{queue="slow",task="slow"} 0.0' in shown


async def test_not_ready_before_the_start_and_while_it_drains(queue: Queue) -> None:
    app = App(queue.database.dsn, metrics_port=0, metrics_host="127.0.0.1")
    async with app.conductor:
        await app.orchestrator.start()
        await app.conductor.invoke(slow, Number(n=1))
        await asyncio.wait_for(app.started.wait(), 60)
        stopping = asyncio.create_task(app.orchestrator.stop())

        async def unready() -> bool:
            return (await get(app.orchestrator, "/readyz"))[0] != 200

        await eventually(unready)
        assert await get(app.orchestrator, "/readyz") == (503, "stopping\n")
        assert (await get(app.orchestrator, "/livez"))[0] == 200
        app.release.set()
        await asyncio.wait_for(stopping, 60)
    assert app.seen == [1]
    assert (await finished(queue))[0]["outcome"] == "completed"


async def test_a_handler_that_does_not_end_is_cancelled_and_its_job_given_back(
    queue: Queue,
) -> None:
    app = App(queue.database.dsn, drain_timeout_s=0.2)
    async with app.conductor:
        await app.orchestrator.start()
        await app.conductor.invoke(slow, Number(n=1))
        await asyncio.wait_for(app.started.wait(), 60)
        await asyncio.wait_for(app.orchestrator.stop(), 20)
    (job,) = await queue.rows("select state::text, attempt, crashes from conductor.jobs")
    assert job == {"state": "ready", "attempt": 0, "crashes": 0}
    assert await queue.rows("select * from conductor.workers") == []


async def test_it_starts_once(queue: Queue) -> None:
    app = App(queue.database.dsn)
    async with app.orchestrator:
        with pytest.raises(RuntimeError, match="is started"):
            await app.orchestrator.start()
    with pytest.raises(RuntimeError, match="is stopped"):
        await app.orchestrator.start()


async def test_without_the_schema_it_says_what_to_run(database: ScratchDatabase) -> None:
    app = App(database.dsn)
    with pytest.raises(MigrationMismatch, match="lacks migration 0001_initial") as refused:
        await app.orchestrator.start()
    assert "conductor migrate" in refused.value.hint


async def test_a_schema_that_is_too_new_ends_what_waits_for_nobody(queue: Queue) -> None:
    app = App(queue.database.dsn)
    async with app.orchestrator:
        await queue.rows("insert into conductor.migrations values (9999, 'later', 'x')")
        await queue.until("select count(*) = 0 from conductor.workers")
    with pytest.raises(MigrationMismatch, match="9999_later"):
        await App(queue.database.dsn).orchestrator.start()


async def test_without_a_server_it_tries_for_a_while(
    tmp_path: Path, database: ScratchDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = dsn_for(database.dsn, host=str(tmp_path), hostaddr="", port="1")
    app = App(nowhere, connect_timeout_s=0.3)
    with pytest.raises(DatabaseUnavailable, match="cannot connect"):
        await asyncio.wait_for(app.orchestrator.start(), 20)
    assert len([r for r in caplog.records if "cannot connect" in r.message]) > 1


async def test_a_refused_registration_leaves_nothing_running(queue: Queue) -> None:
    conductor = Conductor(queue.database.dsn)
    conductor.task("greet", OnChange("public.missing", "insert"))(ignore)
    orchestrator = Orchestrator(conductor)
    with pytest.raises(UnknownTable, match=r"public\.missing"):
        await orchestrator.start()
    assert await queue.rows("select * from conductor.workers") == []


async def test_a_start_that_is_not_captured_in_time_ends_with_nothing_running(
    queue: Queue,
) -> None:
    await queue.rows("create table users (id bigint primary key)")
    conductor = Conductor(queue.database.dsn)
    conductor.task("greet", OnChange("public.users", "insert"))(ignore)
    orchestrator = Orchestrator(conductor)
    with pytest.raises(CaptureTimeout, match=r"greet on public\.users"):
        await orchestrator.start(wait_captured_s=0.2)
    assert await queue.rows("select * from conductor.workers") == []


async def test_tasks_need_different_names() -> None:
    one, two = Conductor(""), Conductor("")
    first = one.task("greet", OnEvent(counted))(ignore)
    second = two.task("greet", OnEvent(counted))(ignore)
    with pytest.raises(RegistrationRefused, match="two tasks are named 'greet'"):
        Orchestrator(one, [first, second])
    with pytest.raises(RegistrationRefused, match="no task to run"):
        Orchestrator(Conductor(""))


async def test_it_outlives_the_loss_of_every_connection(queue: Queue) -> None:
    app = App(queue.database.dsn)
    async with app.orchestrator, app.conductor:
        for n in range(3):
            await queue.rows(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name like 'conductor%%' and datname = current_database()"
            )
            await queue.rows(
                "insert into conductor.jobs (queue, task, payload)"
                f" values ('default', 'double', '{{\"n\": {n}}}')"
            )
            await queue.rows("select conductor.emit('counted', '{\"n\": 1}')")
            await queue.until(f"select count(*) >= {2 * n + 2} from conductor.history")
    assert Counter(app.seen) == {0: 1, 1: 1, 2: 1, "Emitted": 3}
    assert b'conductor_reconnects_total{part="worker"}' in generate_latest(
        app.orchestrator.metrics.registry
    )


@pytest.fixture
def staff(migrated: ScratchDatabase) -> Iterator[str]:
    """A role of its own for workers, with the owner's rights."""
    role = f"{migrated.name}_staff"
    owner = psycopg.conninfo.conninfo_to_dict(migrated.dsn)["user"]
    administer(migrated, f"create role {role} login password 'staff' in role {owner}")
    yield role
    administer(migrated, f"reassign owned by {role} to {owner}")
    administer(migrated, f"drop role {role}")


def administer(database: ScratchDatabase, statement: str) -> None:
    with psycopg.connect(database.admin_dsn, autocommit=True) as admin:
        admin.execute(statement.encode())


async def test_a_login_that_is_refused_for_a_while_loses_no_job(
    queue: Queue, staff: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong role ends a process that starts; one that runs waits, and is let in again."""
    app = App(dsn_for(queue.database.dsn, user=staff, password="staff"))
    async with app.orchestrator, app.conductor:
        await app.conductor.invoke(slow, Number(n=1))
        await app.started.wait()
        administer(queue.database, f"alter role {staff} nologin")
        administer(
            queue.database,
            f"select pg_terminate_backend(pid) from pg_stat_activity where usename = '{staff}'",
        )
        await queue.rows(
            "insert into conductor.jobs (queue, task, payload)"
            """ values ('default', 'double', '{"n": 2}')"""
        )

        async def refused() -> bool:
            return "conductor worker default: cannot connect" in caplog.text

        await eventually(refused)
        app.release.set()
        administer(queue.database, f"alter role {staff} login")
        await queue.until("select count(*) = 2 from conductor.history")
    assert sorted(app.seen) == [1, 2]
    assert {job["outcome"] for job in await finished(queue)} == {"completed"}
