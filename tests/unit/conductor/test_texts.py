from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, Field
from typing_extensions import TypedDict

from conductor import define_event, define_task
from conductor.definitions import Task
from conductor.errors import PayloadInvalid, ResultInvalid
from conductor.texts import clean, flaw_of, to_document
from conductor.triggers import Invocable


class Line(BaseModel):
    notes: list[str] = Field(alias="Notes")


class Order(BaseModel):
    lines: list[Line]


@dataclass
class Point:
    label: str


class Plain(TypedDict):
    name: str


def order(note: str) -> Order:
    return Order(lines=[Line(Notes=["fine"]), Line(Notes=["fine", note])])


FLAWED = ("a\0b", "half \ud800")


@pytest.mark.parametrize("text", FLAWED, ids=["nul", "surrogate"])
@pytest.mark.parametrize(
    ("form", "value", "where"),
    [
        (Order, order, r"lines\.1\.[Nn]otes\.1"),
        (Point, Point, "label"),
        (dict[str, Any], lambda text: {"a": {"b": [{text: 1}]}}, r"a\.b\.0\."),
        (Plain, lambda text: {"name": text}, "name"),
        (Any, lambda text: [1, ("x", text)], r"1\.1"),
        (str, lambda text: text, "the text"),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_what_postgresql_cannot_hold_is_refused_and_found(
    form: Any, value: Any, where: str, text: str, *, validate: bool
) -> None:
    task = define_task("flawed", payload=form, validate=validate)
    event = define_event("flawed", payload=form, validate=validate)
    for definition, noun in ((task, "task"), (event, "event")):
        with pytest.raises(PayloadInvalid, match=f"payload of {noun} 'flawed': {where}") as refused:
            definition.encode_payload(value(text))
        assert "holds" in str(refused.value)
        assert "base64" in refused.value.hint
        assert str(refused.value).isprintable()


def test_a_backslash_before_the_digits_is_no_nul() -> None:
    task = define_task("paths", payload=str)
    assert task.decode_payload(task.encode_payload("c:\\u0000")) == "c:\\u0000"


@pytest.mark.parametrize("text", FLAWED, ids=["nul", "surrogate"])
def test_a_result_is_refused_likewise(text: str) -> None:
    definition = define_task("flawed", returns=dict[str, str])

    async def handler(_event: Any, _ctx: Any) -> dict[str, str]:
        return {}

    task = Task(definition=definition, triggers=(Invocable(),), handler=handler, is_sync=False)
    with pytest.raises(ResultInvalid, match="result of task 'flawed': city: the text holds"):
        task.encode_result({"city": text})


def test_what_pydantic_says_of_a_value_can_be_stored() -> None:
    def refuse(value: str) -> str:
        raise ValueError(f"not {value}")

    task = define_task("picky", payload=dict[str, Annotated[str, AfterValidator(refuse)]])
    with pytest.raises(PayloadInvalid) as refused:
        task.decode_payload(b'{"a\\u0000": "b\\u0000"}')
    assert refused.value.errors == [
        {"loc": ("a",), "msg": "Value error, not b", "type": "value_error"}
    ]
    assert "\0" not in str(refused.value)
    choice = define_task("choice", payload=Literal["x"])
    with pytest.raises(PayloadInvalid):
        choice.encode_payload("y\0")  # type: ignore[arg-type]


def test_texts_are_told_apart() -> None:
    assert flaw_of("\u20ac \U0001f600") is None
    assert clean("a\0b \ud800") == "ab ?"
    assert to_document({"a": 1}) == b'{"a":1}'
    with pytest.raises(ValueError, match="serialize"):
        to_document({"a": object()})
