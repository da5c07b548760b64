from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conductor.codegen.annotations import IMPORTS
from conductor.codegen.facts import Attribute, Catalog, Table, Type
from conductor.codegen.naming import assign, class_name, field_name, label_name
from conductor.codegen.rendering import render_module
from conductor.codegen.source import docstring, imports, literal
from conductor.rows import TableName, column_names
from conductor.types import Composite

INT = Type(23, "pg_catalog", "int4", "b")
TEXT = Type(25, "pg_catalog", "text", "b")
INTS = Type(1007, "pg_catalog", "_int4", "b", element=23)
JSON = Type(114, "pg_catalog", "json", "b")
JSONS = Type(199, "pg_catalog", "_json", "b", element=114)
BUILT_IN = (INT, TEXT, INTS, JSON, JSONS)

CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
NAMES = st.text(CHARACTERS, min_size=1).filter(lambda name: len(name.encode()) < 64)
COMMENTS = st.none() | st.text(CHARACTERS | st.sampled_from("\"\\'\n\t {}#"))


def catalog(*tables: Table, types: tuple[Type, ...] = ()) -> Catalog:
    return Catalog(tables, {t.oid: t for t in (*BUILT_IN, *types)})


def table(name: str, *columns: Attribute, comment: str | None = None) -> Table:
    return Table(TableName("public", name), columns, comment)


def run(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(source, "generated.py", "exec", dont_inherit=True), namespace)  # noqa: S102 - what is tested
    return namespace


def is_formatted(source: str, *options: str) -> bool:
    command = [str(Path(sys.executable).with_name("ruff")), "format", "--isolated", *options, "-"]
    done = subprocess.run(command, input=source.encode(), capture_output=True, check=True)
    return done.stdout.decode() == source


def names_of(found: Type | Table) -> list[str]:
    attributes = found.columns if isinstance(found, Table) else found.attributes
    return [attribute.name for attribute in attributes]


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    attributes = st.builds(
        Attribute, name=NAMES, type=st.sampled_from([23, 25, 1007, 199]), not_null=st.booleans(),
        comment=COMMENTS,
    )  # fmt: skip
    columns = st.lists(attributes, max_size=6, unique_by=lambda a: a.name).map(tuple)
    names = draw(st.lists(st.tuples(NAMES, NAMES), min_size=3, max_size=6, unique=True))
    schema, name = names[0]
    labels = tuple(draw(st.lists(st.text(CHARACTERS, max_size=15), min_size=1, unique=True)))
    enum = Type(9001, schema, name, "e", labels=labels, comment=draw(COMMENTS))
    schema, name = names[1]
    parts = draw(columns) or (Attribute("a", 23),)
    composite = Type(9002, schema, name, "c", attributes=parts, comment=draw(COMMENTS))
    array = Type(9003, schema, f"_{name}", "b", element=9002)
    own = (Attribute("mood", 9001), Attribute("pairs", 9003, not_null=True))
    tables = [
        Table(TableName(*name), own if number == 0 else draw(columns), draw(COMMENTS))
        for number, name in enumerate(names[2:])
    ]
    return catalog(*tables, types=(enum, composite, array))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(catalogs(), st.lists(NAMES, min_size=1, max_size=3))
def test_whatever_the_names_are_the_module_holds_them_and_is_formatted(
    found: Catalog, schemas: list[str]
) -> None:
    source = render_module(found, schemas)
    assert is_formatted(source)
    assert is_formatted(source, "--line-length=100")
    module = run(source)
    rows = {
        str(member.__table_name__): list(column_names(member).values())
        for member in module.values()
        if getattr(member, "__table_name__", None) is not None
    }
    assert rows == {str(each.name): names_of(each) for each in found.tables}
    composites = [
        list(column_names(member).values())
        for member in module.values()
        if isinstance(member, type) and issubclass(member, Composite) and member is not Composite
    ]
    assert composites == [names_of(found.types[9002])]


def test_a_module_is_as_it_was() -> None:
    mood = Type(9001, "public", "mood", "e", labels=("happy", "so so"))
    moods = Type(9002, "public", "_mood", "b", element=9001)
    pair = Type(
        9003, "public", "pair", "c", attributes=(Attribute("left", 23), Attribute("data", 114))
    )
    span = Type(9004, "public", "span", "r", subtype=23)
    user = table(
        "users",
        Attribute("id", 23, not_null=True, comment="Its number."),
        Attribute("class", 25),
        Attribute("mood", 9001),
        Attribute("moods", 9002, not_null=True),
        Attribute("pair", 9003),
        Attribute("span", 9004),
        Attribute("grid", 1007, dimensions=2),
        Attribute("data", 114, not_null=True),
        Attribute("size", 23, generated=True),
        comment="People.",
    )  # fmt: skip
    source = render_module(catalog(user, types=(mood, moods, pair, span)), ["public", "shop"])
    assert source == EXPECTED


EXPECTED = '''\
"""Row models of database tables.

Generated by `conductor gen types python --schemas public,shop`: run it again, do not edit.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import JsonValue

from conductor import TableRow
from conductor.types import Array, Column, Composite, JsonText, Range

__generated_by__ = "conductor gen types python --schemas public,shop"


class PublicMood(StrEnum):
    """Type public.mood."""

    HAPPY = "happy"
    SO_SO = "so so"


class PublicPair(Composite):
    """Type public.pair."""

    left: int | None
    data: JsonText


class PublicUsers(TableRow, table="public.users"):
    """People."""

    id: int
    """Its number."""
    class_: Annotated[str | None, Column("class")]
    mood: PublicMood | None
    moods: Array[PublicMood]
    pair: PublicPair | None
    span: Range[int] | None
    grid: Array[Array[int]] | None
    data: JsonValue
    # Left out, as the WAL does not hold generated columns: size
'''


def test_composites_come_after_what_they_are_made_of() -> None:
    types = (
        Type(9001, "a", "outer", "c", attributes=(Attribute("all", 9004),)),
        Type(9002, "b", "inner", "c", attributes=(Attribute("n", 23),)),
        Type(9003, "b", "_inner", "b", element=9002),
        Type(9004, "b", "inners", "d", base=9003),
    )
    source = render_module(catalog(table("t", Attribute("o", 9001)), types=types), ["a"])
    assert source.index("class BInner") < source.index("class AOuter")
    assert "all: Array[BInner] | None" in source


def test_a_domain_that_forbids_null_is_not_null() -> None:
    types = (
        Type(9001, "a", "cents", "d", base=23, not_null=True),
        Type(9002, "a", "small", "d", base=9001),
        Type(9003, "a", "maybe", "d", base=23),
    )
    columns = [Attribute(name, oid) for name, oid in (("small", 9002), ("maybe", 9003))]
    source = render_module(catalog(table("t", *columns), types=types), ["a"])
    assert "small: int\n" in source
    assert "maybe: int | None\n" in source


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a b", "a_b", "a-b"], ["a_b_2", "a_b", "a_b_3"]),
        (["class", "class_"], ["class_2", "class_"]),
        (["int", "int_"], ["int_2", "int_"]),
        (["_x", "x_2", "x"], ["x_3", "x_2", "x"]),
    ],
)
def test_each_column_has_a_name_of_its_own(names: list[str], expected: list[str]) -> None:
    assert list(assign(names, field_name, {"int"}).values()) == expected


@given(NAMES, NAMES)
def test_names_are_identifiers(schema: str, name: str) -> None:
    assert class_name(schema, name).isidentifier()
    assert field_name(name).isidentifier()
    assert not field_name(name).startswith("_")
    assert label_name(name).isidentifier()


@given(st.text(CHARACTERS))
def test_literals_and_docstrings_say_what_they_were_given(text: str) -> None:
    assert eval(literal(text)) == text  # noqa: S307 - what is tested
    lines = docstring(text)
    if lines:
        compile("class A:\n" + "\n".join(lines), "generated.py", "exec")


def test_long_imports_are_broken() -> None:
    lines = imports(IMPORTS.items(), "conductor")
    assert max(map(len, lines)) <= 88
    assert "from conductor.types import (" in lines
