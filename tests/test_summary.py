"""The result of a comparison: the table, its JSON and CSV, what a terminal shows, the page and the picture."""

import csv
import io
import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from kadapt_cli.compare import page as pages
from kadapt_cli.compare.page import page, pareto_front, pareto_svg
from kadapt_cli.compare.summary import comparison_csv, document, show, significance, table
from kadapt_cli.report import count_label, log_ticks

HOSTILE = "<b>&"
SVG = "{http://www.w3.org/2000/svg}"


def row(data, method, seed, accuracy, trainable=1000, **more):
    common = {"shots": 5, "metric": "accuracy", "adapter": 100, "lr": 0.01, "weight_decay": 1e-4}
    costs = {"trials": 7, "val": 0.5, "time_s": 10.0, "peak_bytes": 2**20}
    cell = {"data": data, "method": method, "seed": seed, "accuracy": accuracy, "trainable": trainable}
    return {**cell, **common, **costs, **more}


def failure(data="dtd", method="full", seed=2, trial=None, reason="the loss is no longer finite"):
    return {"data": data, "method": method, "shots": 5, "seed": seed, "trial": trial, "reason": reason}


def grid(scores, data=("pets", "dtd", HOSTILE), seeds=2):
    """Rows in which methods differ by what `scores` says, data sets by 0.1 and seeds by 0.01."""
    methods = [(name, score, 10 ** (3 + j)) for j, (name, score) in enumerate(scores.items())]
    cells = [(name, seed, 0.1 * i + 0.01 * seed) for i, name in enumerate(data) for seed in range(seeds)]
    return [row(d, m, s, score + more, count) for m, score, count in methods for d, s, more in cells]


def without(rows, data, method):
    """The rows but the last cell of a method on a data set."""
    last = [cell for cell in rows if (cell["data"], cell["method"]) == (data, method)][-1]
    return [cell for cell in rows if cell is not last]


def printed(*args, width=80):
    stream = io.StringIO()
    Console(file=stream, width=width).print(show(*args))
    return stream.getvalue()


# The table


def test_pe_of_the_published_averages():
    published = {79_699: (68.92, 0.689), 29_523: (66.32, 0.663), 87_878_739: (65.49, 0.498)}
    published |= {1_237_587: (65.08, 0.647), 77_907: (62.79, 0.628), 176_979: (61.48, 0.614)}
    for count, (score, pe) in published.items():
        assert round(table([row("a", "m", 0, score / 100, count)], 1e8)[0]["pe"], 3) == pe


def test_means_and_deviations_against_numbers_by_hand():
    rows = [
        row("a", "m", 0, 0.50, 1000, adapter=800, time_s=1.5, peak_bytes=3),
        row("a", "m", 1, 0.70, 1000, adapter=800, time_s=2.0, peak_bytes=7),
        row("b", "m", 0, 0.30, 1500, adapter=800, time_s=4.0, peak_bytes=5),
        row("b", "m", 1, 0.20, 1500, adapter=800, time_s=8.0, peak_bytes=1),
    ]
    (entry,) = table(rows, 1e8)
    # a: 0.60, b: 0.25; seed 0: 0.40, seed 1: 0.45, apart by 0.05: a deviation of 0.05 / sqrt(2)
    assert (entry["mean"], entry["std"]) == (pytest.approx(0.425), pytest.approx(0.05 / math.sqrt(2)))
    assert entry["data"]["a"] == pytest.approx({"mean": 0.6, "std": 0.2 / math.sqrt(2)})
    assert (entry["trainable"], entry["adapter"], entry["time_s"], entry["peak_bytes"]) == (1250, 800, 15.5, 7)
    (entry,) = table([*rows, row("a", "m", 2, 0.9)], 1e8)  # a seed that b lacks: in the mean, not in the deviation
    assert (entry["mean"], entry["std"]) == (pytest.approx(0.475), pytest.approx(0.05 / math.sqrt(2)))
    (entry,) = table([rows[0], rows[2]], 1e8)
    assert (entry["mean"], entry["std"], entry["data"]["a"]["std"]) == (pytest.approx(0.4), None, None)


def test_missing_cell_leaves_no_mean_and_the_last_place():
    rows = without(grid({"good": 0.7, "low": 0.1, "high": 0.2}), "dtd", "good")
    high, low, good = table(rows, 1e8)
    assert (high["method"], low["method"], good["method"]) == ("high", "low", "good")
    assert [good[key] for key in ("mean", "std", "pe")] == [None] * 3
    assert good["data"]["dtd"] == {"mean": None, "std": None}
    (line,) = [line.split() for line in printed(rows, [], 1e8).splitlines() if line.startswith("good") and "±" in line]
    assert line[1:4] == ["---", "70.5±0.7", "---"]


def test_document_has_the_keys_of_the_schema():
    rows = grid({"kadaptation": 0.5, "lora": 0.4})
    result = json.loads(json.dumps(document(rows, [{**failure(), "kind": "failure"}], 1e8)))
    assert list(result) == ["schema_version", "rows", "table", "failures", "significance"]
    assert result["schema_version"] == 1
    keys = ["data", "method", "shots", "seed", "accuracy", "trainable", "adapter", "lr", "weight_decay", "trials"]
    assert [list(cell) for cell in result["rows"]] == [keys] * 12
    assert [list(entry) for entry in result["table"]] == [["method", "mean", "std", "trainable", "pe"]] * 2
    assert result["failures"] == [failure()]
    assert [entry["method"] for entry in result["significance"]] == ["lora"]


def test_csv_round_trip_without_formulas():
    rows = [row('=LINK("x")', "lora", 0, 1 / 3), row("a\nb", "full", 1, 0.5, shots=None, lr=None, val=None)]
    text = comparison_csv(rows, [failure(data="'@set", reason="-1, not finite")])
    first, second, failed = csv.DictReader(io.StringIO(text, newline=""))
    for given, read in zip(rows, (first, second), strict=True):
        for key in given.keys() - {"data", "method", "metric"}:
            assert read[key] == ("" if given[key] is None else repr(given[key])), key
    assert (first["data"], first["metric"], first["reason"]) == ('\'=LINK("x")', "accuracy", "")
    assert (second["data"], second["method"]) == ("a\nb", "full")
    assert [failed[key] for key in ("data", "accuracy", "trial", "reason")] == ["''@set", "", "", "'-1, not finite"]


# Significance


def test_planted_difference_is_found_and_equal_methods_are_not_told_apart():
    rng = np.random.default_rng(0)
    rows = []
    for data in "abcdef":
        level = rng.uniform(0.4, 0.8)
        for seed in range(3):
            score = level + rng.normal(0, 0.03)  # shared: only a paired comparison sees through it
            rows += [row(data, "kadaptation", seed, score), row(data, "same", seed, score)]
            rows.append(row(data, "worse", seed, score - 0.02 + rng.normal(0, 0.005)))
    same, worse = significance(rows)
    assert [same[key] for key in ("method", "difference", "low", "high")] == ["same", 0, 0, 0]
    assert not same["excludes_zero"]
    assert -0.03 < worse["low"] < worse["difference"] < worse["high"] < -0.01  # planted: -0.02
    assert worse["excludes_zero"]
    assert significance(rows) == [same, worse]
    assert significance(rows, seed=1)[1]["low"] != worse["low"]


def test_sets_count_alike_whatever_their_seeds():
    """Set a has differences 0, 0, 0, and b -0.5, 0.5.

    A draw's mean is -0.5 with a chance of 1/64 (b twice, and four times its first seed), else -0.25 or more.
    """
    rows = [row("a", method, seed, 0.5) for method in ("kadaptation", "m") for seed in range(3)]
    rows += [row("b", "kadaptation", seed, 0.5) for seed in range(2)]
    (entry,) = significance([*rows, row("b", "m", 0, 0.0), row("b", "m", 1, 1.0)])
    assert [entry[key] for key in ("difference", "low", "high", "excludes_zero")] == [0, -0.25, 0.25, False]
    (entry,) = significance([*rows, row("b", "m", 0, 0.9), row("b", "m", 1, 0.9)])
    assert entry["difference"] == pytest.approx(0.2)


@pytest.mark.parametrize(("sets", "least", "most"), [(6, 0.09, 0.16), (3, 0.20, 0.30)])
def test_few_sets_tell_equal_methods_apart_as_often_as_the_docstring_says(sets, least, most):
    rng = np.random.default_rng(0)
    found = 0
    for i in range(400):
        gaps = rng.normal(0, 0.1, sets)
        rows = [row(str(d), m, 0, gap * (m == "m")) for m in ("kadaptation", "m") for d, gap in enumerate(gaps)]
        found += significance(rows, resamples=500, seed=i)[0]["excludes_zero"]
    assert least < found / 400 < most


def test_significance_where_something_is_missing():
    rows = without(grid({"lora": 0.5, "full": 0.4, "linear": 0.3}), "dtd", "full")
    assert {entry["against"] for entry in significance(rows)} == {"lora"}
    assert [(entry["cells"], entry["cells_of"]) for entry in significance(rows)] == [(6, 6), (5, 6)]
    assert "lower (5 of 6 cells)" in printed(rows, [], 1e8)
    (alone,) = significance([row("a", "kadaptation", 0, 0.5), row("a", "lora", 0, 0.4)])
    assert (alone["difference"], alone["low"], alone["excludes_zero"]) == (pytest.approx(-0.1), None, False)
    assert significance([]) == []


# What is shown


@pytest.mark.parametrize("names", [6, 20])
def test_a_terminal_of_80_columns_shows_every_score(names):
    data = [f"a-data-set-with-a-long-name-{i}" for i in range(names)]
    rows = grid({"kadaptation-full": 0.1, "lora": 0.05}, data, seeds=3)
    text = printed(rows, [failure(reason="[red]out of memory"), failure(trial=4)], 1e8)
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines() if line.startswith("kadaptation-full") and "±" in line]
    means = [0.1 + 0.1 * (names - 1) / 2, *(0.1 + 0.1 * i for i in range(names))]
    assert [word for line in lines for word in line[1:]] == [f"{100 * mean + 1:.1f}±1.0" for mean in means]
    assert "- dtd, full, seed 2, final run: [red]out of memory" in text
    assert "- dtd, full, seed 2, trial 4: the loss is no longer finite" in text


def test_nothing_finished():
    assert printed([], [], 1e8) == "no cell has finished\n"
    assert "the loss is no longer finite" in printed([], [failure()], 1e8)
    assert "No cell has finished" in page([], [failure()], m0=1e8, title="t", setting={})
    assert "no method has all its cells" in pareto_svg([])


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the words outside of style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_page_shows_everything_escaped_and_loads_nothing():
    rows = grid({"kadaptation": 0.5, "lora": 0.4, HOSTILE + "m": 0.3})
    setting = {"seeds": [0, 1], "versions": {HOSTILE: 1}}
    text = page(rows, [failure(reason="<script>\x1b")], m0=1e8, title=HOSTILE, setting=setting)
    reader = Reader(text)
    words, tags = " ".join(reader.words), {tag for tag, _ in reader.tags}
    expected = ("kadaptation", HOSTILE + "m", "pets", "0, 1", HOSTILE + " 1", "<script>\\x1b", "50.5±0.7")
    assert [name for name in expected if name not in words] == []
    assert {"title", "h1", "table", "svg"} <= tags
    assert not tags & {"script", "b", "link", "img", "iframe"}
    assert not [name for _, attrs in reader.tags for name in attrs if name in ("src", "href")]
    assert "url(" not in text
    assert text.count("http") == text.count(f'xmlns="{SVG[1:-1]}"') == 5  # two pictures, three panels
    assert all(attrs["role"] == "img" and attrs["aria-label"] for tag, attrs in reader.tags if tag == "svg")
    assert ("html", {"lang": "en"}) in reader.tags


def test_bars_are_as_long_as_the_scores():
    rows = without(grid({"kadaptation": 0.5, "lora": 0.25}, ["a", "b"]), "b", "lora")
    root = ET.fromstring(pages._bars(table(rows, 1e8), "b", {"kadaptation": 'fill="red"', "lora": 'fill="blue"'}))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") in ("red", "blue")]
    words = {text.text: float(text.get("x")) for text in root.iter(f"{SVG}text")}
    assert [bar.get("fill") for bar in bars] == ["red"]
    assert float(bars[0].get("width")) / (words["100"] - words["0"]) == pytest.approx(0.605, abs=1e-3)
    assert "no result" in words


# The picture


def test_pareto_front_of_a_planted_case():
    places = {"worse": (40, 0.6), "small": (10, 0.5), "beaten": (20, 0.5), "big": (50, 0.8), "failed": (1, None)}
    places |= {"middle": (30, 0.7), "twin": (30, 0.7)}
    entries = [{"method": name, "trainable": count, "mean": mean} for name, (count, mean) in places.items()]
    assert pareto_front(entries) == ["small", "middle", "twin", "big"]
    assert pareto_front([]) == []


def test_picture_draws_every_method_at_its_place_with_its_name_apart():
    rng = np.random.default_rng(0)
    methods = [(f"method-{i}", int(5e4 * 1.05**i)) for i in range(13)]
    cells = [(data, seed) for data in "ab" for seed in range(3)]
    rows = [row(d, m, s, 0.6 + rng.normal(0, 0.03), count) for m, count in methods for d, s in cells]
    root, entries = ET.fromstring(pareto_svg(rows)), {entry["method"]: entry for entry in table(rows, 1e8)}
    groups = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    found = [entries[group.find(f"{SVG}title").text.split(":")[0]] for group in groups]
    places = [[float(group.find(f"{SVG}circle").get(key)) for key in ("cx", "cy")] for group in groups]
    assert len(found) == len(entries) == 13
    assert np.corrcoef([x for x, _ in places], [math.log(entry["trainable"]) for entry in found])[0, 1] > 0.99999
    assert np.corrcoef([y for _, y in places], [-entry["mean"] for entry in found])[0, 1] > 0.99999
    dots = [pages._Dot(x, y, y - 5, y + 5, 63) for x, y in places]
    boxes = pages._labels(dots, [(0, 0), (1, 0)], (0, 0, 720, 460))
    assert all(pages._overlap(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    assert {name for name, _ in methods} <= {text.text for text in root.iter(f"{SVG}text")}


@pytest.mark.parametrize(("low", "high"), [(3.8, 8.1), (4.9, 5.9), (0.0, 1.0)])
def test_log_axis_has_round_ticks_inside(low, high):
    ticks = log_ticks(low, high)
    assert len(ticks) >= 3
    assert all(low <= math.log10(tick) <= high and f"{tick:g}"[0] in "125" for tick in ticks)
    assert [count_label(value) for value in (1, 500, 1e3, 2e5, 5e6, 1e9)] == ["1", "500", "1k", "200k", "5M", "1G"]
