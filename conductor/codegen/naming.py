"""Python names for what PostgreSQL names freely. Deterministic and pure."""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from typing import Final, TypeVar

Key = TypeVar("Key")

_NOT_WORD: Final = re.compile(r"\W+")
_BREAK: Final = re.compile(r"[\W_]+")


def class_name(*parts: str) -> str:
    """Return schema and name as one class name.

    >>> class_name("public", "user_contacts"), class_name("shop", "odd name!")
    ('PublicUserContacts', 'ShopOddName')
    """
    words = (word for part in parts for word in _BREAK.split(_normal(part)) if word)
    return _usable(_identifier("".join(word[0].upper() + word[1:] for word in words), "T"))


def field_name(column: str) -> str:
    """Return the name of the field of a column: the column's own wherever Python allows it.

    >>> [field_name(name) for name in ("userId", "odd name", "_id", "2fa", "class")]
    ['userId', 'odd_name', 'id', 'column_2fa', 'class_']
    """
    name = _NOT_WORD.sub("_", _normal(column)).lstrip("_")
    return _usable(_identifier(name, "column_"))


def label_name(label: str) -> str:
    """Return the name of the member of an enum's label.

    >>> [label_name(label) for label in ("in progress", "2nd", "", "-")]
    ['IN_PROGRESS', 'LABEL_2ND', 'EMPTY', 'LABEL_']
    """
    if not label:
        return "EMPTY"
    name = _identifier(_NOT_WORD.sub("_", _normal(label).upper()).strip("_"), "LABEL_")
    return name if name.isidentifier() else "LABEL_"


def assign(
    keys: Iterable[Key], natural: Callable[[Key], str], taken: Collection[str] = ()
) -> dict[Key, str]:
    """Return a name of its own for each key, the natural one where it can be.

    Of several with one natural name, the first keeps it; a key that is spelt like its natural name
    comes before all others. ``taken`` names get an underscore.

    >>> assign(["a b", "a_b", "str"], lambda key: key.replace(" ", "_"), {"str"})
    {'a b': 'a_b_2', 'a_b': 'a_b', 'str': 'str_'}
    """
    wanted = {key: natural(key) for key in keys}
    used: set[object] = set(taken)
    names: dict[Key, str] = {}
    for key in sorted(wanted, key=lambda key: wanted[key] != key or key in used):
        base = wanted[key]
        names[key] = next(name for name in _variants(base, taken) if name not in used)
        used.add(names[key])
    return {key: names[key] for key in wanted}


def _variants(base: str, taken: Collection[str]) -> Iterable[str]:
    if base in taken:
        base = f"{base}_"
    yield base
    number = 2
    while True:
        yield f"{base}_{number}" if not base.endswith("_") else f"{base}{number}"
        number += 1


def _usable(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


def _normal(name: str) -> str:
    """Return the form that Python compares identifiers in."""
    return unicodedata.normalize("NFKC", name)


def _identifier(name: str, prefix: str) -> str:
    if name.isidentifier():
        return name
    prefixed = prefix + name
    if prefixed.isidentifier():
        return prefixed
    kept = "".join(char for char in name if f"a{char}".isidentifier())
    return prefix + kept
