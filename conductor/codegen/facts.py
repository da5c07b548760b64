"""What the catalog says about tables and types, as plain values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from conductor.rows import TableName


@dataclass(frozen=True, slots=True)
class Attribute:
    """A column of a table, or an attribute of a composite type."""

    name: str
    type: int  # OID
    not_null: bool = False
    dimensions: int = 0  # as declared; the server does not hold to it
    generated: bool = False
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class Type:
    """A type, as pg_type has it; an OID that is 0 means none."""

    oid: int
    schema: str
    name: str
    kind: str  # pg_type.typtype: b(ase), c(omposite), d(omain), e(num), r(ange), m(ultirange)
    element: int = 0  # of an array
    base: int = 0  # of a domain
    not_null: bool = False  # a domain that forbids null
    dimensions: int = 0  # of a domain over an array
    subtype: int = 0  # of a range or multirange
    is_row: bool = False  # the row type of a table
    labels: tuple[str, ...] = ()  # of an enum, in its order
    comment: str | None = None
    attributes: tuple[Attribute, ...] = ()  # of a composite

    @property
    def is_builtin(self) -> bool:
        """Whether it came with the server."""
        return self.schema == "pg_catalog"


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose changes can be captured."""

    name: TableName
    columns: tuple[Attribute, ...]
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """Some tables, and the types that their columns are made of, by OID."""

    tables: tuple[Table, ...] = ()
    types: Mapping[int, Type] = field(default_factory=dict)

    def table(self, name: TableName) -> Table | None:
        """Return the table of a name."""
        return next((table for table in self.tables if table.name == name), None)
