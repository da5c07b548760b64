"""What is published for which subscriptions: the comparison alone."""

import pytest

from cdc.catalog import Publication, PublishedTable, Table
from cdc.errors import (
    PublicationDrift,
    PublicationError,
    PublicationMissing,
    ReplicaIdentityMissing,
)
from cdc.publication import Plan, Wanted, plan
from conductor.matching import ChangeFilter, Subscription


def table(name: str, **changes: object) -> Table:
    values: dict[str, object] = {
        "schema": "public",
        "name": name,
        "oid": 1,
        "kind": "r",
        "persistence": "p",
        "is_partition": False,
        "replica_identity": "d",
        "has_identity_index": True,
        "owned": True,
        "columns": ("id", "body"),
        "ancestors": (),
        "leaves_without_identity": (),
        **changes,
    }
    return Table(**values)  # type: ignore[arg-type]  # checked by use


def wanted(number: int, name: str, *, started: bool = False, changed: bool = False) -> Wanted:
    stored = ChangeFilter(
        "public", name, frozenset({"insert"}), changed=("body",) if changed else None
    )
    row = {
        "id": number,
        "app": "a",
        "task": "t",
        "trigger": "t",
        "kind": "change",
        "queue": "q",
        "version": None,
        "rank": 0,
        "source": "default",
        "definition": stored.to_json(),
    }
    return Wanted(Subscription.from_row(row), started)


def publication(*tables: str, **changes: object) -> Publication:
    values: dict[str, object] = {
        "name": "p",
        "all_tables": False,
        "all_operations": True,
        "via_root": True,
        "owned": True,
        "schemas": (),
        "tables": tuple(PublishedTable("public", t, False, False) for t in tables),
        **changes,
    }
    return Publication(**values)  # type: ignore[arg-type]  # checked by use


OURS = {("public", "b")}  # named by a subscription that has ended


def compare(want: list[Wanted], actual: Publication | None, *tables: Table) -> Plan:
    return plan("p", want, actual, {t.key: t for t in tables}, ours={w.table for w in want} | OURS)


def names(tables: tuple[tuple[str, str], ...]) -> list[str]:
    return [name for _, name in tables]


def test_creates_adds_drops() -> None:
    change = compare([wanted(1, "a"), wanted(2, "b")], None, table("a"), table("b"))
    assert (change.create, names(change.add), change.drop) == (True, ["a", "b"], ())
    assert len(change.statements) == 3
    change = compare([wanted(1, "a")], publication("b"), table("a"))
    assert (change.create, names(change.add), names(change.drop)) == (False, ["a"], ["b"])
    change = compare([wanted(1, "a")], publication("theirs"), table("a"))
    assert change.drop == ()
    assert compare([wanted(1, "a")], publication("a"), table("a")).statements == []


def test_one_refused_subscription_does_not_refuse_its_table() -> None:
    change = compare([wanted(1, "a", changed=True), wanted(2, "a")], publication(), table("a"))
    assert set(change.refused) == {1}
    assert isinstance(change.refused[1], ReplicaIdentityMissing)
    assert names(change.add) == ["a"]


def test_what_has_started_stays_published_whatever_became_of_it() -> None:
    """Taking it out would be a loss; the application decides about its identity."""
    spoilt = table("a", has_identity_index=False)
    change = compare([wanted(1, "a", started=True)], publication("a"), spoilt)
    assert (change.refused, change.drop, change.drift) == ({}, (), ())


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (None, "is gone"),
        (publication(), "not in it"),
        (publication("a", all_operations=False), "every operation"),
        (publication("a", via_root=False), "partition_root"),
        (
            publication(tables=(PublishedTable("public", "a", True, False),)),
            "row filter",
        ),
        (
            publication(tables=(PublishedTable("public", "a", False, True),)),
            "column list",
        ),
    ],
)
def test_drift_is_about_what_has_started(actual: Publication | None, words: str) -> None:
    (drift,) = compare([wanted(1, "a", started=True)], actual, table("a")).drift
    assert words in drift
    assert compare([wanted(1, "a")], actual, table("a")).drift == ()


def test_a_published_schema_covers_its_tables() -> None:
    actual = publication(schemas=("public",))
    assert compare([wanted(1, "a", started=True)], actual, table("a")).statements == []


@pytest.mark.parametrize(
    "actual", [publication(all_tables=True), publication(schemas=("conductor",))]
)
def test_a_publication_that_would_do_harm_is_refused(actual: Publication) -> None:
    with pytest.raises(PublicationError):
        compare([], actual)


def test_what_is_published_in_part_is_made_whole() -> None:
    part = PublishedTable("public", "a", has_row_filter=True, has_column_list=False)
    actual = publication(tables=(part,), via_root=False)
    change = compare([wanted(1, "a")], actual, table("a"))
    assert (change.restore, names(change.whole), change.add) == (True, ["a"], ())
    assert (len(change.statements), change.loss) == (3, None)
    lost = compare([wanted(1, "a", started=True)], actual, table("a"))
    assert isinstance(lost.loss, PublicationDrift)
    assert isinstance(compare([wanted(1, "a", started=True)], None).loss, PublicationMissing)
