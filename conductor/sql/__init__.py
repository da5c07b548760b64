"""Named queries: the only place where the queue's SQL lives, besides the numbered migrations.

A file ``queries/<group>.sql`` holds statements, each under a line ``-- name: <query>``. Lines that
are comments are for readers and are not sent. Statements are psycopg queries: ``%s`` or
``%(name)s`` are placeholders, a literal per cent sign is doubled. This module must not run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Final

_NAME: Final = "-- name:"


def parse(text: str) -> dict[str, bytes]:
    r"""Split the text of a query file into its named statements.

    Bytes, because psycopg takes them as a query as they are and no text of a user is one.
    Raises ValueError for a statement without a name, a name without a statement, or a name used
    twice.

    >>> parse("-- name: one\n-- Says one.\nselect 1\n")
    {'one': b'select 1'}
    """
    queries: dict[str, bytes] = {}
    preamble, *sections = f"\n{text}".split(f"\n{_NAME}")
    if _statement(preamble):
        raise ValueError("a statement stands before the first name")
    for section in sections:
        head, _, body = section.partition("\n")
        name, statement = head.strip(), _statement(body)
        if not name.isidentifier() or not statement:
            raise ValueError(f"query {name!r} has no usable name or no statement")
        if name in queries:
            raise ValueError(f"query {name!r} is defined twice")
        queries[name] = statement.encode()
    return queries


def _statement(body: str) -> str:
    lines = (line.rstrip() for line in body.splitlines())
    kept = (line for line in lines if line and not line.lstrip().startswith("--"))
    return "\n".join(kept).rstrip(";")


@cache
def load(group: str) -> Mapping[str, bytes]:
    """Return the statements of ``queries/<group>.sql`` by name. Read once a process.

    Modules look their statements up when imported, so a missing one fails at start:

        _QUERIES = load("jobs")
        _CLAIM = _QUERIES["claim_jobs"]
    """
    return MappingProxyType(parse(files(__name__).joinpath(f"queries/{group}.sql").read_text()))
