"""The metrics of a sidecar: one table of names, and the instruments made from it.

Base units, bounded labels (operations, tasks, conditions, causes: never an id, a key or an LSN),
timestamps rather than ages, everything bounded initialised to 0. Every process has its own
registry, which adds the label `slot` to every series. `Metrics` also implements what the pump and
the activator report to; it measures nothing itself.
"""

import time
from collections import Counter as CountOf
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric as Family

from cdc.catalog import Slot, SlotStatistics
from cdc.pipeline import Committed
from cdc.wire.messages import Commit, Delete, Insert, Relation, Truncate, Update
from cdc.wire.wal2json import DIVERGENCES as KINDS_OF_DIVERGENCE

Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)

OPERATIONS: Final[dict[type, str]] = {
    Insert: "insert",
    Update: "update",
    Delete: "delete",
    Truncate: "truncate",
}
WAL_STATUSES: Final = ("reserved", "extended", "unreserved", "lost")
CAUSES: Final = ("source", "queue", "fence", "slot", "other")
STAGES: Final = ("received", "routed", "acknowledged", "server")
LAGS: Final = {"receive": "received", "route": "routed", "acknowledge": "acknowledged"}
SUBSCRIPTION_STATES: Final = ("active", "pending", "refused")
SPOOL_PLACES: Final = ("memory", "disk")
EMITTED_RESULTS: Final = ("matched", "unmatched")
CONDITIONS: Final = (
    "protocol_error",
    "publication_drift",
    "publication_foreign",
    "publication_missing",
    "relation_unknown",
    "server_behind",
    "server_decode_error",
    "slot_ahead",
    "slot_foreign",
    "slot_lost",
    "slot_missing",
    "slot_two_phase",
    "source_taken",
    "standby_slots_waiting",
    "system_changed",
    "table_missing",
    "timeline_switched",
)
_SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 300.0, 1800.0, 3600.0),
)
_JOBS: Final = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 100_000.0)


@dataclass(frozen=True, slots=True)
class Metric(Generic[Instrument]):
    """One line of the table. The unit is in the name's last words, as Prometheus wants it."""

    instrument: type[Instrument]
    name: str
    help: str
    label: str | None = None
    values: tuple[str, ...] = ()  # of the label, when they are known beforehand
    buckets: tuple[float, ...] = ()


BUILD_INFO = Metric(Gauge, "cdc_build_info", "Always 1; the label says what runs.", "version")
LEADER = Metric(Gauge, "cdc_leader", "1 while this process holds the slot.")
CONNECTED = Metric(Gauge, "cdc_connected", "1 while both databases answer.")
POSITION = Metric(
    Gauge,
    "cdc_position_bytes",
    "Positions in the source's WAL, as bytes from its beginning.",
    "stage",
    STAGES,
)
LAG = Metric(
    Gauge,
    "cdc_lag_bytes",
    "WAL between the server's position and what was received, routed, acknowledged.",
    "stage",
    tuple(LAGS),
)
RETAINED = Metric(Gauge, "cdc_slot_retained_wal_bytes", "WAL the server keeps for the slot.")
SAFE = Metric(
    Gauge,
    "cdc_slot_safe_wal_bytes",
    "WAL that can still be written before the slot is lost; +Inf when it is unlimited.",
)
WAL_STATUS = Metric(
    Gauge, "cdc_slot_wal_status", "1 for the slot's wal_status.", "status", WAL_STATUSES
)
SPILLED_TRANSACTIONS = Metric(
    Gauge,
    "cdc_slot_spilled_transactions",
    "Transactions that decoding spilt to the server's disk, since its statistics were reset.",
)
SPILLED_BYTES = Metric(
    Gauge, "cdc_slot_spilled_bytes", "Bytes of them, since the statistics were reset."
)
STREAMED_TRANSACTIONS = Metric(
    Gauge,
    "cdc_slot_streamed_transactions",
    "Transactions that were sent while they were open, since the statistics were reset.",
)
STREAMED_BYTES = Metric(
    Gauge, "cdc_slot_streamed_bytes", "Bytes of them, since the statistics were reset."
)
SPOOLED_TRANSACTIONS = Metric(
    Gauge,
    "cdc_spooled_transactions",
    "Transactions in progress whose changes are kept here (CDC_STREAMING).",
)
SPOOLED_BYTES = Metric(
    Gauge,
    "cdc_spooled_bytes",
    "Bytes of them, in this process' memory and on its disk.",
    "place",
    SPOOL_PLACES,
)
MESSAGES = Metric(Counter, "cdc_messages_total", "Messages decoded.")
RECEIVED_BYTES = Metric(Counter, "cdc_received_bytes_total", "Bytes of the messages received.")
CHANGES = Metric(
    Counter, "cdc_changes_total", "Changes decoded.", "operation", tuple(OPERATIONS.values())
)
TRANSACTIONS = Metric(Counter, "cdc_transactions_total", "Source transactions received.")
SCHEMA_CHANGES = Metric(
    Counter,
    "cdc_relation_messages_total",
    "Descriptions of tables received: first ones and changes.",
)
UNMATCHED = Metric(
    Counter, "cdc_unmatched_changes_total", "Changes of captured tables that nobody wanted."
)
EMITTED = Metric(
    Counter,
    "cdc_emitted_events_total",
    "Events emitted through the WAL that were routed, and whether a subscription was about them.",
    "result",
    EMITTED_RESULTS,
)
JOBS = Metric(Counter, "cdc_jobs_routed_total", "Jobs committed to the queue.", "task")
DEAD_LETTERS = Metric(
    Counter, "cdc_dead_letters_total", "Rows and messages set aside because they were undecodable."
)
COMMIT_TO_ENQUEUE = Metric(
    Histogram,
    "cdc_commit_to_enqueue_seconds",
    "From a source transaction's commit to that of its jobs (two hosts' clocks).",
    buckets=_SECONDS,
)
LAST_COMMIT = Metric(
    Gauge,
    "cdc_last_commit_timestamp_seconds",
    "Commit time of the last source transaction that gave a job.",
)
LAST_MESSAGE = Metric(
    Gauge, "cdc_last_message_timestamp_seconds", "When the server was last heard of."
)
HEARTBEAT = Metric(
    Gauge,
    "cdc_heartbeat_timestamp_seconds",
    "When the last message was written to the source that has come through the whole pipe.",
)
HEARTBEAT_DURATION = Metric(
    Histogram,
    "cdc_heartbeat_duration_seconds",
    "From writing such a message to acknowledging it: read, and durable in the queue (one clock).",
    buckets=_SECONDS,
)
FLUSH = Metric(
    Histogram, "cdc_flush_duration_seconds", "Duration of one sink transaction.", buckets=_SECONDS
)
BATCH = Metric(Histogram, "cdc_flush_jobs", "Jobs in one sink transaction.", buckets=_JOBS)
BACKPRESSURE = Metric(
    Counter, "cdc_backpressure_seconds_total", "Time reading stood still for the queue database."
)
FEEDBACK = Metric(Counter, "cdc_status_messages_total", "Status messages sent to the source.")
RECONNECTS = Metric(
    Counter, "cdc_reconnects_total", "Sessions that ended and were tried again.", "cause", CAUSES
)
GAPS = Metric(
    Counter,
    "cdc_conditions_total",
    "Conditions met that may mean loss, each with a row in conductor.gaps (but source_taken).",
    "condition",
    CONDITIONS,
)
DIVERGENCES = Metric(
    Counter,
    "cdc_plugin_divergences_total",
    "Facts of changes that wal2json could not tell, and pgoutput would have.",
    "kind",
    KINDS_OF_DIVERGENCE,
)
SUBSCRIPTIONS = Metric(
    Gauge, "cdc_subscriptions", "Subscriptions to changes.", "state", SUBSCRIPTION_STATES
)

TABLE: Final[tuple[Metric[Any], ...]] = tuple(
    value for value in tuple(globals().values()) if isinstance(value, Metric)
)
"""Every metric of a sidecar, in the order of this file."""


class SlotRegistry(CollectorRegistry):
    """A registry whose series all say which slot they are about. Costs nothing until a scrape."""

    def __init__(self, slot: str) -> None:
        super().__init__(auto_describe=True)
        self._slot = slot

    def collect(self) -> Iterable[Family]:
        """Yield every metric with the label `slot`."""
        for family in super().collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "slot": self._slot})
                for sample in family.samples
            ]
            yield family


class Metrics:
    """One process' instruments, in a registry of their own.

    Args:
        version: of this package.
        slot: whose changes the process streams.

    `task_of` names the task of a job's head; the service sets it to its subscriptions'.
    """

    def __init__(self, version: str, slot: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        self.registry = SlotRegistry(slot)
        self.task_of: Callable[[bytes], str | None] = lambda _: None
        make = self._make
        make(BUILD_INFO).labels(version).set(1)
        self._reached: dict[str, int] = {}
        self._server_lsn = 0
        self._leader = make(LEADER)
        self.connected = make(CONNECTED)
        self._position = make(POSITION)
        self._lag = make(LAG)
        self._retained = make(RETAINED)
        self._safe = make(SAFE)
        self._wal_status = make(WAL_STATUS)
        self._spilled_transactions = make(SPILLED_TRANSACTIONS)
        self._spilled_bytes = make(SPILLED_BYTES)
        self._streamed_transactions = make(STREAMED_TRANSACTIONS)
        self._streamed_bytes = make(STREAMED_BYTES)
        self._spooled_transactions = make(SPOOLED_TRANSACTIONS)
        self._spooled_bytes = self._children(make(SPOOLED_BYTES), SPOOLED_BYTES)
        self._messages = make(MESSAGES)
        self._received_bytes = make(RECEIVED_BYTES)
        self._changes = self._children(make(CHANGES), CHANGES)
        self._transactions = make(TRANSACTIONS)
        self._schema_changes = make(SCHEMA_CHANGES)
        self._unmatched = make(UNMATCHED)
        self._emitted = self._children(make(EMITTED), EMITTED)
        self._jobs = make(JOBS)
        self._jobs_by_head: dict[bytes, Counter] = {}
        self._dead_letters = make(DEAD_LETTERS)
        self._commit_to_enqueue = make(COMMIT_TO_ENQUEUE)
        self._last_commit = make(LAST_COMMIT)
        self._last_message = make(LAST_MESSAGE)
        self._heartbeat = make(HEARTBEAT)
        self._heartbeat_duration = make(HEARTBEAT_DURATION)
        self._flush = make(FLUSH)
        self._batch = make(BATCH)
        self._backpressure = make(BACKPRESSURE)
        self._feedback = make(FEEDBACK)
        self._reconnects = self._children(make(RECONNECTS), RECONNECTS)
        self._conditions = self._children(make(GAPS), GAPS)
        self._divergences = self._children(make(DIVERGENCES), DIVERGENCES)
        self._subscriptions = make(SUBSCRIPTIONS)
        self.follow()

    # --- what the pump reports ---------------------------------------------------------------

    def read(self, kinds: CountOf[type], size_bytes: int, unmatched: int) -> None:
        """Messages of each kind have been decoded."""
        self._messages.inc(kinds.total())
        self._received_bytes.inc(size_bytes)
        self._transactions.inc(kinds[Commit])
        self._schema_changes.inc(kinds[Relation])
        self._unmatched.inc(unmatched)
        self._last_message.set_to_current_time()
        for kind, operation in OPERATIONS.items():
            if count := kinds[kind]:
                self._changes[operation].inc(count)

    def emitted(self, *, matched: int, unmatched: int) -> None:
        """Events that were emitted through the WAL have been routed."""
        self._emitted["matched"].inc(matched)
        self._emitted["unmatched"].inc(unmatched)

    def committed(self, committed: Committed) -> None:
        """A sink transaction has been committed."""
        for head, count in committed.jobs_by_head.items():
            self._child_of(head).inc(count)
        self._dead_letters.inc(committed.dead_letters)
        self._flush.observe(committed.duration_s)
        self._batch.observe(committed.jobs_by_head.total())
        if committed.commit_time_us:
            committed_at_s = committed.commit_time_us / 1e6
            self._last_commit.set(committed_at_s)
            self._commit_to_enqueue.observe(max(0.0, time.time() - committed_at_s))

    def waited(self, seconds: float) -> None:
        """The reader has waited that long for the writer."""
        self._backpressure.inc(seconds)

    def positions(self, *, received: int, routed: int, acknowledged: int, server: int) -> None:
        """Where everybody stands, as LSNs; a status message says so to the server."""
        self._feedback.inc()
        self._reached = {"received": received, "routed": routed, "acknowledged": acknowledged}
        for stage, lsn in self._reached.items():
            self._position.labels(stage).set(lsn)
        self.server(server)

    def server(self, lsn: int) -> None:
        """The server's WAL reaches at least to here."""
        self._server_lsn = max(self._server_lsn, lsn)
        self._position.labels("server").set(self._server_lsn)
        for lag, stage in LAGS.items():
            if stage in self._reached:
                self._lag.labels(lag).set(max(0, self._server_lsn - self._reached[stage]))

    def spooled(self, *, transactions: int, memory_bytes: int, disk_bytes: int) -> None:
        """So much of transactions that have not ended is kept."""
        self._spooled_transactions.set(transactions)
        self._spooled_bytes["memory"].set(memory_bytes)
        self._spooled_bytes["disk"].set(disk_bytes)

    # --- what the activator reports ------------------------------------------------------------

    def subscriptions(self, *, active: int, pending: int, refused: int) -> None:
        """How many route, wait to begin, or cannot begin."""
        counts = {"active": active, "pending": pending, "refused": refused}
        for state, count in counts.items():
            self._subscriptions.labels(state).set(count)

    def tasks(self, names: Iterable[str]) -> None:
        """Whose jobs may be routed: each is counted from 0, so that the first one is a rise."""
        for name in names:
            self._jobs.labels(name)

    # --- what the service reports --------------------------------------------------------------

    def slot(self, slot: Slot | None, statistics: SlotStatistics | None) -> None:
        """What the server says about the slot."""
        status = "lost" if slot is not None and slot.is_lost else slot and slot.wal_status
        for name in WAL_STATUSES:
            self._wal_status.labels(name).set(name == status)
        if slot is not None:
            self._retained.set(slot.retained_bytes or 0)
            self._safe.set(float("inf") if slot.safe_wal_bytes is None else slot.safe_wal_bytes)
        if statistics is not None:
            self._spilled_transactions.set(statistics.spilled_transactions)
            self._spilled_bytes.set(statistics.spilled_bytes)
            self._streamed_transactions.set(statistics.streamed_transactions)
            self._streamed_bytes.set(statistics.streamed_bytes)

    def heartbeat(self, written_at_s: float, duration_s: float) -> None:
        """A message written at that time has come through the whole pipe."""
        self._heartbeat.set(written_at_s)
        self._heartbeat_duration.observe(duration_s)

    def lead(self) -> None:
        """This process holds the slot."""
        self._leader.set(1)

    def follow(self) -> None:
        """It does not, or not any more: what only the leader knows is unknown here."""
        self._leader.set(0)
        self._reached, self._server_lsn = {}, 0
        for family in (self._position, self._lag, self._wal_status, self._subscriptions):
            family.clear()
        for gauge in (
            *(self._retained, self._safe, self._spilled_transactions, self._spilled_bytes),
            *(self._streamed_transactions, self._streamed_bytes),
        ):
            gauge.set(float("nan"))

    def reconnecting(self, cause: str) -> None:
        """A session has ended and will be tried again."""
        self._reconnects[cause].inc()

    def condition(self, name: str) -> None:
        """A condition that may mean loss was met."""
        self._conditions[name].inc()

    def diverged(self, kind: str, count: int) -> None:
        """The plugin could not tell, so many times, what pgoutput would have."""
        self._divergences[kind].inc(count)

    # --- making them ---------------------------------------------------------------------------

    def _child_of(self, head: bytes) -> Counter:
        child = self._jobs_by_head.get(head)
        if child is None:
            child = self._jobs_by_head[head] = self._jobs.labels(self.task_of(head) or "unknown")
        return child

    def _make(self, metric: Metric[Instrument]) -> Instrument:
        labels = () if metric.label is None else (metric.label,)
        options: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
        return metric.instrument(
            metric.name, metric.help, labels, registry=self.registry, **options
        )

    @staticmethod
    def _children(instrument: Instrument, metric: Metric[Instrument]) -> dict[str, Instrument]:
        """Make the children of a bounded label, so that they start at 0 and cost no look-up."""
        return {value: instrument.labels(value) for value in metric.values}
