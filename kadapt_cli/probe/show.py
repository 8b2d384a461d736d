"""How a probe is shown: the table of the terminal, probe.csv, probe.svg, and what is seen while it runs.

All of it is read off the document that probe.json holds. Names come from models and folders: they are data, never read
as markup, formula or XML. A score at some d is the mean over the probe's seeds; a d that not every seed tried, as the
bisection leaves behind, is left out of curves and lines, because a mean over fewer seeds is another number.
"""

import csv
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from xml.sax.saxutils import escape

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kadapt_cli.errors import harmless, visible
from kadapt_cli.report import (
    COLOURS,
    GRID,
    INK,
    LETTER,
    Point,
    count_label,
    log_ticks,
    new_table,
    nice_ticks,
    plain,
    rule,
    svg_picture,
    svg_text,
    tick_label,
    xml_safe,
)

if TYPE_CHECKING:
    from rich.live import Live

CSV_COLUMNS = ["module", "group", "block", "D", "d", "seed", "lr", "score"]
BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "0123456789"  # levels of a sparkline; the second where the console is ASCII

Row = Mapping[str, Any]


# probe.csv


def trials_csv(document: Row) -> str:
    """A row for each trial: of each module, then full fine-tuning and the head alone, which are no module's.

    d is "direct" for direct training; block is empty for all blocks at once.

    A name that a spreadsheet would run as a formula gets one ' in front, as in `report.confusion_csv`.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for module in document["modules"]:
        for trial in module["trials"]:
            row = {**module, **trial, "module": module["name"]}
            writer.writerow([harmless(row[column]) for column in CSV_COLUMNS])
    for trial in document["baseline"]["trials"]:
        writer.writerow([harmless({**trial, "module": trial["name"]}.get(column)) for column in CSV_COLUMNS])
    return text.getvalue()


# What both the terminal and the picture say


def _curve(module: Row, seeds: Sequence[int]) -> dict[int, float]:
    """Mean scores by d, in order of d, of the d that every seed tried."""
    scores = {(trial["d"], trial["seed"]): trial["score"] for trial in module["trials"]}
    tried = sorted({d for d, _ in scores if d != "direct"})
    return {d: fmean(scores[d, s] for s in seeds) for d in tried if all((d, s) in scores for s in seeds)}


def measure(threshold: float) -> str:
    """What the dimension is called: d90 at a threshold of 0.9."""
    return f"d{100 * threshold:g}"


def _measure(document: Row) -> str:
    return measure(document["threshold"])


def _notes(document: Row) -> tuple[str, str]:
    """What the dimension is, and what the scores are."""
    whole = {"zero": "the score of training the weights directly"}
    whole["head"] = "what training the weights directly gains over the head alone"
    share = f"{100 * document['threshold']:g}%"
    folds, seeds = document["folds"], document["seeds"]
    how = f"{folds}-fold cross-validation on" if folds > 1 else "validation on"
    over = f", mean over {len(seeds)} seeds" if len(seeds) > 1 else ""
    return (
        f"{_measure(document)}: the smallest d that reaches {share} of {whole[document['above']]}",
        f"scores: {document['metric']} in %, {how} {document['images']:,} images{over}",
    )


def _baselines(document: Row) -> list[tuple[str, float]]:
    """What the scores are held against, and these in %."""
    names = {"full": "full fine-tuning", "head": "head alone", "chance": "chance"}
    return [(name, 100 * document["baseline"][key]) for key, name in names.items()]


def _number(value: float) -> str:
    """A whole number, or two digits where it is below 10."""
    return f"{value:.2g}" if value < 9.95 else f"{value:,.0f}"


# The terminal


def table(document: Row) -> RenderableType:
    """The modules with their dimension and curve, why some have none, baselines and selection; for any width.

    Columns that do not fit are left out, the less important ones first; numbers are never wrapped. The curve is a
    character for each d, from chance to the best score of the document. A console whose encoding is not a UTF gets
    ASCII only, the curve as digits 0 to 9.
    """
    return _Report(document)


class _Column(NamedTuple):
    header: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"


Columns = Mapping[str, Sequence[_Column]]  # by what is kept or left out together, the most important first


@dataclass(frozen=True)
class _Report:
    """Decides on columns and characters when it is printed, because only then the console is known."""

    document: Row

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        modules, measure = self.document["modules"], _measure(self.document)
        share, ascii_only = f"{measure}/D %", options.ascii_only
        keys = ("d90", "d90_low", "d90_high", "d90_full", "D")
        dims = {key: _dims(modules, key, ascii_only) for key in keys}
        shares = [{"share": None if m["d90"] is None else 100 * m["d90"] / m["D"]} for m in modules]
        columns: Columns = {
            measure: [_Column(measure, dims["d90"])],
            "direct": [_Column("direct", [f"{100 * m['direct']:.1f}" for m in modules])],
            "curve": [_Column("curve", [_sparkline(c, ascii_only) for c in _levels(self.document)], "left")],
            "D": [_Column("D", dims["D"])],
            share: [_Column(share, _dims(shares, "share", ascii_only))],
            "ends": [_Column("low", dims["d90_low"]), _Column("high", dims["d90_high"])],
            "full": [_Column("full", dims["d90_full"])],
        }
        names = [module["name"] for module in modules]
        kept = _fitting(console, options, names, columns)
        order = ("D", measure, "ends", "full", share, "direct", "curve")
        yield _table(names, columns, [key for key in order if key in kept])
        meant = {
            "ends": "low, high: the d tried around it",
            "full": "full: the same for the score of full fine-tuning",
        }
        meant |= {"curve": "curve: scores by d, from chance to the best"}
        for line in [*self._lines(), "; ".join(words for key, words in meant.items() if key in kept)]:
            if line:
                yield Text(visible(line), style="dim")
        chosen = ", ".join(self.document["selected"]) or "nothing"
        yield Text(visible(f"selected: {chosen}"))

    def _lines(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for module in self.document["modules"]:
            if module["reason"]:
                reasons.setdefault(module["reason"], []).append(module["name"])
        baselines = ", ".join(f"{name} {percent:.1f}%" for name, percent in _baselines(self.document))
        told = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return [*told, baselines, *reversed(_notes(self.document))]


def _dims(rows: Sequence[Row], key: str, ascii_only: bool) -> list[str]:
    """A number of each row, a dash where it is not known."""
    return [("-" if ascii_only else "–") if row[key] is None else _number(row[key]) for row in rows]


def _levels(document: Row) -> list[list[float]]:
    """Each module's curve as parts of the way from chance to the best score of the document, in [0, 1]."""
    curves = [_curve(module, document["seeds"]) for module in document["modules"]]
    best = max([score for curve in curves for score in curve.values()] + [m["direct"] for m in document["modules"]])
    low, high = document["baseline"]["chance"], max(best, document["baseline"]["full"], document["baseline"]["head"])
    span = high - low if high > low else 1.0
    return [[min(1.0, max(0.0, (score - low) / span)) for score in curve.values()] for curve in curves]


def _sparkline(levels: Sequence[float], ascii_only: bool) -> str:
    marks = DIGITS if ascii_only else BLOCKS
    return "".join(marks[round(level * (len(marks) - 1))] for level in levels)


def _fitting(console: Console, options: ConsoleOptions, names: Sequence[str], columns: Columns) -> list[str]:
    """Which columns fit beside the names, the first in any case; those that come first have the choice."""
    kept: list[str] = []
    for key in columns:
        wide = Measurement.get(console, options.update(width=10_000), _table(names, columns, [*kept, key])).maximum
        if not kept or wide <= options.max_width:
            kept.append(key)
    return kept


def _table(names: Sequence[str], columns: Columns, keys: Sequence[str]) -> Table:
    shown, chosen = new_table("submodule"), [column for key in keys for column in columns[key]]
    for column in chosen:
        shown.add_column(column.header, justify=column.justify, no_wrap=True)
    for name, *cells in zip(names, *(column.cells for column in chosen), strict=True):
        shown.add_row(plain(name), *cells)
    return shown


# While it runs


class Board:
    """What is known so far, redrawn in place below the lines that are printed; on a terminal only, gone at the end.

    A context manager around the probing; `show` outside of it, when quiet or where there is no terminal does nothing.
    """

    def __init__(self, console: Console, quiet: bool, measure: str) -> None:
        self.console = console
        self.measure = measure
        self.seen = console.is_terminal and not quiet
        self._live: Live | None = None

    def __enter__(self) -> "Board":
        if self.seen:
            from rich.live import Live

            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, rows: Sequence[Row], current: str) -> None:
        """Draw what is known of the modules, the last ones where the terminal is too low for all, and what runs now.

        A row has name, D, direct (in [0, 1]), d90, d90_low and d90_high, None for what is not known.
        """
        if self._live is not None:
            self._live.update(Group(_Known(rows, self.measure), plain(current)), refresh=True)


@dataclass(frozen=True)
class _Known:
    rows: Sequence[Row]
    measure: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = self.rows[-max(1, console.height - 6) :]  # the header and the current line take their room
        dims = {key: _dims(rows, key, options.ascii_only) for key in ("D", "d90", "d90_low", "d90_high")}
        directs = ["" if row["direct"] is None else f"{100 * row['direct']:.1f}" for row in rows]
        columns: Columns = {
            "d90": [_Column(self.measure, dims["d90"])],
            "direct": [_Column("direct", directs)],
            "ends": [_Column("low", dims["d90_low"]), _Column("high", dims["d90_high"])],
            "D": [_Column("D", dims["D"])],
        }
        names = [row["name"] for row in rows]
        kept = _fitting(console, options, names, columns)
        if rows:
            yield _table(names, columns, [key for key in ("D", "d90", "ends", "direct") if key in kept])


# probe.svg

LEFT, RIGHT = 52.0, 420.0  # of the plot of scores; px, as all below
LABELS = RIGHT + 12  # where the names of the baselines start
MAP = 590.0  # where the map starts
MAP_WIDTH = 400.0  # at least
CELL, ALONE, HEIGHT = 31.0, 90.0, 30.0  # width of a cell of the map, of the cell of all blocks, and their height
TOP = 76.0  # of the legend and the map
PLOT_HEIGHT = 310.0
CROWD = 24  # modules; the lines of more are drawn fainter
MAX_NAME = 16  # characters of a group's name
# Light to dark, so that it reads in grey and for every kind of colour vision.
SHADES = ((232, 241, 250), (158, 202, 225), (66, 146, 198), (8, 69, 148), (6, 36, 84))


def picture(document: Row) -> str:
    """probe.svg, self-contained: scores against d to the left, the dimension of each block and group to the right.

    A module is a thin line in the colour of its group from the head alone at d = 0, and a hollow dot at its D for
    direct training; a group of several has the mean of its lines as a thick one. Dashed: the baselines. The map frames
    what is selected. Exact numbers are in the tooltips.
    """
    modules = document["modules"]
    paints = {group: _paint(i) for i, group in enumerate(dict.fromkeys(m["group"] for m in modules))}
    title = f"Local intrinsic dimension: {document['model']} on {Path(document['data']).name or document['data']}"
    legend, top = _legend(paints, modules)
    plot = _plot(document, top)
    heat, width, bottom = _map(document, paints)
    shown = Text(xml_safe(title))
    shown.truncate(int((width - 32) / 9), overflow="ellipsis")
    parts = [
        f"<title>{escape(xml_safe(title))}</title>",
        svg_text(16, 26, shown.plain, size=15, weight="bold"),
        *legend,
        *_axes(plot, document["metric"]),
        *_references(document, plot),
        *_lines(document, plot, paints),
        *heat,
    ]
    return svg_picture(width, max(plot.bottom + 52, bottom), title, parts) + "\n"


@dataclass(frozen=True)
class _Plot:
    """The plot area of scores (%) over log(1 + d), from d = 0 to the most."""

    top: float
    most: float
    ticks: Sequence[float]

    @property
    def bottom(self) -> float:
        return self.top + PLOT_HEIGHT

    def x(self, d: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log1p(d) / math.log1p(self.most)

    def y(self, percent: float) -> float:
        part = (percent - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.bottom - PLOT_HEIGHT * part


def _plot(document: Row, top: float) -> _Plot:
    modules = document["modules"]
    curves = [_curve(module, document["seeds"]) for module in modules]
    scores = [100 * score for curve in curves for score in curve.values()]
    scores += [100 * module["direct"] for module in modules] + [percent for _, percent in _baselines(document)]
    return _Plot(top, max(module["D"] for module in modules), nice_ticks(scores, 0, 100))


def _paint(i: int) -> str:
    """The stroke of a group; a second round through the colours is dashed."""
    dashes = "none" if i // len(COLOURS) % 2 == 0 else "7 3"
    return f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-dasharray="{dashes}"'


def _short(name: str) -> str:
    name = xml_safe(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _legend(paints: Mapping[str, str], modules: Sequence[Row]) -> tuple[list[str], float]:
    """A line and a name for each group, in as many rows as it takes, and where the plot below can start."""
    x, y, parts = LEFT, TOP, []
    for group, paint in paints.items():
        wide = 34 + LETTER * len(_short(group)) + 12
        if x > LEFT and x + wide > MAP - 40:
            x, y = LEFT, y + 18
        parts.append(f'<path d="M{x:.1f} {y - 4:.1f}h26" {paint} stroke-width="3"/>')
        parts.append(svg_text(x + 32, y, _short(group)))
        x += wide
    words = "thick: mean over blocks; " if len(modules) > len(paints) else ""
    parts.append(svg_text(LEFT, y + 18, f"{words}hollow dots: trained directly, at their D", size=11))
    return parts, y + 34


def _axes(plot: _Plot, metric: str) -> list[str]:
    parts = [svg_text(LEFT - 36, 54, f"Score ({xml_safe(metric)}, %) against d", weight="bold")]
    for value in plot.ticks:
        parts.append(rule(LEFT, plot.y(value), RIGHT, plot.y(value), GRID))
        label = tick_label(value, plot.ticks[1] - plot.ticks[0])
        parts.append(svg_text(LEFT - 7, plot.y(value) + 4, label, anchor="end"))
    for d in [0, *log_ticks(0.1, math.log10(max(plot.most, 2)))]:
        parts.append(rule(plot.x(d), plot.top, plot.x(d), plot.bottom, GRID))
        parts.append(svg_text(plot.x(d), plot.bottom + 18, count_label(d) if d else "0", anchor="middle"))
    parts.append(rule(LEFT, plot.bottom, RIGHT, plot.bottom, INK))
    words = "d, spaced as log(1 + d); 0: the head alone"
    return [*parts, svg_text((LEFT + RIGHT) / 2, plot.bottom + 38, words, anchor="middle")]


def _references(document: Row, plot: _Plot) -> list[str]:
    """Dashed lines at the baselines, their names beside the plot, at least a line's height apart."""
    known = sorted(_baselines(document), key=lambda entry: -entry[1])
    heights = _apart([plot.y(percent) for _, percent in known], 15, plot.top, plot.bottom)
    parts = []
    for (name, percent), at in zip(known, heights, strict=True):
        y = plot.y(percent)
        parts.append(rule(LEFT, y, RIGHT, y, INK, dashes="5 4", width=1.2))
        parts.append(rule(RIGHT, y, LABELS - 3, at, INK, width=0.7))
        parts.append(svg_text(LABELS, at + 4, f"{name} {percent:.1f} %", size=11))
    return parts


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Increasing places moved so that they are at least a gap apart, the last not beyond `high`."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, low, moved[-1] + gap if moved else low))
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], high - gap * (len(moved) - 1 - i))
    return moved


def _lines(document: Row, plot: _Plot, paints: Mapping[str, str]) -> list[str]:
    """A line for each module, then a thick one for each group over all of them."""
    head = {0: document["baseline"]["head"]}
    thin, halos, thick = [], [], []
    for group, paint in paints.items():
        members = [module for module in document["modules"] if module["group"] == group]
        curves = [head | _curve(module, document["seeds"]) for module in members]
        for module, curve in zip(members, curves, strict=True):
            line = _polyline([(plot.x(d), plot.y(100 * score)) for d, score in curve.items()], "module", 1)
            dot = f'<circle cx="{plot.x(module["D"]):.2f}" cy="{plot.y(100 * module["direct"]):.2f}" r="3"/>'
            strength = 1 if len(members) == 1 else 0.4 if len(document["modules"]) <= CROWD else 0.2
            tip = f"<title>{escape(xml_safe(_told(module, _measure(document))))}</title>"
            thin.append(f'<g {paint} fill="none" opacity="{strength:g}">{tip}{line}{dot}</g>')
        shared = [d for d in curves[0] if all(d in curve for curve in curves)]
        mean = [(plot.x(d), plot.y(100 * fmean(curve[d] for curve in curves))) for d in shared]
        halos.append(f'<g stroke="#ffffff" fill="none" opacity="0.8">{_polyline(mean, "halo", 5)}</g>')
        thick.append(f'<g {paint} fill="none">{_polyline(mean, "group", 2.5)}</g>')
    return [*thin, *halos, *thick]


def _polyline(points: Sequence[Point], name: str, width: float) -> str:
    joined = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f'<polyline class="{name}" points="{joined}" stroke-width="{width:g}" stroke-linejoin="round"/>'


def _told(module: Row, measure: str) -> str:
    """A module in one line, for a tooltip."""
    words = f"{module['name']}: D {module['D']:,}, trained directly {100 * module['direct']:.1f} %"
    if module["d90"] is None:
        return f"{words}; {measure} unknown: {module['reason']}"
    return (
        f"{words}, {measure} {_number(module['d90'])} ({_number(module['d90_low'])} to {_number(module['d90_high'])})"
    )


# The map of probe.svg


def _map(document: Row, paints: Mapping[str, str]) -> tuple[list[str], float, float]:
    """A row for each group, a column for each block, and what the numbers are; with the width and height it needs."""
    modules, measure = document["modules"], _measure(document)
    blocks = sorted({m["block"] for m in modules}, key=lambda block: -1 if block is None else block)
    start = MAP + 12 + LETTER * max(len(_short(group)) for group in paints)
    wide = ALONE if blocks == [None] else CELL
    groups, known = list(paints), [m["d90"] for m in modules if m["d90"] is not None]
    shades = _Shades(min(known, default=0), max(known, default=0))
    heading = f"{measure} of all blocks" if blocks == [None] else f"{measure} by block"
    parts = [svg_text(MAP, 54, heading, weight="bold")]
    frames = []
    for i, group in enumerate(groups):
        parts.append(svg_text(start - 8, TOP + HEIGHT * i + 19, _short(group), anchor="end"))
    for module in modules:
        x, y = start + wide * blocks.index(module["block"]), TOP + HEIGHT * groups.index(module["group"])
        parts.append(_cell(module, (x, y), wide, measure, shades))
        if module["name"] in document["selected"]:
            for inset, line, colour in ((2.5, 1, "#ffffff"), (1, 2, "#000000")):  # white inside: dark cells show it too
                size = f'width="{wide - 2 * inset:.2f}" height="{HEIGHT - 2 * inset:.2f}"'
                place = f'x="{x + inset:.2f}" y="{y + inset:.2f}" class="selected"'
                frames.append(f'<rect {place} {size} fill="none" stroke="{colour}" stroke-width="{line}"/>')
    y = TOP + HEIGHT * len(groups) + 16
    columns = [(i, block) for i, block in enumerate(blocks) if block is not None]
    parts += [svg_text(start + wide * (i + 0.5), y, str(block), anchor="middle") for i, block in columns]
    width = max(start + wide * len(blocks) + 16, MAP + MAP_WIDTH)
    below, bottom = _below(document, shades if known else None, y + (24 if columns else 8), width - MAP - 16)
    return [*parts, *frames, *below], width, bottom


def _cell(module: Row, at: Point, wide: float, measure: str, shades: "_Shades") -> str:
    (x, y), d = at, module["d90"]
    fill, ink = ("#f2f2f2", INK) if d is None else shades.of(d)
    words = "–" if d is None else _number(d) if wide > CELL else _compact(d)
    size = f'x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{HEIGHT:.2f}"'
    tip = f"<title>{escape(xml_safe(_told(module, measure)))}</title>"
    number = svg_text(x + wide / 2, y + 19, words, anchor="middle", size=11, colour=ink)
    return f'<g class="cell">{tip}<rect {size} fill="{fill}" stroke="#ffffff"/>{number}</g>'


def _compact(value: float) -> str:
    """At most four characters: <0.1, 0.37, 12, 999, 1.2k, 65k, 1.5M."""
    if 0 < value < 0.095:
        return "<0.1"
    power = 0 if value < 999.5 else 1 if value < 999_500 else 2
    part = value / 1000**power
    return (f"{part:.2g}" if part < 9.95 else f"{part:.0f}") + ("", "k", "M")[power]


@dataclass(frozen=True)
class _Shades:
    """Colours from the lowest to the highest d, by log(1 + d)."""

    low: float
    high: float

    def of(self, d: float) -> tuple[str, str]:
        """The colour of a cell and that of the number in it."""
        span = math.log1p(self.high) - math.log1p(self.low)
        part = (math.log1p(d) - math.log1p(self.low)) / span if span else 0.0
        i = min(int(part * (len(SHADES) - 1)), len(SHADES) - 2)
        share = part * (len(SHADES) - 1) - i
        colour = [round(a + share * (b - a)) for a, b in zip(SHADES[i], SHADES[i + 1], strict=True)]
        red, green, blue = colour
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
        return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if dark else INK


def _below(document: Row, shades: _Shades | None, y: float, width: float) -> tuple[list[str], float]:
    """The scale of colours and the notes under the map, and where they end."""
    parts = []
    if shades is not None and shades.low < shades.high:
        stops = [f'<stop offset="{i / (len(SHADES) - 1):g}" stop-color="rgb{c}"/>' for i, c in enumerate(SHADES)]
        parts += ['<defs><linearGradient id="scale">', *stops, "</linearGradient></defs>"]
        low, high = _number(shades.low), _number(shades.high)
        left = MAP + LETTER * len(low) + 6
        parts.append(svg_text(MAP, y + 11, low))
        parts.append(f'<rect x="{left:.2f}" y="{y + 1:.2f}" width="120" height="12" fill="url(#scale)"/>')
        parts.append(svg_text(left + 126, y + 11, f"{high} (logarithmic)"))
        y += 30
    notes = [*_notes(document)]
    if document["selected"]:
        notes.append("framed: selected to be adapted")
    if any(module["d90"] is None for module in document["modules"]):
        notes.append("–: unknown; the reason is in the tooltip and in probe.json")
    for note in notes:
        for line in textwrap.wrap(xml_safe(note), int(width / 5.9)):
            parts.append(svg_text(MAP, y + 11, line, size=11))
            y += 15
        y += 4
    return parts, y + 12
