import re
from collections.abc import Iterator

import pytest

from cdc import errors
from cdc.errors import CdcError, ProtocolError, RelationUnknown, UndecodableMessage
from cdc.lsn import Lsn
from cdc.slots import RECREATABLE


def tree(root: type[CdcError] = CdcError) -> Iterator[type[CdcError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


ALL = sorted(set(tree()), key=lambda error: error.__name__)


def test_every_error_is_in_the_tree() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == {error for error in ALL if error.__module__ == "cdc.errors"}


@pytest.mark.parametrize("error", ALL)
def test_every_error_tells_the_operator_what_to_do(error: type[CdcError]) -> None:
    assert error.exit_code in {65, 69, 70, 78}
    assert isinstance(error.retry, errors.Retry)
    assert error.hint
    assert "\n" not in error.hint
    assert error.__doc__


def test_conditions_are_distinct_names() -> None:
    conditions = [
        error.condition for error in ALL if "condition" in vars(error) and error.condition
    ]
    assert len(conditions) == len(set(conditions))
    assert all(re.fullmatch(r"[a-z][a-z_]+", condition) for condition in conditions)
    assert {
        "slot_missing",
        "slot_lost",
        "slot_foreign",
        "slot_ahead",
        "server_behind",
        "publication_drift",
        "server_decode_error",
    } <= set(conditions)


@pytest.mark.parametrize("error", RECREATABLE)
def test_hints_name_the_setting_and_what_each_value_costs(error: type[CdcError]) -> None:
    for words in ("CDC_GAP_POLICY=stop", "CDC_GAP_POLICY=recreate", "gives no jobs"):
        assert words in error.hint


def test_no_hint_only_says_to_choose() -> None:
    assert [
        error for error in ALL if "gap policy" in error.hint and "no gap" not in error.hint
    ] == []


def test_a_hint_can_be_more_exact_than_its_class() -> None:
    error = errors.ReplicaIdentityMissing("table a.b", hint="alter table a.b replica identity full")
    assert error.hint == "alter table a.b replica identity full"
    assert errors.ReplicaIdentityMissing.hint != error.hint
    assert str(error) == "table a.b"


def test_protocol_errors_hold_the_facts() -> None:
    error = ProtocolError("I", 7, "N", "'X'")
    assert (error.tag, error.offset, error.expected, error.actual) == ("I", 7, "N", "'X'")
    assert str(error) == "message 'I', byte 7: expected N, got 'X'"
    unknown = RelationUnknown(16385)
    assert unknown.relation_oid == 16385
    assert "16385" in str(unknown)


def test_dead_letters_say_where_they_were() -> None:
    cause = ProtocolError("I", 7, "N", "'X'")
    error = UndecodableMessage(cause, relation_oid=1, ordinal=2, commit_lsn=Lsn.parse("A/B"))
    assert str(error) == f"commit A/B, ordinal 2: {cause}"
    assert (error.relation_oid, error.ordinal, error.commit_lsn) == (1, 2, 0xA0000000B)
