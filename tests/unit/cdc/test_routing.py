"""Routing: which jobs a change gives, and exactly what they hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cdc.relations import RelationCache, RelationShape
from cdc.routing import Routed, Router
from cdc.table_plan import Change
from cdc.wire.messages import UNCHANGED, Column, Delete, Insert, Relation, Truncate, Update
from conductor.contract import JobSpec
from conductor.matching import ChangeFilter, Subscription, change_topic

COMMIT_LSN = 0x16B3748
COMMIT_TIME_US = 1_714_564_800_000_001  # 2024-05-01T12:00:00.000001Z
OID = 16385


def describe(cache: RelationCache, *, name: str = "users", identity: str = "d") -> RelationShape:
    columns = (
        Column("id", 20, -1, is_key=True),
        Column("email", 25, -1, is_key=identity == "f"),
        Column("bio", 25, -1, is_key=identity == "f"),
    )
    cache.apply(Relation(OID, "shop", name, identity, columns))
    return cache.get(OID)


def subscribe(subscription_id: int, **definition: Any) -> Subscription:
    wanted: dict[str, Any] = {
        "schema": "shop",
        "table": "users",
        "operations": ["delete", "insert", "truncate", "update"],
        **definition,
    }
    return Subscription.from_row(
        {
            "id": subscription_id,
            "app": "shop",
            "task": f"task-{subscription_id}",
            "trigger": "change",
            "queue": "default",
            "version": None,
            "rank": 0,
            "source": "default",
            "kind": "change",
            "definition": wanted,
        }
    )


@pytest.fixture
def shape() -> RelationShape:
    return describe(RelationCache())


def route(
    shape: RelationShape, change: Change, *subscriptions: Subscription, raw: bytes = b"raw"
) -> Routed:
    router, out = Router(7, subscriptions), Routed()
    router.begin(COMMIT_LSN, COMMIT_TIME_US)
    router.route(shape, change, 3, raw, out)
    return out


def payloads(routed: Routed) -> list[dict[str, Any]]:
    return [json.loads(spec.payload) for spec in routed.specs]


STAMP = {"commit_time": "2024-05-01T12:00:00.000001+00:00", "commit_lsn": "0/16B3748"}
TABLE = {"schema": "shop", "table": "users"}


def test_an_insert_carries_every_column(shape: RelationShape) -> None:
    routed = route(shape, Insert(OID, [b"7", b'a"b%s', None]), subscribe(1))
    new = {"id": 7, "email": 'a"b%s', "bio": None}
    assert payloads(routed) == [{"op": "insert", **TABLE, "new": new, **STAMP}]


def test_a_job_is_identified_by_generation_commit_ordinal_and_subscription(
    shape: RelationShape,
) -> None:
    wanted = subscribe(1)
    (spec,) = route(shape, Insert(OID, [b"7", None, None]), wanted).specs
    no_metadata, eight_bytes = b"\xff\xff\xff\xff", b"\0\0\0\x08"
    generation, lsn = (7).to_bytes(8, "big"), COMMIT_LSN.to_bytes(8, "big")
    position = no_metadata + eight_bytes + generation + eight_bytes + lsn
    assert spec == JobSpec(wanted.head, position, 3, spec.payload)


def test_a_projection_limits_new_and_old(shape: RelationShape) -> None:
    shape = describe(RelationCache(), identity="f")
    update = Update(OID, "O", [b"7", b"a", b"x"], [b"7", b"b", b"x"])
    (payload,) = payloads(route(shape, update, subscribe(1, columns=["email"])))
    assert (payload["new"], payload["old"]) == ({"email": "b"}, {"email": "a"})


def test_one_change_gives_one_job_a_subscription_that_wants_it(shape: RelationShape) -> None:
    insert = Insert(OID, [b"7", b"a", None])
    wanting = [subscribe(1), subscribe(2, operations=["insert"], columns=["id"])]
    others = [subscribe(3, operations=["delete"]), subscribe(4, table="orders")]
    routed = route(shape, insert, *wanting, *others)
    assert [spec.head for spec in routed.specs] == [s.head for s in wanting]
    assert payloads(routed)[1]["new"] == {"id": 7}


def test_a_change_nobody_wants_is_counted(shape: RelationShape) -> None:
    routed = route(shape, Delete(OID, "K", [b"7", None, None]), subscribe(1, operations=["insert"]))
    assert (routed.specs, routed.unmatched) == ([], 1)


class TestUpdate:
    """What of the old row the WAL holds depends on the replica identity."""

    def test_without_an_old_row(self, shape: RelationShape) -> None:
        update = Update(OID, None, None, [b"7", b"b", b"x"])
        (payload,) = payloads(route(shape, update, subscribe(1)))
        new = {"id": 7, "email": "b", "bio": "x"}
        assert payload == {"op": "update", **TABLE, "new": new, **STAMP}

    def test_with_a_changed_key(self, shape: RelationShape) -> None:
        update = Update(OID, "K", [b"6", None, None], [b"7", b"b", b"x"])
        (payload,) = payloads(route(shape, update, subscribe(1)))
        assert payload["old"] == {"id": 6}
        assert "changed" not in payload

    def test_with_the_full_row(self) -> None:
        shape = describe(RelationCache(), identity="f")
        update = Update(OID, "O", [b"7", b"a", None], [b"7", b"b", None])
        (payload,) = payloads(route(shape, update, subscribe(1)))
        assert payload["old"] == {"id": 7, "email": "a", "bio": None}
        assert payload["changed"] == ["email"]

    def test_an_unchanged_toasted_value_is_named_and_never_null(self, shape: RelationShape) -> None:
        update = Update(OID, None, None, [b"7", b"b", UNCHANGED])
        whole, narrow = payloads(
            route(shape, update, subscribe(1), subscribe(2, columns=["id", "email"]))
        )
        assert whole["new"] == {"id": 7, "email": "b"}
        assert whole["unchanged"] == ["bio"]
        assert "unchanged" not in narrow

    def test_a_full_old_row_fills_in_the_unchanged_value(self) -> None:
        shape = describe(RelationCache(), identity="f")
        update = Update(OID, "O", [b"7", b"a", b"long"], [b"7", b"b", UNCHANGED])
        (payload,) = payloads(route(shape, update, subscribe(1)))
        assert payload["new"] == {"id": 7, "email": "b", "bio": "long"}
        assert payload["changed"] == ["email"]
        assert "unchanged" not in payload

    @pytest.mark.parametrize(
        ("new", "jobs"), [([b"7", b"b", b"x"], 1), ([b"7", b"a", b"y"], 0), ([b"7", b"a", b"x"], 0)]
    )
    def test_changed_columns_filter(self, new: list[bytes], jobs: int) -> None:
        shape = describe(RelationCache(), identity="f")
        update = Update(OID, "O", [b"7", b"a", b"x"], list(new))
        routed = route(shape, update, subscribe(1, changed=["email"]))
        assert len(routed.specs) == jobs

    def test_a_column_the_table_has_no_more_lets_every_update_through(self) -> None:
        shape = describe(RelationCache(), identity="f")
        update = Update(OID, "O", [b"7", b"a", b"x"], [b"7", b"a", b"x"])
        assert len(route(shape, update, subscribe(1, changed=["mail"])).specs) == 1
        assert route(shape, update, subscribe(1, changed=["email"])).specs == []

    def test_a_filter_nobody_can_decide_lets_the_change_through(self, shape: RelationShape) -> None:
        update = Update(OID, None, None, [b"7", b"a", b"x"])
        assert len(route(shape, update, subscribe(1, changed=["email"])).specs) == 1


def test_a_delete_holds_the_key_or_the_row(shape: RelationShape) -> None:
    (by_key,) = payloads(route(shape, Delete(OID, "K", [b"7", None, None]), subscribe(1)))
    assert by_key == {"op": "delete", **TABLE, "old": {"id": 7}, **STAMP}
    full = describe(RelationCache(), identity="f")
    (by_row,) = payloads(route(full, Delete(OID, "O", [b"7", b"a", b"x"]), subscribe(1)))
    assert by_row["old"] == {"id": 7, "email": "a", "bio": "x"}


def test_a_truncate_has_its_options(shape: RelationShape) -> None:
    truncate = Truncate((OID,), cascade=True, restart_identity=False)
    (payload,) = payloads(route(shape, truncate, subscribe(1)))
    options = {"cascade": True, "restart_identity": False}
    assert payload == {"op": "truncate", **TABLE, **options, **STAMP}


def test_a_bad_value_is_a_dead_letter_only_where_it_is_captured(shape: RelationShape) -> None:
    change = Insert(OID, [b"7", b"a", b"\xff"])
    routed = route(shape, change, subscribe(1), subscribe(2, columns=["id"]), raw=b"as it came")
    assert [p["new"] for p in payloads(routed)] == [{"id": 7}]
    (letter,) = routed.dead_letters
    assert (letter.subscription, letter.commit_lsn, letter.ordinal) == (1, COMMIT_LSN, 3)
    assert letter.raw == b"as it came"
    assert letter.relation is not None
    assert letter.relation["table"] == "users"
    assert "UTF-8" in letter.error


def test_a_row_of_another_width_is_a_dead_letter(shape: RelationShape) -> None:
    routed = route(shape, Insert(OID, [b"7"]), subscribe(1))
    assert routed.specs == []
    assert len(routed.dead_letters) == 1


def test_activation_and_retirement_take_effect_at_once(shape: RelationShape) -> None:
    router, out = Router(7, []), Routed()
    router.begin(COMMIT_LSN, COMMIT_TIME_US)
    insert = Insert(OID, [b"7", None, None])
    assert not router.wants(shape)
    router.activate([subscribe(1)])
    assert router.wants(shape)
    router.route(shape, insert, 0, b"", out)
    router.retire([1])
    router.route(shape, insert, 1, b"", out)
    assert [spec.ordinal for spec in out.specs] == [0]


def test_a_table_that_is_described_anew_is_routed_in_its_new_shape(shape: RelationShape) -> None:
    router, out = Router(7, [subscribe(1)]), Routed()
    router.begin(COMMIT_LSN, COMMIT_TIME_US)
    router.route(shape, Insert(OID, [b"7", None, None]), 0, b"", out)
    cache = RelationCache()
    cache.apply(Relation(OID, "shop", "users", "d", (Column("number", 20, -1, is_key=True),)))
    router.route(cache.get(OID), Insert(OID, [b"8"]), 1, b"", out)
    cache.apply(Relation(OID, "shop", "people", "d", (Column("number", 20, -1, is_key=True),)))
    router.route(cache.get(OID), Insert(OID, [b"9"]), 2, b"", out)
    assert [p["new"] for p in payloads(out)] == [
        {"id": 7, "email": None, "bio": None},
        {"number": 8},
    ]


def test_filters_keep_their_definition() -> None:
    wanted = ChangeFilter("shop", "users", frozenset({"insert"}), ("id",), ("email",), None)
    assert ChangeFilter.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted


def errors(routed: Routed) -> list[tuple[int | None, str]]:
    return [(letter.subscription, letter.error) for letter in routed.dead_letters]


def test_a_filter_decides_and_sees_columns_that_are_not_captured(shape: RelationShape) -> None:
    wanting = subscribe(1, columns=["id"], when='new.email.endsWith("@e") && op == "insert"')
    (payload,) = payloads(route(shape, Insert(OID, [b"7", b"a@e", None]), wanting))
    assert payload["new"] == {"id": 7}
    routed = route(shape, Insert(OID, [b"7", b"a@f", None]), wanting)
    assert (routed.specs, routed.dead_letters, routed.unmatched) == ([], [], 1)


def test_a_filter_concerns_its_own_subscription_alone(shape: RelationShape) -> None:
    routed = route(
        shape,
        Insert(OID, [b"7", b"a", None]),
        subscribe(1),
        subscribe(2, when="new.id > 7"),
        subscribe(3, when="new.bio > 7"),
        subscribe(4, when="new.id == 7 && new.bio == null"),
        raw=b"the message",
    )
    assert [spec.head for spec in routed.specs] == [subscribe(1).head, subscribe(4).head]
    assert routed.unmatched == 0
    (letter,) = routed.dead_letters
    assert (letter.subscription, letter.raw, letter.ordinal) == (3, b"the message", 3)
    assert letter.error.startswith("FilterFailed: filter 'new.bio > 7': No such overload")
    assert letter.relation is not None


def test_a_filter_that_fails_alone_is_not_an_unmatched_change(shape: RelationShape) -> None:
    routed = route(shape, Insert(OID, [b"7", b"a", None]), subscribe(1, when="new.id >"))
    assert (routed.specs, routed.unmatched) == ([], 0)
    assert "is not CEL" in routed.dead_letters[0].error


@pytest.mark.parametrize(
    ("identity", "update", "when", "expected"),
    [
        ("f", Update(OID, "O", [b"7", b"a", b"x"], [b"7", b"b", b"x"]), '"email" in changed', 1),
        ("f", Update(OID, "O", [b"7", b"a", b"x"], [b"7", b"b", b"x"]), '"bio" in changed', 0),
        ("f", Update(OID, "O", [b"7", b"a", b"x"], [b"7", b"b", b"x"]), "old.email < new.email", 1),
        ("f", Update(OID, "O", [b"7", b"a", b"x"], [b"7", b"b", UNCHANGED]), 'new.bio == "x"', 1),
        ("d", Update(OID, None, None, [b"7", b"b", b"x"]), "old == null && changed == null", 1),
        ("d", Update(OID, None, None, [b"7", b"b", UNCHANGED]), "has(new.bio)", 0),
        ("d", Update(OID, "K", [b"6", None, None], [b"7", b"b", b"x"]), "old.id != new.id", 1),
        ("d", Update(OID, "K", [b"6", None, None], [b"7", b"b", b"x"]), "old.size() == 1", 1),
    ],
)
def test_a_filter_sees_an_update_as_the_wal_has_it(
    identity: str, update: Update, when: str, expected: int
) -> None:
    shape = describe(RelationCache(), identity=identity)
    routed = route(shape, update, subscribe(1, when=when))
    assert (len(routed.specs), routed.dead_letters) == (expected, [])


@pytest.mark.parametrize(
    ("change", "when"),
    [
        (Delete(OID, "K", [b"7", None, None]), "old.id == 7 && new == null && changed == []"),
        (Delete(OID, "K", [b"7", None, None]), "!has(old.email)"),
        (
            Truncate((OID,), cascade=False, restart_identity=False),
            'op == "truncate" && old == null',
        ),
        (Insert(OID, [b"7", b"a", None]), "old == null && new.size() == 3"),
    ],
)
def test_a_filter_sees_every_operation(shape: RelationShape, change: Change, when: str) -> None:
    assert len(route(shape, change, subscribe(1, when=when)).specs) == 1


def test_a_filter_reads_only_what_it_names(shape: RelationShape) -> None:
    insert = Insert(OID, [b"7", b"a", b"\xff"])
    routed = route(
        shape,
        insert,
        subscribe(1, columns=["id"], when="new.id == 7"),
        subscribe(2, columns=["id"], when='new.bio == ""'),
        subscribe(3, columns=["id"], when="new.size() == 3"),
    )
    assert [spec.head for spec in routed.specs] == [subscribe(1).head]
    assert [number for number, _ in errors(routed)] == [2, 3]
    assert all("ValueUndecodable" in error for _, error in errors(routed))


def test_a_row_of_another_width_is_a_dead_letter_of_a_filter_too(shape: RelationShape) -> None:
    routed = route(shape, Insert(OID, [b"7"]), subscribe(1, when="new.id == 7"))
    assert [number for number, _ in errors(routed)] == [1]


def test_json_that_is_no_text_is_a_dead_letter_of_the_filter() -> None:
    cache = RelationCache()
    cache.apply(Relation(OID, "shop", "users", "d", (Column("data", 114, -1, is_key=True),)))
    change = Insert(OID, [b'"\\ud800"'])
    routed = route(cache.get(OID), change, subscribe(1, when='new.data == ""'), subscribe(2))
    assert [number for number, _ in errors(routed)] == [1]
    assert len(routed.specs) == 1


# --- what jobs wait for ----------------------------------------------------------------------


def test_what_jobs_wait_for_becomes_no_job(shape: RelationShape) -> None:
    waiting = subscribe(2, operations=["insert"], waits=True, when="new.id > 4")
    router, out = Router(3, [subscribe(1), waiting]), Routed()
    router.begin(COMMIT_LSN, COMMIT_TIME_US)
    for number in (b"4", b"5"):
        router.route(shape, Insert(OID, [number, b"a", None]), 0, b"raw", out)
    assert [spec.head for spec in out.specs] == [subscribe(1).head] * 2
    assert [(topic, json.loads(spec.payload)["new"]["id"]) for topic, spec in out.waits] == [
        (change_topic(wanted(waiting)), 5)
    ]


def test_a_table_that_jobs_alone_wait_for_is_wanted(shape: RelationShape) -> None:
    router = Router(3, [subscribe(2, operations=["insert"], waits=True)])
    assert router.wants(shape)
    router.retire([2])
    assert not router.wants(shape)


def test_a_bad_value_is_no_word_but_a_dead_letter(shape: RelationShape) -> None:
    router, out = Router(3, [subscribe(2, waits=True)]), Routed()
    router.begin(COMMIT_LSN, COMMIT_TIME_US)
    router.route(shape, Insert(OID, [b"7", b"a", b"\xff"]), 0, b"raw", out)
    assert (out.specs, out.waits) == ([], [])
    assert [letter.subscription for letter in out.dead_letters] == [2]


def wanted(subscription: Subscription) -> ChangeFilter:
    assert isinstance(subscription.filter, ChangeFilter)
    return subscription.filter


def keys(routed: Routed) -> list[str | None]:
    return [spec.key for spec in routed.specs]


INSERT = Insert(OID, [b"7", b"a@b", None])


@pytest.mark.parametrize(
    "change, key",
    [
        (INSERT, "7"),
        (Update(OID, None, None, [b"7", b"b", UNCHANGED]), "7"),
        (Update(OID, "K", [b"6", None, None], [b"7", b"b", None]), "7"),
        (Delete(OID, "K", [b"7", None, None]), "7"),
    ],
)
def test_a_key_is_that_of_the_row(shape: RelationShape, change: Change, key: str) -> None:
    (spec,) = route(shape, change, subscribe(1, ordered=True)).specs
    assert (spec.key, spec.ordered, spec.coalesce_us) == (key, True, 0)
    (spec,) = route(shape, change, subscribe(1, coalesce_s=1.5)).specs
    assert (spec.key, spec.ordered, spec.coalesce_us) == (key, False, 1_500_000)
    (spec,) = route(shape, change, subscribe(1)).specs
    assert (spec.key, spec.ordered, spec.coalesce_us) == (None, False, 0)


@pytest.mark.parametrize(
    "columns, key",
    [(["email"], "a@b"), (["bio"], "null"), (["email", "id", "bio"], '["a@b",7,null]')],
)
def test_a_key_is_made_of_the_columns_that_are_named(
    shape: RelationShape, columns: list[str], key: str
) -> None:
    wanted = subscribe(1, ordered=True, key=columns, columns=["id"])
    routed = route(shape, INSERT, wanted, subscribe(2))
    assert keys(routed) == [key, None]
    assert payloads(routed)[0]["new"] == {"id": 7}


def test_a_full_old_row_fills_in_the_key() -> None:
    shape = describe(RelationCache(), identity="f")
    update = Update(OID, "O", [b"7", b"a", b"long"], [b"7", b"b", UNCHANGED])
    assert keys(route(shape, update, subscribe(1, ordered=True, key=["bio"]))) == ["long"]


def test_a_key_that_nobody_can_tell_is_a_dead_letter_of_its_own_subscription(
    shape: RelationShape,
) -> None:
    update = Update(OID, None, None, [b"7", b"b", UNCHANGED])
    wanted = [subscribe(1), subscribe(2, ordered=True, key=["bio"]), subscribe(3, ordered=True)]
    routed = route(shape, update, *wanted, subscribe(4, ordered=True, key=["gone"]))
    assert keys(routed) == [None, "7"]
    assert [letter.subscription for letter in routed.dead_letters] == [2, 4]
    assert "'bio' is not in the WAL" in routed.dead_letters[0].error
    assert "no 'gone'" in routed.dead_letters[1].error


@pytest.mark.parametrize(
    "options, old_kind, fills",
    [
        ({}, None, True),
        ({}, "K", False),
        ({"when": "new.id > 1"}, None, False),
        ({"operations": ["update"]}, None, False),
        ({"key": ["email"]}, None, False),
        ({"key": ["email", "id"]}, None, True),
    ],
)
def test_a_change_is_filled_in_only_if_no_other_can_be_missing(
    shape: RelationShape, options: dict[str, Any], old_kind: Any, fills: bool
) -> None:
    old: Any = [b"6", None, None] if old_kind else None
    update = Update(OID, old_kind, old, [b"7", b"b", UNCHANGED])
    (spec,) = route(shape, update, subscribe(1, coalesce_s=1, **options)).specs
    assert spec.fills is fills


@pytest.mark.parametrize(
    "identity, key, window_us",
    [("d", ["email"], 0), ("d", ["email", "id"], 1_000_000), ("f", ["email"], 1_000_000)],
)
def test_changes_of_several_rows_do_not_coalesce(
    identity: str, key: list[str], window_us: int
) -> None:
    shape = describe(RelationCache(), identity=identity)
    (spec,) = route(shape, INSERT, subscribe(1, coalesce_s=1, key=key, ordered=True)).specs
    assert (spec.coalesce_us, spec.ordered) == (window_us, True)


def test_a_whole_row_is_no_key() -> None:
    shape = describe(RelationCache(), identity="f")
    routed = route(
        shape, INSERT, subscribe(1, ordered=True), subscribe(2, ordered=True, key=["id"])
    )
    assert keys(routed) == ["7"]
    assert [letter.subscription for letter in routed.dead_letters] == [1]


def test_a_truncate_has_no_key(shape: RelationShape) -> None:
    truncate = Truncate((OID,), cascade=False, restart_identity=False)
    assert keys(route(shape, truncate, subscribe(1, ordered=True))) == [None]
