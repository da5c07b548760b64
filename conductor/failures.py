"""The error of a step that has failed for good: kept as JSON, and raised again in later runs.

An error is made again of its class, its arguments and its attributes, as far as these are plain
values. Its class must be found where it was, in a module that is imported already: nothing is
imported, and nothing but an exception is ever made. Pure: errors in, documents out, and back.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import Any, Final

from orjson import loads
from pydantic_core import to_json

from conductor.errors import StepFailed
from conductor.texts import clean, to_document

_MAX_TEXT: Final = 10_000  # characters of a message
_SEPARATOR: Final = ":"


def describe(error: Exception) -> bytes:
    """Return an error as a step keeps it.

    >>> describe(ValueError("card"))
    b'{"type":"builtins:ValueError","message":"card","args":["card"],"fields":{}}'
    """
    kind = type(error)
    return to_json(
        {
            "type": clean(f"{kind.__module__}{_SEPARATOR}{kind.__qualname__}"),
            "message": clean(_message(error))[:_MAX_TEXT],
            "args": [arg if _is_plain(arg) else clean(_text(arg)) for arg in error.args],
            "fields": {name: value for name, value in vars(error).items() if _is_plain(value)},
        }
    )


def restore(step: str, document: bytes) -> Exception:
    """Return the error that a step has failed with, to be raised again.

    Where it cannot be made again it is StepFailed, with its type and its message.

    >>> restore("pay", describe(KeyError("card")))
    KeyError('card')
    """
    kept: dict[str, Any] = loads(document)
    kind = _find(kept["type"])
    error = None if kind is None else _make(kind, kept)
    if error is None:
        _, _, name = kept["type"].rpartition(_SEPARATOR)
        error = StepFailed(f"step {step!r} has failed: {name}: {kept['message']}")
    error.add_note(f"Step {step!r} failed so in an earlier run, which the handler went on from.")
    return error


def _message(error: Exception) -> str:
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


def _make(kind: type[Exception], kept: dict[str, Any]) -> Exception | None:
    """Make an error of its class with its arguments, else without its ``__init__``.

    That may take something else than what it makes ``args`` of.
    """
    for make in (kind, partial(kind.__new__, kind)):
        with suppress(Exception):
            error = make(*kept["args"])
            vars(error).update(kept["fields"])
            if clean(str(error))[:_MAX_TEXT] == kept["message"]:
                return error
    return None
