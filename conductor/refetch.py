"""What changes lack of their rows, read again from the source database by the rows' keys.

The value is that of the moment it is read, not that of the change: the row may have been updated
since, or be gone. Values are rendered and converted as the router does it, so that a row model
reads both alike. A read is one short, read-only transaction; it locks nothing. This module must
not decide what a change lacks (`conductor.triggers` does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import sql
from pydantic_core import from_json

from conductor.connections import Connections
from conductor.definitions import payload_invalid
from conductor.errors import RefetchFailed, WaitUnavailable
from conductor.rows import DEFAULT_SOURCE, TableName
from conductor.sql import load
from conductor.store.sessions import is_transient
from conductor.values import converter_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from psycopg import AsyncConnection

    from conductor.events import Change

_POOL_SIZE: Final = 4
_QUERIES: Final = load("refetch")
_BY_KEY: Final = sql.SQL(_QUERIES["row_by_key"].decode())


class Sources:
    """What jobs ask of the databases that changes come from.

    ``dsns``: of those that are not the queue's own database, by the names that triggers give.
    """

    def __init__(self, queue: Connections, dsns: Mapping[str, str]) -> None:
        self._queue = queue
        self._elsewhere = {
            name: Connections(
                dsn, _POOL_SIZE, "conductor refetch", database=f"the database of source {name!r}"
            )
            for name, dsn in dsns.items()
        }
        self._rows: dict[str, SourceRows] = {}

    async def complete(self, change: Change[Any]) -> None:
        """Give a change what it lacks; see `SourceRows.complete`."""
        if change.lacking is None:
            return
        source = change.lacking.source
        if source not in self._rows:
            self._rows[source] = SourceRows(self._elsewhere.get(source, self._queue))
        await self._rows[source].complete(change)

    async def position(self, source: str) -> str | None:
        """Return where a source's log ends now; None for the queue's own database.

        Raises DatabaseUnavailable, and WaitUnavailable where that cannot be told, as on a standby.
        """
        connections = self._elsewhere.get(source)
        if connections is None:
            if source != DEFAULT_SOURCE:
                raise WaitUnavailable(f"nobody has said where source {source!r} is")
            return None
        async with connections.lend() as connection:
            try:
                cursor = await connection.execute(_QUERIES["log_end"])
                row = await cursor.fetchone()
            except psycopg.Error as error:
                if is_transient(error) or connection.closed:
                    raise
                raise WaitUnavailable(f"source {source!r} cannot be asked: {error}") from error
        return None if row is None else str(row[0])

    async def close(self) -> None:
        """Close the connections."""
        for connections in self._elsewhere.values():
            await connections.close()


class SourceRows:
    """Reads rows of one source database; keeps the keys of the tables it has seen."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._keys: dict[TableName, tuple[str, ...]] = {}

    async def complete(self, change: Change[Any]) -> None:
        """Give a change what it lacks, or let it know that its row is gone.

        Raises DatabaseUnavailable, RefetchFailed, and PayloadInvalid for a row that is not the
        model's.
        """
        lacking = change.lacking
        if lacking is None:
            return
        table = TableName(change.schema, change.table)
        async with self._connections.lend() as connection:
            try:
                async with connection.transaction():
                    await connection.execute(_QUERIES["render"])
                    key = await self._key(connection, table)
                    found = await _read(connection, table, lacking.columns, key, lacking.values)
            except ValueError as error:  # of a value: json takes what is no text
                raise payload_invalid(f"row of {table}, read again", error) from error
            except psycopg.Error as error:
                self._keys.pop(table, None)  # it may have another by now
                if is_transient(error) or connection.closed:
                    raise
                raise RefetchFailed(f"cannot read a row of {table} again: {error}") from error
        change.complete(found)

    async def _key(self, connection: AsyncConnection[Any], table: TableName) -> tuple[str, ...]:
        key = self._keys.get(table)
        if key is None:
            cursor = await connection.execute(
                _QUERIES["row_key"], {"schema": table.schema, "table": table.table}
            )
            row = await cursor.fetchone()
            if row is None:
                raise RefetchFailed(f"cannot read a row of {table} again: there is no such table")
            if not row[0]:
                raise RefetchFailed(
                    f"cannot read a row of {table} again: it has no key",
                    hint="Add a primary key, or leave refetch out.",
                )
            key = self._keys[table] = tuple(row[0])
        return key


async def _read(
    connection: AsyncConnection[Any],
    table: TableName,
    columns: Sequence[str],
    key: Sequence[str],
    values: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return columns of a row as the router would send them; None when there is no such row."""
    query = _BY_KEY.format(
        columns=sql.SQL(", ").join(map(_identifier, columns)),
        table=_identifier(table.schema, table.table),
        key=sql.SQL(" and ").join(sql.SQL("{} = %s").format(_identifier(k)) for k in key),
    )
    parameters = [_key_text(table, column, values) for column in key]
    cursor = await connection.execute(query, parameters, binary=False)
    result = cursor.pgresult
    if result is None or not result.ntuples:
        return None
    return {
        column: _value(result.ftype(place), result.get_value(0, place))
        for place, column in enumerate(columns)
    }


def _identifier(*names: str) -> sql.Identifier:
    """Return names for a query that has placeholders: there a per cent sign is doubled."""
    return sql.Identifier(*(name.replace("%", "%%") for name in names))


def _value(type_oid: int, text: bytes | None) -> Any:
    return None if text is None else from_json(converter_of(type_oid)(text))


def _key_text(table: TableName, column: str, values: Mapping[str, Any]) -> str:
    """Return a key's value as text, of which the server knows the type. Raises RefetchFailed."""
    value = values.get(column)
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case _:
            raise RefetchFailed(
                f"cannot read a row of {table} again: the change does not carry its key column"
                f" {column!r}",
                hint="Add it to the trigger's columns or to the row model.",
            )
