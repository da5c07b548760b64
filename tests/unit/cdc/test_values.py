import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Final, TypeAlias

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.errors import ProtocolError, ValueUndecodable
from cdc.values import converter_for, row_converter
from cdc.wire.messages import UNCHANGED, Row, Type
from conductor import values
from conductor.values import Converter, json_string

INT4, INT8, TEXT, NUMERIC, FLOAT8, JSON, BOX, TIMESTAMPTZ = 23, 20, 25, 1700, 701, 114, 603, 1184
INT4_ARRAY, TEXT_ARRAY, JSON_ARRAY, BOX_ARRAY = 1007, 1009, 199, 1020

Nested: TypeAlias = "str | list[Nested] | None"

texts: Final = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


def convert(type_oid: int, text: str) -> str:
    return converter_for(type_oid, {})(text.encode()).decode()


def array_literal(value: Nested, delimiter: str = ",") -> str:
    """Write an array as array_out does."""
    if isinstance(value, list):
        return "{" + delimiter.join(array_literal(item, delimiter) for item in value) + "}"
    if value is None:
        return "NULL"
    special = any(c in value for c in '{}"\\ \t\n\r\v\f' + delimiter)
    if special or not value or value.lower() == "null":
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return value


def arrays(elements: st.SearchStrategy[str]) -> st.SearchStrategy[list[Nested]]:
    """One to three dimensions, each of one length, as PostgreSQL's arrays are."""

    def shaped(sizes: Sequence[int]) -> st.SearchStrategy[list[Nested]]:
        inner: st.SearchStrategy[Nested] = shaped(sizes[1:]) if sizes[1:] else st.none() | elements
        return st.lists(inner, min_size=sizes[0], max_size=sizes[0])

    several = st.lists(st.integers(1, 3), min_size=1, max_size=3).flatmap(shaped)
    return st.just([]) | several


@given(texts)
def test_text_round_trip(text: str) -> None:
    assert json.loads(convert(TEXT, text)) == text


@given(arrays(texts))
def test_text_arrays_round_trip(array: list[Nested]) -> None:
    assert json.loads(convert(TEXT_ARRAY, array_literal(array))) == array


@given(arrays(st.integers(-(2**31), 2**31 - 1).map(str)))
def test_number_arrays_hold_numbers(array: list[Nested]) -> None:
    fragment = convert(INT4_ARRAY, array_literal(array))
    assert json.loads(fragment, parse_int=str) == array


@given(arrays(st.sampled_from(["(1,2),(3,4)", "(0,0),(0,0)"])))
def test_box_arrays_are_delimited_by_semicolons(array: list[Nested]) -> None:
    assert json.loads(convert(BOX_ARRAY, array_literal(array, ";"))) == array


@given(st.lists(st.dictionaries(texts, st.floats(allow_nan=False) | texts | st.none()), max_size=4))
def test_json_arrays_hold_json(array: list[dict[str, object]]) -> None:
    literal = array_literal([json.dumps(item, ensure_ascii=False) for item in array])
    assert json.loads(convert(JSON_ARRAY, literal)) == array


@given(st.integers(-(2**63), 2**63 - 1))
def test_whole_numbers_keep_their_digits(number: int) -> None:
    assert convert(INT8, str(number)) == str(number)


@given(st.floats())
def test_floats_are_numbers_where_json_has_them(number: float) -> None:
    text = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(repr(number), repr(number))
    fragment = orjson.loads(convert(FLOAT8, text))
    assert fragment == (number if abs(number) < float("inf") else text)


@given(st.decimals())
def test_numeric_is_a_string(number: Decimal) -> None:
    assert json.loads(convert(NUMERIC, str(number))) == str(number)


@given(st.datetimes())
def test_timestamps_are_iso_8601(moment: object) -> None:
    server, iso = f"{moment!s}+00", f"{moment!s}+00:00".replace(" ", "T")
    assert convert(TIMESTAMPTZ, server) == f'"{iso}"'


@given(st.integers(0, 10**7), st.binary(min_size=1))
def test_every_fragment_is_json(type_oid: int, text: bytes) -> None:
    """The grammar of built-in types is the server's; anything else is a string."""
    converter = converter_for(type_oid, {})
    if converter is not json_string:
        return
    try:
        fragment = converter(text)
    except UnicodeDecodeError:
        return
    assert orjson.loads(fragment) == text.decode()


def test_json_is_embedded_as_it_is() -> None:
    text = '{"a": 1.10, "a": 123456789012345678901234567890, "é": "\\u0000"}'
    assert convert(JSON, text) == text


@pytest.mark.parametrize("type_oid", [TEXT, JSON, 99999])
def test_bytes_that_are_not_utf_8_have_an_error_of_their_own(type_oid: int) -> None:
    with pytest.raises(ValueUndecodable, match="byte 2 of a value of 4 bytes is not UTF-8"):
        row_converter((converter_for(type_oid, {}),))([b'"a\xff"'])
    with pytest.raises(UnicodeDecodeError):
        converter_for(type_oid, {})(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        converter_for(TEXT_ARRAY, {})(b"{a,\xff}")


@pytest.mark.parametrize(
    ("learnt", "text", "fragment"),
    [
        (Type(70000, "", "int4"), "7", "7"),
        (Type(70000, "pg_catalog", "_int4"), "{7}", "[7]"),
        (Type(70000, "", "no_such_type"), "7", '"7"'),
        (Type(70000, "shop", "int4"), "7", '"7"'),
        (Type(70001, "", "int4"), "7", '"7"'),
    ],
)
def test_domains_convert_as_their_base_type(learnt: Type, text: str, fragment: str) -> None:
    converter = converter_for(70000, {learnt.oid: learnt})
    assert converter(text.encode()).decode() == fragment


def test_the_table_is_the_servers() -> None:
    """`types.txt` is pg_type of 15 and 18: OID, name, OID of the array, of what has an array."""
    lines = (Path(__file__).parent / "golden" / "types.txt").read_text().splitlines()
    table = [f"{oid} {name} {array_oid}" for oid, name, array_oid, _ in values._BUILT_IN]
    assert table == lines


def test_the_same_type_has_the_same_function() -> None:
    assert converter_for(INT4_ARRAY, {}) is converter_for(INT4_ARRAY, {})
    assert converter_for(99999, {}) is converter_for(TEXT, {})


ROW_TYPES: Final = (INT8, TEXT, NUMERIC, 16, TIMESTAMPTZ, TEXT_ARRAY, 99999)
ROW: Final[Row] = [b"1", b'"', b"1.10", b"t", b"infinity", b"{a}", b"x"]


@given(st.lists(st.sampled_from([None, UNCHANGED, ...]), min_size=7, max_size=7))
def test_rows_convert_like_their_values(kinds: list[object]) -> None:
    converters: list[Converter] = [converter_for(oid, {}) for oid in ROW_TYPES]
    row: Row = [v if k is ... else k for k, v in zip(kinds, ROW, strict=True)]  # type: ignore[misc]  # k is narrowed
    expected = [
        b"null" if value is None else value if value is UNCHANGED else converter(value)
        for value, converter in zip(row, converters, strict=True)
    ]
    assert row_converter(tuple(converters))(row) == expected


@pytest.mark.parametrize("width", [0, 1, 3])
def test_rows_of_another_width_are_refused(width: int) -> None:
    with pytest.raises(ProtocolError, match=f"expected a row of 2 columns, got {width}"):
        row_converter((json_string, json_string))([b"a"] * width)


def test_very_wide_tables() -> None:
    wide = [json_string, converter_for(INT4, {})] * 800
    assert row_converter(tuple(wide))([b"1"] * 1600) == [b'"1"', b"1"] * 800
    assert row_converter(())([]) == []
