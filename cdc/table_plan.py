"""What the active subscriptions want of one table, compiled for its present shape.

Everything that does not depend on the row is made here once: the operations, the columns, the
JSON around their values, the filter. `routing` then applies it to each change. Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cdc.errors import ProtocolError
from cdc.keys import RowKey
from cdc.relations import RelationShape
from cdc.templates import Fragments, ObjectTemplate
from cdc.values import undecodable
from cdc.wire.messages import UNCHANGED, Delete, Insert, Row, Truncate, Update
from conductor import filters
from conductor.contract import JobSpec
from conductor.matching import ChangeFilter, Operation, Subscription
from conductor.values import Converter

Change = Insert | Update | Delete | Truncate
ChangeSubscription = tuple[Subscription, ChangeFilter]

_OPERATIONS: Final[dict[type, Operation]] = {
    Insert: "insert",
    Update: "update",
    Delete: "delete",
    Truncate: "truncate",
}


class TablePlan:
    """What the active subscriptions want of one table in its present shape."""

    __slots__ = ("groups", "has_filters", "has_keys", "routes", "routes_by_kind", "shape", "waits")

    def __init__(self, shape: RelationShape, routes: "Sequence[Route]") -> None:
        self.shape = shape
        self.routes = routes
        self.waits: TablePlan | None = None  # those whose changes jobs wait for
        self.groups: TablePlan | None = None  # those that want a transaction's changes together
        self.has_keys = any(route.key_of is not None for route in routes)
        self.has_filters = any(route.when is not None for route in self.routes)
        self.routes_by_kind: dict[type, list[Route]] = {
            kind: [route for route in self.routes if operation in route.operations]
            for kind, operation in _OPERATIONS.items()
        }

    @classmethod
    def of(cls, shape: RelationShape, subscriptions: "Sequence[ChangeSubscription]") -> "TablePlan":
        """Compile the subscriptions that concern the table."""
        found = [(wanted, Route(s, wanted, shape)) for s, wanted in subscriptions]
        plan = cls(shape, [r for wanted, r in found if not wanted.waits and wanted.group is None])
        if awaited := [r for wanted, r in found if wanted.waits]:
            plan.waits = cls(shape, awaited)
        if grouped := [r for wanted, r in found if wanted.group is not None and not wanted.waits]:
            plan.groups = cls(shape, grouped)
        return plan


class Route:
    """One subscription on one table: everything about it that does not depend on the row."""

    __slots__ = (
        "_captured",
        "_delete_by_key",
        "_delete_by_row",
        "changed",
        "coalesce_us",
        "copy_head",
        "fills",
        "head_truncate",
        "insert",
        "key",
        "key_of",
        "operations",
        "ordered",
        "row",
        "select",
        "subscription",
        "update",
        "when",
    )

    def __init__(
        self, subscription: Subscription, wanted: ChangeFilter, shape: RelationShape
    ) -> None:
        names = shape.column_names
        captured = [
            i for i, name in enumerate(names) if wanted.columns is None or name in wanted.columns
        ]
        self.ordered, self.coalesce_us = wanted.ordered, wanted.coalesce_us
        has_key = wanted.ordered or self.coalesce_us
        self.key_of = RowKey(wanted.key, shape) if has_key else None
        if self.key_of is not None and not self.key_of.may_identify:
            self.coalesce_us = 0  # a change of one row would take that of another
        # Else a change of the row that it does not get may have set what a later one leaves out.
        self.fills = (
            self.key_of is not None
            and self.key_of.identifies
            and wanted.when is None
            and wanted.changed is None
            and {"insert", "update"} <= wanted.operations
        )
        self._captured = frozenset(captured)
        self.subscription = subscription.id
        self.operations = wanted.operations
        # A column that was renamed or dropped cannot be compared: then every update is let through.
        compared = frozenset(wanted.changed or ())
        self.changed = compared if wanted.changed and compared.issubset(names) else None
        self.when = None if wanted.when is None else _When(wanted.when, shape)
        self.copy_head = subscription.head
        keys = [i for i in captured if i in shape.key_indexes]
        table = b'"schema":%b,"table":%b,' % (orjson.dumps(shape.schema), orjson.dumps(shape.name))
        self.row = ObjectTemplate(names, captured)
        self.key = ObjectTemplate(names, keys)
        new, old = table + b'"new":', b'{"op":"delete",' + table + b'"old":'
        self.insert, self.select = ObjectTemplate(names, captured, b'{"op":"insert",' + new).parts
        self.update = ObjectTemplate(names, captured, b'{"op":"update",' + new)
        self._delete_by_key = ObjectTemplate(names, keys, old)
        self._delete_by_row = ObjectTemplate(names, captured, old)
        self.head_truncate = b'{"op":"truncate",' + table

    def old(self, old_kind: str | None) -> ObjectTemplate:
        """Return the template of an old row: all captured columns, or those of the key."""
        return self.row if old_kind == "O" else self.key

    def delete(self, old_kind: str) -> ObjectTemplate:
        """Return the template of a delete, by what the WAL holds of the row."""
        return self._delete_by_row if old_kind == "O" else self._delete_by_key

    def give_key(self, spec: JobSpec, row: Row, *, moved: bool) -> None:
        """Let a job have the key of a row: of the new one, or of one that was deleted.

        ``moved``: the row had another key before, and so other changes.
        """
        if self.key_of is not None:
            spec.key = self.key_of.read(row)
            spec.ordered, spec.coalesce_us = self.ordered, self.coalesce_us
            spec.fills = self.fills and not moved

    def only_captured(self, change: Change) -> Change:
        """Return the change with the columns blanked that this subscription does not capture."""
        if isinstance(change, Insert):
            return Insert(change.relation_oid, self._blank(change.new))
        if isinstance(change, Update):
            old = None if change.old is None else self._blank(change.old)
            return Update(change.relation_oid, change.old_kind, old, self._blank(change.new))
        if isinstance(change, Delete):
            return Delete(change.relation_oid, change.old_kind, self._blank(change.old))
        return change

    def _blank(self, row: Row) -> Row:
        return [value if i in self._captured else None for i, value in enumerate(row)]


class _When:
    """A subscription's filter on one table: the variables of its expression, from a row's values.

    Only the columns that the expression names are converted, unless it takes a row as a whole.
    """

    __slots__ = ("_filter", "_new", "_old", "_shape")

    def __init__(self, source: str, shape: RelationShape) -> None:
        self._filter = filters.compile_stored(source)
        self._shape = shape
        self._new = self._indexes("new")
        self._old = self._indexes("old")

    def _indexes(self, name: str) -> tuple[int, ...]:
        read = self._filter.references
        return tuple(
            index
            for index, column in enumerate(self._shape.column_names)
            if name in read.whole or column in read.columns[name]
        )

    def matches(self, change: Change) -> bool:
        """Return what the expression says. Raises FilterFailed, ValueUndecodable."""
        new: dict[str, Any] | None = None
        old: dict[str, Any] | None = None
        changed: list[str] | None = []
        if isinstance(change, Insert):
            new = self._values(change.new, self._new)
        elif isinstance(change, Update):
            filled, changed = _compare(self._shape, change)
            new = self._values(filled, self._new)
            if change.old is not None:
                old = self._old_values(change.old, change.old_kind)
        elif isinstance(change, Delete):
            old = self._old_values(change.old, change.old_kind)
        operation = _OPERATIONS[type(change)]
        return self._filter.matches({"new": new, "old": old, "changed": changed, "op": operation})

    def _old_values(self, row: Row, kind: str | None) -> dict[str, Any]:
        keys = self._shape.key_indexes
        return self._values(row, [i for i in self._old if kind == "O" or i in keys])

    def _values(self, row: Row, indexes: Sequence[int]) -> dict[str, Any]:
        """Return columns by name; one whose value is not in the WAL is not there."""
        names, converters = self._shape.column_names, self._shape.converters
        if len(row) != len(names):
            raise ProtocolError("R", 0, f"a row of {len(names)} columns", f"{len(row)}")
        values: dict[str, Any] = {}
        for index in indexes:
            text = row[index]
            if text is None:
                values[names[index]] = None
            elif text is not UNCHANGED:
                values[names[index]] = _parsed(converters[index], text)
        return values


def _parsed(convert: Converter, text: bytes) -> Any:
    try:
        return orjson.loads(convert(text))
    except UnicodeDecodeError as error:
        raise undecodable(error) from None
    except orjson.JSONDecodeError as error:  # json takes what is no text: "\\ud800"
        raise filters.FilterFailed(f"a value cannot be read as JSON: {error}") from None


@dataclass(slots=True)
class UpdateImage:
    """An update, converted once for all subscriptions of its table."""

    new: Fragments
    old: Fragments | None
    old_kind: str | None
    changed: list[str] | None  # None: unknown, for the WAL held no full old row
    has_unchanged: bool

    @classmethod
    def of(cls, shape: RelationShape, update: Update) -> "UpdateImage":
        """Convert an update. Raises ValueUndecodable, ProtocolError."""
        new, changed = _compare(shape, update)
        old = update.old
        return cls(
            shape.fragments(new),
            None if old is None else shape.fragments(old),
            update.old_kind,
            changed,
            UNCHANGED in new,
        )

    def concerns(self, wanted: frozenset[str] | None) -> bool:
        """Tell whether a wanted column changed.

        When the table has lost its full identity since registration nobody can tell: then it does,
        for a job too many can be ignored and a lost one cannot be found.
        """
        return wanted is None or self.changed is None or not wanted.isdisjoint(self.changed)

    def render(self, route: Route) -> bytes:
        """Return the payload of a route's job, but for its end, which is the transaction's."""
        parts: list[bytes] = []
        unchanged: list[str] = []
        if self.has_unchanged:
            new, unchanged = route.update.render_present(self.new)
        else:
            new = route.update.render(self.new)
        parts.append(new)
        if self.old is not None:
            parts.append(b',"old":' + route.old(self.old_kind).render(self.old))
        if self.changed is not None:
            parts.append(b',"changed":' + orjson.dumps(self.changed))
        if unchanged:
            parts.append(b',"unchanged":' + orjson.dumps(unchanged))
        return b"".join(parts)


def give_keys(
    routes: Iterable[Route], shape: RelationShape, change: Change, specs: Iterable[JobSpec]
) -> None:
    """Let the jobs of a change have their keys. Raises ValueUndecodable."""
    if isinstance(change, Truncate):
        return
    by_head = {route.copy_head: route for route in routes}
    moved = isinstance(change, Update) and change.old_kind == "K"
    if isinstance(change, Update):
        row, _ = _compare(shape, change)
    else:
        row = change.old if isinstance(change, Delete) else change.new
    for spec in specs:
        by_head[spec.head].give_key(spec, row, moved=moved)


def _compare(shape: RelationShape, update: Update) -> tuple[Row, list[str] | None]:
    """Return the new row, as full as the WAL allows, and what changed; None: nobody can tell."""
    new, old = update.new, update.old
    if old is None or update.old_kind != "O":
        return new, None
    changed = [
        name
        for name, after, before in zip(shape.column_names, new, old, strict=False)
        if after is not UNCHANGED and after != before
    ]
    # A full old row carries the TOASTed values that the new row leaves out.
    pairs = zip(new, old, strict=False)
    return [before if after is UNCHANGED else after for after, before in pairs], changed
