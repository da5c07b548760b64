"""Text that PostgreSQL can hold: no NUL, no lone surrogate.

Python strings may have both: NUL comes from binary data, a lone surrogate from bytes that were no
UTF-8. A ``json`` column takes the escape of a NUL, and then fails whoever reads a field of it in
SQL; so what is stored is checked before. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import from_json, to_json

HINT: Final = "Take the character out, or send bytes as base64."

_ESCAPED_NUL: Final = b"\\u0000"

Place = tuple[str | int, ...]
"""The way to a value within a document: keys and indexes."""


class TextInvalid(ValueError):  # noqa: N818 - as in conductor.errors
    """A text that PostgreSQL cannot hold.

    ``place`` says where in its document it is, ``hint`` what to do.
    """

    hint: Final = HINT

    def __init__(self, flaw: str, place: Place = ()) -> None:
        super().__init__(f"the text holds {flaw}, which PostgreSQL cannot store")
        self.place = place

    def __str__(self) -> str:
        """Return where it is, and what is wrong."""
        where = ".".join(str(part) for part in self.place)
        return f"{where}: {self.args[0]}" if where else str(self.args[0])


def flaw_of(text: str) -> str | None:
    r"""Return what PostgreSQL would refuse a text for.

    >>> flaw_of("a\0b"), flaw_of("ab")
    ('the character NUL', None)
    """
    if "\0" in text:
        return "the character NUL"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "a lone surrogate (half a character)"
    return None


def check_text(text: str | None) -> None:
    """Raise TextInvalid for a text that PostgreSQL cannot hold."""
    flaw = None if text is None else flaw_of(text)
    if flaw is not None:
        raise TextInvalid(flaw)


def check_document(data: bytes) -> bytes:
    """Return JSON text as it is. Raises TextInvalid where a key or string of it holds NUL."""
    if _ESCAPED_NUL in data:  # a backslash before it may make it other text
        check_value(from_json(data))
    return data


def to_document(value: Any) -> bytes:
    """Return a value as JSON text. Raises TextInvalid, or what pydantic says of other types."""
    try:
        return check_document(to_json(value))
    except TextInvalid:
        raise
    except ValueError:
        check_value(value)
        raise


def clean(text: str) -> str:
    r"""Return a text without what PostgreSQL cannot hold: NUL left out, surrogates as ``?``.

    >>> clean("no \0 luck")
    'no  luck'
    """
    if flaw_of(text) is None:
        return text
    return text.replace("\0", "").encode(errors="replace").decode()


def printable(text: str) -> str:
    r"""Return a text for a terminal: what would steer it is replaced, lines and tabs stay.

    >>> printable("red: \x1b[31m").isprintable()
    True
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def check_value(value: Any) -> None:
    """Raise TextInvalid for the first key or string in a value that PostgreSQL cannot hold."""
    for place, text in _texts(value, ()):
        flaw = flaw_of(text)
        if flaw is not None:
            raise TextInvalid(flaw, tuple(clean(p) if isinstance(p, str) else p for p in place))


def _texts(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, BaseModel):
        yield from _texts(dict(value), place)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _texts(
            {field.name: getattr(value, field.name) for field in fields(value)}, place
        )
    elif isinstance(value, Mapping):
        for key, member in value.items():
            yield (*place, str(key)), str(key)
            yield from _texts(member, (*place, str(key)))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, member in enumerate(value):
            yield from _texts(member, (*place, index))
