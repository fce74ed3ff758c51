"""A picture of the Grafana dashboard without a Grafana: its panels and queries, answered by a Prometheus, as one SVG.

    python -m bench.panels --prometheus http://127.0.0.1:9090 --minutes 10 --until 30 --out docs/dashboard.svg

What is drawn is what Prometheus answers to the dashboard's own queries; a panel without an answer says so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

BOARD = Path(__file__).parent.parent / "observability" / "grafana" / "dashboards" / "triptych.json"
_COLUMN, _ROW, _GAP = 50, 27, 6  # pixels
_COLOURS = (
    "#73bf69",
    "#f2cc0c",
    "#5794f2",
    "#ff780a",
    "#f2495c",
    "#b877d9",
    "#8ab8ff",
    "#c0d8ff",
    "#96d98d",
    "#ffb357",
)
_STEP_S = 5

Series = tuple[str, list[tuple[float, float]]]


def main() -> None:
    options = _parser().parse_args()
    end = options.end or time.time()
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in board["panels"] if panel["gridPos"]["y"] < options.until]
    span = (end - options.minutes * 60, end)
    parts = [_panel(panel, _answers(options.prometheus, panel, span, options.rate), span) for panel in panels]
    options.out.write_text(_picture(panels, parts), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Draws the dashboard from what a Prometheus answers.")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--end", type=float, default=0.0, help="unix seconds; now if not given")
    parser.add_argument("--rate", default="30s", help="what $__rate_interval stands for")
    parser.add_argument("--until", type=int, default=1000, help="leave out the panels below this line of the grid")
    parser.add_argument("--out", type=Path, default=Path("dashboard.svg"))
    return parser


def _answers(prometheus: str, panel: Mapping[str, Any], span: tuple[float, float], rate: str) -> list[Series]:
    found: list[Series] = []
    for target in panel.get("targets", ()):
        query = target["expr"].replace("$pipeline", ".*").replace("$__rate_interval", rate)
        asked = urllib.parse.urlencode({"query": query, "start": span[0], "end": span[1], "step": _STEP_S})
        with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{asked}", timeout=30) as response:
            for series in json.load(response)["data"]["result"]:
                points = [(float(at), float(value)) for at, value in series["values"]]
                found.append((_legend(target["legendFormat"], series["metric"]), points))
    return found


def _legend(text: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value)
    return re.sub(r"{{\w+}}", "", text).strip()  # a label that is empty is none


def _picture(panels: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> str:
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * _ROW + _GAP
    width = 24 * _COLUMN + _GAP
    font = "font-family:Inter,Helvetica,Arial,sans-serif"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{font}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#111217"/>', *parts, "</svg>"]) + "\n"


def _panel(panel: Mapping[str, Any], series: Sequence[Series], span: tuple[float, float]) -> str:
    grid = panel["gridPos"]
    x, y = grid["x"] * _COLUMN + _GAP, grid["y"] * _ROW + _GAP
    width, height = grid["w"] * _COLUMN - _GAP, grid["h"] * _ROW - _GAP
    if panel["type"] == "row":
        return _text(x, y + 15, panel["title"], size=14, bold=True)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    drawn = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="#181b1f" stroke="#2c2f36"/>',
        _text(x + 8, y + 16, panel["title"], size=12, bold=True),
    ]
    shown = [(name, [point for point in points if math.isfinite(point[1])]) for name, points in series]
    shown = [(name, points) for name, points in shown if points]
    if not shown:
        drawn.append(_text(x + width / 2, y + height / 2 + 8, "no data", size=12, fill="#6e7178", anchor="middle"))
    elif panel["type"] == "stat":
        value = shown[0][1][-1][1]
        colour = _threshold(panel["fieldConfig"]["defaults"]["thresholds"]["steps"], value)
        text = _value(value, unit)
        drawn.append(_text(x + width / 2, y + height - 22, text, size=24, fill=colour, anchor="middle", bold=True))
    else:
        stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
        drawn.append(_graph((x + 52, y + 26, width - 62, height - 62), shown, span, unit, stacked=stacked))
        drawn.append(_legends(x + 10, y + height - 20, width - 20, shown, unit))
    return "\n".join(drawn)


def _graph(
    box: tuple[float, float, float, float],
    series: Sequence[Series],
    span: tuple[float, float],
    unit: str,
    *,
    stacked: bool,
) -> str:
    x, y, width, height = box
    lines, below = [], dict[float, float]()
    for name, points in series:
        if stacked:
            points = [(at, value + below.get(at, 0.0)) for at, value in points]
            below.update(points)
        lines.append((name, points))
    top = _nice(max(value for _, points in lines for _, value in points))

    def place(point: tuple[float, float]) -> str:
        across = (point[0] - span[0]) / (span[1] - span[0])
        return f"{x + across * width:.1f},{y + height - point[1] / top * height:.1f}"

    drawn = []
    for part in (0.0, 0.5, 1.0):
        at = y + height - part * height
        drawn.append(f'<line x1="{x}" y1="{at:.1f}" x2="{x + width}" y2="{at:.1f}" stroke="#2c2f36"/>')
        drawn.append(_text(x - 6, at + 4, _value(part * top, unit), size=10, fill="#8e9198", anchor="end"))
    for at in (span[0], (span[0] + span[1]) / 2, span[1]):
        left = f"{x + (at - span[0]) / (span[1] - span[0]) * width:.1f}"
        clock = time.strftime("%H:%M", time.gmtime(at))
        drawn.append(_text(float(left), y + height + 13, clock, size=10, fill="#8e9198", anchor="middle"))
    for number in reversed(range(len(lines))):  # what is stacked lies behind what it stands on
        points, colour = lines[number][1], _COLOURS[number % len(_COLOURS)]
        for run in _runs(points):
            path = " ".join(place(point) for point in run)
            if stacked:
                foot = f"{place((run[-1][0], 0))} {place((run[0][0], 0))}"
                drawn.append(f'<polygon points="{path} {foot}" fill="{colour}"/>')
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
    return "\n".join(drawn)


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Where nothing was measured there is no line."""
    runs: list[list[tuple[float, float]]] = []
    for point in points:
        if runs and point[0] - runs[-1][-1][0] <= 2 * _STEP_S:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _legends(x: float, y: float, width: float, series: Sequence[Series], unit: str) -> str:
    names = [f"{name}  {_value(points[-1][1], unit)}" for name, points in series]
    drawn, left = [], x
    for number, text in enumerate(names):
        wide = 5.4 * len(text) + 22
        if left + wide > x + width + 10:
            drawn.append(_text(left, y + 9, f"+{len(names) - number}", size=10, fill="#8e9198"))
            break
        drawn.append(
            f'<rect x="{left:.0f}" y="{y + 2}" width="10" height="4" fill="{_COLOURS[number % len(_COLOURS)]}"/>'
        )
        drawn.append(_text(left + 14, y + 9, text, size=10, fill="#ccccdc"))
        left += wide
    return "\n".join(drawn)


def _text(
    x: float, y: float, text: str, *, size: int, fill: str = "#ccccdc", anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{fill}"{weight}>{escape(text)}</text>'


def _threshold(steps: Sequence[Mapping[str, Any]], value: float) -> str:
    name = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
    return {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2"}[name]


def _nice(top: float) -> float:
    """The next round number above."""
    if top <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(top))
    return float(next(step * power for step in (1, 1.5, 2, 3, 5, 7.5, 10) if step * power >= top * 0.999))


def _value(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit in ("s", "µs"):
        seconds = value if unit == "s" else value / 1e6
        scale, name = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 or not seconds else (1e6, "µs")
        return f"{seconds * scale:.3g} {name}"
    ending = {"reqps": " req/s", "ops": " /s"}.get(unit, "")
    return (f"{value / 1000:.3g}k" if value >= 10_000 else f"{value:.3g}") + ending


if __name__ == "__main__":
    main()
