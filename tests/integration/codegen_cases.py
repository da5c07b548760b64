"""A schema for the generated row models: every kind of type, odd names, and what rows hold."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

from conductor.types import DateOutOfRange, DatetimeOutOfRange, Range, TimeOutOfRange

SETUP: Final = Path(__file__).with_name("codegen.sql").read_text()
INFINITY: Final = DatetimeOutOfRange.of("infinity", UTC)
DAY: Final = datetime(2024, 5, 1, 12, 34, 56, 789012, UTC)
EMPTY: Final = Range[Any](lower_inclusive=False, is_empty=True)
OPEN_CLOSED: Final = Range(Decimal("1.5"), Decimal(2), lower_inclusive=False, upper_inclusive=True)


class Case(NamedTuple):
    """A column: its type, the text of a value, and that value in Python."""

    type: str
    text: str | None
    value: Any


# What the server writes for these values is in tests/unit/cdc/type_cases.py.
_WRITTEN: Final = (
    Case("bool", "t", True),
    Case("int2", "-32768", -32768),
    Case("int4", "2147483647", 2147483647),
    Case("int8", "-9223372036854775808", -(2**63)),
    Case("oid", "4294967295", 4294967295),
    Case("xid8", "18446744073709551615", "18446744073709551615"),
    Case("numeric", "123456789012345678901234.50", Decimal("123456789012345678901234.50")),
    Case("numeric", "-Infinity", Decimal("-Infinity")),
    Case("float4", "1.5", 1.5),
    Case("float8", "5e-324", 5e-324),
    Case("float8", "-Infinity", float("-inf")),
    Case("money", "12.34", "$12.34"),
    Case("text", 'a "b" \\c\td\n\x7fé😀', 'a "b" \\c\td\n\x7fé😀'),
    Case("varchar(5)", "abc", "abc"),
    Case("char(5)", "abc", "abc  "),
    Case('"char"', "x", "x"),
    Case("name", "abc", "abc"),
    Case("bytea", "\\x00ff5c", b"\x00\xff\\"),
    Case("date", "2024-02-29", date(2024, 2, 29)),
    Case("date", "-infinity", DateOutOfRange.of("-infinity")),
    Case("date", "0044-03-15 BC", DateOutOfRange.of("0044-03-15 BC")),
    Case("time", "12:34:56.789", time(12, 34, 56, 789000)),
    Case("time", "24:00", TimeOutOfRange.of("24:00:00", None)),
    Case("timetz", "12:34:56+02", time(12, 34, 56, tzinfo=timezone(timedelta(hours=2)))),
    Case("timestamp", "2024-05-01 12:34:56", datetime(2024, 5, 1, 12, 34, 56)),  # noqa: DTZ001
    Case("timestamp", "10000-01-01", DatetimeOutOfRange.of("10000-01-01 00:00:00", None)),
    Case("timestamptz", "2024-05-01 14:34:56.789012+02", DAY),
    Case("timestamptz", "infinity", INFINITY),
    Case("interval", "1 year -3 days 04:05:06.7", "1 year -3 days +04:05:06.7"),
    Case("uuid", "6F9619FF-8B86-D011-B42D-00C04FC964FF", UUID("6f9619ff8b86d011b42d00c04fc964ff")),
    Case("inet", "192.168.0.1/24", "192.168.0.1/24"),
    Case("cidr", "10.0.0.0/8", "10.0.0.0/8"),
    Case("macaddr", "08:00:2b:01:02:03", "08:00:2b:01:02:03"),
    Case("macaddr8", "08:00:2b:01:02:03:04:05", "08:00:2b:01:02:03:04:05"),
    Case("bit(3)", "101", "101"),
    Case("varbit", "1", "1"),
    Case("json", '{"a": [1.5, null]}', {"a": [1.5, None]}),
    Case("jsonb", '"text"', "text"),
    Case("jsonb", "null", None),
    Case("jsonpath", "$.a", '$."a"'),
    Case("point", "(1,2)", "(1,2)"),
    Case("lseg", "[(1,2),(3,4)]", "[(1,2),(3,4)]"),
    Case("path", "((1,2),(3,4))", "((1,2),(3,4))"),
    Case("box", "(3,4),(1,2)", "(3,4),(1,2)"),
    Case("polygon", "((1,2),(3,4))", "((1,2),(3,4))"),
    Case("line", "{1,2,3}", "{1,2,3}"),
    Case("circle", "<(1,2),3>", "<(1,2),3>"),
    Case("tsvector", "fat:2A", "'fat':2A"),
    Case("tsquery", "fat & !rat", "'fat' & !'rat'"),
    Case("pg_lsn", "0/16B3748", "0/16B3748"),
    Case("txid_snapshot", "10:20:10,14,15", "10:20:10,14,15"),
    Case("pg_snapshot", "10:20:10,14,15", "10:20:10,14,15"),
    Case("regclass", "pg_class", "pg_class"),
    Case("regtype", "integer", "integer"),
    Case("regproc", "pg_backend_pid", "pg_backend_pid"),
    Case("regprocedure", "abs(int4)", "abs(integer)"),
    Case("regoper", "||/", "||/"),
    Case("regoperator", "+(int4,int4)", "+(integer,integer)"),
    Case("regrole", "pg_monitor", "pg_monitor"),
    Case("regnamespace", "pg_catalog", "pg_catalog"),
    Case("regconfig", "simple", "simple"),
    Case("regdictionary", "simple", "simple"),
    Case("regcollation", '"C"', '"C"'),
    Case("aclitem", "pg_monitor=r/pg_monitor", "pg_monitor=r/pg_monitor"),
    Case("xml", '<a b="&lt;">c</a>', '<a b="&lt;">c</a>'),
    Case("tid", "(1,2)", "(1,2)"),
    Case("xid", "7", "7"),
    Case("cid", "7", "7"),
    Case("refcursor", "c", "c"),
    Case("int2vector", "1 2 3", [1, 2, 3]),
    Case("oidvector", "", []),
    Case("int4range", "[1,5)", Range(1, 5)),
    Case("int8range", "[1,)", Range(1, None)),
    Case("numrange", "(1.5,2]", OPEN_CLOSED),
    Case("daterange", "empty", EMPTY),
    Case("tsrange", "[2024-05-01,infinity]", Range(
        datetime(2024, 5, 1), DatetimeOutOfRange.of("infinity", None), upper_inclusive=True)),  # noqa: DTZ001
    Case("tstzrange", "[2024-05-01 12:34:56.789012+00,)", Range(DAY, None)),
    Case("int4multirange", "{[1,2),[5,)}", [Range(1, 2), Range(5, None)]),
    Case("int8multirange", "{[1,2),[5,)}", [Range(1, 2), Range(5, None)]),
    Case("nummultirange", "{(1.5,2]}", [OPEN_CLOSED]),
    Case("tsmultirange", "{[2024-05-01,)}", [Range(datetime(2024, 5, 1), None)]),  # noqa: DTZ001
    Case("tstzmultirange", "{[2024-05-01 12:34:56.789012+00,)}", [Range(DAY, None)]),
    Case("datemultirange", "{}", []),
    Case("int4[]", "{1,NULL,-3}", [1, None, -3]),
    Case("int4[]", "[2:3]={7,8}", [7, 8]),
    Case("int4[][]", "{{1,2},{3,4}}", [[1, 2], [3, 4]]),
    Case("bool[]", "{t,f}", [True, False]),
    Case("numeric[]", "{1.10,Infinity}", [Decimal("1.10"), Decimal("Infinity")]),
    Case("text[]", '{a,"NULL",NULL,"","b c","d\\"e\\\\f"}',
         ["a", "NULL", None, "", "b c", 'd"e\\f']),
    Case("bytea[]", '{"\\\\x00ff"}', [b"\x00\xff"]),
    Case("timestamptz[]", '{"2024-05-01 12:34:56.789012+00",infinity}', [DAY, INFINITY]),
    Case("jsonb[]", '{"{\\"a\\": 1}","\\"x\\"",NULL}', [{"a": 1}, "x", None]),
    Case("box[]", "{(3,4),(1,2);(1,1),(0,0)}", ["(3,4),(1,2)", "(1,1),(0,0)"]),
    Case("int4range[]", '{"[1,5)",empty}', [Range(1, 5), EMPTY]),
    Case("shop.mood", 'it\'s "fine"', 'it\'s "fine"'),
    Case("shop.mood[]", '{sad,"it\'s \\"fine\\"",NULL,""}', ["sad", 'it\'s "fine"', None, ""]),
    Case("shop.feeling", "sad", "sad"),
    Case("shop.cents", "7", 7),
    Case("shop.small_cents", "8", 8),
    Case("shop.price", "9.5", Decimal("9.50")),
    Case("shop.tags", "{a,NULL}", ["a", None]),
    Case("shop.cents[]", "{1,2}", [1, 2]),
    Case("shop.data", '{"a": "1"}', {"a": "1"}),
    Case("shop.data[]", '{"{\\"a\\": \\"1\\"}","\\"x\\""}', [{"a": "1"}, "x"]),
    Case("shop.floats", "[1.5,2.5]", Range(1.5, 2.5, upper_inclusive=True)),
    Case("shop.many_floats", "{[1.5,2.5)}", [Range(1.5, 2.5)]),
    Case("shop.pair", '(1,"a ""b"", (c)","{""k"": [1, ""2""]}")',
         {"a": 1, "class": 'a "b", (c)', "data": {"k": [1, "2"]}}),
    Case("shop.pair", "(,,)", {"a": None, "class": None, "data": None}),
    Case("shop.pair[]", '{"(1,b,)",NULL}', [{"a": 1, "class": "b", "data": None}, None]),
)  # fmt: skip


def _arrays() -> Iterator[Case]:
    """An array of the first value of each built-in type, with a null."""
    for type_, (_, text, value) in {case.type: case for case in reversed(_WRITTEN)}.items():
        if text is not None and not type_.startswith("shop.") and not type_.endswith("[]"):
            quoted = text.replace("\\", r"\\").replace('"', r"\"")
            delimiter = ";" if type_ == "box" else ","
            yield Case(f"{type_}[]", f'{{"{quoted}"{delimiter}NULL}}', [value, None])


CASES: Final = (*_WRITTEN, *_arrays())
"""One column each, ``c0``, ``c1`` …; composites are compared by their columns."""

ALL_TYPES: Final = "shop.all_types"


def create_all_types() -> str:
    """The statement that creates the table of `CASES`."""
    columns = ", ".join(f"c{number} {case.type}" for number, case in enumerate(CASES))
    return f"create table {ALL_TYPES} (id int primary key, nested shop.nested, {columns})"
