from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel

from conductor import (
    Batch,
    BatchContext,
    ChildFailed,
    Conductor,
    Context,
    Cron,
    Insert,
    Invocation,
    OnChange,
    SyncContext,
    TableRow,
    WaitTimeout,
    define_event,
    define_task,
)
from conductor.errors import (
    DefinitionInvalid,
    FilterFailed,
    OptionInvalid,
    ResultInvalid,
    StepOrderChanged,
    UnknownName,
)
from conductor.testing import (
    AnswerInvalid,
    Rehearsal,
    StillWaiting,
    Unanswered,
    deleted,
    inserted,
    truncated,
    updated,
)
from examples.fulfilment.models import (
    Mail,
    Orders,
    Payments,
    Shipped,
    Weigh,
    Weighed,
    order_shipped,
    send_mail,
    weigh,
)
from examples.fulfilment.workflow import create, order_paid

pytestmark = pytest.mark.anyio


class Order(BaseModel):
    id: int


class Users(TableRow, table="public.users"):
    id: int
    email: str


charge = define_task("charge", payload=Order, returns=int)
fetch = define_task("fetch", payload=int)
checkout = define_task("checkout", payload=Order, returns=list[Any])
paid = define_event("paid", payload=Order)
conductor = Conductor("", tasks=[charge, fetch, checkout], events=[paid])


def handled(handler: Any, **options: Any) -> Any:
    return Conductor("", tasks=[checkout]).task(checkout, **options)(handler)


async def test_steps_run_once_and_children_are_answered() -> None:
    ran: list[str] = []

    async def handler(event: Invocation[Order], ctx: Context[str]) -> list[Any]:
        await ctx.step("note", lambda: ran.append("note"), returns=None)
        await ctx.sleep("a day", timedelta(days=1))
        price = await ctx.invoke("charge", charge, event.payload)
        await ctx.emit("tell", paid, event.payload)
        handle = await ctx.start("again", charge, Order(id=9))
        await ctx.cancel(handle)
        return [price, ctx.deps]

    rehearsal = Rehearsal(deps="deps")
    rehearsal.answer(charge, lambda order: order.id * 10)
    began = rehearsal.now
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == [70, "deps"]
    assert (ran, rehearsal.runs) == (["note"], 2)
    assert rehearsal.now == began + timedelta(days=1)
    assert rehearsal.invoked(charge) == [Order(id=7), Order(id=9)]
    assert rehearsal.emitted(paid) == [Order(id=7)]
    assert rehearsal.cancelled == [3]


async def test_a_child_fails() -> None:
    async def handler(event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        try:
            await ctx.invoke("charge", charge, event.payload)
        except ChildFailed as error:
            return [error.error["message"]]
        return []

    rehearsal = Rehearsal()
    rehearsal.answer(charge, ValueError("no money"))
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == ["no money"]


async def test_what_is_not_given_is_said() -> None:
    async def invoking(event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        return [await ctx.invoke("charge", charge, event.payload)]

    async def waiting(_event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        return [await ctx.wait_for_event("paid", paid)]

    with pytest.raises(Unanswered, match="'charge'"):
        await Rehearsal().run(handled(invoking), Invocation(Order(id=7)))
    with pytest.raises(StillWaiting, match="'paid'"):
        await Rehearsal().run(handled(waiting), Invocation(Order(id=7)))


@pytest.mark.parametrize(
    ("answer", "fault"), [(None, Unanswered), ("seven", AnswerInvalid), (str, AnswerInvalid)]
)
async def test_a_fault_of_the_test_is_none_that_the_handler_gets_over(
    answer: Any, fault: type[Exception]
) -> None:
    async def careful(event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        with suppress(Exception):
            await ctx.invoke("charge", charge, event.payload)
        return []

    async def busy(event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        charged = ctx.invoke("charge", charge, event.payload)
        return list(await ctx.gather(charged, ctx.wait_for_event("paid", paid)))

    for handler in (careful, busy):
        rehearsal = Rehearsal()
        if answer is not None:
            rehearsal.answer(charge, answer)
        with pytest.raises(fault, match="'charge'"):
            await rehearsal.run(handled(handler), Invocation(Order(id=7)))


async def test_what_a_thread_raises_for_generators_alone_ends_the_rehearsal() -> None:
    def handler(_event: Any, _ctx: SyncContext[None]) -> list[Any]:
        return [next(iter([]))]

    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(Rehearsal().run(handled(handler), Invocation(Order(id=7))), 5)


@pytest.mark.parametrize("is_sync", [False, True])
async def test_a_batch_returns_nothing_here_either(is_sync: bool) -> None:
    async def handler(_events: Any, _ctx: BatchContext[None]) -> Any:
        return ["indexed"]

    def blocking(_events: Any, _ctx: BatchContext[None]) -> Any:
        return ["indexed"]

    app = Conductor("", tasks=[fetch])
    task = app.task(fetch, batch=Batch())(blocking if is_sync else handler)
    with pytest.raises(ResultInvalid, match="only None"):
        await Rehearsal().run(task, [Invocation(7)])


async def test_what_cannot_be_rehearsed_or_brought_is_said() -> None:
    wrong: Any = checkout
    with pytest.raises(DefinitionInvalid, match="what is rehearsed is not Task"):
        await Rehearsal().run(wrong, Invocation(Order(id=7)))
    row: Any = Users(id=7, email="a")
    with pytest.raises(DefinitionInvalid, match="what is brought is not Change") as raised:
        Rehearsal().bring(vip, row)
    assert "inserted(" in raised.value.hint


async def test_events_and_deadlines() -> None:
    async def handler(event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        found: list[Any] = []
        for number in range(2):
            try:
                match = {"id": event.payload.id}
                order = await ctx.wait_for_event(f"{number}", paid, match=match, timeout=60)
                found.append(order.id)
            except WaitTimeout:
                found.append("late")
        return found

    rehearsal = Rehearsal()
    rehearsal.bring(paid, Order(id=1))
    rehearsal.bring(paid, Order(id=7))
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == [7, "late"]


async def test_a_thread() -> None:
    def handler(event: Invocation[Order], ctx: SyncContext[None]) -> list[Any]:
        ctx.sleep("nap", 60)
        return [ctx.invoke("charge", charge, event.payload)]

    rehearsal = Rehearsal()
    rehearsal.answer(charge, 3)
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == [3]
    assert rehearsal.runs == 2


@pytest.mark.parametrize("kept_back", [False, True])
async def test_what_cleans_up_waits_for_the_end(kept_back: bool) -> None:
    log: list[str] = []

    async def free(_db: Any) -> None:
        log.append("free")

    async def handler(_event: Any, ctx: Context) -> list[Any]:
        sold = await ctx.subscribe("sold", paid)
        try:
            await ctx.sleep("nap", 5)
            await ctx.step("work", lambda: log.append("work"), returns=None)
        except BaseException:
            if not kept_back:
                raise
        finally:
            with suppress(BaseException):
                await sold.wait()
            with suppress(BaseException):
                await ctx.step("release", lambda: log.append("release"), returns=None)
            with suppress(BaseException):
                await ctx.transaction("free", free, returns=None)
            await ctx.emit("tell", paid, Order(id=1))
        return list(log)

    rehearsal = Rehearsal()
    rehearsal.bring(paid, Order(id=7))
    done = await rehearsal.run(handled(handler), Invocation(Order(id=7)))
    assert done == ["work", "release", "free"]
    assert len(rehearsal.emitted(paid)) == 1


async def test_what_is_left_of_a_handler_begins_nothing_more() -> None:
    go_on, left = asyncio.Event(), set[asyncio.Task[None]]()

    async def handler(_event: Any, ctx: Context) -> list[Any]:
        async def late() -> None:
            await go_on.wait()
            await ctx.step("late", lambda: None)

        left.add(asyncio.create_task(late()))
        return []

    rehearsal = Rehearsal()
    await rehearsal.run(handled(handler), Invocation(Order(id=7)))
    go_on.set()
    await asyncio.wait(left)
    assert [task.cancelled() for task in left] == [True]
    assert rehearsal.steps == {}


@pytest.mark.parametrize("kept_back", [False, True])
async def test_what_cleans_up_in_a_thread_waits_for_the_end(kept_back: bool) -> None:
    log: list[str] = []

    def handler(_event: Any, ctx: SyncContext) -> list[Any]:
        try:
            ctx.sleep("nap", 5)
            ctx.step("work", lambda: log.append("work"), returns=None)
        except BaseException:
            if not kept_back:
                raise
        finally:
            with suppress(BaseException):
                ctx.step("release", lambda: log.append("release"), returns=None)
            with suppress(BaseException):
                ctx.transaction("free", lambda _: log.append("free"), returns=None)
            ctx.emit("tell", paid, Order(id=1))
        return list(log)

    rehearsal = Rehearsal()
    done = await rehearsal.run(handled(handler), Invocation(Order(id=7)))
    assert done == ["work", "release", "free"]
    assert len(rehearsal.emitted(paid)) == 1


async def test_a_replay_that_goes_another_way_fails() -> None:
    runs: list[int] = []

    async def handler(_event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        runs.append(1)
        await ctx.step(f"run {len(runs)}", lambda: 1)
        await ctx.sleep("nap", 60)
        return []

    with pytest.raises(StepOrderChanged):
        await Rehearsal().run(handled(handler), Invocation(Order(id=7)))


async def test_the_workflow_of_the_example(rehearsal: Rehearsal) -> None:
    task = create("").tasks["fulfil"]
    rehearsal.given("reserve", True, kind="transaction")
    rehearsal.given("ship", None, kind="transaction")
    rehearsal.answer(weigh, lambda asked: Weighed(weight_g=asked.quantity * 100))
    rehearsal.answer(send_mail, None)
    rehearsal.bring(order_paid, inserted(Payments(order_id=7, amount=30)))
    event: Insert[Orders] = inserted(Orders(id=7, item="lamp", quantity=2))
    await rehearsal.run(task, event, trigger="change")
    assert rehearsal.invoked(weigh) == [Weigh(item="lamp", quantity=2)]
    assert rehearsal.invoked(send_mail) == [
        Mail(order_id=7, text="please pay"),
        Mail(order_id=7, text="thanks for 30"),
    ]
    assert rehearsal.emitted(order_shipped) == [Shipped(order_id=7, weight_g=200)]


async def test_an_order_that_nobody_pays_for(rehearsal: Rehearsal) -> None:
    rehearsal.given("reserve", True, kind="transaction")
    rehearsal.given("release", None, kind="transaction")
    task = create("").tasks["fulfil"]
    began = rehearsal.now
    await rehearsal.run(task, inserted(Orders(id=7, item="lamp", quantity=2)))
    assert rehearsal.emitted(order_shipped) == []
    assert rehearsal.now - began == timedelta(days=14)


async def test_gathers_of_anything() -> None:
    long, names = "n" * 200, ["a"]

    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        for _ in range(2):
            await ctx.gather(*(ctx.step(name, lambda: 1) for name in names[:0]))
        one = await ctx.gather(ctx.step(long, lambda: 1), ctx.sleep(long[1:] + "s", 5))
        news = await ctx.subscribe("m" * 200, paid)
        with pytest.raises(WaitTimeout):
            await news.wait(5)
        return list(one)

    assert await Rehearsal().run(handled(handler), Invocation(Order(id=7))) == [1, None]


async def test_an_interrupted_gather_with_other_steps_fails() -> None:
    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        name = "a" if ctx.job.fence < 3 else "b"
        await ctx.gather(ctx.step(name, lambda: 1), ctx.sleep("nap", 5))
        return []

    rehearsal = Rehearsal()
    with pytest.raises(StepOrderChanged, match=r"gather has other steps .*: a$"):
        await rehearsal.run(handled(handler), Invocation(Order(id=7)))


async def test_who_was_not_first_in_a_gather_may_come_another_way() -> None:
    async def slow(ctx: Context[None]) -> None:
        await ctx.step(f"begun {ctx.job.fence}", lambda: 1)
        await ctx.sleep("long", 3600)

    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        await ctx.gather(
            ctx.wait_for_any("first", slow(ctx), ctx.sleep("short", 5)), ctx.sleep("other", 10)
        )
        return []

    rehearsal = Rehearsal()
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == []


vip = OnChange(Users, "insert", "update", when="new.email.startsWith('a')", changed=["email"])


async def test_filters_decide_what_a_wait_gets() -> None:
    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        big = await ctx.wait_for_event("big", paid, when="event.id > 100", timeout=60)
        small = await ctx.wait_for_event("small", paid, timeout=60)
        user = await ctx.wait_for_change("user", vip, timeout=60)
        return [big.id, small.id, user.new.email]

    rehearsal = Rehearsal()
    for number in (5, 500):
        rehearsal.bring(paid, Order(id=number))
    ann, bea = Users(id=1, email="ann"), Users(id=2, email="bea")
    for change in (inserted(bea), deleted(ann), updated(ann, ann), updated(ann, bea)):
        rehearsal.bring(vip, change)
    task = handled(handler, waits=[vip])
    assert await rehearsal.run(task, Invocation(Order(id=7))) == [500, 5, "ann"]


@pytest.mark.parametrize("change", [True, False])
async def test_a_wait_for_what_there_is_not_is_refused(change: bool) -> None:
    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        if change:
            await ctx.wait_for_change("user", vip, match={"idd": 7})
        await ctx.subscribe("paid", paid, match={"idd": 7})
        return []

    with pytest.raises(UnknownName, match=r"unknown (column|field) 'idd' .*did you mean 'id'"):
        await Rehearsal().run(handled(handler, waits=[vip]), Invocation(Order(id=7)))


async def test_a_filter_that_fails_fails_the_wait() -> None:
    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        await ctx.wait_for_event("big", paid, when="10 / (event.id - 5) > 1", timeout=60)
        return []

    rehearsal = Rehearsal()
    rehearsal.bring(paid, Order(id=5))
    with pytest.raises(FilterFailed, match="wait 'big': filter"):
        await rehearsal.run(handled(handler), Invocation(Order(id=7)))


async def test_all_that_wait_get_what_comes_and_one_thing_comes_at_a_time() -> None:
    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        one = await ctx.subscribe("one", paid)
        two = await ctx.subscribe("two", paid)
        user = await ctx.subscribe("user", vip)
        match await ctx.wait_for_any("first", user.wait(), two.wait()):
            case (0, change):
                return [change.new.email]
            case (_, order):
                return [(await one.wait()).id, order.id, (await user.wait(60)).new.email]

    rehearsal = Rehearsal()
    rehearsal.bring(paid, Order(id=5))
    rehearsal.bring(vip, inserted(Users(id=1, email="ann")))
    task = handled(handler, waits=[vip])
    assert await rehearsal.run(task, Invocation(Order(id=7))) == [5, 5, "ann"]


@pytest.mark.parametrize("duration", [float("nan"), 1e300, timedelta.max, "5", Decimal(5), None])
async def test_what_is_no_time_is_refused(duration: Any) -> None:
    asked: list[Any] = [
        lambda ctx: ctx.sleep("nap", duration),
        lambda ctx: ctx.start("charge", charge, Order(id=7), delay=duration),
        lambda ctx: ctx.wait_for_event("paid", paid, timeout=duration),
        lambda ctx: ctx.invoke("charge", charge, Order(id=7), timeout=duration),
    ]

    def in_a_thread(_event: Any, ctx: SyncContext[None]) -> list[Any]:
        ctx.sleep("nap", duration)
        return []

    for ask in asked[:1] if duration is None else asked:  # without a timeout it is for ever

        async def handler(_event: Any, ctx: Context[None], ask: Any = ask) -> list[Any]:
            await ask(ctx)
            return []

        with pytest.raises(OptionInvalid, match=r"not a time|thousand years"):
            await Rehearsal().run(handled(handler), Invocation(Order(id=7)))
    with pytest.raises(OptionInvalid, match=r"^duration"):
        await Rehearsal().run(handled(in_a_thread), Invocation(Order(id=7)))


class Flaky:
    """Fails the first times; counts."""

    def __init__(self, failures: int = 1) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionResetError(104, "reset")
        return self.calls


async def test_a_failure_that_the_handler_goes_on_from_is_kept() -> None:
    pay = Flaky()

    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        try:
            await ctx.step("pay", pay)
        except OSError as error:
            await ctx.step("note", lambda: None)
            await ctx.sleep("pause", 5)
            return [type(error).__name__, error.errno]
        return ["paid"]

    done = await Rehearsal().run(handled(handler), Invocation(Order(id=7)))
    assert (done, pay.calls) == (["ConnectionResetError", 104], 1)


async def test_a_given_failure_is_raised() -> None:
    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        try:
            await ctx.transaction("book", lambda _: asyncio.sleep(0))
        except PermissionError as error:
            return [str(error)]
        return []

    rehearsal = Rehearsal()
    rehearsal.given("book", PermissionError("not today"), kind="transaction")
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == ["not today"]


async def test_a_step_may_be_tried_again_under_other_names() -> None:
    pay = Flaky(2)

    def handler(_event: Any, ctx: SyncContext[None]) -> list[Any]:
        for attempt in range(5):
            try:
                return [ctx.step(f"pay {attempt}", pay)]
            except OSError:
                ctx.sleep(f"pause {attempt}", 60)
        return []

    rehearsal = Rehearsal()
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == [3]
    assert [step.kind for step in rehearsal.steps.values()] == [
        *("failed step", "sleep", "failed step", "sleep", "step")
    ]


@pytest.mark.parametrize("nested", [False, True])
async def test_a_failure_in_a_gather_is_kept_when_that_is_over(nested: bool) -> None:
    pay = Flaky()

    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        async def careful(*steps: Any) -> str:
            try:
                await ctx.gather(*steps)
            except OSError:
                await ctx.step("note", lambda: None)
                return "refused"
            return "paid"

        steps = ctx.step("pay", pay), ctx.sleep("short", 1)
        if nested:
            how, _ = await ctx.gather(careful(*steps), ctx.sleep("long", 5))
        else:
            how = await careful(*steps)
            await ctx.sleep("long", 5)
        return [how]

    done = await Rehearsal().run(handled(handler), Invocation(Order(id=7)))
    assert done == ["paid"]  # the sleep has ended the run before anybody saw the failure
    pay.calls = 0
    pay.failures = 5
    done = await Rehearsal().run(handled(handler), Invocation(Order(id=7)))
    assert (done, pay.calls) == (["refused"], 2)


async def test_a_failure_beside_steps_that_go_on_is_not_kept() -> None:
    pay = Flaky()

    async def others(ctx: Context[None]) -> None:
        for n in range(5):
            await ctx.step(f"other {n}", lambda: None)

    async def handler(_event: Any, ctx: Context[None]) -> list[Any]:
        await ctx.gather(ctx.step("pay", pay), others(ctx))
        return ["paid"]

    rehearsal = Rehearsal()
    with pytest.raises(OSError, match="reset"):
        await rehearsal.run(handled(handler), Invocation(Order(id=7)))
    assert await rehearsal.run(handled(handler), Invocation(Order(id=7))) == ["paid"]


def test_changes() -> None:
    one, two = Users(id=1, email="a"), Users(id=1, email="b")
    assert inserted(one).new is one
    assert updated(two, one).changed == {"email"}
    assert updated(two).new is two
    assert deleted(one).old is one
    assert truncated(Users, cascade=True).cascade
    assert OnChange(Users).table.table == inserted(one).table


async def test_schedules_are_kept() -> None:
    async def handler(event: Invocation[Order], ctx: Context[None]) -> list[Any]:
        await ctx.schedule("each day", charge, Cron("0 9 * * *"), event.payload)
        await ctx.schedule("never", charge, Cron("0 9 * * *"), event.payload)
        await ctx.schedule("never", fetch, Cron("0 9 * * *"), 7)  # unique in its task
        await ctx.sleep("a day", timedelta(days=1))
        await ctx.unschedule("never", charge)
        return []

    rehearsal = Rehearsal()
    await rehearsal.run(handled(handler), Invocation(Order(id=7)))
    assert rehearsal.scheduled(charge) == {"each day": Order(id=7)}
    assert rehearsal.scheduled(fetch) == {"never": 7}
