"""Fixtures for pytest: ``pytest_plugins = ["conductor.testing.plugin"]`` in a conftest.py.

`rehearsal` needs nothing. `conductor_dsn` and `time_travel` need a server, that of
``CONDUCTOR_TEST_DSN``, where the role may create databases; without one their tests fail.
Another server: override `conductor_server_dsn`. This module must not touch any database but those
that it has created.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from conductor.dsn import parse_dsn, read_dsn
from conductor.errors import ConfigError
from conductor.migrations import migrate
from conductor.sql import load
from conductor.testing.rehearsal import Rehearsal
from conductor.testing.travel import TimeTravel, travel


class _Dsn(str):
    """A DSN that pytest shows without its password, as an argument of a test that fails."""

    __slots__ = ()

    def __repr__(self) -> str:
        parameters = read_dsn(self) or {}
        parameters.pop("password", None)
        return repr(make_conninfo("", **parameters))


@pytest.fixture
def rehearsal() -> Rehearsal:
    """Runs handlers with no database."""
    return Rehearsal()


@pytest.fixture(scope="session")
def conductor_server_dsn() -> str:
    """The server that databases for tests are created on."""
    dsn = os.environ.get("CONDUCTOR_TEST_DSN", "")
    if not dsn:
        pytest.fail(
            "CONDUCTOR_TEST_DSN names no server for tests: set it to the DSN of one where the role "
            "may create databases, or override the fixture conductor_server_dsn",
            pytrace=False,
        )
    return _Dsn(dsn)


@pytest.fixture
def conductor_dsn(conductor_server_dsn: str) -> Iterator[str]:
    """A new database with the queue's schema, for one test."""
    name = f"conductor_test_{secrets.token_hex(6)}"
    with _connected(conductor_server_dsn) as server:
        server.execute(_statement("create_database", name))
        try:
            dsn = _Dsn(make_conninfo(conductor_server_dsn, dbname=name))
            migrate(dsn)
            yield dsn
        finally:
            server.execute(_statement("drop_database", name))


@pytest.fixture
def time_travel(conductor_dsn: str) -> TimeTravel:
    """Lets time pass in the database of `conductor_dsn`."""

    async def pass_by(by: timedelta) -> None:
        async with await psycopg.AsyncConnection.connect(conductor_dsn) as connection:
            await travel(connection, by)

    return pass_by


def _connected(dsn: str) -> psycopg.Connection[Any]:
    try:
        parse_dsn(dsn)
        return psycopg.connect(dsn, autocommit=True)
    except (ConfigError, psycopg.OperationalError) as error:
        pytest.fail(f"no server for tests: {error}", pytrace=False)


def _statement(name: str, database: str) -> sql.Composed:
    statement = load("testing")[name].decode()
    return sql.SQL(statement).format(database=sql.Identifier(database))
