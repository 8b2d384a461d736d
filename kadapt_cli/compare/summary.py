"""From the finished cells of a comparison to its result: the table, the JSON, comparison.csv and what a terminal shows.

A row is one finished cell (data, method, seed); its "accuracy" is the data set's own metric, a fraction in [0, 1].
A method that lacks a cell which another method has gets no mean: it is never averaged over less in silence.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kadapt_cli.errors import harmless, visible
from kadapt_cli.progress import duration
from kadapt_cli.report import new_table, plain

JSON_ROW = ["data", "method", "shots", "seed", "accuracy", "trainable", "adapter", "lr", "weight_decay", "trials"]
JSON_FAILURE = ["data", "method", "shots", "seed", "trial", "reason"]
JSON_TABLE = ["method", "mean", "std", "trainable", "pe"]
CSV_COLUMNS = [*JSON_ROW[:4], "metric", *JSON_ROW[4:], "val", "time_s", "peak_bytes", "select", "trial", "reason"]
MAX_FAILURES = 20
INTERVAL = ("difference", "low", "high")
MAX_HEADER = 24  # characters of a data set's name above its column: three lines of eight

Row = Mapping[str, Any]


def table(rows: Sequence[Row], m0: float) -> list[dict[str, Any]]:
    """One entry a method, best mean first, methods without a mean last; equal ones in the order of the rows.

    An entry has method; mean, over data sets of the mean over seeds; std, the sample standard deviation over seeds of
    the mean over data sets, of the seeds that every data set has, None for fewer than two; data, the mean and std over
    seeds of each data set; trainable and adapter, means over data sets, the head counted in the first only; pe,
    mean · exp(−log10(trainable / m0 + 1)); time_s, summed; peak_bytes, the highest. Where a cell is missing, mean, std
    and pe are None.
    """
    seeds: dict[str, list[int]] = {}
    for name, seed in dict.fromkeys((row["data"], row["seed"]) for row in rows):
        seeds.setdefault(name, []).append(seed)
    methods = dict.fromkeys(row["method"] for row in rows)
    entries = [_entry(name, [row for row in rows if row["method"] == name], seeds, m0) for name in methods]
    return sorted(entries, key=lambda entry: -1.0 if entry["mean"] is None else entry["mean"], reverse=True)


def _entry(method: str, rows: Sequence[Row], seeds: Mapping[str, Sequence[int]], m0: float) -> dict[str, Any]:
    scores = {(row["data"], row["seed"]): float(row["accuracy"]) for row in rows}
    data = {name: _spread([scores.get((name, seed)) for seed in mine]) for name, mine in seeds.items()}
    shared = [seed for seed in next(iter(seeds.values())) if all(seed in mine for mine in seeds.values())]
    over_seeds = _spread([_spread([scores.get((name, seed)) for name in seeds])["mean"] for seed in shared])
    mean = _spread([part["mean"] for part in data.values()])["mean"]
    counts = {row["data"]: (row["trainable"], row["adapter"]) for row in rows}.values()
    trainable, adapter = (fmean(part) for part in zip(*counts, strict=True))
    return {
        "method": method,
        "mean": mean,
        "std": None if mean is None else over_seeds["std"],
        "data": data,
        "trainable": trainable,
        "adapter": adapter,
        "pe": None if mean is None else mean * math.exp(-math.log10(trainable / m0 + 1)),
        "time_s": sum(row["time_s"] for row in rows),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation; no mean where a value is missing, no deviation of fewer than two."""
    known = [value for value in values if value is not None]
    whole = len(values) if len(known) == len(values) else 0
    return {"mean": fmean(known) if whole else None, "std": stdev(known) if whole > 1 else None}


def document(rows: Sequence[Row], failures: Sequence[Row], m0: float) -> dict[str, Any]:
    """What `kadapt compare --json` prints: rows, table, failures and significance, ready for `json.dumps`."""
    return {
        "schema_version": 1,
        "rows": [{key: row[key] for key in JSON_ROW} for row in rows],
        "table": [{key: entry[key] for key in JSON_TABLE} for entry in table(rows, m0)],
        "failures": [{key: failure[key] for key in JSON_FAILURE} for failure in failures],
        "significance": significance(rows),
    }


def comparison_csv(rows: Sequence[Row], failures: Sequence[Row]) -> str:
    """All fields of every row, then the failures: accuracy empty, with a reason, and the trial (empty: the final run).

    A text that a spreadsheet would run as a formula gets one ' in front, as in `report.confusion_csv`.
    """
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in (*rows, *failures):
        writer.writerow([harmless(row.get(column)) for column in CSV_COLUMNS])
    return text.getvalue()


# Is a difference more than luck?


def significance(
    rows: Sequence[Row], against: str = "kadaptation", resamples: int = 10_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Paired bootstrap of each method's mean difference to one method; the same draws for both.

    A draw takes data sets with replacement and, within each one drawn, its seeds with replacement. The interval holds
    the middle 95 % of the draws' mean differences. It says how far the difference depends on which data sets and seeds
    were taken. It does not say that the method is better on a new kind of data, it knows nothing of other shots,
    backbones or search budgets, and it is not corrected for comparing many methods. With few data sets it is wide
    and still too narrow: of equal methods whose differences are normal and the same for every seed, it excludes 0 in
    about one of eight comparisons on six sets, and in one of four on three. From one set it speaks of seeds only.

    Args:
        rows: The finished cells. Cells that only one of two methods has are left out; `cells` says how many are used.
        against: The method to compare with; where it has no rows, the method with the best mean takes its place.
        resamples: How many draws, made from `seed`.

    Returns:
        A dict for each other method, in the order of `table`: method, against, difference (method minus against, in
        [-1, 1]), low, high (None from fewer than two cells), excludes_zero, cells and cells_of, those of the grid.
    """
    ranked = [entry["method"] for entry in table(rows, 1e8)]
    base = against if against in ranked or not ranked else ranked[0]
    scores = {(row["method"], row["data"], row["seed"]): row["accuracy"] for row in rows}
    cells = sorted({(row["data"], row["seed"]) for row in rows})
    entries = []
    for name in (name for name in ranked if name != base):
        groups: dict[str, list[float]] = {}
        used = [cell for cell in cells if (name, *cell) in scores and (base, *cell) in scores]
        for cell in used:
            groups.setdefault(cell[0], []).append(scores[name, *cell] - scores[base, *cell])
        found = _interval(list(groups.values()), resamples, seed)
        entries.append({"method": name, "against": base, **found, "cells": len(used), "cells_of": len(cells)})
    return entries


def _interval(groups: list[list[float]], resamples: int, seed: int) -> dict[str, Any]:
    """The mean of the groups' means, with the ends of its bootstrap interval; groups may differ in length."""
    mean = fmean(map(fmean, groups)) if groups else None
    if sum(map(len, groups)) < 2:
        return {"difference": mean, "low": None, "high": None, "excludes_zero": False}
    sizes = np.array([len(group) for group in groups])
    values = np.array([group + [0.0] * (max(sizes) - len(group)) for group in groups])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(groups), size=(resamples, len(groups), 1))
    index = (rng.random((resamples, len(groups), max(sizes))) * sizes[drawn]).astype(np.int64)
    used = np.arange(max(sizes)) < sizes[drawn]  # as many seeds as the set drawn has
    means = ((values[drawn, index] * used).sum(-1) / used.sum(-1)).mean(-1)
    low, high = (float(end) for end in np.percentile(means, [2.5, 97.5]))
    return {"difference": mean, "low": low, "high": high, "excludes_zero": low > 0 or high < 0}


# The terminal


def show(rows: Sequence[Row], failures: Sequence[Row], m0: float) -> RenderableType:
    """Scores, costs, differences and failures, for 80 columns and more; the best of each score and PE is bold."""
    entries, parts = table(rows, m0), list[RenderableType]()
    scores, costs, differences = (Text(visible(note) + "\n", style="dim") for note in notes(rows, m0))
    if entries:
        parts += [_Scores(entries), scores, _costs(entries), costs]
    if len(entries) > 1:
        parts += [_differences(significance(rows)), differences]
    return Group(*parts, *_failed(failures)) if parts or failures else Text("no cell has finished")


def columns(entries: Sequence[Row]) -> list[tuple[str, list[Row], float]]:
    """The mean, then each data set: its name, the mean and std of each entry of `table`, and the best mean."""
    parts = [("mean", [*entries])]
    parts += [(name, [entry["data"][name] for entry in entries]) for name in (entries[0]["data"] if entries else ())]
    return [(name, some, max((part["mean"] or 0 for part in some), default=0)) for name, some in parts]


def score_text(part: Row) -> str:
    """The mean and std of an entry of `table` in %, such as 62.3±1.2, 62.3 without a std; dashes without a mean."""
    if part["mean"] is None:
        return "---"
    return f"{100 * part['mean']:.1f}" + ("" if part["std"] is None else f"±{100 * part['std']:.1f}")


def memory_text(size: int) -> str:
    """Bytes in MiB; dashes for 0, a peak that was not measured."""
    return f"{size / 2**20:,.0f} MiB" if size else "---"


def notes(rows: Sequence[Row], m0: float) -> tuple[str, str, str]:
    """What the scores, the costs and the differences are, a line each."""
    metrics = {row["data"]: row["metric"] for row in rows if row["metric"] != "accuracy"}
    others = "".join(f", of {name} {metric}" for name, metric in metrics.items())
    return (
        f"top-1 accuracy{others}, in %: mean±standard deviation over seeds; ---: a cell failed or is missing",
        f"PE = mean · exp(−log10(trainable / {m0:,.0f} + 1)); trainable: with the head, mean over data sets; "
        "time: of the final runs",
        "in points; low to high: 95 % interval of a paired bootstrap over data sets and seeds, too narrow with few "
        "data sets, not corrected for several methods",
    )


def verdict(entry: Row) -> str:
    """One entry of `significance` in words."""
    if entry["low"] is None:
        return "too few cells"
    told = ("higher" if entry["low"] > 0 else "lower") if entry["excludes_zero"] else "not told apart"
    return told + (f" ({entry['cells']} of {entry['cells_of']} cells)" if entry["cells"] < entry["cells_of"] else "")


@dataclass(frozen=True)
class _Scores:
    """Mean and data sets by method, in as many tables below one another as the width asks for."""

    entries: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        scores = columns(self.entries)
        width = max(8, *(len(score_text(part)) for _, parts, _ in scores for part in parts))
        first = max(len("method"), *(len(visible(entry["method"])) for entry in self.entries))
        count = max(1, (options.max_width - first) // (width + 1))
        for start in range(0, len(scores), count):
            block = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
            block.add_column("method", no_wrap=True)
            cells = [[plain(entry["method"]) for entry in self.entries]]
            for name, parts, best in scores[start : start + count]:
                block.add_column(_header(name), justify="right", width=width, overflow="fold")
                cells.append([Text(score_text(part), "bold" if part["mean"] == best else "") for part in parts])
            for row in zip(*cells, strict=True):
                block.add_row(*row)
            yield block


def _header(name: str) -> Text:
    """A data set's name, its middle left out where it is long: names often differ at the end (cifar-10, cifar-100)."""
    name, half = visible(name), MAX_HEADER // 2
    return Text(name if len(name) <= MAX_HEADER else f"{name[:half]}…{name[1 - half :]}")


def _costs(entries: Sequence[Row]) -> Table:
    shown = new_table("method", "trainable", "adapter", "PE", "time", "peak memory")
    best = max(entry["pe"] or 0 for entry in entries)
    for entry in entries:
        counts = [f"{entry[key]:,.0f}" for key in ("trainable", "adapter")]
        pe = Text("---") if entry["pe"] is None else Text(f"{entry['pe']:.3f}", "bold" if entry["pe"] == best else "")
        shown.add_row(plain(entry["method"]), *counts, pe, duration(entry["time_s"]), memory_text(entry["peak_bytes"]))
    return shown


def _differences(entries: Sequence[Row]) -> Table:
    shown = new_table("method", escape(f"minus {visible(entries[0]['against'])}"), "low", "high", "")
    for entry in entries:
        points = ("---" if (value := entry[key]) is None else f"{100 * value:+.1f}" for key in INTERVAL)
        shown.add_row(plain(entry["method"]), *points, verdict(entry))
    return shown


def _failed(failures: Sequence[Row]) -> list[RenderableType]:
    """A line a failure, the failed cells before the failed trials of a search."""
    lines = [Text(f"failed ({len(failures)})", style="bold")] if failures else []
    for row in sorted(failures, key=lambda row: row["trial"] is not None)[:MAX_FAILURES]:
        run = "final run" if row["trial"] is None else f"trial {row['trial']}"
        lines.append(plain(f"- {row['data']}, {row['method']}, seed {row['seed']}, {run}: {row['reason']}"))
    if len(failures) > MAX_FAILURES:
        lines.append(Text(f"and {len(failures) - MAX_FAILURES} more in comparison.csv"))
    return [*lines]
