"""What becomes of a job after a run: a policy from the run's end to an `Outcome`. Pure.

A failure is tried again while the task has attempts left, unless its error says that trying again
cannot help. Randomness (for the back-off) is a parameter.
"""

from __future__ import annotations

from dataclasses import replace
from traceback import TracebackException
from typing import TYPE_CHECKING, Any, Final

from orjson import OPT_NON_STR_KEYS, dumps

from conductor.errors import ConductorError, PayloadInvalid, Retry
from conductor.store.jobs import Finished, Rescheduled

if TYPE_CHECKING:
    from datetime import datetime

    from conductor.definitions import Task
    from conductor.job import JobInfo
    from conductor.store.jobs import Ending, Outcome

_MAX_TEXT: Final = 10_000  # characters of a message or traceback


def completed(
    task: Task[Any, Any], job: JobInfo, document: bytes | None, *, stepped: bool
) -> Outcome:
    """Return the outcome of a handler that returned."""
    return _finished(task, job, "completed", document, stepped=stepped)


def failed(
    task: Task[Any, Any],
    job: JobInfo,
    error: BaseException,
    *,
    stepped: bool,
    randomness: float,
    is_kept: bool = False,
) -> Outcome:
    """Return the outcome of a run that ended with an error, in every run when it is kept."""
    document = describe(error, job)
    failures = job.attempt + 1
    if is_kept or is_final(error) or failures >= task.max_attempts:
        return _finished(task, job, "failed", document, stepped=stepped)
    delay_s = task.retry.delay_s(failures, randomness)
    return Rescheduled(job.id, job.fence, job.task, failures=1, delay_s=delay_s, error=document)


def cancelled(task: Task[Any, Any], job: JobInfo, reason: str, *, stepped: bool) -> Outcome:
    """Return the outcome of a job that was cancelled."""
    document = _encode({"type": "JobCancelled", "message": reason, "attempt": job.attempt + 1})
    return _finished(task, job, "cancelled", document, stepped=stepped)


def _finished(
    task: Task[Any, Any], job: JobInfo, ending: Ending, document: bytes | None, *, stepped: bool
) -> Outcome:
    return Finished(
        job.id, job.fence, job.task, ending, document, task.retention, stepped, job.parent
    )


def suspended(job: JobInfo, wake_at: datetime | None, *, waits: bool) -> Outcome:
    """Return the outcome of a run that ended in a sleep, or waits for something (as well)."""
    return Rescheduled(job.id, job.fence, job.task, wake_at=wake_at, waits=waits)


def given_back(job: JobInfo, delay_s: float = 0.0) -> Outcome:
    """Return the outcome of a job that is to run elsewhere, at no cost of an attempt."""
    return Rescheduled(job.id, job.fence, job.task, delay_s=delay_s)


def refused(outcome: Outcome, why: str) -> Outcome:
    """Return what to write when the database refuses an outcome, its document presumably."""
    document = _encode({"type": "OutcomeRefused", "message": why})
    if isinstance(outcome, Rescheduled):
        return replace(outcome, error=document)
    return replace(outcome, ending="failed", document=document)


def is_final(error: BaseException) -> bool:
    """Return whether trying again cannot help."""
    return isinstance(error, ConductorError) and error.retry is Retry.NEVER


def describe(error: BaseException, job: JobInfo) -> bytes:
    """Return an error as history keeps it: type, message, hint, attempt, traceback, as JSON.

    The hint is that of our own errors, which say what to do and never what was in a row.
    """
    try:
        return _describe(error, job)
    except BaseException as second:  # noqa: BLE001 - of the error's own __str__, say
        why = f"cannot be shown: {type(second).__name__} while it was described"
        return _encode({"type": type(error).__name__, "message": why, "attempt": job.attempt + 1})


def _describe(error: BaseException, job: JobInfo) -> bytes:
    description: dict[str, Any] = {
        "type": type(error).__name__,
        "message": _text(str(error)),
        "attempt": job.attempt + 1,
    }
    if isinstance(error, ConductorError) and error.hint:
        description["hint"] = _text(str(error.hint))
    if isinstance(error, PayloadInvalid):
        description["errors"] = error.errors
    elif error.__traceback__ is not None:
        lines = TracebackException.from_exception(error, compact=True).format()
        description["traceback"] = _text("".join(lines), keep_end=True)
    return _encode(description)


def _text(text: str, *, keep_end: bool = False) -> str:
    kept = text if len(text) <= _MAX_TEXT else text[-_MAX_TEXT:] if keep_end else text[:_MAX_TEXT]
    return kept.replace("\0", "").encode(errors="replace").decode()


def _encode(description: dict[str, Any]) -> bytes:
    return dumps(description, default=str, option=OPT_NON_STR_KEYS)
