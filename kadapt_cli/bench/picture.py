"""The result as one SVG: ratio to frozen against M, and the roofline of a GPU whose peaks are known."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from typing import Any

from kadapt_cli.bench.timing import Row
from kadapt_cli.errors import visible

Point = tuple[float, float]
Range = tuple[float, float]

TITLE = "Time of an adapted layer relative to the frozen layer"
INK, GRID = "#333333", "#dddddd"
# Okabe and Ito's colours, apart for every kind of colour vision; where two share one, the dashes differ.
STYLES: dict[str, tuple[str, str, float]] = {
    "frozen": (INK, "6 3", 1.5),
    "frozen-own-gemm": (INK, "2 3", 1.5),
    "fused": ("#D55E00", "none", 3),
    "kadapt": ("#0072B2", "none", 3),
    "merge-lowrank": ("#009E73", "none", 1.5),
    "merge-dense": ("#009E73", "6 3", 1.5),
    "compiled-eager": ("#CC79A7", "none", 1.5),
    "reference-einsum": ("#E69F00", "none", 1.5),
    "lycoris-bypass": ("#E69F00", "6 3", 1.5),
    "peft-lora": ("#56B4E9", "none", 1.5),
    "peft-lokr": ("#56B4E9", "6 3", 1.5),
    "full": ("#999999", "none", 1.5),
}
# Dense peaks in TFLOP/s by dtype and memory in TB/s, from the makers' data sheets.
PEAKS: dict[str, tuple[dict[str, float], float]] = {
    "H200": ({"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}, 4.8),
    "H100 80GB HBM3": ({"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}, 3.35),
    "A100-SXM4-80GB": ({"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}, 2.04),
}
WIDTH, HEIGHT, GAP, MARGIN, LEGEND = 250, 190, 72, 60, 158
RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100, 200)
DECADES = [b * 10.0**e for e in range(-2, 5) for b in (1, 2, 5)]


def picture(device: str, rows: Sequence[Row]) -> str:
    """The layer rows as an SVG document: a row of panels for each dtype and width, one panel for each mode.

    Where the GPU's peaks are known a roofline follows: the frozen layer's FLOPs over the time, against FLOPs a byte.
    """
    rows = [row for row in rows if row.mode != "step" and row.ratio_frozen]
    groups = list(dict.fromkeys((row.dtype, row.d) for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    peaks, memory = next((known for name, known in PEAKS.items() if name in device), ({}, 0.0))
    width = MARGIN + max(len(modes) + bool(peaks), 2) * (WIDTH + GAP)
    height = 118 + len(groups) * (HEIGHT + 86)
    svg = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", role="img")
    svg.attrib |= {"width": str(width), "height": str(height), "font-family": "Helvetica, Arial, sans-serif"}
    _add(svg, "title", TITLE)
    _add(svg, "rect", width=width, height=height, fill="#ffffff")
    _words(svg, 16, 26, TITLE, font_size=15, font_weight="bold")
    _words(svg, 16, 44, f"packed qkv, {visible(device)}; median over rounds")
    _legend(svg, [name for name in STYLES if any(row.contender == name for row in rows)], (width - MARGIN) // LEGEND)
    for i, (dtype, d) in enumerate(groups):
        bottom = 146 + i * (HEIGHT + 86) + HEIGHT
        for j, mode in enumerate(modes):
            mine = [row for row in rows if (row.dtype, row.d, row.mode) == (dtype, d, mode)]
            if mine:
                _ratios(_group(svg, j, bottom), mine)
            if mine and mode == "fwd" and dtype in peaks:
                _roofline(_group(svg, len(modes), bottom), mine, peaks[dtype], memory)
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _legend(svg: ET.Element, names: Sequence[str], columns: int) -> None:
    for i, name in enumerate(names):
        x, y = MARGIN + i % columns * LEGEND, 64 + i // columns * 20
        _curve(svg, name, [(x, y), (x + 15, y), (x + 30, y)], "legend")
        _words(svg, x + 36, y + 4, name)


def _group(svg: ET.Element, column: int, bottom: float) -> ET.Element:
    """A group whose origin is a panel's lower left corner."""
    return _add(svg, "g", transform=f"translate({MARGIN + column * (WIDTH + GAP)} {bottom})")


def _ratios(panel: ET.Element, rows: Sequence[Row]) -> None:
    """Ratio to frozen against M, a line for each contender."""
    lines = _lines(rows, lambda row: (row.M, row.ratio_frozen or 1.0))
    ms, ratios = ([point[i] for line in lines.values() for point in line] for i in (0, 1))
    x_range, y_range = (min(ms) / 1.3, max(ms) * 1.3), (min(0.9, *ratios) / 1.08, max(2.0, *ratios) * 1.08)
    _axes(panel, x_range, y_range, ms, RATIOS)
    _heading(panel, f"{rows[0].mode}, d = {rows[0].d}, {rows[0].dtype}", "M, rows of x")
    _curves(panel, lines, x_range, y_range)


def _roofline(panel: ET.Element, rows: Sequence[Row], peak: float, memory: float) -> None:
    """Achieved TFLOP/s against FLOPs a byte of the frozen layer, under what the GPU can do (TFLOP/s, TB/s)."""
    lines = _lines(rows, lambda row: (1e3 * (row.tflops or 1.0) / (row.gb_per_s or 1.0), row.tflops or 1.0))
    xs, ys = ([point[i] for line in lines.values() for point in line] for i in (0, 1))
    ridge = peak / memory
    x_range, y_range = (min(*xs, ridge) / 1.5, max(*xs, ridge) * 1.5), (min(ys) / 1.5, peak * 1.5)
    _axes(panel, x_range, y_range, DECADES, DECADES)
    _heading(panel, f"TFLOP/s, fwd, d = {rows[0].d}, {rows[0].dtype}", "FLOPs a byte (ideal)")
    start = max(x_range[0], y_range[0] / memory)
    roof = [(start, start * memory), (ridge, peak), (x_range[1], peak)]
    _polyline(panel, [_at(x, y, x_range, y_range) for x, y in roof], stroke=INK)
    _curves(panel, lines, x_range, y_range)


def _lines(rows: Sequence[Row], point: Callable[[Row], Point]) -> dict[str, list[Point]]:
    """The points of each contender from left to right; the first contenders come last, so that they are on top."""
    lines = {name: sorted(point(row) for row in rows if row.contender == name) for name in reversed(STYLES)}
    return {name: line for name, line in lines.items() if line}


def _at(x: float, y: float, x_range: Range, y_range: Range) -> Point:
    """The place in px of a point on logarithmic axes."""
    share = [math.log(value / low) / math.log(high / low) for value, (low, high) in ((x, x_range), (y, y_range))]
    return WIDTH * share[0], -HEIGHT * share[1]


def _axes(panel: ET.Element, x_range: Range, y_range: Range, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Grid lines with their numbers; a number too near to the one before it is left out."""
    before = -math.inf
    for value in sorted(set(xs)):
        x, _ = _at(value, y_range[0], x_range, y_range)
        if not 0 <= x <= WIDTH:
            continue
        _polyline(panel, [(x, -HEIGHT), (x, 0)], stroke=GRID)
        if x - before >= 40:
            _words(panel, x, 16, f"{value:,.6g}", text_anchor="middle")
            before = x
    before = math.inf
    for value in ys:
        _, y = _at(x_range[0], value, x_range, y_range)
        if -HEIGHT <= y <= 0 and before - y >= 13:
            _polyline(panel, [(0, y), (WIDTH, y)], stroke=GRID)
            _words(panel, -6, y + 4, f"{value:g}", text_anchor="end")
            before = y


def _heading(panel: ET.Element, title: str, x_name: str) -> None:
    _words(panel, 0, -HEIGHT - 10, title, font_weight="bold")
    _words(panel, WIDTH / 2, 34, x_name, text_anchor="middle")


def _curves(panel: ET.Element, lines: dict[str, list[Point]], x_range: Range, y_range: Range) -> None:
    for name, line in lines.items():
        _curve(panel, name, [_at(x, y, x_range, y_range) for x, y in line], name)


def _curve(parent: ET.Element, name: str, places: Sequence[Point], css: str) -> None:
    """A contender's line with a dot at each place, or at the middle one in the legend."""
    colour, dashes, width = STYLES[name]
    _polyline(parent, places, stroke=colour, stroke_width=width, stroke_dasharray=dashes, class_=css)
    for x, y in places[1:2] if css == "legend" else places:
        _add(parent, "circle", cx=x, cy=y, r=3, fill=colour)


def _polyline(parent: ET.Element, places: Sequence[Point], **style: Any) -> None:
    _add(parent, "polyline", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in places), fill="none", **style)


def _words(parent: ET.Element, x: float, y: float, text: str, **style: Any) -> None:
    _add(parent, "text", text, x=x, y=y, **{"font_size": 12, "fill": INK} | style)


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: Any) -> ET.Element:
    """A new element; font_size names font-size, class_ class."""
    given = {
        name.rstrip("_").replace("_", "-"): f"{value:.2f}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    element = ET.SubElement(parent, tag, given)
    element.text = text
    return element
