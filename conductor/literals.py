r"""PostgreSQL's text of arrays, records and ranges, taken apart.

The router passes values of types it cannot know (enum arrays, composites, ranges) as the server's
text. Grammar: "Array Input and Output Syntax", "Composite Type Input and Output Syntax" and "Range
Types, Input/Output" of PostgreSQL's manual. Elements stay text. Raises ValueError. Pure.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_ARRAY_TOKEN: Final = re.compile(r'"((?:[^"\\]|\\.)*)"|([^{}",]+)|([{},])', re.DOTALL)
_SUBSCRIPTS: Final = re.compile(r"(\[-?\d+:-?\d+\])+=")
_FIELD: Final = re.compile(r'(?:"(?:[^"\\]|\\.|"")*"|\\.|[^",()\\])*', re.DOTALL)
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.|"")*)"|\\(.)', re.DOTALL)
_BOUND: Final = r'((?:"(?:[^"\\]|\\.|"")*"|\\.|[^",()\[\]\\])*)'
_RANGE: Final = re.compile(rf"([\[(]){_BOUND},{_BOUND}([\])])", re.DOTALL)
_INNER_RANGE: Final = re.compile(rf"[\[(]{_BOUND},{_BOUND}[\])]", re.DOTALL)


class Bounds(NamedTuple):
    """A range that is not empty; a bound that is None is infinite."""

    lower: str | None
    upper: str | None
    lower_inclusive: bool
    upper_inclusive: bool


def parse_array(text: str) -> list[Any]:
    """Return the elements as text or None, nested as the dimensions are; subscripts are dropped.

    >>> parse_array('{a,"b c",NULL,"NULL"}')
    ['a', 'b c', None, 'NULL']
    >>> parse_array("[2:3]={7,8}")
    ['7', '8']
    """
    start = _SUBSCRIPTS.match(text)
    rest = text[start.end() :] if start else text
    stack: list[list[Any]] = [[]]
    position = 0
    while position < len(rest):
        token = _ARRAY_TOKEN.match(rest, position)
        if token is None:
            raise ValueError("not an array")
        position = token.end()
        quoted, bare, mark = token.groups()
        if quoted is not None:
            stack[-1].append(_ESCAPED.sub(r"\1", quoted))
        elif bare is not None:
            stack[-1].append(None if bare == "NULL" else bare)
        elif mark == "{":
            stack.append([])
        elif mark == "}":
            closed = stack.pop()
            if not stack:
                raise ValueError("not an array")
            stack[-1].append(closed)
    if len(stack) != 1 or len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise ValueError("not an array")
    return stack[0][0]


def is_vector(text: str) -> bool:
    """Return whether a text is pgvector's, which is JSON, and no array with subscripts.

    >>> is_vector("[1,2.5]"), is_vector("[2:3]={7,8}")
    (True, False)
    """
    return text.startswith("[") and not _SUBSCRIPTS.match(text)


def parse_record(text: str) -> list[str | None]:
    r"""Return the fields of a composite value.

    >>> parse_record('(1,"a b\\\\",,"")')
    ['1', 'a b\\', None, '']
    """
    if text[:1] != "(" or text[-1:] != ")":
        raise ValueError("not a record")
    fields: list[str | None] = []
    position, end = 1, len(text) - 1
    while True:
        field = _FIELD.match(text, position, end)
        raw = field[0] if field is not None else ""
        fields.append(_unquote(raw) if raw else None)
        position += len(raw)
        if position == end:
            return fields
        if text[position] != ",":
            raise ValueError("not a record")
        position += 1


def parse_range(text: str) -> Bounds | None:
    """Return the bounds of a range; None for the empty one.

    >>> parse_range("[1,5)")
    Bounds(lower='1', upper='5', lower_inclusive=True, upper_inclusive=False)
    """
    if text == "empty":
        return None
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError("not a range")
    opening, lower, upper, closing = match.groups()
    return Bounds(
        _unquote(lower) if lower else None,
        _unquote(upper) if upper else None,
        opening == "[",
        closing == "]",
    )


def parse_multirange(text: str) -> list[str]:
    """Return the text of each range of a multirange.

    >>> parse_multirange("{[1,2),[5,)}")
    ['[1,2)', '[5,)']
    """
    if text[:1] != "{" or text[-1:] != "}":
        raise ValueError("not a multirange")
    ranges: list[str] = []
    position, end = 1, len(text) - 1
    while position < end:
        found = _INNER_RANGE.match(text, position, end)
        if found is None or (found.end() < end and text[found.end()] != ","):
            raise ValueError("not a multirange")
        ranges.append(found[0])
        position = found.end() + 1
    return ranges


def quote_bound(text: str) -> str:
    """Return a bound as the text of a range holds it: quoted where it must be.

    >>> quote_bound("2026-01-01 00:00:00")
    '"2026-01-01 00:00:00"'
    """
    if text and not re.search(r'[\s"\\,()\[\]]', text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '""') + '"'


def _unquote(raw: str) -> str:
    """Take quotes and escapes away; within quotes a doubled quote is one."""
    if '"' not in raw and "\\" not in raw:
        return raw
    return _QUOTED.sub(_plain, raw)


def _plain(match: re.Match[str]) -> str:
    inner, escaped = match.groups()
    if inner is None:
        return str(escaped)
    return re.sub(r'\\(.)|""', lambda m: m[1] or '"', inner, flags=re.DOTALL)
