from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conductor import migrations
from conductor.errors import DatabaseUnavailable, MigrationMismatch
from conductor.migrations import (
    Migration,
    check_migrated,
    known_migrations,
    migrate,
    pending_migrations,
)
from tests.servers import Cluster, ScratchDatabase, dsn_for


def recorded(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select name from conductor.migrations order by number")
        return [name for (name,) in rows]


def test_an_ordinary_owner_can_migrate(database: ScratchDatabase) -> None:
    assert pending_migrations(database.dsn) == known_migrations()
    assert migrate(database.dsn) == known_migrations()
    assert recorded(database.dsn) == [m.name for m in known_migrations()]
    assert pending_migrations(database.dsn) == ()
    assert migrate(database.dsn) == ()


def test_asking_what_is_pending_changes_nothing(database: ScratchDatabase) -> None:
    pending_migrations(database.dsn)
    with psycopg.connect(database.dsn) as connection:
        row = connection.execute("select to_regnamespace('conductor')").fetchone()
    assert row == (None,)


def test_processes_that_start_together_migrate_once(database: ScratchDatabase) -> None:
    with ThreadPoolExecutor(6) as threads:
        applied = list(threads.map(migrate, [database.dsn] * 6))
    assert sorted(migration.number for done in applied for migration in done) == [
        migration.number for migration in known_migrations()
    ]


def test_a_schema_made_by_an_administrator_is_enough(
    database: ScratchDatabase, server: Cluster
) -> None:
    role = server.source_role
    admin = psycopg.sql.Identifier(role)
    with psycopg.connect(database.admin_dsn, autocommit=True) as connection:
        connection.execute(
            psycopg.sql.SQL("create schema conductor authorization {}").format(admin)
        )
        connection.execute("revoke create on database " + database.name + " from public")
    assert migrate(database.source_dsn) == known_migrations()


def test_jobs_at_impossible_times_do_not_hinder_the_migration(
    database: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = known_migrations()
    earlier = known[: [migration.name for migration in known].index("job_times")]
    with monkeypatch.context() as before:
        before.setattr(migrations, "known_migrations", lambda: earlier)
        migrate(database.dsn)
    with psycopg.connect(database.dsn) as connection:
        connection.execute(
            "insert into conductor.jobs (queue, task, payload, run_at, created_at, state) values"
            " ('q', 'fine', '{}', '2020-01-01', '2020-01-01', 'ready'),"
            " ('q', 'waits', '{}', 'infinity', '2020-01-01', 'waiting'),"
            " ('q', 'late', '{}', 'infinity', '2020-01-01', 'ready'),"
            " ('q', 'early', '{}', '-infinity', 'infinity', 'running')"
        )
    migrate(database.dsn)
    with psycopg.connect(database.dsn) as connection:
        rows = connection.execute(
            "select task, case when isfinite(run_at) then extract(year from run_at) end,"
            " extract(year from created_at) < 9999 from conductor.jobs order by id"
        ).fetchall()
        year = connection.execute("select extract(year from now())").fetchone()
    assert year is not None
    assert rows == [
        ("fine", 2020, True), ("waits", None, True), ("late", year[0], True),
        ("early", year[0], True),
    ]  # fmt: skip


def test_a_changed_file_is_refused(
    migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = known_migrations()
    changed = Migration.from_file("0001_initial.sql", first.statements + b"-- changed")
    monkeypatch.setattr(migrations, "known_migrations", lambda: (changed, *others))
    with pytest.raises(MigrationMismatch, match="was applied with checksum"):
        migrate(migrated.dsn)


def test_a_newer_database_is_refused(migrated: ScratchDatabase) -> None:
    with psycopg.connect(migrated.dsn) as connection:
        connection.execute(
            "insert into conductor.migrations (number, name, checksum) values (9999, 'later', 'x')"
        )
    with pytest.raises(MigrationMismatch, match="9999_later, which is newer"):
        migrate(migrated.dsn)


def test_a_failing_migration_leaves_nothing(
    migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = known_migrations()
    number = len(known) + 1
    broken = Migration.from_file(
        f"{number:04}_broken.sql", b"create table conductor.half (); select 1 / 0;"
    )
    monkeypatch.setattr(migrations, "known_migrations", lambda: (*known, broken))
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrate(migrated.dsn)
    assert recorded(migrated.dsn) == [m.name for m in known]
    with psycopg.connect(migrated.dsn) as connection:
        assert connection.execute("select to_regclass('conductor.half')").fetchone() == (None,)


@pytest.mark.parametrize("ask", [check_migrated, pending_migrations])
def test_a_server_that_goes_while_it_is_asked_may_be_asked_again(
    migrated: ScratchDatabase, ask: Callable[[str], Any]
) -> None:
    """A worker that was starting ended with a traceback, though it tries for a while."""
    with psycopg.connect(migrated.admin_dsn, autocommit=True) as connection:
        name = psycopg.sql.Identifier(connection.info.dbname)
        ends = psycopg.sql.SQL("alter database {} set idle_session_timeout = '1ms'")
        connection.execute(ends.format(name))

    def ask_often() -> None:
        for _ in range(500):  # it may be faster than the timeout
            ask(migrated.dsn)

    with pytest.raises(DatabaseUnavailable, match="while asking it"):
        ask_often()


def test_no_server_is_one_clear_error(tmp_path: Path, database: ScratchDatabase) -> None:
    nowhere = dsn_for(database.dsn, host=str(tmp_path), hostaddr="", port="1")
    with pytest.raises(DatabaseUnavailable, match="cannot connect"):
        migrate(nowhere)
