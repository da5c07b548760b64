"""What operators look at: the page of metrics and the dashboards, made from descriptions.

`python -m tools.monitoring` writes docs/metrics.md and grafana/dashboards/*.json; with `--check` it
only says whether they are current. `python -m tools.monitoring.layout` draws the dashboards'
panels as images.
"""
