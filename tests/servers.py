"""Real servers and scratch databases for the integration tests.

A `Cluster` is one running server, ours or the one of `CONDUCTOR_TEST_DSN`. A `ScratchDatabase` is
an empty (or migrated) database in it, with the two ordinary roles of a production setup:

- the application's role owns the database: it migrates, runs workers, and owns the tables;
- the sidecar's role has REPLICATION and is a member of the owner, so that it can publish the
  owner's tables. Neither is a superuser.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from conductor.migrations import migrate
from tools.localpg import PostgresServer

DROP_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.02
LONGEST_POLL_S = 0.1  # each look may be a connection of its own: 6 ms of a processor


class NewDatabase(Protocol):
    """The fixture `new_database`."""

    def __call__(self, *, migrated: bool = False) -> "ScratchDatabase": ...


class StartServer(Protocol):
    """The fixture `start_server`."""

    def __call__(
        self, *, settings: Mapping[str, str] | None = None, durable: bool = False
    ) -> PostgresServer: ...


def dsn_for(base: str, **changes: str) -> str:
    """The connection URI of `base` with other parameters, for example `dbname="x"`."""
    parts = {key: str(value) for key, value in conninfo_to_dict(base).items() if value is not None}
    parts.update(changes)
    login = quote(parts.pop("user", ""), safe="")
    if password := parts.pop("password", ""):
        login += f":{quote(password, safe='')}"
    dbname = quote(parts.pop("dbname", ""), safe="")
    return f"postgresql://{login}{'@' if login else ''}/{dbname}?{urlencode(parts)}"


@dataclass(frozen=True)
class ScratchDatabase:
    """A database for one test, with a connection URI for each role."""

    name: str
    dsn: str
    """The owner: an ordinary role, as an application and its workers have."""
    source_dsn: str
    """The sidecar's role: REPLICATION, and a member of the owner."""
    admin_dsn: str
    """The superuser, for what only tests do: terminating backends, reading server state."""


class Cluster:
    """One running server; databases come and go in it.

    Args:
        admin_dsn: the URI of a superuser.
    """

    def __init__(self, admin_dsn: str) -> None:
        self._tag = f"t{secrets.token_hex(4)}"
        self._password = secrets.token_urlsafe(12)
        self._count = 0
        self._template: str | None = None
        self.admin_dsn = admin_dsn
        self.owner_role = f"{self._tag}_app"
        self.source_role = f"{self._tag}_cdc"
        self._create_roles()

    @cached_property
    def version(self) -> int:
        """The major version of the server."""
        with psycopg.connect(self.admin_dsn) as connection:
            return connection.info.server_version // 10000

    @contextmanager
    def database(self, *, migrated: bool = False) -> Iterator[ScratchDatabase]:
        """Create a database, and drop it at the end with its slots and sessions."""
        name = self._create_database(self._migrated_template() if migrated else "template1")
        try:
            yield self._scratch(name)
        finally:
            self._drop_database(name)

    def close(self) -> None:
        """Drop what this object created in the server."""
        if self._template is not None:
            self._drop_database(self._template)
        with self._admin() as connection:
            for role in (self.source_role, self.owner_role):
                connection.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))

    def _admin(self) -> psycopg.Connection:
        return psycopg.connect(self.admin_dsn, autocommit=True)

    def _create_roles(self) -> None:
        owner, source = sql.Identifier(self.owner_role), sql.Identifier(self.source_role)
        password = sql.Literal(self._password)
        with self._admin() as connection:
            connection.execute(sql.SQL("create role {} login password {}").format(owner, password))
            connection.execute(
                sql.SQL("create role {} login replication password {} in role {}").format(
                    source, password, owner
                )
            )

    def _create_database(self, template: str) -> str:
        """Create one by copying files: through the log, every slot would read 8 MB for each."""
        self._count += 1
        name = f"{self._tag}_{self._count}"
        statement = sql.SQL("create database {} template {} strategy file_copy owner {}").format(
            *map(sql.Identifier, (name, template, self.owner_role))
        )
        with self._admin() as connection:
            connection.execute(statement)
        return name

    def _scratch(self, name: str) -> ScratchDatabase:
        def dsn(role: str) -> str:
            return dsn_for(self.admin_dsn, dbname=name, user=role, password=self._password)

        return ScratchDatabase(
            name=name,
            dsn=dsn(self.owner_role),
            source_dsn=dsn(self.source_role),
            admin_dsn=dsn_for(self.admin_dsn, dbname=name),
        )

    def _migrated_template(self) -> str:
        if self._template is None:
            self._template = self._create_database("template1")
            migrate(self._scratch(self._template).dsn)
        return self._template

    def _drop_database(self, name: str) -> None:
        drop = sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        with self._admin() as connection:
            _drop_slots(connection, name)
            connection.execute(drop)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: it did not within the time.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = POLL_INTERVAL_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(pause_s)
        pause_s = longer(pause_s)


def longer(pause_s: float) -> float:
    """The pause after this one, of who waits for something by looking."""
    return min(pause_s * 1.2, LONGEST_POLL_S)


def _drop_slots(connection: psycopg.Connection, database: str) -> None:
    """Drop the database's slots; an active one once its walsender has ended."""

    def none_left() -> bool:
        connection.execute(
            "select pg_terminate_backend(active_pid) from pg_replication_slots"
            " where database = %s and active",
            [database],
        )
        connection.execute(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
            " where database = %s and not active",
            [database],
        )
        left = connection.execute(
            "select from pg_replication_slots where database = %s", [database]
        )
        return left.fetchone() is None

    wait_until(none_left, DROP_TIMEOUT_S, f"dropping the slots of {database}")
