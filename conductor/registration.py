"""What a process registers before it works: queues, tasks, events, schedules, subscriptions.

One transaction an application, safe to repeat and to race: processes of one application register
one after another, and who comes last decides about the tasks it has. A subscription is never
changed: an equal live one is kept, another definition becomes a new row and the old one is
retired, so that the router can stamp where one ends and the other begins. What waiting jobs are
woken by stays for as long as a version or a job may need it. Tables are checked against the catalog
first, when the changes come from the queue's own database. This module must not run anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import BaseModel

from conductor.arguments import check_type
from conductor.catalog import check_change, check_schema
from conductor.codec import Codec
from conductor.connections import Connections
from conductor.contract import INTERNAL_QUEUE
from conductor.cron import next_fire
from conductor.definitions import EventDefinition, Task
from conductor.errors import (
    CaptureTimeout,
    ConductorError,
    RegistrationRefused,
    UnknownTable,
    WaitUnavailable,
)
from conductor.matching import ChangeFilter, EventFilter
from conductor.rows import DEFAULT_SOURCE, TableName, adopt, source_of
from conductor.store.registration import (
    EventRow,
    RegistrationStore,
    ScheduleRow,
    SubscriptionRow,
    TaskRow,
    Uncaptured,
)
from conductor.store.sessions import brief_transaction
from conductor.supabase import class_name
from conductor.triggers import Cron, OnChange, OnEvent

_WAIT: Final = "wait:"  # begins the names of triggers that wake jobs

_LONGEST_RETENTION: Final = timedelta(days=100_000)  # kept for ever: an interval has an end
_POLL_INITIAL_S: Final = 0.05
_POLL_MAX_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Registration:
    """Everything one process registers. ``version`` says whose code its jobs are routed for."""

    app: str
    version: str | None
    tasks: tuple[Task[Any, Any], ...]
    events: tuple[EventDefinition[Any], ...] = ()
    read_sources: frozenset[str] = frozenset()  # those elsewhere that jobs can ask

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, sorted."""
        return sorted(task.name for task in self.tasks)

    @property
    def queues(self) -> set[str]:
        """The queues of the tasks, and the one that emitted events wait in."""
        return {task.queue for task in self.tasks} | {INTERNAL_QUEUE}

    @property
    def changes(self) -> list[tuple[str, OnChange[Any], ChangeFilter]]:
        """(task, trigger, what is stored of it) of the default source's change subscriptions."""
        return [
            (task.name, trigger, trigger.filter_of(task.definition))
            for task in self.tasks
            for trigger in task.triggers
            if isinstance(trigger, OnChange) and trigger.source == DEFAULT_SOURCE
        ] + [
            (task.name, trigger, trigger.filter)
            for task in self.tasks
            for trigger in task.all_waits
            if isinstance(trigger, OnChange) and trigger.source == DEFAULT_SOURCE
        ]

    def check_sources(self) -> None:
        """Raise RegistrationRefused for what jobs must ask another source for, and cannot."""
        for task in self.tasks:
            for trigger in (*task.triggers, *task.all_waits):
                if not isinstance(trigger, OnChange) or trigger.source == DEFAULT_SOURCE:
                    continue
                if trigger.source in self.read_sources:
                    continue
                if trigger in task.all_waits or trigger.refetch:
                    what = "waits for changes" if trigger in task.all_waits else "reads rows again"
                    raise RegistrationRefused(
                        f"task {task.name!r} {what} of source {trigger.source!r}",
                        hint=f"Give Conductor(…, sources={{{trigger.source!r}: dsn}}) or"
                        " CONDUCTOR_SOURCES, so that jobs can ask it.",
                    )

    def defined_at(self, task: str) -> str:
        """Return where the handler of a task is."""
        return next(found.defined_at for found in self.tasks if found.name == task)

    @property
    def models_to_resolve(self) -> dict[type[BaseModel], str]:
        """Models whose table is not known, each with the name of a task that wants it."""
        return {
            trigger.model_to_resolve: task.name
            for task in self.tasks
            for trigger in (*task.triggers, *task.all_waits)
            if isinstance(trigger, OnChange) and trigger.model_to_resolve is not None
        }

    def task_rows(self) -> list[TaskRow]:
        """Return the tasks as they are stored."""
        return [_task_row(task) for task in self.tasks]

    def event_rows(self) -> list[EventRow]:
        """Return the events as they are stored: those given and those of triggers."""
        found = {event.name: event for event in self.events}
        for task in self.tasks:
            for trigger in task.triggers:
                if isinstance(trigger, OnEvent):
                    found.setdefault(trigger.event.name, trigger.event)
        return [EventRow(name, _schema(event.payload)) for name, event in sorted(found.items())]

    def schedule_rows(self, now: datetime) -> list[ScheduleRow]:
        """Return the schedules as they are stored, each with its first instant after ``now``."""
        return [
            ScheduleRow(
                task=task.name,
                name=trigger.name,
                queue=task.queue,
                rank=-task.priority,
                expression=trigger.expression,
                timezone=trigger.timezone,
                next_at=next_fire(trigger.expression, trigger.timezone, now).isoformat(),
            )
            for task in self.tasks
            for trigger in task.triggers
            if isinstance(trigger, Cron)
        ]

    def subscription_rows(self) -> list[SubscriptionRow]:
        """Return the subscriptions as they are stored."""
        return [
            _subscription_row(
                task,
                trigger.name,
                trigger.filter
                if isinstance(trigger, OnEvent)
                else trigger.filter_of(task.definition),
                trigger.source if isinstance(trigger, OnChange) else DEFAULT_SOURCE,
            )
            for task in self.tasks
            for trigger in task.triggers
            if isinstance(trigger, (OnChange, OnEvent))
        ] + self._wait_rows()

    def _wait_rows(self) -> list[SubscriptionRow]:
        """Return what wakes waiting jobs, also those of earlier versions of a handler."""
        found = {
            (task.name, trigger.topic): _subscription_row(
                task, f"{_WAIT}{trigger.topic}", replace(trigger.filter, waits=True), trigger.source
            )
            for task in self.tasks
            for trigger in task.all_waits
            if isinstance(trigger, OnChange)
        }
        return list(found.values())


def _subscription_row(
    task: Task[Any, Any], trigger: str, wanted: ChangeFilter | EventFilter, source: str
) -> SubscriptionRow:
    return SubscriptionRow(
        task=task.name,
        trigger=trigger,
        kind="change" if isinstance(wanted, ChangeFilter) else "event",
        source=source,
        queue=task.queue,
        rank=-task.priority,
        definition=wanted.to_json(),
    )


def _task_row(task: Task[Any, Any]) -> TaskRow:
    return TaskRow(
        name=task.name,
        queue=task.queue,
        max_attempts=task.max_attempts,
        retention_s=min(task.retention, _LONGEST_RETENTION).total_seconds(),
        payload_schema=_schema(task.definition.payload),
        returns_schema=_schema(task.definition.returns),
        ordered=task.definition.ordered,
        on_failure=task.on_failure,
    )


def _schema(codec: Codec[Any]) -> dict[str, Any] | None:
    return None if codec.is_none else codec.json_schema()


async def register(connections: Connections, registration: Registration) -> list[int]:
    """Write a registration and return the ids of its subscriptions.

    Raises UnknownTable, UnknownColumn or RegistrationRefused before anything is written, and
    DatabaseUnavailable or MigrationMismatch.

    >>> ids = await register(connections, Registration("shop", "1", (send,)))
    ... # doctest: +SKIP
    """
    registration.check_sources()
    async with connections.lend() as connection, brief_transaction(connection):
        store = RegistrationStore(connection)
        await store.lock_app(registration.app)
        await _resolve_models(store, registration)
        await _check_tables(store, registration)
        await _write(store, registration)
        ids = await _subscribe(store, registration)
        await store.notify_subscriptions(registration.app)
    return ids


async def _resolve_models(store: RegistrationStore, registration: Registration) -> None:
    """Find the tables of models that another generator wrote and nothing names one for."""
    unresolved = registration.models_to_resolve
    if not unresolved:
        return
    elsewhere = [model for model in unresolved if source_of(model) != DEFAULT_SOURCE]
    if elsewhere or await store.source_is_elsewhere(DEFAULT_SOURCE):
        names = ", ".join(sorted(model.__name__ for model in elsewhere or unresolved))
        raise RegistrationRefused(
            f"the tables of models {names} are in another database than the queue",
            hint="Name them: Database.from_supabase(module, tables={…}).",
        )
    tables = [TableName(*key) for key in await store.table_keys()]
    for model, task in unresolved.items():
        adopt(model, find_table(model, task, tables))


def find_table(model: type[BaseModel], task: str | None, tables: Sequence[TableName]) -> TableName:
    """Return the table that the Supabase CLI would write this class for; ``task`` wants it.

    Raises UnknownTable when there is none, RegistrationRefused when there are several.
    """
    name = model.__name__
    by_class: dict[str, list[TableName]] = {}
    for table in tables:
        by_class.setdefault(class_name(table.schema, table.table), []).append(table)
    found = by_class.get(name, [])
    if not found:
        where = f"of model {name}" + (f" (task {task!r})" if task else "")
        raise UnknownTable(name, by_class, where=where, hint="Generate the models again.")
    if len(found) > 1:
        quoted = " or ".join(map(str, found))
        raise RegistrationRefused(
            f"{f'task {task!r}: ' if task else ''}model {name} may be {quoted}",
            hint=f'Database.from_supabase(module, tables={{"{name}": {str(found[0])!r}}})',
        )
    return found[0]


async def _check_tables(store: RegistrationStore, registration: Registration) -> None:
    changes = registration.changes
    for task, _, change in changes:
        check_schema(task, change)
    if not changes:
        return
    if await store.source_is_elsewhere(DEFAULT_SOURCE):
        if DEFAULT_SOURCE not in registration.read_sources:
            _check_source_is_read(registration)
            _refuse_waits(registration)
        return  # the sidecar checks them where they are
    wanted = {(trigger.table.schema, trigger.table.table) for _, trigger, _ in changes}
    facts = await store.describe_tables(sorted(wanted))
    known = await store.table_names() if wanted - facts.keys() else []
    for task, trigger, change in changes:
        table = facts.get((change.schema, change.table))
        try:
            if table is None:
                name = f"{change.schema}.{change.table}"
                raise UnknownTable(name, known, where=f"(task {task!r})")
            check_change(task, change, table, refetch=trigger.refetch)
        except ConductorError as error:
            error.hint = f"{error.hint} The handler is at {registration.defined_at(task)}."
            raise


def _check_source_is_read(registration: Registration) -> None:
    for task, trigger, _ in registration.changes:
        if trigger.refetch:
            raise RegistrationRefused(
                f"task {task!r}: {trigger.table} is in another database than the queue, and a job"
                " cannot read its row again (refetch)",
                hint="Give Conductor(…, source_dsn=…) or CONDUCTOR_SOURCE_DSN, or leave it out.",
            )


def _refuse_waits(registration: Registration) -> None:
    """Raise RegistrationRefused for a task that waits for changes of another database."""
    for task in registration.tasks:
        if any(isinstance(t, OnChange) and t.source == DEFAULT_SOURCE for t in task.all_waits):
            raise RegistrationRefused(
                f"task {task.name!r} waits for changes in another database than the queue's",
                hint=f"{WaitUnavailable.hint} The handler is at {task.defined_at}.",
            )


async def _write(store: RegistrationStore, registration: Registration) -> None:
    app, version = registration.app, registration.version
    schedules = registration.schedule_rows(await store.current_instant())
    await store.add_queues(registration.queues)
    rows = registration.task_rows()
    await store.put_tasks(app, version, rows)
    await store.open_lanes([row for row in rows if not row.ordered])
    await store.put_events(app, registration.event_rows())
    await store.drop_schedules(app, registration.task_names, schedules)
    await store.put_schedules(app, version, schedules)


async def _subscribe(store: RegistrationStore, registration: Registration) -> list[int]:
    """Keep, retire and add subscriptions; returns the ids of the live ones."""
    wanted = registration.subscription_rows()
    live = await store.live_subscriptions(registration.app, registration.task_names)
    waits = {row.trigger_of for row in wanted if row.trigger.startswith(_WAIT)}  # by their names
    kept = {
        row.trigger_of: number for number, row in live if row in wanted or row.trigger_of in waits
    }
    retired = [number for number, row in live if row.trigger_of not in kept]
    added = [row for row in wanted if row.trigger_of not in kept]
    await store.retire_subscriptions(retired, registration.version)
    await store.keep_subscriptions(sorted(kept.values()), registration.version)
    await store.add_subscriptions(registration.app, registration.version, added)
    now_live = await store.live_subscriptions(registration.app, registration.task_names)
    return [number for number, _ in now_live]


async def wait_captured(
    connections: Connections, registration: Registration, ids: Sequence[int], timeout_s: float
) -> None:
    """Wait until every slot of their source routes these subscriptions.

    Those of events are waited for where a sidecar at work routes what is emitted through the WAL.
    From then on every commit that matches becomes a job. Raises CaptureTimeout, which says what
    is missing.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = _POLL_INITIAL_S
    while ids:
        async with connections.lend() as connection:
            missing = await RegistrationStore(connection).uncaptured(ids)
        if not missing:
            return
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise _timed_out(registration.app, missing, timeout_s)
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 2, _POLL_MAX_S)


def _timed_out(app: str, missing: Sequence[Uncaptured], timeout_s: float) -> CaptureTimeout:
    names = sorted({f"{m.task} on {m.schema}.{m.table}" for m in missing})
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    where, hint = _why_not_captured(missing)
    return CaptureTimeout(
        f"not captured after {timeout_s:g} s (app {app!r}): {shown}; {where}", hint=hint
    )


def _why_not_captured(missing: Sequence[Uncaptured]) -> tuple[str, str]:
    """Say which slot does not route, and what to do about it."""
    orphaned = sorted({m.source for m in missing if m.slot is None})
    if orphaned:
        return (
            f"no sidecar has a slot for source {', '.join(orphaned)}",
            "Start `cdc run` on this queue database; `cdc check` says what hinders it.",
        )
    slots = ", ".join(sorted({str(m.slot) for m in missing}))
    where = f"slot {slots} does not route them yet"
    idle = {str(m.slot): m.seen_at for m in missing if not m.led}
    if idle:
        slot = min(idle)
        seen = ", ".join(
            f"{name} (last {at:%Y-%m-%d %H:%M:%S%z})" for name, at in idle.items() if at
        )
        hint = (
            f"Start `cdc run` with CDC_SLOT={slot}; if that slot is out of service (CDC_SLOT was"
            f" changed), end it: `cdc slot drop {slot}`."
        )
        return f"{where}, and nobody streams from {seen}", hint
    return where, (
        "See `cdc status` for that slot: is a leader running, is it catching up, may its role"
        " alter the publication, and is an old transaction still writing to the table?"
    )


def check_unique(tasks: Iterable[Task[Any, Any]]) -> tuple[Task[Any, Any], ...]:
    """Return the tasks; raises RegistrationRefused when two have one name, or there are none."""
    found: dict[str, Task[Any, Any]] = {}
    example = "Orchestrator(conductor, tasks=[send]), of handlers below @conductor.task(…)"
    check_type("tasks", tasks, (Iterable,), example)
    for task in tasks:
        check_type("a task of the orchestrator", task, (Task,), example)
        first = found.setdefault(task.name, task)
        if first is not task:
            raise RegistrationRefused(
                f"two tasks are named {task.name!r}, at {first.defined_at} and {task.defined_at}",
                hint="Give each task of a process a name of its own.",
            )
    if not found:
        raise RegistrationRefused(
            "there is no task to run", hint="Pass Orchestrator(conductor, tasks=[…])."
        )
    return tuple(found.values())
