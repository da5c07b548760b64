"""Which failed attempts to connect are a matter of time, and which are not."""

from __future__ import annotations

import psycopg
import pytest

from conductor.errors import ConfigError, Retry
from conductor.logins import is_login_refused, login_refused

PREFIX = 'connection failed: connection to server at "db", port 5432 failed: FATAL:  '


@pytest.mark.parametrize(
    "error",
    [
        psycopg.OperationalError(PREFIX + 'database "x" does not exist'),
        psycopg.OperationalError(PREFIX + 'role "x" does not exist'),
        psycopg.OperationalError(PREFIX + 'role "x" is not permitted to log in'),
        psycopg.OperationalError(PREFIX + 'password authentication failed for user "x"'),
        psycopg.OperationalError(PREFIX + 'no pg_hba.conf entry for host "x", user "x"'),
        psycopg.OperationalError(PREFIX + 'permission denied for database "x"\nDETAIL:  y'),
        psycopg.OperationalError("connection failed: fe_sendauth: no password supplied"),
        psycopg.errors.InvalidPassword("no"),
        psycopg.errors.InvalidCatalogName("no"),
    ],
)
def test_a_refused_login_is_no_matter_of_time(error: psycopg.Error) -> None:
    refused = login_refused(error)
    assert isinstance(refused, ConfigError)
    assert refused.retry is Retry.MANUAL
    assert "\n" not in str(refused)
    assert "CONDUCTOR_DSN" in refused.hint


@pytest.mark.parametrize(
    "error",
    [
        psycopg.OperationalError(PREFIX + "the database system is starting up"),
        psycopg.OperationalError(PREFIX + "the database system is in recovery mode"),
        psycopg.OperationalError(PREFIX + "sorry, too many clients already"),
        psycopg.OperationalError('connection to server at "db" failed: Connection refused'),
        psycopg.OperationalError("connection timeout expired"),
        psycopg.errors.CannotConnectNow("starting up"),
        psycopg.errors.AdminShutdown("terminating connection"),
    ],
)
def test_a_server_that_is_away_is_one(error: psycopg.Error) -> None:
    assert not is_login_refused(error)
    assert login_refused(error) is None
