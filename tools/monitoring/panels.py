"""The words in which dashboards are described, and how a query gets its filters. Pure.

A query is written without the filters that every panel of its dashboard has. `filtered` adds them:
each metric gets a matcher for `namespace` and for every variable of the dashboard that is a label
of the metric, so no panel can forget one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from tools.monitoring.catalog import all_metrics

Kind = Literal["timeseries", "stat", "table", "text"]
Colour = Literal["green", "yellow", "orange", "red", "blue", "text"]
WIDTH: Final = 24  # columns of Grafana's grid

_RECORDED: Final = re.compile(
    r"\b(?P<name>(?P<level>slot|queue|task):\w+:\w+)(?P<braces>\{[^}]*\})?"
)
_EXPORTED: Final = re.compile(r"(?<![:\w])(?P<name>(?:cdc|conductor)_\w+)(?P<braces>\{[^}]*\})?")
_LEVELS: Final = {"slot": ("slot",), "queue": ("queue",), "task": ("queue", "task")}


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the name of its series; `{{label}}` is replaced by Grafana."""

    expr: str
    legend: str = ""
    instant: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: what is shown.
        description: what it means and when to worry.
        unit: Grafana's name of the unit.
        queries: at least one, except for a text.
        kind: a stat shows the last value, coloured by `steps`.
        width, height: in grid units; a row is 24 wide.
        steps: (from which value on, colour); the first has no value.
        stacked: series add up.
        names: of values, for a stat: {1: "leading"}.
        text: Markdown, of a text.
        columns: of a table: {label: heading}; what is not named is hidden.
        hidden_zero: the axis need not begin at 0.
    """

    title: str
    description: str
    unit: str = "short"
    queries: Sequence[Query] = ()
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 7
    steps: Sequence[tuple[float | None, Colour]] = ((None, "text"),)
    stacked: bool = False
    names: dict[int, str] = field(default_factory=dict)
    text: str = ""
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A heading with the panels below it, laid out from left to right."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label."""

    name: str
    label: str
    query: str
    multiple: bool = True


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    description: str
    variables: Sequence[Variable]
    rows: Sequence[Row]
    span: str = "now-1h"


NAMESPACE: Final = Variable(
    "namespace",
    "Namespace",
    'label_values({__name__=~"cdc_build_info|conductor_build_info"}, namespace)',
)
SLOT: Final = Variable("slot", "Slot", "label_values(cdc_build_info, slot)")
QUEUE: Final = Variable("queue", "Queue", "label_values(conductor_slots, queue)")
TASK: Final = Variable(
    "task", "Task", "label_values(conductor_jobs_started_total, task)", multiple=False
)


def filtered(expr: str, variables: Sequence[Variable]) -> str:
    """Return the expression with the dashboard's filters on every metric of ours.

    >>> filtered("sum by (slot) (cdc_leader)", [NAMESPACE, SLOT])
    'sum by (slot) (cdc_leader{namespace=~"$namespace",slot=~"$slot"})'
    """
    names = {variable.name for variable in variables}
    labels_of = {series: m.labels for m in all_metrics().values() for series in m.series}

    def restrict(match: re.Match[str]) -> str:
        level = match.groupdict().get("level")
        labels = _LEVELS[level] if level else labels_of[match["name"]]
        wanted = [label for label in ("namespace", *labels) if label in names]
        own = (match["braces"] or "{}")[1:-1]
        matchers = [*([own] if own else []), *(f'{label}=~"${label}"' for label in wanted)]
        return f"{match['name']}{{{','.join(matchers)}}}"

    return _EXPORTED.sub(restrict, _RECORDED.sub(restrict, expr))
