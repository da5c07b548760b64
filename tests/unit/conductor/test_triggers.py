from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel

from conductor import (
    Change,
    Conductor,
    Cron,
    Delete,
    Emitted,
    Insert,
    Invocable,
    Invocation,
    OnChange,
    OnEvent,
    TableRow,
    Task,
    Tick,
    Truncate,
    Update,
    define_event,
    define_task,
    is_event,
)
from conductor.definitions import Trigger
from conductor.errors import (
    ColumnNotCaptured,
    CronInvalid,
    DefinitionInvalid,
    FilterInvalid,
    PayloadInvalid,
    ResultInvalid,
    RowAbsent,
    UnknownColumn,
    UnknownField,
)
from conductor.job import JobInfo
from conductor.matching import ChangeFilter, EventFilter

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Greeting(BaseModel):
    name: str
    is_loud: bool = False


class Users(TableRow, table="public.users"):
    id: int
    email: str


greet = define_task("greet", payload=Greeting, returns=int)
greeted = define_event("greeted", payload=Greeting)
left = define_event("left", payload=Greeting)

JOB = JobInfo(
    id=1, task="greet", queue="default", trigger="invoke", attempt=0, crashes=0, fence=1,
    priority=0, key=None, run_at=NOW, created_at=NOW, metadata=None, app=None, version=None,
    idempotency_key="job:1",
)  # fmt: skip


async def handler(event: object, ctx: object) -> int:
    return 1


def task(*triggers: Trigger[Any]) -> Task[Greeting, int]:
    return Task(definition=greet, triggers=triggers, handler=handler, is_sync=False)


def decode(bound: Task[Any, Any], trigger: str, payload: object) -> Any:
    return bound.decode(trigger, json.dumps(payload).encode(), JOB)


def change(op: str, **parts: object) -> dict[str, object]:
    position = {"commit_time": "2026-01-01T00:00:00.000000+00:00", "commit_lsn": "0/16B3748"}
    return {"op": op, "schema": "public", "table": "users", **position, **parts}


def test_what_is_stored_of_a_trigger() -> None:
    on_change = OnChange(Users, "update", "insert", changed=lambda u: u.email)
    assert on_change.filter == ChangeFilter(
        schema="public",
        table="users",
        operations=frozenset({"insert", "update"}),
        columns=("id", "email"),
        changed=("email",),
    )
    assert OnEvent(greeted).filter == EventFilter("greeted")
    assert OnChange("app.things").filter.columns is None
    assert OnChange(Users).filter.operations == {"insert", "update", "delete"}
    assert OnChange(Users, columns=("email",)).filter.columns == ("email",)


def test_names_are_stable() -> None:
    triggers: list[Trigger[Any]] = [
        Invocable(), Cron("0 9 * * *", tz="Europe/Berlin"), Cron("0 9 * * *", name="morning"),
        OnEvent(greeted), OnChange(Users, "delete", "insert"), OnChange(Users),
    ]  # fmt: skip
    assert [trigger.name for trigger in triggers] == [
        "invoke", "0 9 * * * Europe/Berlin", "morning", "event:greeted",
        "change:public.users:insert,delete", "change:public.users:insert,update,delete",
    ]  # fmt: skip


def test_wrong_triggers_are_refused_when_they_are_made() -> None:
    wrong: Any = "upsert"
    with pytest.raises(DefinitionInvalid, match="'upsert' is not an operation"):
        OnChange(Users, wrong)
    with pytest.raises(UnknownColumn, match="did you mean 'email'"):
        OnChange(Users, "insert", columns=("emial",))
    no_model: Any = Greeting
    with pytest.raises(DefinitionInvalid, match="row model"):
        OnChange(no_model)
    not_an_event: Any = greet
    with pytest.raises(DefinitionInvalid, match="event definition"):
        OnEvent(not_an_event)
    with pytest.raises(CronInvalid):
        Cron("every day")
    inserts: Any = OnChange
    with pytest.raises(DefinitionInvalid, match="about updates"):
        inserts(Users, "insert", changed=lambda u: u.email)


@pytest.mark.parametrize(
    ("declare", "options", "message"),
    [
        (OnChange, {"colums": ("id",)}, "OnChange at {here} has no option 'colums'; .*'columns'"),
        (OnEvent, {"whn": "true"}, "OnEvent at {here} has no option 'whn'; did you mean 'when'"),
        (Cron, {"timezone": "UTC"}, "Cron at {here} has no option 'timezone'"),
        (define_task, {"paylod": int}, "define_task at {here} has no option 'paylod'; .*'payload'"),
        (define_event, {"payloads": int}, "define_event at {here} .*; did you mean 'payload'"),
    ],
)
def test_a_misspelt_option_names_the_nearest_and_the_place(
    declare: Any, options: dict[str, Any], message: str
) -> None:
    here = __file__.replace(".", r"\.") + r":\d+"
    with pytest.raises(DefinitionInvalid, match=message.format(here=here)):
        declare(Users, **options)


@pytest.mark.parametrize(
    ("operation", "meant"), [("inserted", "insert"), ("updates", "update"), ("UPDATE", "update")]
)
def test_a_misspelt_operation_names_the_nearest(operation: Any, meant: str) -> None:
    with pytest.raises(DefinitionInvalid, match=f"is not an operation; did you mean '{meant}'"):
        OnChange(Users, operation)


def test_a_filter_is_stored_with_its_trigger() -> None:
    when = 'new.email.endsWith("@example.com")'
    assert OnChange(Users, "insert", when=when).filter.when == when
    assert OnEvent(greeted, when='event.name == "Ada"').filter.when == 'event.name == "Ada"'
    guarded = 'op == "delete" || new.id > 1'
    assert OnChange(Users, when=guarded).filter.when == guarded
    assert OnChange(Users, when="new != null && new.id > 1").filter.operations


@pytest.mark.parametrize(
    ("operations", "when", "error", "message"),
    [
        (("insert",), "new.email ==", FilterInvalid, "is not CEL"),
        (("insert",), "", FilterInvalid, "text of a CEL expression"),
        (("insert",), 'new.emial == ""', UnknownColumn, "'emial' of public.users .* 'email'"),
        (("insert",), 'new["emial"] == ""', UnknownColumn, "did you mean 'email'"),
        (("update",), 'old.emial == ""', UnknownColumn, "did you mean 'email'"),
        (("update",), '"emial" in changed', UnknownColumn, "did you mean 'email'"),
        (("insert",), "news.id > 1", FilterInvalid, "unknown variable 'news'; did you mean 'new'"),
        (("insert",), "new.email.endswith('x')", FilterInvalid, "did you mean 'endsWith'"),
        (("insert",), "new.email.matches('[')", FilterInvalid, "not a valid regex"),
        (("insert",), "event.id > 1", FilterInvalid, "unknown variable 'event'"),
        (("insert",), '"email" in changed', FilterInvalid, "`changed` is about updates"),
        ((), "new.id > 1", FilterInvalid, "new is null for delete"),
        (("insert", "update"), "old.id > 1", FilterInvalid, "old is null for insert"),
    ],
)
def test_a_wrong_filter_is_refused_when_it_is_made(
    operations: tuple[Any, ...], when: str, error: type[Exception], message: str
) -> None:
    on_change: Any = OnChange
    with pytest.raises(error, match=message):
        on_change(Users, *operations, when=when)


@pytest.mark.parametrize(
    ("when", "error", "message"),
    [
        ("event.nmae == ''", UnknownField, "'nmae' of event 'greeted' .* did you mean 'name'"),
        ("new.name == ''", FilterInvalid, "unknown variable 'new'"),
        ("event.is_loud", None, ""),
        ("event.name", FilterInvalid, "event.name is text, not a condition"),
        ("event.name > 5", FilterInvalid, "event.name is text, and > compares it with 5"),
    ],
)
def test_a_filter_of_an_event_is_checked_against_its_payload(
    when: str, error: type[Exception] | None, message: str
) -> None:
    if error is None:
        assert OnEvent(greeted, when=when).filter.when == when
        return
    with pytest.raises(error, match=message):
        OnEvent(greeted, when=when)


def test_an_invocation_carries_the_payload() -> None:
    event = decode(task(Invocable()), "invoke", {"name": "Ada"})
    assert event == Invocation(Greeting(name="Ada"))
    with pytest.raises(PayloadInvalid, match="name"):
        decode(task(Invocable()), "invoke", {"name": 1})


def test_emitted_events_are_told_apart() -> None:
    bound = task(OnEvent(greeted), OnEvent(left))
    event = decode(bound, "event", {"event": "left", "payload": {"name": "Ada"}})
    assert event == Emitted("left", Greeting(name="Ada"))
    assert [is_event(event, definition) for definition in (greeted, left)] == [False, True]
    invocation: Any = Invocation(1)
    assert not is_event(invocation, greeted)


def test_a_tick_says_which_schedule_and_when() -> None:
    bound = task(Cron("0 9 * * *", name="morning"), Cron("0 18 * * *", name="evening"))
    payload = {"schedule": "evening", "scheduled_at": "2026-01-01T00:00:00+00:00"}
    assert decode(bound, "cron", payload) == Tick("evening", NOW)
    with pytest.raises(PayloadInvalid):
        decode(bound, "cron", {"schedule": "evening"})


def test_changes_are_decoded_by_operation() -> None:
    bound = task(OnChange(Users, "insert", "update", "delete", "truncate"))
    row, key = {"id": 1, "email": "a"}, {"id": 1}
    inserted = decode(bound, "change", change("insert", new=row))
    updated = decode(bound, "change", change("update", new=row, old=row, changed=["email"]))
    deleted = decode(bound, "change", change("delete", old=key))
    emptied = decode(bound, "change", change("truncate", cascade=True, restart_identity=False))
    events = [inserted, updated, deleted, emptied]
    assert [type(event) for event in events] == [Insert, Update, Delete, Truncate]
    assert [event.op for event in events] == ["insert", "update", "delete", "truncate"]
    assert all(isinstance(event, Change) for event in events)
    assert inserted.new == updated.new == updated.old == Users(id=1, email="a")
    assert updated.changed == {"email"}
    assert deleted.old.id == 1
    assert (emptied.cascade, emptied.restart_identity) == (True, False)
    assert (inserted.commit_time, inserted.commit_lsn) == (NOW, "0/16B3748")
    assert "0/16B3748" in repr(inserted)


def test_a_transaction_is_the_sequence_of_its_changes() -> None:
    trigger = OnChange(Users, "insert", "delete", group="transaction")
    stamp = {"commit_time": "2026-01-01T00:00:00+00:00", "commit_lsn": "0/1"}
    table = {"schema": "public", "table": "users"}
    changes = [
        {"op": "insert", **table, "new": {"id": 1, "email": "a"}, **stamp},
        {"op": "delete", **table, "old": {"id": 2}, **stamp},
    ]
    envelope = {"op": "transaction", "part": 3, "last": False, "changes": changes}
    assert trigger.accepts(envelope)
    assert not trigger.accepts(changes[0])
    assert not OnChange(Users, "insert", "delete").accepts(envelope)
    assert not OnChange("public.other", "insert", group="transaction").accepts(envelope)
    event = trigger.decode(greet, envelope)
    assert [change.op for change in event] == ["insert", "delete"]
    assert event.changes[0].new == Users(id=1, email="a")
    assert (len(event), event.part, event.is_last) == (2, 3, False)
    assert (event.commit_lsn, event.commit_time) == ("0/1", NOW)
    assert trigger.filter.to_json()["group"] == "transaction"
    assert "group" not in OnChange(Users).filter.to_json()
    assert ChangeFilter.from_json(trigger.filter.to_json()) == trigger.filter


def test_a_group_cannot_be_waited_for() -> None:
    conductor = Conductor("")
    with pytest.raises(DefinitionInvalid, match="group"):
        conductor.task(greet, waits=[OnChange(Users, group="transaction")])(lambda _e, _c: 1)


def test_triggers_of_one_table_are_told_apart_by_operation() -> None:
    class Keys(TableRow, table="public.users"):
        id: int

    bound = task(OnChange(Users, "insert"), OnChange(Keys, "delete"))
    row = {"id": 1, "email": "a"}
    assert type(decode(bound, "change", change("insert", new=row)).new) is Users
    assert type(decode(bound, "change", change("delete", old=row)).old) is Keys
    with pytest.raises(PayloadInvalid, match="no change trigger"):
        decode(bound, "change", change("update", new=row))
    with pytest.raises(PayloadInvalid, match="no change trigger"):
        decode(bound, "change", change("insert", new=row) | {"table": "orders"})


def test_what_a_change_does_not_have_says_so() -> None:
    bound = task(OnChange(Users, "insert", "update", "delete", "truncate"))
    inserted = decode(bound, "change", change("insert", new={"id": 1, "email": "a"}))
    updated = decode(bound, "change", change("update", new={"id": 1}, unchanged=["email"]))
    deleted = decode(bound, "change", change("delete", old={"id": 1}))
    emptied = decode(bound, "change", change("truncate", cascade=False, restart_identity=False))
    for event, attribute in [
        (inserted, "old"), (deleted, "new"), (emptied, "new"), (emptied, "old"),
    ]:  # fmt: skip
        with pytest.raises(RowAbsent, match=rf"{event.op} of public.users has no {attribute} row"):
            getattr(event, attribute)
    with pytest.raises(ColumnNotCaptured, match="not touched"):
        _ = updated.new.email
    for row in (updated.old, deleted.old):
        with pytest.raises(ColumnNotCaptured):
            _ = row.email
    with pytest.raises(ColumnNotCaptured):
        _ = updated.changed
    assert inserted.changed == frozenset()


def test_tables_of_one_name_are_told_apart_by_schema() -> None:
    bound = task(OnChange(Users, "insert"), OnChange("archive.users", "insert"))
    row = {"id": 1, "email": "a@example.com"}
    public = decode(bound, "change", change("insert", new=row))
    archive = decode(bound, "change", {**change("insert", new=row), "schema": "archive"})
    assert (type(public.new), archive.new) == (Users, row)
    assert archive.schema == "archive"


def test_a_table_without_a_model_gives_dictionaries() -> None:
    bound = task(OnChange("public.users", "update"))
    event = decode(bound, "change", change("update", new={"id": 1}, unchanged=["bio"]))
    assert event.new == {"id": 1}
    with pytest.raises(ColumnNotCaptured):
        event.old["email"]


def test_a_row_that_is_not_the_models_is_refused() -> None:
    bound = task(OnChange(Users))
    why = r"insert on public.users for task 'greet': id"
    with pytest.raises(PayloadInvalid, match=why) as refused:
        decode(bound, "change", change("insert", new={"id": "x", "email": "a"}))
    assert "conductor check" in refused.value.hint
    with pytest.raises(PayloadInvalid):
        decode(bound, "change", {"op": "insert", "schema": "public", "table": "users"})


@pytest.mark.parametrize(
    ("trigger", "payload"),
    [
        ("invoke", {"name": "Ada"}),
        ("event", {"event": "left", "payload": {"name": "Ada"}}),
        ("cron", {"schedule": "gone", "scheduled_at": "2026-01-01T00:00:00Z"}),
        ("change", change("insert", new={})),
        ("change", []),
    ],
)
def test_a_job_of_a_trigger_that_is_gone_is_refused(trigger: str, payload: object) -> None:
    with pytest.raises(PayloadInvalid):
        decode(task(OnEvent(greeted)), trigger, payload)


def test_results_are_encoded_or_refused() -> None:
    assert task().encode_result(3) == b"3"
    with pytest.raises(ResultInvalid, match="result of task 'greet'"):
        task().encode_result("three")
    with pytest.raises(ResultInvalid):
        task().encode_result(None)
    silent = Task(definition=define_task("silent"), triggers=(), handler=handler, is_sync=False)
    assert silent.encode_result(None) is None
