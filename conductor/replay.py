"""Replaying a handler: the steps of one run against those of the runs before, and their types.

Pure: stored steps in, places and decisions out.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import unwrap
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from orjson import loads
from pydantic import JsonValue

from conductor.codec import INVALID, Codec, explain
from conductor.errors import OptionInvalid, ResultInvalid, StepNameReused, StepOrderChanged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType

    from conductor.store.steps import StoredStep

UNSET: Final[Any] = object()
"""No type was given."""

_JSON: Final[Codec[Any]] = Codec(JsonValue)
_NAME_LENGTH: Final = 200
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")  # NUL and lone surrogates
_EARLIER_GATHER: Final = re.compile("gather(?: .+ …)?", re.DOTALL)


def check_step_name(name: Any) -> None:
    """Raise OptionInvalid for what cannot name a step. Names made of such may be longer."""
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH or _UNSTORABLE.search(name):
        raise OptionInvalid(
            f"{name!r} cannot be the name of a step", hint=f"1 to {_NAME_LENGTH} characters."
        )


class Replay:
    """The steps of one run against those of the runs before. Pure.

    On the handler's sequential path (its own task or thread) each step has a place; beside it
    (task groups) only its name counts, and in a ``gather`` which one it is in: the gather takes a
    place, and a step in it is stored with what `member_of` makes of that. Raises StepNameReused,
    StepOrderChanged.
    """

    __slots__ = ("_by_name", "_by_place", "_names", "_next")

    def __init__(self, stored: list[StoredStep]) -> None:
        self._by_name = {step.name: step for step in stored}
        self._by_place = {step.position: step for step in stored if _has_place(step)}
        self._names: set[str] = set()
        self._next = 0

    def reach(
        self, name: str, kind: str, *, sequential: bool
    ) -> tuple[int | None, StoredStep | None]:
        """Take note that the handler has come to a step; return its place and what is stored."""
        if name in self._names:
            raise StepNameReused(f"step {name!r} is used twice in one run")
        self._names.add(name)
        place: int | None = None
        if sequential:
            place = self.take_place()
            self._check_place(name, place)
        stored = self._by_name.get(name)
        if stored is not None and stored.kind not in {kind, failed(kind)}:
            raise StepOrderChanged(f"{name!r} was a {stored.kind} in an earlier run, now a {kind}")
        return place, stored

    def take_place(self) -> int:
        """Return the next place of the sequential path: it is taken."""
        place, self._next = self._next, self._next + 1
        return place

    def end_gather(self, place: int, names: set[str]) -> str | None:
        """Take note that all of a gather has ended; return what it is stored as, unless it is.

        Until it is, the steps of it that are stored say what was in it.
        """
        name = f"gather {place + 1}"
        if name in self._names:
            raise StepNameReused(f"step {name!r} is used twice in one run: a gather is called so")
        self._names.add(name)
        stored = self._earlier_gather(place)
        if stored is None:
            self._check_place(name, place)
            stored = self._by_name.get(name)
        if stored is None:
            before = {step.name for step in self._by_name.values() if _is_member(step, place)}
            changed = before - names
        else:
            changed = set(loads(stored.result or b"[]")) ^ names
        if changed:
            listed = ", ".join(sorted(changed))
            raise StepOrderChanged(f"a gather has other steps than in an earlier run: {listed}")
        return name if stored is None else None

    def fail_gather(self, place: int) -> None:
        """Take note that a gather has raised an error: nothing is stored of that.

        In an earlier version of this library such a one took no place: what is stored says so.
        """
        if place in self._by_place:
            self._next = place

    def _earlier_gather(self, place: int) -> StoredStep | None:
        """Return what an earlier version of this library stored for a gather that was over."""
        there = self._by_place.get(place)
        if there is None or there.kind != "step" or _EARLIER_GATHER.fullmatch(there.name) is None:
            return None
        return there if (there.result or b"").startswith(b"[") else None

    def _check_place(self, name: str, place: int) -> None:
        there = self._by_place.get(place)
        before = self._by_name.get(name)
        if there is not None and there.name != name:
            raise StepOrderChanged(
                f"step {place + 1} is {name!r}, but was {there.name!r} in an earlier run"
            )
        was = None if before is None else before.position
        if was is not None and was >= 0 and was != place:
            raise StepOrderChanged(
                f"{name!r} is step {place + 1}, but was step {was + 1} in an earlier run"
            )


def failed(kind: str) -> str:
    """Return what a step of a kind is stored as once it has failed for good."""
    return f"failed {kind}"


def member_of(place: int) -> int:
    """Return the position that steps in the gather at a place are stored with: below 0."""
    return -1 - place


def _has_place(step: StoredStep) -> bool:
    return step.position is not None and step.position >= 0


def _is_member(step: StoredStep, place: int) -> bool:
    return step.position == member_of(place)


enclosing: Final[ContextVar[str]] = ContextVar("enclosing", default="")
"""What of the handler runs now that no step may be reached in; empty: nothing of the kind."""


@contextmanager
def inside(what: str) -> Iterator[None]:
    """Mark what runs here, and what it starts, as a step's own work."""
    token = enclosing.set(what)
    try:
        yield
    finally:
        enclosing.reset(token)


_CODECS: Final[dict[tuple[Any, str], Codec[Any]]] = {}
_MOST_CODECS: Final = 1_000  # types made at run time must not fill the memory
_HINTS: Final[dict[CodeType, Any]] = {}  # annotations that are text; as many as in the source


def _annotation(fn: Callable[..., Any], code: CodeType) -> Any:
    """Return the type that a function says it returns.

    Only text belongs to the code alone: functions of one factory share that, and not their types.
    """
    written = fn.__annotations__["return"]
    if isinstance(written, str) and code in _HINTS:
        return _HINTS[code]
    try:
        form = get_type_hints(fn)["return"]
    except NameError as error:
        raise TypeError(f"cannot read the return annotation ({error}): give `returns`") from error
    if isinstance(written, str):
        _HINTS[code] = form
    return form


def _codec_of(form: Any) -> Codec[Any]:
    """Return the codec of a type; building its validator takes longer than all else of a step.

    ``int | str`` equals ``str | int`` and validates in another order: the text tells them apart.
    """
    key = (form, "" if isinstance(form, type) else repr(form))
    try:
        codec = _CODECS.get(key)
    except TypeError:  # unhashable: the metadata of an Annotated
        return Codec(form)
    if codec is None:
        if len(_CODECS) >= _MOST_CODECS:
            _CODECS.clear()
        codec = _CODECS[key] = Codec(form)
    return codec


def step_codec(fn: Callable[..., Any], returns: Any) -> Codec[Any]:
    """Return how a step's result is stored: by ``returns``, else fn's annotation, else as JSON.

    Raises OptionInvalid for what is no function.
    """
    if not callable(fn):
        raise OptionInvalid(
            f"a step is given {type(fn).__name__}, which cannot be called",
            hint="Give the function, not what it returns: ctx.step('pay', lambda: pay(order)).",
        )
    if returns is not UNSET:
        return _codec_of(returns)
    annotated = _annotated(fn)
    code: CodeType | None = getattr(unwrap(annotated), "__code__", None)  # a wrapper's is shared
    if code is None or "return" not in getattr(annotated, "__annotations__", ()):
        return _JSON
    return _codec_of(_annotation(annotated, code))


def _annotated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return what says the type of a call: of a partial its function, of an object its method."""
    while isinstance(fn, partial):
        fn = fn.func
    if isinstance(fn, type) or hasattr(fn, "__code__"):
        return fn
    return getattr(fn, "__call__", fn)  # noqa: B004 - itself, not whether it is there


def encode_step(codec: Codec[Any], name: str, value: Any) -> bytes:
    """Return a step's result as JSON text. Raises ResultInvalid."""
    try:
        return codec.encode(value)
    except INVALID as error:
        why, errors = explain(error)
        hint = "Give `returns`, or annotate what the function returns." if codec is _JSON else None
        raise ResultInvalid(f"result of step {name!r}: {why}", errors, hint=hint) from error


def decode_step(codec: Codec[Any], name: str, document: bytes | None) -> Any:
    """Read a step's stored result. Raises ResultInvalid."""
    try:
        return codec.decode(b"null" if document is None else document)
    except INVALID as error:
        why, errors = explain(error)
        raise ResultInvalid(f"stored result of step {name!r}: {why}", errors) from error
