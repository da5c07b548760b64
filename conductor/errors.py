"""Every error that `conductor` raises on purpose: one tree, each with a retry advice and a hint.

A class says whether trying again can help (`Retry`) and what a person can do (`hint`). Messages
name the thing that is wrong; hints say what to do about it. This module imports nothing of ours.
"""
# ruff: noqa: N818 - a name says what happened, not that it is an error

from __future__ import annotations

from difflib import get_close_matches
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence


class Retry(Enum):
    """Whether the same call can succeed later."""

    TIMED = "timed"
    """Yes, by itself, after a while: a lost connection, a busy server."""
    MANUAL = "manual"
    """Only after somebody has changed something: a missing migration, a refused table."""
    NEVER = "never"
    """No: the input is wrong."""


class ConductorError(Exception):
    """Base of the tree. ``hint`` is one line for an operator and may be empty.

    >>> ConfigError("no DSN", hint="Set CONDUCTOR_DSN.").hint
    'Set CONDUCTOR_DSN.'
    """

    retry: ClassVar[Retry] = Retry.NEVER
    hint: str = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        if hint is not None:
            self.hint = hint


# --- what an application declares ------------------------------------------------------------


class DefinitionInvalid(ConductorError):
    """A task, event, trigger or row model is declared wrongly."""

    hint = "Correct the declaration; nothing was stored."


class CronInvalid(DefinitionInvalid):
    """A cron expression cannot be read, never fires, or its time zone is not known."""

    hint = "Five fields (minute hour day month weekday) and an IANA time zone name."


class FilterInvalid(DefinitionInvalid):
    """A filter (`when`) is not CEL, or reads what its trigger does not have."""

    hint = "Such as when='new.email.endsWith(\"@example.com\")'; has(new.x) asks for a column."


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three known names that look like ``name``, the nearest first.

    >>> nearest("send-emial", ["send-email", "receipt"])
    ['send-email']
    """
    return get_close_matches(name, sorted(set(known)), n=3, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return what a message about an unknown name ends with: the nearest ones, if there are any.

    >>> did_you_mean("inserted", ["insert", "update"])
    "; did you mean 'insert'?"
    """
    similar = nearest(name, known)
    return f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""


class UnknownName(ConductorError):
    """A name that is not known, with the nearest ones that are.

    >>> str(UnknownTask("send-emial", ["send-email"]))
    "unknown task 'send-emial'; did you mean 'send-email'?"
    """

    noun: ClassVar[str] = "name"

    def __init__(
        self, name: str, known: Iterable[str], *, where: str = "", hint: str | None = None
    ) -> None:
        known = set(known)
        self.name = name
        self.nearest = nearest(name, known)
        message = f"unknown {self.noun} {name!r}{f' {where}' if where else ''}"
        super().__init__(message + did_you_mean(name, known), hint=hint)


class UnknownTask(UnknownName):
    """No task of this name is registered."""

    noun = "task"
    hint = "List the definition in Conductor(tasks=[…]) or start a worker that has the task."


class UnknownEvent(UnknownName):
    """No event of this name is registered."""

    noun = "event"
    hint = "List the definition in Conductor(events=[…])."


class UnknownSchema(UnknownName):
    """No such schema."""

    noun = "schema"
    hint = "Give --schemas as the database spells them, with commas between them."


class UnknownTable(UnknownName):
    """No such table."""

    noun = "table"
    hint = "Write it as schema.table; generate the row models again when the table is new."


class UnknownColumn(UnknownName):
    """No such column in the table or row model."""

    noun = "column"
    hint = "Generate the row models again when the column is new."


class UnknownField(UnknownName):
    """No such field in the payload of an event."""

    noun = "field"
    hint = "Fields are those of the event's definition, under the names they have in JSON."


class OptionInvalid(ConductorError):
    """An option of a call is out of its range; the message says which."""

    hint = "Nothing was stored."


class UnknownOption(UnknownName, OptionInvalid):
    """A call has no such option."""

    noun = "option"
    hint = "Nothing was stored."


def check_options(given: Iterable[str], known: Collection[str]) -> None:
    """Raise UnknownOption for the first option that a call does not have."""
    for name in given:
        if name not in known:
            raise UnknownOption(name, known, hint=f"Options: {', '.join(known)}.")


# --- data at the edges -----------------------------------------------------------------------


class PayloadInvalid(ConductorError):
    """A payload, or a row of a change, does not have the declared type.

    ``errors`` holds what pydantic found, one mapping an error (``loc``, ``msg``, ``type``), without
    the input.
    """

    hint = "Send what the definition declares, or correct the definition."

    def __init__(
        self, message: str, errors: Sequence[Any] = (), *, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.errors: list[Any] = list(errors)


class TriggerMissing(PayloadInvalid):
    """The task of a job has no trigger that such a job could come from, in any version that works.

    While a worker of the version that the job was routed for lives, it is left to that one.
    """

    hint = "The trigger was removed after the job was made: cancel the job or restore it."


class ResultInvalid(PayloadInvalid):
    """A handler returned something else than its task declares."""

    hint = "Return what the definition's `returns` declares."


class ColumnNotCaptured(ConductorError):
    """A column of a change was read that the change does not carry."""

    hint = (
        "Add it to the trigger's columns, or say OnChange(…, refetch=True): a job then reads it"
        " from the table. `old` is whole only under REPLICA IDENTITY FULL."
    )


class ColumnUnchanged(ColumnNotCaptured):
    """A large (TOASTed) value was read that the update did not touch: the WAL has no copy."""

    hint = (
        "Say OnChange(…, refetch=True): a job then reads it from the table. Or set REPLICA IDENTITY"
        " FULL on the table."
    )


class RefetchFailed(ConductorError):
    """A row could not be read again (`refetch`): no key, no right to read it, no such table."""

    retry = Retry.MANUAL
    hint = "The role of the workers needs SELECT on the table, and the trigger its key columns."


class RowAbsent(ConductorError):
    """The change has no such row: an insert has no old one, a delete no new, a truncate none."""

    hint = "Tell operations apart with `match` or `event.op`."


class FilterFailed(ConductorError):
    """A filter (`when`) could not be evaluated for a change or an event: types, a missing key."""

    hint = "Guard it: has(new.x) for a column, new.x != null && … for null."


# --- running a job ---------------------------------------------------------------------------


class NonRetryable(ConductorError):
    """Raise it (or a subclass) in a handler: the job fails for good, whatever attempts are left.

    >>> raise NonRetryable("the card was refused")
    Traceback (most recent call last):
    conductor.errors.NonRetryable: the card was refused
    """


class BatchFailed(ConductorError):
    """Raise it in the handler of a batch: these jobs have failed, the others are done.

    ``failures`` maps places among the events to their errors. Each job is tried again, or not, by
    its own error and attempts. A place that no job has fails them all.

    >>> raise BatchFailed({3: ValueError("no such product")})
    Traceback (most recent call last):
    conductor.errors.BatchFailed: 1 job of the batch has failed
    """

    retry = Retry.TIMED
    hint = "Each job's own error is kept with it."

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        self.failures = dict(failures)
        count = len(self.failures)
        super().__init__(f"{count} job{'s have' if count != 1 else ' of the batch has'} failed")


class JobFailed(ConductorError):
    """The job ended as failed. ``error`` is what history keeps: type, message, hint, attempt."""

    retry = Retry.MANUAL
    hint = "See `conductor jobs show`; `conductor jobs retry` runs it again."

    def __init__(self, job: int, error: dict[str, Any] | None) -> None:
        self.job = job
        self.error = error or {}
        kind, message = self.error.get("type", "unknown error"), self.error.get("message", "")
        super().__init__(f"job {job} failed: {kind}: {message}")


class JobCancelled(ConductorError):
    """The job was cancelled."""

    hint = "Somebody asked for it; the reason is in the message."


class JobTimedOut(ConductorError):
    """A handler ran longer than its task's ``timeout_s``."""

    retry = Retry.TIMED
    hint = "Raise timeout_s, or do less in one attempt."


class WorkerCrashed(ConductorError):
    """The processes that ran this job died with it, too often."""

    retry = Retry.MANUAL
    hint = "Look for out-of-memory kills and crashes in native code at the times of its attempts."


class FenceLost(ConductorError):
    """The job is no longer this worker's: it was declared dead, or the job was given to another."""

    hint = "Nothing was written; the job runs elsewhere."


class StepNameReused(ConductorError):
    """Two steps of one run have the same name."""

    hint = "Give every step of a handler its own name, in loops too."


class StepOrderChanged(ConductorError):
    """A replay reached its steps in another order than the run before: the handler has changed."""

    hint = "Keep the order of finished steps, or put the new flow into a new task."


class StepRefused(ConductorError):
    """The database refuses a step, for a reason that waiting does not change: the attempt fails.

    The server's own error is the cause. The task's retry policy decides about other attempts.
    """

    retry = Retry.MANUAL
    hint = "See the server's message: rights on schema conductor, a trigger, a constraint, a value."


class StepFailed(ConductorError):
    """A step has failed in an earlier run, which went on; its error cannot be made again here.

    That of a class which is not found at the top of a module, or wants more than plain arguments.
    """

    hint = "Raise, and catch, errors of classes at the top of a module; or catch this one as well."


class StepMisplaced(ConductorError):
    """A step or a wait was reached inside another step or a transaction, which is a step itself.

    A wait in there would never end: the job cannot be put down while a step of it runs.
    """

    hint = "Do it before or after."


class WaitUndeclared(ConductorError):
    """A change is waited for that the task does not name: nobody would notice it."""

    hint = "Name it with the task: @conductor.task(…, waits=[payment_made])."


class WaitUnavailable(ConductorError):
    """A change is waited for in another database than the queue's.

    What was committed there before the wait began cannot be told from what came after.
    """

    hint = (
        "Give Conductor(…, source_dsn=…), or sources={…}, so that the database can be asked; or let"
        " a task with that OnChange emit an event, and wait for the event."
    )


class ChildFailed(JobFailed):
    """A job that was awaited (`ctx.invoke`) has failed. Every later run sees the same."""

    retry = Retry.NEVER
    hint = "Catch it to go on without the child; it has used up its own attempts."


class ChildCancelled(JobCancelled):
    """A job that was awaited (`ctx.invoke`) was cancelled. Every later run sees the same."""

    hint = "Catch it to go on without the child."


class WaitTimeout(ConductorError):
    """What was waited for has not come in time. Every later run sees the same."""

    hint = "Catch it to go on without."


class ChildTimeout(WaitTimeout):
    """A job that was awaited (`ctx.invoke`) has not ended in time; unless cancelled, it goes on."""


class ResultTimeout(ConductorError):
    """The job had not ended when the wait for its result did. The job goes on."""

    retry = Retry.TIMED
    hint = "Wait longer, or look at the job with `conductor jobs show`."


class ResultGone(ConductorError):
    """The job has ended and its history is no longer kept."""

    hint = "Raise the task's retention if results are read."


# --- testing a handler -----------------------------------------------------------------------


class StillWaiting(ConductorError):
    """A handler under test waits for something that the test does not bring."""

    hint = "Give it before the run: rehearsal.bring(event, payload)."


class Unanswered(ConductorError):
    """A handler under test invokes a task that the test gives no answer for."""

    hint = "Give it before the run: rehearsal.answer(task, result)."


class AnswerInvalid(ConductorError):
    """A test answers an invoked task with something else than that declares to return."""

    hint = "Give rehearsal.answer a result, an error, or a function that returns one or raises."


# --- the database ----------------------------------------------------------------------------


class DatabaseUnavailable(ConductorError):
    """The database cannot be reached, or the connection was lost."""

    retry = Retry.TIMED
    hint = "Check the DSN, the server and the network."


class MigrationMismatch(ConductorError):
    """The schema in the database is not the one this version needs."""

    retry = Retry.MANUAL
    hint = "Run `conductor migrate` with the newest version."


class EmitRefused(ConductorError):
    """An event cannot be emitted through the WAL on this connection; the message says why."""

    retry = Retry.MANUAL
    hint = (
        "Use a connection to the source database of a running `cdc`, whose wal_level is logical, "
        'or via="queue".'
    )


class RegistrationRefused(ConductorError):
    """A task or subscription cannot be registered as it is; the message says what to run."""

    retry = Retry.MANUAL


class CaptureTimeout(ConductorError):
    """The router has not stamped the subscriptions in time: their changes are not captured yet."""

    retry = Retry.TIMED
    hint = "Is `cdc run` up? See `cdc status`."


class ConfigError(ConductorError):
    """A setting is missing or wrong."""

    retry = Retry.MANUAL


class PrivilegeMissing(ConfigError):
    """The role may not do to the schema conductor what is needed."""

    hint = (
        "The role needs USAGE on schema conductor and rights on its tables: grant it the role that"
        " owns them."
    )


class LoginRefused(ConfigError):
    """The server does not let the role in, or has no such database: no matter of time."""

    hint = (
        "Correct the DSN (CONDUCTOR_DSN; CONDUCTOR_SOURCE_DSN), or the server's roles, databases"
        " and pg_hba.conf."
    )
