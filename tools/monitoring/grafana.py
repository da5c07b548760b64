"""A described dashboard as the JSON that Grafana loads. Pure.

Panels are placed from left to right and wrapped at the grid's width. Ids count up, so that the same
description gives the same file.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final

from tools.monitoring.panels import WIDTH, Dashboard, Panel, Query, Row, Variable, filtered

SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
TAG: Final = "pgconductor"
SCHEMA_VERSION: Final = 39
Json = dict[str, Any]


def render(dashboard: Dashboard) -> Json:
    """Return the dashboard's JSON model."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "timezone": "",
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "time": {"from": dashboard.span, "to": "now"},
        "links": [_link_to_others()],
        "annotations": {"list": [_firing_alerts()]},
        "templating": {"list": [_data_source(), *map(_variable, dashboard.variables)]},
        "panels": list(_panels(dashboard)),
    }


def _panels(dashboard: Dashboard) -> Iterator[Json]:
    ids = count(1)
    top = 0
    for row in dashboard.rows:
        yield _row(row, next(ids), top)
        top += 1
        left = height = 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left, height = top + height, 0, 0
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield _panel(panel, next(ids), place, dashboard.variables)
            left, height = left + panel.width, max(height, panel.height)
        top += height


def _row(row: Row, number: int, top: int) -> Json:
    return {
        "id": number,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
        "panels": [],
    }


def _panel(panel: Panel, number: int, place: Json, variables: Sequence[Variable]) -> Json:
    common = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
    }
    if panel.kind == "text":
        return {**common, "options": {"mode": "markdown", "content": panel.text}}
    return {
        **common,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [
            _target(query, letter, panel, variables)
            for query, letter in zip(panel.queries, "ABCDEFGH", strict=False)
        ],
        "transformations": _columns(panel) if panel.columns else [],
    }


def _target(query: Query, letter: str, panel: Panel, variables: Sequence[Variable]) -> Json:
    instant = query.instant or panel.kind == "table"
    return {
        "refId": letter,
        "datasource": SOURCE,
        "expr": filtered(query.expr, variables),
        "legendFormat": query.legend or "__auto",
        "instant": instant,
        "range": not instant,
        "format": "table" if panel.kind == "table" else "time_series",
    }


def _field(panel: Panel) -> Json:
    steps = [{"value": value, "color": colour} for value, colour in panel.steps]
    field: Json = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [_value_names(panel.names)] if panel.names else [],
    }
    if panel.kind == "timeseries":
        field["custom"] = _lines(panel)
    return field


def _lines(panel: Panel) -> Json:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if len(panel.steps) > 1 else "off"},
    }


def _value_names(names: dict[int, str]) -> Json:
    return {
        "type": "value",
        "options": {str(v): {"text": text, "index": v} for v, text in names.items()},
    }


def _columns(panel: Panel) -> list[Json]:
    """Show the named labels of a table, in that order, under these headings."""
    order = {label: place for place, label in enumerate(panel.columns)}
    return [
        {
            "id": "filterFieldsByName",
            "options": {"include": {"names": list(panel.columns)}},
        },
        {
            "id": "organize",
            "options": {
                "excludeByName": {},
                "indexByName": order,
                "renameByName": panel.columns,
            },
        },
    ]


_OPTIONS: Final[dict[str, Json]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "background",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
}


def _data_source() -> Json:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "refresh": 1,
        "regex": "",
        "multi": False,
        "includeAll": False,
        "current": {},
        "options": [],
    }


def _variable(variable: Variable) -> Json:
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"qryType": 1, "query": variable.query, "refId": f"variable-{variable.name}"},
        "refresh": 2,
        "sort": 1,
        "regex": "",
        "hide": 0,
        "multi": variable.multiple,
        "includeAll": variable.multiple,
        # Also what has no such label: outside Kubernetes nothing has a namespace.
        **({"allValue": ".*", "current": _EVERYTHING} if variable.multiple else {"current": {}}),
        "options": [],
    }


_EVERYTHING: Final = {"selected": True, "text": ["All"], "value": ["$__all"]}


def _link_to_others() -> Json:
    return {
        "title": "pgconductor",
        "type": "dashboards",
        "tags": [TAG],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    }


def _firing_alerts() -> Json:
    return {
        "name": "Alerts that page",
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "datasource": SOURCE,
        "expr": 'ALERTS{alertname=~"(Cdc|Conductor).*",alertstate="firing",severity="critical"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{slot}} {{queue}} {{task}}",
        "step": "30s",
    }
