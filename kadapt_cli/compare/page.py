"""comparison.html, the page of a comparison, and its picture of accuracy against trained parameters on its own.

Self-contained: no scripts, fonts or images from elsewhere. Names come from users: the template escapes every value, and
the pictures escape theirs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kadapt_cli.compare import summary
from kadapt_cli.compare.summary import Row, columns, score_text, table
from kadapt_cli.errors import visible
from kadapt_cli.progress import duration
from kadapt_cli.report import (
    COLOURS,
    GRID,
    INK,
    LETTER,
    Point,
    count_label,
    log_ticks,
    nice_ticks,
    rule,
    svg_picture,
    svg_text,
    tick_label,
    xml_safe,
)

PICTURES = {"wide": (900, 470), "narrow": (350, 520)}  # px; the template shows one of them

Box = tuple[float, float, float, float]  # left, top, right, bottom; px


def page(rows: Sequence[Row], failures: Sequence[Row], *, m0: float, title: str, setting: Mapping[str, object]) -> str:
    """The whole of comparison.html, from the finished cells and what failed; PE counts against m0 parameters.

    `setting` says what was compared and how, in the order to show; a list is joined by commas, a dict such as versions
    becomes "torch 2.8, timm 1.0". `title` is the heading and the title of the window.
    """
    entries = table(rows, m0)
    paints, names = _paints(entries), list(entries[0]["data"]) if entries else []
    metrics = {row["data"]: row["metric"] for row in rows}
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "finalize": _finalize}
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    template = Environment(trim_blocks=True, lstrip_blocks=True, **options).from_string(source)
    return template.render(
        title=title,
        setting={name: _said(value) for name, value in setting.items()},
        entries=entries,
        columns=columns(entries),
        front=pareto_front(entries),
        pictures={size: Markup(_pareto(entries, *pixels)) for size, pixels in PICTURES.items()},
        panels=[(name, metrics[name], Markup(_bars(entries, name, paints))) for name in names],
        differences=summary.significance(rows),
        failures=sorted(failures, key=lambda failure: failure["trial"] is not None),
        notes=summary.notes(rows, m0),
        ends=summary.INTERVAL,
        **{"score": score_text, "verdict": summary.verdict, "duration": duration, "memory": summary.memory_text},
    )


def pareto_svg(rows: Sequence[Row], m0: float = 1e8) -> str:
    """Mean accuracy against trained parameters as one SVG of 720 x 460 px on white; PE, at m0, is in the tooltips."""
    return _pareto(table(rows, m0), 720, 460) + "\n"


def pareto_front(entries: Sequence[Row]) -> list[str]:
    """The methods that no other beats in accuracy without more parameters, or in parameters without less accuracy.

    Fewest parameters first. Methods without a mean are left out; of equal ones all are kept.
    """
    known = [(entry["trainable"], -entry["mean"], entry["method"]) for entry in entries if entry["mean"] is not None]
    beaten = {a for a in known for b in known if b[0] <= a[0] and b[1] <= a[1] and b[:2] != a[:2]}
    return [point[2] for point in sorted(known) if point not in beaten]


def _finalize(value: object) -> object:
    """Control characters of a name as \\x1b: HTML cannot hold them."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# Pictures


def _paints(entries: Sequence[Row]) -> dict[str, str]:
    """Fill and stroke of each method in every picture: kadaptation first, the others in the order of the table.

    A second round through the colours is drawn hollow.
    """
    names = sorted((entry["method"] for entry in entries), key=lambda name: name != "kadaptation")
    colours = [(COLOURS[i % len(COLOURS)], i // len(COLOURS) % 2) for i in range(len(names))]
    fills = (f'fill="{"#ffffff" if hollow else colour}" stroke="{colour}"' for colour, hollow in colours)
    return dict(zip(names, fills, strict=True))


@dataclass(frozen=True)
class _Plot:
    """The plot area of accuracy (%) over log10 parameters."""

    box: Box
    logs: Point
    ticks: Sequence[float]

    def x(self, count: float) -> float:
        part = (math.log10(max(count, 1)) - self.logs[0]) / (self.logs[1] - self.logs[0])
        return self.box[0] + (self.box[2] - self.box[0]) * part

    def y(self, percent: float) -> float:
        part = (percent - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.box[3] - (self.box[3] - self.box[1]) * part


@dataclass(frozen=True)
class _Dot:
    """A method's place in the plot, the ends of its error bar, and the width of its name, px."""

    x: float
    y: float
    top: float
    bottom: float
    width: float


def _pareto(entries: Sequence[Row], width: float, height: float) -> str:
    """Points with error bars on a log axis, each with its name beside it, and the Pareto front as a staircase."""
    title = "Accuracy against trained parameters"
    known = [entry for entry in entries if entry["mean"] is not None]
    words = ["grey line, bold names: Pareto front", "bars: ± standard deviation over seeds"]
    words = ["; ".join(words)] if width > 500 else words
    if len(known) < max(len(entries), 1):
        words = [*words, "methods that lack cells are not drawn"] if known else ["no method has all its cells"]
    parts = [svg_text(12, height - 10 - 14 * i, line, size=11) for i, line in enumerate(reversed(words))]
    parts.append(svg_text(12, 24, title, size=15, weight="bold"))
    if not known:
        return svg_picture(width, height, title, parts)
    plot = _plot(known, (42, 64, width - 12, height - 58 - 14 * len(words)))
    dots, front, paints = [_dot(entry, plot) for entry in known], pareto_front(known), _paints(entries)
    stairs = _stairs([dots[i] for name in front for i, entry in enumerate(known) if entry["method"] == name], plot)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in stairs)
    parts += [*_axes(plot), f'<polyline class="front" points="{line}" fill="none" stroke="#999999"/>']
    names: list[str] = []
    for entry, dot, box in zip(known, dots, _labels(dots, stairs, plot.box), strict=True):
        x, y = _nearest(dot, box)
        if math.dist((dot.x, dot.y), (x, y)) > 12:
            parts.append(rule(dot.x, dot.y, x, y, "#777777", width=0.7))
        parts.append(f"<g {paints[entry['method']]}>{_point(entry, dot)}</g>")
        weight = "bold" if entry["method"] in front else "normal"
        side = "start" if x == box[0] else "end" if x == box[2] else "middle"
        place = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[side]
        names.append(svg_text(place, box[1] + 11, xml_safe(entry["method"]), anchor=side, weight=weight))
    halo = '<g paint-order="stroke" stroke="#ffffff" stroke-width="3">'
    return svg_picture(width, height, title, [*parts, halo, *names, "</g>"])


def _plot(entries: Sequence[Row], box: Box) -> _Plot:
    logs = [math.log10(max(entry["trainable"], 1)) for entry in entries]
    middle, half = (min(logs) + max(logs)) / 2, max(1, max(logs) - min(logs) + 0.4) / 2
    ends = [100 * (entry["mean"] + sign * (entry["std"] or 0)) for entry in entries for sign in (-1, 1)]
    ticks = nice_ticks([min(100.0, max(0.0, end)) for end in ends], 0, 100)
    return _Plot(box, (middle - half, middle + half), ticks)


def _dot(entry: Row, plot: _Plot) -> _Dot:
    mean, std = 100 * entry["mean"], 100 * (entry["std"] or 0)
    ends = plot.y(min(100, mean + std)), plot.y(max(0, mean - std))
    return _Dot(plot.x(entry["trainable"]), plot.y(mean), *ends, LETTER * len(visible(entry["method"])))


def _point(entry: Row, dot: _Dot) -> str:
    tip = f"{entry['method']}: {score_text(entry)} %, {entry['trainable']:,.0f} parameters, PE {entry['pe']:.3f}"
    bar = f'<path d="M{dot.x:.1f} {dot.top:.1f}V{dot.bottom:.1f}" stroke-width="1.5"/>'
    return f'<title>{escape(xml_safe(tip))}</title>{bar}<circle cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="4.5"/>'


def _axes(plot: _Plot) -> list[str]:
    left, top, right, bottom = plot.box
    parts = [svg_text(12, top - 14, "mean accuracy (%)")]
    for value in plot.ticks:
        label = tick_label(value, plot.ticks[1] - plot.ticks[0])
        parts.append(rule(left, plot.y(value), right, plot.y(value), GRID))
        parts.append(svg_text(left - 7, plot.y(value) + 4, label, anchor="end"))
    for count in log_ticks(*plot.logs):
        parts.append(rule(plot.x(count), top, plot.x(count), bottom, GRID))
        parts.append(svg_text(plot.x(count), bottom + 18, count_label(count), anchor="middle"))
    parts.append(rule(left, bottom, right, bottom, INK))
    return [*parts, svg_text((left + right) / 2, bottom + 36, "trained parameters, with the head", anchor="middle")]


def _stairs(front: Sequence[_Dot], plot: _Plot) -> list[Point]:
    """The highest accuracy of at most so many parameters, from the first of the front to the right edge."""
    corners = [point for a, b in itertools.pairwise(front) for point in ((a.x, a.y), (b.x, a.y))]
    return [*corners, (front[-1].x, front[-1].y), (plot.box[2], front[-1].y)]


def _labels(dots: Sequence[_Dot], stairs: Sequence[Point], area: Box) -> list[Box]:
    """A box for each name: of 160 places around its dot the one nearest to it and clear of what is drawn."""
    lines = ((*map(min, a, b), *map(max, a, b)) for a, b in itertools.pairwise(stairs))
    taken = [(left - 1, top - 1, right + 1, bottom + 1) for left, top, right, bottom in lines]
    taken += [(dot.x - 6, min(dot.top, dot.y - 6), dot.x + 6, max(dot.bottom, dot.y + 6)) for dot in dots]
    labels: list[Box] = []

    def cost(dot: _Dot, gap: float, box: Box) -> float:
        hidden = sum(_overlap(part, other) for part in (box, *_leader(dot, box)) for other in taken)
        unreadable = sum(_overlap(box, other) for other in labels) + _overlap(box, box) - _overlap(box, area)
        return gap + hidden + 9 * unreadable

    for dot in dots:
        best, lowest = area, math.inf
        for gap in range(8, 158, 15):
            for box in _around(dot, gap):
                if (price := cost(dot, gap, box)) < lowest:
                    best, lowest = box, price
            if lowest <= gap:  # clear, and what is farther away costs more
                break
        labels.append(best)
        taken += [best, *_leader(dot, best)]
    return labels


def _around(dot: _Dot, gap: float) -> list[Box]:
    """Boxes for the dot's name in 16 directions."""
    half = dot.width / 2
    turns = [(math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in range(16)]
    centres = [(dot.x + (gap + half) * cos, dot.y + (gap + 7) * sin) for cos, sin in turns]
    return [(x - half, y - 7, x + half, y + 7) for x, y in centres]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _nearest(dot: _Dot, box: Box) -> Point:
    return min(max(dot.x, box[0]), box[2]), min(max(dot.y, box[1]), box[3])


def _leader(dot: _Dot, box: Box) -> list[Box]:
    """Small boxes along the line from near a dot to its name."""
    x, y = _nearest(dot, box)
    steps = [(dot.x + (x - dot.x) * i / 12, dot.y + (y - dot.y) * i / 12) for i in range(1, 12)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in steps if math.dist((x, y), (dot.x, dot.y)) > 9]


def _bars(entries: Sequence[Row], data: str, paints: Mapping[str, str]) -> str:
    """One data set: a bar a method from 0 to 100 %, with a whisker of one standard deviation over seeds."""
    left = LETTER * max(len(visible(entry["method"])) for entry in entries) + 10
    scale, bottom = (304 - left) / 100, 18.0 * len(entries) + 6
    parts = []
    for value in range(0, 101, 25):
        parts.append(rule(left + scale * value, 2, left + scale * value, bottom, GRID))
        parts.append(svg_text(left + scale * value, bottom + 15, str(value), anchor="middle", size=11))
    for i, entry in enumerate(entries):
        part, y = entry["data"][data], 18.0 * i + 12
        parts.append(svg_text(left - 6, y + 4, xml_safe(entry["method"]), anchor="end"))
        mean, std = 100 * (part["mean"] or 0), 100 * (part["std"] or 0)
        low, high = left + scale * max(0, mean - std), left + scale * min(100, mean + std)
        if part["mean"] is not None:
            size = f'width="{scale * mean:.1f}" height="11" {paints[entry["method"]]}'
            parts.append(f'<rect x="{left:.1f}" y="{y - 5.5:.1f}" {size}/>')
        if std:
            parts += [rule(low, y, high, y, INK), *(rule(x, y - 3, x, y + 3, INK) for x in (low, high))]
        parts.append(svg_text(high + 5, y + 4, f"{mean:.1f}" if part["mean"] is not None else "no result", size=11))
    return svg_picture(340, bottom + 22, f"{data}: score in % by method", parts)
