from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.literals import (
    parse_array,
    parse_multirange,
    parse_range,
    parse_record,
    quote_bound,
)

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def array_text(value: Any) -> str:
    """As array_out of the server writes it."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "{" + ",".join(map(array_text, value)) + "}"
    text: str = value
    if text and not set(text) & set('{},"\\ \t\n\r\v\f') and text.upper() != "NULL":
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def record_text(fields: list[str | None]) -> str:
    """As record_out of the server writes it."""

    def written(field: str | None) -> str:
        if field is None:
            return ""
        if field and not set(field) & set('(),"\\ \t\n\r\v\f'):
            return field
        return '"' + field.replace("\\", "\\\\").replace('"', '""') + '"'

    return "(" + ",".join(map(written, fields)) + ")"


@given(st.lists(TEXT | st.none()))
def test_an_array_is_read_as_it_was_written(elements: list[str | None]) -> None:
    assert parse_array(array_text(elements)) == elements
    assert parse_array(f"[0:{len(elements)}]={array_text(elements)}") == elements
    nested = [elements, elements]
    assert parse_array(array_text(nested)) == nested


@given(st.lists(TEXT | st.none(), min_size=1))
def test_a_record_is_read_as_it_was_written(fields: list[str | None]) -> None:
    assert parse_record(record_text(fields)) == fields
    within = [record_text(fields), None]
    assert parse_array(array_text(within)) == within
    assert parse_record(record_text([array_text(within)])) == [array_text(within)]


@given(TEXT.filter(bool), TEXT.filter(bool))
def test_a_range_is_read_as_it_was_written(lower: str, upper: str) -> None:
    text = f"[{quote_bound(lower)},{quote_bound(upper)})"
    assert parse_range(text) == (lower, upper, True, False)
    assert parse_multirange(f"{{{text},{text}}}") == [text, text]


def test_bounds_may_be_missing() -> None:
    assert parse_range("(,)") == (None, None, False, False)
    assert parse_range('["",]') == ("", None, True, True)
    assert parse_range("empty") is None
    assert parse_multirange("{}") == []


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_array, ""),
        (parse_array, "{"),
        (parse_array, "}"),
        (parse_array, "{a}}"),
        (parse_array, "a"),
        (parse_array, '{"a}'),
        (parse_record, ""),
        (parse_record, "1,2"),
        (parse_record, '("a,1)'),
        (parse_range, "1,2"),
        (parse_range, "[1,2,3)"),
        (parse_range, "[1;2)"),
        (parse_multirange, "[1,2)"),
        (parse_multirange, "{[1,2)[3,4)}"),
        (parse_multirange, "{1}"),
    ],
)
def test_what_the_server_does_not_write_is_refused(parse: Any, text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse(text)
