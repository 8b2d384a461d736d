"""How results are shown: tables for the terminal, confusion.csv and curves.svg for the run folder.

Class names and titles come from folder names, so they are data: never read as markup, formula or XML.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kadapt_cli.errors import harmless, visible
from kadapt_cli.metrics import Interval, Metrics

MAX_MATRIX_CLASSES = 20
MAX_CONFUSIONS = 10

History = Sequence[Mapping[str, Any]]
Point = tuple[float, float]


# Tables


def methods_table(methods: Mapping[str, ModuleType]) -> RenderableType:
    """The methods: parameters without the head, default learning rate, whether they merge, what they train."""
    table = new_table("method", "rate")
    table.add_column("merges")
    table.add_column("parameters", overflow="fold")
    table.add_column("trains", overflow="fold")
    for name, how in methods.items():
        rate = "" if how.LR is None else f"{how.LR:g}"
        table.add_row(name, rate, "no" if how.UNMERGED else "yes", how.FORMULA, how.SUMMARY)
    letters = "d width, L blocks, T = S terms, r --rank, w --width; the head adds (features + 1) · classes"
    return Group(table, Text(letters, style="dim"))


def metrics_table(metrics: Metrics) -> RenderableType:
    """The four numbers of the whole set in %, with their 95 % bootstrap intervals and what limits them."""
    table = new_table("metric", "%", "low", "high")
    table.add_row("accuracy", *_percent(metrics.accuracy))
    table.add_row("balanced accuracy", *_percent(metrics.balanced_accuracy))
    if metrics.top5:
        table.add_row("top-5 accuracy", *_percent(metrics.top5))
    table.add_row("calibration error (ECE)", *_percent(metrics.ece))
    notes = [f"{metrics.confusion.sum()} images, {len(metrics.per_class)} classes"]
    notes.append("low to high: 95 % bootstrap interval")
    if not metrics.top5:
        notes.append("top-5 accuracy: not defined for 5 classes or fewer")
    if metrics.accuracy.value in (0, 1):
        notes.append("all right or all wrong: the interval has no width, the uncertainty has")
    return Group(table, *(Text(note, style="dim") for note in notes))


def per_class_table(metrics: Metrics) -> RenderableType:
    """Images and recall of each class, recall in % with its 95 % bootstrap interval; dashes without images."""
    table = new_table("class", "images", "recall %", "low", "high")
    for name, n, recall in metrics.per_class:
        table.add_row(plain(name), str(n), *(_percent(recall) if recall else "---"))
    return table


def confusion_table(metrics: Metrics) -> RenderableType:
    """The confusion matrix; or the 10 most frequent confusions, over 20 classes or where the console is too narrow."""
    return _Confusion(metrics)


@dataclass(frozen=True)
class _Confusion:
    """Picks its form when it is printed, because only then the width is known."""

    metrics: Metrics

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if len(self.metrics.per_class) <= MAX_MATRIX_CLASSES:
            for numbered in (False, True):
                table = _matrix(self.metrics, numbered)
                if Measurement.get(console, options.update(width=10_000), table).maximum <= options.max_width:
                    yield table
                    yield Text("rows: true class, columns: predicted class", style="dim")
                    return
        yield from _frequent_confusions(self.metrics)


def _matrix(metrics: Metrics, numbered: bool) -> Table:
    """The matrix with class names above the columns, or with numbers where names would be too wide."""
    names = [plain(row.name) for row in metrics.per_class]
    numbers = [Text(str(i + 1)) for i in range(len(names))]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
    if numbered:
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("", max_width=16, no_wrap=True, overflow="ellipsis")
    for header in numbers if numbered else names:
        table.add_column(header, justify="right", max_width=16, no_wrap=True, overflow="ellipsis")
    for i, counts in enumerate(metrics.confusion.tolist()):
        cells = [Text(str(n) if n else ".", style=_cell_style(n, i == j)) for j, n in enumerate(counts)]
        table.add_row(*([numbers[i]] if numbered else []), names[i], *cells)
    return table


def _cell_style(count: int, on_diagonal: bool) -> str:
    if on_diagonal:
        return "bold green"
    return "" if count else "dim"


def _frequent_confusions(metrics: Metrics) -> list[RenderableType]:
    """Lines such as "rose taken for tulip: 7 of 38", most images first, equal ones in class order."""
    wrong = metrics.confusion.copy()
    np.fill_diagonal(wrong, 0)
    pairs = sorted(zip(*np.nonzero(wrong), strict=True), key=lambda pair: -wrong[pair])
    if not pairs:
        return [Text("no confusions: every image was classified right")]
    shown = pairs[:MAX_CONFUSIONS]
    lines = Table.grid(padding=(0, 1, 0, 0))  # a column of its own for the dash indents what wraps
    for true, predicted in shown:
        line = plain(metrics.per_class[true].name) + Text(" taken for ") + plain(metrics.per_class[predicted].name)
        lines.add_row("-", line + Text(f": {wrong[true, predicted]} of {metrics.per_class[true].n}"))
    return [Text(f"most frequent confusions ({len(shown)} of {len(pairs)})", style="bold"), lines]


def new_table(label: str, *numbers: str) -> Table:
    """A table of one column of names, which fold where it is narrow, and columns of numbers, which do not."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(label, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _percent(interval: Interval) -> list[str]:
    return [f"{100 * part:.1f}" for part in (interval.value, interval.low, interval.high)]


def plain(name: str) -> Text:
    """A name as it stands: Text reads no markup and no :emoji:; control characters would reach the terminal."""
    return Text(visible(name))


# confusion.csv


def confusion_csv(confusion: NDArray[np.int64], classes: Sequence[str]) -> str:
    """The confusion matrix as CSV: a header of predicted classes, then a row for each true class.

    A name that a spreadsheet would run as a formula (after any number of ', it starts with = + - @ or white space
    control) gets one ' in front; to read the names back, take one ' off those.
    """
    text = io.StringIO()
    # Every name is quoted: the csv module leaves a lone carriage return unquoted, and readers end the row there.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    names = [harmless(name) for name in classes]
    writer.writerow(["true class", *names])
    for name, counts in zip(names, confusion.tolist(), strict=True):
        writer.writerow([name, *counts])
    return text.getvalue()


# curves.svg

WIDTH, HEIGHT = 720, 360
# Okabe and Ito's colours, apart for every kind of colour vision; the dashes tell the lines apart in grey.
TRAINING, VALIDATION = "#0072B2", "#D55E00"
INK, GRID = "#333333", "#dddddd"
# Okabe and Ito's colours without yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
LETTER = 7.0  # px, a wide average of 12 px letters: fonts differ, and a name's box must hold it in all of them
LEGEND = 76  # y of the legend's words
MAX_DOTS = 15


def kept_epoch(history: History) -> int | None:
    """The epoch whose adapter the run keeps: the last one marked as kept; None without validation."""
    rows = [row for row in history if row["val_accuracy"] is not None and row["kept"]]
    return int(rows[-1]["epoch"]) if rows else None


@dataclass(frozen=True)
class _Panel:
    """A plot area whose x-axis runs over the epochs first..last and whose y-axis runs over its ticks."""

    left: float
    first: int
    last: int
    ticks: list[float]
    width = 280.0
    top = 90.0
    bottom = 304.0

    def x(self, epoch: float) -> float:
        if self.first == self.last:
            return self.left + self.width / 2
        return self.left + self.width * (epoch - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)


def curves_svg(history: History, title: str) -> str:
    """The learning curves as one self-contained SVG of 720 x 360 px.

    Left the training and validation loss, right the validation accuracy in %, over epochs; `kept_epoch` is marked.
    Values that are None or not finite are left out of their line.

    Args:
        history: A row for each epoch in order, at least one, with `epoch` (from 1), `train_loss` and `val_loss` (nats),
            `val_accuracy` (in [0, 1]), `kept` (bool); other keys are ignored.
        title: Printed above the plots, cut where it is too long; whole in the SVG's own title.

    Raises:
        ValueError: No epochs.
    """
    if not history:
        raise ValueError("curves_svg: expected at least one epoch, 0 were given")
    train, val = _points(history, "train_loss"), _points(history, "val_loss")
    accuracy = _points(history, "val_accuracy", factor=100)
    first, last = history[0]["epoch"], history[-1]["epoch"]
    left = _Panel(56, first, last, nice_ticks([value for _, value in train + val] or [0, 1], 0, math.inf))
    right = _Panel(420, first, last, nice_ticks([value for _, value in accuracy] or [0, 100], 0, 100))
    shown = Text(xml_safe(title))
    shown.truncate(80, overflow="ellipsis")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' role="img" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(xml_safe(title))}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        svg_text(16, 26, shown.plain, size=15, weight="bold"),
        *_axes(left, "Loss (nats)"),
        *_axes(right, "Validation accuracy (%)"),
        *_kept(history, left, right),
        *_line(left, train, "train_loss", TRAINING, dashes="6 3"),
        *_line(left, val, "val_loss", VALIDATION),
        *_line(right, accuracy, "val_accuracy", VALIDATION),
        *_legend(left.left, "training", TRAINING, dashes="6 3"),
        *(_legend(left.left + 110, "validation", VALIDATION) if val else []),
    ]
    if not accuracy:
        parts.append(svg_text(right.left + right.width / 2, 200, "no validation images", anchor="middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _points(history: History, key: str, factor: float = 1) -> list[Point]:
    values = ((row["epoch"], row[key]) for row in history)
    return [(epoch, factor * value) for epoch, value in values if value is not None and math.isfinite(value)]


def _step(span: float, at_most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides the span into at most so many parts."""
    power = 10.0 ** math.floor(math.log10(span / at_most))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if span <= step * at_most * (1 + 1e-9))


def nice_ticks(values: list[float], floor: float, ceiling: float) -> list[float]:
    """Nice numbers from below the least value to above the greatest, within floor and ceiling; at least two."""
    low, high = min(values), max(values)
    if high - low <= 1e-3 * abs(high):  # a flat line gets some room
        margin = abs(high) / 10 or 1.0
        low, high = max(low - margin, floor), min(high + margin, ceiling)
    step = _step(high - low, 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _epoch_ticks(first: int, last: int) -> list[int]:
    if first == last:
        return [first]
    step = max(1, round(_step(last - first, 8)))
    return list(range(math.ceil(first / step) * step, last + 1, step))


def tick_label(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}" if decimals <= 4 and abs(value) < 1e5 else f"{value:.3g}"


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from 10^low to 10^high, and twice and five times these where they are fewer than three."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    tens = [tick for tick in inside if tick in ticks[::3]]
    return tens if len(tens) >= 3 else inside


def count_label(value: float) -> str:
    """A round number such as 500, 200k or 5M."""
    power = max(0, math.floor(math.log10(value) + 1e-9) // 3)
    return f"{value / 1000**power:g}" + ("", "k", "M", "G", "T")[power]


def _axes(panel: _Panel, heading: str) -> list[str]:
    """Heading, grid lines, tick labels and the name of the x-axis."""
    right = panel.left + panel.width
    parts = [svg_text(panel.left, 54, heading, weight="bold")]
    for value in panel.ticks:
        y = panel.y(value)
        parts.append(rule(panel.left, y, right, y, GRID))
        label = tick_label(value, panel.ticks[1] - panel.ticks[0])
        parts.append(svg_text(panel.left - 7, y + 4, label, anchor="end"))
    for epoch in _epoch_ticks(panel.first, panel.last):
        x = panel.x(epoch)
        parts.append(rule(x, panel.top, x, panel.bottom, GRID))
        parts.append(rule(x, panel.bottom, x, panel.bottom + 4, INK))
        parts.append(svg_text(x, panel.bottom + 18, str(epoch), anchor="middle"))
    parts.append(rule(panel.left, panel.bottom, right, panel.bottom, INK))
    parts.append(svg_text((panel.left + right) / 2, panel.bottom + 38, "epoch", anchor="middle"))
    return parts


def _line(panel: _Panel, points: list[Point], name: str, colour: str, dashes: str = "none") -> list[str]:
    """A line through the points; dots as well while they are few, or else one epoch alone would not show."""
    if not points:
        return []
    places = [(panel.x(epoch), panel.y(value)) for epoch, value in points]
    joined = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
    parts = [
        f'<polyline class="{name}" points="{joined}" fill="none" stroke="{colour}" stroke-width="2"'
        f' stroke-linejoin="round" stroke-dasharray="{dashes}"/>'
    ]
    if len(points) <= MAX_DOTS:
        parts += [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2.5" fill="{colour}"/>' for x, y in places]
    return parts


def _kept(history: History, loss: _Panel, accuracy: _Panel) -> list[str]:
    """A dotted upright at the kept epoch in both panels, a ring around its accuracy, and what it is in words."""
    kept = kept_epoch(history)
    if kept is None:
        return []
    value = next(100 * row["val_accuracy"] for row in history if row["epoch"] == kept)
    parts = [rule(p.x(kept), p.top, p.x(kept), p.bottom, INK, dashes="2 3") for p in (loss, accuracy)]
    for x, y in ((accuracy.x(kept), accuracy.y(value)), (accuracy.left + 12, LEGEND - 4)):
        parts.append(
            f'<circle class="kept" cx="{x:.2f}" cy="{y:.2f}" r="5" fill="none" stroke="{INK}" stroke-width="1.5"/>'
        )
    parts.append(svg_text(accuracy.left + 32, LEGEND, f"kept: epoch {kept}, {value:.1f} %"))
    return parts


def _legend(x: float, words: str, colour: str, dashes: str = "none") -> list[str]:
    return [rule(x, LEGEND - 4, x + 26, LEGEND - 4, colour, dashes, width=2), svg_text(x + 32, LEGEND, words)]


def svg_picture(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """Parts on white paper as one SVG; the title is what a screen reader says."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    about = f'role="img" aria-label={quoteattr(xml_safe(title))} font-family="Helvetica, Arial, sans-serif"'
    paper = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {about}>', paper, *parts, "</svg>"])


def rule(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "none", width: float = 1) -> str:
    ends = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'


def svg_text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    size: int = 12,
    colour: str = INK,
) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" fill="{colour}"'
    return f'<text x="{x:.2f}" y="{y:.2f}" {style}>{escape(words)}</text>'


def xml_safe(words: str) -> str:
    """XML 1.0 cannot hold control characters or lone surrogates, not even escaped."""
    return "".join(c if c.isprintable() else "\ufffd" for c in words)
