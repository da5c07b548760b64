"""One table: how the text of each built-in type becomes JSON.

A converter takes a value as the server's output function wrote it (bytes, never null) and returns
a JSON fragment as bytes. Nothing is lost on the way: integers and finite floats stay the digits
they are, numeric is a string, json is embedded and never parsed, times become ISO 8601 and stay
PostgreSQL's text where ISO has no word for them (infinity, BC, years beyond 9999).

The texts must come from a session with the settings of `SESSION`. Their grammar is trusted, their
encoding is not: a value that is not UTF-8 raises UnicodeDecodeError. Types that are not in the
table (enums, composites, extensions) are strings. Shared by the router, which reads the WAL, and
by workers that read a row again. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import orjson

Converter: TypeAlias = Callable[[bytes], bytes]
"""A value's text to its JSON."""

JSON_NULL: Final = b"null"

_SPACE = ord(" ")
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)


def json_string(text: bytes) -> bytes:
    r"""Return `text` as a JSON string: the converter of every type that has none of its own.

    >>> json_string(b'5" disc')
    b'"5\\" disc"'
    """
    return orjson.dumps(text.decode())


def plain(text: bytes) -> bytes:
    """Digits as they are: whole numbers of any size."""
    return text


def quoted(text: bytes) -> bytes:
    """Text of a type that cannot hold a quote, a backslash or anything beyond ASCII."""
    return b'"%b"' % text


def _bool(text: bytes) -> bytes:
    return b"true" if text == b"t" else b"false"


def _float(text: bytes) -> bytes:
    """NaN, Infinity and -Infinity end in a letter and are no JSON numbers."""
    return text if text[-1] <= 0x39 else b'"%b"' % text


def _json(text: bytes) -> bytes:
    if not text.isascii():
        text.decode()
    return text


def _timestamp(text: bytes) -> bytes:
    """Year 10000 and infinity have no blank at byte 10, BC has its own ending: they stay text."""
    if text[10:11] == b" " and text[-2:] != b"BC":
        return b'"%b"' % text.replace(b" ", b"T", 1)
    return b'"%b"' % text


def _timestamptz(text: bytes) -> bytes:
    if text[-3:] == b"+00" and text[10] == _SPACE:
        return b'"%b:00"' % text.replace(b" ", b"T", 1)
    return b'"%b"' % text


def _timetz(text: bytes) -> bytes:
    """An offset of whole hours is written without minutes: `12:00:00+02`."""
    return b'"%b:00"' % text if text[-3] in b"+-" else b'"%b"' % text


def _vector(text: bytes) -> bytes:
    """int2vector and oidvector: numbers between spaces."""
    return b"[%b]" % text.replace(b" ", b",")


def _array(element: Converter, delimiter: bytes = b",") -> Converter:
    """Return the converter of an array (array_out in PostgreSQL's arrayfuncs.c writes it).

    Braces nest the dimensions; an element is quoted when it holds a brace, the delimiter, a quote,
    a backslash or white space, when it is empty or reads NULL. Subscripts that do not start at 1
    stand before the array (`[2:3]={7,8}`): JSON has no place for them, so it stays text.
    """
    token = re.compile(
        rb'"((?:[^"\\]|\\.)*)"|([^{}"\\%b]+)|[{}%b]' % (delimiter, delimiter), re.DOTALL
    )
    punctuation = {b"{": b"[", b"}": b"]", delimiter: b","}

    def convert_token(match: re.Match[bytes]) -> bytes:
        text, bare = match.groups()
        if text is not None:
            return element(_ESCAPED.sub(rb"\1", text) if b"\\" in text else text)
        if bare is None:
            return punctuation[match[0]]
        return JSON_NULL if bare == b"NULL" else element(bare)

    def convert(text: bytes) -> bytes:
        if text[:1] != b"{":
            return json_string(text)
        if b'"' not in text and text.count(b"{") == 1 and text != b"{}":  # most arrays: flat, bare
            elements = text[1:-1].split(delimiter)
            return b"[%b]" % b",".join(
                [JSON_NULL if bare == b"NULL" else element(bare) for bare in elements]
            )
        return b"".join(map(convert_token, token.finditer(text)))

    return convert


# OID, name, OID of its array, converter; from pg_type.dat of PostgreSQL 15 (18 adds none).
_BUILT_IN: Final[tuple[tuple[int, str, int, Converter], ...]] = (
    (16, "bool", 1000, _bool),
    (17, "bytea", 1001, json_string),
    (18, "char", 1002, json_string),
    (19, "name", 1003, json_string),
    (20, "int8", 1016, plain),
    (21, "int2", 1005, plain),
    (22, "int2vector", 1006, _vector),
    (23, "int4", 1007, plain),
    (24, "regproc", 1008, json_string),
    (25, "text", 1009, json_string),
    (26, "oid", 1028, plain),
    (27, "tid", 1010, quoted),
    (28, "xid", 1011, quoted),
    (29, "cid", 1012, quoted),
    (30, "oidvector", 1013, _vector),
    (114, "json", 199, _json),
    (142, "xml", 143, json_string),
    (600, "point", 1017, quoted),
    (601, "lseg", 1018, quoted),
    (602, "path", 1019, quoted),
    (603, "box", 1020, quoted),
    (604, "polygon", 1027, quoted),
    (628, "line", 629, quoted),
    (650, "cidr", 651, quoted),
    (700, "float4", 1021, _float),
    (701, "float8", 1022, _float),
    (718, "circle", 719, quoted),
    (774, "macaddr8", 775, quoted),
    (790, "money", 791, json_string),
    (829, "macaddr", 1040, quoted),
    (869, "inet", 1041, quoted),
    (1033, "aclitem", 1034, json_string),
    (1042, "bpchar", 1014, json_string),
    (1043, "varchar", 1015, json_string),
    (1082, "date", 1182, quoted),
    (1083, "time", 1183, quoted),
    (1114, "timestamp", 1115, _timestamp),
    (1184, "timestamptz", 1185, _timestamptz),
    (1186, "interval", 1187, quoted),
    (1266, "timetz", 1270, _timetz),
    (1560, "bit", 1561, quoted),
    (1562, "varbit", 1563, quoted),
    (1700, "numeric", 1231, quoted),
    (1790, "refcursor", 2201, json_string),
    (2202, "regprocedure", 2207, json_string),
    (2203, "regoper", 2208, json_string),
    (2204, "regoperator", 2209, json_string),
    (2205, "regclass", 2210, json_string),
    (2206, "regtype", 2211, json_string),
    (2950, "uuid", 2951, quoted),
    (2970, "txid_snapshot", 2949, quoted),
    (3220, "pg_lsn", 3221, quoted),
    (3614, "tsvector", 3643, json_string),
    (3615, "tsquery", 3645, json_string),
    (3642, "gtsvector", 3644, json_string),
    (3734, "regconfig", 3735, json_string),
    (3769, "regdictionary", 3770, json_string),
    (3802, "jsonb", 3807, _json),
    (3904, "int4range", 3905, json_string),
    (3906, "numrange", 3907, json_string),
    (3908, "tsrange", 3909, json_string),
    (3910, "tstzrange", 3911, json_string),
    (3912, "daterange", 3913, json_string),
    (3926, "int8range", 3927, json_string),
    (4072, "jsonpath", 4073, json_string),
    (4089, "regnamespace", 4090, json_string),
    (4096, "regrole", 4097, json_string),
    (4191, "regcollation", 4192, json_string),
    (4451, "int4multirange", 6150, json_string),
    (4532, "nummultirange", 6151, json_string),
    (4533, "tsmultirange", 6152, json_string),
    (4534, "tstzmultirange", 6153, json_string),
    (4535, "datemultirange", 6155, json_string),
    (4536, "int8multirange", 6157, json_string),
    (5038, "pg_snapshot", 5039, quoted),
    (5069, "xid8", 271, quoted),
)

BY_OID: Final[dict[int, Converter]] = {}
BY_NAME: Final[dict[str, Converter]] = {}
for _oid, _name, _array_oid, _converter in _BUILT_IN:
    _array_converter = _array(_converter, b";" if _name == "box" else b",")
    BY_OID.update({_oid: _converter, _array_oid: _array_converter})
    BY_NAME.update({_name: _converter, f"_{_name}": _array_converter})


Shape: TypeAlias = Literal["bool", "float", "number", "other", "text"]
"""A float is a number, or NaN and infinity as text; other: JSON of its own, or an array."""

_SHAPES: Final[dict[Converter, Shape]] = {
    _bool: "bool",
    _float: "float",
    plain: "number",
    **dict.fromkeys((_timestamp, _timestamptz, _timetz, json_string, quoted), "text"),
}


def converter_of(type_oid: int) -> Converter:
    """Return the converter of a type by its OID; a domain has its base type's.

    >>> converter_of(1184)(b"2024-05-01 12:00:00+00")
    b'"2024-05-01T12:00:00+00:00"'
    """
    return BY_OID.get(type_oid, json_string)


def shape_of(type_oid: int) -> Shape:
    """Return what JSON a type's values are.

    >>> shape_of(23), shape_of(1700), shape_of(3802)
    ('number', 'text', 'other')
    """
    return _SHAPES.get(converter_of(type_oid), "other")
