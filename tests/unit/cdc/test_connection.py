"""Errors get a name, and connection strings are never quoted."""

import psycopg
import pytest

from cdc.connection import describe_dsn, parse_dsn, queue_error, source_error
from cdc.errors import (
    CdcError,
    ConfigError,
    PrivilegeMissing,
    QueueUnavailable,
    SinkError,
    SourceUnavailable,
    WalLevelTooLow,
)

PREFIX = 'connection failed: connection to server at "db", port 5432 failed: FATAL:  '


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.OperationalError(PREFIX + 'database "x" does not exist'), ConfigError),
        (psycopg.OperationalError(PREFIX + 'role "x" does not exist'), ConfigError),
        (psycopg.OperationalError(PREFIX + 'password authentication failed for "x"'), ConfigError),
        (psycopg.OperationalError(PREFIX + "no pg_hba.conf entry for host"), ConfigError),
        (
            psycopg.OperationalError(PREFIX + "no pg_hba.conf entry for replication connection"),
            PrivilegeMissing,
        ),
        (
            psycopg.OperationalError(PREFIX + "permission denied to start WAL sender\nDETAIL: x"),
            PrivilegeMissing,
        ),
        (
            psycopg.OperationalError(PREFIX + "the database system is starting up"),
            SourceUnavailable,
        ),
        (psycopg.OperationalError(PREFIX + "sorry, too many clients already"), SourceUnavailable),
        (psycopg.OperationalError("connection timeout expired"), SourceUnavailable),
        (psycopg.OperationalError("the connection is closed"), SourceUnavailable),
        (psycopg.errors.AdminShutdown("terminating connection"), SourceUnavailable),
        (psycopg.errors.InsufficientPrivilege("permission denied"), PrivilegeMissing),
        (
            psycopg.errors.ObjectNotInPrerequisiteState("requires wal_level >= logical"),
            WalLevelTooLow,
        ),
    ],
)
def test_errors_of_the_source(error: psycopg.Error, expected: type[CdcError]) -> None:
    named = source_error(error)
    assert type(named) is expected
    assert "\n" not in str(named)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.errors.UndefinedTable("relation conductor.progress"), ConfigError),
        (psycopg.errors.InvalidSchemaName("schema conductor"), ConfigError),
        (psycopg.errors.InsufficientPrivilege("permission denied"), PrivilegeMissing),
        (psycopg.errors.AdminShutdown("terminating connection"), QueueUnavailable),
        (psycopg.OperationalError("server closed the connection"), QueueUnavailable),
        (psycopg.errors.CheckViolation("violates check constraint"), SinkError),
    ],
)
def test_errors_of_the_queue(error: psycopg.Error, expected: type[CdcError]) -> None:
    assert type(queue_error(error)) is expected


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://cdc:hunter2/5@db/shop",
        "postgresql://cdc:1234/hunter2@db/shop",
        "postgresql://cdc:1234@/hunter2@db/shop",
        "postgresql://cdc:x@hunter2@db/shop",
        "postgresql://cdc:x@db:hunter2/shop",
        "host=db hunter2",
        "hunter2",
    ],
)
def test_what_is_not_a_connection_string_is_not_quoted(dsn: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_dsn(dsn, "CDC_SOURCE_DSN")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://cdc:hunter2@db:5433/shop", "cdc@db:5433/shop"),
        ("host=/run/postgresql dbname=shop user=cdc password=x", "cdc@/run/postgresql:5432/shop"),
        ("host=a,b port=1,2 user=cdc dbname=shop", "cdc@a,b:1,2/shop"),
    ],
)
def test_a_description_has_no_password(dsn: str, expected: str) -> None:
    assert describe_dsn(dsn) == expected
