"""The values of the stream as JSON: `conductor.values` for rows and for types that it names.

A row is converted by one generated function. A value that is not UTF-8 raises `ValueUndecodable`
there; a single converter passes on UnicodeDecodeError, for `undecodable` to name.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, TypeAlias

import orjson

from cdc.errors import ProtocolError, ValueUndecodable
from cdc.wire.messages import UNCHANGED, Row, Type, Unchanged
from conductor.values import (
    BY_NAME,
    BY_OID,
    JSON_NULL,
    Converter,
    json_string,
    plain,
    quoted,
)

RowConverter: TypeAlias = Callable[[Row], list[bytes | Unchanged]]
"""A row to its JSON fragments by column; `UNCHANGED` stays what it is."""


def converter_for(type_oid: int, types: Mapping[int, Type]) -> Converter:
    """Return the converter of a type, built in or learnt from the stream's Type messages.

    A domain's Type message carries its base type's names, so a domain over a built-in type
    converts as that type. The same type always gives the same function object.

    >>> converter_for(1184, {})(b"2024-05-01 12:00:00+00")
    b'"2024-05-01T12:00:00+00:00"'
    """
    converter = BY_OID.get(type_oid)
    if converter is None:
        learnt = types.get(type_oid)
        if learnt is not None and learnt.schema in {"", "pg_catalog"}:
            converter = BY_NAME.get(learnt.name)
    return converter or json_string


# What a row converter writes in place of a call, with `{v}` for the value.
_INLINE: Final[dict[Converter, str]] = {
    plain: "{v}",
    quoted: "b'\"%b\"' % {v}",
    json_string: "dumps({v}.decode())",
}


_SOURCE: Final = """
def convert(row):
    try:
        [{names}] = row
    except ValueError:
        raise wrong_width(row, {width}) from None
    try:
        return [{columns}]
    except UnicodeDecodeError as error:
        raise undecodable(error) from None
"""


@lru_cache(maxsize=1024)
def row_converter(converters: tuple[Converter, ...]) -> RowConverter:
    """Compile the converters of a relation's columns into one function, the same for the same.

    The function raises `ValueUndecodable` for a value that is not UTF-8 and `ProtocolError` for a
    row of another width. It is generated because this is the hottest line of the router: straight
    code takes 1.0 µs for a row of 7 columns, a loop over `converters` 1.8 µs. The source holds
    column numbers and names of this module, nothing that came from a server.

    >>> row_converter((json_string, json_string))([b"a", None])
    [b'"a"', b'null']
    """
    names = [f"v{index}" for index in range(len(converters))]
    columns = [
        f"null if {v} is None else {v} if {v} is unchanged else "
        + (_INLINE.get(converter) or f"{_global_of(converter)}({{v}})").format(v=v)
        for v, converter in zip(names, converters, strict=True)
    ]
    source = _SOURCE.format(width=len(names), names=", ".join(names), columns=", ".join(columns))
    made: dict[str, RowConverter] = {}
    exec(source, _GLOBALS, made)  # noqa: S102 — see above
    return made["convert"]


def _global_of(converter: Converter) -> str:
    """Return the name of a converter in the generated functions; all tables share their globals."""
    name = f"convert_{id(converter)}"
    _GLOBALS[name] = converter  # one of the table of types, so that there are few
    return name


def _wrong_width(row: Row, width: int) -> ProtocolError:
    return ProtocolError("R", 0, f"a row of {width} columns", f"{len(row)}")


def undecodable(error: UnicodeDecodeError) -> ValueUndecodable:
    """Return our error for a value that is not UTF-8."""
    size = len(error.object)
    return ValueUndecodable(f"byte {error.start} of a value of {size} bytes is not UTF-8")


_GLOBALS: Final[dict[str, object]] = {
    "dumps": orjson.dumps,
    "null": JSON_NULL,
    "unchanged": UNCHANGED,
    "undecodable": undecodable,
    "wrong_width": _wrong_width,
}
