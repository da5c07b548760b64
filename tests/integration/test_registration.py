from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from cdc.sink import Sink
from conductor.definitions import Task, Trigger, define_event, define_task
from conductor.errors import (
    CaptureTimeout,
    ConductorError,
    DatabaseUnavailable,
    RegistrationRefused,
    UnknownColumn,
    UnknownTable,
)
from conductor.maintenance import retire_unawaited
from conductor.registration import Registration, register, wait_captured
from conductor.store.registration import RegistrationStore
from conductor.triggers import Cron, OnChange, OnEvent
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio

TABLES = """
create table users (id bigint primary key, email text not null, bio text);
create table audited (id bigint primary key, note text);
alter table audited replica identity full;
create table keyless (note text);
create table deferred (id bigint primary key deferrable);
create unlogged table scratch (id bigint primary key);
create table sums (id bigint primary key, total bigint generated always as (id * 2) stored);
create view user_emails as select email from users;
create table orders (id bigint, region text) partition by list (region);
create table orders_eu partition of orders for values in ('eu');
"""


STAMP = """
insert into conductor.activations (subscription, slot, start_lsn) values (%s, 'one', '0/1')
"""


class UserCreated(BaseModel):
    email: str


user_created = define_event("user.created", payload=UserCreated)


async def handle(_event: Any, _ctx: Any) -> None: ...


def task(name: str, *triggers: Trigger[Any], **options: Any) -> Task[Any, Any]:
    return Task(
        definition=define_task(name, payload=dict[str, int], queue=options.pop("queue", "default")),
        triggers=triggers,
        handler=handle,
        is_sync=False,
        **options,
    )


def registration(*tasks: Task[Any, Any], version: str | None = None) -> Registration:
    return Registration("shop", version, tasks)


async def with_tables(queue: Queue) -> None:
    for statement in TABLES.strip().split(";\n"):
        await queue.rows(statement)


def on_users(**options: Any) -> OnChange[Any]:
    return OnChange("public.users", "insert", **options)


async def live(queue: Queue) -> list[tuple[int, str]]:
    rows = await queue.rows(
        "select id, trigger from conductor.subscriptions where retired_at is null order by id"
    )
    return [(row["id"], row["trigger"]) for row in rows]


async def test_everything_is_written(queue: Queue) -> None:
    await with_tables(queue)
    greet = task(
        "greet",
        OnEvent(user_created),
        on_users(),
        Cron("0 9 * * *", "Europe/Berlin"),
        queue="mail",
        priority=5,
        retention=timedelta(hours=36),
    )
    ids = await register(queue.connections, registration(greet, version="v1"))
    assert await queue.column("select name from conductor.queues order by 1") == [
        "conductor.internal",
        "mail",
    ]
    (stored,) = await queue.rows("select * from conductor.tasks")
    assert stored["retention"] == timedelta(hours=36)
    assert stored["version"] == "v1"
    assert stored["payload_schema"]["type"] == "object"
    assert stored["returns_schema"] is None
    (event,) = await queue.rows("select name, payload_schema from conductor.events")
    assert event["name"] == "user.created"
    assert event["payload_schema"]["required"] == ["email"]
    (schedule,) = await queue.rows("select *, next_at > now() as ahead from conductor.schedules")
    assert (schedule["timezone"], schedule["rank"], schedule["ahead"]) == (
        "Europe/Berlin",
        -5,
        True,
    )
    rows = await queue.rows("select * from conductor.subscriptions order by kind")
    assert [(row["kind"], row["rank"], row["queue"], row["version"]) for row in rows] == [
        ("change", -5, "mail", "v1"),
        ("event", -5, "mail", "v1"),
    ]
    assert rows[0]["definition"] == on_users().filter.to_json()
    assert ids == [row["id"] for row in rows]


async def test_registering_again_keeps_what_is_equal(queue: Queue) -> None:
    await with_tables(queue)
    greet = task("greet", OnEvent(user_created), on_users(), Cron("*/5 * * * *"))
    await register(queue.connections, registration(greet, version="v1"))
    before = await live(queue)
    await queue.rows("update conductor.schedules set next_at = '2020-01-01T00:00:00Z'")
    await register(queue.connections, registration(greet, version="v2"))
    assert await live(queue) == before
    assert await queue.value("select count(*) from conductor.subscriptions") == 2
    assert set(await queue.column("select version from conductor.subscriptions")) == {"v2"}
    assert await queue.value("select next_at < '2020-01-02' from conductor.schedules")


async def test_another_definition_is_another_row(queue: Queue) -> None:
    await with_tables(queue)
    await register(queue.connections, registration(task("greet", on_users())))
    ((old, trigger),) = await live(queue)
    changed = task("greet", on_users(columns=("id",)))
    ids = await register(queue.connections, registration(changed))
    ((new, same_trigger),) = await live(queue)
    assert (new, same_trigger) == (ids[0], trigger)
    assert new != old
    assert await queue.value(
        "select retired_at is not null from conductor.subscriptions where id = %s", old
    )


async def test_another_queue_or_priority_is_another_row(queue: Queue) -> None:
    await with_tables(queue)
    seen = set()
    for options in ({}, {"queue": "mail"}, {"queue": "mail", "priority": 1}):
        await register(queue.connections, registration(task("greet", on_users(), **options)))
        ((number, _),) = await live(queue)
        seen.add(number)
    assert len(seen) == 3


async def test_a_trigger_that_is_gone_is_retired(queue: Queue) -> None:
    await with_tables(queue)
    await register(queue.connections, registration(task("greet", on_users(), Cron("* * * * *"))))
    await register(queue.connections, registration(task("greet", OnEvent(user_created))))
    assert [trigger for _, trigger in await live(queue)] == ["event:user.created"]
    assert await queue.rows("select * from conductor.schedules") == []


async def test_tasks_of_another_process_of_the_application_stay(queue: Queue) -> None:
    await register(queue.connections, registration(task("greet", OnEvent(user_created))))
    await register(queue.connections, registration(task("bill", OnEvent(user_created))))
    assert len(await live(queue)) == 2
    assert await queue.column("select name from conductor.tasks order by 1") == ["bill", "greet"]


async def test_another_expression_starts_anew(queue: Queue) -> None:
    daily = Cron("0 0 * * *", name="report")
    await register(queue.connections, registration(task("report", daily)))
    before = await queue.value("select next_at from conductor.schedules")
    hourly = Cron("59 * * * *", name="report")
    await register(queue.connections, registration(task("report", hourly)))
    after = await queue.value("select next_at from conductor.schedules")
    assert after.minute == 59
    assert after != before


async def test_processes_that_start_together_register_once(queue: Queue) -> None:
    await with_tables(queue)
    greet = task("greet", OnEvent(user_created), on_users(), Cron("* * * * *"))
    bill = task("bill", OnEvent(user_created))
    starts = [registration(greet, bill) if n % 2 else registration(bill, greet) for n in range(8)]
    ids = await asyncio.gather(*(register(queue.connections, start) for start in starts))
    assert len({tuple(found) for found in ids}) == 1
    assert len(await live(queue)) == 3
    assert await queue.value("select count(*) from conductor.subscriptions") == 3


async def test_routers_are_told_after_the_commit(queue: Queue) -> None:
    async with queue.connections.lend() as listener:
        await listener.execute("listen conductor_subscriptions")
        await register(queue.connections, registration(task("greet", OnEvent(user_created))))
        async for notice in listener.notifies(timeout=10, stop_after=1):
            assert notice.payload == "shop"
            break
        else:
            pytest.fail("no notification")
        await listener.execute("unlisten *")


REFUSALS: list[tuple[OnChange[Any], type[ConductorError], str, str]] = [
    (OnChange("public.user"), UnknownTable, "did you mean 'public.users'", "schema.table"),
    (on_users(columns=("emial",)), UnknownColumn, "did you mean 'email'", "row models"),
    (
        OnChange("public.keyless", "insert", "update"),
        RegistrationRefused,
        "no usable replica identity",
        "alter table public.keyless replica identity full;",
    ),
    (
        OnChange("public.deferred", "delete"),
        RegistrationRefused,
        "no usable replica identity",
        "alter table public.deferred replica identity full;",
    ),
    (
        OnChange("public.orders", "update"),
        RegistrationRefused,
        "no usable replica identity",
        "alter table public.orders replica identity full; alter table public.orders_eu replica",
    ),
    (
        OnChange("public.users", "update", changed=("email",)),
        RegistrationRefused,
        "REPLICA IDENTITY FULL",
        "alter table public.users replica identity full; (every UPDATE and DELETE then writes the",
    ),
    (
        on_users(when='new.emial == "a"'),
        UnknownColumn,
        "'emial' of public.users .* did you mean 'email'",
        "row models",
    ),
    (
        OnChange("public.users", "update", when="old.email != new.email"),
        RegistrationRefused,
        "the filter's `old` needs the old row",
        "alter table public.users replica identity full; (",
    ),
    (
        OnChange("public.users", "update", when='"email" in changed'),
        RegistrationRefused,
        "the filter's `changed` needs the old row",
        "alter table public.users replica identity full; (",
    ),
    (
        OnChange("public.users", "delete", when='old.bio != ""'),
        RegistrationRefused,
        "the filter's `old.bio` needs the old row",
        "alter table public.users replica identity full; (",
    ),
    (
        OnChange("public.sums", "insert", columns=("total",)),
        RegistrationRefused,
        "column 'total' is generated",
        "compute it",
    ),
    (OnChange("public.scratch", "insert"), RegistrationRefused, "is unlogged", "set logged"),
    (OnChange("public.user_emails", "insert"), RegistrationRefused, "is a view", "tables"),
    (
        OnChange("conductor.jobs", "insert"),
        RegistrationRefused,
        "schema conductor",
        "conductor.job",
    ),
]


@pytest.mark.parametrize(
    "trigger, error, message, hint", REFUSALS, ids=map(str, range(len(REFUSALS)))
)
async def test_what_cannot_be_captured_is_refused_whole(
    queue: Queue, trigger: OnChange[Any], error: type[ConductorError], message: str, hint: str
) -> None:
    await with_tables(queue)
    fine = task("fine", OnEvent(user_created))
    with pytest.raises(error, match=message) as refused:
        await register(queue.connections, registration(fine, task("greet", trigger)))
    assert hint in refused.value.hint
    assert "greet" in str(refused.value)
    if trigger.table.schema != "conductor":
        assert (
            f"The handler is at {__file__}:{handle.__code__.co_firstlineno}." in refused.value.hint
        )
    assert await queue.rows("select * from conductor.tasks") == []


@pytest.mark.parametrize(
    "trigger",
    [
        OnChange("public.audited", "update", changed=("note",)),
        OnChange("public.users"),
        OnChange("public.users", "delete", when="old.id > 10"),
        OnChange("public.audited", "update", when='old.note != new.note && "note" in changed'),
    ],
    ids=map(str, range(4)),
)
async def test_what_can_be_captured_is_taken(queue: Queue, trigger: OnChange[Any]) -> None:
    await with_tables(queue)
    assert len(await register(queue.connections, registration(task("greet", trigger)))) == 1


async def test_an_index_can_be_the_identity(queue: Queue) -> None:
    await with_tables(queue)
    await queue.rows("alter table keyless alter note set not null")
    await queue.rows("create unique index keyless_note on keyless (note)")
    await queue.rows("alter table keyless replica identity using index keyless_note")
    assert await register(
        queue.connections, registration(task("greet", OnChange("public.keyless")))
    )


async def test_tables_of_a_source_elsewhere_are_not_looked_for_here(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.progress (slot, database, system_identifier)"
        " values ('conductor', 'elsewhere', '1')"
    )
    ids = await register(queue.connections, registration(task("greet", OnChange("public.far"))))
    assert len(ids) == 1


async def test_waiting_for_capture_says_what_is_missing(queue: Queue) -> None:
    await with_tables(queue)
    greet = registration(task("greet", on_users()))
    ids = await register(queue.connections, greet)
    with pytest.raises(CaptureTimeout, match=r"greet on public.users; no sidecar has a slot"):
        await wait_captured(queue.connections, greet, ids, 0.1)
    await queue.rows("insert into conductor.progress (slot) values ('one'), ('two')")
    await queue.rows(STAMP, ids[0])
    missing = r"slot two does not route them yet, and nobody streams from two \(last 20"
    with pytest.raises(CaptureTimeout, match=missing) as timeout:
        await wait_captured(queue.connections, greet, ids, 0.1)
    assert "cdc slot drop two" in timeout.value.hint
    async with streaming(queue, "two"):
        with pytest.raises(CaptureTimeout, match=r"slot two does not route them yet$") as timeout:
            await wait_captured(queue.connections, greet, ids, 0.1)
    assert "cdc status" in timeout.value.hint


@asynccontextmanager
async def streaming(queue: Queue, slot: str) -> AsyncIterator[None]:
    """A leader's sink, as it takes the progress over."""
    sink = await Sink.open(queue.database.dsn, slot, leader="test")
    try:
        yield
    finally:
        await sink.close()


async def test_waiting_ends_when_every_slot_has_its_stamp(queue: Queue) -> None:
    await with_tables(queue)
    greet = registration(task("greet", on_users()))
    ids = await register(queue.connections, greet)
    await queue.rows("insert into conductor.progress (slot) values ('one')")
    waiting = asyncio.create_task(wait_captured(queue.connections, greet, ids, 20))
    await queue.rows(STAMP, ids[0])
    await asyncio.wait_for(waiting, 60)


async def test_nothing_to_capture_does_not_wait(queue: Queue) -> None:
    only_events = registration(task("greet", OnEvent(user_created)))
    ids = await register(queue.connections, only_events)
    await wait_captured(queue.connections, only_events, ids, 0)


async def retire(queue: Queue, grace_s: float = 0) -> list[str]:
    async with queue.connections.lend() as connection, connection.transaction():
        store = RegistrationStore(connection)
        apps = await store.abandoned_apps(grace_s)
        return [name for app in apps for name in await store.retire_abandoned(app, grace_s)]


async def test_what_an_older_version_alone_had_is_retired_once_nobody_offers_it(
    queue: Queue,
) -> None:
    old = task("old", OnEvent(user_created), Cron("* * * * *"))
    new = task("new", OnEvent(user_created))
    await register(queue.connections, registration(old, new, version="v1"))
    await register(queue.connections, registration(new, version="v2"))
    await queue.rows(
        "insert into conductor.workers (app, version, queue, tasks, host, pid, slots)"
        " values ('shop', 'v1', 'default', '{old,new}', 'h', 1, 1)"
    )
    assert await retire(queue) == []
    await queue.rows("update conductor.workers set renewals = -1")
    assert await retire(queue, grace_s=3600) == []
    assert await retire(queue) == ["old"]
    assert await queue.column("select name from conductor.tasks") == ["new"]
    assert len(await live(queue)) == 1
    assert await queue.rows("select * from conductor.schedules") == []
    assert await retire(queue) == []


@pytest.mark.parametrize("version", [None, "v1"])
async def test_processes_of_one_version_never_retire_each_other(
    queue: Queue, version: str | None
) -> None:
    await register(queue.connections, registration(task("one"), version=version))
    await register(queue.connections, registration(task("two"), version=version))
    assert await retire(queue) == []


async def test_seen_tasks_are_marked(queue: Queue) -> None:
    await register(queue.connections, registration(task("one"), task("two")))
    await queue.rows("update conductor.tasks set seen_at = '2020-01-01'")
    await queue.rows(
        "insert into conductor.workers (app, queue, tasks, host, pid, slots)"
        " values ('shop', 'default', '{two}', 'h', 1, 1)"
    )
    async with queue.connections.lend() as connection:
        await RegistrationStore(connection).mark_seen()
    assert await queue.column("select name from conductor.tasks where seen_at > '2021-01-01'") == [
        "two"
    ]


async def test_a_lost_connection_registers_nothing(queue: Queue) -> None:
    await queue.rows(
        "create function conductor.die() returns trigger language plpgsql as"
        " $$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$"
    )
    await queue.rows(
        "create trigger die after insert on conductor.subscriptions"
        " execute function conductor.die()"
    )
    with pytest.raises(DatabaseUnavailable):
        await register(queue.connections, registration(task("greet", OnEvent(user_created))))
    assert await queue.rows("select * from conductor.tasks") == []


# --- what waiting jobs are woken by --------------------------------------------------------------

PAID = OnChange("public.users", "insert", when="new.id > 0")
REFUNDED = OnChange("public.users", "delete")


def waiting(*waits: OnChange[Any], earlier: Task[Any, Any] | None = None, code: str = "1") -> Any:
    return task("greet", waits=waits, code=code, earlier=earlier)


async def woken_by(queue: Queue) -> list[str]:
    return [trigger.removeprefix("wait:") for _, trigger in await live(queue)]


async def test_what_earlier_versions_wait_for_is_captured(queue: Queue) -> None:
    await with_tables(queue)
    newest = waiting(REFUNDED, earlier=waiting(PAID), code="2")
    await register(queue.connections, registration(newest))
    assert sorted(await woken_by(queue)) == sorted([PAID.topic, REFUNDED.topic])


async def unawaited(queue: Queue) -> int:
    async with queue.connections.lend() as connection:
        return await retire_unawaited(connection)


async def test_a_wait_of_another_version_stays_while_somebody_may_need_it(queue: Queue) -> None:
    await with_tables(queue)
    await register(queue.connections, registration(waiting(PAID), version="v1"))
    await queue.rows(
        "insert into conductor.workers (app, version, queue, tasks, host, pid, slots)"
        " values ('shop', 'v1', 'default', '{greet}', 'h', 1, 1)"
    )
    await register(queue.connections, registration(waiting(REFUNDED), version="v2"))
    assert sorted(await woken_by(queue)) == sorted([PAID.topic, REFUNDED.topic])
    assert await unawaited(queue) == 0  # a worker lives that may wait for it yet
    await queue.rows("delete from conductor.workers")
    await queue.rows(
        "insert into conductor.steps (job, name, kind, topic) values (1, 'paid', 'change', %s)",
        PAID.topic,
    )
    assert await unawaited(queue) == 0  # a job waits for it
    await register(queue.connections, registration(waiting(REFUNDED), version="v2"))
    assert len(await woken_by(queue)) == 2
    await queue.rows("update conductor.steps set outcome = 'completed'")
    assert await unawaited(queue) == 1
    assert await woken_by(queue) == [REFUNDED.topic]


async def test_a_wait_stays_whatever_else_of_its_task_changes(queue: Queue) -> None:
    await with_tables(queue)
    await register(queue.connections, registration(task("greet", waits=(PAID,))))
    before = await live(queue)
    await register(queue.connections, registration(task("greet", waits=(PAID,), priority=5)))
    assert await live(queue) == before
    await register(queue.connections, registration(task("greet")))
    assert await live(queue) == []


async def test_waits_for_changes_elsewhere_are_refused(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.progress (slot, database, system_identifier)"
        " values ('conductor', 'elsewhere', '1')"
    )
    with pytest.raises(RegistrationRefused, match="another database than the queue's") as refused:
        await register(queue.connections, registration(waiting(PAID)))
    assert "emit an event" in refused.value.hint
