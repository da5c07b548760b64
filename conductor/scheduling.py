"""Schedules that come about while an application runs: the part of a client that makes them.

They are rows beside those of triggers, and fired by the same tick (`conductor.scheduler`). This
module must not decide when an expression fires.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from typing_extensions import TypeVar, Unpack

from conductor import calls
from conductor.calls import ScheduleOptions
from conductor.definitions import Task, TaskDefinition
from conductor.store.schedules import SchedulePlan, drop_schedule, put_schedule
from conductor.triggers import Cron

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from conductor.connections import Connections

P = TypeVar("P")


class Scheduling(ABC):
    """What a client needs to make schedules. ``tasks`` are those that have handlers here."""

    tasks: dict[str, Task[Any, Any]]
    _connections: Connections

    @abstractmethod
    def _known_task(
        self, task: TaskDefinition[Any, Any] | Task[Any, Any] | str
    ) -> TaskDefinition[Any, Any]:
        """Return the definition of a task of the application. Raises UnknownTask."""

    async def schedule(
        self,
        name: str,
        task: TaskDefinition[P, Any] | Task[P, Any],
        cron: Cron,
        payload: P,
        *,
        connection: AsyncConnection[Any] | None = None,
        **options: Unpack[ScheduleOptions],
    ) -> None:
        """Invoke a task on a schedule from now on, whatever is deployed, until `unschedule`.

        ``name`` is unique in the task: another schedule of that name is replaced, an equal one goes
        on. A job's metadata say which schedule and instant it is of (``schedule``,
        ``scheduled_at``). After a downtime only the latest instant missed fires. ``connection`` as
        for `invoke`. Raises UnknownTask, PayloadInvalid, OptionInvalid, DatabaseUnavailable.

            await conductor.schedule("report 7", report, Cron("0 9 * * 1"), Report(customer=7))
        """
        plan = self.schedule_plan(name, task, cron, payload, options)
        if connection is not None:
            return await put_schedule(connection, task.name, name, plan)
        async with self._connections.lend() as own:
            return await put_schedule(own, task.name, name, plan)

    async def unschedule(
        self,
        name: str,
        task: TaskDefinition[Any, Any] | Task[Any, Any],
        *,
        connection: AsyncConnection[Any] | None = None,
    ) -> bool:
        """End a schedule that was made at run time; false when there is none of this name."""
        if connection is not None:
            return await drop_schedule(connection, task.name, name)
        async with self._connections.lend() as own:
            return await drop_schedule(own, task.name, name)

    def schedule_plan(
        self,
        name: str,
        task: TaskDefinition[Any, Any] | Task[Any, Any],
        cron: Cron,
        payload: Any,
        options: ScheduleOptions,
    ) -> SchedulePlan:
        """Return what `schedule` stores."""
        calls.check_schedule_name(name)
        definition = self._known_task(task)
        return calls.plan(self.tasks.get(definition.name, definition), cron, payload, options)
