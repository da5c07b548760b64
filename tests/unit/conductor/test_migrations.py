from __future__ import annotations

import pytest

from conductor.errors import MigrationMismatch
from conductor.migrations import Migration, known_migrations, pending_of

ONE = Migration.from_file("0001_initial.sql", b"select 1")
TWO = Migration.from_file("0002_second.sql", b"select 2")


def record(*migrations: Migration) -> list[tuple[int, str, str]]:
    return [(m.number, m.name, m.checksum) for m in migrations]


def test_packaged_migrations_are_numbered_without_a_gap() -> None:
    found = known_migrations()
    assert [m.number for m in found] == list(range(1, len(found) + 1))
    assert str(found[0]) == "0001_initial"


def test_checksum_is_of_the_bytes() -> None:
    same = Migration.from_file("0001_initial.sql", b"select 1")
    other = Migration.from_file("0001_initial.sql", b"select 1 ")
    assert same.checksum == ONE.checksum
    assert other.checksum != ONE.checksum


@pytest.mark.parametrize("filename", ["initial.sql", "0001.sql", "x1_initial.sql", "0001_.sql"])
def test_other_file_names_are_refused(filename: str) -> None:
    with pytest.raises(ValueError, match="is not named like"):
        Migration.from_file(filename, b"")


def test_everything_is_pending_in_an_empty_database() -> None:
    assert pending_of([ONE, TWO], []) == (ONE, TWO)


def test_only_what_is_not_recorded_is_pending() -> None:
    assert pending_of([ONE, TWO], record(ONE)) == (TWO,)
    assert pending_of([ONE, TWO], record(ONE, TWO)) == ()


def test_a_changed_migration_is_refused() -> None:
    changed = Migration.from_file("0001_initial.sql", b"select 3")
    with pytest.raises(MigrationMismatch, match="0001_initial was applied with checksum"):
        pending_of([changed, TWO], record(ONE))


def test_a_newer_database_is_refused() -> None:
    with pytest.raises(MigrationMismatch, match="0002_second, which is newer than this code"):
        pending_of([ONE], record(ONE, TWO))


def test_a_record_with_a_gap_is_refused() -> None:
    with pytest.raises(MigrationMismatch, match="has migration 0002 but not 0001"):
        pending_of([ONE, TWO], record(TWO))


@pytest.mark.parametrize(
    ("content", "workers_from"),
    [(b"select 1", None), (b"-- why\n-- workers from 0003 go on\nselect 1", 3)],
)
def test_a_migration_says_whose_workers_go_on(content: bytes, workers_from: int | None) -> None:
    assert Migration.from_file("0004_fourth.sql", content).workers_from == workers_from


def test_workers_that_do_not_know_how_steps_are_stored_end() -> None:
    since = {m.number: m.workers_from or m.number for m in known_migrations()}
    assert max(since.values()) >= 10
