"""What is published for which subscriptions: the comparison alone."""

import pytest

from cdc.catalog import Publication, PublishedTable, Table
from cdc.errors import (
    PublicationDrift,
    PublicationError,
    PublicationMissing,
    ReplicaIdentityMissing,
)
from cdc.publication import Plan, plan
from cdc.wanted import Past, Wanted
from conductor.matching import ChangeFilter, Operation, Subscription


def table(name: str, **changes: object) -> Table:
    values: dict[str, object] = {
        "schema": "public",
        "name": name,
        "oid": 1,
        "kind": "r",
        "persistence": "p",
        "replica_identity": "d",
        "has_identity_index": True,
        "owned": True,
        "columns": ("id", "body"),
        "ancestors": (),
        "leaves_without_identity": (),
        **changes,
    }
    return Table(**values)  # type: ignore[arg-type]  # checked by use


def wanted(
    number: int,
    name: str,
    *operations: Operation,
    started: bool = False,
    retired: bool = False,
    changed: bool = False,
    ordered: bool = False,
) -> Wanted:
    wants = frozenset(operations or ("insert",))
    changes = ("body",) if changed else None
    stored = ChangeFilter("public", name, wants, changed=changes, ordered=ordered)
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
    return Wanted(Subscription.from_row(row), started, retired)


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
    past = Past(named={w.table for w in want} | OURS)
    return plan("p", want, actual, {t.key: t for t in tables}, past=past)


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
    ending = compare([wanted(1, "a", started=True, retired=True)], actual, table("a"))
    assert (ending.drift, ending.refusal) == ((), None)
    assert compare([wanted(1, "a")], actual, table("a")).drift == ()


@pytest.mark.parametrize(
    "actual", [publication("a", all_operations=False), publication("a", via_root=False)]
)
@pytest.mark.parametrize("want", [[], [wanted(1, "a")]])
def test_nothing_begins_through_a_publication_that_leaves_something_out(
    actual: Publication, want: list[Wanted]
) -> None:
    change = compare(want, actual, table("a"))
    assert isinstance(change.refusal, PublicationDrift)
    assert (change.loss, change.restore) == (None, True)
    assert compare(want, publication("a"), table("a")).refusal is None
    begun = compare([*want, wanted(2, "a", started=True)], actual, table("a"))
    assert (begun.refusal, isinstance(begun.loss, PublicationDrift)) == (None, True)


@pytest.mark.parametrize("now", [None, table("a", kind="v"), table("a", persistence="u")])
def test_a_captured_table_that_is_gone_is_missing_and_no_drift(now: Table | None) -> None:
    tables = [table("b")] if now is None else [table("b"), now]
    want = [
        wanted(1, "a", started=True),
        wanted(2, "b", started=True),
        wanted(3, "a", started=True, retired=True),
    ]
    change = compare(want, publication("b"), *tables)
    assert (change.drift, change.loss, change.statements) == ((), None, [])
    (error,) = change.missing.values()
    assert error.table == ("public", "a")
    assert "public.a" in str(error)
    assert "deploy task t" in error.hint
    assert compare(want[1:], publication("b"), *tables).missing == {}


def test_a_table_whose_gap_is_open_is_put_back_without_drift() -> None:
    want = [wanted(1, "a", started=True)]
    past = Past(interrupted=[want[0].table])
    change = plan("p", want, publication(), {("public", "a"): table("a")}, past=past)
    assert (change.drift, names(change.add)) == ((), ["a"])


@pytest.mark.parametrize(
    "actual",
    [
        publication(tables=(PublishedTable("public", "a", False, False, membership=7),)),
        publication(schemas=("public",), schema_memberships=(7,)),
    ],
)
def test_a_captured_table_that_was_put_back_is_drift(actual: Publication) -> None:
    def drift(known: dict[tuple[str, str], int], *, started: bool = True) -> tuple[str, ...]:
        past, tables = Past(memberships=known), {("public", "a"): table("a")}
        return plan("p", [wanted(1, "a", started=started)], actual, tables, past=past).drift

    assert drift({("public", "a"): 7}) == drift({}) == drift({("public", "b"): 6}) == ()
    assert drift({("public", "a"): 6}) == ("table public.a was taken out of it and put back",)
    assert drift({("public", "a"): 6}, started=False) == ()


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
    actual = publication(tables=(part,))
    change = compare([wanted(1, "a")], actual, table("a"))
    assert (change.restore, names(change.whole), change.add) == (False, ["a"], ())
    assert (len(change.statements), change.loss) == (1, None)
    lost = compare([wanted(1, "a", started=True)], actual, table("a"))
    assert isinstance(lost.loss, PublicationDrift)
    assert isinstance(
        compare([wanted(1, "a", started=True)], None, table("a")).loss, PublicationMissing
    )
