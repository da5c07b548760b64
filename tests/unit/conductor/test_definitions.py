from __future__ import annotations

import subprocess
import sys
import typing
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, NotRequired
from uuid import UUID

import pytest
from pydantic import BaseModel, Field, RootModel
from pydantic import computed_field as computed
from typing_extensions import TypedDict

from conductor import define_event, define_task
from conductor.codec import Codec, is_json_form
from conductor.definitions import check_name
from conductor.errors import DefinitionInvalid, PayloadInvalid, ResultInvalid


class Address(BaseModel):
    city: str = Field(alias="City")
    size: Decimal = Decimal(1)

    @computed
    def label(self) -> str:
        return self.city.upper()


@dataclass
class Point:
    x: int
    at: datetime


class Pair(NamedTuple):
    left: int
    right: UUID


class Options(TypedDict):
    id: int
    tags: NotRequired[list[str]]


class Odd(RootModel[int]): ...


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (Address, Address(City="Berlin", size=Decimal("1.50"))),
        (Point, Point(1, NOW)),
        (Pair, Pair(1, UUID(int=7))),
        (Options, {"id": 1, "tags": ["a"]}),
        (int | str, "x"),
        (Literal["a", "b"], "b"),
        (list[Address], [Address(City="Rom")]),
        (set[int], {1, 2}),
        (dict[str, datetime], {"a": NOW}),
        (None, None),
        (Odd, Odd(3)),
        (Any, {"a": [None, 1.5, "x"]}),
        (int, 2**70),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_values_survive_the_queue(form: Any, value: Any, validate: bool) -> None:
    task = define_task("t", payload=form, returns=form, validate=validate)
    assert task.decode_payload(task.encode_payload(value)) == value
    event = define_event("e", payload=form, validate=validate)
    assert event.decode_payload(event.encode_payload(value)) == value
    assert task.decode_result(task.returns.encode(value)) == value


def test_a_wrong_payload_is_named_without_its_value() -> None:
    task = define_task("send", payload=Point)
    with pytest.raises(PayloadInvalid, match=r"payload of task 'send': x: .*valid integer") as info:
        task.decode_payload(b'{"x": "secret-token", "at": "2026-01-01T00:00:00Z"}')
    assert info.value.errors[0]["loc"] == ("x",)
    assert "secret-token" not in f"{info.value} {info.value.errors}"


def test_types_only_means_that_nothing_is_checked() -> None:
    task = define_task("t", payload=Options, validate=False)
    wrong: Any = {"id": "not a number"}
    assert task.decode_payload(task.encode_payload(wrong)) == wrong
    with pytest.raises(PayloadInvalid):
        define_task("t", payload=Options).encode_payload(wrong)


def test_types_that_json_lacks_are_converted_even_then() -> None:
    task = define_task("t", payload=Point, validate=False)
    assert task.decode_payload(b'{"x": 1, "at": "2026-01-01T00:00:00Z"}') == Point(1, NOW)


@pytest.mark.parametrize("data", [b"null", b"{}", b" { } "])
def test_no_payload_is_null_or_an_empty_object(data: bytes) -> None:
    task = define_task("t")
    assert task.decode_payload(data) is None
    with pytest.raises(PayloadInvalid):
        task.decode_payload(b"[1]")
    unwanted: Any = 1
    with pytest.raises(PayloadInvalid):
        task.encode_payload(unwanted)


class Opaque: ...


class Plain(typing.TypedDict):
    id: int


class Dated(typing.TypedDict):
    at: datetime


class Recursive(BaseModel):
    children: list[Recursive]
    later: Later


class Later(BaseModel):
    id: int


def test_what_pydantic_cannot_take_is_refused_where_it_is_defined() -> None:
    with pytest.raises(DefinitionInvalid, match="payload of task 't': pydantic cannot take Opaque"):
        define_task("t", payload=Opaque)
    with pytest.raises(DefinitionInvalid, match="result of task 't': pydantic cannot take"):
        define_task("t", returns=list[Opaque])
    with pytest.raises(DefinitionInvalid, match="payload of event 'e': pydantic cannot take"):
        define_event("e", payload=Opaque | None)
    shape: Any = {"to": str}
    with pytest.raises(DefinitionInvalid, match=r"pydantic cannot take {'to': .*: it is no type"):
        define_task("t", payload=shape)


def test_a_typed_dict_of_typing_is_refused_with_the_one_to_import() -> None:
    for form in (Plain, list[Plain], dict[str, Plain | None]):
        if sys.version_info >= (3, 12):  # pydantic takes it there
            define_task("t", payload=form)
            continue
        with pytest.raises(DefinitionInvalid, match=r"Plain.* typing.TypedDict") as refused:
            define_task("t", payload=form)
        assert "from typing_extensions import TypedDict" in refused.value.hint
    if sys.version_info < (3, 12):
        with pytest.raises(DefinitionInvalid, match="Dated"):
            define_event("e", payload=Dated, validate=False)
    assert define_task("t", payload=Plain, validate=False).encode_payload({"id": 1}) == b'{"id":1}'


def test_a_name_that_is_defined_later_is_no_error() -> None:
    class Early(BaseModel):
        late: Late

    task = define_task("t", payload=Early)

    class Late(BaseModel):
        id: int

    Early.model_rebuild()
    assert task.decode_payload(b'{"late": {"id": 1}}') == Early(late=Late(id=1))


def test_the_members_of_a_json_object_are_known() -> None:
    assert Codec(Address).members() == frozenset({"City", "size"})
    assert Codec(Options).members() == frozenset({"id", "tags"})
    assert Codec(Recursive).members() == frozenset({"children", "later"})
    for form in (dict[str, int], int, Opaque, Address | Options, None):
        assert Codec(form).members() is None


def test_results_are_checked_when_read() -> None:
    with pytest.raises(ResultInvalid, match="result of task 't'"):
        define_task("t", returns=int).decode_result(b'"x"')
    with pytest.raises(ResultInvalid):
        define_task("t", returns=int).decode_result(None)


@pytest.mark.parametrize("name", ["send-email", "user.created", "A_1.b-2", "x" * 100])
def test_names_that_are_taken(name: str) -> None:
    assert check_name("task", name) == name


@pytest.mark.parametrize(
    "name", ["", " a", "1a", "a b", "a..b", "a.", ".a", "ä", "a/b", "x" * 101, "a\n", None, 3]
)
def test_names_that_are_refused_say_what_is_allowed(name: Any) -> None:
    with pytest.raises(DefinitionInvalid, match="cannot be the name of an event") as info:
        define_event(name)
    assert "send-email" in info.value.hint


def test_reserved_names_are_refused() -> None:
    with pytest.raises(DefinitionInvalid, match="reserved"):
        define_task("conductor.dispatch")
    with pytest.raises(DefinitionInvalid, match="name of a queue"):
        define_task("ok", queue="not ok")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Options, True),
        (list[dict[str, int | None]], True),
        (Literal["a", 1], True),
        (Any, True),
        (set[int], False),
        (tuple[int, ...], False),
        (dict[int, str], False),
        (datetime, False),
        (Address, False),
        (list[datetime], False),
    ],
)
def test_which_types_parsed_json_already_has(form: Any, expected: bool) -> None:
    assert is_json_form(form) is expected


def test_definitions_load_no_database_driver() -> None:
    code = (
        "import sys; from conductor import Cron, OnChange, OnEvent, TableRow, define_event, "
        "define_task; define_task('a', int); sys.exit('psycopg' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
