"""The error of a step that has failed for good: kept as JSON, and raised again in later runs.

An error is made again of its class, its arguments and its attributes, as far as these are plain
values; one that then says something else becomes one of a subclass that says what it said. So
``except`` finds it as in the first run. Its class must be found where it was, in a module that is
imported already: nothing is imported, and nothing but an exception is ever made. Pure: errors in,
documents out, and back.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from orjson import loads
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError, to_json

from conductor.errors import StepFailed
from conductor.texts import clean, to_document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import LiteralString

_MAX_TEXT: Final = 10_000  # characters of a message
_SEPARATOR: Final = ":"


def describe(error: Exception) -> bytes:
    """Return an error as a step keeps it.

    >>> describe(ValueError("card"))
    b'{"type":"builtins:ValueError","message":"card","args":["card"],"fields":{}}'
    """
    return to_json(_describe(error))


def restore(step: str, document: bytes) -> Exception:
    """Return the error that a step has failed with, to be raised again.

    Where it cannot be made again it is StepFailed, with its type and its message.

    >>> restore("pay", describe(KeyError("card")))
    KeyError('card')
    """
    error = _restore(step, loads(document))
    note = f"Step {step!r} failed so in an earlier run, which the handler went on from."
    notes = vars(error).get("__notes__", [])  # add_note asks a __getattr__ that may not be ready
    vars(error)["__notes__"] = [*notes, note]
    return error


def _describe(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    kept: dict[str, Any] = {
        "type": clean(f"{kind.__module__}{_SEPARATOR}{kind.__qualname__}"),
        "message": clean(_message(error))[:_MAX_TEXT],
        "args": [arg if _is_plain(arg) else clean(_text(arg)) for arg in _arguments(error)],
        "fields": {name: value for name, value in vars(error).items() if _is_plain(value)},
    }
    if isinstance(error, BaseExceptionGroup):
        kept["args"], kept["group"] = [clean(error.message)], list(map(_describe, error.exceptions))
    elif isinstance(error, ValidationError):
        kept["invalid"] = [
            {
                "type": clean(each["type"]),
                "loc": [part if _is_plain(part) else clean(_text(part)) for part in each["loc"]],
                "msg": clean(each["msg"]),
                "input": each["input"] if _is_plain(each["input"]) else None,
            }
            for each in error.errors(include_url=False, include_context=False)
        ]
        kept["args"] = [clean(error.title)]
    return kept


def _arguments(error: BaseException) -> tuple[Any, ...]:
    """Return what an error is made of: OSError leaves the names of files out of its ``args``."""
    if isinstance(error, OSError) and error.filename is not None and len(error.args) == 2:
        names = [error.filename]
        if error.filename2 is not None:
            names += [None, error.filename2]
        return (*error.args, *names)
    return error.args


def _restore(step: str, kept: dict[str, Any]) -> Exception:
    kind = _find(kept["type"])
    error = None if kind is None else _make(step, kind, kept)
    if error is None:
        _, _, name = kept["type"].rpartition(_SEPARATOR)
        error = StepFailed(f"step {step!r} has failed: {name}: {kept['message']}")
    return error


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001 - of its own __str__
        return f"cannot be shown: {type(second).__name__}"


def _text(value: object) -> str:
    try:
        return str(value)[:_MAX_TEXT]
    except Exception:  # noqa: BLE001 - likewise
        return type(value).__name__


def _is_plain(value: Any) -> bool:
    """Return whether a value is the same after it was JSON."""
    try:
        return bool(loads(to_document(value)) == value)
    except Exception:  # noqa: BLE001 - whatever is in there
        return False


def _find(name: str) -> type[Exception] | None:
    module, _, path = name.partition(_SEPARATOR)
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _make(step: str, kind: type[Exception], kept: dict[str, Any]) -> Exception | None:
    """Make an error of its class with its arguments, else without its ``__init__``.

    That may take something else than what it makes ``args`` of.
    """
    if "group" in kept:
        return _group(step, kind, kept)
    if "invalid" in kept:
        return _invalid(kept)
    for each in _kinds(kind, kept["message"]):
        for make in (each, partial(kind.__new__, each)):
            with suppress(Exception):
                error = make(*kept["args"])
                vars(error).update(kept["fields"])
                if isinstance(error, kind) and clean(str(error))[:_MAX_TEXT] == kept["message"]:
                    return error
    return None


def _kinds(kind: type[Exception], message: str) -> Iterator[type[Exception]]:
    """Return an error's class, then a subclass of it that says what the error said."""
    yield kind
    with suppress(Exception):  # not every class can have subclasses
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        yield type(kind.__name__, (kind,), {**names, "__str__": lambda _: message})


def _group(step: str, kind: type[Exception], kept: dict[str, Any]) -> Exception:
    """Make a group of what was in it, plain where its class wants something else."""
    errors = [_restore(step, each) for each in kept["group"]]
    error: Any = None
    with suppress(Exception):
        error = kind(*kept["args"], errors)
    return error if isinstance(error, kind) else ExceptionGroup(kept["args"][0], errors)


def _invalid(kept: dict[str, Any]) -> Exception | None:
    """Make pydantic's error of its parts; its class has no other way."""
    parts = [
        InitErrorDetails(
            type=PydanticCustomError(each["type"], cast("LiteralString", each["msg"])),
            loc=tuple(each["loc"]),
            input=each["input"],
        )
        for each in kept["invalid"]
    ]
    with suppress(Exception):
        return ValidationError.from_exception_data(kept["args"][0], parts)
    return None
