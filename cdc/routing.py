"""Changes x subscriptions → job specs.

A `Router` compiles, for each table in the stream, what every active subscription wants of it: the
operations, the columns, the JSON around them. Routing a row is then one conversion of its columns
and one formatting a subscription. Pure: bytes and lists in, `JobSpec`s and dead letters out; the
order of changes and the set of active subscriptions are the caller's.

What a job's payload holds is the contract of `conductor` (trigger ``change``)::

    {"op": "update", "schema": "shop", "table": "orders", "new": {…}, "old": {…},
     "changed": ["state"], "unchanged": ["note"], "commit_time": "…", "commit_lsn": "0/16B3748"}
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from cdc.errors import ProtocolError, ValueUndecodable
from cdc.groups import TransactionGroups
from cdc.keys import RowKey
from cdc.relations import RelationShape, describe_shape
from cdc.templates import Fragments, ObjectTemplate
from cdc.values import undecodable
from cdc.wire.messages import (
    UNCHANGED,
    Delete,
    Insert,
    Row,
    Truncate,
    Update,
)
from conductor import filters
from conductor.contract import JobSpec, encode_position
from conductor.matching import ChangeFilter, Operation, Subscription, change_topic
from conductor.values import Converter

_OPERATIONS: Final[dict[type, Operation]] = {
    Insert: "insert",
    Update: "update",
    Delete: "delete",
    Truncate: "truncate",
}
_BOOLEANS: Final = (b"false", b"true")
Change = Insert | Update | Delete | Truncate
_Wanted = tuple[Subscription, ChangeFilter]


@dataclass(slots=True)
class DeadLetter:
    """A change that could not become a job of this subscription, with all that is known of it."""

    commit_lsn: int
    ordinal: int
    subscription: int | None
    relation: dict[str, Any] | None
    error: str
    raw: bytes
    commit_time_us: int = 0  # 0: unknown


@dataclass(slots=True)
class Routed:
    """What routing has produced so far; the caller empties it."""

    specs: list[JobSpec] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    waits: list[tuple[str, JobSpec]] = field(default_factory=list)
    """What jobs may wait for, with its topic: like a job's specification, but it becomes none."""

    unmatched: int = 0

    @property
    def lengths(self) -> tuple[int, int, int]:
        """How many specs, dead letters and waits there are."""
        return len(self.specs), len(self.dead_letters), len(self.waits)


class Router:
    """Routes the changes of one stream, transaction by transaction, in order.

    `begin` a transaction, `route` its changes, then `end` it. `activate` and `retire` take effect
    for what is routed afterwards.
    """

    def __init__(self, generation: int, subscriptions: Iterable[Subscription]) -> None:
        self._generation = generation
        self._active: dict[int, Subscription] = {}
        self._by_table: defaultdict[tuple[str, str], list[_Wanted]] = defaultdict(list)
        self._queues: dict[bytes, str] = {}
        self._topics: dict[bytes, str] = {}
        self._plans: dict[int, _TablePlan] = {}
        self._groups = TransactionGroups()
        self._described: tuple[RelationShape, dict[str, Any]] | None = None
        self._commit_lsn = 0
        self._commit_time_us = 0
        self._position = b""
        self.metadata: bytes | None = None
        self._suffix = b""
        self._second = -1  # many transactions commit within one second: format it once
        self._second_text = b""
        self.activate(subscriptions)

    @property
    def active(self) -> list[Subscription]:
        """The subscriptions that route now, by id."""
        return [self._active[i] for i in sorted(self._active)]

    def activate(self, subscriptions: Iterable[Subscription]) -> None:
        """Let subscriptions route from here on."""
        for subscription in subscriptions:
            self._active[subscription.id] = subscription
            self._queues[subscription.head] = subscription.queue
            wanted = subscription.filter
            if isinstance(wanted, ChangeFilter) and wanted.waits:
                self._topics[subscription.head] = change_topic(wanted, subscription.source)
        self._by_table.clear()
        self._plans.clear()

    def retire(self, ids: Iterable[int]) -> None:
        """Let subscriptions route no more."""
        for subscription_id in ids:
            self._active.pop(subscription_id, None)
        self._by_table.clear()
        self._plans.clear()

    def queue_of(self, head: bytes) -> str:
        """Return the queue of the jobs that carry this head."""
        return self._queues[head]

    def wants(self, shape: RelationShape) -> bool:
        """Tell whether any active subscription concerns this table."""
        plan = self._plan(shape)
        return bool(plan.routes) or plan.waits is not None or plan.groups is not None

    def begin(self, commit_lsn: int, commit_time_us: int, metadata: bytes | None = None) -> None:
        """Start on the changes of the transaction that committed here; its jobs get `metadata`."""
        self._commit_lsn = commit_lsn
        self._commit_time_us = commit_time_us
        self._position = encode_position(self._generation, commit_lsn, metadata)
        self.metadata = metadata
        second, microsecond = divmod(commit_time_us, 1_000_000)
        if second != self._second:
            self._second = second
            self._second_text = datetime.fromtimestamp(second, UTC).isoformat()[:19].encode()
        self._suffix = b',"commit_time":"%b.%06d+00:00","commit_lsn":"%X/%X"}' % (
            self._second_text,
            microsecond,
            commit_lsn >> 32,
            commit_lsn & 0xFFFF_FFFF,
        )

    def route(
        self, shape: RelationShape, change: Change, ordinal: int, raw: bytes, out: Routed
    ) -> None:
        """Append the jobs of one change to `out`: one a subscription that wants it.

        `raw` is the message as it came, kept with a dead letter when a value cannot be decoded.
        """
        plan = self._plans.get(shape.oid)
        if plan is None or plan.shape is not shape:
            plan = self._plan(shape)
        if plan.waits is not None:
            self._route_waits(plan.waits, change, ordinal, raw, out)
        if plan.groups is not None:
            self._route_groups(plan.groups, change, ordinal, raw, out)
            if not plan.routes:
                return
        routes = plan.routes_by_kind[type(change)]
        if plan.has_filters:
            routes = self._admitted(routes, shape, change, ordinal, raw, out)
            if not routes:
                return
        if not routes:
            out.unmatched += 1
            return
        done = len(out.specs)
        try:
            self._append(routes, shape, change, ordinal, out.specs)
            if plan.has_keys:
                _give_keys(routes, shape, change, out.specs[done:])
        except (ValueUndecodable, ProtocolError):
            del out.specs[done:]
            self._append_singly(routes, shape, change, ordinal, raw, out)

    def end(self, out: Routed) -> None:
        """End the transaction: append the jobs that stand for all of its changes to `out`."""
        if self._groups.size_bytes:
            out.specs += self._groups.end()

    def _route_waits(
        self, plan: "_TablePlan", change: Change, ordinal: int, raw: bytes, out: Routed
    ) -> None:
        """Append what jobs may wait for of one change."""
        specs = self._route_apart(plan, change, ordinal, raw, out)
        out.waits += [(self._topics[spec.head], spec) for spec in specs]

    def _route_groups(
        self, plan: "_TablePlan", change: Change, ordinal: int, raw: bytes, out: Routed
    ) -> None:
        """Let one change go into the jobs that stand for all of its transaction."""
        for spec in self._route_apart(plan, change, ordinal, raw, out):
            out.specs += self._groups.add(spec)

    def _route_apart(
        self, plan: "_TablePlan", change: Change, ordinal: int, raw: bytes, out: Routed
    ) -> list[JobSpec]:
        """Return what becomes no job of its own; dead letters are appended to `out`."""
        found, shape = Routed(), plan.shape
        routes: Sequence[_Route] = plan.routes_by_kind[type(change)]
        if plan.has_filters:
            routes = self._admitted(routes, shape, change, ordinal, raw, found)
        try:
            self._append(routes, shape, change, ordinal, found.specs)
        except (ValueUndecodable, ProtocolError):
            found.specs.clear()
            self._append_singly(routes, shape, change, ordinal, raw, found)
        out.dead_letters += found.dead_letters
        return found.specs

    def _append(
        self,
        routes: "Sequence[_Route]",
        shape: RelationShape,
        change: Change,
        ordinal: int,
        specs: list[JobSpec],
    ) -> None:
        position, suffix = self._position, self._suffix
        if isinstance(change, Insert):
            fragments = shape.fragments(change.new)
            for route in routes:
                payload = route.insert % route.select(fragments) + suffix
                specs.append(JobSpec(route.copy_head, position, ordinal, payload))
        elif isinstance(change, Update):
            image = _UpdateImage.of(shape, change)
            for route in routes:
                if image.concerns(route.changed):
                    payload = image.render(route) + suffix
                    specs.append(JobSpec(route.copy_head, position, ordinal, payload))
        elif isinstance(change, Delete):
            fragments = shape.fragments(change.old)
            for route in routes:
                payload = route.delete(change.old_kind).render(fragments) + suffix
                specs.append(JobSpec(route.copy_head, position, ordinal, payload))
        else:
            flags = (_BOOLEANS[change.cascade], _BOOLEANS[change.restart_identity])
            for route in routes:
                payload = route.head_truncate + b'"cascade":%b,"restart_identity":%b' % flags
                specs.append(JobSpec(route.copy_head, position, ordinal, payload + suffix))

    def _append_singly(
        self,
        routes: "Sequence[_Route]",
        shape: RelationShape,
        change: Change,
        ordinal: int,
        raw: bytes,
        out: Routed,
    ) -> None:
        """Route what can be routed of a change with a bad value; the rest are dead letters.

        A subscription that does not capture the bad column loses nothing by it.
        """
        for route in routes:
            done = len(out.specs)
            try:
                self._append((route,), shape, route.only_captured(change), ordinal, out.specs)
                _give_keys((route,), shape, change, out.specs[done:])
            except (ValueUndecodable, ProtocolError) as error:
                del out.specs[done:]
                out.dead_letters.append(self._dead_letter(route, shape, ordinal, raw, error))

    def _admitted(
        self,
        routes: "Sequence[_Route]",
        shape: RelationShape,
        change: Change,
        ordinal: int,
        raw: bytes,
        out: Routed,
    ) -> "list[_Route]":
        """Return the routes whose filter is true of the change, and those that have none.

        A filter that fails gives a dead letter: a lost change can be found then.
        """
        admitted: list[_Route] = []
        failed = 0
        for route in routes:
            try:
                if route.when is None or route.when.matches(change):
                    admitted.append(route)
            except (ValueUndecodable, ProtocolError, filters.FilterFailed) as error:
                failed += 1
                out.dead_letters.append(self._dead_letter(route, shape, ordinal, raw, error))
        if not admitted and not failed:
            out.unmatched += 1
        return admitted

    def _dead_letter(
        self, route: "_Route", shape: RelationShape, ordinal: int, raw: bytes, error: Exception
    ) -> DeadLetter:
        if self._described is None or self._described[0] is not shape:
            self._described = shape, describe_shape(shape)
        return DeadLetter(
            self._commit_lsn,
            ordinal,
            route.subscription,
            self._described[1],  # one for all of a table: a bad filter may refuse millions of rows
            f"{type(error).__name__}: {error}",
            raw,
            self._commit_time_us,
        )

    def _plan(self, shape: RelationShape) -> "_TablePlan":
        plan = self._plans.get(shape.oid)
        if plan is None or plan.shape is not shape:
            plan = self._plans[shape.oid] = _TablePlan.of(shape, self._wanted(shape))
        return plan

    def _wanted(self, shape: RelationShape) -> "Sequence[_Wanted]":
        if not self._by_table:  # one pass for all tables
            for s in self.active:
                if isinstance(s.filter, ChangeFilter):
                    self._by_table[s.filter.schema, s.filter.table].append((s, s.filter))
        return self._by_table[shape.schema, shape.name]


class _TablePlan:
    """What the active subscriptions want of one table in its present shape."""

    __slots__ = ("groups", "has_filters", "has_keys", "routes", "routes_by_kind", "shape", "waits")

    def __init__(self, shape: RelationShape, routes: "Sequence[_Route]") -> None:
        self.shape = shape
        self.routes = routes
        self.waits: _TablePlan | None = None  # those whose changes jobs wait for
        self.groups: _TablePlan | None = None  # those that want a transaction's changes together
        self.has_keys = any(route.key_of is not None for route in routes)
        self.has_filters = any(route.when is not None for route in self.routes)
        self.routes_by_kind: dict[type, list[_Route]] = {
            kind: [route for route in self.routes if operation in route.operations]
            for kind, operation in _OPERATIONS.items()
        }

    @classmethod
    def of(cls, shape: RelationShape, subscriptions: "Sequence[_Wanted]") -> "_TablePlan":
        """Compile the subscriptions that concern the table."""
        found = [(wanted, _Route(s, wanted, shape)) for s, wanted in subscriptions]
        plan = cls(shape, [r for wanted, r in found if not wanted.waits and wanted.group is None])
        if awaited := [r for wanted, r in found if wanted.waits]:
            plan.waits = cls(shape, awaited)
        if grouped := [r for wanted, r in found if wanted.group is not None and not wanted.waits]:
            plan.groups = cls(shape, grouped)
        return plan


class _Route:
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

    def old(self, old_kind: str | None) -> "ObjectTemplate":
        """Return the template of an old row: all captured columns, or those of the key."""
        return self.row if old_kind == "O" else self.key

    def delete(self, old_kind: str) -> "ObjectTemplate":
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
class _UpdateImage:
    """An update, converted once for all subscriptions of its table."""

    new: Fragments
    old: Fragments | None
    old_kind: str | None
    changed: list[str] | None  # None: unknown, for the WAL held no full old row
    has_unchanged: bool

    @classmethod
    def of(cls, shape: RelationShape, update: Update) -> "_UpdateImage":
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

    def render(self, route: _Route) -> bytes:
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


def _give_keys(
    routes: Iterable[_Route], shape: RelationShape, change: Change, specs: Iterable[JobSpec]
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
