"""Connections to both databases, and the names of what goes wrong on them.

`connect_source` fixes every setting that changes how values are rendered; `connect_queue` sets
nothing at start-up, so that it works through a transaction pooler. Both give autocommit
connections whose errors the two context managers turn into `CdcError`s. A message never holds a
connection string: libpq quotes pieces of one, and a piece may be the password.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row

from cdc.errors import (
    CdcError,
    ConfigError,
    PrivilegeMissing,
    QueueUnavailable,
    SinkError,
    SourceUnavailable,
    WalLevelTooLow,
)
from cdc.queries import SCHEMA_CLOSED, SESSION_SETTINGS
from conductor.dsn import read_dsn
from conductor.logins import is_login_refused

Connection = psycopg.AsyncConnection[DictRow]

CONNECT_TIMEOUT_S: Final = 10
_ANSWER_S: Final = 10.0  # a first statement's
_CONNECTION_CLASSES: Final = ("08", "53", "57", "58")
"""SQLSTATE classes of a server that is away, full, shutting down or ill: trying again can help."""

_ABOUT_ROWS: Final = ("22", "23")
"""SQLSTATE classes whose errors may quote a row in their detail."""

_GUESSES: Final = ("This probably means", "before or while", "Is the server running")
_NO_REPLICATION: Final = re.compile(
    r"replication role"  # until 15: must be superuser or replication role to start walsender
    r"|to start WAL sender"  # from 16
    r"|for replication connection"  # no pg_hba.conf entry
)


async def connect_source(
    dsn: str, *, application_name: str, replication: bool = False, wal_sender_timeout_s: float = 60
) -> Connection:
    """Open an autocommit connection on which every value is rendered the way `cdc` reads it.

    Args:
        dsn: a libpq connection string.
        application_name: what pg_stat_activity shows.
        replication: a walsender of that database instead of an ordinary backend.
        wal_sender_timeout_s: after how long the server drops a client that does not answer.

    Raises:
        SourceUnavailable: it cannot be reached now.
        ConfigError, PrivilegeMissing: it will not let us in, now or later.
    """
    settings = [
        *SESSION_SETTINGS,
        ("wal_sender_timeout", f"{round(wal_sender_timeout_s * 1000)}ms"),
    ]
    given = parse_dsn(dsn, "CDC_SOURCE_DSN").get("options") or ""
    options = " ".join([given, *(f"-c {name}={_escape(value)}" for name, value in settings)])
    extra: dict[str, Any] = {"replication": "database"} if replication else {}
    with source_errors():
        return await _connect(dsn, application_name, options=options.strip(), **extra)


def listener_name(slot: str) -> str:
    """Return what the connection is called on which each sidecar of a slot listens."""
    return f"cdc {slot} listener"


async def connect_queue(dsn: str, *, application_name: str) -> Connection:
    """Open an autocommit connection to the queue database.

    Raises:
        QueueUnavailable: it cannot be reached now.
        ConfigError, PrivilegeMissing: it will not let us in, now or later.
    """
    parse_dsn(dsn, "CDC_QUEUE_DSN")
    with queue_errors():
        connection = await _connect(dsn, application_name)
        try:
            async with asyncio.timeout(_ANSWER_S):
                await _check_schema(connection)
        except TimeoutError:
            await connection.close()
            raise QueueUnavailable(
                f"the queue database has not answered within {_ANSWER_S:g} s; a pooler in between "
                "may have no connection to spare"
            ) from None
        except BaseException:
            await connection.close()
            raise
    return connection


def parse_dsn(dsn: str, setting: str) -> dict[str, Any]:
    """Return the parameters of a connection string; raise `ConfigError` without quoting it."""
    parameters = read_dsn(dsn)
    if parameters is None:
        raise ConfigError(
            f"{setting} is not a connection string",
            hint="write it as postgresql://role@host:5432/database, special characters as %XX",
        )
    return parameters


def describe_dsn(dsn: str) -> str:
    """Return who and where, for a log: `role@host:5432/database`."""
    parts = parse_dsn(dsn, "the DSN")
    where = parts.get("host") or parts.get("hostaddr") or "local"
    return f"{parts.get('user', '')}@{where}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"


def is_same_server(one: str, other: str) -> bool:
    """Tell whether two connection strings lead to one server, as far as they say."""
    parts = [parse_dsn(dsn, "the DSN") for dsn in (one, other)]
    places = [(p.get("host") or p.get("hostaddr"), str(p.get("port") or 5432)) for p in parts]
    return places[0] == places[1]


@contextmanager
def source_errors() -> Iterator[None]:
    """Turn the driver's errors on a connection to the source database into ours."""
    try:
        yield
    except psycopg.Error as error:
        raise source_error(error) from error


@contextmanager
def queue_errors() -> Iterator[None]:
    """Turn the driver's errors on a connection to the queue database into ours."""
    try:
        yield
    except psycopg.Error as error:
        raise queue_error(error) from error


def source_error(error: psycopg.Error) -> CdcError:
    """Name an error of the source database."""
    text = one_line(error)
    if refusal := _refusal(error, text, "CDC_SOURCE_DSN"):
        return refusal
    if "wal_level" in text:
        return WalLevelTooLow(f"the source server: {text}")
    if error.sqlstate == "42501":
        return PrivilegeMissing(f"the source database: {text}")
    return SourceUnavailable(f"the source database: {text}")


def queue_error(error: psycopg.Error) -> CdcError:
    """Name an error of the queue database."""
    text = one_line(error)
    if refusal := _refusal(error, text, "CDC_QUEUE_DSN"):
        return refusal
    if error.sqlstate in {"42P01", "3F000", "42703", "42883"}:
        return ConfigError(
            f"the queue database has no (current) schema conductor: {text}",
            hint="run `conductor migrate` there, or correct CDC_QUEUE_DSN",
        )
    if error.sqlstate == "42501":
        return PrivilegeMissing(
            f"the queue database: {text}", hint="grant the role its rights on schema conductor"
        )
    if is_connection_error(error):
        return QueueUnavailable(f"the queue database: {text}")
    return SinkError(f"the queue database: {text}")


def is_connection_error(error: psycopg.Error) -> bool:
    """Whether the server, or the way to it, is away: a matter of time."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate[:2] in _CONNECTION_CLASSES


def one_line(error: BaseException) -> str:
    """Return an error's text as one line: no guesses of libpq, no place in a statement, no row."""
    if isinstance(error, psycopg.Error) and (said := error.diag.message_primary):
        may_quote_rows = (error.sqlstate or "")[:2] in _ABOUT_ROWS
        detail = None if may_quote_rows else error.diag.message_detail
        return " ".join(f"{said} DETAIL: {detail}".split() if detail else said.split())
    lines = [line.strip() for line in str(error).splitlines()]
    facts = [line for line in lines if line and not line.startswith(_GUESSES)]
    return " ".join(facts[:2]).removeprefix("connection failed: ") or type(error).__name__


def _refusal(error: psycopg.Error, text: str, setting: str) -> CdcError | None:
    """Name a refused login. Before there is a connection there is no SQLSTATE, only the text."""
    if error.sqlstate is None and _NO_REPLICATION.search(text):
        return PrivilegeMissing(text)
    hint = f"correct {setting}, or the server's roles and pg_hba.conf"
    return ConfigError(text, hint=hint) if is_login_refused(error) else None


async def _check_schema(connection: Connection) -> None:
    """Raise what our role lacks. It is to be a member of the owner, unless that may do anything."""
    facts = await (await connection.execute(SCHEMA_CLOSED)).fetchone()
    if facts is None:
        return
    hint: str = facts["statement"]
    if facts["is_superuser"]:
        hint = (
            f"schema conductor is a superuser's ({facts['owner']}): let an ordinary role own it, "
            "of which this one is a member (deploy/postgres/roles.sh)"
        )
    raise PrivilegeMissing(
        f"the queue database: role {facts['role']!r} may not use schema conductor", hint=hint
    )


async def _connect(dsn: str, application_name: str, **parameters: Any) -> Connection:
    given = conninfo_to_dict(dsn)
    return await psycopg.AsyncConnection.connect(
        dsn,
        autocommit=True,
        prepare_threshold=None,
        row_factory=dict_row,
        client_encoding="UTF8",
        application_name=given.get("application_name") or application_name,
        connect_timeout=int(given.get("connect_timeout") or CONNECT_TIMEOUT_S),
        **parameters,
    )


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")
