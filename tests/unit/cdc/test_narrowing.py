"""What operators leave out of a publication: how tables are defined, and whom that refuses."""

import pytest

from cdc.catalog import Publication, PublishedTable, Table
from cdc.errors import ColumnUnknown, PublicationDrift, RowsFiltered
from cdc.narrowing import Narrowing
from cdc.publication import Plan, plan
from cdc.wanted import Past, Wanted
from tests.unit.cdc.test_publication import publication, table, wanted

A = ("public", "a")
LISTED = Narrowing(column_lists={A: ("body",)})
FILTERED = Narrowing(row_filters={A: "id > 5"})
KEYED = table("a", identity_columns=("id",), columns=("id", "body", "secret"))
KEYLESS = table("a", has_identity_index=False)


def part(*columns: str, filtered: bool = False, membership: int = 7) -> tuple[PublishedTable, ...]:
    listed = bool(columns)
    found = PublishedTable("public", "a", filtered, listed, membership, columns or None)
    return (found,)


def second(*tables: PublishedTable) -> Publication:
    return publication(
        name="p_inserts", tables=tables, all_operations=False, publishes_updates=False
    )


def compare(
    narrowing: Narrowing,
    want: list[Wanted],
    main: Publication,
    inserts: Publication,
    found: Table = KEYED,
    *,
    applied: tuple[int, str] | None = None,
    is_carried: bool = False,
) -> Plan:
    past = Past(named=[A], applied={} if applied is None else {A: applied})
    return plan(
        "p",
        want,
        main,
        {A: found},
        past=past,
        inserts=inserts,
        is_carried=is_carried,
        narrowing=narrowing,
    )


def run(change: Plan) -> list[str]:
    return [statement.as_string(None).replace('"', "") for statement in change.statements]


def test_a_list_has_the_columns_of_the_identity_where_updates_are_published() -> None:
    want = [wanted(1, "a", "update")]
    assert run(compare(LISTED, want, publication(), second())) == [
        "alter publication p add table only public.a (id, body)"
    ]
    assert run(compare(LISTED, [wanted(1, "a")], publication(), second(), KEYLESS)) == [
        "alter publication p_inserts add table only public.a (body)"
    ]


@pytest.mark.parametrize("changes", [{"replica_identity": "f"}, {"kind": "p"}])
def test_where_a_list_could_make_an_update_fail_there_is_none(changes: dict[str, object]) -> None:
    found = table("a", identity_columns=("id",), **changes)
    assert run(compare(LISTED, [wanted(1, "a", "update")], publication(), second(), found)) == [
        "alter publication p add table only public.a"
    ]


def test_filtered_rows_are_in_the_insert_only_publication() -> None:
    change = compare(FILTERED, [wanted(1, "a"), wanted(2, "a", "update")], publication(), second())
    assert isinstance(change.refused[2], RowsFiltered)
    assert run(change) == ["alter publication p_inserts add table only public.a where (id > 5)"]
    begun = [wanted(1, "a", started=True)]
    assert run(compare(FILTERED, begun, publication("a"), second())) == []  # not yet carried
    change = compare(FILTERED, begun, publication("a"), second(), is_carried=True)
    assert run(change) == [
        (
            "begin; alter publication p drop table only public.a; "
            "alter publication p_inserts add table only public.a where (id > 5); commit"
        )
    ]
    captured = [wanted(3, "a", "update", started=True)]
    assert run(compare(FILTERED, captured, publication("a"), second(), is_carried=True)) == []


def test_what_is_as_it_was_defined_is_left_alone() -> None:
    begun = [wanted(1, "a", "update", started=True)]
    change = compare(LISTED, begun, publication(tables=part("body", "id")), second())
    assert (run(change), change.drift) == ([], ())
    begun = [wanted(1, "a", started=True)]
    for applied in (None, (7, "id > 5"), (6, "another")):
        filtered = second(*part(filtered=True))
        change = compare(FILTERED, begun, publication(), filtered, applied=applied)
        assert (run(change), change.drift) == ([], ())


def test_settings_that_changed_are_no_drift() -> None:
    """Listed anew, filtered by another condition, or whole again, in one transaction."""
    begun = [wanted(1, "a", "update", started=True)]
    change = compare(LISTED, begun, publication("a"), second())
    assert change.drift == ()
    assert run(change) == [
        (
            "begin; alter publication p drop table only public.a; "
            "alter publication p add table only public.a (id, body); commit"
        )
    ]
    change = compare(
        Narrowing(), begun, publication(tables=part("body", "id")), second(), applied=(7, "")
    )
    assert change.drift == ()
    assert run(change)[0].endswith("add table only public.a; commit")
    begun = [wanted(1, "a", started=True)]
    filtered = second(*part(filtered=True))
    change = compare(FILTERED, begun, publication(), filtered, applied=(7, "id > 4"))
    assert change.drift == ()
    assert run(change)[0].endswith("where (id > 5); commit")


@pytest.mark.parametrize(
    ("narrowing", "found"),
    [
        (LISTED, part("id")),  # lacks what is to leave the database
        (LISTED, part("id", "body", filtered=True)),
        (Narrowing(), part("id", "body")),
    ],
)
def test_what_somebody_else_left_out_is_drift(
    narrowing: Narrowing, found: tuple[PublishedTable, ...]
) -> None:
    begun = [wanted(1, "a", "update", started=True)]
    change = compare(narrowing, begun, publication(tables=found), second())
    assert isinstance(change.loss, PublicationDrift)


def test_a_task_that_needs_another_column_is_refused() -> None:
    lacking = wanted(1, "a", "update", changed=True)
    narrowing = Narrowing(column_lists={A: ("secret",)})
    found = table("a", columns=("id", "body", "secret"), replica_identity="f")
    change = compare(narrowing, [lacking], publication(), second(), found)
    assert isinstance(change.refused[1], ColumnUnknown)
    assert "column body of public.a is not among" in str(change.refused[1])
    by_row = wanted(1, "a", ordered=True)
    filtered = Narrowing(column_lists={A: ("body",)}, row_filters={A: "id > 5"})
    change = compare(filtered, [by_row], publication(), second())
    assert "column id of public.a is not among" in str(change.refused[1])  # its jobs had no key
    assert not compare(LISTED, [by_row], publication(), second()).refused  # has the identity added
    unknown = compare(LISTED, [wanted(1, "a")], publication(), second(), table("a", columns=("x",)))
    assert "CDC_COLUMN_LISTS names" in str(unknown.refused[1])
