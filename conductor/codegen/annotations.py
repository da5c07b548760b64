"""Which Python type the values of a column have, as the router sends them.

The counterpart of `conductor.values`: what is a JSON number, string or array there is read here.
Within a composite, a range or an array of a type that did not come with the server, values are the
server's text; the types of `conductor.types` read that as well, json alone needs another. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from conductor.codegen.facts import Attribute, Catalog, Type

IMPORTS: Final[Mapping[str, str]] = {
    "Annotated": "typing",
    "Array": "conductor.types",
    "Bytea": "conductor.types",
    "Column": "conductor.types",
    "Composite": "conductor.types",
    "Date": "conductor.types",
    "JsonText": "conductor.types",
    "JsonValue": "pydantic",
    "Multirange": "conductor.types",
    "Numeric": "conductor.types",
    "Range": "conductor.types",
    "StrEnum": "enum",
    "TableRow": "conductor",
    "Time": "conductor.types",
    "Timestamp": "conductor.types",
    "Timestamptz": "conductor.types",
    "Timetz": "conductor.types",
    "UUID": "uuid",
}
"""Names that a generated module may use, and where they come from."""

BUILTINS: Final = frozenset({"bool", "float", "int", "list", "str"})

_BY_NAME: Final[Mapping[str, str]] = {
    "bool": "bool",
    "bytea": "Bytea",
    "date": "Date",
    "float4": "float",
    "float8": "float",
    "int2": "int",
    "int2vector": "list[int]",
    "int4": "int",
    "int8": "int",
    "json": "JsonValue",
    "jsonb": "JsonValue",
    "numeric": "Numeric",
    "oid": "int",
    "oidvector": "list[int]",
    "time": "Time",
    "timestamp": "Timestamp",
    "timestamptz": "Timestamptz",
    "timetz": "Timetz",
    "uuid": "UUID",
}
_BY_NAME_AS_TEXT: Final[Mapping[str, str]] = {
    **_BY_NAME,
    "int2vector": "str",
    "json": "JsonText",
    "jsonb": "JsonText",
    "oidvector": "str",
}
_HOLD_NULL: Final = frozenset({"JsonText", "JsonValue"})


class Annotations:
    """Annotations of one catalog's types. ``names`` are the classes of its enums and composites.

    A type that is none of these and not known by name is text.
    """

    def __init__(self, catalog: Catalog, names: Mapping[int, str]) -> None:
        self._types = catalog.types
        self._names = names

    def of_column(self, column: Attribute) -> str:
        """Return the annotation of a table's column."""
        plain = self._of(column.type, column.dimensions, as_text=False)
        return plain if column.not_null or self._forbids_null(column.type) else or_none(plain)

    def of_attribute(self, attribute: Attribute) -> str:
        """Return the annotation of a composite's attribute, which may always be null."""
        return or_none(self._of(attribute.type, attribute.dimensions, as_text=True))

    def _of(self, oid: int, dimensions: int, *, as_text: bool) -> str:
        known = self._types[oid]
        if known.kind == "d":
            return self._of(known.base, known.dimensions, as_text=as_text)
        if oid in self._names:
            return self._names[oid]
        if known.kind in {"r", "m"}:
            name = "Range" if known.kind == "r" else "Multirange"
            return f"{name}[{self._of(known.subtype, 0, as_text=True)}]"
        by_name = _BY_NAME_AS_TEXT if as_text else _BY_NAME
        if known.is_builtin and known.name in by_name:
            return by_name[known.name]
        if known.element:
            return self._of_array(known, dimensions, as_text=as_text)
        return "str"

    def _of_array(self, array: Type, dimensions: int, *, as_text: bool) -> str:
        is_builtin = self._types[array.element].is_builtin
        found = self._of(array.element, 0, as_text=as_text or not is_builtin)
        for _ in range(max(dimensions, 1)):
            found = f"Array[{found}]"
        return found

    def _forbids_null(self, oid: int) -> bool:
        known = self._types[oid]
        return known.kind == "d" and (known.not_null or self._forbids_null(known.base))


def or_none(annotation: str) -> str:
    """Return the annotation of a value that may be null."""
    return annotation if annotation in _HOLD_NULL else f"{annotation} | None"
