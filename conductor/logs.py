"""How a worker process logs: one JSON object a line, or readable lines on a terminal.

Libraries log with the standard library, ours too; this gives every record of a process one form.
In JSON our own records have a stable name as ``event``, their ``sentence`` for people and
their facts as fields: `EVENTS` lists them, so that a search or an alert can rely on them. Payloads
and passwords are never logged.
"""

from __future__ import annotations

import logging
import sys
from copy import copy
from dataclasses import dataclass
from typing import Final, Literal

import structlog

Format = Literal["auto", "json", "console"]


@dataclass(frozen=True, slots=True)
class LogEvent:
    """What one logging call says. ``fields`` name what stands in the places of ``template``."""

    name: str
    template: str
    fields: tuple[str, ...]
    meaning: str


EVENTS: Final = (
    LogEvent(
        "serving",
        "serving metrics and probes on %s:%s",
        ("host", "port"),
        "Metrics and probes are served on `port`.",
    ),
    LogEvent(
        "started",
        "started app %s with tasks %s",
        ("app", "tasks"),
        "The process claims jobs.",
    ),
    LogEvent(
        "start_delayed",
        "not started yet: %s",
        ("error",),
        "The database does not answer; it is tried again for CONDUCTOR_CONNECT_TIMEOUT_S.",
    ),
    LogEvent(
        "draining",
        "%s: draining for up to %g s",
        ("signal", "drain_timeout_s"),
        "Asked to stop: nothing more is claimed, running handlers may finish.",
    ),
    LogEvent(
        "schema_too_new",
        "%s; draining for up to %g s",
        ("error", "drain_timeout_s"),
        "The database was migrated beyond what this release knows: deploy a newer one.",
    ),
    LogEvent(
        "handlers_stopped",
        "queue %s: stopping %s handlers",
        ("queue", "handlers"),
        "The drain time is up; these jobs run again elsewhere.",
    ),
    LogEvent(
        "worker_registered",
        "worker %s of queue %s has %s slots",
        ("worker", "queue", "slots"),
        "A queue's worker has its lease.",
    ),
    LogEvent(
        "worker_not_retired",
        "worker %s could not sign off; its lease will run out",
        ("worker",),
        "The database did not answer at the end: others wait some seconds for its jobs.",
    ),
    LogEvent(
        "worker_dead",
        "worker %s is dead: %s jobs run again, %s have crashed too often",
        ("worker", "rescued", "failed"),
        "Another worker did not renew its lease, and its jobs were taken over.",
    ),
    LogEvent(
        "lease_lost",
        "worker %s was declared dead while it lived",
        ("worker",),
        "This one did not renew in time (starved, paused, cut off): its jobs run elsewhere.",
    ),
    LogEvent(
        "leases_failed",
        "leases: %s: %s",
        ("kind", "error"),
        "Leases could not be renewed; it is tried again at once.",
    ),
    LogEvent(
        "connection_failed",
        "%s: cannot connect: %s",
        ("connection", "error"),
        "Tried again with growing pauses.",
    ),
    LogEvent(
        "connection_lost",
        "%s: %s: %s",
        ("connection", "kind", "error"),
        "Opened again; what was under way is sent again where the fence still holds.",
    ),
    LogEvent(
        "part_disconnected",
        "%s lost its connection and will go on: %s",
        ("part", "error"),
        "Scheduler, dispatcher, maintenance or gauges; counted in conductor_reconnects_total.",
    ),
    LogEvent(
        "part_failed",
        "%s failed and will be tried again: %s",
        ("part", "error"),
        "With a traceback unless the error has a name; counted in conductor_failures_total.",
    ),
    LogEvent(
        "attempt_failed",
        "job %s of task %s: attempt %s: %s",
        ("job", "task", "attempt", "kind"),
        "A handler raised `kind`; `conductor jobs show` tells its message, and what follows.",
    ),
    LogEvent(
        "claim_lost",
        "giving back job %s: the reply to its claim was lost",
        ("job",),
        "A connection broke while jobs were claimed; the job runs again.",
    ),
    LogEvent(
        "outcome_fenced",
        "job %s was no longer this worker's to settle",
        ("job",),
        "Its outcome was refused; another worker has the job.",
    ),
    LogEvent(
        "version_unknown",
        "job %s of task %s began with version %s",
        ("job", "task", "version"),
        "No handler of that version here; it is left to other workers.",
    ),
    LogEvent(
        "events_unreadable",
        "%s emitted events cannot be read; their jobs failed",
        ("events",),
        "Counted in conductor_events_refused_total.",
    ),
    LogEvent(
        "event_filters_failed",
        "%s filters of events failed, and the jobs with them",
        ("jobs",),
        "A `when` could not be evaluated on an event; the jobs are kept as failed.",
    ),
    LogEvent(
        "subscription_unreadable",
        "subscription %s cannot be read, and gets no jobs: %s",
        ("subscription", "error"),
        "Its row was written by hand or by a newer version.",
    ),
    LogEvent(
        "schedule_unreadable",
        "schedule %s of task %s cannot be fired here: %s",
        ("schedule", "task", "error"),
        "This process lacks the time zone, or cannot read the expression.",
    ),
    LogEvent(
        "task_retired",
        "retired %s: a newer version lacks it and no worker offers it",
        ("retired",),
        "Its triggers make no more jobs.",
    ),
    LogEvent(
        "history_not_partitioned",
        "history is not partitioned by this role: %s",
        ("error",),
        "The role does not own the table: history grows until one that does runs a worker.",
    ),
    LogEvent(
        "maintenance_waits",
        "attempt %s of %s: %s",
        ("attempt", "attempts", "error"),
        "A partition is locked; tried again.",
    ),
    LogEvent(
        "maintenance_put_off",
        "left as it is: %s",
        ("error",),
        "A partition stayed locked; tried again with the next pass.",
    ),
    LogEvent(
        "spans_not_exported",
        "no spans are exported: %s; install pgconductor[otel]",
        ("error",),
        "OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra is not installed.",
    ),
)
"""Every record of our own loggers but a handler's (``conductor.job``)."""

_BY_TEMPLATE: Final = {event.template: event for event in EVENTS}


def configure(level: str, form: Format) -> None:
    """Send all records to standard error: as JSON, unless that is a terminal."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Plain: structlog's own traceback shows local variables, and those are payloads and passwords.
    render: list[structlog.types.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    handler = logging.StreamHandler(sys.stderr)
    formatter = structlog.stdlib.ProcessorFormatter if console else _NamingFormatter
    handler.setFormatter(
        formatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _NamingFormatter(structlog.stdlib.ProcessorFormatter):
    """Gives a record of ours its name and fields; others keep their sentence as ``event``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        ours = record.name.partition(".")[0] == "conductor"
        known = _BY_TEMPLATE.get(record.msg) if ours else None
        if known is None:
            return super().format(record)
        named = copy(record)  # others may have the record as well
        values = record.args if isinstance(record.args, tuple) else ()
        facts = dict(zip(known.fields, values, strict=False))
        named.__dict__.update(facts, sentence=record.getMessage())
        named.msg, named.args = known.name, ()
        return super().format(named)
