"""The first page: is it keeping up, is it losing anything, what do I do. Pure."""

from typing import Final

from tools.monitoring.panels import NAMESPACE, QUEUE, SLOT, Dashboard, Panel, Query, Row

WHAT_TO_DO: Final = """
1. An alert on the left? Open its page in `deploy/runbooks`: meaning, impact, diagnosis, mitigation.
2. A red or orange field above? Its description names the dashboard to open.
3. At the terminal: `cdc status` and `cdc check` for the router, `conductor top` and
   `conductor jobs list` for the queue. None of them changes anything.
4. Something else? The logs are JSON, one event a line; the events `condition` and `session_ended`
   say why the router stood still.
"""

KEEPING_UP: Final = Row(
    "Is it keeping up?",
    (
        Panel(
            "A leader for each slot",
            "One sidecar leads a slot, others stand by. Red: nobody routes its changes. "
            "Router dashboard.",
            queries=(Query("max by (slot) (cdc_leader)", "{{slot}}"),),
            kind="stat",
            height=5,
            width=4,
            steps=((None, "red"), (1, "green")),
            names={0: "no leader", 1: "leading"},
        ),
        Panel(
            "Lag of the router",
            "Age of the newest message that has come through to the queue: measured every ten "
            "seconds on the whole way. Router dashboard.",
            unit="s",
            queries=(Query("max by (slot) (slot:cdc_heartbeat_age_seconds:min)", "{{slot}}"),),
            kind="stat",
            height=5,
            width=5,
            steps=((None, "green"), (60, "orange"), (120, "red")),
        ),
        Panel(
            "Oldest work that waits",
            "For how long a queue's oldest job or schedule has been due. Empty: nothing waits. "
            "Queue dashboard.",
            unit="s",
            queries=(Query("max by (queue) (queue:conductor_ready_age_seconds:max)", "{{queue}}"),),
            kind="stat",
            height=5,
            width=5,
            steps=((None, "green"), (60, "orange"), (600, "red")),
        ),
        Panel(
            "Workers",
            "Workers with a lease, by queue. Zero is right only where an autoscaler has nothing to "
            "do. Queue dashboard.",
            queries=(Query("max by (queue) (conductor_workers)", "{{queue}}"),),
            kind="stat",
            height=5,
            width=5,
            steps=((None, "orange"), (1, "green")),
        ),
        Panel(
            "Busy slots",
            "Part of the workers' slots in use. At 100 % jobs wait for one: add workers or slots.",
            unit="percentunit",
            queries=(Query("max by (queue) (queue:conductor_slots_busy:ratio)", "{{queue}}"),),
            kind="stat",
            height=5,
            width=5,
            steps=((None, "green"), (0.8, "yellow"), (0.95, "orange")),
        ),
    ),
)

LOSING: Final = Row(
    "Is it losing anything?",
    (
        Panel(
            "Open gaps",
            "Conditions that may mean loss and that nobody has closed; table conductor.gaps has "
            "the positions. Router dashboard.",
            queries=(
                Query("sum by (slot) (max by (slot, condition) (conductor_gaps_open))", "{{slot}}"),
            ),
            kind="stat",
            height=5,
            width=4,
            steps=((None, "green"), (1, "red")),
        ),
        Panel(
            "Dead letters",
            "Changes set aside because they could not be decoded, mapped or stored, and not yet "
            "taken away; table conductor.dead_letters has them whole.",
            queries=(Query("max by (slot) (conductor_dead_letters)", "{{slot}}"),),
            kind="stat",
            height=5,
            width=4,
            steps=((None, "green"), (1, "orange")),
        ),
        Panel(
            "Time to slot loss",
            "Until the source gives the slot up, if nothing were acknowledged from now on and as "
            "much WAL written as in the last five minutes. Infinite without a limit.",
            unit="s",
            queries=(Query("min by (slot) (slot:cdc_slot_time_to_loss_seconds:min)", "{{slot}}"),),
            kind="stat",
            height=5,
            width=6,
            steps=((None, "red"), (3600, "orange"), (14400, "green")),
        ),
        Panel(
            "Jobs that failed for good, last hour",
            "They have used their attempts, or their handler said that trying again is no use. "
            "Task dashboard.",
            queries=(
                Query(
                    "sum by (queue) "
                    '(increase(conductor_jobs_finished_total{outcome="failed"}[1h]))',
                    "{{queue}}",
                ),
            ),
            kind="stat",
            height=5,
            width=5,
            steps=((None, "green"), (1, "orange")),
        ),
        Panel(
            "Missed instants of schedules, last hour",
            "No process was there to fire them; of each schedule only the latest was fired.",
            queries=(Query("sum(increase(conductor_cron_missed_total[1h]))", "missed"),),
            kind="stat",
            height=5,
            width=5,
            steps=((None, "green"), (1, "orange")),
        ),
    ),
)

DO: Final = Row(
    "What do I do?",
    (
        Panel(
            "Alerts",
            "What fires or is about to. Each has a page in deploy/runbooks: CdcNoLeader in "
            "cdc-no-leader.md.",
            queries=(
                Query(
                    'ALERTS{alertname=~"(Cdc|Conductor).*"}',
                    instant=True,
                ),
            ),
            kind="table",
            width=14,
            height=8,
            columns={
                "alertname": "Alert",
                "severity": "Severity",
                "alertstate": "State",
                "slot": "Slot",
                "queue": "Queue",
                "task": "Task",
                "condition": "Condition",
                "part": "Part",
                "instance": "Instance",
                "namespace": "Namespace",
            },
        ),
        Panel("Next steps", "Where to look.", kind="text", width=10, height=8, text=WHAT_TO_DO),
    ),
)

FLOW: Final = Row(
    "Flow",
    (
        Panel(
            "In: changes, by operation",
            "Row changes decoded from the WAL.",
            unit="cps",
            queries=(
                Query(
                    "sum by (operation) (rate(cdc_changes_total[$__rate_interval]))",
                    "{{operation}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Through: jobs",
            "Jobs that the router has committed, that workers have started, that ended for good.",
            unit="cps",
            queries=(
                Query("sum(rate(cdc_jobs_routed_total[$__rate_interval]))", "routed"),
                Query("sum(rate(conductor_jobs_started_total[$__rate_interval]))", "started"),
                Query("sum(rate(conductor_jobs_finished_total[$__rate_interval]))", "ended"),
            ),
        ),
        Panel(
            "Waiting: ready jobs",
            "Counted up to 10,001: a flat line there means that many or more.",
            queries=(Query('max by (queue) (conductor_jobs{state="ready"})', "{{queue}}"),),
        ),
        Panel(
            "Commit to job, 99th percentile",
            "From a source transaction's commit to that of its jobs, by two hosts' clocks.",
            unit="s",
            queries=(
                Query("max by (slot) (slot:cdc_commit_to_enqueue_seconds:p99_5m)", "{{slot}}"),
            ),
            steps=((None, "text"), (1, "red")),
        ),
        Panel(
            "Ready to started, 99th percentile",
            "From when a job could run to when its handler started.",
            unit="s",
            queries=(
                Query("max by (queue) (queue:conductor_job_wait_seconds:p99_5m)", "{{queue}}"),
            ),
        ),
        Panel(
            "Processes",
            "What runs: sidecars by version; applications by version and by release of this.",
            queries=(
                Query("count by (slot, version) (cdc_build_info)", "cdc {{version}}, {{slot}}"),
                Query(
                    "count by (app, version, release) (conductor_build_info)",
                    "{{app}} {{version}} (conductor {{release}})",
                ),
            ),
        ),
    ),
)

OVERVIEW: Final = Dashboard(
    uid="pgconductor-overview",
    title="pgconductor / Overview",
    description="Is it keeping up, is it losing anything, what do I do?",
    variables=(NAMESPACE, SLOT, QUEUE),
    rows=(KEEPING_UP, LOSING, DO, FLOW),
)
