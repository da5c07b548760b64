from __future__ import annotations

import traceback

import pytest

from conductor.connections import Connections
from conductor.dsn import parse_dsn
from conductor.errors import ConductorError
from conductor.migrations import migrate
from conductor.store.sessions import Session, connect_blocking
from conductor.transactions import Transactions

MALFORMED = (
    "postgresql://app:hush@hush@db.example/shop",
    "postgresql://app:hush/hush@db.example/shop",
    "postgresql://app:1234/hush@db.example/shop",
    "postgresql://app:@hush/hush@db.example/shop",
    "postgresql://app:100%hush@db.example/shop",
    "postgresql://app:hush?hush/hush@db.example/shop",
    "postgresql://app:[hush@hush]@db.example/shop",
    "postgresql://app:hush word@db.example/shop",
    "postgresql:/app:hush@db.example/shop",
    "app:hush@db.example/shop",
    "mysql://app:hush=hush@db.example/shop",
    "host=db.example user=app password=hush hush dbname=shop",
    "host=db.example user=app password='hush'hush' dbname=shop",
    "host=db.example user=app password='hush dbname=shop",
    "host=db.example port=hush",
    "dbname=postgresql://app:hush@db.example/shop",
    "host=db.example password=hush\0hush",
    "host=db.example password=hush\ud800",
)
"""Passwords that hold ``hush`` or 1234, written so that libpq cannot read them, or not as meant."""

WELL_FORMED = (
    "",
    "postgresql:///shop?host=/tmp&password=h@sh",
    "postgresql://me%40corp:h%40s%2Fh@db.example,db2.example:5432/shop?application_name=a@b",
    "postgresql://app:hu?sh@db.example/shop",
    "postgresql://app:password@[::1]:5432/shop",
    "host=db.example user=app password='hush hush' dbname=shop",
    r"host=db.example user=app password=hush\ hu@sh dbname=shop",
)


def shown(error: BaseException) -> str:
    """Everything a log could hold of an error."""
    hint = error.hint if isinstance(error, ConductorError) else ""
    return "".join(traceback.format_exception(error)) + hint + repr(error.__context__)


@pytest.mark.parametrize("dsn", MALFORMED)
async def test_no_part_of_a_malformed_dsn_is_shown(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")

    async def lend() -> None:
        async with Connections(dsn, 1, "test").lend():
            pass

    for use in (
        lambda: parse_dsn(dsn),
        lambda: connect_blocking(dsn, "test"),
        lambda: migrate(dsn),
        lambda: Transactions(dsn, 1, lambda: 1, dead_after_s=8)._options(),
    ):
        with pytest.raises(ConductorError) as refused:
            use()
        text = shown(refused.value)
        assert "hush" not in text
        assert "1234" not in text
    for connect in (lend, Session(dsn, "test").connection):
        with pytest.raises(ConductorError) as refused:
            await connect()
        assert "hush" not in shown(refused.value)
    assert "hush" not in caplog.text
    assert "%40" in refused.value.hint


@pytest.mark.parametrize("dsn", WELL_FORMED)
def test_a_well_formed_dsn_is_taken(dsn: str) -> None:
    parse_dsn(dsn)
