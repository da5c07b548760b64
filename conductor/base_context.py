"""What the contexts of all handlers have: the job, its metadata, a logger, the application's own.

`conductor.context` and `conductor.sync_context` add what a handler may call.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Generic

from typing_extensions import TypeVar

from conductor.definitions import Task, TaskDefinition
from conductor.durable import Deadline, Run
from conductor.enqueue import LAST_INSTANT, duration_s
from conductor.errors import JobCancelled, OptionInvalid
from conductor.job import JobHandle

if TYPE_CHECKING:
    from conductor.job import JobInfo
    from conductor.store.steps import StoredStep

D = TypeVar("D", default=Any)
P = TypeVar("P")
R = TypeVar("R")

Timeout = float | timedelta | None
"""Seconds, a timedelta, or None: for ever."""

_LOG: Final = logging.getLogger("conductor.job")


class BaseContext(Generic[D]):
    """What both kinds of handlers have."""

    __slots__ = ("_logger", "_run", "deps")

    def __init__(self, run: Run, deps: D) -> None:
        self._run = run
        self.deps = deps
        self._logger: logging.LoggerAdapter[logging.Logger] | None = None

    @property
    def job(self) -> JobInfo:
        """The job and which run of it this is."""
        return self._run.info

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given with the job, such as a trace's parent; carried on to its children."""
        return self._run.info.metadata or {}

    @property
    def cancelled(self) -> bool:
        """Whether the job is to stop: cancelled, out of time, or no longer this worker's."""
        return self._run.cancelled

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that adds the job's id, task and attempt to every record."""
        if self._logger is None:
            job = self._run.info
            extra = {"job": job.id, "task": job.task, "attempt": job.attempt}
            self._logger = logging.LoggerAdapter(_LOG, extra)
        return self._logger

    def _handle(self, task: TaskDefinition[P, R] | Task[P, R], step: StoredStep) -> JobHandle[R]:
        return JobHandle(step.child or 0, task.name, "enqueued", self._run.services.port)


def lasting(duration: float | timedelta) -> Deadline:
    """Return the end of a sleep from when it is first reached. Raises OptionInvalid."""
    return Deadline(delay_s=duration_s("duration", duration))


def aware(instant: datetime) -> datetime:
    """Return an instant that has a time zone. Raises ValueError; OptionInvalid at time's end."""
    if instant.tzinfo is None:
        raise ValueError("an instant needs a time zone: use datetime.now(UTC) and the like")
    if instant > LAST_INSTANT:
        raise OptionInvalid(f"nothing can be put off until {instant}", hint="Leave the wait out.")
    return instant


def raise_if_cancelled(run: Run) -> None:
    """Raise JobCancelled when the job is to stop."""
    if run.cancelled:
        raise JobCancelled(f"job {run.info.id} is to stop")
