"""What operators chose to leave out of a publication: columns, and rows of what is insert-only.

By default whole tables are published, and the router chooses. A list of columns makes the
application's DROP COLUMN fail; a row filter turns updates into inserts and deletes, so it is for
the insert-only publication alone. Pure.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from cdc.catalog import Publication, PublishedTable, Table, TableName
from cdc.errors import CdcError, ColumnUnknown, RowsFiltered
from cdc.wanted import Wanted, dotted
from conductor import filters


@dataclass(frozen=True, slots=True)
class Definition:
    """How a table is published: these columns (None: all), rows for which this is true."""

    columns: tuple[str, ...] | None = None
    condition: str | None = None  # SQL


WHOLE: Final = Definition()
Definitions = Mapping[TableName, Definition]


@dataclass(frozen=True, slots=True)
class Narrowing:
    """The settings: columns and conditions by table."""

    column_lists: Mapping[TableName, tuple[str, ...]] = field(default_factory=dict)
    row_filters: Mapping[TableName, str] = field(default_factory=dict)

    def in_main(self, tables: Mapping[TableName, Table]) -> dict[TableName, Definition]:
        """Return how the main publication has what is not whole there.

        With the columns of the identity, or updates would fail. Where those are all, or a
        partition's own, there is no list.
        """
        found = {}
        for name, listed in self.column_lists.items():
            table = tables.get(name)
            if table is not None and table.kind != "p" and table.replica_identity != "f":
                found[name] = Definition(_in_order(table, {*listed, *table.identity_columns}))
        return found

    def in_inserts(self, tables: Mapping[TableName, Table]) -> dict[TableName, Definition]:
        """Return how the insert-only publication has what is not whole there."""
        found = {}
        for name in self.column_lists.keys() | self.row_filters.keys():
            if (table := tables.get(name)) is not None:
                listed = self.column_lists.get(name)
                columns = None if listed is None else _in_order(table, listed)
                found[name] = Definition(columns, self.row_filters.get(name))
        return found

    def why_unfit(self, tables: Mapping[TableName, Table]) -> CdcError | None:
        """Say which listed column a table does not have (any more): it cannot be sent."""
        for name in sorted(self.column_lists.keys() & tables.keys()):
            if unknown := sorted(set(self.column_lists[name]) - set(tables[name].columns)):
                return ColumnUnknown(
                    f"table {dotted(name)} has no column {unknown[0]}, which CDC_COLUMN_LISTS "
                    "names",
                    hint="correct CDC_COLUMN_LISTS",
                )
        return None

    def refusal_of(self, wanted: Wanted, table: Table | None) -> CdcError | None:
        """Say why a subscription cannot begin on what is left of its table."""
        name = dotted(wanted.table)
        if wanted.table in self.row_filters and not wanted.is_insert_only:
            return RowsFiltered(
                f"only inserts of {name} can be captured: CDC_ROW_FILTERS leaves out rows of it"
            )
        listed = self.column_lists.get(wanted.table)
        if listed is None or table is None:
            return None
        if (unknown := self.why_unfit({wanted.table: table})) is not None:
            return unknown
        carried = {*listed, *(() if wanted.is_insert_only else table.identity_columns)}
        needed = _columns_of(wanted)
        if wanted.table in self.row_filters and _has_key_of_row(wanted):
            needed.update(table.identity_columns)
        if lacking := sorted(needed - carried):
            return ColumnUnknown(
                f"column {lacking[0]} of {name} is not among its CDC_COLUMN_LISTS",
                hint="add it there, or leave it out of the trigger",
            )
        return None


def part_of(
    definitions: Definitions, table: TableName
) -> tuple[tuple[str, ...] | None, str | None]:
    """Return columns and condition, as `publication_queries.add_table` takes them."""
    definition = definitions.get(table, WHOLE)
    return definition.columns, definition.condition


WHOLE_TABLES: Final = Narrowing()


def settle(
    publication: Publication | None,
    definitions: Definitions,
    applied: Mapping[TableName, tuple[int, str]],
    *,
    trusts: bool = True,
) -> Publication | None:
    """Return a publication in which only what lacks something it must have is partial.

    What is as it is defined is whole; what has more, or was defined otherwise by us, is
    `is_outdated`. Memberships of what is defined are not watched: to define it anew is to put it
    back.

    Args:
        publication: as read.
        definitions: what it is to have of tables.
        applied: with which condition tables were published last, by membership.
        trusts: a condition nobody remembers is the right one. (The server writes them its own way,
            so that they cannot be compared.)
    """
    if publication is None:
        return None
    tables = tuple(_settle(t, definitions, applied, trusts=trusts) for t in publication.tables)
    return replace(publication, tables=tables)


def _settle(
    table: PublishedTable,
    definitions: Definitions,
    applied: Mapping[TableName, tuple[int, str]],
    *,
    trusts: bool,
) -> PublishedTable:
    wanted = definitions.get(table.key, WHOLE)
    membership, condition = applied.get(table.key, (None, ""))
    is_ours = membership == table.membership
    if wanted == WHOLE and not is_ours:
        return table
    has = None if table.columns is None else set(table.columns)
    needs = None if wanted.columns is None else set(wanted.columns)
    lacks = has is not None and (needs is None or not needs <= has)
    filtered = wanted.condition is not None
    is_changed = filtered and (condition != wanted.condition if is_ours else not trusts)
    return replace(
        table,
        has_row_filter=table.has_row_filter and not filtered and not is_ours,
        has_column_list=lacks and not is_ours,
        membership=0,
        is_outdated=has != needs or table.has_row_filter != filtered or is_changed,
    )


def _columns_of(wanted: Wanted) -> set[str]:
    wants = wanted.filter
    read = filters.compile_stored(wants.when).references.row_columns if wants.when else ()
    return {*(wants.columns or ()), *(wants.changed or ()), *wants.key, *read}


def _has_key_of_row(wanted: Wanted) -> bool:
    """Whether its jobs have a key, which is what tells a row apart."""
    wants = wanted.filter
    return (wants.ordered or wants.coalesce_s is not None) and not wants.key


def _in_order(table: Table, names: Collection[str]) -> tuple[str, ...]:
    return tuple(column for column in table.columns if column in names)
