from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from conductor.worker.settling import _may_pass


@pytest.mark.parametrize(
    "error",
    [errors.SerializationFailure, errors.AdminShutdown, errors.DiskFull, errors.UndefinedTable],
)
def test_outcomes_are_sent_again_when_the_server_is_to_blame(error: type[psycopg.Error]) -> None:
    assert _may_pass(error("x"))
    assert _may_pass(psycopg.OperationalError("connection lost"))


@pytest.mark.parametrize(
    "error",
    [errors.UniqueViolation, errors.ProgramLimitExceeded, errors.RaiseException, psycopg.DataError],
)
def test_an_outcome_that_is_to_blame_is_looked_for(error: type[psycopg.Error]) -> None:
    assert not _may_pass(error("x"))
