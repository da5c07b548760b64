"""What the stream has said about its tables.

A cache lives as long as one session with the server: it describes a table once a session, and
again after a change. The catalog is never asked: it may be newer than the rows in the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdc.errors import RelationUnknown
from cdc.values import RowConverter, converter_for, row_converter
from cdc.wire.messages import Column, Relation, Type
from conductor.values import Converter


@dataclass(frozen=True, slots=True)
class RelationShape:
    """A table as of one point of the stream, with what its rows need precompiled.

    `schema` is never empty (pg_catalog is spelled out); `key_indexes` are the replica identity's
    columns, in the table's order; `types` are those that the stream had to name; `converters` turn
    single values into JSON and `fragments` turns a whole row; `revision` is unique in its cache and
    grows with every change.
    """

    oid: int
    schema: str
    name: str
    replica_identity: str
    column_names: tuple[str, ...]
    type_oids: tuple[int, ...]
    key_indexes: tuple[int, ...]
    types: tuple[Type, ...]
    converters: tuple[Converter, ...]
    fragments: RowConverter
    revision: int


class RelationCache:
    """Relations and types by OID.

    >>> cache = RelationCache()
    >>> cache.apply(Relation(16385, "shop", "users", "d", ()))
    >>> cache.get(16385).name
    'users'
    """

    __slots__ = ("_relations", "_shapes", "_types", "revision")

    def __init__(self) -> None:
        self._relations: dict[int, Relation] = {}
        self._shapes: dict[int, RelationShape] = {}
        self._types: dict[int, Type] = {}
        self.revision = 0

    def apply(self, message: Relation | Type) -> None:
        """Take in a message. A relation that is only repeated keeps its shape and revision."""
        if isinstance(message, Type):
            self._types[message.oid] = message
            return
        oids = [column.type_oid for column in message.columns]
        converters = tuple(converter_for(oid, self._types) for oid in oids)
        known = self._shapes.get(message.oid)
        if known and known.converters == converters and self._relations[message.oid] == message:
            return
        self.revision += 1
        self._relations[message.oid] = message
        types = tuple(self._types[oid] for oid in sorted(set(oids)) if oid in self._types)
        self._shapes[message.oid] = _shape(message, types, converters, self.revision)

    @property
    def oids(self) -> list[int]:
        """The OIDs of all relations that were described."""
        return list(self._shapes)

    def get(self, relation_oid: int) -> RelationShape:
        """Return a relation's shape; raise `RelationUnknown` when none was sent."""
        try:
            return self._shapes[relation_oid]
        except KeyError:
            raise RelationUnknown(relation_oid) from None


def describe_shape(shape: RelationShape) -> dict[str, Any]:
    """Return a shape as JSON values, to be kept with its rows; `read_shape` is the way back."""
    columns = [
        {"name": name, "type_oid": oid, "is_key": index in shape.key_indexes}
        for index, (name, oid) in enumerate(zip(shape.column_names, shape.type_oids, strict=True))
    ]
    return {
        "schema": shape.schema,
        "table": shape.name,
        "oid": shape.oid,
        "replica_identity": shape.replica_identity,
        "columns": columns,
        "types": [{"oid": t.oid, "schema": t.schema, "name": t.name} for t in shape.types],
    }


def read_shape(description: Mapping[str, Any]) -> RelationShape:
    """Build a shape from what `describe_shape` returned. Raises `RelationUnknown` for less."""
    cache, oid = RelationCache(), int(description.get("oid", 0))
    try:
        for described in description["types"]:
            cache.apply(Type(described["oid"], described["schema"], described["name"]))
        columns = tuple(
            Column(column["name"], column["type_oid"], -1, column["is_key"])
            for column in description["columns"]
        )
        schema, table = description["schema"], description["table"]
        cache.apply(Relation(oid, schema, table, description["replica_identity"], columns))
    except KeyError:
        raise RelationUnknown(oid) from None
    return cache.get(oid)


def _shape(
    relation: Relation, types: tuple[Type, ...], converters: Sequence[Converter], revision: int
) -> RelationShape:
    columns = relation.columns
    return RelationShape(
        oid=relation.oid,
        schema=relation.schema or "pg_catalog",
        name=relation.name,
        replica_identity=relation.replica_identity,
        column_names=tuple(column.name for column in columns),
        type_oids=tuple(column.type_oid for column in columns),
        key_indexes=tuple(i for i, column in enumerate(columns) if column.is_key),
        types=types,
        converters=tuple(converters),
        fragments=row_converter(tuple(converters)),
        revision=revision,
    )
