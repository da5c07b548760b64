"""The queue's page: what waits, who works, what the parts of a worker process do. Pure."""

from typing import Final

from tools.monitoring.panels import NAMESPACE, QUEUE, Dashboard, Panel, Query, Row

RATE: Final = "[$__rate_interval]"


def quantiles(metric: str, by: str) -> tuple[Query, Query]:
    """The median and the 99th percentile of a histogram, by a label."""
    series = f"sum by ({by}, le) (rate({metric}_bucket{RATE}))"
    return (
        Query(f"histogram_quantile(0.5, {series})", f"{{{{{by}}}}} median"),
        Query(f"histogram_quantile(0.99, {series})", f"{{{{{by}}}}} p99"),
    )


WAITING: Final = Row(
    "What waits",
    (
        Panel(
            "Jobs by state",
            "Counted up to 10,001: a flat line there means that many or more. Ready ones wait for "
            "a worker; scheduled ones for their time; parked ones for a job of their key; suspects "
            "run alone, because a process died with them.",
            queries=(Query("max by (queue, state) (conductor_jobs)", "{{queue}} {{state}}"),),
            stacked=True,
            width=12,
        ),
        Panel(
            "Oldest work that is due",
            "For how long a job could have run, or a schedule fired; no line while nothing waits.",
            unit="s",
            queries=(Query("max by (queue) (queue:conductor_ready_age_seconds:max)", "{{queue}}"),),
            steps=((None, "text"), (600, "red")),
            width=6,
        ),
        Panel(
            "Ready to started",
            "From when a job could run to when its handler started.",
            unit="s",
            queries=quantiles("conductor_job_wait_seconds", "queue"),
            width=6,
        ),
    ),
)

WORKING: Final = Row(
    "Who works",
    (
        Panel(
            "Workers",
            "With a lease. Each process has one for each of its queues.",
            queries=(Query("max by (queue) (conductor_workers)", "{{queue}}"),),
            width=6,
        ),
        Panel(
            "Busy slots",
            "Jobs that run, of those that may run at once.",
            unit="percentunit",
            queries=(Query("max by (queue) (queue:conductor_slots_busy:ratio)", "{{queue}}"),),
            width=6,
        ),
        Panel(
            "Slots",
            "Jobs that all workers of a queue may run at once.",
            queries=(
                Query("sum by (queue) (conductor_slots)", "{{queue}}"),
                Query("sum by (queue) (conductor_slots_busy)", "{{queue}} busy"),
            ),
            width=6,
        ),
        Panel(
            "Steps written",
            "Memoised results of steps, waits included.",
            unit="cps",
            queries=(Query(f"sum by (queue) (rate(conductor_steps_total{RATE}))", "{{queue}}"),),
            width=6,
        ),
    ),
)

FLOW: Final = Row(
    "In and out",
    (
        Panel(
            "Attempts started",
            "By queue.",
            unit="cps",
            queries=(
                Query(f"sum by (queue) (rate(conductor_jobs_started_total{RATE}))", "{{queue}}"),
            ),
            stacked=True,
        ),
        Panel(
            "Jobs ended, by outcome",
            "For good.",
            unit="cps",
            queries=(
                Query(
                    f"sum by (outcome) (rate(conductor_jobs_finished_total{RATE}))", "{{outcome}}"
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Retried and suspended",
            "Failed attempts that will be tried again, and runs that ended in a durable wait.",
            unit="cps",
            queries=(
                Query(
                    f"sum by (queue) (rate(conductor_jobs_retried_total{RATE}))",
                    "{{queue}} retried",
                ),
                Query(
                    f"sum by (queue) (rate(conductor_jobs_suspended_total{RATE}))",
                    "{{queue}} suspended",
                ),
            ),
        ),
        Panel(
            "Enqueued by schedules and events",
            "What applications and the router enqueue is not in here.",
            unit="cps",
            queries=(
                Query(
                    f"sum by (trigger) (rate(conductor_jobs_enqueued_total{RATE}))", "{{trigger}}"
                ),
            ),
        ),
        Panel(
            "Events",
            "Emitted events matched against subscriptions, those nobody wanted, those that could "
            "not be read, and those that a subscription missed: it cannot be read itself.",
            unit="cps",
            queries=(
                Query(f"sum(rate(conductor_events_dispatched_total{RATE}))", "dispatched"),
                Query(f"sum(rate(conductor_events_unmatched_total{RATE}))", "unmatched"),
                Query(f"sum(rate(conductor_events_refused_total{RATE}))", "refused"),
                Query(f"sum(rate(conductor_events_undelivered_total{RATE}))", "undelivered"),
            ),
        ),
        Panel(
            "Claim and settle",
            "Duration of one statement, 99th percentile. Growing together: the database is slow, "
            "or an old snapshot keeps dead rows.",
            unit="s",
            queries=(
                Query(
                    "histogram_quantile(0.99, sum by (queue, le) "
                    f"(rate(conductor_claim_duration_seconds_bucket{RATE})))",
                    "{{queue}} claim",
                ),
                Query(
                    "histogram_quantile(0.99, sum by (queue, le) "
                    f"(rate(conductor_settle_duration_seconds_bucket{RATE})))",
                    "{{queue}} settle",
                ),
            ),
        ),
    ),
)

PARTS: Final = Row(
    "Deaths, connections, upkeep",
    (
        Panel(
            "Halted lanes",
            "Keys of ordered tasks that stand still since a job has failed.",
            queries=(Query("max by (queue) (conductor_lanes_halted)", "{{queue}}"),),
            width=8,
            steps=((None, "text"), (1, "red")),
        ),
        Panel(
            "Jobs taken from the dead, in 5 minutes",
            "Those that run again, and those that failed for good "
            "because each process that ran them died.",
            queries=(
                Query("sum(increase(conductor_jobs_rescued_total[5m]))", "rescued"),
                Query("sum(increase(conductor_jobs_crashed_total[5m]))", "failed for good"),
            ),
            width=8,
        ),
        Panel(
            "Declared dead alive, in 5 minutes",
            "Leases lost, and outcomes refused because the claim was no longer that worker's.",
            queries=(
                Query(
                    "sum by (queue) (increase(conductor_leases_lost_total[5m]))",
                    "{{queue}} leases lost",
                ),
                Query(
                    "sum by (queue) (increase(conductor_jobs_fenced_total[5m]))",
                    "{{queue}} outcomes refused",
                ),
            ),
            width=8,
        ),
        Panel(
            "Lost connections, in 5 minutes",
            "Each part of a process goes on by itself.",
            queries=(
                Query("sum by (part) (increase(conductor_reconnects_total[5m]))", "{{part}}"),
            ),
            width=8,
            stacked=True,
        ),
        Panel(
            "Failed passes, in 5 minutes",
            "For another reason than the connection: the log has the traceback.",
            queries=(Query("sum by (part) (increase(conductor_failures_total[5m]))", "{{part}}"),),
            width=8,
            stacked=True,
        ),
        Panel(
            "Since the last look for due schedules",
            "A second at most while a process lives.",
            unit="s",
            queries=(
                Query("time() - max(conductor_cron_last_tick_timestamp_seconds > 0)", "last tick"),
            ),
            width=8,
        ),
        Panel(
            "Missed schedules, in 5 minutes",
            "No process was there to fire them.",
            queries=(Query("sum(increase(conductor_cron_missed_total[5m]))", "missed"),),
            width=8,
        ),
        Panel(
            "Since the last maintenance",
            "Every minute or so, by one process at a time.",
            unit="s",
            queries=(
                Query(
                    "time() - max(conductor_maintenance_last_run_timestamp_seconds > 0)",
                    "maintenance",
                ),
                Query(
                    "time() - max(conductor_gauges_read_timestamp_seconds > 0)",
                    "gauges of the queue",
                ),
            ),
            width=8,
        ),
        Panel(
            "Oldest snapshot",
            "Its age in transactions: dead rows younger than it cannot be removed.",
            queries=(Query("max(conductor_oldest_xmin_age_transactions)", "oldest xmin"),),
            width=8,
            steps=((None, "text"), (2e6, "red")),
        ),
    ),
)

QUEUES: Final = Dashboard(
    uid="pgconductor-queue",
    title="pgconductor / Queue",
    description="Queues and workers: what waits, who works, how fast.",
    variables=(NAMESPACE, QUEUE),
    rows=(WAITING, WORKING, FLOW, PARTS),
)
