from __future__ import annotations

import copy
import pickle
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any

import pytest
from pydantic import JsonValue, TypeAdapter, ValidationError
from pydantic_core import to_json

from conductor.types import (
    Array,
    Bytea,
    Column,
    Composite,
    Date,
    DateOutOfRange,
    DatetimeOutOfRange,
    JsonText,
    Multirange,
    Numeric,
    OutOfRange,
    Range,
    Time,
    TimeOutOfRange,
    Timestamp,
    Timestamptz,
    Timetz,
)


class Pair(Composite):
    a: int | None
    class_: Annotated[str | None, Column("class")]
    data: JsonText


EAST = timezone(timedelta(hours=2))
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("form", "sent", "expected"),
    [
        (Timestamptz, "2024-05-01T12:00:00+00:00", NOON),
        (Timestamptz, "2024-05-01 12:00:00+00", NOON),
        (Timestamptz, "infinity", DatetimeOutOfRange.of("infinity", UTC)),
        (Timestamptz, "12024-05-01 12:00:00+00",
         DatetimeOutOfRange.of("12024-05-01 12:00:00+00", UTC)),
        (Timestamp, "0044-03-15 12:00:00 BC",
         DatetimeOutOfRange.of("0044-03-15 12:00:00 BC", None)),
        (Timestamp, "2024-05-01T12:00:00.5", datetime(2024, 5, 1, 12, 0, 0, 500000)),  # noqa: DTZ001
        (Date, "2024-02-29", date(2024, 2, 29)),
        (Date, "-infinity", DateOutOfRange.of("-infinity")),
        (Time, "24:00:00", TimeOutOfRange.of("24:00:00", None)),
        (Time, "12:34:56.789", time(12, 34, 56, 789000)),
        (Timetz, "12:00:00+02", time(12, tzinfo=EAST)),
        (Timetz, "24:00:00+02:00", TimeOutOfRange.of("24:00:00+02:00", EAST)),
        (Timetz, "12:00:00+00:19:32", time(12, tzinfo=timezone(timedelta(minutes=19, seconds=32)))),
        (Numeric, "-Infinity", Decimal("-Infinity")),
        (Bytea, "\\x00ff", b"\x00\xff"),
        (Array[int], [1, None], [1, None]),
        (Array[int], "{1,NULL}", [1, None]),
        (Array[Array[int]], [[1], [2]], [[1], [2]]),
        (Array[Array[int]], "[0:1][1:1]={{1},{2}}", [[1], [2]]),
        (Array[bool], "{t,f}", [True, False]),
        (Array[JsonText], '{"{\\"a\\": 1}","\\"x\\""}', [{"a": 1}, "x"]),
        (Pair, '(1,"a ""b""","{""k"": 1}")', Pair(a=1, class_='a "b"', data={"k": 1})),
        (Array[Pair], '{"(,,)",NULL}', [Pair(a=None, class_=None, data=None), None]),
        (Range[int], "[1,5)", Range(1, 5)),
        (Range[Date], "[2024-01-01,infinity]",
         Range(date(2024, 1, 1), DateOutOfRange.of("infinity"), upper_inclusive=True)),
        (Range[Timestamptz], '["2024-05-01 12:00:00+00",)', Range(NOON, None)),
        (Range, "(a b,]", Range("a b", None, lower_inclusive=False, upper_inclusive=True)),
        (Multirange[int], "{[1,2),[5,)}", [Range(1, 2), Range(5, None)]),
    ],
)  # fmt: skip
def test_what_is_sent_is_read_from_json_and_from_python(
    form: Any, sent: JsonValue, expected: Any
) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(form)
    for found in (adapter.validate_python(sent), adapter.validate_json(to_json(sent))):
        assert found == expected
        assert type(found) is type(expected)
        assert adapter.validate_json(adapter.dump_json(found, by_alias=True)) == expected
        assert copy.deepcopy(found) == expected
        assert pickle.loads(pickle.dumps(found)) == expected  # noqa: S301 - our own


@pytest.mark.parametrize(
    ("form", "sent", "message"),
    [
        (Timestamptz, "yesterday", "Input should be a timestamptz"),
        (Date, "infinite", "Input should be a date"),
        (Time, "25:00:00", "Input should be a time"),
        (Timestamp, [], "Input should be a timestamp"),
        (Range[int], "[a,b)", "Input should be a range"),
        (Range[int], "1", "Input should be a range"),
        (Array[int], "1,2", "not an array"),
        (Array[int], ["x"], "valid integer"),
        (Pair, "(1,2)", "2 attributes instead of 3"),
        (Pair, "1", "not a record"),
        (Multirange[int], "[1,2)", "not a multirange"),
    ],
)
def test_what_is_none_is_refused(form: Any, sent: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(form).validate_python(sent)


def test_dates_that_python_cannot_hold_keep_text_and_order() -> None:
    late, later = (DatetimeOutOfRange.of(t, UTC) for t in ("10000-01-01 00:00:00+00", "infinity"))
    early = DatetimeOutOfRange.of("0044-03-15 12:00:00+00 BC", UTC)
    assert early < NOON < late
    assert early != DatetimeOutOfRange.of("-infinity", UTC)
    assert late != later
    assert late != datetime.max.replace(tzinfo=UTC)
    assert len({late, later, DatetimeOutOfRange.of("infinity", UTC)}) == 2
    assert (str(later), repr(later)) == ("infinity", "DatetimeOutOfRange('infinity')")
    assert isinstance(later, OutOfRange)
    assert DateOutOfRange.of("infinity") > date(9999, 12, 30)
    assert TimeOutOfRange.of("24:00:00", None) > time(23, 59)


def test_a_range_knows_what_lies_within() -> None:
    assert [n for n in range(7) if n in Range(1, 5)] == [1, 2, 3, 4]
    closed = Range(1, 5, lower_inclusive=False, upper_inclusive=True)
    assert [n for n in range(7) if n in closed] == [2, 3, 4, 5]
    assert 10**9 in Range[int](None, None)
    assert 1 not in Range[int](is_empty=True)
    assert repr(closed) == "Range('(1,5]')"
    assert len({Range(1, 5), Range(1, 5), closed}) == 2
    assert closed != (1, 5)


def test_types_have_json_schemas() -> None:
    for form in (Timestamptz, Date, Range[int]):
        assert TypeAdapter(form).json_schema()["type"] == "string"
