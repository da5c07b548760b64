"""Which tables the second publication has, and how they get into it and out: the comparison."""

import pytest

from cdc.catalog import Publication, PublishedTable, Table, insert_only_name
from cdc.errors import PublicationDrift, PublicationError, ReplicaIdentityMissing
from cdc.publication import Plan, plan
from cdc.wanted import Past, Wanted
from conductor.matching import Operation
from tests.unit.cdc.test_publication import publication, table, wanted

KEYLESS = table("a", has_identity_index=False)
A = ("public", "a")


def second(*tables: str, **changes: object) -> Publication:
    options = {"all_operations": False, "publishes_updates": False, **changes}
    return publication(*tables, name="p_inserts", **options)


def compare(
    want: list[Wanted],
    main: Publication | None,
    inserts: Publication | None,
    *tables: Table,
    past: Past | None = None,
    is_carried: bool = False,
) -> Plan:
    past = past or Past(named={w.table for w in want} | {("public", "b")})
    found = {t.key: t for t in tables}
    return plan("p", want, main, found, past=past, inserts=inserts, is_carried=is_carried)


def run(change: Plan) -> list[str]:
    return [statement.as_string(None).replace('"', "") for statement in change.statements]


@pytest.mark.parametrize("operations", [["insert"], ["truncate"], ["insert", "truncate"]])
def test_a_keyless_table_is_published_for_what_needs_no_key(operations: list[Operation]) -> None:
    change = compare([wanted(1, "a", *operations)], publication(), None, KEYLESS)
    assert change.refused == {}
    assert run(change) == [
        (
            "create publication p_inserts with "
            "(publish = 'insert, truncate', publish_via_partition_root = true)"
        ),
        "alter publication p_inserts add table only public.a",
    ]
    change = compare([wanted(1, "a", *operations)], publication(), second("a"), KEYLESS)
    assert run(change) == []


@pytest.mark.parametrize("operation", ["update", "delete"])
def test_whoever_wants_more_is_refused_and_stops_no_other(operation: Operation) -> None:
    want = [wanted(1, "a", "insert"), wanted(2, "a", "insert", operation)]
    change = compare(want, publication(), second(), KEYLESS)
    assert set(change.refused) == {2}
    assert isinstance(change.refused[2], ReplicaIdentityMissing)
    assert "inserts (and truncates) alone" in change.refused[2].hint
    assert run(change) == ["alter publication p_inserts add table only public.a"]


def test_a_table_with_a_key_is_in_the_main_publication_whatever_is_wanted() -> None:
    change = compare([wanted(1, "a")], publication(), None, table("a"))
    assert run(change) == ["alter publication p add table only public.a"]
    assert not change.inserts.is_needed


def test_one_that_got_a_key_moves_in_one_transaction() -> None:
    want = [wanted(1, "a", started=True), wanted(2, "a", "update")]
    change = compare(want, publication(), second("a"), table("a"))
    assert (change.drift, change.refused) == ((), {})
    assert run(change) == [
        (
            "begin; alter publication p_inserts drop table only public.a; "
            "alter publication p add table only public.a; commit"
        )
    ]


def test_one_that_lost_its_key_moves_once_the_stream_carries_the_second() -> None:
    """Before that, its inserts would be lost."""
    want = [wanted(1, "a", started=True)]
    assert run(compare(want, publication("a"), second(), KEYLESS)) == []
    change = compare(want, publication("a"), second(), KEYLESS, is_carried=True)
    assert change.drift == ()
    assert run(change) == [
        (
            "begin; alter publication p drop table only public.a; "
            "alter publication p_inserts add table only public.a; commit"
        )
    ]
    # what has not begun may be marked already
    assert run(compare([wanted(1, "a")], publication("a"), second(), KEYLESS)) == []


def test_updates_that_are_captured_stay_so_without_the_key() -> None:
    want = [wanted(1, "a", "update", started=True), wanted(2, "a")]
    change = compare(want, publication("a"), second(), KEYLESS, is_carried=True)
    assert (run(change), change.drift) == ([], ())


def test_a_table_in_both_is_taken_out_of_the_wrong_one() -> None:
    change = compare([wanted(1, "a")], publication("a"), second("a"), table("a"))
    assert run(change) == ["alter publication p_inserts drop table only public.a"]
    change = compare([wanted(1, "a")], publication("a"), second("a"), KEYLESS)
    assert run(change) == ["alter publication p drop table only public.a"]


def test_what_nobody_wants_any_more_is_taken_out_and_what_is_theirs_is_not() -> None:
    change = compare([wanted(1, "a")], publication(), second("a", "b", "theirs"), KEYLESS)
    assert run(change) == ["alter publication p_inserts drop table only public.b"]


def test_a_schema_that_is_published_cannot_be_left() -> None:
    main = publication(schemas=("public",))
    assert run(compare([wanted(1, "a", started=True)], main, second(), KEYLESS)) == []


@pytest.mark.parametrize(
    ("inserts", "words"),
    [
        (None, "p_inserts is gone"),
        (second(), "table public.a is not in p_inserts"),
        (second("a", publishes_inserts=False), "does not publish inserts"),
        (second("a", via_root=False), "partition_root is off for p_inserts"),
        (second(tables=(PublishedTable("public", "a", True, False),)), "row filter"),
        (second(tables=(PublishedTable("public", "a", False, False, 7),)), "put back"),
    ],
)
def test_drift_is_about_what_has_started(inserts: Publication | None, words: str) -> None:
    past = Past(named={A}, insert_memberships={A: 6} if "back" in words else {A: 0})
    started = wanted(1, "a", started=True)
    change = compare([started], publication(), inserts, KEYLESS, past=past)
    assert isinstance(change.loss, PublicationDrift)  # a new slot is not needed
    (drift,) = change.drift
    assert words in drift
    for other in (wanted(1, "a"), wanted(1, "a", started=True, retired=True)):
        change = compare([other], publication(), inserts, KEYLESS, past=past)
        assert (change.loss, change.refusal) == (None, None)


def test_captured_updates_in_the_second_publication_are_drift() -> None:
    want = [wanted(1, "a", "update", started=True)]
    change = compare(want, publication(), second("a"), table("a"))
    assert change.drift == ("table public.a is not in it",)


def test_updates_are_taken_out_of_it_and_parts_are_made_whole() -> None:
    harmful = second("a", publishes_updates=True)
    (restored,) = run(compare([wanted(1, "a")], publication(), harmful, KEYLESS))
    assert restored.startswith("alter publication p_inserts set (publish = 'insert, truncate'")
    part = second(tables=(PublishedTable("public", "a", False, True),))
    assert len(run(compare([wanted(1, "a")], publication(), part, KEYLESS))) == 1
    assert run(compare([], publication(), harmful)) == []  # nobody's business


def test_one_for_all_tables_is_refused() -> None:
    with pytest.raises(PublicationError, match="p_inserts"):
        compare([], publication(), second(all_tables=True))


def test_a_long_name_is_cut_so_that_two_names_never_meet() -> None:
    name = insert_only_name("ü" * 31 + "x")
    assert name.endswith("_inserts")
    assert len(name.encode()) <= 63
