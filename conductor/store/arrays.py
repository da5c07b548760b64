"""Array parameters of the hot path, encoded at the speed of joining bytes.

psycopg adapts a list value by value, which costs more than the job it stands for. Integers travel
as an array literal (text), JSON and text as a binary array ("array_recv" in PostgreSQL's
arrayfuncs.c: dimensions, a null flag, the element type, length and lower bound, then each element
with its length). This module must not know what the arrays mean.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from psycopg.adapt import Dumper
from psycopg.pq import Format

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from psycopg.abc import AdaptContext

_HEADER = Struct("!iiIii").pack  # dimensions, has nulls, element type, length, lower bound
_NULL = b"\xff\xff\xff\xff"
_JSON_OID, _JSON_ARRAY_OID = 114, 199
_TEXT_OID, _TEXT_ARRAY_OID = 25, 1009


def literal(values: Iterable[object]) -> str:
    """Return an array literal of numbers, or of other values whose text needs no quoting.

    >>> literal([1, None, 3])
    '{1,NULL,3}'
    """
    return "{" + ",".join(["NULL" if v is None else str(v) for v in values]) + "}"


def timestamp(instant: datetime | None) -> str | None:
    """Return an instant as an element of an array literal."""
    return None if instant is None else f'"{instant.isoformat()}"'


def _encode(element_oid: int, elements: Sequence[bytes | None]) -> bytes:
    parts = [_HEADER(1, 1, element_oid, len(elements), 1)]
    append = parts.append
    for element in elements:
        if element is None:
            append(_NULL)
        else:
            append(len(element).to_bytes(4, "big"))
            append(element)
    return b"".join(parts)


class JsonArray:
    """A json[] parameter of JSON texts."""

    __slots__ = ("data",)

    def __init__(self, documents: Sequence[bytes | None]) -> None:
        self.data = _encode(_JSON_OID, documents)


class TextArray:
    """A text[] parameter."""

    __slots__ = ("data",)

    def __init__(self, texts: Sequence[str | None]) -> None:
        self.data = _encode(_TEXT_OID, [None if t is None else t.encode() for t in texts])


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: JsonArray | TextArray) -> bytes:
        return obj.data


class _JsonArrayDumper(_ArrayDumper):
    oid = _JSON_ARRAY_OID


class _TextArrayDumper(_ArrayDumper):
    oid = _TEXT_ARRAY_OID


def register_arrays(context: AdaptContext) -> None:
    """Let a connection take `JsonArray` and `TextArray` as parameters."""
    adapters: Any = context.adapters
    adapters.register_dumper(JsonArray, _JsonArrayDumper)
    adapters.register_dumper(TextArray, _TextArrayDumper)
