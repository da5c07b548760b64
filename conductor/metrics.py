"""The metrics of a worker process: one table of names, and the instruments made from it.

Base units, bounded labels (queues, tasks, outcomes: never an id or a key), attempts and failures
as separate counters, timestamps rather than ages. Every process has its own registry. Gauges that
describe the whole queue (`scope="queue database"`) are exported by one process at a time: aggregate
them with ``max``, which is right while they change hands. This module must not measure
anything itself; whoever does the work calls an instrument.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)

_LATENCY_BUCKETS_S: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0),
)

OUTCOMES: Final = ("completed", "failed", "cancelled")
STATES: Final = ("ready", "suspect", "scheduled", "running", "waiting", "parked")
FIRED_BY: Final = ("cron", "event")
PARTS: Final = ("dispatcher", "gauges", "maintenance", "scheduler", "supersession")
"""The parts of a process that repeat a piece of work (`conductor.periodic`)."""


@dataclass(frozen=True, slots=True)
class Metric(Generic[Instrument]):
    """One line of the table. The unit is in the name's last words, as Prometheus wants it."""

    instrument: type[Instrument]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()  # of the last label, when they are known beforehand
    scope: Literal["process", "queue database"] = "process"


BUILD_INFO = Metric(
    Gauge,
    "conductor_build_info",
    "Always 1; the labels say what runs: the application, its version, and the release of this.",
    ("app", "version", "release"),
)
ENQUEUED = Metric(
    Counter,
    "conductor_jobs_enqueued_total",
    "Jobs put into the queue by this process' scheduler and dispatcher.",
    ("queue", "task", "trigger"),
    FIRED_BY,
)
STARTED = Metric(Counter, "conductor_jobs_started_total", "Attempts started.", ("queue", "task"))
FINISHED = Metric(
    Counter,
    "conductor_jobs_finished_total",
    "Jobs that ended for good, by outcome.",
    ("queue", "task", "outcome"),
    OUTCOMES,
)
RETRIED = Metric(
    Counter,
    "conductor_jobs_retried_total",
    "Failed attempts that will be tried again.",
    ("queue", "task"),
)
SUSPENDED = Metric(
    Counter,
    "conductor_jobs_suspended_total",
    "Runs that ended in a durable wait.",
    ("queue", "task"),
)
RESCUED = Metric(
    Counter,
    "conductor_jobs_rescued_total",
    "Jobs this process took from workers it declared dead.",
)
CRASHED = Metric(
    Counter,
    "conductor_jobs_crashed_total",
    "Jobs that failed for good because each process that ran them died; finished ones as well.",
    ("queue", "task"),
)
FENCED = Metric(
    Counter,
    "conductor_jobs_fenced_total",
    "Outcomes refused because the claim was no longer this worker's.",
    ("queue",),
)
LEASES_LOST = Metric(
    Counter,
    "conductor_leases_lost_total",
    "Times a worker of this process was declared dead while it lived.",
    ("queue",),
)
WAIT = Metric(
    Histogram,
    "conductor_job_wait_seconds",
    "From when a job could run to when its handler started.",
    ("queue", "task"),
)
DURATION = Metric(
    Histogram,
    "conductor_job_duration_seconds",
    "How long an attempt took.",
    ("queue", "task"),
)
CLAIM = Metric(Histogram, "conductor_claim_duration_seconds", "Duration of one claim.", ("queue",))
SETTLE = Metric(
    Histogram, "conductor_settle_duration_seconds", "Duration of one settle.", ("queue",)
)
STEPS = Metric(Counter, "conductor_steps_total", "Steps written.", ("queue",))
SLOTS = Metric(Gauge, "conductor_slots", "Jobs this process may run at once.", ("queue",))
BUSY_SLOTS = Metric(Gauge, "conductor_slots_busy", "Jobs this process is running.", ("queue",))
RECONNECTS = Metric(
    Counter,
    "conductor_reconnects_total",
    "Lost database connections, by the part of the process that lost one.",
    ("part",),
    ("worker", "leases", *PARTS),
)
FAILURES = Metric(
    Counter,
    "conductor_failures_total",
    "Passes of a part of the process that failed for another reason and were tried again.",
    ("part",),
    PARTS,
)
EVENTS_DISPATCHED = Metric(
    Counter,
    "conductor_events_dispatched_total",
    "Emitted events matched against the subscriptions.",
)
EVENTS_UNMATCHED = Metric(
    Counter,
    "conductor_events_unmatched_total",
    "Emitted events that no subscription wanted.",
)
EVENTS_REFUSED = Metric(
    Counter,
    "conductor_events_refused_total",
    "Emitted events that could not be read or filtered: a job failed for good.",
)
EVENTS_UNDELIVERED = Metric(
    Counter,
    "conductor_events_undelivered_total",
    "Emitted events that a subscription did not get, because its row cannot be read.",
)
CRON_TICK = Metric(
    Gauge,
    "conductor_cron_last_tick_timestamp_seconds",
    "When this process last looked for due schedules.",
)
CRON_MISSED = Metric(
    Counter,
    "conductor_cron_missed_total",
    "Instants of schedules that passed while no process was there to fire them.",
)
MAINTAINED = Metric(
    Gauge,
    "conductor_maintenance_last_run_timestamp_seconds",
    "When this process last saw the maintenance of the queue done.",
)
JOBS = Metric(
    Gauge,
    "conductor_jobs",
    "Jobs by state; counted up to a bound, so the bound means that many or more.",
    ("queue", "state"),
    STATES,
    scope="queue database",
)
OLDEST_READY = Metric(
    Gauge,
    "conductor_oldest_ready_timestamp_seconds",
    "Since when the oldest job or schedule that is due could run, whether or not a worker marked"
    " it ready; 0 when there is none.",
    ("queue",),
    scope="queue database",
)
HALTED_LANES = Metric(
    Gauge,
    "conductor_lanes_halted",
    "Lanes of ordered tasks that stand still since a job has failed; counted up to a bound.",
    ("queue",),
    scope="queue database",
)
WORKERS = Metric(
    Gauge,
    "conductor_workers",
    "Workers that renew their lease; those of every queue dispatch what is emitted.",
    ("queue",),
    scope="queue database",
)
GAPS_OPEN = Metric(
    Gauge,
    "conductor_gaps_open",
    "Gaps nobody has closed, by condition (of cdc_conditions_total; none: there is no gap), of the"
    " router's slots.",
    ("slot", "condition"),
    scope="queue database",
)
DEAD_LETTERS = Metric(
    Gauge,
    "conductor_dead_letters",
    "Dead letters nobody has taken away, of the router's slots; counted up to a bound.",
    ("slot",),
    scope="queue database",
)
GAUGES_READ = Metric(
    Gauge,
    "conductor_gauges_read_timestamp_seconds",
    "When the gauges of the whole queue were last read.",
    scope="queue database",
)
XMIN_AGE = Metric(
    Gauge,
    "conductor_oldest_xmin_age_transactions",
    "Age of the oldest snapshot, open or prepared transaction, or slot that keeps dead rows of the"
    " queue from being removed.",
    scope="queue database",
)

TABLE: Final[tuple[Metric[Any], ...]] = tuple(
    value for value in tuple(globals().values()) if isinstance(value, Metric)
)
"""Every metric of a worker process, in the order of this file."""


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe many values, for a fraction of what one `Histogram.observe` each costs.

    That takes two locks a value, this one a bucket that is hit.
    """
    bounds, buckets = histogram._upper_bounds, histogram._buckets  # noqa: SLF001 - has no such call
    for bucket, count in Tally(bisect_left(bounds, value) for value in values).items():
        buckets[bucket].inc(count)
    histogram._sum.inc(sum(values))  # noqa: SLF001


class Metrics:
    """The instruments of one process, in a registry of their own; by default of the whole table.

    >>> metrics = Metrics()
    >>> metrics.get(STARTED, "default", "send-email").inc()
    """

    def __init__(self, table: Iterable[Metric[Any]] = TABLE) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        self.registry = CollectorRegistry()
        self._families: dict[Metric[Any], Any] = {m: self._create(m) for m in table}
        self._children: dict[tuple[Metric[Any], tuple[str, ...]], Any] = {}

    def get(self, metric: Metric[Instrument], *labels: str) -> Instrument:
        """Return the instrument of these labels, in the order of the table.

        Made once a set of labels and kept; a hot path keeps what it got. Asking is enough for a
        series to exist, at 0.
        """
        key = (metric, labels)
        child = self._children.get(key)
        if child is None:
            family = self._families[metric]
            child = self._children[key] = family.labels(*labels) if labels else family
        return cast("Instrument", child)

    def clear(self, metric: Metric[Any]) -> None:
        """Forget every set of labels of a metric: what it counted is no longer there."""
        self._families[metric].clear()
        for key in [key for key in list(self._children) if key[0] is metric]:
            del self._children[key]

    def _create(self, metric: Metric[Any]) -> Any:
        options = {"buckets": _LATENCY_BUCKETS_S} if metric.instrument is Histogram else {}
        return metric.instrument(
            metric.name, metric.help, metric.labels, registry=self.registry, **options
        )
