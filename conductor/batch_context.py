"""What the handler of a batch is given besides its events: its jobs, a logger, no steps.

Steps are what one job remembers between its runs, and a batch is made of other jobs every time. So
a batch has none; jobs that need them invoke a task of their own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Generic

from typing_extensions import TypeVar

from conductor.context import Context
from conductor.errors import StepMisplaced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conductor.job import JobInfo

D = TypeVar("D", default=Any)

_LOG: Final = logging.getLogger("conductor.job")


class BatchContext(Generic[D]):
    """The context of a batch's handler, be it ``async def`` or ``def``.

    ``jobs`` are in the order of the events, ``deps`` what the conductor was given.

        async def index(events: Sequence[Update[Product]], ctx: BatchContext[Deps]) -> None:
            await ctx.deps.search.put([event.new for event in events])
    """

    __slots__ = ("_logger", "cancelled", "deps", "jobs")

    def __init__(self, jobs: Sequence[JobInfo], deps: D) -> None:
        self.jobs = jobs
        self.deps = deps
        self.cancelled = False
        """Whether the batch is to stop: out of time, or no longer this worker's."""
        self._logger: logging.LoggerAdapter[logging.Logger] | None = None

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that adds the task and the jobs' ids to every record."""
        if self._logger is None:
            extra = {"task": self.jobs[0].task, "jobs": [job.id for job in self.jobs]}
            self._logger = logging.LoggerAdapter(_LOG, extra)
        return self._logger

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say why there are no steps here, to who has not asked a type checker."""
            if not name.startswith("_") and hasattr(Context, name):
                raise StepMisplaced(
                    f"a batch has no {name}: it is made of other jobs in every run",
                    hint="Use ctx.jobs and ctx.deps; what needs steps is a task without batch=.",
                )
            raise AttributeError(name)
