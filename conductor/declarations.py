"""What an application declares: tasks with their handlers, events, the row models of its tables.

The half of `conductor.client.Conductor` that needs no database. Everything is checked when it is
declared, when the module of the handlers is imported. This module must not do I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Never, overload

from typing_extensions import TypeVar, Unpack

from conductor.arguments import caller, check_type, declares
from conductor.binding import (
    BatchBinder,
    Binder,
    TaskOptions,
    add,
    bind,
    check_tables,
)
from conductor.codec import Codec
from conductor.definitions import (
    DEFAULT_QUEUE,
    Batch,
    EventDefinition,
    Task,
    TaskDefinition,
    Trigger,
    check_name,
)
from conductor.errors import DefinitionInvalid, UnknownTask
from conductor.events import Invocation
from conductor.triggers import Invocable, OnEvent

if TYPE_CHECKING:
    from conductor.rows import Database

P = TypeVar("P")
R = TypeVar("R")
D = TypeVar("D", default=Any)
E1 = TypeVar("E1")
E2 = TypeVar("E2", default=Never)
E3 = TypeVar("E3", default=Never)
E4 = TypeVar("E4", default=Never)
E5 = TypeVar("E5", default=Never)
E6 = TypeVar("E6", default=Never)


class Declarations(Generic[D]):
    """An application's definitions and handlers, by name."""

    definitions: dict[str, TaskDefinition[Any, Any]]
    events: dict[str, EventDefinition[Any]]
    tasks: dict[str, Task[Any, Any]]
    databases: tuple[Database, ...]
    version: str | None

    @overload
    def task(
        self, target: TaskDefinition[P, R], /, **options: Unpack[TaskOptions]
    ) -> Binder[Invocation[P], P, R, D]: ...
    @overload
    def task(
        self,
        target: TaskDefinition[P, R],
        first: Invocable,
        t2: Trigger[E2] = ...,
        t3: Trigger[E3] = ...,
        t4: Trigger[E4] = ...,
        t5: Trigger[E5] = ...,
        t6: Trigger[E6] = ...,
        /,
        **options: Unpack[TaskOptions],
    ) -> Binder[Invocation[P] | E2 | E3 | E4 | E5 | E6, P, R, D]: ...
    @overload
    def task(
        self,
        target: TaskDefinition[P, R],
        first: Trigger[E1],
        t2: Trigger[E2] = ...,
        t3: Trigger[E3] = ...,
        t4: Trigger[E4] = ...,
        t5: Trigger[E5] = ...,
        t6: Trigger[E6] = ...,
        /,
        **options: Unpack[TaskOptions],
    ) -> Binder[E1 | E2 | E3 | E4 | E5 | E6, P, R, D]: ...
    @overload
    def task(
        self,
        target: str,
        first: Trigger[E1],
        t2: Trigger[E2] = ...,
        t3: Trigger[E3] = ...,
        t4: Trigger[E4] = ...,
        t5: Trigger[E5] = ...,
        t6: Trigger[E6] = ...,
        /,
        *,
        queue: str = ...,
        ordered: bool = ...,
        **options: Unpack[TaskOptions],
    ) -> Binder[E1 | E2 | E3 | E4 | E5 | E6, Any, None, D]: ...
    @overload
    def task(
        self,
        target: TaskDefinition[P, None],
        /,
        *,
        batch: Batch,
        **options: Unpack[TaskOptions],
    ) -> BatchBinder[Invocation[P], D]: ...
    @overload
    def task(
        self,
        target: TaskDefinition[Any, None] | str,
        first: Trigger[E1],
        t2: Trigger[E2] = ...,
        t3: Trigger[E3] = ...,
        t4: Trigger[E4] = ...,
        t5: Trigger[E5] = ...,
        t6: Trigger[E6] = ...,
        /,
        *,
        batch: Batch,
        queue: str = ...,
        ordered: bool = ...,
        **options: Unpack[TaskOptions],
    ) -> BatchBinder[E1 | E2 | E3 | E4 | E5 | E6, D]: ...
    @declares
    def task(
        self,
        target: TaskDefinition[Any, Any] | str,
        /,
        *triggers: Any,
        queue: str | None = None,
        ordered: bool | None = None,
        batch: Batch | None = None,
        **options: Any,
    ) -> Binder[Any, Any, Any, D] | BatchBinder[Any, D]:
        """Bind a handler to a task: by definition, or by a name and what triggers it.

        A definition without triggers is invocable. A task by name has no result. Up to six
        triggers; the handler's event is the union of theirs. Options are those of
        `conductor.definitions.Task`; ``queue`` and ``ordered`` as in `define_task`. With ``batch``
        the handler takes a sequence of events and a BatchContext, and returns nothing. Raises
        DefinitionInvalid and the errors for unknown names.

            @conductor.task(send_email, max_attempts=3)
            async def send(event: Invocation[SendEmail], ctx: Context[Deps]) -> EmailSent: ...
        """
        definition = self._definition(target, triggers, queue, ordered=ordered, defined_at=caller())
        bound = triggers or (Invocable(),)
        chosen: Any = options  # checked by bind

        def bind_handler(handler: Callable[..., Any]) -> Task[Any, Any]:
            task = bind(
                handler,
                definition=definition,
                triggers=bound,
                version=self.version,
                options=chosen,
                batch=batch,
            )
            return self._register(task)

        return Binder(bind_handler) if batch is None else BatchBinder(bind_handler)

    def _definition(
        self,
        target: TaskDefinition[Any, Any] | str,
        triggers: Sequence[Any],
        queue: str | None,
        *,
        ordered: bool | None,
        defined_at: str,
    ) -> TaskDefinition[Any, Any]:
        if isinstance(target, TaskDefinition):
            for option, given in (("queue", queue), ("ordered", ordered)):
                if given is not None:
                    raise DefinitionInvalid(
                        f"{option} of task {target.name!r} is its definition's",
                        hint=f"Say define_task(…, {option}=…).",
                    )
            return target
        check_type(
            "what @conductor.task is given",
            target,
            (TaskDefinition, str),
            "@conductor.task(send_email)",
        )
        if not triggers and target in self.definitions:
            return self.definitions[target]
        if not triggers:
            raise UnknownTask(target, self.definitions, hint="A task by name needs triggers.")
        known = self.tasks.get(target)
        place = queue or DEFAULT_QUEUE, bool(ordered)
        if known is not None and place == (known.queue, known.definition.ordered):
            return known.definition  # of another version of its handler
        return TaskDefinition(
            name=check_name("task", target),
            queue=check_name("queue", queue or DEFAULT_QUEUE),
            payload=Codec(Any),
            returns=Codec(None),
            defined_at=defined_at,
            ordered=bool(ordered),
        )

    def _register(self, task: Task[Any, Any]) -> Task[Any, Any]:
        earlier = self.tasks.get(task.name)
        if earlier is not None:
            if task.code in earlier.codes:
                raise DefinitionInvalid(
                    f"task {task.name!r} has a handler already, at {earlier.defined_at}",
                    hint='A handler of another version says so: version="2".',
                )
            task = replace(task, earlier=earlier)
        check_tables((*task.triggers, *task.waits), self.databases)
        for trigger in task.triggers:
            if isinstance(trigger, OnEvent):
                add(self.events, trigger.event, "event")
        add(self.definitions, task.definition, "task")
        self.tasks[task.name] = task
        return task
