"""The router's page: who leads, how far behind, what the source keeps, where time goes. Pure."""

from typing import Final

from tools.monitoring.panels import NAMESPACE, SLOT, Dashboard, Panel, Query, Row

RATE: Final = "[$__rate_interval]"

STATE: Final = Row(
    "Who leads",
    (
        Panel(
            "Leader",
            "1 for the sidecar that holds the slot. Two at 1 for a moment is a takeover seen by "
            "two scrapes.",
            queries=(Query("cdc_leader", "{{slot}} {{instance}}"),),
            width=6,
        ),
        Panel(
            "Connected",
            "1 while leading or standing by with both databases in reach.",
            queries=(Query("cdc_connected", "{{slot}} {{instance}}"),),
            width=6,
        ),
        Panel(
            "Sessions that ended, in 5 minutes",
            "Each was tried again. Many in a row: runbook cdc-flapping.",
            queries=(
                Query(
                    "sum by (slot, cause) (increase(cdc_reconnects_total[5m]))",
                    "{{slot}} {{cause}}",
                ),
            ),
            width=6,
            stacked=True,
        ),
        Panel(
            "Subscriptions",
            "Active ones route; pending ones wait for writers that began before; refused ones "
            "cannot be captured, and the log says why.",
            queries=(Query("max by (slot, state) (cdc_subscriptions)", "{{slot}} {{state}}"),),
            width=6,
        ),
    ),
)

LAG: Final = Row(
    "How far behind",
    (
        Panel(
            "Lag, seconds",
            "Age of the newest message that has come through the whole pipe; it rises to ten "
            "seconds between two of them.",
            unit="s",
            queries=(Query("max by (slot) (slot:cdc_heartbeat_age_seconds:min)", "{{slot}}"),),
            steps=((None, "text"), (120, "red")),
        ),
        Panel(
            "Lag, bytes",
            "WAL between the server's position and what was received, routed (in the queue) and "
            "acknowledged (durable there).",
            unit="bytes",
            queries=(Query("max by (slot, stage) (cdc_lag_bytes)", "{{slot}} {{stage}}"),),
        ),
        Panel(
            "Heartbeat, round trip",
            "From writing a message to acknowledging it, by one clock; half a second is usual "
            "where nothing else happens.",
            unit="s",
            queries=(
                Query(
                    "histogram_quantile(0.5, sum by (slot, le) "
                    f"(rate(cdc_heartbeat_duration_seconds_bucket{RATE})))",
                    "{{slot}} median",
                ),
                Query(
                    "histogram_quantile(0.99, sum by (slot, le) "
                    f"(rate(cdc_heartbeat_duration_seconds_bucket{RATE})))",
                    "{{slot}} p99",
                ),
            ),
        ),
        Panel(
            "Commit to job",
            "From a source transaction's commit to that of its jobs, by two hosts' clocks.",
            unit="s",
            queries=(
                Query(
                    "histogram_quantile(0.5, sum by (slot, le) "
                    f"(rate(cdc_commit_to_enqueue_seconds_bucket{RATE})))",
                    "{{slot}} median",
                ),
                Query(
                    "histogram_quantile(0.99, sum by (slot, le) "
                    f"(rate(cdc_commit_to_enqueue_seconds_bucket{RATE})))",
                    "{{slot}} p99",
                ),
            ),
        ),
        Panel(
            "Since the last message of the server",
            "It speaks at least every half of wal_sender_timeout; the sidecar asks it after ten "
            "silent seconds.",
            unit="s",
            queries=(
                Query(
                    "time() - max by (slot) (cdc_last_message_timestamp_seconds > 0)", "{{slot}}"
                ),
            ),
        ),
        Panel(
            "Since the last change that gave a job",
            "Not lag: on a quiet table it only grows. A jump that does not end on a busy one is "
            "worth a look.",
            unit="s",
            queries=(
                Query("time() - max by (slot) (cdc_last_commit_timestamp_seconds > 0)", "{{slot}}"),
            ),
        ),
    ),
)

SOURCE: Final = Row(
    "What the source keeps for us",
    (
        Panel(
            "WAL kept, and room left",
            "What the server keeps for the slot, and what can still be written before it gives the "
            "slot up; no line for the room where there is no limit.",
            unit="bytes",
            queries=(
                Query("max by (slot) (cdc_slot_retained_wal_bytes)", "{{slot}} kept"),
                Query("min by (slot) (cdc_slot_safe_wal_bytes) < +Inf", "{{slot}} room"),
            ),
        ),
        Panel(
            "Time to slot loss",
            "If nothing were acknowledged from now on and as much WAL written as in the last five "
            "minutes.",
            unit="s",
            queries=(
                Query("min by (slot) (slot:cdc_slot_time_to_loss_seconds:min) < +Inf", "{{slot}}"),
            ),
            steps=((None, "red"), (14400, "text")),
        ),
        Panel(
            "State of the slot",
            "wal_status: reserved and extended are well, unreserved is about to be lost, lost is "
            "lost (runbook cdc-slot-lost).",
            queries=(Query("max by (slot, status) (cdc_slot_wal_status)", "{{slot}} {{status}}"),),
            stacked=True,
        ),
        Panel(
            "WAL written by the source",
            "All of it, not only what is captured.",
            unit="Bps",
            queries=(Query("max by (slot) (slot:cdc_wal_written_bytes:rate5m)", "{{slot}}"),),
            width=12,
        ),
        Panel(
            "Positions",
            "In bytes from the beginning of the source's WAL. Lines that part are lag.",
            unit="bytes",
            queries=(Query("max by (slot, stage) (cdc_position_bytes)", "{{slot}} {{stage}}"),),
            width=12,
        ),
        Panel(
            "Spilt or streamed by decoding",
            "Transactions larger than logical_decoding_work_mem, since the server's statistics "
            "were reset. Raise that setting when it grows all the time.",
            unit="bytes",
            queries=(
                Query("max by (slot) (cdc_slot_spilled_bytes)", "{{slot}} spilt"),
                Query("max by (slot) (cdc_slot_streamed_bytes)", "{{slot}} streamed"),
            ),
            width=6,
        ),
        Panel(
            "Transactions spilt or streamed",
            "How many those were.",
            queries=(
                Query("max by (slot) (cdc_slot_spilled_transactions)", "{{slot}} spilt"),
                Query("max by (slot) (cdc_slot_streamed_transactions)", "{{slot}} streamed"),
            ),
            width=6,
        ),
        Panel(
            "Transactions in progress, kept here",
            "With CDC_STREAMING the sidecar keeps large transactions until they commit.",
            unit="bytes",
            queries=(Query("sum by (slot, place) (cdc_spooled_bytes)", "{{slot}} {{place}}"),),
            width=6,
        ),
        Panel(
            "Transactions kept here",
            "How many those are.",
            queries=(Query("sum by (slot) (cdc_spooled_transactions)", "{{slot}}"),),
            width=6,
        ),
    ),
)

WORK: Final = Row(
    "What it does",
    (
        Panel(
            "Changes",
            "Row changes decoded, by operation, and those that no subscription wanted; events that "
            "were emitted through the WAL.",
            unit="cps",
            queries=(
                Query(f"sum by (operation) (rate(cdc_changes_total{RATE}))", "{{operation}}"),
                Query(f"sum(rate(cdc_unmatched_changes_total{RATE}))", "unmatched"),
                Query(
                    f"sum by (result) (rate(cdc_emitted_events_total{RATE}))", "events {{result}}"
                ),
            ),
            width=6,
        ),
        Panel(
            "Jobs routed, by task",
            "Committed to the queue.",
            unit="cps",
            queries=(Query(f"sum by (task) (rate(cdc_jobs_routed_total{RATE}))", "{{task}}"),),
            stacked=True,
            width=6,
        ),
        Panel(
            "Received",
            "Bytes of messages, as decoded; the walsender has filtered by publication.",
            unit="Bps",
            queries=(Query(f"sum by (slot) (rate(cdc_received_bytes_total{RATE}))", "{{slot}}"),),
            width=6,
        ),
        Panel(
            "Messages and transactions",
            "Of the stream. Descriptions of tables come once a session, and after a change of one.",
            unit="cps",
            queries=(
                Query(f"sum by (slot) (rate(cdc_messages_total{RATE}))", "{{slot}} messages"),
                Query(
                    f"sum by (slot) (rate(cdc_transactions_total{RATE}))", "{{slot}} transactions"
                ),
                Query(
                    f"sum by (slot) (rate(cdc_relation_messages_total{RATE}))",
                    "{{slot}} descriptions of tables",
                ),
            ),
            width=6,
        ),
        Panel(
            "Sink transactions",
            "Duration of one, from writing to committing; under load a batch is what arrived "
            "while the last one was committing.",
            unit="s",
            queries=(
                Query(
                    "histogram_quantile(0.5, sum by (slot, le) "
                    f"(rate(cdc_flush_duration_seconds_bucket{RATE})))",
                    "{{slot}} median",
                ),
                Query(
                    "histogram_quantile(0.99, sum by (slot, le) "
                    f"(rate(cdc_flush_duration_seconds_bucket{RATE})))",
                    "{{slot}} p99",
                ),
            ),
            width=6,
        ),
        Panel(
            "Jobs in a sink transaction",
            "The mean. It grows with the load: that is how the sink keeps up.",
            queries=(
                Query(
                    f"sum by (slot) (rate(cdc_flush_jobs_sum{RATE})) "
                    f"/ sum by (slot) (rate(cdc_flush_jobs_count{RATE}))",
                    "{{slot}}",
                ),
            ),
            width=6,
        ),
        Panel(
            "Reading stood still",
            "Part of the time in which the reader waited for the queue database: near 100 % the "
            "queue is the bottleneck, near 0 % with growing lag the source or the sidecar is.",
            unit="percentunit",
            queries=(
                Query(f"max by (slot) (rate(cdc_backpressure_seconds_total{RATE}))", "{{slot}}"),
            ),
            width=6,
        ),
        Panel(
            "Status messages sent",
            "They tell the server what it may forget; at least one a second while leading.",
            unit="cps",
            queries=(Query(f"sum by (slot) (rate(cdc_status_messages_total{RATE}))", "{{slot}}"),),
            width=6,
        ),
    ),
)

TROUBLE: Final = Row(
    "What may be missing",
    (
        Panel(
            "Open gaps, by condition",
            "Rows of conductor.gaps that nobody has closed.",
            queries=(
                Query(
                    'max by (slot, condition) (conductor_gaps_open{condition!="none"})',
                    "{{slot}} {{condition}}",
                ),
            ),
            stacked=True,
            width=6,
        ),
        Panel(
            "Conditions met, in 5 minutes",
            "As the running sidecars count them; with the policy `stop` the process ends right "
            "after, and the gap is what remains.",
            queries=(
                Query(
                    "sum by (slot, condition) (increase(cdc_conditions_total[5m])) > 0",
                    "{{slot}} {{condition}}",
                ),
            ),
            stacked=True,
            width=6,
        ),
        Panel(
            "Dead letters",
            "New ones of 5 minutes, and those in the table (counted up to 10,001).",
            queries=(
                Query("sum by (slot) (increase(cdc_dead_letters_total[5m]))", "{{slot}} new"),
                Query("max by (slot) (conductor_dead_letters)", "{{slot}} in the table"),
            ),
            width=6,
        ),
        Panel(
            "Not told by wal2json, in 5 minutes",
            "Facts of changes that this plugin leaves out and pgoutput tells; the documentation of "
            "the plugin says what each kind means. Nothing with pgoutput.",
            queries=(
                Query(
                    "sum by (slot, kind) (increase(cdc_plugin_divergences_total[5m]))",
                    "{{slot}} {{kind}}",
                ),
            ),
            width=6,
            stacked=True,
        ),
    ),
)

ROUTER: Final = Dashboard(
    uid="pgconductor-router",
    title="pgconductor / Router",
    description="The sidecar: from the source's WAL to jobs in the queue.",
    variables=(NAMESPACE, SLOT),
    rows=(STATE, LAG, SOURCE, WORK, TROUBLE),
)
