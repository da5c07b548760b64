"""Changes x subscriptions → job specs.

A `Router` keeps, for each table in the stream, what every active subscription wants of it
(`table_plan`). Routing a row is then one conversion of its columns and one formatting a
subscription. Pure: bytes and lists in, `JobSpec`s and dead letters out; the order of changes and
the set of active subscriptions are the caller's.

What a job's payload holds is the contract of `conductor` (trigger ``change``)::

    {"op": "update", "schema": "shop", "table": "orders", "new": {…}, "old": {…},
     "changed": ["state"], "unchanged": ["note"], "commit_time": "…", "commit_lsn": "0/16B3748"}
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from cdc.errors import ProtocolError, ValueUndecodable
from cdc.groups import TransactionGroups
from cdc.relations import RelationShape, describe_shape
from cdc.table_plan import Change, ChangeSubscription, Route, TablePlan, UpdateImage, give_keys
from cdc.wire.messages import Delete, Insert, Update
from conductor.contract import JobSpec, encode_position
from conductor.filters import FilterFailed
from conductor.matching import ChangeFilter, Subscription, change_topic

_BOOLEANS: Final = (b"false", b"true")


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
        self._by_table: defaultdict[tuple[str, str], list[ChangeSubscription]] = defaultdict(list)
        self._queues: dict[bytes, str] = {}
        self._topics: dict[bytes, str] = {}
        self._plans: dict[int, TablePlan] = {}
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
                give_keys(routes, shape, change, out.specs[done:])
        except (ValueUndecodable, ProtocolError):
            del out.specs[done:]
            self._append_singly(routes, shape, change, ordinal, raw, out)

    def end(self, out: Routed) -> None:
        """End the transaction: append the jobs that stand for all of its changes to `out`."""
        if self._groups.size_bytes:
            out.specs += self._groups.end()

    def _route_waits(
        self, plan: TablePlan, change: Change, ordinal: int, raw: bytes, out: Routed
    ) -> None:
        """Append what jobs may wait for of one change."""
        specs = self._route_apart(plan, change, ordinal, raw, out)
        out.waits += [(self._topics[spec.head], spec) for spec in specs]

    def _route_groups(
        self, plan: TablePlan, change: Change, ordinal: int, raw: bytes, out: Routed
    ) -> None:
        """Let one change go into the jobs that stand for all of its transaction."""
        for spec in self._route_apart(plan, change, ordinal, raw, out):
            out.specs += self._groups.add(spec)

    def _route_apart(
        self, plan: TablePlan, change: Change, ordinal: int, raw: bytes, out: Routed
    ) -> list[JobSpec]:
        """Return what becomes no job of its own; dead letters are appended to `out`."""
        found, shape = Routed(), plan.shape
        routes: Sequence[Route] = plan.routes_by_kind[type(change)]
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
        routes: Sequence[Route],
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
            image = UpdateImage.of(shape, change)
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
        routes: Sequence[Route],
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
                give_keys((route,), shape, change, out.specs[done:])
            except (ValueUndecodable, ProtocolError) as error:
                del out.specs[done:]
                out.dead_letters.append(self._dead_letter(route, shape, ordinal, raw, error))

    def _admitted(
        self,
        routes: Sequence[Route],
        shape: RelationShape,
        change: Change,
        ordinal: int,
        raw: bytes,
        out: Routed,
    ) -> list[Route]:
        """Return the routes whose filter is true of the change, and those that have none.

        A filter that fails gives a dead letter: a lost change can be found then.
        """
        admitted: list[Route] = []
        failed = 0
        for route in routes:
            try:
                if route.when is None or route.when.matches(change):
                    admitted.append(route)
            except (ValueUndecodable, ProtocolError, FilterFailed) as error:
                failed += 1
                out.dead_letters.append(self._dead_letter(route, shape, ordinal, raw, error))
        if not admitted and not failed:
            out.unmatched += 1
        return admitted

    def _dead_letter(
        self, route: Route, shape: RelationShape, ordinal: int, raw: bytes, error: Exception
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

    def _plan(self, shape: RelationShape) -> TablePlan:
        plan = self._plans.get(shape.oid)
        if plan is None or plan.shape is not shape:
            plan = self._plans[shape.oid] = TablePlan.of(shape, self._wanted(shape))
        return plan

    def _wanted(self, shape: RelationShape) -> Sequence[ChangeSubscription]:
        if not self._by_table:  # one pass for all tables
            for s in self.active:
                if isinstance(s.filter, ChangeFilter):
                    self._by_table[s.filter.schema, s.filter.table].append((s, s.filter))
        return self._by_table[shape.schema, shape.name]
