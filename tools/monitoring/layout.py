"""`python -m tools.monitoring.layout FOLDER`: draw the dashboards' panels, as they will be placed.

Made from the JSON that Grafana loads, not from the descriptions, so that a look at the picture is a
look at the file: places, sizes, titles, units, legends, thresholds. No data.
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

PROJECT: Final = Path(__file__).resolve().parents[2]
COLUMN_PX, LINE_PX, GAP_PX, TOP_PX = 60, 30, 6, 70
COLOURS: Final = {
    "green": "#73bf69",
    "yellow": "#fade2a",
    "orange": "#ff9830",
    "red": "#f2495c",
    "blue": "#5794f2",
    "text": "#9fa7b3",
}
BACKGROUND, PANEL, EDGE, BRIGHT, DIM = "#111217", "#181b1f", "#2c3235", "#e8e8e8", "#9fa7b3"
CHARACTER_PX: Final = 6.6


def draw(dashboard: dict[str, Any]) -> Image.Image:
    """Return the picture of one dashboard."""
    panels = dashboard["panels"]
    bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    image = Image.new("RGB", (24 * COLUMN_PX, TOP_PX + bottom * LINE_PX), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((12, 8), dashboard["title"], BRIGHT, ImageFont.load_default(20))
    choices = "   ".join(f"{v['label']} v" for v in dashboard["templating"]["list"])
    pen.text((12, 40), choices, DIM, ImageFont.load_default(13))
    for panel in panels:
        _draw_panel(pen, panel)
    return image


def _draw_panel(pen: ImageDraw.ImageDraw, panel: dict[str, Any]) -> None:
    place = panel["gridPos"]
    left, top = place["x"] * COLUMN_PX, TOP_PX + place["y"] * LINE_PX
    right, bottom = left + place["w"] * COLUMN_PX, top + place["h"] * LINE_PX
    if panel["type"] == "row":
        pen.text((left + 8, top + 6), f"> {panel['title']}", BRIGHT, ImageFont.load_default(15))
        return
    inner = (left + GAP_PX // 2, top + GAP_PX // 2, right - GAP_PX // 2, bottom - GAP_PX // 2)
    pen.rectangle(inner, PANEL, EDGE)
    pen.text((left + 10, top + 8), panel["title"], BRIGHT, ImageFont.load_default(13))
    width = int((right - left - 20) / CHARACTER_PX)
    lines = _content(panel, width)
    for number, (text, colour) in enumerate(lines):
        y = top + 30 + number * 15
        if y + 15 < bottom:
            pen.text((left + 10, y), text, colour, ImageFont.load_default(11))
    for place_of, step in enumerate(_steps(panel)):
        x = left + 10 + place_of * 60
        pen.rectangle((x, bottom - 14, x + 8, bottom - 6), COLOURS[step["color"]])
        pen.text((x + 12, bottom - 17), _number(step["value"]), DIM, ImageFont.load_default(11))


def _content(panel: dict[str, Any], width: int) -> list[tuple[str, str]]:
    """The lines inside a panel: what it is, what it means, what it shows."""
    if panel["type"] == "text":
        source = panel["options"]["content"].splitlines()
        return [(part, DIM) for line in source for part in textwrap.wrap(line, width) or [""]]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    lines = [(f"{panel['type']}, {unit}", COLOURS["blue"])]
    lines += [(line, DIM) for line in textwrap.wrap(panel["description"], width)]
    lines += [(f"- {_legend(target)}"[:width], COLOURS["green"]) for target in panel["targets"]]
    return lines


def _legend(target: dict[str, Any]) -> str:
    legend: str = target["legendFormat"]
    return target["expr"][:60] if legend == "__auto" else legend


def _steps(panel: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = (
        panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", [])
    )
    return steps if len(steps) > 1 else []


def _number(value: float | None) -> str:
    return "else" if value is None else f"{value:g}"


def main() -> None:
    """Draw every dashboard into the folder given."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((PROJECT / "grafana" / "dashboards").glob("*.json")):
        target = folder / f"{path.stem}.png"
        draw(json.loads(path.read_text())).save(target)
        print(target)


if __name__ == "__main__":
    main()
