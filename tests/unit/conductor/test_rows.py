from __future__ import annotations

import re
import warnings
from datetime import datetime
from enum import StrEnum
from types import ModuleType
from typing import Annotated, Any, Self

import pytest
from annotated_types import Gt
from pydantic import Field, ValidationError, field_validator, model_validator

from conductor import Bytea, Database, TableRow
from conductor.columns import resolve_columns
from conductor.errors import (
    ColumnNotCaptured,
    ColumnUnchanged,
    DefinitionInvalid,
    UnknownColumn,
    UnknownTable,
)
from conductor.rows import PlainRow, TableName, read_row, table_name


class Mood(StrEnum):
    HAPPY = "happy"


class Node(TableRow, table="public.nodes"):
    id: int
    children: list[Node] = Field(default_factory=list)


class Users(TableRow, table="public.users"):
    id: Annotated[int, Gt(0)]
    email: str
    class_: str | None = Field(alias="class", default=None)
    mood: Mood = Mood.HAPPY
    born: datetime | None = None
    photo: Bytea = b""

    @field_validator("email")
    @classmethod
    def lower(cls, value: str) -> str:
        return value.lower()

    @model_validator(mode="after")
    def complete(self) -> Self:
        if self.email == "nobody@example.com":
            raise ValueError("nobody")
        return self


NONE: frozenset[str] = frozenset()
WHOLE: dict[str, Any] = {
    "id": 1, "email": "A@example.com", "class": "x", "mood": "happy", "born": None,
    "photo": "\\x00ff",
}  # fmt: skip


def test_a_whole_row_is_validated_as_a_whole() -> None:
    row = read_row(Users, WHOLE, NONE)
    assert row == Users(id=1, email="a@example.com", class_="x", photo=b"\x00\xff")
    with pytest.raises(ValidationError, match="nobody"):
        read_row(Users, {**WHOLE, "email": "nobody@example.com"}, NONE)


def test_a_part_of_a_row_is_validated_field_by_field() -> None:
    row = read_row(Users, {"id": 7, "email": "NOBODY@example.com", "class": "x"}, NONE)
    assert (row.id, row.email, row.class_) == (7, "nobody@example.com", "x")
    assert row.model_fields_set == {"id", "email", "class_"}
    with pytest.raises(ValidationError, match="greater than 0"):
        read_row(Users, {"id": 0}, NONE)
    assert read_row(Node, {"children": [{"id": 1}]}, NONE).children == [Node(id=1)]


def test_reading_a_column_that_is_not_there_says_why() -> None:
    row = read_row(Users, {"id": 7}, frozenset({"class"}))
    with pytest.raises(ColumnNotCaptured, match=r"'email' of public.users is not captured"):
        _ = row.email
    with pytest.raises(ColumnNotCaptured):
        _ = row.mood  # its default would be a lie
    with pytest.raises(ColumnUnchanged, match=r"'class' of public\.users was not touched"):
        _ = row.class_
    with pytest.raises(AttributeError):
        _ = row.nonsense  # type: ignore[attr-defined]  # the point of the test
    assert "id=7" in repr(row)
    assert row.model_dump() == {"id": 7}


def test_plain_rows_say_why_too() -> None:
    row = PlainRow({"id": 7}, TableName("public", "users"), frozenset({"bio"}))
    assert row == {"id": 7}
    with pytest.raises(ColumnUnchanged):
        _ = row["bio"]
    with pytest.raises(ColumnNotCaptured):
        _ = row["email"]
    assert row.get("email") is None


def test_columns_by_accessor_and_by_name() -> None:
    assert resolve_columns(Users, lambda u: u.class_) == ("class",)
    assert resolve_columns(Users, lambda u: (u.id, u.email)) == ("id", "email")
    assert resolve_columns(Users, ("id", "class", "class_", "id")) == ("id", "class")
    assert resolve_columns(Users, "email") == ("email",)
    assert resolve_columns(None, ["anything"]) == ("anything",)
    assert resolve_columns(Users, None) is None


@pytest.mark.parametrize(
    "columns", [["emial"], "emial", lambda u: u.emial, lambda u: (u.id, u.emial)]
)
def test_an_unknown_column_names_the_nearest(columns: Any) -> None:
    with pytest.raises(UnknownColumn, match=r"'emial' of public.users; did you mean 'email'"):
        resolve_columns(Users, columns)


@pytest.mark.parametrize("columns", [[], lambda _: None, lambda _: 3, [1]])
def test_columns_that_are_none_are_refused(columns: Any) -> None:
    with pytest.raises(DefinitionInvalid):
        resolve_columns(Users, columns)
    with pytest.raises(DefinitionInvalid):
        resolve_columns(None, lambda u: u.id)


@pytest.mark.parametrize(
    ("accessor", "message"),
    [
        (lambda u: u.id > 5, "column 'id' cannot be compared"),
        (lambda u: u.id == 5, "column 'id' cannot be compared"),
        (lambda u: u.id and u.email, "column 'id' is not a condition"),
        (lambda u: u.email.lower(), "column 'email' has no value, so no 'lower'"),
        (lambda u: f"{u.id}", "column 'id' has no value, so no text"),
        (lambda: ("id",), "takes 0 positional arguments"),
    ],
)
def test_an_accessor_that_does_more_than_name_columns_is_refused(
    accessor: Any, message: str
) -> None:
    line = accessor.__code__.co_firstlineno
    where = re.escape(f"the accessor at {__file__}:{line} does not name columns of public.users: ")
    with pytest.raises(DefinitionInvalid, match=where + ".*" + message) as caught:
        resolve_columns(Users, accessor)
    assert "A condition on values is when=" in caught.value.hint


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as pydantic says, they shadow attributes of every model

    class Odd(TableRow, table="public.odd"):
        id: int
        json: str  # type: ignore[assignment]  # the point of the test
        copy: str = ""  # type: ignore[assignment]  # the point of the test
        model_fields_set: int  # type: ignore[assignment]  # the point of the test
        model_validate_json: str  # type: ignore[assignment]  # the point of the test

    class Odder(Odd, table="public.odd"):
        schema: str  # type: ignore[assignment]  # the point of the test


def test_a_column_of_a_methods_name_is_not_read_as_the_method() -> None:
    row: Any = read_row(Odder, {"id": 1, "schema": "x"}, frozenset({"copy"}))
    assert (row.id, row.schema) == (1, "x")
    for name in ("json", "model_validate_json"):
        with pytest.raises(ColumnNotCaptured, match=f"'{name}' of public.odd is not captured"):
            getattr(row, name)
    with pytest.raises(ColumnUnchanged):
        _ = row.copy
    whole = {"id": 1, "json": "{}", "copy": "c", "model_fields_set": 3, "model_validate_json": "v"}
    complete: Any = read_row(Odd, whole, NONE)
    assert {name: getattr(complete, name) for name in whole} == whole
    assert read_row(Odder, {**whole, "schema": "s"}, NONE).model_dump() == {**whole, "schema": "s"}


@pytest.mark.parametrize(
    ("text", "schema", "table"),
    [
        ("public.users", "public", "users"),
        ("Public.USERS", "public", "users"),
        ('"Odd schema"."a.b""c"', "Odd schema", 'a.b"c'),
    ],
)
def test_table_names_are_read_as_sql_reads_them(text: str, schema: str, table: str) -> None:
    name = TableName.parse(text)
    assert (name.schema, name.table) == (schema, table)
    assert TableName.parse(str(name)) == name


@pytest.mark.parametrize("text", ["users", "a.b.c", "", "public.", "1a.b", "a.b; drop table c"])
def test_other_texts_are_no_table(text: str) -> None:
    with pytest.raises(DefinitionInvalid, match="does not name a table"):
        TableName.parse(text)


def test_a_model_must_name_its_table() -> None:
    class Nowhere(TableRow):
        id: int

    class Somewhere(Nowhere, table="public.somewhere"): ...

    with pytest.raises(DefinitionInvalid, match="names no table"):
        table_name(Nowhere)
    assert str(table_name(Somewhere)) == "public.somewhere"


def test_a_database_knows_the_tables_of_a_module() -> None:
    module = ModuleType("database_types")

    class Contact(TableRow, table="public.users"):
        phone: str

    for model in (Users, Node, Contact, TableRow):
        setattr(module, model.__name__, model)
    database = Database.from_module(module)
    database.check(TableName("public", "users"), ["id", "class", "phone"])
    with pytest.raises(UnknownTable, match=r"'public.user'; did you mean 'public.users'"):
        database.check(TableName("public", "user"))
    with pytest.raises(UnknownColumn):
        database.check(TableName("public", "nodes"), ["idd"])
    with pytest.raises(DefinitionInvalid, match="no row models"):
        Database.from_module(ModuleType("empty"))
