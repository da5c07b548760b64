"""docs/metrics.md, from the tables of the two packages. Pure."""

from collections.abc import Iterable

from tools.monitoring.catalog import Described, sidecar_metrics, worker_metrics

HEADER = """# Metrics

This page is made from the tables in `cdc/metrics.py` and `conductor/metrics.py` by
`python -m tools.monitoring`; do not edit it.

`GET /metrics` of each process serves its own metrics, beside `/livez` and `/readyz`. Units are base
units and named in the metric. A label never holds an id, a key or an LSN. What has happened is a
timestamp, not an age: subtract it from `time()`. A label whose values are known beforehand has them
behind it, and a counter or gauge of such labels starts at 0. `task` and `queue` are those that are
registered, and start at 0 as well, in the process that has them. A histogram `x` is stored as
`x_bucket`, `x_sum` and `x_count`.

There is no metric of a backfill, because there is no backfill: the router captures changes from a
subscription's beginning on, and reads no rows that were there before.
"""
SIDECAR = """
## The sidecar: `cdc run`

Port `CDC_METRICS_PORT` (9465 by default). Every series has the label `slot`, so that several
sidecars can share a scrape job. Positions and lag are those of the leader; a standby has
`cdc_leader` 0 and stands still in everything else.
"""
WORKER = """
## The worker: `conductor worker`

Port `CONDUCTOR_METRICS_PORT`, or `metrics_port` of the orchestrator.
"""
WHOLE_QUEUE = """
### Of the whole queue

These describe the queue, not a process. Whoever exports them finds the same in the database, so
aggregate them with `max`, never with `sum`.
"""
ROW = "| `{name}` | {kind} | {unit} | {labels} | {help} |"
COLUMNS = "\n| metric | type | unit | labels | meaning |\n| --- | --- | --- | --- | --- |\n"


def render() -> str:
    """Return the page."""
    workers = list(worker_metrics())
    return "".join(
        (
            HEADER,
            SIDECAR,
            _table(sidecar_metrics()),
            WORKER,
            _table(metric for metric in workers if not metric.whole_queue),
            WHOLE_QUEUE,
            _table(metric for metric in workers if metric.whole_queue),
        )
    )


def _table(metrics: Iterable[Described]) -> str:
    return COLUMNS + "".join(f"{_row(metric)}\n" for metric in metrics)


def _row(metric: Described) -> str:
    return ROW.format(
        name=metric.name,
        kind=metric.kind,
        unit=metric.unit,
        labels=", ".join(_label(metric, label) for label in metric.labels) or "none",
        help=metric.help,
    )


def _label(metric: Described, label: str) -> str:
    if not metric.values or label != metric.valued:
        return f"`{label}`"
    return f"`{label}` ({', '.join(metric.values)})"
