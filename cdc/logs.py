"""How a sidecar logs: one JSON object a line, or readable lines on a terminal.

Event names are stable, `EVENTS` lists them; fields carry the facts. What it uses of `conductor`
logs in the same form. Rows, payloads and passwords are never logged.
"""

import logging
import sys
from typing import Final, Literal

import structlog

from conductor import logs

Format = Literal["auto", "json", "console"]

EVENTS: Final = {
    "starting": "The process has read its settings.",
    "serving": "Metrics and probes are served on `port`.",
    "standing_by": "Another sidecar holds the slot; this one takes over when it goes.",
    "slot_busy": "The slot was taken by another sidecar at the last moment.",
    "slot_created": "There was no slot and no progress: changes are captured from `lsn` on.",
    "slot_recreated": "After a loss (policy `recreate`): changes are captured from `lsn` on.",
    "loss_is_over": "A loss was to be accepted and is none any more: the slot stays.",
    "leading": "This sidecar streams, from `lsn`, under `epoch`.",
    "idle_slots": "New subscriptions also wait for these slots, from which nobody streams.",
    "timeline_followed": "The source was promoted; the stream goes on there.",
    "plugin_limits": "What the plugin in use cannot tell.",
    "emits_not_routed": "Its role may not own the prefix of emitted events: `hint` says how.",
    "subscriptions_marked": "Subscriptions begin or end with this marker in the stream.",
    "subscription_refused": "Its table cannot be captured as it is; `hint` says what to do.",
    "subscription_unreadable": "Its row was written by hand or by a newer version.",
    "stream_restarts": "The stream ends in order and starts again at once, for `reason`.",
    "activation_waits": "Writers that were there before hold up a subscription: `pids`.",
    "interruption_ended": "Tables that were gone are captured again, or unwanted: gap closed.",
    "publication_unchanged": "The publication lacks something and may not be changed from here.",
    "condition": "Changes may be lost: a row in conductor.gaps (but none for `source_taken`).",
    "session_ended": "The attempt to lead ended with `error`; the next is in `retry_in_s`.",
    "stopped": "Asked to stop, and done: what was read is committed and acknowledged.",
}
"""Every event of a sidecar, and what it says."""


def configure(level: str, form: Format) -> None:
    """Set up logging for this process: to standard error, JSON unless that is a terminal."""
    logs.configure(level, form)
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
