"""Migrations: bring the schema ``conductor`` of a database to what this code expects.

Numbered files of ``sql/migrations`` are applied in order, each in a transaction of its own that
also records its checksum, one process at a time. A recorded migration never changes: a file with
another checksum, or a record this code does not know, is refused before anything is written.
Workers that run meanwhile end, unless a file has the line ``-- workers from 0003 go on``: those
that know that migration then do. The role needs no more than owning the database (or CREATE on it).
This module must not know what a migration does.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import psycopg

from conductor import sql
from conductor.dsn import parse_dsn
from conductor.errors import DatabaseUnavailable, MigrationMismatch, PrivilegeMissing
from conductor.logins import login_refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import AsyncConnection

_QUERIES: Final = sql.load("migrations")
_GO_ON: Final = re.compile(rb"^-- workers from (\d{4}) go on", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file. ``checksum`` is the SHA-256 of its bytes, in hex.

    ``workers_from``: the oldest migration whose workers go on with it; None: none older.
    """

    number: int
    name: str
    statements: bytes
    checksum: str
    workers_from: int | None = None

    @classmethod
    def from_file(cls, filename: str, content: bytes) -> Migration:
        """Read ``0001_initial.sql`` and the like; raises ValueError for another form of name.

        >>> Migration.from_file("0001_initial.sql", b"select 1").name
        'initial'
        """
        number, _, name = filename.removesuffix(".sql").partition("_")
        if not number.isdecimal() or not name:
            raise ValueError(f"{filename!r} is not named like 0001_initial.sql")
        go_on = _GO_ON.search(content)
        workers_from = None if go_on is None else int(go_on[1])
        return cls(int(number), name, content, sha256(content).hexdigest(), workers_from)

    def __str__(self) -> str:
        return f"{self.number:04}_{self.name}"


@cache
def known_migrations() -> tuple[Migration, ...]:
    """Return the migrations of this code in order; raises ValueError when a number is missing."""
    folder = files(sql).joinpath("migrations")
    found = sorted(
        (
            Migration.from_file(file.name, file.read_bytes())
            for file in folder.iterdir()
            if file.name.endswith(".sql")
        ),
        key=lambda migration: migration.number,
    )
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError("migrations are not numbered 1, 2, 3 … without a gap")
    return tuple(found)


def pending_of(
    known: Sequence[Migration], recorded: Sequence[tuple[int, str, str]]
) -> tuple[Migration, ...]:
    """Return those of ``known`` that ``recorded`` (number, name, checksum) lacks.

    Raises MigrationMismatch when the record holds a migration this code does not have, has with
    another content, or lacks one that is older than a recorded one.
    """
    by_number = {migration.number: migration for migration in known}
    for number, name, checksum in recorded:
        migration = by_number.pop(number, None)
        if migration is None:
            raise MigrationMismatch(
                f"the database has migration {number:04}_{name}, which is newer than this code"
                f" (it knows {len(known)}): run a version of pgconductor at least as new"
            )
        if migration.checksum != checksum:
            raise MigrationMismatch(
                f"migration {migration} was applied with checksum {checksum[:12]}, but its file has"
                f" {migration.checksum[:12]}: restore the released file"
            )
    if recorded and by_number and min(by_number) < recorded[-1][0]:
        raise MigrationMismatch(
            f"the database has migration {recorded[-1][0]:04} but not {min(by_number):04}"
        )
    return tuple(by_number.values())


def _recorded(connection: psycopg.Connection[Any]) -> list[tuple[int, str, str]]:
    if not _scalar(connection, "has_record"):
        return []
    return connection.execute(_QUERIES["recorded"]).fetchall()


def _scalar(connection: psycopg.Connection[Any], query: str) -> Any:
    row = connection.execute(_QUERIES[query]).fetchone()
    return None if row is None else row[0]


def _connect(dsn: str) -> psycopg.Connection[Any]:
    parse_dsn(dsn)
    try:
        return psycopg.connect(
            dsn,
            autocommit=True,
            application_name="conductor migrate",
        )
    except psycopg.OperationalError as error:
        if refused := login_refused(error):
            raise refused from error
        raise DatabaseUnavailable(f"cannot connect to the database: {error}") from error


@contextmanager
def _asked(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Lend a connection for questions; one that is lost meanwhile may be tried again."""
    with _connect(dsn) as connection:
        try:
            yield connection
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(f"lost the database while asking it: {error}") from error


def pending_migrations(dsn: str) -> tuple[Migration, ...]:
    """Return what `migrate` would apply; changes nothing.

    Raises DatabaseUnavailable, LoginRefused and MigrationMismatch.
    """
    with _asked(dsn) as connection:
        return pending_of(known_migrations(), _recorded(connection))


def check_migrated(dsn: str) -> None:
    """Raise MigrationMismatch unless workers of this code can use the database as it is.

    It has every migration of this code, and none that ends workers as old. Raises
    DatabaseUnavailable, LoginRefused and PrivilegeMissing.
    """
    known = known_migrations()
    newest = known[-1].number
    try:
        with _asked(dsn) as connection:
            recorded = _recorded(connection)
            ending = None
            if recorded and recorded[-1][0] > newest:
                ending = connection.execute(_QUERIES["ending"], {"known": newest}).fetchone()
    except psycopg.errors.InsufficientPrivilege as error:
        raise PrivilegeMissing(error.diag.message_primary or str(error)) from error
    if ending is not None:
        raise superseded(*ending)
    pending = pending_of(known, [row for row in recorded if row[0] <= newest])
    if pending:
        raise MigrationMismatch(f"the database lacks migration {', '.join(map(str, pending))}")


async def check_current(connection: AsyncConnection[Any]) -> None:
    """Raise MigrationMismatch when a migration has come that ends workers as old as these."""
    known = known_migrations()[-1].number
    cursor = await connection.execute(_QUERIES["ending"], {"known": known})
    ending = await cursor.fetchone()
    if ending is not None:
        raise superseded(*ending)


def superseded(number: int, name: str) -> MigrationMismatch:
    """Return the error that says why workers of this code end."""
    known = known_migrations()[-1].number
    return MigrationMismatch(
        f"the database has migration {number:04}_{name}, which workers of this version cannot use"
        f" (they know {known:04})",
        hint="Start workers of the version that brought the migration; jobs wait for them.",
    )


def migrate(dsn: str) -> tuple[Migration, ...]:
    """Apply what is pending and return it. Safe to call from many processes at once.

    Raises DatabaseUnavailable, ConfigError and MigrationMismatch; a failing migration leaves
    nothing behind and raises what the server said.

    >>> [str(m) for m in migrate("postgresql://app@db/app")]  # doctest: +SKIP
    ['0001_initial']
    """
    applied: list[Migration] = []
    with _connect(dsn) as connection:
        while migration := _apply_next(connection):
            applied.append(migration)
    return tuple(applied)


def _apply_next(connection: psycopg.Connection[Any]) -> Migration | None:
    with connection.transaction():
        connection.execute(_QUERIES["set_session"])
        connection.execute(_QUERIES["lock_migrations"])
        pending = pending_of(known_migrations(), _recorded(connection))
        if not pending:
            return None
        if not _scalar(connection, "has_schema"):
            connection.execute(_QUERIES["create_schema"])
        connection.execute(_QUERIES["create_record"])
        connection.execute(_QUERIES["extend_record"])
        migration = pending[0]
        connection.execute(migration.statements)
        connection.execute(
            _QUERIES["record"],
            {
                "number": migration.number,
                "name": migration.name,
                "checksum": migration.checksum,
                "workers_from": migration.workers_from,
            },
        )
    return migration
