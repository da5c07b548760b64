"""A job as a handler sees it, and as who enqueued it does.

`JobInfo` describes the run a handler is in. `JobHandle` names a job that was enqueued; what it does
goes through the client that made it. This module must not do I/O of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol

from typing_extensions import TypeVar

if TYPE_CHECKING:
    from datetime import datetime

R_co = TypeVar("R_co", covariant=True, default=Any)

TriggerKind = Literal["invoke", "cron", "event", "change"]
"""Why a job exists, as `conductor.jobs.trigger` stores it."""


@dataclass(slots=True)
class JobInfo:
    """One run of a job (`ctx.job`). Immutable by convention.

    ``attempt`` counts the handler's failures so far and ``crashes`` the processes that died with
    it; ``fence`` is the number of this claim. ``priority``: higher runs first. ``key`` is carried
    along for the application. ``idempotency_key`` is the same for every run of the job and, for a
    change, for every delivery of it. ``parent`` is the job that awaits this one,
    ``code`` the version of the handler that it has begun with.
    """

    id: int
    task: str
    queue: str
    trigger: TriggerKind
    attempt: int
    crashes: int
    fence: int
    priority: int
    key: str | None
    run_at: datetime
    created_at: datetime
    metadata: dict[str, Any] | None
    app: str | None
    version: str | None
    idempotency_key: str
    parent: int | None = None
    code: str | None = None


class JobPort(Protocol):
    """What a handle needs of the client that made it."""

    async def job_result(self, handle: JobHandle[Any], timeout_s: float | None) -> Any:
        """Wait for the job and return its decoded result."""

    async def cancel(self, job: int, reason: str | None = None) -> bool:
        """Cancel the job; true when it had not ended yet."""

    async def refetch(self, change: Any) -> None:
        """Read again what a `Change` lacks of its new row (see `conductor.refetch`)."""

    async def source_position(self, source: str) -> str | None:
        """Return where a source's log ends now; None for the queue's own database."""


@dataclass(frozen=True, slots=True, eq=False)
class JobHandle(Generic[R_co]):
    """A job that was enqueued, or was not because ``dedupe_key`` was taken (``dropped``).

    ``id`` of a dropped one is the job that holds the key.
    """

    id: int
    task: str
    status: Literal["enqueued", "dropped"]
    port: JobPort
    committed: bool = True  # false: enqueued in a transaction of the caller

    async def result(self, timeout_s: float | None = None) -> R_co:
        """Wait until the job has ended and return what its handler returned.

        Raises JobFailed, JobCancelled, ResultTimeout (the job goes on) or ResultGone (its history
        is not kept). A job enqueued in the caller's own transaction is seen after its commit.
        """
        result: R_co = await self.port.job_result(self, timeout_s)
        return result

    async def cancel(self, reason: str | None = None) -> bool:
        """Cancel the job; true when it had not ended yet. A running handler is told within 1 s."""
        return await self.port.cancel(self.id, reason)
