from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from types import ModuleType
from typing import Any, cast
from uuid import UUID

import pytest
from pydantic import BaseModel

from conductor import (
    Conductor,
    Context,
    Cron,
    Database,
    Invocable,
    Invocation,
    OnChange,
    OnEvent,
    Orchestrator,
    SyncContext,
    TableRow,
    define_event,
    define_task,
)
from conductor.calls import child, emission, expected_change
from conductor.definitions import Batch
from conductor.enqueue import JobBatch
from conductor.errors import (
    ConductorError,
    DefinitionInvalid,
    OptionInvalid,
    PayloadInvalid,
    UnknownColumn,
    UnknownEvent,
    UnknownOption,
    UnknownTable,
    UnknownTask,
)
from conductor.matching import ChangeFilter
from conductor.retry import RetryPolicy

BATCH = Batch(size=5)


class Greeting(BaseModel):
    name: str


class Users(TableRow, table="public.users"):
    id: int


greet = define_task("greet", payload=Greeting, queue="mail")
nightly = define_task("nightly")
greeted = define_event("greeted", payload=Greeting)

DSN = "postgresql://nowhere"


def client(**options: Any) -> Any:
    """A client that connects to nothing; untyped, for what a checker would refuse."""
    return Conductor(DSN, tasks=[greet, nightly], events=[greeted], **options)


async def handler(event: object, ctx: object) -> None: ...


def test_a_bound_task_has_its_definition_and_options() -> None:
    conductor = Conductor(DSN, tasks=[greet], version="v7")

    @conductor.task(greet, max_attempts=3, retention=timedelta(0), priority=9, timeout_s=1.5)
    async def send(event: Invocation[Greeting], ctx: Context) -> None: ...

    assert (send.name, send.queue, send.version) == ("greet", "mail", "v7")
    assert (send.max_attempts, send.retention, send.priority) == (3, timedelta(0), 9)
    assert send.timeout_s == 1.5
    assert not send.is_sync
    assert [trigger.name for trigger in send.triggers] == ["invoke"]
    assert conductor.tasks == {"greet": send}


def test_a_task_by_name_has_triggers_and_a_queue() -> None:
    conductor = Conductor(DSN)

    @conductor.task("welcome", OnEvent(greeted), Cron("0 9 * * *"), queue="slow")
    def welcome(event: object, ctx: SyncContext) -> None: ...

    assert (welcome.queue, welcome.is_sync) == ("slow", True)
    assert [trigger.kind for trigger in welcome.triggers] == ["event", "cron"]
    assert set(conductor.events) == {"greeted"}
    assert set(conductor.definitions) == {"welcome"}


def test_a_known_name_stands_for_its_definition() -> None:
    conductor = client()
    assert conductor.task("greet")(handler).definition is greet
    with pytest.raises(UnknownTask, match="did you mean 'nightly'"):
        conductor.task("nigthly")


def test_handlers_may_be_partials_and_objects() -> None:
    class Handler:
        async def __call__(self, event: object, ctx: object) -> None: ...

    async def three(prefix: str, event: object, ctx: object) -> None: ...

    conductor = client()
    assert not conductor.task("a", Invocable())(Handler()).is_sync
    assert not conductor.task("b", Invocable())(partial(three, "x")).is_sync
    assert conductor.task("c", Invocable())(lambda event, ctx: None).is_sync  # noqa: ARG005


@pytest.mark.parametrize("wrong", [lambda: None, lambda event: event, 3, "x"])
def test_what_cannot_be_called_as_a_handler_is_refused(wrong: Any) -> None:
    with pytest.raises(DefinitionInvalid, match="handler of task 'greet'"):
        client().task(greet)(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "max_attempts"),
        ({"retention": timedelta(-1)}, "retention"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"priority": 40_000}, "priority"),
        ({"attempts": 3}, "no option 'attempts'"),
        ({"queue": "other"}, "queue of task 'greet'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionInvalid, match=message):
        client().task(greet, **options)(handler)


@pytest.mark.parametrize(
    ("triggers", "message"),
    [
        ((OnEvent(greeted), OnEvent(greeted)), "fire on event:greeted"),
        ((OnChange(Users, "insert"), OnChange("public.users")), "fire on insert on public.users"),
        ((Invocable(), Invocable()), "fire on invoke"),
        ((Cron("0 9 * * *"), Cron("0  9 * * *")), "fire on cron"),
        ((greeted,), "is not a trigger"),
    ],
)
def test_triggers_that_clash_are_refused(triggers: Any, message: str) -> None:
    with pytest.raises(DefinitionInvalid, match=message):
        client().task("t", *triggers)(handler)


def test_one_name_has_one_definition_and_one_handler() -> None:
    conductor = client()
    conductor.task(greet)(handler)
    with pytest.raises(
        DefinitionInvalid, match=r"has a handler already, at .*test_binding\.py:\d+$"
    ):
        conductor.task(greet)(handler)
    with pytest.raises(DefinitionInvalid, match="task 'greet' is defined twice, at ") as twice:
        Conductor(DSN, tasks=[greet, define_task("greet")])
    assert str(twice.value).count("test_binding.py:") == 2
    with pytest.raises(DefinitionInvalid, match=r"event 'greeted' is defined twice, at .* and "):
        client().task("t", OnEvent(define_event("greeted")))(handler)
    with pytest.raises(DefinitionInvalid, match=r"'greet' is defined twice, at .*:\d+ and .*:\d+"):
        client().task("greet", Cron("0 3 * * *"))(handler)
    with pytest.raises(DefinitionInvalid, match="does not define task"):
        Conductor(DSN, tasks=[greeted])  # type: ignore[list-item]  # the point of the test


def test_a_second_definition_is_not_called_unknown() -> None:
    conductor = client()
    with pytest.raises(DefinitionInvalid, match=r"^task 'nightly' is defined twice, at .* and "):
        conductor.invocation(define_task("nightly"), [None], {})
    with pytest.raises(DefinitionInvalid, match=r"^event 'greeted' is defined twice") as twice:
        conductor.emission(define_event("greeted"), [None], None)
    assert str(twice.value).count("test_binding.py:") == 2
    one, two = (define_task("again") for _ in range(2))
    with pytest.raises(DefinitionInvalid, match=r"the line .*test_binding.py:\d+ ran twice") as ran:
        Conductor(DSN, tasks=[one, two])
    assert "imported under two names" in ran.value.hint


FLAWED = pytest.mark.parametrize("text", ["a\0b", "half \ud800"], ids=["nul", "surrogate"])


def test_an_unknown_option_names_the_nearest() -> None:
    conductor, untyped = client(), cast("Any", child)
    with pytest.raises(UnknownOption, match="unknown option 'prioritty'; did you mean 'priority'"):
        conductor.invocation(nightly, [None], {"prioritty": 5})
    with pytest.raises(OptionInvalid, match="unknown option 'dealy'; did you mean 'delay'"):
        untyped(None, nightly, None, {"dealy": 5})
    with pytest.raises(DefinitionInvalid, match="no option 'attempts'; did you mean 'max_attempts"):
        conductor.task(nightly, attempts=3)(handler)


@FLAWED
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("key", lambda text: {"key": text}),
        ("dedupe_key", lambda text: {"dedupe_key": text}),
        ("metadata: trace.0", lambda text: {"metadata": {"trace": [text]}}),
    ],
)
def test_options_that_cannot_be_stored_are_named(text: str, name: str, options: Any) -> None:
    conductor = client()
    with pytest.raises(OptionInvalid, match=f"^{name}.*the text holds") as refused:
        conductor.invocation(nightly, [None], options(text)).statement()
    assert str(refused.value).isprintable()
    assert "Take the character out" in refused.value.hint
    with pytest.raises(OptionInvalid, match=r"^dedupe_key"):
        conductor.invocation(nightly, [None, None], {}, None, ["fine", text])


@FLAWED
def test_declarations_that_cannot_be_stored_are_refused(text: str) -> None:
    for declare in (
        lambda: define_task(text),
        lambda: define_event(text),
        lambda: define_task("fine", queue=text),
        lambda: Conductor(DSN, app=text),
        lambda: Conductor(DSN, version=text),
        lambda: client().task("fine", Cron("0 3 * * *", name=text)),
        lambda: client().task("fine", Cron("0 3 * * *"), version=text)(handler),
        lambda: OnChange(f'public."{text}"'),
        lambda: OnChange("public.users", columns=("id", text)),
        lambda: OnChange("public.users", "insert", when=f"new.id == '{text}'"),
    ):
        with pytest.raises(DefinitionInvalid) as refused:
            declare()
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": float("nan")}, "delay nan is not a time"),
        ({"delay": float("inf")}, "delay inf is not a time"),
        ({"delay": timedelta.max}, "longer than a thousand years"),
        ({"run_at": datetime.max.replace(tzinfo=UTC)}, "is after 9999-12-30"),
        ({"dedupe_key": "a", "dedupe_for": timedelta.max}, "dedupe_for"),
        ({"metadata": {"a": object()}}, "^metadata: "),
    ],
)
def test_times_that_the_database_cannot_hold_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionInvalid, match=message):
        client().invocation(nightly, [None], options).statement()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 7}, "key is not str, but 7"),
        ({"dedupe_key": UUID(int=1)}, "dedupe_key is not str, but UUID"),
        ({"run_at": "tomorrow"}, "run_at is not datetime, but 'tomorrow'"),
        ({"delay": "5"}, "delay is not timedelta, but '5'"),
        ({"dedupe_key": "a", "dedupe_for": 60}, "dedupe_for is not timedelta, but 60"),
        ({"metadata": 3}, "metadata is not dict, but 3"),
    ],
)
def test_options_of_a_job_in_another_type_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionInvalid, match=f"^{message}") as refused:
        client().invocation(nightly, [None], options)
    assert f"Such as {message.split(maxsplit=1)[0]}=" in refused.value.hint


def test_what_is_no_task_and_no_event_is_refused() -> None:
    conductor, untyped = client(), cast("Any", child)
    with pytest.raises(DefinitionInvalid, match="the task is not TaskDefinition or Task or str"):
        conductor.invocation(greeted, [None], {})
    with pytest.raises(DefinitionInvalid, match="the task is not TaskDefinition or Task, but 'n'"):
        untyped(None, "n", None, {})
    with pytest.raises(DefinitionInvalid, match="the event is not EventDefinition, but 'left'"):
        cast("Any", emission)(None, "left", None)
    with pytest.raises(DefinitionInvalid, match="the change is not OnChange, but"):
        cast("Any", expected_change)(Users, None)
    with pytest.raises(DefinitionInvalid, match="the event is not EventDefinition or str"):
        conductor.emission(nightly, [None], None)
    with pytest.raises(OptionInvalid, match=r"^via='wall'$") as refused:
        conductor.wal_emission(greeted, [], None, "wall")
    assert refused.value.hint == "One of queue, wal, auto."


def test_refetch_is_about_new_rows_of_jobs() -> None:
    for wanted in ("delete", "truncate"):
        untyped: Any = OnChange
        with pytest.raises(DefinitionInvalid, match="refetch= is about new rows"):
            untyped(Users, wanted, refetch=True)
    waits = [OnChange(Users, "insert", refetch=True)]
    with pytest.raises(DefinitionInvalid, match="cannot wait for a change with refetch=True"):
        client().task(nightly, waits=waits)(handler)


def test_a_handler_can_be_found() -> None:
    class Callable:
        async def __call__(self, event: object, ctx: object) -> None: ...

    line = handler.__code__.co_firstlineno
    for bound in (handler, partial(handler)):
        assert client().task(greet)(bound).defined_at == f"{__file__}:{line}"
    assert client().task(greet)(Callable()).defined_at == greet.defined_at
    assert greet.defined_at.startswith(f"{__file__}:")


def test_definitions_may_be_a_module() -> None:
    schemas = ModuleType("schemas")
    schemas.greet, schemas.greeted, schemas.other = greet, greeted, 3  # type: ignore[attr-defined]  # a module is open
    conductor = Conductor(DSN, tasks=schemas, events=schemas)
    assert (conductor.definitions, conductor.events) == ({"greet": greet}, {"greeted": greeted})


def test_tables_are_checked_against_the_row_models() -> None:
    module = ModuleType("database_types")
    module.Users = Users  # type: ignore[attr-defined]  # a module is open
    conductor = client(database=Database.from_module(module))
    with pytest.raises(UnknownTable, match=r"did you mean 'public\.users'"):
        conductor.task("t", OnChange("public.user"))(handler)
    with pytest.raises(UnknownColumn, match=r"'idx' of public\.users"):
        conductor.task("t", OnChange("public.users", columns=("idx",)))(handler)
    conductor.task("t", OnChange(Users, "insert"))(handler)


def test_the_name_of_an_application_is_checked() -> None:
    with pytest.raises(DefinitionInvalid, match="name of an app"):
        Conductor(DSN, app="no spaces")


def test_an_invocation_is_checked_before_it_is_sent() -> None:
    conductor = client()
    batch = conductor.invocation(greet, [Greeting(name="Ada")], {"delay": 5, "key": "k"})
    assert batch == JobBatch(
        queue="mail",
        task="greet",
        payloads=[b'{"name":"Ada"}'],
        delay=timedelta(seconds=5),
        keys=["k"],
    )
    with pytest.raises(PayloadInvalid):
        conductor.invocation(greet, [{"name": 1}], {})
    with pytest.raises(OptionInvalid, match="not both"):
        conductor.invocation(greet, [Greeting(name="A")], {"dedupe_key": "a"}, None, ["b"])


def test_the_priority_of_a_task_is_that_of_its_jobs_unless_given() -> None:
    conductor = client()
    conductor.task(nightly, priority=5)(handler)
    assert conductor.invocation(nightly, [None], {}).priority == 5
    assert conductor.invocation(nightly, [None], {"priority": 0}).priority == 0
    assert conductor.invocation(greet, [Greeting(name="A")], {}).priority == 0


def test_unknown_tasks_and_events_name_the_nearest() -> None:
    conductor = client()
    for unknown in ("gret", define_task("gret")):
        with pytest.raises(UnknownTask, match="did you mean 'greet'"):
            conductor.invocation(unknown, [None], {})
    for event in ("greted", define_event("greted")):
        with pytest.raises(UnknownEvent, match="did you mean 'greeted'"):
            conductor.emission(event, [None], None)


def test_an_emission_is_a_dispatch_job() -> None:
    batch = client().emission("greeted", [Greeting(name="Ada")], {"trace": "x"})
    assert (batch.queue, batch.task, batch.trigger) == (
        "conductor.internal", "conductor.dispatch", "event",
    )  # fmt: skip
    assert batch.payloads == [b'{"event":"greeted","payload":{"name":"Ada"}}']
    assert batch.metadata == {"trace": "x"}


ordered = define_task("ordered", payload=Greeting, ordered=True)


@pytest.mark.parametrize(
    "target, triggers, options, match",
    [
        ("t", (OnChange(Users, key="id"),), {}, "is not ordered"),
        (greet, (), {"on_failure": "halt"}, "is not ordered"),
        (ordered, (), {"on_failure": "stop"}, "neither 'continue' nor 'halt'"),
        (ordered, (), {"priority": 3}, "no priority"),
        (ordered, (), {"ordered": True}, "is its definition's"),
        ("t", (Cron("* * * * *"),), {"ordered": True}, "has none"),
        ("t", (OnEvent(greeted),), {"ordered": True}, "has none"),
        ("t", (OnChange(Users, "truncate"),), {"ordered": True}, "a truncate has none"),
        ("t", (OnEvent(greeted),), {"waits": [OnChange(Users, coalesce_s=1)]}, "has no key"),
        (greet, (), {"batch": 5}, "is not a Batch"),
        ("t", (OnEvent(greeted),), {"batch": BATCH, "waits": [OnChange(Users)]}, "cannot wait"),
        (define_task("r", returns=int), (), {"batch": BATCH}, "returns something"),
    ],
)
def test_what_cannot_be_meant_of_keys_and_batches_is_refused(
    target: Any, triggers: Any, options: Any, match: str
) -> None:
    with pytest.raises(DefinitionInvalid, match=match):
        client().task(target, *triggers, **options)(handler)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 10_001}, {"wait_s": -1}])
def test_batches_have_limits(options: Any) -> None:
    with pytest.raises(DefinitionInvalid):
        Batch(**options)


@pytest.mark.parametrize("coalesce_s", [0, -1, 100_000])
def test_coalescing_has_limits(coalesce_s: float) -> None:
    with pytest.raises(DefinitionInvalid):
        OnChange(Users, coalesce_s=coalesce_s)


def test_a_truncate_does_not_coalesce() -> None:
    untyped: Any = OnChange
    with pytest.raises(DefinitionInvalid, match="a truncate has none"):
        untyped(Users, "truncate", coalesce_s=1)


def test_what_is_stored_of_a_key_is_read_back() -> None:
    change = OnChange(Users, key=lambda user: user.id, coalesce_s=2.5)
    stored = change.filter_of(ordered).to_json()
    assert (stored["key"], stored["ordered"], stored["coalesce_s"]) == (["id"], True, 2.5)
    assert ChangeFilter.from_json(stored) == change.filter_of(ordered)
    plain = OnChange(Users).filter_of(greet).to_json()
    assert not {"key", "ordered", "coalesce_s"} & plain.keys()


WRONG_ARGUMENTS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (OnChange, (), {}, "OnChange at .*: missing a required argument: 'row'"),
    (define_task, ("t", int, int, "q"), {}, "define_task at .*: too many positional arguments"),
    (define_task, ("t",), {"payload": "no form"}, "payload of task 't': pydantic cannot take"),
    (OnChange, (Users, "insert"), {"coalesce_s": "5"}, "coalesce_s is not int or float, but '5'"),
    (OnChange, (Users, "insert"), {"group": ["transaction"]}, "group="),
    (OnChange, (Users, "insert"), {"source": 3}, "source is not str or None, but 3"),
    (Cron, (5,), {}, "cron expression is not str, but 5"),
    (Cron, ("0 9 * * *",), {"tz": None}, "time zone is not str, but None"),
    (Conductor, (DSN,), {"task": [greet]}, "no option 'task'; did you mean 'tasks'"),
    (Conductor, (DSN,), {"tasks": greet}, "tasks is not Iterable"),
    (Conductor, (DSN,), {"database": Users}, "database is not Database"),
    (Conductor, (DSN,), {"version": 2}, "version is not str or None, but 2"),
    (Conductor, (DSN,), {"pool_size": "4"}, "pool_size is not int, but '4'"),
    (Conductor, (None,), {}, "^dsn is not str, but NoneType$"),
    (Conductor, (DSN.encode(),), {}, "^dsn is not str, but bytes$"),
    (Conductor, (DSN,), {"source_dsn": 5}, "^source_dsn is not str, but int$"),
    (Conductor, (DSN,), {"sources": [DSN]}, "^sources is not Mapping, but list$"),
    (Conductor, (DSN,), {"sources": {"b": b""}}, "^the DSN of source 'b' is not str, but bytes$"),
    (Orchestrator, (Conductor(DSN),), {"slots": "5"}, "slots is not int or Mapping, but '5'"),
    (Orchestrator, (Conductor(DSN), 3), {}, "tasks is not Iterable, but 3"),
    (Orchestrator, (handler,), {}, "the conductor is not Conductor"),
    (Orchestrator, (Conductor(DSN), [handler]), {}, "a task of the orchestrator is not Task"),
    (Database.from_module, ("database_types",), {}, "module is not module, but 'database_types'"),
    (Batch, (), {"sice": 3}, "Batch at .* has no option 'sice'; did you mean 'size'"),
    (RetryPolicy, (), {"inital_s": 3}, "RetryPolicy at .*; did you mean 'initial_s'"),
    (RetryPolicy, (), {"max_s": "1h"}, "max_s is not int or float, but '1h'"),
    (Batch, (), {"size": "3"}, "the size of a batch is not int, but '3'"),
    (client().task, (handler,), {}, "what @conductor.task is given is not TaskDefinition or str"),
    (client().task, (), {}, "missing a required argument: 'target'"),
    (TableRow.__init_subclass__, (), {"tabel": "public.t"}, "'tabel'; did you mean 'table'"),
    (TableRow.__init_subclass__, (), {"table": 3}, "table of row model TableRow is not str"),
]


@pytest.mark.parametrize(("declare", "positional", "named", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_errors_of_the_declaration(
    declare: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConductorError, match=message):
        declare(*positional, **named)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_attempts": "3"}, "max_attempts of task 'greet' is not int, but '3'"),
        ({"max_attempts": True}, "max_attempts of task 'greet' is not int, but True"),
        ({"timeout_s": "3"}, "timeout_s of task 'greet' is not int or float or None"),
        ({"retention": 5}, "retention of task 'greet' is not timedelta"),
        ({"retry": 5}, "retry of task 'greet' is not RetryPolicy"),
        ({"waits": OnChange(Users)}, "waits of task 'greet' is not Sequence"),
        ({"version": 5}, "version of task 'greet' is not str or None"),
    ],
)
def test_options_of_another_type_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionInvalid, match=message) as caught:
        client().task(greet, **option)(handler)
    assert caught.value.hint.startswith(f"Such as {next(iter(option))}=")
