"""Binding a definition to its triggers and handler: what `@conductor.task` does.

Everything that can be checked without a database is checked here, when the module of the handlers
is imported. This module must not do I/O.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Generic, TypedDict, get_args, overload

from typing_extensions import TypeVar

from conductor.arguments import caller, check_type
from conductor.definitions import (
    Batch,
    OnFailure,
    Task,
    TaskDefinition,
    Trigger,
    check_option_text,
)
from conductor.errors import DefinitionInvalid, did_you_mean
from conductor.handlers import check_events, check_result, is_async, read_handler
from conductor.retry import RetryPolicy
from conductor.rows import Database
from conductor.triggers import Invocable, OnChange

if TYPE_CHECKING:
    from conductor.batch_context import BatchContext
    from conductor.context import Context
    from conductor.sync_context import SyncContext

P = TypeVar("P")
R = TypeVar("R")
D = TypeVar("D")
E = TypeVar("E")


_OPTION_TYPES: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "max_attempts": ((int,), "3"),
    "priority": ((int,), "5"),
    "retention": ((timedelta,), "timedelta(days=7)"),
    "retry": ((RetryPolicy,), "RetryPolicy(initial_s=5)"),
    "timeout_s": ((int, float, type(None)), "30"),
    "version": ((str, type(None)), '"2"'),
    "waits": ((Sequence,), '[OnChange(Payments, "insert")]'),
}


class TaskOptions(TypedDict, total=False):
    """Options of `@conductor.task`; see `conductor.definitions.Task`."""

    max_attempts: int
    retry: RetryPolicy
    retention: timedelta
    timeout_s: float | None
    priority: int
    waits: Sequence[OnChange[Any]]
    version: str
    on_failure: OnFailure


class Binder(Generic[E, P, R, D]):
    """Takes the handler: an ``async def`` with a Context, or a ``def`` with a SyncContext."""

    def __init__(self, bind: Callable[[Callable[..., Any]], Task[P, R]]) -> None:
        self._bind = bind

    @overload
    def __call__(self, handler: Callable[[E, Context[D]], Awaitable[R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, handler: Callable[[E, SyncContext[D]], R], /) -> Task[P, R]: ...
    def __call__(self, handler: Callable[..., Any], /) -> Task[P, R]:
        """Bind the handler. Raises DefinitionInvalid for one that cannot be called as one."""
        return self._bind(handler)


class BatchBinder(Generic[E, D]):
    """Takes the handler of a batch: of a sequence of events and a BatchContext."""

    def __init__(self, bind: Callable[[Callable[..., Any]], Task[Any, None]]) -> None:
        self._bind = bind

    @overload
    def __call__(
        self, handler: Callable[[Sequence[E], BatchContext[D]], Awaitable[None]], /
    ) -> Task[Any, None]: ...
    @overload
    def __call__(
        self, handler: Callable[[Sequence[E], BatchContext[D]], None], /
    ) -> Task[Any, None]: ...
    def __call__(self, handler: Callable[..., Any], /) -> Task[Any, None]:
        """Bind the handler. Raises DefinitionInvalid for one that cannot be called as one."""
        return self._bind(handler)


def bind(
    handler: Callable[..., Any],
    *,
    definition: TaskDefinition[P, R],
    triggers: tuple[Trigger[Any], ...],
    version: str | None,
    options: TaskOptions,
    batch: Batch | None = None,
) -> Task[P, R]:
    """Return the task. Raises DefinitionInvalid."""
    _check_options(definition.name, options)
    _check_triggers(definition.name, triggers)
    _check_order(definition, triggers, options)
    written = read_handler(definition.name, handler)
    if batch is not None:
        _check_batch(definition, batch, options)
    runs_async = is_async(written, batch)
    check_events(written, definition, triggers, batch)
    check_result(written, definition)
    rest: Any = {name: value for name, value in options.items() if name != "version"}
    return Task(
        definition=definition,
        triggers=triggers,
        handler=handler,
        is_sync=not runs_async,
        version=version,
        code=options.get("version"),
        batch=batch,
        **rest,
    )


def _check_options(task: str, options: TaskOptions) -> None:
    unknown = options.keys() - TaskOptions.__annotations__.keys()
    if unknown:
        name = min(unknown)
        meant = did_you_mean(name, TaskOptions.__annotations__)
        raise DefinitionInvalid(
            f"task {task!r} at {caller()} has no option {name!r}{meant}",
            hint=f"Options: {', '.join(TaskOptions.__annotations__)}.",
        )
    for name, (types, example) in _OPTION_TYPES.items():
        if name in options:
            check_type(f"{name} of task {task!r}", options.get(name), types, f"{name}={example}")
    check_option_text(f"version of task {task!r}", options.get("version"))
    if not 1 <= options.get("max_attempts", 1) <= 32767:
        raise DefinitionInvalid(f"max_attempts of task {task!r} is not between 1 and 32767")
    if options.get("retention", timedelta()) < timedelta():
        raise DefinitionInvalid(f"retention of task {task!r} is negative")
    timeout_s = options.get("timeout_s")
    if timeout_s is not None and timeout_s <= 0:
        raise DefinitionInvalid(f"timeout_s of task {task!r} is not positive")
    for wait in options.get("waits", ()):
        _check_wait(task, wait)
    if not -32767 <= options.get("priority", 0) <= 32767:
        raise DefinitionInvalid(f"priority of task {task!r} is not between -32767 and 32767")


def _check_wait(task: str, wait: Any) -> None:
    if not isinstance(wait, OnChange):
        raise DefinitionInvalid(
            f"{wait!r} is not a change that task {task!r} can wait for",
            hint='Such as waits=[OnChange(Payments, "insert")].',
        )
    if wait.refetch:
        raise DefinitionInvalid(
            f"task {task!r} cannot wait for a change with refetch=True",
            hint="Read the row in a step, once the change has come.",
        )
    if wait.group is not None:
        raise DefinitionInvalid(
            f"task {task!r} can wait for a change, not for the group of a transaction"
        )
    if wait.key or wait.coalesce_s is not None:
        raise DefinitionInvalid(
            f"a change that task {task!r} waits for makes no job: it has no key, and coalesces"
            " with nothing"
        )


def _check_triggers(task: str, triggers: tuple[Any, ...]) -> None:
    claimed: set[str] = set()
    for trigger in triggers:
        if not isinstance(trigger, Trigger):
            raise DefinitionInvalid(
                f"{trigger!r} is not a trigger of task {task!r}",
                hint="Triggers: Invocable(), Cron(…), OnEvent(…), OnChange(…).",
            )
        twice = claimed & trigger.claims
        if twice:
            raise DefinitionInvalid(
                f"two triggers of task {task!r} fire on {', '.join(sorted(twice))}",
                hint="Make them one trigger, or two tasks.",
            )
        claimed |= trigger.claims


def _check_order(
    definition: TaskDefinition[Any, Any], triggers: tuple[Trigger[Any], ...], options: TaskOptions
) -> None:
    task = definition.name
    changes = [trigger for trigger in triggers if isinstance(trigger, OnChange)]
    if not definition.ordered:
        keyed = any(change.key and change.coalesce_s is None for change in changes)
        if keyed or "on_failure" in options:
            raise DefinitionInvalid(
                f"task {task!r} is not ordered, so key and on_failure mean nothing",
                hint="Say ordered=True, in define_task or beside the name.",
            )
        return
    if options.get("on_failure", "continue") not in get_args(OnFailure):
        raise DefinitionInvalid(
            f"on_failure of task {task!r} is neither 'continue' nor 'halt'",
        )
    if options.get("priority"):
        raise DefinitionInvalid(f"task {task!r} is ordered: its jobs have no priority")
    for change in changes:
        if change.group is not None:
            raise DefinitionInvalid(
                f"task {task!r} is ordered by key, and the group of a transaction has none"
            )
        if "truncate" in change.operations:
            raise DefinitionInvalid(f"task {task!r} is ordered by key, and a truncate has none")
    for trigger in triggers:
        if not isinstance(trigger, (Invocable, OnChange)):
            raise DefinitionInvalid(
                f"task {task!r} is ordered by key, and what triggers {trigger.name!r} has none",
                hint="Let another task do it, which invokes this one with a key.",
            )


def _check_batch(definition: TaskDefinition[Any, Any], batch: Batch, options: TaskOptions) -> None:
    task = definition.name
    if not isinstance(batch, Batch):
        raise DefinitionInvalid(
            f"batch of task {task!r} is not a Batch", hint="Such as batch=Batch(size=100)."
        )
    if not definition.returns.is_none:
        raise DefinitionInvalid(f"task {task!r} returns something, which a batch cannot")
    if options.get("waits"):
        raise DefinitionInvalid(f"task {task!r} is run in batches, which cannot wait for changes")


def check_tables(triggers: Iterable[Trigger[Any]], databases: Iterable[Database]) -> None:
    """Raise UnknownTable or UnknownColumn for what the application's row models do not have."""
    by_source = {database.source: database for database in databases}
    for trigger in triggers:
        if isinstance(trigger, OnChange) and trigger.model_to_resolve is None:
            wanted, database = trigger.filter, by_source.get(trigger.source)
            if database is not None:
                named = (wanted.columns, wanted.changed, wanted.key)
                database.check(trigger.table, tuple(chain.from_iterable(filter(None, named))))


def databases_of(given: Database | Sequence[Database] | None) -> tuple[Database, ...]:
    """Return the databases that an application was given. Raises DefinitionInvalid for no such."""
    if given is None:
        return ()
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for database in found:
        check_type("database", database, (Database,), "database=Database.from_module(module)")
    return found


def collect(kind: type[Any], source: Any, noun: str) -> dict[str, Any]:
    """Return definitions of one kind by name, from a list of them or a module that holds them."""
    if inspect.ismodule(source):
        found = [member for _, member in inspect.getmembers(source) if isinstance(member, kind)]
    else:
        check_type(f"{noun}s", source, (Iterable,), f"{noun}s=[…], or a module")
        found = list(source)
    named: dict[str, Any] = {}
    for definition in found:
        if not isinstance(definition, kind):
            raise DefinitionInvalid(
                f"{definition!r} does not define {noun}", hint=f"Use define_{noun}(…)."
            )
        add(named, definition, noun)
    return named


def add(known: dict[str, Any], definition: Any, noun: str) -> None:
    """Add a definition to those known by name. Raises DefinitionInvalid for a second of a name."""
    refuse_second(known.setdefault(definition.name, definition), definition, noun)


def refuse_second(first: Any, second: Any, noun: str) -> None:
    """Raise DefinitionInvalid, which says where both are, unless they are the same object."""
    if first is second:
        return
    places = [place for place in (first.defined_at, second.defined_at) if place]
    if len(places) == 2 and places[0] == places[1]:
        where = f": the line {places[0]} ran twice"
        hint = "Is the module imported under two names, or run as a script and imported as well?"
    else:
        where = f", at {' and '.join(places)}" if places else ""
        hint = "Define it once, in a module that both places import."
    raise DefinitionInvalid(f"{noun} {second.name!r} is defined twice{where}", hint=hint)
