"""Filters that cannot be meant are refused when they are made, and only those."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Json,
    PlainSerializer,
    field_serializer,
    field_validator,
    model_serializer,
)
from typing_extensions import TypeAliasType, TypedDict

from conductor import OnChange, OnEvent, TableRow, define_event
from conductor.errors import FilterInvalid
from conductor.types import Array, Column, Composite, Numeric, Range, Timestamptz


class Mood(StrEnum):
    HAPPY = "happy"


class Size(Composite):
    width: int | None


class Users(TableRow, table="public.users"):
    id: int
    age: int | None
    email: str
    is_admin: bool
    price: Decimal | None
    cost: Numeric
    ratio: float
    born: date | None
    seen_at: Timestamptz | None
    mood: Mood
    kind: Literal["a", "b"]
    key: UUID
    class_: Annotated[str, Column("class")]
    tags: Array[str]
    data: Any
    raw: Json[Any] | None
    size: Size | None
    during: Range[int]
    code: Annotated[int, BeforeValidator(lambda value: int(str(value).removeprefix("c")))] | None
    level: int

    @field_validator("level", mode="before")
    @classmethod
    def read_level(cls, value: Any) -> Any:
        return {"low": 1}.get(value, value)


class Shifted(TableRow, table="public.users"):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    email: str


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ('new.age > "x"', 'new.age is a number, and > compares it with "x"'),
        ('new.age == "x"', "new.age is a number, and == compares"),
        ('"x" != new.age', "new.age is a number, and != compares"),
        ("new.age >= null", "new.age is a number, and >= compares it with null"),
        ("new.age == true", "new.age is a number, and == compares it with true"),
        ('new["age"] < b"x"', "is a number, and < compares"),
        ("new.email > 5", "new.email is text, and > compares it with 5"),
        ("new.email == -5.5", "new.email is text, and == compares it with -5.5"),
        ("5 < new.class", "new.class is text, and < compares it with 5"),
        ("new.email == false", "new.email is text"),
        ("new.seen_at > 2026", "new.seen_at is text"),
        ("new.born == 5", "new.born is text"),
        ("new.mood == 1", "new.mood is text"),
        ("new.kind == 1", "new.kind is text"),
        ("new.key == 1", "new.key is text"),
        ("new.during == 1", "new.during is text"),
        ('new.price > "cheap"', None),  # as text, when the column is numeric
        ('new.ratio > "high"', "new.ratio is a number"),
        ('new.id > 1 && new.age > "x"', "new.age is a number"),
        ('(new.id > 1 || (new.age > "x"))', "new.age is a number"),
        ('new.id > 1 ? new.age > "x" : true', "new.age is a number"),
        ("new.age", "new.age is a number, not a condition"),
        ("((new.age))", "new.age is a number, not a condition"),
        ("new.email", "new.email is text, not a condition"),
        ("!new.email", "new.email is text, not a condition"),
        ("new.email && new.id > 1", "new.email is text, not a condition"),
        ("new.id > 1 || new.email", "new.email is text, not a condition"),
        ("new.id ? true : false", "new.id is a number, not a condition"),
        ("new.price", "new.price is a number, not a condition"),
        ('"yes"', '"yes" is text, not a condition'),
        ("5", "5 is a number, not a condition"),
        ("null", "null is null, not a condition"),
        ("new.seen_at.getHours() > 5", "new.seen_at is text, which has no getHours()"),
        ("true || (1 + new.born.getMonth() > 5)", "new.born is text, which has no getMonth()"),
        ("true && 1", "1 is a number, not a condition"),
    ],
)
def test_what_cannot_be_meant_is_refused(when: str, message: str | None) -> None:
    if message is None:
        assert OnChange(Users, "insert", when=when).filter.when == when
        return
    with pytest.raises(FilterInvalid) as caught:
        OnChange(Users, "insert", when=when)
    assert f"filter {when!r}: " in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "when",
    [
        "new.age > 5", "new.age > 5.5", "new.age == 5u", "new.age != null", "null == new.age",
        'new.age == "5"', 'new.ratio == "NaN"', 'new.email == "5"', 'new.email > "x"',
        "new.is_admin", "!new.is_admin", "new.is_admin && new.id > 1", "new.is_admin == true",
        "new.is_admin == 1", "true", "new.id > 1 || true", "new.price > 9.5", 'new.price > "9.5"',
        "double(new.price) > 9.5", "new.cost > 9.5", 'new.cost == "9.50"',
        'timestamp(new.seen_at) > timestamp("2026-01-01T00:00:00Z")', 'new.seen_at > "2026"',
        'new.mood == "sad"', 'new.kind == "c"', "new.data > 5", 'new.data == "x"', "new.data",
        "new.raw == 5", "new.raw", "new.size == 5", "size(new.tags) > 1", "new.tags == 5",
        'new.code == "c5"', 'new.level == "low"', "new.age + 1 > 5", "size(new.email) > 5",
        "new.email.size() > 5", "5 in new.data", 'new.email in ["a", "b"]', "has(new.email)",
        "new == null || new.id > 1", "new.id > 1 ? new.is_admin : false", "-new.age > 5",
        'new.id > 1 ? new.email == "x" : true', "type(new.age) == int", "!(new.age > 5)",
        "[1, 2].exists(x, x == new.id)", 'new.data.exists(new, new.age == "x")',
        'new.data.new.age == "x"', 'dyn(new.age) == "x"', "1 + 1 == 2",
        'string(new.age) == "x"', 'new.age.foo == "x"', 'new.data[0].age == "x"',
        "new.id == new.email",
        "new.email == new.id", "// new.age\n true", "1 == 2", '"a" == "b"', "op == 5",
    ],
)  # fmt: skip
def test_what_may_be_meant_passes(when: str) -> None:
    assert OnChange(Users, "insert", when=when).filter.when == when


def test_a_model_that_makes_text_of_numbers_is_certain_of_nothing() -> None:
    assert OnChange(Shifted, "insert", when="new.email > 5").filter.when


class Pen:
    """What JSON does not have."""


class Drawn(TableRow, table="public.drawn"):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    age: int
    pen: str | Pen = Pen()


@pytest.mark.filterwarnings("error")
def test_a_model_that_json_cannot_describe_is_no_matter() -> None:
    with pytest.raises(FilterInvalid):
        OnChange(Drawn, "insert", when='new.age > "x"')


class Paid(BaseModel):
    amount: Decimal
    count: int
    at: datetime
    late: datetime

    @field_serializer("late")
    def number(self, value: datetime) -> float:
        return value.timestamp()


@pytest.mark.parametrize(
    ("when", "fits"),
    [
        ("event.count > 5", True),
        ('event.count > "x"', False),
        ("event.amount > 5", True),  # SQL may send a number
        ("event.at > 5", False),
        ("event.late > 5", True),
        ("event.count", False),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_a_payload_is_what_is_sent_or_read(when: str, fits: bool, validate: bool) -> None:
    event = define_event("paid", payload=Paid, validate=validate)
    if fits or not validate:
        assert OnEvent(event, when=when).filter.when == when
        return
    with pytest.raises(FilterInvalid):
        OnEvent(event, when=when)


class Unannotated(BaseModel):
    late: datetime
    early: Annotated[datetime, PlainSerializer(lambda value: value.timestamp())]
    count: int

    @field_serializer("late")
    def number(self, value: datetime):  # type: ignore[no-untyped-def]  # noqa: ANN201 - the point
        return value.timestamp()


class Whole(BaseModel):
    late: datetime

    @model_serializer
    def numbers(self) -> dict[str, Any]:
        return {"late": self.late.timestamp()}


class Loose(TypedDict):
    code: Annotated[str, BeforeValidator(str)]
    count: int


@dataclass
class Record:
    code: Annotated[str, BeforeValidator(str)]
    count: int


Text = TypeAliasType("Text", Annotated[str, BeforeValidator(str)])
Old = Annotated[Paid, BeforeValidator(lambda value: {**value, "late": 0})]
Older = TypeAliasType("Older", Old)


class Aliased(BaseModel):
    code: Text | None
    count: int


@pytest.mark.parametrize(
    ("payload", "when"),
    [
        (Unannotated, "event.late > 5"),
        (Unannotated, "event.early > 5.5"),
        (Whole, "event.late > 5"),
        (Loose, "event.code == 5"),
        (Record, "event.code == 5"),
        (Aliased, "event.code == 5"),
        (Old, "event.at > 5"),
        (Older, "event.at > 5"),
    ],
)
def test_what_a_function_makes_of_a_field_is_not_judged(payload: Any, when: str) -> None:
    event = define_event("loose", payload=payload)
    assert OnEvent(event, when=when).filter.when == when


@pytest.mark.parametrize("payload", [Unannotated, Loose, Record, Aliased])
def test_other_fields_are_judged_as_before(payload: Any) -> None:
    with pytest.raises(FilterInvalid, match=r"event.count is a number"):
        OnEvent(define_event("loose", payload=payload), when='event.count == "x"')
