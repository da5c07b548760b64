"""What a type checker must know about the public interface, and what it must refuse.

Read by mypy --strict and pyright, never run. A line with an ignore is an expected error: both
checkers report an ignore that nothing needs, so an error that stops being one fails the check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, NewType, TypedDict, assert_never, assert_type

import psycopg
from annotated_types import Gt
from pydantic import BaseModel, JsonValue

from conductor import (
    Batch,
    BatchContext,
    BatchFailed,
    Change,
    Conductor,
    Context,
    Cron,
    Delete,
    Emitted,
    EventDefinition,
    Insert,
    Invocable,
    Invocation,
    JobHandle,
    OnChange,
    OnEvent,
    SyncConductor,
    SyncContext,
    TableRow,
    Task,
    TaskDefinition,
    Tick,
    Transaction,
    Truncate,
    Update,
    define_event,
    define_task,
    is_event,
)
from conductor.sync import SyncJobHandle
from conductor.testing import Rehearsal, inserted


class SendEmail(BaseModel):
    to: str
    subject: str = ""


@dataclass
class EmailSent:
    message_id: str


class Resize(TypedDict):
    id: int
    width: int


class UserCreated(BaseModel):
    email: str


class OrderPlaced(BaseModel):
    total: int


class Users(TableRow, table="public.users"):
    id: int
    email: str
    bio: str | None


@dataclass
class Deps:
    sender: str


UserId = NewType("UserId", int)
Quantity = Annotated[int, Gt(0)]

# --- definitions -----------------------------------------------------------------------------

send_email = define_task("send-email", payload=SendEmail, returns=EmailSent)
resize = define_task("resize", payload=Resize, validate=False)
nightly = define_task("nightly")
user_created = define_event("user.created", payload=UserCreated)
order_placed = define_event("order.placed", payload=OrderPlaced)
started = define_event("started")

assert_type(send_email, TaskDefinition[SendEmail, EmailSent])
assert_type(resize, TaskDefinition[Resize, None])
assert_type(nightly, TaskDefinition[None, None])
assert_type(define_task("t", payload=None), TaskDefinition[None, None])
assert_type(define_task("t", payload=int | str), TaskDefinition[int | str, None])
assert_type(define_task("t", payload=Literal["a", "b"]), TaskDefinition[Literal["a", "b"], None])
assert_type(define_task("t", payload=UserId), TaskDefinition[UserId, None])
assert_type(define_task("t", payload=Quantity), TaskDefinition[int, None])
assert_type(define_task("t", payload=list[Resize]), TaskDefinition[list[Resize], None])
assert_type(define_task("t", returns=dict[str, int]), TaskDefinition[None, dict[str, int]])
assert_type(user_created, EventDefinition[UserCreated])
assert_type(started, EventDefinition[None])

conductor = Conductor("", tasks=[send_email, resize], events=[user_created], context=Deps("x"))
assert_type(conductor, Conductor[Deps])
assert_type(Conductor(""), Conductor[None])

# --- triggers --------------------------------------------------------------------------------

assert_type(OnEvent(user_created), OnEvent[UserCreated])
assert_type(OnChange(Users), OnChange[Insert[Users] | Update[Users] | Delete[Users]])
assert_type(OnChange(Users, "insert"), OnChange[Insert[Users]])
assert_type(OnChange(Users, "update", changed=lambda u: u.email), OnChange[Update[Users]])
assert_type(OnChange(Users, "delete", columns=lambda u: (u.id, u.bio)), OnChange[Delete[Users]])
assert_type(OnChange(Users, "truncate"), OnChange[Truncate[Users]])
assert_type(
    OnChange(Users, "insert", "update", columns=("id",)), OnChange[Insert[Users] | Update[Users]]
)
assert_type(
    OnChange(Users, "delete", "update", changed=lambda u: u.email),
    OnChange[Update[Users] | Delete[Users]],
)
assert_type(OnChange(Users, "insert", "delete"), OnChange[Insert[Users] | Delete[Users]])
assert_type(
    OnChange(Users, "insert", "update", "delete"),
    OnChange[Insert[Users] | Update[Users] | Delete[Users]],
)
assert_type(
    OnChange(Users, "delete", "truncate"),
    OnChange[Insert[Users] | Update[Users] | Delete[Users] | Truncate[Users]],
)
assert_type(
    OnChange("public.users", "insert", "delete"),
    OnChange[Insert[dict[str, JsonValue]] | Delete[dict[str, JsonValue]]],
)
assert_type(OnChange("public.users", "insert"), OnChange[Insert[dict[str, JsonValue]]])

assert_type(OnChange(Users, "insert", when="new.id > 1"), OnChange[Insert[Users]])
assert_type(
    OnChange("public.users", "update", when="1 > 2"), OnChange[Update[dict[str, JsonValue]]]
)
assert_type(OnEvent(user_created, when='event.email != ""'), OnEvent[UserCreated])

assert_type(OnChange(Users, "insert", refetch=True), OnChange[Insert[Users]])
assert_type(OnChange(Users, refetch=True), OnChange[Insert[Users] | Update[Users] | Delete[Users]])
assert_type(
    OnChange("public.users", "update", refetch=True), OnChange[Update[dict[str, JsonValue]]]
)
assert_type(
    OnChange(Users, group="transaction"),
    OnChange[Transaction[Insert[Users] | Update[Users] | Delete[Users]]],
)
assert_type(
    OnChange(Users, "update", changed=lambda u: u.email, group="transaction"),
    OnChange[Transaction[Update[Users]]],
)
assert_type(
    OnChange("public.users", "insert", "delete", group="transaction"),
    OnChange[Transaction[Insert[dict[str, JsonValue]] | Delete[dict[str, JsonValue]]]],
)

OnEvent(send_email)  # type: ignore[arg-type]  # not an event
OnChange(Users, group="row")  # type: ignore[call-overload]  # no such group
OnChange(Users, "upsert")  # type: ignore[call-overload]  # no such operation
OnChange(Users, "update", changed=lambda u: u.emial)  # type: ignore[call-overload]  # no such column
OnChange(Users, "insert", changed=lambda u: u.email)  # type: ignore[call-overload]  # of updates
OnChange(Users, "update", "inserted")  # type: ignore[call-overload]  # no such operation
OnChange(Users, "update", colums=("id",))  # type: ignore[call-overload]  # no such option
OnChange(Users, "truncate", when="op == 1")  # type: ignore[call-overload]  # has no row
OnChange(Users, "delete", refetch=True)  # type: ignore[call-overload]  # the row is gone
OnChange(EmailSent)  # type: ignore[type-var]  # not a model

# --- handlers --------------------------------------------------------------------------------


@conductor.task(send_email, max_attempts=3)
async def send(event: Invocation[SendEmail], ctx: Context[Deps]) -> EmailSent:
    assert_type(event.payload, SendEmail)
    assert_type(ctx.deps, Deps)
    return EmailSent(event.payload.to)


assert_type(send, Task[SendEmail, EmailSent])


@conductor.task(nightly, Cron("0 3 * * *"))
def clean(event: Tick, ctx: SyncContext[Deps]) -> None:
    assert_type(event.scheduled_at, datetime)
    assert_type(ctx.deps, Deps)


assert_type(clean, Task[None, None])


@conductor.task(send_email, Invocable(), OnEvent(user_created))
async def either(event: Invocation[SendEmail] | Emitted[UserCreated], ctx: Context) -> EmailSent:
    match event:
        case Invocation():
            assert_type(event.payload, SendEmail)
        case Emitted():
            assert_type(event.payload, UserCreated)
        case _:
            assert_never(event)
    return EmailSent("")


@conductor.task(
    "welcome",
    OnChange(Users, "insert"),
    OnChange("public.orders", "update"),
    OnEvent(user_created),
    OnEvent(order_placed),
    Cron("0 9 * * *", tz="Europe/Berlin"),
    Invocable(),
    queue="mail",
)
async def welcome(
    event: Insert[Users]
    | Update[dict[str, JsonValue]]
    | Emitted[UserCreated]
    | Emitted[OrderPlaced]
    | Tick
    | Invocation[Any],
    ctx: Context[Deps],
) -> None:
    match event:
        case Insert():
            assert_type(event.new, Users)
            assert_type(event.new.email, str)
            assert_type(event.op, Literal["insert"])
            assert_type((event.refetched, event.gone), tuple[bool, bool])
        case Update():
            assert_type(event.old, dict[str, JsonValue])
            assert_type(event.changed, frozenset[str])
        case Emitted():
            if is_event(event, user_created):
                assert_type(event, Emitted[UserCreated])
                assert_type(event.payload.email, str)
            else:
                assert_type(event, Emitted[OrderPlaced])
        case Tick() | Invocation():
            pass
        case _:
            assert_never(event)


assert_type(welcome, Task[Any, None])


# A pattern captures what it has found; `case Emitted(payload=UserCreated())` alone narrows nothing.
@conductor.task("capture", OnEvent(user_created), OnEvent(order_placed))
async def capture(event: Emitted[UserCreated] | Emitted[OrderPlaced], ctx: Context[Deps]) -> None:
    match event:
        case Emitted(payload=UserCreated() as created):
            assert_type(created, UserCreated)
        case Emitted(payload=OrderPlaced(total=total)):
            assert_type(total, int)


# A handler may take more than its triggers give.
@conductor.task("audit", OnChange(Users, "insert", "update", "truncate"))
async def audit(event: Change[Users], ctx: Context[Deps]) -> None:
    assert_type(event.new, Users)
    assert_type(event.commit_time, datetime)


@conductor.task("copy", OnChange(Users))
async def copy(event: Insert[Users] | Update[Users] | Delete[Users], ctx: Context[Deps]) -> None:
    match event:
        case Insert(new=row):
            assert_type(row, Users)
        case Update(old=old, new=new):
            assert_type((old, new), tuple[Users, Users])
        case Delete():
            assert_type(event.old, Users)
        case _:
            assert_never(event)


# Several operations give the union of their events, which `match` narrows to the row's type.
@conductor.task("sync", OnChange(Users, "insert", "update"))
async def sync(event: Insert[Users] | Update[Users], ctx: Context[Deps]) -> None:
    assert_type(event.op, Literal["insert", "update"])
    match event:
        case Insert():
            assert_type(event, Insert[Users])
        case Update(new=new):
            assert_type(event, Update[Users])
            assert_type(new, Users)
        case _:
            assert_never(event)


@conductor.task("sync", OnChange(Users, "insert", "update"))  # type: ignore[arg-type]  # updates too
async def wrong_operations(event: Insert[Users] | Delete[Users], ctx: Context[Deps]) -> None: ...


@conductor.task("import", OnChange(Users, "insert", group="transaction"))
async def import_users(event: Transaction[Insert[Users]], ctx: Context[Deps]) -> None:
    assert_type(event.commit_time, datetime)
    for change in event:
        assert_type(change.new, Users)


@conductor.task("log", OnChange(Users))
async def log(event: Change[Users], ctx: Context[Deps]) -> None: ...


# --- batches and ordering ---------------------------------------------------------------------


@conductor.task(resize, batch=Batch(size=10))
async def resize_many(events: Sequence[Invocation[Resize]], ctx: BatchContext[Deps]) -> None:
    assert_type(events[0].payload["id"], int)
    assert_type(ctx.deps, Deps)
    raise BatchFailed({0: ValueError()})


assert_type(resize_many, Task[Any, None])


@conductor.task("index", OnChange(Users, "update"), OnEvent(user_created), batch=Batch(wait_s=1))
def index(events: Sequence[Update[Users] | Emitted[UserCreated]], ctx: BatchContext[Deps]) -> None:
    for event in events:
        match event:
            case Update():
                assert_type(event.new, Users)
            case Emitted():
                assert_type(event.payload, UserCreated)
            case _:
                assert_never(event)


@conductor.task(resize, batch=Batch())  # type: ignore[arg-type]  # one event, and a context with steps
async def wrong_batch(event: Invocation[Resize], ctx: Context[Deps]) -> None: ...


@conductor.task(resize, batch=Batch())  # type: ignore[arg-type]  # a batch returns nothing
async def wrong_batch_result(events: Sequence[Any], ctx: BatchContext[Deps]) -> int:
    return 1


@conductor.task(send_email, batch=Batch())  # type: ignore[arg-type]  # the task returns something
async def wrong_batch_task(events: Sequence[Any], ctx: BatchContext[Deps]) -> None: ...


async def wrong_batch_step(ctx: BatchContext[Deps]) -> None:
    await ctx.step("a", lambda: 1)  # type: ignore[attr-defined]  # a batch has no steps


charge = define_task("charge", payload=SendEmail, returns=EmailSent, ordered=True)
assert_type(charge, TaskDefinition[SendEmail, EmailSent])


@conductor.task("follow", OnChange(Users, key=lambda u: u.id), ordered=True, on_failure="halt")
async def follow(event: Change[Users], ctx: Context[Deps]) -> None: ...


OnChange(Users, key=lambda u: u.ident)  # type: ignore[attr-defined]  # no such column


@conductor.task(charge, on_failure="stop")  # type: ignore[call-overload,untyped-decorator]  # no such policy
async def wrong_policy(event: Invocation[SendEmail], ctx: Context[Deps]) -> EmailSent:
    return EmailSent("")


@conductor.task(send_email)  # type: ignore[arg-type]  # wrong payload
async def wrong_payload(event: Invocation[Resize], ctx: Context[Deps]) -> EmailSent:
    return EmailSent("")


@conductor.task(send_email)  # type: ignore[arg-type]  # wrong result
async def wrong_result(event: Invocation[SendEmail], ctx: Context[Deps]) -> str:
    return ""


@conductor.task(send_email)  # type: ignore[arg-type]  # wrong dependencies
async def wrong_deps(event: Invocation[SendEmail], ctx: Context[str]) -> EmailSent:
    return EmailSent("")


@conductor.task("w", OnEvent(user_created))  # type: ignore[arg-type]  # wrong event
async def wrong_event(event: Emitted[OrderPlaced], ctx: Context[Deps]) -> None: ...


@conductor.task("w", OnEvent(user_created), Cron("* * * * *"))  # type: ignore[arg-type]  # a Tick too
async def missing_event(event: Emitted[UserCreated], ctx: Context[Deps]) -> None: ...


@conductor.task("w", OnChange(Users, "insert"))  # type: ignore[arg-type]  # not an insert
async def wrong_operation(event: Delete[Users], ctx: Context[Deps]) -> None: ...


@conductor.task(send_email)  # type: ignore[arg-type]  # blocks with an asynchronous context
def wrong_context(event: Invocation[SendEmail], ctx: Context[Deps]) -> EmailSent:
    return EmailSent("")


@conductor.task(send_email, attempts=3)  # type: ignore[call-overload,untyped-decorator]  # no such option
async def wrong_option(event: Invocation[SendEmail], ctx: Context[Deps]) -> EmailSent:
    return EmailSent("")


async def wrong_field(event: Invocation[SendEmail], change: Insert[Users]) -> None:
    _ = event.payload.recipient  # type: ignore[attr-defined]  # no such field
    _ = change.new.emial  # type: ignore[attr-defined]  # no such column


# --- calls -----------------------------------------------------------------------------------


async def calls(connection: psycopg.AsyncConnection) -> None:
    handle = await conductor.invoke(send_email, SendEmail(to=""), dedupe_key="a", delay=5)
    assert_type(handle, JobHandle[EmailSent])
    assert_type(await handle.result(timeout_s=1), EmailSent)
    assert_type(await conductor.invoke(send, SendEmail(to="")), JobHandle[EmailSent])
    assert_type(await conductor.invoke(nightly), JobHandle[None])
    assert_type(await conductor.invoke(resize, Resize(id=1, width=2)), JobHandle[None])
    assert_type(await conductor.invoke("by-name", {"any": "thing"}), JobHandle[Any])
    many = await conductor.invoke_many(send_email, [SendEmail(to="")], connection=connection)
    assert_type(many, list[JobHandle[EmailSent]])
    await conductor.emit(user_created, UserCreated(email=""), connection=connection)
    await conductor.emit(started)
    await conductor.emit_many(user_created, [UserCreated(email="")])
    assert_type(await conductor.cancel(handle.id), bool)
    await conductor.schedule("a", send_email, Cron("0 9 * * *"), SendEmail(to=""))
    assert_type(await conductor.unschedule("a", send), bool)


async def wrong_calls() -> None:
    await conductor.invoke(send_email, UserCreated(email=""))  # type: ignore[misc]
    await conductor.invoke(send_email)  # type: ignore[arg-type]  # no payload
    await conductor.invoke(resize, Resize(id=1))  # type: ignore[typeddict-item]  # a key is missing
    await conductor.invoke(nightly, 1)  # type: ignore[misc]  # takes none
    await conductor.invoke(nightly, when=1)  # type: ignore[call-overload]  # no such option
    await conductor.invoke_many(send_email, [1])  # type: ignore[misc]
    await conductor.emit(user_created, OrderPlaced(total=1))  # type: ignore[misc]
    await conductor.emit(send_email, SendEmail(to=""))  # type: ignore[call-overload]  # a task


def synchronous(client: SyncConductor, connection: psycopg.Connection) -> None:
    handle = client.invoke(send_email, SendEmail(to=""), connection=connection)
    assert_type(handle, SyncJobHandle[EmailSent])
    assert_type(handle.result(), EmailSent)
    client.emit(user_created, UserCreated(email=""))
    client.invoke(send_email, Resize(id=1, width=1))  # type: ignore[misc]
    client.emit(user_created, SendEmail(to=""))  # type: ignore[misc]


# --- durable calls ---------------------------------------------------------------------------

on_user = OnChange(Users, "insert")


async def durable(ctx: Context[Deps]) -> None:
    assert_type(await ctx.invoke("a", send_email, SendEmail(to=""), timeout=5), EmailSent)
    assert_type(await ctx.invoke("b", send, SendEmail(to="")), EmailSent)
    assert_type(await ctx.invoke("c", nightly), None)
    assert_type(await ctx.start("d", send_email, SendEmail(to="")), JobHandle[EmailSent])
    await ctx.emit("e", user_created, UserCreated(email=""))
    await ctx.emit("f", started)
    assert_type(await ctx.wait_for_event("g", user_created, match={"email": ""}), UserCreated)
    assert_type(await ctx.wait_for_change("h", on_user, timeout=5), Insert[Users])
    assert_type(await (await ctx.subscribe("i", user_created)).wait(), UserCreated)
    assert_type(await (await ctx.subscribe("j", on_user)).wait(timeout=5), Insert[Users])
    assert_type(
        await ctx.gather(
            ctx.invoke("k", send_email, SendEmail(to="")), ctx.step("l", lambda: 1, returns=int)
        ),
        tuple[EmailSent, int],
    )
    match await ctx.wait_for_any("m", ctx.wait_for_event("n", user_created), ctx.sleep("o", 5)):
        case (0, created):
            assert_type(created, UserCreated)
        case (1, nothing):
            assert_type(nothing, None)
    assert_type(await ctx.transaction("p", count_users), int)
    await ctx.schedule("q", send_email, Cron("0 9 * * *"), SendEmail(to=""), priority=1)
    await ctx.schedule("r", nightly, Cron("0 9 * * *"), None)
    await ctx.unschedule("q", send)


async def count_users(connection: psycopg.AsyncConnection[Any]) -> int:
    return (await connection.execute("select 1")).rowcount


async def wrong_durable(ctx: Context[Deps]) -> None:
    await ctx.invoke("a", send_email, Resize(id=1, width=1))  # type: ignore[misc]  # wrong payload
    await ctx.invoke("a", send_email)  # type: ignore[arg-type]  # no payload
    await ctx.emit("a", user_created, OrderPlaced(total=1))  # type: ignore[misc]  # wrong payload
    await ctx.schedule("a", send_email, Cron("* * * * *"), Resize(id=1, width=1))  # type: ignore[misc]  # wrong payload
    await ctx.wait_for_event("a", send_email)  # type: ignore[arg-type]  # a task
    await ctx.wait_for_change("a", Users)  # type: ignore[arg-type]  # not a change


def doubled(number: int) -> int:
    return 2 * number


def blocking(ctx: SyncContext[Deps]) -> None:
    assert_type(ctx.invoke("a", send_email, SendEmail(to="")), EmailSent)
    assert_type(ctx.wait_for_event("b", user_created), UserCreated)
    ctx.schedule("d", send_email, Cron("0 9 * * *"), SendEmail(to=""))
    assert_type(ctx.wait_for_change("c", on_user), Insert[Users])
    assert_type(ctx.start("e", send_email, SendEmail(to="")), JobHandle[EmailSent])
    assert_type(ctx.start("f", nightly), JobHandle[None])
    ctx.emit("g", user_created, UserCreated(email=""))
    ctx.emit("h", started)
    assert_type(ctx.step("i", partial(doubled, 7)), int)
    ctx.start("j", send_email)  # type: ignore[arg-type]  # no payload
    ctx.emit("k", user_created)  # type: ignore[arg-type]  # no payload


# --- rehearsing ------------------------------------------------------------------------------


async def rehearsed(rehearsal: Rehearsal) -> None:
    rehearsal.answer(send_email, EmailSent(message_id="m"))
    rehearsal.answer(send, lambda payload: EmailSent(message_id=payload.to))
    rehearsal.answer(send_email, ValueError("no"))
    rehearsal.bring(user_created, UserCreated(email=""))
    rehearsal.bring(on_user, inserted(Users(id=1, email="", bio=None)))
    assert_type(await rehearsal.run(send, Invocation(SendEmail(to=""))), EmailSent)
    assert_type(rehearsal.invoked(send_email), list[SendEmail])
    assert_type(rehearsal.emitted(user_created), list[UserCreated])
    assert_type(rehearsal.scheduled(send), dict[str, SendEmail])
    assert_type(inserted(Users(id=1, email="", bio=None)), Insert[Users])


def wrongly_rehearsed(rehearsal: Rehearsal) -> None:
    rehearsal.answer(send_email, 7)  # type: ignore[misc]  # not what it returns
    rehearsal.bring(user_created, OrderPlaced(total=1))  # type: ignore[misc]  # not its payload
    rehearsal.bring(on_user, Users(id=1, email="", bio=None))  # type: ignore[call-overload]  # a row
