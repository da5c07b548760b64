"""Connection strings, read so that no message ever holds a part of one.

libpq quotes what it cannot read, and a piece of a malformed string may be a piece of its password:
after an unescaped ``@`` or ``/`` the rest of a password counts as host, port or database. Such
strings are refused before libpq sees them. Shared with the router. This module must not connect.
"""

from __future__ import annotations

import re
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from conductor.errors import ConfigError

ADVICE: Final = (
    "Such as postgresql://user@host:5432/database, special characters of a password as %XX"
    " ('@' is %40, '/' is %2F)."
)

_URI: Final = re.compile(r"postgres(?:ql)?://(?P<rest>.*)", re.DOTALL)


def parse_dsn(dsn: str) -> dict[str, Any]:
    """Return the parameters of a connection string. Raises ConfigError, which quotes nothing of it.

    >>> parse_dsn("postgresql://me@db/shop")["host"]
    'db'
    """
    parameters = read_dsn(dsn)
    if parameters is None:  # outside of an except block: no trace of libpq's own error is kept
        raise ConfigError("the DSN cannot be read", hint=ADVICE)
    return parameters


def read_dsn(dsn: str) -> dict[str, Any] | None:
    """Return the parameters; None when they cannot be read, or are not what was meant."""
    if "\0" in dsn or not _means_what_it_says(dsn):
        return None
    try:
        parameters = conninfo_to_dict(dsn)
    except (psycopg.Error, UnicodeError):
        return None
    ports = str(parameters.get("port") or "").split(",")
    hosts = str(parameters.get("host") or "")
    is_nested = "://" in str(parameters.get("dbname") or "")  # libpq would take it for a name
    is_readable = (
        "@" not in hosts and not is_nested and all(port.isdecimal() or not port for port in ports)
    )
    return parameters if is_readable else None


def _means_what_it_says(dsn: str) -> bool:
    """Return whether a URI has no ``@`` but the one before its host."""
    uri = _URI.match(dsn)
    if uri is None:
        return True
    authority, slash, path = uri["rest"].partition("/")
    _, at, host = authority.partition("@")
    location = (host if at else authority) + slash + path
    return "@" not in location.partition("?")[0]
