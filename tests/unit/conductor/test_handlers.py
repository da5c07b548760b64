"""What a handler says of itself against its triggers, its context and its task."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial, singledispatch
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NewType, Protocol, TypeVar

import pytest
from annotated_types import Gt
from pydantic import AwareDatetime, BaseModel, EmailStr, JsonValue, RootModel
from typing_extensions import TypedDict

from conductor import (
    Batch,
    BatchContext,
    Change,
    Conductor,
    Context,
    Cron,
    Delete,
    Emitted,
    Insert,
    Invocable,
    Invocation,
    OnChange,
    OnEvent,
    SyncContext,
    TableRow,
    Tick,
    Transaction,
    Truncate,
    Update,
    define_event,
    define_task,
)
from conductor.annotations import accepts, shown
from conductor.errors import DefinitionInvalid

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Coroutine as CoroutineForCheckers

T = TypeVar("T")
Id = NewType("Id", int)


class Mail(BaseModel):
    to: str


class Special(Mail):
    priority: int


class Other(BaseModel):
    x: int


class Box(BaseModel, Generic[T]):
    value: T


class IntBox(Box[int]): ...


class Numbers(RootModel[list[int]]): ...


@dataclass
class Sent:
    id: str


class Size(TypedDict):
    width: int


class Named(TypedDict):
    name: str


class HasPayload(Protocol):
    payload: Any


class Users(TableRow, table="public.users"):
    id: int


class Orders(TableRow, table="public.orders"):
    id: int


send = define_task("send", payload=Mail, returns=Sent)
resize = define_task("resize", payload=Size, validate=False)
mailed = define_event("mailed", payload=Mail)
ON_USERS = OnChange(Users, "insert", "update")
DEPS = "deps"


def client() -> Any:
    return Conductor("postgresql://nowhere", tasks=[send, resize], context=DEPS)


def handler_of(event: Any, context: Any = Context, returns: Any = None) -> Any:
    """An ``async def`` with these annotations."""

    async def handler(event: Any, ctx: Any) -> Any: ...

    handler.__annotations__ = {"event": event, "ctx": context, "return": returns}
    handler.__qualname__ = "handler"  # text means this module's names, not those of a function
    return handler


FITTING: list[tuple[tuple[Any, ...], Any]] = [
    ((send,), Invocation[Mail]),
    ((send,), Invocation),
    ((send,), Invocation[Any]),
    ((send,), Invocation[BaseModel]),
    ((send,), Any),
    ((send,), object),
    ((send,), HasPayload),
    ((send,), "Invocation[Mail]"),
    ((send,), "Invocation[NoSuchName]"),
    ((send,), Invocation[Mail] | Tick),
    ((send,), Annotated[Invocation[Mail], "note"]),
    ((send,), Invocation[T]),  # type: ignore[valid-type]  # at run time
    ((resize,), Invocation[Size]),
    ((resize,), Invocation[dict[str, Any]]),
    ((resize,), Invocation[Mapping[str, int]]),
    (("a", ON_USERS), Change[Users]),
    (("a", ON_USERS), Change),
    (("a", ON_USERS), Insert[Users] | Update[Users]),
    (("a", ON_USERS), Insert[Users] | Update[Users] | Delete[Users]),
    (("a", ON_USERS), Insert | Update),
    (("a", ON_USERS), Change[TableRow]),
    (("a", OnChange("public.users")), Change[dict[str, JsonValue]]),
    (("a", OnChange("public.users")), Change[dict[str, Any]]),
    (("a", OnChange("public.users")), Change[Mapping[str, Any]]),
    (("a", OnChange("public.users")), Change),
    (("a", OnChange(Users, group="transaction")), Transaction[Change[Users]]),
    (("a", OnChange(Users, group="transaction")), Transaction),
    (("a", OnChange(Users, "truncate")), Truncate[Users]),
    (("a", OnEvent(mailed), Cron("* * * * *")), Emitted[Mail] | Tick),
    (("a", Invocable()), Invocation[Mail]),  # by name: whatever is sent
]

WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    ((send,), Invocation[Other], r"takes Invocation\[Other\], .* gives Invocation\[Mail\]"),
    ((send,), "Invocation[Other]", r"takes Invocation\[Other\]"),
    ((send,), Invocation[Special], "Special"),
    ((send,), Mail, r"takes Mail, and 'invoke' gives Invocation\[Mail\]"),
    ((send,), Invocation[None], r"takes Invocation\[None\]"),
    ((send,), Tick, "takes Tick"),
    ((resize,), Invocation[Named], "takes Invocation.Named., and 'invoke' gives Invocation.Size."),
    (("a", ON_USERS), Change[Orders], r"takes Change\[Orders\], .* gives Insert\[Users\]"),
    (("a", ON_USERS), Insert[Users], r"takes Insert\[Users\], .* gives Update\[Users\]"),
    (("a", ON_USERS), Insert[Users] | Delete[Users], r"gives Update\[Users\]"),
    (("a", ON_USERS), Transaction[Change[Users]], r"takes Transaction\[Change\[Users\]\]"),
    (("a", OnChange("public.users")), Change[Users], r"gives Insert\[dict\[str, JsonValue\]\]"),
    (("a", OnChange(Users, group="transaction")), Change[Users], "takes Change"),
    (("a", OnChange(Users, group="transaction")), Transaction[Insert[Users]], "takes Transaction"),
    (("a", OnEvent(mailed)), Emitted[Other], r"takes Emitted\[Other\], and 'event:mailed' gives"),
    (("a", OnEvent(mailed), Cron("* * * * *")), Emitted[Mail], r"gives Tick"),
    (("a", OnEvent(mailed), Cron("* * * * *")), Tick, r"gives Emitted\[Mail\]"),
]


@pytest.mark.parametrize(("task", "event"), FITTING)
def test_a_handler_takes_what_its_triggers_give(task: tuple[Any, ...], event: Any) -> None:
    client().task(*task)(handler_of(event, returns=Sent if task[0] is send else None))


@pytest.mark.parametrize(("task", "event", "message"), WRONG)
def test_a_handler_that_takes_something_else_is_refused(
    task: tuple[Any, ...], event: Any, message: str
) -> None:
    with pytest.raises(DefinitionInvalid, match=message) as caught:
        client().task(*task)(handler_of(event, returns=Sent if task[0] is send else None))
    assert f"the handler of task {getattr(task[0], 'name', task[0])!r} at {__file__}:" in str(
        caught.value
    )
    assert "Annotate the event with " in caught.value.hint


def test_the_hint_has_all_that_the_triggers_give() -> None:
    with pytest.raises(DefinitionInvalid) as caught:
        client().task("a", ON_USERS, Cron("* * * * *"))(handler_of(Tick))
    assert "with Insert[Users] | Update[Users] | Tick, or correct" in caught.value.hint


@pytest.mark.parametrize(
    "event",
    [Sequence[Invocation[Size]], list[Invocation[Size]], Iterable[Invocation], Sequence, Any],
)
def test_a_batch_is_a_sequence(event: Any) -> None:
    client().task(resize, batch=Batch())(handler_of(event, BatchContext))


@pytest.mark.parametrize("event", [Invocation[Size], Sequence[Tick], list[Invocation[Named]]])
def test_a_batch_is_nothing_else(event: Any) -> None:
    with pytest.raises(DefinitionInvalid, match=r"gives Sequence\[Invocation\[Size\]\]"):
        client().task(resize, batch=Batch())(handler_of(event, BatchContext))


@pytest.mark.parametrize("returns", [Sent, "Sent", Any, object, dict, Sent | None, Awaitable[Sent]])
def test_what_may_become_the_result_passes(returns: Any) -> None:
    client().task(send)(handler_of(Any, returns=returns))


@pytest.mark.parametrize("returns", [None, str, int | None, Mail, Awaitable[Mail], list[Sent]])
def test_what_is_never_the_result_is_refused(returns: Any) -> None:
    with pytest.raises(DefinitionInvalid, match=r"returns .*, and the task declares Sent"):
        client().task(send)(handler_of(Any, returns=returns))


def test_what_is_returned_may_be_more_than_it_says() -> None:
    special = define_task("special", returns=Special)
    app = Conductor("postgresql://nowhere", tasks=[special])
    app.task(special)(handler_of(Any, returns=Mail))


def test_a_root_model_is_made_of_what_it_holds() -> None:
    numbers = define_task("numbers", returns=Numbers)
    app = Conductor("postgresql://nowhere", tasks=[numbers])
    app.task(numbers)(handler_of(Any, returns=list[int]))


def test_a_task_without_a_result_returns_nothing() -> None:
    with pytest.raises(DefinitionInvalid, match="returns int, and the task declares nothing"):
        client().task("a", Cron("* * * * *"))(handler_of(Tick, returns=int))
    client().task("a", Cron("* * * * *"))(handler_of(Tick, returns=int | None))


# --- decorators: what they wrap takes and returns what they like ------------------------------


def with_session(handler: Any) -> Any:
    @functools.wraps(handler)
    async def wrapper(event: Any, ctx: Any) -> Any:
        return await handler(event, ctx, "session")

    return wrapper


def with_option_by_name(handler: Any) -> Any:
    @functools.wraps(handler)
    async def wrapper(*args: Any) -> Any:
        return await handler(*args, session="session")

    return wrapper


def of_the_payload(handler: Any) -> Any:
    @functools.wraps(handler)
    async def wrapper(event: Any, ctx: Any) -> Any:
        return await handler(event.payload)

    return wrapper


def without_result(handler: Any) -> Any:
    @functools.wraps(handler)
    async def wrapper(event: Any, ctx: Any) -> None:
        await handler(event, ctx)

    return wrapper


def in_thread(handler: Any) -> Any:
    @functools.wraps(handler)
    async def wrapper(event: Any, ctx: Any) -> Any:
        return handler(event, ctx)

    return wrapper


class OfThePayload:
    def __init__(self, handler: Any) -> None:
        functools.update_wrapper(self, handler)
        self._handler = handler

    async def __call__(self, event: Any, _ctx: Any) -> Any:
        return await self._handler(event.payload)


async def takes_session(event: Tick, ctx: Context[str], session: str) -> None: ...


async def takes_mail(payload: Mail) -> None: ...


async def gives_int(event: Tick, ctx: Context[str]) -> int: ...  # type: ignore[empty-body]


def blocks(event: Tick, ctx: Context[str]) -> None: ...


@singledispatch
async def dispatches(event: Emitted[Mail], ctx: Context[str]) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [
        with_session(takes_session), with_option_by_name(takes_session), of_the_payload(takes_mail),
        OfThePayload(takes_mail), without_result(gives_int), in_thread(blocks), dispatches,
        partial(with_session(takes_session)),
    ],
)  # fmt: skip
def test_what_a_decorator_wraps_is_not_compared(handler: Any) -> None:
    assert not client().task("a", Cron("* * * * *"))(handler).is_sync


def test_a_decorator_that_takes_something_else_is_refused() -> None:
    def wrong(handler: Any) -> Any:
        @functools.wraps(handler)
        async def wrapper(event: Any) -> None: ...

        return wrapper

    with pytest.raises(DefinitionInvalid, match="cannot be called with an event and a context"):
        client().task("a", Cron("* * * * *"))(wrong(plain))


async def yields(_event: Tick, _ctx: Context[str]) -> Any:
    yield 1


def yields_too(_event: Tick, _ctx: SyncContext[str]) -> Any:
    yield 1


@pytest.mark.parametrize("handler", [yields, yields_too, partial(yields)])
def test_a_handler_that_yields_is_refused(handler: Any) -> None:
    with pytest.raises(DefinitionInvalid, match="yields, so that it would never run"):
        client().task("a", Cron("* * * * *"))(handler)


# --- names: a function and a class have their own ---------------------------------------------


class Holder:
    class Mail(BaseModel):
        other: int

    async def handle(self, event: Invocation[Mail], ctx: Context[str]) -> None: ...

    async def wrong(self, event: Invocation[Other], ctx: Context[str]) -> None: ...


def test_names_around_a_handler_are_its_own() -> None:
    class Mail(BaseModel):
        other: int

    local = define_task("local", payload=Mail)
    within = define_task("within", payload=Holder.Mail)
    app: Any = Conductor("postgresql://nowhere", tasks=[local, within])

    async def handle(event: Invocation[Mail], ctx: Context) -> None: ...

    app.task(local)(handle)
    app.task(within)(Holder().handle)

    async def wrong(event: Invocation[Other], ctx: Context) -> None: ...

    with pytest.raises(DefinitionInvalid, match=r"takes Invocation\[Other\]"):
        app.task(local)(wrong)
    with pytest.raises(DefinitionInvalid, match=r"takes Invocation\[Other\]"):
        app.task(within)(Holder().wrong)


# --- contexts, and where a handler runs ------------------------------------------------------


async def plain(event: Tick, ctx: Context[str]) -> None: ...


async def bare(event, ctx):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 - the point
    ...


def blocking(event: Tick, ctx: SyncContext[str]) -> None: ...


def logged(handler: Callable[..., Any]) -> Callable[..., Any]:
    """What many decorators are: a ``def`` that gives what it wraps gives."""

    @functools.wraps(handler)
    def wrapper(*args: Any, **options: Any) -> Any:
        return handler(*args, **options)

    return wrapper


async def of_a_thread(event: Tick, ctx: SyncContext[str]) -> None: ...


class Wrapped:
    """A callable object that wraps a handler."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        functools.update_wrapper(self, handler)
        self._handler = handler

    def __call__(self, event: Any, ctx: Any) -> Any:
        return self._handler(event, ctx)


class Methods:
    async def handle(self, event: Tick, ctx: Context[str]) -> None: ...

    async def __call__(self, event: Tick, ctx: Context[str]) -> None: ...


def forwards(event: Tick, ctx: Context[str]) -> Awaitable[None]:
    return plain(event, ctx)


def forwards_unread(event: Tick, ctx: Context[str]) -> CoroutineForCheckers[Any, Any, None]:
    return plain(event, ctx)


def forwards_future(event: Tick, ctx: Context[str]) -> Future[None]: ...  # type: ignore[empty-body]


def forwards_any(event: Tick, ctx: Context[str]) -> Any:
    return plain(event, ctx)


def forwards_bare(event: Tick, ctx: Context[str]) -> Awaitable:  # type: ignore[type-arg]
    return plain(event, ctx)


async def with_option(option: int, event: Tick, ctx: Context[str]) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [
        plain, bare, logged(plain), logged(bare), logged(logged(plain)), Wrapped(plain), Methods(),
        Methods().handle, logged(Methods().handle), forwards, logged(forwards),
        forwards_unread, forwards_future, forwards_any, forwards_bare,
        partial(with_option, 1), logged(partial(with_option, 1)), partial(logged(plain)),
        Wrapped(partial(with_option, 1)),
    ],
)  # fmt: skip
def test_what_gives_a_coroutine_runs_on_the_loop(handler: Any) -> None:
    assert not client().task("a", Cron("* * * * *"))(handler).is_sync


@pytest.mark.parametrize(
    "handler",
    [blocking, logged(blocking), Wrapped(blocking), partial(blocking), lambda _event, _ctx: None],
)
def test_what_blocks_runs_in_a_thread(handler: Any) -> None:
    assert client().task("a", Cron("* * * * *"))(handler).is_sync


def test_a_wrapper_that_takes_the_context_of_a_thread_runs_in_one() -> None:
    assert client().task("a", Cron("* * * * *"))(logged(of_a_thread)).is_sync


def wrong_context(event: Tick, ctx: Context[str]) -> None: ...


async def batched(event: Tick, ctx: BatchContext[str]) -> None: ...


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (wrong_context, "is def, and takes Context"),
        (of_a_thread, "is async def, and takes SyncContext"),
        (batched, "takes BatchContext"),
    ],
)
def test_a_context_that_it_will_not_be_given_is_refused(handler: Any, message: str) -> None:
    with pytest.raises(DefinitionInvalid, match=message):
        client().task("a", Cron("* * * * *"))(handler)


def test_a_batch_has_a_context_of_its_own() -> None:
    with pytest.raises(DefinitionInvalid, match="takes Context") as caught:
        client().task(resize, batch=Batch())(handler_of(Sequence, Context))
    assert "BatchContext" in caught.value.hint


@pytest.mark.parametrize(
    ("wanted", "given", "fits"),
    [
        (float, int, True),
        (int, float, False),
        (float, bool, True),
        (Hashable, Mail, True),
        (int, Id, True),
        (Id, int, True),
        (Annotated[int, Gt(1)], int, True),
        (str, Literal["a"], True),
        (int, Literal["a"], False),
        (Literal["b"], str, True),
        (list[int], list[str], False),
        (tuple[int, ...], tuple[int, str], True),
        (Mapping, dict[str, int], True),
        (None, type(None), True),
        (int | None, int, True),
        (int, int | None, False),
        (str, EmailStr, True),
        (EmailStr, str, True),
        (list[str], list[EmailStr], True),
        (datetime, AwareDatetime, True),
        (Box[Any], IntBox, True),
        (Box[int], Box, True),
        (IntBox, Box[int], False),
    ],
)
def test_only_what_is_certain_is_refused(wanted: Any, given: Any, fits: bool) -> None:
    assert accepts(wanted, given) is fits


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (None, "None"),
        (Change[Users], "Change[Users]"),
        (Sequence[Insert[Users] | Tick], "Sequence[Insert[Users] | Tick]"),
        (Literal["a"], "Literal['a']"),
    ],
)
def test_annotations_are_shown_as_written(annotation: Any, text: str) -> None:
    assert shown(annotation) == text
