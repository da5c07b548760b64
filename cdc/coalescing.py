"""Several changes of one row as one job: the latest wins, and what the WAL left out is not lost.

A job's payload is put together from those of two changes without parsing a value: numbers keep
their digits, JSON its text. What becomes of two changes::

    insert, update  ->  insert of the latest row
    update, update  ->  update: the old row of the first, the new one of the second, both changes
    delete, insert  ->  insert
    …,      delete  ->  delete

A large value that an update did not touch is not in the WAL (``unchanged``); it is taken from the
change before it, if that has it and every change of the row gets here. Pure: payloads in, payloads
out.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import orjson

from conductor.contract import JobSpec

Members = dict[bytes, bytes]
"""A JSON object: name → value, each as its text."""

_NAME: Final = re.compile(rb'\s*"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*', re.DOTALL)
_SCALAR: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^\s,\]}]+', re.DOTALL)
_BRACKET: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def fold(specs: Iterable[JobSpec]) -> list[JobSpec]:
    """Return one job for each subscription and key, in the order in which they first come."""
    folded: dict[tuple[bytes, str | None], JobSpec] = {}
    for spec in specs:
        name = spec.head[-8:], spec.key
        before = folded.get(name)
        if before is not None:
            payload = merge(before.payload, spec.payload, fills=spec.fills)
            folded[name] = replace(spec, payload=payload, fills=spec.fills and before.fills)
        else:
            folded[name] = spec
    return list(folded.values())


def merge(pending: bytes, latest: bytes, *, fills: bool = True) -> bytes:
    """Return the payload that stands for two changes of one row, given in their order.

    ``fills``: nothing has become of the row in between, so one has what the other lacks.

    >>> merge(b'{"op":"insert","new":{"a":1}}', b'{"op":"update","new":{"a":2}}')
    b'{"op":"insert","new":{"a":2}}'
    """
    before, after = members(pending), members(latest)
    if after[b'"op"'] == b'"delete"' or before[b'"op"'] == b'"delete"':
        return latest
    filled = _filled(members(before[b'"new"']), after) if fills else {}
    merged = after | filled
    if before[b'"op"'] == b'"insert"':
        merged[b'"op"'] = b'"insert"'
        merged.pop(b'"old"', None)
        merged.pop(b'"changed"', None)
    elif after[b'"op"'] == b'"update"':
        merged |= {name: before[name] for name in (b'"old"',) if name in before}
        merged |= _changed(before, after)
    return _object(merged)


def _filled(row: Members, after: Members) -> Members:
    """Return the latest row with the values that it left out, and what is still unknown."""
    if b'"unchanged"' not in after:
        return {}
    new, unknown = members(after.pop(b'"new"')), []
    for name in orjson.loads(after.pop(b'"unchanged"')):
        text = orjson.dumps(name)
        if text in row:
            new[text] = row[text]
        else:
            unknown.append(name)
    filled = {b'"new"': _object(new)}
    return filled | {b'"unchanged"': orjson.dumps(unknown)} if unknown else filled


def _changed(before: Members, after: Members) -> Members:
    both = [change.get(b'"changed"') for change in (before, after)]
    first, second = both
    if first is None or second is None:  # nobody can tell
        return {}
    return {
        b'"changed"': orjson.dumps(list(dict.fromkeys(orjson.loads(first) + orjson.loads(second))))
    }


def _object(given: Members) -> bytes:
    return b"{" + b",".join([name + b":" + value for name, value in given.items()]) + b"}"


def members(text: bytes) -> Members:
    r"""Split a JSON object into its members, without reading their values.

    >>> members(b'{"a": 1.10, "b":{"c":["}"]}}')
    {b'"a"': b'1.10', b'"b"': b'{"c":["}"]}'}
    """
    found: Members = {}
    at = text.index(b"{") + 1
    while (name := _NAME.match(text, at)) is not None:
        end = _end_of_value(text, name.end())
        found[name.group().rstrip(b": \t\r\n").lstrip()] = text[name.end() : end]
        comma = text.find(b",", end)
        if comma < 0 or text[end:comma].strip():
            break
        at = comma + 1
    return found


def _end_of_value(text: bytes, start: int) -> int:
    if text[start] not in b"[{":
        scalar = _SCALAR.match(text, start)
        assert scalar is not None  # noqa: S101 - the server has read it as JSON
        return scalar.end()
    depth = 0
    for token in _BRACKET.finditer(text, start):
        if token.group() in {b"{", b"["}:
            depth += 1
        elif token.group() in {b"}", b"]"}:
            depth -= 1
            if depth == 0:
                return token.end()
    raise ValueError("a payload that is not JSON")
