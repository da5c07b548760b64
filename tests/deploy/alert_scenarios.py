"""For every alert: series on which it must fire and, later, be over.

Series are in promtool's notation, a value a minute: `1x3` is four ones, `0+60x3` counts up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scenario:
    """One course of events.

    Args:
        alert: what must fire.
        series: what Prometheus has scraped.
        quiet: a minute at which it must not fire yet.
        fires: a minute at which it must.
        over: a minute at which it must not fire any more.
        labels: of the alert, beside its name and severity.
    """

    alert: str
    series: Mapping[str, str]
    quiet: int
    fires: int
    over: int
    labels: Mapping[str, str] = field(default_factory=dict)


SLOT = {"slot": "orders"}
QUEUE = {"queue": "mail"}
COUNTED_ONCE = "0x2 3x90"
FIRST_SEEN = "_x4 3x90"
"""What a process counted before it was first scraped."""

SCENARIOS = (
    Scenario("CdcNoLeader", {'cdc_leader{slot="orders"}': "1x3 0x20 1x5"}, 3, 8, 28, SLOT),
    Scenario(  # the process is gone, and another one comes
        "CdcNoLeader",
        {
            'cdc_leader{slot="orders",instance="a"}': "1x3 stale",
            'cdc_leader{slot="orders",instance="b"}': "_x11 1x5",
        },
        *(3, 8, 14),
        SLOT,
    ),
    Scenario(  # gone for longer than Prometheus is asked about, while others read the gauges
        "CdcNoLeader",
        {
            'cdc_leader{slot="orders",instance="a"}': "1x3 stale",
            'cdc_leader{slot="orders",instance="b"}': "_x599 1x20",
            'conductor_gaps_open{slot="orders",condition="none"}': "0x620",
        },
        *(3, 500, 610),
        SLOT,
    ),
    Scenario(  # the same with nobody to read them
        "CdcNoLeader",
        {
            'cdc_leader{slot="orders",instance="a"}': "1x3 stale",
            'cdc_leader{slot="orders",instance="b"}': "_x599 1x20",
            'up{job="cdc",instance="a"}': "1x3 0x595 1x20",
        },
        *(3, 500, 610),
    ),
    Scenario(  # it has never led, and cannot even be scraped
        "CdcNoLeader", {'up{job="cdc",instance="a"}': "0x10 1x5"}, 0, 5, 13
    ),
    Scenario(
        "CdcBehind",
        {'cdc_heartbeat_timestamp_seconds{slot="orders"}': "1+60x5 301x8 840+60x10"},
        *(7, 12, 16),
        SLOT,
    ),
    Scenario(
        "CdcStalled",
        {'cdc_heartbeat_timestamp_seconds{slot="orders"}': "1+60x2 121x30 2040+60x5"},
        *(19, 26, 36),
        SLOT,
    ),
    Scenario(  # it leads, and nothing has ever come through
        "CdcStalled",
        {
            'cdc_leader{slot="orders"}': "1x20",
            'cdc_heartbeat_timestamp_seconds{slot="orders"}': "0x9 600+60x10",
        },
        *(3, 8, 12),
        SLOT,
    ),
    Scenario(
        "CdcWalNearLimit",
        {
            'cdc_slot_safe_wal_bytes{slot="orders"}': "100x3 10x10 100x5",
            'cdc_slot_retained_wal_bytes{slot="orders"}': "0x3 90x10 0x5",
        },
        *(3, 8, 17),
        SLOT,
    ),
    Scenario(
        "CdcWalGrowing",
        {
            'cdc_position_bytes{slot="orders",stage="server"}': "0+60000000x60",
            'cdc_slot_safe_wal_bytes{slot="orders"}': "10000000000x60",
            'cdc_slot_retained_wal_bytes{slot="orders"}': "0+60000000x30 0x30",
        },
        *(8, 16, 36),
        SLOT,
    ),
    Scenario(
        "CdcWalRetained",
        {'cdc_slot_retained_wal_bytes{slot="orders"}': "20000000000x20 5x5"},
        *(12, 18, 23),
        SLOT,
    ),
    Scenario(
        "CdcSlotLost",
        {'conductor_gaps_open{slot="orders",condition="slot_lost"}': "0x1 1x3 0x3"},
        *(1, 4, 7),
        SLOT,
    ),
    Scenario(
        "CdcSlotLost",
        {'cdc_slot_wal_status{slot="orders",status="lost"}': "0x1 1x3 0x3"},
        *(1, 4, 7),
        SLOT,
    ),
    Scenario(
        "CdcGap",
        {
            'conductor_gaps_open{slot="orders",condition="none"}': "0x20",
            'conductor_gaps_open{slot="orders",condition="publication_drift"}': "0x1 1x3 0x3",
        },
        *(1, 4, 7),
        {**SLOT, "condition": "publication_drift"},
    ),
    Scenario(  # recreated at once: the gap is closed, the loss stays
        "CdcSlotLost",
        {'cdc_conditions_total{slot="orders",condition="slot_missing"}': "0x3 1x90"},
        *(2, 8, 80),
        SLOT,
    ),
    Scenario(
        "CdcSlotLost",
        {'cdc_conditions_total{slot="orders",condition="slot_lost"}': FIRST_SEEN},
        *(3, 8, 80),
        SLOT,
    ),
    Scenario(  # met again and again: an hour after the last time it is over
        "CdcGap",
        {'cdc_conditions_total{slot="orders",condition="table_missing"}': "0x3 1x40 2x90"},
        *(2, 90, 120),
        {**SLOT, "condition": "table_missing"},
    ),
    Scenario(
        "CdcGap",
        {'cdc_conditions_total{slot="orders",condition="table_missing"}': FIRST_SEEN},
        *(3, 8, 80),
        {**SLOT, "condition": "table_missing"},
    ),
    Scenario(
        "CdcDeadLetters",
        {'conductor_dead_letters{slot="orders"}': "0x2 3x5 0x5"},
        *(2, 5, 11),
        SLOT,
    ),
    Scenario(
        "CdcDeadLetters", {'cdc_dead_letters_total{slot="orders"}': COUNTED_ONCE}, 2, 5, 80, SLOT
    ),
    Scenario(
        "CdcDeadLetters", {'cdc_dead_letters_total{slot="orders"}': FIRST_SEEN}, 3, 8, 80, SLOT
    ),
    Scenario(
        "CdcFlapping",
        {'cdc_reconnects_total{slot="orders",cause="source"}': "0+1x15 15x30"},
        *(3, 12, 40),
        SLOT,
    ),
    Scenario(  # two sidecars that take the slot from each other
        "CdcFlapping",
        {
            'cdc_leader{slot="orders",instance="a"}': "0 1 0 1 0 1 0 1 0x20",
            'cdc_leader{slot="orders",instance="b"}': "1 0 1 0 1 0 1 0 1x20",
        },
        *(2, 8, 26),
        SLOT,
    ),
    Scenario(
        "CdcSubscriptionsWaiting",
        {'cdc_subscriptions{slot="orders",state="pending"}': "2x15 0x5"},
        *(8, 13, 18),
        {**SLOT, "state": "pending"},
    ),
    Scenario(
        "CdcTargetDown",
        {'up{job="cdc",instance="a"}': "1x2 0x8 1x5"},
        *(4, 8, 13),
        {"job": "cdc", "instance": "a"},
    ),
    Scenario(
        "ConductorQueueStale",
        {'conductor_oldest_ready_timestamp_seconds{queue="mail"}': "1x25 0x5"},
        *(14, 20, 28),
        QUEUE,
    ),
    Scenario(
        "ConductorLaneHalted",
        {'conductor_lanes_halted{queue="mail"}': "0x3 2x10 0x5"},
        6,
        11,
        16,
        QUEUE,
    ),
    Scenario(
        "ConductorNoWorkers",
        {
            'conductor_workers{queue="mail"}': "0x8 1x5",
            'conductor_oldest_ready_timestamp_seconds{queue="mail"}': "1x8 0x5",
        },
        *(1, 5, 11),
        QUEUE,
    ),
    Scenario(  # no router to read the gauges: nobody knows what is due
        "ConductorNoWorkers",
        {
            'up{job="conductor",instance="a"}': "1x2 0x10 1x5",
            "conductor_gauges_read_timestamp_seconds": "1x2 stale",
        },
        *(4, 9, 15),
    ),
    Scenario(  # an autoscaler starts a worker in time
        "ConductorNoWorkers",
        {
            'conductor_workers{queue="mail"}': "0x12 1x7 0x30",
            'conductor_oldest_ready_timestamp_seconds{queue="mail"}': "0x9 600x2 0x13 1560x10 0x20",
        },
        *(15, 33, 40),
        QUEUE,
    ),
    Scenario(
        "ConductorFailureRatio",
        {
            'conductor_jobs_started_total{queue="mail",task="send"}': "0+10x45",
            'conductor_jobs_retried_total{queue="mail",task="send"}': "0+4x20 80x25",
            'conductor_jobs_finished_total{queue="mail",task="send",outcome="failed"}': (
                "0+1x20 20x25"
            ),
        },
        *(3, 14, 40),
        {**QUEUE, "task": "send"},
    ),
    Scenario(
        "ConductorCronStalled",
        {"conductor_cron_last_tick_timestamp_seconds": "1+60x3 181x9 840+60x5"},
        *(5, 9, 15),
    ),
    Scenario("ConductorCronMissed", {"conductor_cron_missed_total": COUNTED_ONCE}, 2, 5, 80),
    Scenario(  # fired by a new process, in its first second
        "ConductorCronMissed",
        {
            'conductor_cron_missed_total{instance="old"}': "0x1 stale",
            'conductor_cron_missed_total{instance="new"}': FIRST_SEEN,
        },
        *(3, 8, 80),
    ),
    Scenario(  # the same process after a long absence, with what it has counted since
        "ConductorCronMissed",
        {"conductor_cron_missed_total": f"1x1 {'_ ' * 80}9x130"},
        *(20, 125, 150),
    ),
    Scenario(
        "ConductorMaintenanceStalled",
        {"conductor_maintenance_last_run_timestamp_seconds": "1+60x2 121x24 1680+60x5"},
        *(20, 25, 30),
    ),
    Scenario(
        "ConductorLeasesLost",
        {'conductor_leases_lost_total{queue="mail"}': COUNTED_ONCE},
        *(2, 5, 50),
        QUEUE,
    ),
    Scenario(
        "ConductorLeasesLost",
        {'conductor_leases_lost_total{queue="mail"}': FIRST_SEEN},
        *(3, 8, 50),
        QUEUE,
    ),
    Scenario("ConductorJobsRescued", {"conductor_jobs_rescued_total": COUNTED_ONCE}, 2, 5, 50),
    Scenario("ConductorJobsRescued", {"conductor_jobs_rescued_total": FIRST_SEEN}, 3, 8, 50),
    Scenario(  # the third process that died with it
        "ConductorJobsRescued",
        {'conductor_jobs_crashed_total{queue="mail",task="send"}': COUNTED_ONCE},
        *(2, 5, 50),
    ),
    Scenario(  # of a task that whoever found it does not have
        "ConductorJobsRescued",
        {'conductor_jobs_crashed_total{queue="mail",task="send"}': FIRST_SEEN},
        *(3, 8, 50),
    ),
    Scenario(
        "ConductorFlapping",
        {'conductor_reconnects_total{part="leases"}': "0+2x15 30x30"},
        *(3, 12, 40),
        {"part": "leases"},
    ),
    Scenario(
        "ConductorPartFails",
        {'conductor_failures_total{part="scheduler"}': "0+1x15 15x30"},
        *(2, 12, 40),
        {"part": "scheduler"},
    ),
    Scenario(
        "ConductorOldSnapshot",
        {"conductor_oldest_xmin_age_transactions": "3000000x20 5x5"},
        *(12, 18, 23),
    ),
    Scenario("ConductorEventsRefused", {"conductor_events_refused_total": COUNTED_ONCE}, 2, 5, 80),
    Scenario("ConductorEventsRefused", {"conductor_events_refused_total": FIRST_SEEN}, 3, 8, 80),
    Scenario(
        "ConductorEventsUndelivered", {"conductor_events_undelivered_total": FIRST_SEEN}, 3, 8, 80
    ),
    Scenario(
        "ConductorEventsUndelivered",
        {"conductor_events_undelivered_total": COUNTED_ONCE},
        *(2, 5, 80),
    ),
    Scenario(  # whoever had the duty gave it up, and nobody took it
        "ConductorGaugesStale",
        {"conductor_gauges_read_timestamp_seconds": f"1+60x3 {'NaN ' * 10}840+60x8"},
        *(7, 11, 17),
    ),
    Scenario(  # the process that had it hangs
        "ConductorGaugesStale",
        {"conductor_gauges_read_timestamp_seconds": "1+60x3 181x9 840+60x8"},
        *(7, 11, 17),
    ),
    Scenario(
        "ConductorTargetDown",
        {'up{job="conductor",instance="a"}': "1x2 0x8 1x5"},
        *(4, 8, 13),
        {"job": "conductor", "instance": "a"},
    ),
    Scenario(
        "ConductorNotScraped",
        {'up{job="cdc"}': "1x25", 'up{job="conductor"}': "_x13 1x10"},
        *(8, 12, 17),
        {"job": "conductor"},
    ),
    Scenario(  # an autoscaler has taken the last worker away; later they run and are not found
        "ConductorNotScraped",
        {
            'up{job="cdc"}': "1x70",
            'up{job="conductor"}': "1x3 stale",
            'conductor_workers{queue="mail"}': "1x3 0x25 1x20 0x20",
        },
        *(25, 43, 55),
        {"job": "conductor"},
    ),
)
