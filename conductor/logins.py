"""Whether a server will let a role in: what waiting does not change, told from what it does.

Before there is a connection libpq knows no SQLSTATE, only the server's words: those of the classes
28 and 3D, and of databases closed to the role. A server that starts, is full or is away says
something else, or nothing. Shared with the router. This module must not connect.
"""

from __future__ import annotations

import re
from typing import Final

import psycopg

from conductor.errors import LoginRefused

_CLASSES: Final = frozenset({"28", "3D"})
_WORDS: Final = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|pg_hba\.conf rejects"
    r'|(?:role|database) "[^"]*" (?:does not exist|is not permitted to log in)'
    r"|is not currently accepting connections|permission denied for database"
)


def is_login_refused(error: psycopg.Error) -> bool:
    """Return whether a failed attempt to connect will fail again until somebody changes something.

    >>> is_login_refused(psycopg.OperationalError('FATAL:  database "shpo" does not exist'))
    True
    >>> is_login_refused(psycopg.OperationalError("FATAL:  the database system is starting up"))
    False
    """
    if error.sqlstate is None:
        return _WORDS.search(str(error)) is not None
    return error.sqlstate[:2] in _CLASSES


def login_refused(error: psycopg.Error, to: str = "the database") -> LoginRefused | None:
    """Return the name of a failed attempt to connect that is no matter of time; otherwise None."""
    if not is_login_refused(error):
        return None
    return LoginRefused(f"cannot log in to {to}: {' '.join(str(error).split())}")
