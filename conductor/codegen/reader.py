"""Reading the catalog for row models. Runs queries and judges nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import dict_row, scalar_row

from conductor import sql
from conductor.codegen.facts import Attribute, Catalog, Table, Type
from conductor.errors import UnknownSchema
from conductor.rows import TableName

_QUERIES: Final = sql.load("codegen")


async def read_schemas(connection: AsyncConnection[Any], schemas: Sequence[str]) -> Catalog:
    """Return all tables and enums of some schemas. Raises UnknownSchema."""
    cursor = connection.cursor(row_factory=scalar_row)
    await cursor.execute(_QUERIES["existing_schemas"], {"schemas": list(schemas)})
    existing = set(await cursor.fetchall())
    for schema in schemas:
        if schema not in existing:
            await cursor.execute(_QUERIES["schema_names"])
            raise UnknownSchema(schema, await cursor.fetchall())
    rows = await _rows(connection, "tables_of_schemas", {"schemas": list(schemas)})
    return await _catalog(connection, rows, schemas)


async def read_tables(connection: AsyncConnection[Any], names: Sequence[TableName]) -> Catalog:
    """Return those of the named tables that exist."""
    wanted = {"schemas": [n.schema for n in names], "names": [n.table for n in names]}
    return await _catalog(connection, await _rows(connection, "named_tables", wanted), [])


async def _catalog(
    connection: AsyncConnection[Any], tables: list[dict[str, Any]], schemas: Sequence[str]
) -> Catalog:
    relations = [row["oid"] for row in tables]
    wanted = {"relations": relations, "schemas": list(schemas)}
    types = await _rows(connection, "types", wanted)
    composites = [row["relation"] for row in types if row["relation"]]
    attributes = await _attributes(connection, relations + composites)
    return Catalog(
        tables=tuple(
            Table(
                TableName(row["schema"], row["name"]),
                tuple(attributes[row["oid"]]),
                row["comment"],
            )
            for row in sorted(tables, key=lambda row: (row["schema"], row["name"]))
        ),
        types={row["oid"]: _type(row, attributes) for row in types},
    )


def _type(row: dict[str, Any], attributes: dict[int, list[Attribute]]) -> Type:
    known = {key: row[key] for key in row if key not in {"relation", "labels"}}
    return Type(
        **known, labels=tuple(row["labels"]), attributes=tuple(attributes.get(row["relation"], ()))
    )


async def _attributes(
    connection: AsyncConnection[Any], relations: list[int]
) -> dict[int, list[Attribute]]:
    found: dict[int, list[Attribute]] = defaultdict(list)
    for row in await _rows(connection, "attributes", {"relations": relations}):
        found[row.pop("relation")].append(Attribute(**row))
    return found


async def _rows(
    connection: AsyncConnection[Any], query: str, values: dict[str, Any]
) -> list[dict[str, Any]]:
    cursor = connection.cursor(row_factory=dict_row)
    await cursor.execute(_QUERIES[query], values)
    return await cursor.fetchall()
