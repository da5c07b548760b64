from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from pydantic import BaseModel

from conductor import Conductor, SyncConductor, define_event, define_task
from conductor.errors import (
    ConfigError,
    DatabaseUnavailable,
    JobCancelled,
    JobFailed,
    LoginRefused,
    MigrationMismatch,
    OptionInvalid,
    PayloadInvalid,
    ResultGone,
    ResultTimeout,
)
from tests.servers import ScratchDatabase, dsn_for

pytestmark = pytest.mark.anyio


class Greeting(BaseModel):
    name: str


greet = define_task("greet", payload=Greeting, returns=int, queue="mail")
nightly = define_task("nightly")
greeted = define_event("greeted", payload=Greeting)
ADA = Greeting(name="Ada")


@pytest.fixture
async def conductor(migrated: ScratchDatabase) -> AsyncIterator[Conductor[None]]:
    async with Conductor(migrated.dsn, tasks=[greet, nightly], events=[greeted]) as client:
        yield client


def jobs_in(database: ScratchDatabase) -> list[dict[str, Any]]:
    with psycopg.connect(database.dsn, row_factory=dict_row) as connection:
        return connection.execute(
            "select *, state::text as state, trigger::text as trigger, conductor.now() as now"
            " from conductor.jobs order by id"
        ).fetchall()


def execute(database: ScratchDatabase, statement: str, *parameters: object) -> None:
    with psycopg.connect(database.dsn) as connection:
        connection.execute(statement.encode(), parameters)


def finish(database: ScratchDatabase, job: int, outcome: str, **columns: str) -> None:
    """End a job as a worker would."""
    execute(
        database,
        "with ended as (delete from conductor.jobs where id = %s returning *)"
        " insert into conductor.history (id, run_at, created_at, finished_at, expires_on, fence,"
        " rank, attempt, crashes, outcome, trigger, queue, task, payload, result, error)"
        " select id, run_at, created_at, now(), 'infinity', fence, rank, attempt, crashes,"
        " %s::conductor.job_outcome, trigger, queue, task, payload, %s::json, %s::json from ended",
        job, outcome, columns.get("result"), columns.get("error"),
    )  # fmt: skip


async def test_invoke_makes_one_ready_job(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    handle = await conductor.invoke(greet, ADA, priority=7, key="k", metadata={"trace": "x"})
    (job,) = jobs_in(migrated)
    assert (handle.id, handle.status) == (job["id"], "enqueued")
    expected = {
        "queue": "mail", "task": "greet", "state": "ready", "trigger": "invoke", "rank": -7,
        "key": "k", "payload": {"name": "Ada"}, "metadata": {"trace": "x"}, "attempt": 0,
    }  # fmt: skip
    assert {name: job[name] for name in expected} == expected
    assert job["run_at"] <= job["now"]


async def test_a_job_can_be_put_off(conductor: Conductor[None], migrated: ScratchDatabase) -> None:
    later = datetime(2999, 1, 1, tzinfo=UTC)
    await conductor.invoke(nightly, run_at=later)
    await conductor.invoke(nightly, delay=60)
    await conductor.invoke(nightly, delay=timedelta(0), run_at=datetime(2000, 1, 1, tzinfo=UTC))
    at, delayed, past = jobs_in(migrated)
    assert (at["state"], at["run_at"]) == ("scheduled", later)
    assert delayed["state"] == "scheduled"
    assert timedelta(seconds=50) < delayed["run_at"] - delayed["now"] <= timedelta(seconds=60)
    assert (past["state"], past["run_at"] <= past["now"]) == ("ready", True)
    assert past["run_at"] > past["now"] - timedelta(minutes=1)
    with pytest.raises(OptionInvalid, match="time zone"):
        await conductor.invoke(nightly, run_at=datetime(2999, 1, 1))  # noqa: DTZ001


async def test_a_wrong_payload_is_refused_and_nothing_stored(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    wrong: Any = {"name": 3}
    with pytest.raises(PayloadInvalid, match="payload of task 'greet': name"):
        await conductor.invoke(greet, wrong)
    with pytest.raises(PayloadInvalid, match="payload of event 'greeted'"):
        await conductor.emit(greeted, wrong)
    assert jobs_in(migrated) == []


async def test_text_that_cannot_be_stored_is_refused_before_anything_is(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    for text in ("a\0b", "half \ud800"):
        with pytest.raises(PayloadInvalid, match="name: the text holds"):
            await conductor.invoke(greet, Greeting(name=text))
        with pytest.raises(PayloadInvalid, match="name: the text holds"):
            await conductor.emit(greeted, Greeting(name=text))
        with pytest.raises(OptionInvalid, match=r"^key"):
            await conductor.invoke(nightly, key=text)
        with pytest.raises(OptionInvalid, match=r"^metadata: a"):
            await conductor.emit(greeted, ADA, metadata={"a": text})
        with pytest.raises(OptionInvalid, match=r"^reason"):
            await conductor.cancel(1, text)
    assert jobs_in(migrated) == []


async def test_the_longest_delays_are_taken(conductor: Conductor[None]) -> None:
    await conductor.invoke(nightly, delay=timedelta(days=365_000))
    await conductor.invoke(nightly, run_at=datetime(9999, 12, 30, tzinfo=UTC))
    dedupe_for = timedelta(days=365_000)
    await conductor.invoke(nightly, dedupe_key="a", dedupe_for=dedupe_for)


async def test_a_taken_dedupe_key_drops_the_job(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    first = await conductor.invoke(greet, ADA, dedupe_key="a")
    again = await conductor.invoke(greet, ADA, dedupe_key="a")
    other = await conductor.invoke(nightly, dedupe_key="a")
    assert [first.status, again.status, other.status] == ["enqueued", "dropped", "enqueued"]
    assert again.id == first.id
    execute(migrated, "update conductor.dedupe_keys set expires_at = conductor.now()")
    renewed = await conductor.invoke(greet, ADA, dedupe_key="a", dedupe_for=timedelta(hours=1))
    assert (renewed.status, renewed.id != first.id) == ("enqueued", True)
    assert [job["dedupe_key"] for job in jobs_in(migrated)] == ["a", "a", "a"]


async def test_concurrent_invokes_of_one_dedupe_key_make_one_job(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    handles = await asyncio.gather(
        *(conductor.invoke(greet, ADA, dedupe_key="a") for _ in range(20))
    )
    assert [handle.status for handle in handles].count("enqueued") == 1
    assert {handle.id for handle in handles} == {job["id"] for job in jobs_in(migrated)}


async def test_many_jobs_keep_their_order(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    greetings = [Greeting(name=str(n)) for n in range(3000)]
    handles = await conductor.invoke_many(greet, greetings, priority=1)
    jobs = jobs_in(migrated)
    assert [handle.id for handle in handles] == [job["id"] for job in jobs]
    assert [job["payload"]["name"] for job in jobs] == [greeting.name for greeting in greetings]
    assert await conductor.invoke_many(greet, []) == []


@pytest.mark.parametrize("count", [2, 1000])
async def test_text_survives_on_every_way_in(
    conductor: Conductor[None], migrated: ScratchDatabase, count: int
) -> None:
    odd = 'a\tb\nc\rd\\N \\. "quoted" \u20ac \U0001f600'
    await conductor.invoke_many(
        greet, [Greeting(name=odd)] * count, keys=[odd, None] * (count // 2), metadata={odd: [odd]},
        delay=60,
    )  # fmt: skip
    jobs = jobs_in(migrated)
    assert {(job["payload"]["name"], job["key"]) for job in jobs} == {(odd, odd), (odd, None)}
    assert all(job["metadata"] == {odd: [odd]} for job in jobs)
    assert {job["state"] for job in jobs} == {"scheduled"}
    assert all(timedelta(0) < job["run_at"] - job["now"] < timedelta(minutes=2) for job in jobs)


async def test_many_jobs_with_keys_and_dedupe_keys(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    await conductor.invoke(greet, ADA, dedupe_key="b")
    handles = await conductor.invoke_many(
        greet, [ADA, ADA, ADA, ADA], keys=["1", "2", None, "4"], dedupe_keys=["c", "b", "a", "c"]
    )
    assert [handle.status for handle in handles] == ["enqueued", "dropped", "enqueued", "dropped"]
    assert handles[3].id == handles[0].id
    found = [(job["dedupe_key"], job["key"]) for job in jobs_in(migrated)]
    assert found == [("b", None), ("c", "1"), ("a", None)]
    with pytest.raises(OptionInvalid, match="1 keys for 2"):
        await conductor.invoke_many(greet, [ADA, ADA], keys=["1"])


async def test_emit_makes_one_dispatch_job(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    await conductor.emit(greeted, ADA, metadata={"trace": "x"})
    await conductor.emit_many(greeted, [Greeting(name=name) for name in "bc"])
    jobs = jobs_in(migrated)
    assert {(job["queue"], job["task"], job["trigger"]) for job in jobs} == {
        ("conductor.internal", "conductor.dispatch", "event")
    }
    assert [job["payload"] for job in jobs] == [
        {"event": "greeted", "payload": {"name": name}} for name in ("Ada", "b", "c")
    ]
    assert jobs[0]["metadata"] == {"trace": "x"}


async def test_a_job_lives_and_dies_with_the_callers_transaction(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    async with await psycopg.AsyncConnection.connect(migrated.dsn) as connection:
        await conductor.invoke(greet, ADA, connection=connection)
        await conductor.emit(greeted, ADA, connection=connection)
        assert jobs_in(migrated) == []
        await connection.rollback()
        assert jobs_in(migrated) == []
        handle = await conductor.invoke(greet, ADA, connection=connection, dedupe_key="x")
        await conductor.invoke_many(greet, [ADA, ADA], connection=connection)
        await connection.commit()
        assert [job["task"] for job in jobs_in(migrated)] == ["greet"] * 3
        assert await conductor.cancel(handle.id, "no", connection=connection)
        assert len(jobs_in(migrated)) == 3
    assert len(jobs_in(migrated)) == 2


async def listening(database: ScratchDatabase) -> psycopg.AsyncConnection[Any]:
    connection = await psycopg.AsyncConnection.connect(database.dsn, autocommit=True)
    await connection.execute("listen conductor_jobs")
    return connection


async def hints(connection: psycopg.AsyncConnection[Any], count: int) -> list[str]:
    return [hint.payload async for hint in connection.notifies(timeout=60, stop_after=count)]


async def test_workers_are_told_after_the_commit_and_not_in_a_transaction_of_the_caller(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    async with await listening(migrated) as listener:
        async with await psycopg.AsyncConnection.connect(migrated.dsn) as caller:
            await conductor.invoke(greet, ADA, connection=caller)
            await caller.commit()
            await conductor.invoke(nightly, connection=caller, hint=True)
            await caller.commit()
        assert await hints(listener, 1) == ["default"]
        await conductor.invoke(greet, ADA)
        assert await hints(listener, 1) == ["mail"]


async def test_many_invokes_send_few_hints(
    conductor: Conductor[None], migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.hints.INTERVAL_S", 0.3)  # they take less than fifty of it
    async with await listening(migrated) as listener:
        await asyncio.gather(*(conductor.invoke(greet, ADA) for _ in range(100)))
        await conductor.close()
        await listener.execute("select pg_notify('conductor_jobs', 'end')")
        received = [hint.payload async for hint in listener.notifies(timeout=60, stop_after=1)]
        received += [hint.payload async for hint in listener.notifies(timeout=0)]
    assert received[-1] == "end"
    assert 1 <= received.count("mail") < 50


async def test_a_result_is_waited_for_and_decoded(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    handles = await conductor.invoke_many(greet, [ADA] * 3)
    waits = [asyncio.create_task(handle.result(timeout_s=60)) for handle in handles]
    error = '{"type": "ValueError", "message": "no", "attempt": 5}'
    await asyncio.to_thread(finish, migrated, handles[0].id, "completed", result="41")
    await asyncio.to_thread(finish, migrated, handles[1].id, "failed", error=error)
    assert await handles[2].cancel("not needed")
    assert await waits[0] == 41
    with pytest.raises(JobFailed, match=r"failed: ValueError: no") as info:
        await waits[1]
    assert info.value.error["attempt"] == 5
    with pytest.raises(JobCancelled, match="not needed"):
        await waits[2]
    assert await handles[0].result(timeout_s=60) == 41
    assert not await handles[0].cancel()


async def test_a_wait_can_end_before_the_job(conductor: Conductor[None]) -> None:
    handle = await conductor.invoke(greet, ADA)
    with pytest.raises(ResultTimeout):
        await handle.result(timeout_s=0.1)


async def test_a_job_without_history_is_gone(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    handle = await conductor.invoke(greet, ADA)
    execute(migrated, "delete from conductor.jobs")
    with pytest.raises(ResultGone):
        await handle.result(timeout_s=60)


async def test_a_job_of_an_open_transaction_is_waited_for(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    async with await psycopg.AsyncConnection.connect(migrated.dsn) as connection:
        handle = await conductor.invoke(greet, ADA, connection=connection)
        with pytest.raises(ResultTimeout):
            await handle.result(timeout_s=0.3)
        wait = asyncio.create_task(handle.result(timeout_s=60))
        await connection.commit()
        await asyncio.to_thread(finish, migrated, handle.id, "completed", result="1")
        assert await wait == 1


async def test_closing_ends_waits(conductor: Conductor[None]) -> None:
    handle = await conductor.invoke(greet, ADA)
    wait = asyncio.create_task(handle.result())
    with pytest.raises(ResultTimeout):
        await handle.result(timeout_s=0.1)
    await conductor.close()
    with pytest.raises(asyncio.CancelledError):
        await wait


async def test_a_database_without_the_schema_says_so(database: ScratchDatabase) -> None:
    async with Conductor(database.dsn, tasks=[nightly]) as client:
        with pytest.raises(MigrationMismatch) as info:
            await client.invoke(nightly)
    assert "conductor migrate" in info.value.hint


async def test_an_unreachable_database_says_so_without_the_password(
    migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.connections.WAIT_S", 0.5)
    dsn = "postgresql://me:hush-hush@127.0.0.1:1/nowhere"
    async with Conductor(dsn, tasks=[nightly]) as client:
        with pytest.raises(DatabaseUnavailable) as info:
            await client.invoke(nightly)
    assert "hush-hush" not in str(info.value)
    async with Conductor("what ever: hush-hush", tasks=[nightly]) as client:
        with pytest.raises(ConfigError) as wrong:
            await client.invoke(nightly)
    assert "hush-hush" not in str(wrong.value)


async def test_a_login_that_is_refused_says_so_at_once_and_may_be_tried_again(
    migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.connections.WAIT_S", 3600.0)
    role = f"{migrated.name}_late"
    dsn = dsn_for(migrated.dsn, user=role, password="hush-hush")
    async with Conductor(dsn, tasks=[nightly]) as client:
        for _ in range(2):
            invokes = (client.invoke(nightly) for _ in range(3))
            for error in await asyncio.gather(*invokes, return_exceptions=True):
                assert isinstance(error, LoginRefused)
                assert str(error).startswith("cannot log in to the queue database: ")
                assert "hush-hush" not in str(error)
        owner = psycopg.conninfo.conninfo_to_dict(migrated.dsn)["user"]
        with psycopg.connect(migrated.admin_dsn, autocommit=True) as admin:
            admin.execute(f"create role {role} login password 'hush-hush' in role {owner}".encode())
            await asyncio.gather(*(client.invoke(nightly) for _ in range(3)))
            await client.close()
            admin.execute(f"drop role {role}".encode())
    assert len(jobs_in(migrated)) == 3


async def test_a_lost_connection_is_replaced(
    conductor: Conductor[None], migrated: ScratchDatabase
) -> None:
    await conductor.invoke(nightly)
    with psycopg.connect(migrated.admin_dsn, autocommit=True) as admin:
        admin.execute(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
            " where application_name = 'conductor client' and datname = %s",
            [migrated.name],
        )
    await conductor.invoke(nightly)
    assert len(jobs_in(migrated)) == 2


def test_synchronous_code_has_the_same_client(migrated: ScratchDatabase) -> None:
    conductor = Conductor(migrated.dsn, tasks=[greet, nightly], events=[greeted])
    with SyncConductor(conductor) as client, psycopg.connect(migrated.dsn) as connection:
        handle = client.invoke(greet, ADA)
        client.emit(greeted, ADA)
        client.emit_many(greeted, [ADA, ADA])
        assert len(client.invoke_many(greet, [ADA, ADA])) == 2
        inside = client.invoke(nightly, connection=connection)
        assert len(jobs_in(migrated)) == 6
        connection.commit()
        assert len(jobs_in(migrated)) == 7
        finish(migrated, handle.id, "completed", result="41")
        assert handle.result(timeout_s=60) == 41
        assert client.cancel(inside.id)
        with pytest.raises(JobCancelled):
            inside.result(timeout_s=60)
        with pytest.raises(PayloadInvalid):
            client.invoke("greet", {"name": 3})
