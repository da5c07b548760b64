"""Rows as JSON objects: the text around the values, made once a subscription. Pure."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import orjson

from cdc.wire.messages import UNCHANGED, Unchanged

Fragments = Sequence[bytes | Unchanged]
"""The values of a row, each as JSON."""


class ObjectTemplate:
    """Some columns of a row as a JSON object, perhaps with constant text before it."""

    __slots__ = ("_columns", "_head", "_select", "_template")

    def __init__(self, names: Sequence[str], indexes: Sequence[int], head: bytes = b"") -> None:
        keys = [orjson.dumps(names[i]) + b":" for i in indexes]
        self._columns = [(i, names[i], key) for i, key in zip(indexes, keys, strict=True)]
        self._head = head + b"{"
        pairs = b",".join(key.replace(b"%", b"%%") + b"%b" for key in keys)
        self._template = self._head.replace(b"%", b"%%") + pairs + b"}"
        self._select = _selector(tuple(indexes), len(names))

    @property
    def parts(self) -> tuple[bytes, Callable[[Fragments], tuple[Any, ...]]]:
        """What `render` works with, for the hottest loop: ``template % select(fragments)``."""
        return self._template, self._select

    def render(self, fragments: Fragments) -> bytes:
        """Return the object; every value must be there."""
        return self._template % self._select(fragments)

    def render_present(self, fragments: Fragments) -> tuple[bytes, list[str]]:
        """Return the object of the values that are there, and the names of those that are not."""
        parts: list[bytes] = []
        absent: list[str] = []
        for index, name, key in self._columns:
            fragment = fragments[index]
            if fragment is UNCHANGED:
                absent.append(name)
            else:
                parts.append(key + fragment)
        return self._head + b",".join(parts) + b"}", absent


@lru_cache(maxsize=1024)  # most tables and subscriptions take the same few: they stay warm
def _selector(indexes: tuple[int, ...], width: int) -> Callable[[Any], tuple[Any, ...]]:
    if indexes == tuple(range(width)):
        return tuple
    if len(indexes) > 1:
        return itemgetter(*indexes)
    return lambda fragments: tuple(fragments[i] for i in indexes)
