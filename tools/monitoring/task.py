"""The page of one task: how often, how long, how it ends. Pure."""

from typing import Final

from tools.monitoring.panels import NAMESPACE, QUEUE, TASK, Dashboard, Panel, Query, Row

RATE: Final = "[$__rate_interval]"

NOW: Final = Row(
    "Now",
    (
        Panel(
            "Failed attempts",
            "Of the last quarter of an hour: failed for good, or to be tried again.",
            unit="percentunit",
            queries=(
                Query("max by (queue) (task:conductor_attempts_failed:ratio15m)", "{{queue}}"),
            ),
            kind="stat",
            width=6,
            height=5,
            steps=((None, "green"), (0.05, "yellow"), (0.25, "red")),
        ),
        Panel(
            "Attempts",
            "A second, over the last quarter of an hour.",
            unit="cps",
            queries=(Query("sum by (queue) (task:conductor_jobs_started:rate15m)", "{{queue}}"),),
            kind="stat",
            width=6,
            height=5,
        ),
        Panel(
            "Duration, median",
            "Of an attempt.",
            unit="s",
            queries=(
                Query(
                    "histogram_quantile(0.5, sum by (le) "
                    f"(rate(conductor_job_duration_seconds_bucket{RATE})))",
                    "median",
                ),
            ),
            kind="stat",
            width=6,
            height=5,
        ),
        Panel(
            "Failed for good, last day",
            "`conductor jobs list --state failed` has them, `conductor jobs retry` runs one again.",
            queries=(
                Query(
                    'sum(increase(conductor_jobs_finished_total{outcome="failed"}[1d]))', "failed"
                ),
            ),
            kind="stat",
            width=6,
            height=5,
            steps=((None, "green"), (1, "orange")),
        ),
    ),
)

COURSE: Final = Row(
    "In the course of time",
    (
        Panel(
            "Where its jobs come from",
            "Routed from changes; enqueued by schedules and events. What applications invoke is "
            "not in here.",
            unit="cps",
            queries=(
                Query(f"sum(rate(cdc_jobs_routed_total{RATE}))", "change"),
                Query(
                    f"sum by (trigger) (rate(conductor_jobs_enqueued_total{RATE}))", "{{trigger}}"
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Attempts and retries",
            "Attempts started, of which these will be tried again.",
            unit="cps",
            queries=(
                Query(f"sum(rate(conductor_jobs_started_total{RATE}))", "started"),
                Query(f"sum(rate(conductor_jobs_retried_total{RATE}))", "to be tried again"),
                Query(f"sum(rate(conductor_jobs_suspended_total{RATE}))", "in a durable wait"),
            ),
        ),
        Panel(
            "Ended, by outcome",
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
            "Duration",
            "Of an attempt.",
            unit="s",
            queries=tuple(
                Query(
                    f"histogram_quantile({quantile}, sum by (le) "
                    f"(rate(conductor_job_duration_seconds_bucket{RATE})))",
                    legend,
                )
                for quantile, legend in ((0.5, "median"), (0.9, "p90"), (0.99, "p99"))
            ),
            width=12,
        ),
        Panel(
            "Ready to started",
            "From when a job could run to when its handler started.",
            unit="s",
            queries=tuple(
                Query(
                    f"histogram_quantile({quantile}, sum by (le) "
                    f"(rate(conductor_job_wait_seconds_bucket{RATE})))",
                    legend,
                )
                for quantile, legend in ((0.5, "median"), (0.9, "p90"), (0.99, "p99"))
            ),
            width=12,
        ),
        Panel(
            "Failed attempts",
            "Part of the attempts of the last quarter of an hour.",
            unit="percentunit",
            queries=(
                Query("max by (queue) (task:conductor_attempts_failed:ratio15m)", "{{queue}}"),
            ),
            width=12,
            steps=((None, "text"), (0.25, "red")),
        ),
        Panel(
            "Handlers at work",
            "Mean number of attempts of this task that run at once.",
            queries=(
                Query(
                    f"sum by (queue) (rate(conductor_job_duration_seconds_sum{RATE}))", "{{queue}}"
                ),
            ),
            width=12,
        ),
    ),
)

TASKS: Final = Dashboard(
    uid="pgconductor-task",
    title="pgconductor / Task",
    description="One task: how often it runs, how long, how it ends.",
    variables=(NAMESPACE, QUEUE, TASK),
    rows=(NOW, COURSE),
)
