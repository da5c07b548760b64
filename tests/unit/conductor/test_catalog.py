from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conductor.catalog import Part, TableFacts, check_change, check_schema
from conductor.errors import RegistrationRefused, UnknownColumn
from conductor.matching import ChangeFilter, Operation

KEYED = Part("public.users", "d", has_key=True)
FULL = Part("public.users", "f", has_key=False)
KEYLESS = Part("public.users", "d", has_key=False)
NOTHING = Part("public.users", "n", has_key=False)


def change(*operations: Operation, **options: Any) -> ChangeFilter:
    return ChangeFilter("public", "users", frozenset(operations), **options)


def table(*parts: Part, kind: str = "r", persistence: str = "p") -> TableFacts:
    return TableFacts(kind, persistence, ("id", "email"), parts)


@pytest.mark.parametrize("part", [KEYED, FULL])
@pytest.mark.parametrize("operation", ["insert", "update", "delete", "truncate"])
def test_a_table_with_an_identity_is_taken(part: Part, operation: Operation) -> None:
    check_change("greet", change(operation), table(part))


@pytest.mark.parametrize("part", [KEYLESS, NOTHING])
@pytest.mark.parametrize("operation", ["update", "delete"])
def test_a_table_without_an_identity_is_refused(part: Part, operation: Operation) -> None:
    with pytest.raises(RegistrationRefused, match="no usable replica identity") as refused:
        check_change("greet", change(operation), table(part))
    assert "alter table public.users replica identity full;" in refused.value.hint


@pytest.mark.parametrize("part", [KEYLESS, NOTHING])
@pytest.mark.parametrize("operation", ["insert", "truncate"])
def test_inserts_and_truncates_need_no_identity(part: Part, operation: Operation) -> None:
    check_change("greet", change(operation), table(part))


def test_every_partition_needs_its_own() -> None:
    leaf = Part('public."users EU"', "d", has_key=False)
    with pytest.raises(RegistrationRefused) as refused:
        check_change("greet", change("update"), table(KEYED, leaf, kind="p"))
    assert 'alter table public."users EU" replica identity full;' in refused.value.hint
    assert "alter table public.users " not in refused.value.hint


def test_changed_columns_need_the_whole_old_row() -> None:
    check_change("greet", change("update", changed=("email",)), table(FULL))
    with pytest.raises(RegistrationRefused, match="REPLICA IDENTITY FULL") as refused:
        check_change("greet", change("update", changed=("email",)), table(KEYED))
    assert "writes the whole old row to the WAL" in refused.value.hint


@pytest.mark.parametrize("options", [{"columns": ("emial",)}, {"changed": ("emial",)}])
def test_an_unknown_column_names_the_nearest(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownColumn, match=r"'emial' of public\.users .* did you mean 'email'"):
        check_change("greet", change("update", **options), table(FULL))


@pytest.mark.parametrize(
    "kind, persistence, message",
    [
        ("v", "p", "is a view"),
        ("m", "p", "is a materialised view"),
        ("f", "p", "is a foreign table"),
        ("r", "u", "is unlogged"),
        ("r", "t", "is temporary"),
    ],
)
def test_what_has_no_changes_in_the_wal_is_refused(
    kind: str, persistence: str, message: str
) -> None:
    with pytest.raises(RegistrationRefused, match=message):
        check_change("greet", change("insert"), table(KEYED, kind=kind, persistence=persistence))


def test_the_queues_own_tables_are_refused() -> None:
    check_schema("greet", change("insert"))
    own = ChangeFilter("conductor", "jobs", frozenset({"insert"}))
    with pytest.raises(RegistrationRefused, match="schema conductor"):
        check_schema("greet", own)


@pytest.mark.parametrize("schema", ["pg_catalog", "information_schema"])
def test_the_servers_own_tables_are_refused(schema: str) -> None:
    with pytest.raises(RegistrationRefused, match=f"schema {schema}"):
        check_schema("greet", ChangeFilter(schema, "pg_class", frozenset({"insert"})))


BY_ID = Part("public.users", "d", has_key=True, key=("id",))


@pytest.mark.parametrize("options", [{"ordered": True}, {"coalesce_s": 1.0}])
def test_a_key_must_be_in_the_wal(options: dict[str, Any]) -> None:
    check_change("greet", change("insert", "update", "delete", **options), table(BY_ID))
    check_change("greet", change("update", key=("id", "email"), **options), found(BY_ID))
    check_change("greet", change("delete", key=("id", "email"), **options), found(FULL))
    with pytest.raises(RegistrationRefused, match="its replica identity is no key"):
        check_change("greet", change("update", **options), table(FULL))
    with pytest.raises(RegistrationRefused, match="key 'email' of a delete"):
        check_change("greet", change("delete", key=("id", "email"), **options), found(BY_ID))
    with pytest.raises(UnknownColumn, match="'emial'"):
        check_change("greet", change("update", key=("id", "emial"), **options), found(BY_ID))


def found(*parts: Part, key: tuple[str, ...] = ("id",)) -> TableFacts:
    """A table with a primary key."""
    return replace(table(*parts), key=key)


def test_a_key_of_several_rows_orders_their_changes_and_merges_none() -> None:
    by_email = {"key": ("email",)}
    check_change("greet", change("update", ordered=True, **by_email), found(BY_ID))
    for facts in (found(BY_ID), found(FULL)):
        with pytest.raises(
            RegistrationRefused, match=r"same 'email' can be several.* told by 'id'"
        ):
            check_change("greet", change("update", coalesce_s=1.0, **by_email), facts)
    unknown = found(FULL, key=())
    with pytest.raises(RegistrationRefused, match="it has no key") as refused:
        check_change("greet", change("update", coalesce_s=1.0, **by_email), unknown)
    assert "primary key" in str(refused.value.hint)
    index = Part("public.users", "i", has_key=True, key=("email",))
    check_change("greet", change("update", coalesce_s=1.0, **by_email), found(index))


TYPES = {"id": 20, "price": 1700, "ratio": 701, "flag": 16, "data": 3802, "tags": 1007, "far": 0,
         "at": 1184, "mood": 99999}  # fmt: skip


def typed() -> TableFacts:
    return TableFacts("r", "p", tuple(TYPES), (FULL,), types=TYPES)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ('new.id == "5"', r"new.id is a number, and == compares it with \"5\""),
        ("new.price > 9.5", "new.price is text, and > compares it with 9.5"),
        ('new.ratio > "x"', "new.ratio is a number"),
        ("new.at > 5", "new.at is text"),
        ("new.mood == 1", "new.mood is text"),
        ("new.flag == 1", "new.flag is a bool"),
        ('new.id.endsWith("5")', r"new.id is a number, which has no endsWith\(\)"),
        ("new.id", "new.id is a number, not a condition"),
    ],
)
def test_a_filter_that_fits_no_column_is_refused(when: str, message: str) -> None:
    with pytest.raises(RegistrationRefused, match=message) as refused:
        check_change("greet", change("insert", when=when), typed())
    assert "task 'greet': table public.users: filter" in str(refused.value)


@pytest.mark.parametrize(
    "when",
    [
        "new.id > 5", 'new.price == "9.50"', "double(new.price) > 9.5", "new.ratio > 1",
        'new.price.endsWith("0")', 'string(new.id).endsWith("5")', 'new.mood.contains("a")',
        'new.ratio == "NaN"', "new.flag", "new.data > 5", "new.data", "new.tags == 5",
        "new.far > 5", 'new.far == "x"', 'new.at > "2026"', 'new.mood == "sad"', "new.id != null",
    ],
)  # fmt: skip
def test_a_filter_that_fits_the_columns_is_taken(when: str) -> None:
    check_change("greet", change("insert", when=when), typed())
