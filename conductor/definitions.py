"""Tasks and events as an application declares them, shared by workers and clients.

`define_task` and `define_event` need no database and no handler. `Task` is a definition bound to
its triggers and handler by `@conductor.task`. Types come from the definition; validation at every
edge is pydantic's. Pure: no I/O, no clock.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, overload

from pydantic_core import from_json
from typing_extensions import TypeForm, TypeVar

from conductor.arguments import caller, check_type, declares
from conductor.codec import INVALID, Codec, FormInvalid, explain
from conductor.errors import DefinitionInvalid, PayloadInvalid, ResultInvalid, TriggerMissing
from conductor.retry import RetryPolicy
from conductor.texts import TextInvalid, check_text, clean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conductor.job import JobInfo, TriggerKind

P = TypeVar("P", default=Any)
R = TypeVar("R", default=Any)
E_co = TypeVar("E_co", covariant=True, default=Any)

OnFailure = Literal["continue", "halt"]
"""What becomes of the jobs behind one that has failed for good: they go on, or stand still."""

DEFAULT_QUEUE: Final = "default"
DEFAULT_RETENTION: Final = timedelta(days=7)
DEFAULT_MAX_ATTEMPTS: Final = 5
MAX_BATCH: Final = 10_000
MAX_BATCH_WAIT_S: Final = 3600

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_NAME_LENGTH: Final = 100
_RESERVED: Final = "conductor."


def check_name(kind: str, name: Any) -> str:
    """Return ``name`` if a task, event or queue may have it, else raise DefinitionInvalid.

    >>> check_name("task", "send-email")
    'send-email'
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _NAME_LENGTH:
        raise DefinitionInvalid(
            f"{name!r} cannot be the name of {'an' if kind[0] in 'aeiou' else 'a'} {kind}",
            hint=f"Letters, digits, '-' and '_', in parts with dots between them, a letter first, "
            f"at most {_NAME_LENGTH} characters, such as 'send-email' or 'user.created'.",
        )
    if name.startswith(_RESERVED):
        raise DefinitionInvalid(f"{name!r}: names that begin with {_RESERVED!r} are reserved")
    return name


def check_option_text(what: str, text: str | None) -> str | None:
    """Return a text of a declaration. Raises DefinitionInvalid when PostgreSQL cannot hold it."""
    try:
        check_text(text)
    except TextInvalid as error:
        shown = clean(str(text))
        raise DefinitionInvalid(f"{what} {shown!r}: {error}", hint=error.hint) from error
    return text


@dataclass(frozen=True, eq=False)
class TaskDefinition(Generic[P, R]):
    """A task without its handler: name, queue, and the types of its payload and result.

    ``ordered``: jobs that share a key run one at a time. Made by `define_task`. Two definitions are
    equal only if they are the same object.
    """

    name: str
    queue: str
    payload: Codec[P] = field(repr=False)
    returns: Codec[R] = field(repr=False)
    ordered: bool = field(default=False, kw_only=True)
    defined_at: str = field(default="", repr=False)  # file:line

    def encode_payload(self, payload: P) -> bytes:
        """Return the payload as JSON text. Raises PayloadInvalid."""
        try:
            return self.payload.encode_stored(payload)
        except INVALID as error:
            raise payload_invalid(f"payload of task {self.name!r}", error) from error

    def decode_payload(self, data: bytes) -> P:
        """Read a stored payload. Raises PayloadInvalid."""
        try:
            return self.payload.decode(data)
        except INVALID as error:
            raise payload_invalid(f"payload of task {self.name!r}", error) from error

    def decode_result(self, data: bytes | None) -> R:
        """Read a stored result (None: nothing was returned). Raises ResultInvalid."""
        try:
            return self.returns.decode(b"null" if data is None else data)
        except INVALID as error:
            why, errors = explain(error)
            raise ResultInvalid(f"result of task {self.name!r}: {why}", errors) from error


@dataclass(frozen=True, eq=False)
class EventDefinition(Generic[P]):
    """A custom event: its name and the type of its payload. Made by `define_event`."""

    name: str
    payload: Codec[P] = field(repr=False)
    defined_at: str = field(default="", repr=False)  # file:line

    def encode_payload(self, payload: P) -> bytes:
        """Return the payload as JSON text. Raises PayloadInvalid."""
        try:
            return self.payload.encode_stored(payload)
        except INVALID as error:
            raise payload_invalid(f"payload of event {self.name!r}", error) from error

    def decode_payload(self, data: bytes) -> P:
        """Read a stored payload. Raises PayloadInvalid."""
        try:
            return self.payload.decode(data)
        except INVALID as error:
            raise payload_invalid(f"payload of event {self.name!r}", error) from error


def payload_invalid(what: str, error: Exception, hint: str | None = None) -> PayloadInvalid:
    """Return the error that says why ``what`` does not have its type."""
    why, errors = explain(error)
    return PayloadInvalid(f"{what}: {why}", errors, hint=getattr(error, "hint", hint))


@overload
def define_task(
    name: str,
    payload: TypeForm[P],
    returns: TypeForm[R],
    *,
    queue: str = ...,
    ordered: bool = ...,
    validate: bool = ...,
) -> TaskDefinition[P, R]: ...
@overload
def define_task(
    name: str,
    payload: TypeForm[P],
    *,
    queue: str = ...,
    ordered: bool = ...,
    validate: bool = ...,
) -> TaskDefinition[P, None]: ...
@overload
def define_task(
    name: str,
    *,
    returns: TypeForm[R],
    queue: str = ...,
    ordered: bool = ...,
    validate: bool = ...,
) -> TaskDefinition[None, R]: ...
@overload
def define_task(
    name: str, *, queue: str = ..., ordered: bool = ..., validate: bool = ...
) -> TaskDefinition[None, None]: ...
@declares
def define_task(
    name: str,
    payload: Any = None,
    returns: Any = None,
    *,
    queue: str = DEFAULT_QUEUE,
    ordered: bool = False,
    validate: bool = True,
) -> TaskDefinition[Any, Any]:
    """Declare a task: a named unit of work with a typed payload and result.

    ``payload`` and ``returns`` are anything `pydantic.TypeAdapter` takes: models, dataclasses,
    TypedDicts, unions, constrained types; left out, there is none (None). ``queue`` is where its
    jobs wait. ``ordered``: its jobs that share a key run one at a time, in the order in which they
    came; whoever invokes it gives the ``key``. ``validate=False`` means static types only: values
    are passed as they are. Raises DefinitionInvalid for a name that cannot be one and for a type
    that pydantic cannot take.

        send_email = define_task("send-email", payload=SendEmail, returns=EmailSent)
    """
    return TaskDefinition(
        name=check_name("task", name),
        queue=check_name("queue", queue),
        payload=_codec(f"payload of task {name!r}", payload, validate=validate),
        returns=_codec(f"result of task {name!r}", returns, validate=validate),
        ordered=ordered,
        defined_at=caller(),
    )


@overload
def define_event(
    name: str, payload: TypeForm[P], *, validate: bool = ...
) -> EventDefinition[P]: ...
@overload
def define_event(name: str, *, validate: bool = ...) -> EventDefinition[None]: ...
@declares
def define_event(name: str, payload: Any = None, *, validate: bool = True) -> EventDefinition[Any]:
    """Declare an event: something that happened, with a typed payload.

    Types and validation as for `define_task`. Raises DefinitionInvalid.

        user_created = define_event("user.created", payload=UserCreated)
    """
    codec = _codec(f"payload of event {name!r}", payload, validate=validate)
    return EventDefinition(check_name("event", name), codec, caller())


def _codec(what: str, form: Any, *, validate: bool) -> Codec[Any]:
    codec: Codec[Any] = Codec(form, validate=validate)
    try:
        codec.check()
    except FormInvalid as error:
        raise DefinitionInvalid(f"{what}: {error}", hint=error.hint) from error
    return codec


@dataclass(frozen=True, slots=True)
class Batch:
    """How many jobs of a task make a batch, and how long it waits for them. Both are at most.

    Raises DefinitionInvalid.
    """

    size: int = 100
    wait_s: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what makes no batch."""
        check_type("the size of a batch", self.size, (int,), "Batch(size=100)")
        check_type("what a batch waits", self.wait_s, (int, float), "Batch(wait_s=0.1)")
        if not 1 <= self.size <= MAX_BATCH:
            raise DefinitionInvalid(f"the size of a batch is not between 1 and {MAX_BATCH}")
        if not 0 <= self.wait_s <= MAX_BATCH_WAIT_S:
            raise DefinitionInvalid(f"a batch waits from 0 to {MAX_BATCH_WAIT_S} seconds")


Batch.__init__ = declares(Batch.__init__)  # type: ignore[method-assign]  # as dataclass wrote it


class Trigger(ABC, Generic[E_co]):
    """Why a task runs. ``E_co`` is what its handler then gets. Immutable."""

    kind: ClassVar[TriggerKind]

    @property
    @abstractmethod
    def name(self) -> str:
        """The trigger's name, stable and unique within its task."""

    @property
    @abstractmethod
    def claims(self) -> frozenset[str]:
        """What it fires on: no two triggers of a task may share any of it."""

    @property
    def topic(self) -> str:
        """What a job waits for that waits for this."""
        return self.name

    def gives(self, task: TaskDefinition[Any, Any]) -> tuple[Any, ...]:  # noqa: ARG002 - theirs
        """Return the types of the events it gives to a handler, as far as they are known."""
        return ()

    @abstractmethod
    def accepts(self, envelope: dict[str, Any]) -> bool:
        """Return whether a job of this trigger's kind with this (parsed) payload is its own."""

    @abstractmethod
    def decode(self, task: TaskDefinition[Any, Any], envelope: Any) -> E_co:
        """Build the event from a job's parsed payload. Raises PayloadInvalid."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task(Generic[P, R]):
    """A task that can run: definition, triggers and handler, bound by `@conductor.task`.

    ``retention`` is how long a finished job stays in history; ``timeout_s`` bounds one attempt;
    ``priority``: higher runs first. ``is_sync`` handlers run in threads. ``waits`` are the changes
    that its handler waits for (`ctx.wait_for_change`). ``on_failure``: whether the jobs behind one
    of an ordered task that has failed for good go on. ``batch``: its handler takes several events
    at once. ``code`` is the version of the handler: a
    job that has begun with one goes on with it; ``earlier`` is the task with the one before.
    """

    definition: TaskDefinition[P, R]
    triggers: tuple[Trigger[Any], ...]
    handler: Callable[[Any, Any], Any] = field(repr=False)
    is_sync: bool
    version: str | None = None
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    retention: timedelta = DEFAULT_RETENTION
    timeout_s: float | None = None
    priority: int = 0
    waits: Sequence[Trigger[Any]] = ()
    on_failure: OnFailure = "continue"
    batch: Batch | None = None
    code: str | None = None
    earlier: Task[Any, Any] | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.definition.name

    @property
    def defined_at(self) -> str:
        """Where its handler is, as ``file:line``; where it is defined when that has no code."""
        handler: Any = self.handler
        while isinstance(handler, partial):
            handler = handler.func
        code = getattr(handler, "__code__", None)
        if code is None:
            return self.definition.defined_at
        return f"{code.co_filename}:{code.co_firstlineno}"

    @property
    def queue(self) -> str:
        """The queue its jobs wait in."""
        return self.definition.queue

    @cached_property
    def codes(self) -> frozenset[str | None]:
        """The versions of its handler that are there."""
        return frozenset({self.code}) | (self.earlier.codes if self.earlier else frozenset())

    def variant(self, code: str | None) -> Task[P, R] | None:
        """Return the task with the handler of this version; None when there is none.

        What began before there were versions goes on with the newest, unless the handler of that
        time is still there.
        """
        task: Task[Any, Any] | None = self
        while task is not None and task.code != code:
            task = task.earlier
        return self if task is None and code is None else task

    @property
    def all_waits(self) -> tuple[Trigger[Any], ...]:
        """The changes that its handler waits for, or that of an earlier version."""
        return (*(self.earlier.all_waits if self.earlier else ()), *self.waits)

    @cached_property
    def awaitable(self) -> frozenset[str]:
        """The topics of the changes that its handler may wait for."""
        return frozenset(trigger.topic for trigger in self.waits)

    @cached_property
    def _by_kind(self) -> dict[str, tuple[Trigger[Any], ...]]:
        kinds = {trigger.kind for trigger in self.triggers}
        return {kind: tuple(t for t in self.triggers if t.kind == kind) for kind in kinds}

    def decode(self, trigger: str, payload: bytes, job: JobInfo) -> Any:
        """Return the event object for a job's stored payload, by the job's trigger.

        Raises PayloadInvalid when the payload does not have the declared type, and TriggerMissing
        when the task has no such trigger.
        """
        candidates = self._by_kind.get(trigger, ())
        if trigger == "invoke" and candidates:
            return candidates[0].decode(self.definition, payload)
        envelope = self._envelope(payload, job)
        for candidate in candidates:
            if candidate.accepts(envelope):
                return candidate.decode(self.definition, envelope)
        raise TriggerMissing(f"task {self.name!r} has no {trigger} trigger for job {job.id}")

    def _envelope(self, payload: bytes, job: JobInfo) -> dict[str, Any]:
        try:
            envelope = from_json(payload)
        except ValueError as error:
            raise payload_invalid(f"payload of job {job.id}", error) from error
        if not isinstance(envelope, dict):
            raise PayloadInvalid(f"payload of job {job.id} is not an object")
        return envelope

    def encode_result(self, value: Any) -> bytes | None:
        """Return what a handler returned as JSON text, None for None. Raises ResultInvalid."""
        try:
            data = self.definition.returns.encode_stored(value)
        except INVALID as error:
            why, errors = explain(error)
            what = f"result of task {self.name!r}: {why}"
            raise ResultInvalid(what, errors, hint=getattr(error, "hint", None)) from error
        return None if data == b"null" else data
