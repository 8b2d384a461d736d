"""Tables show names as they are and fit the console; confusion.csv and curves.svg say what they were given."""

import csv
import io
import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from kadapt_cli.metrics import Metrics, evaluate
from kadapt_cli.report import confusion_csv, confusion_table, curves_svg, kept_epoch, metrics_table, per_class_table

HOSTILE = ["[red]tulip[/red]", ":rose:", "a\x1b[31mb", "two\nlines", "[/]", "back\\", "漢字"]


def metrics_of(labels, predicted, classes) -> Metrics:
    p = np.full((len(labels), len(classes)), 0.01)
    p[np.arange(len(labels)), predicted] = 0.9
    return evaluate(p, np.asarray(labels), classes, resamples=50)


def shown(renderable, width=80):
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    console.print(renderable)
    text = console.file.getvalue()
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


def styled(renderable):
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard", legacy_windows=False)
    console.print(renderable)
    return console.file.getvalue()


# Tables


def test_metrics_table_shows_every_number():
    metrics = metrics_of([0, 0, 1, 1, 1, 2, 3, 4, 5, 5], [0, 0, 1, 1, 0, 2, 3, 4, 5, 4], list("abcdef"))
    text = shown(metrics_table(metrics))
    expected = {
        "accuracy": metrics.accuracy,
        "balanced accuracy": metrics.balanced_accuracy,
        "top-5 accuracy": metrics.top5,
        "calibration error (ECE)": metrics.ece,
    }
    for name, interval in expected.items():
        row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert row.split()[-3:] == [f"{100 * x:.1f}" for x in (interval.value, interval.low, interval.high)]
    assert "10 images, 6 classes" in text
    assert "not defined" not in text


def test_metrics_table_says_what_limits_the_numbers():
    text = shown(metrics_table(metrics_of([0, 1], [0, 1], ["a", "b"])))
    assert "top-5 accuracy: not defined for 5 classes or fewer" in text
    assert "all right or all wrong: the interval has no width" in text
    assert "no width" not in shown(metrics_table(metrics_of([0, 1], [0, 0], ["a", "b"])))


def test_per_class_table_shows_dashes_without_images():
    rows = shown(per_class_table(metrics_of([0, 0, 1], [0, 1, 1], ["ant", "bee", "cat"]))).splitlines()
    assert rows[2].split()[:3] == ["ant", "2", "50.0"]
    assert rows[4].split() == ["cat", "0", "-", "-", "-"]


@pytest.mark.parametrize("table", [per_class_table, confusion_table])
def test_names_are_not_interpreted(table):
    labels = list(range(7))
    text = shown(table(metrics_of(labels, labels[::-1], HOSTILE)))
    for name in ("[red]tulip[/", ":rose:", r"a\x1b[31mb", r"two\nlines", "[/]", "back\\", "漢字"):
        assert name in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [80, 40])
def test_every_table_fits(width):
    long = [f"a rather long name of class {i} " + "x" * 30 for i in range(25)]
    for n in (2, 5, 20, 25):
        labels = np.arange(400) % n
        metrics = metrics_of(labels, (labels * 3) % n, long[:n])
        for table in (metrics_table, per_class_table, confusion_table):
            assert "0" in shown(table(metrics), width)  # `shown` checks the width
        for line in shown(metrics_table(metrics), width).splitlines():
            assert "…" not in line


def test_confusion_matrix_has_names_where_they_fit_and_numbers_elsewhere():
    metrics = metrics_of([0, 0, 0, 1, 2], [0, 0, 1, 1, 0], ["daisy", "dandelion", "rose"])
    lines = shown(confusion_table(metrics)).splitlines()
    assert lines[0].split() == ["daisy", "dandelion", "rose"]
    assert [line.split() for line in lines[2:5]] == [
        ["daisy", "2", "1", "."],
        ["dandelion", ".", "1", "."],
        ["rose", "1", ".", "."],
    ]
    assert lines[5] == "rows: true class, columns: predicted class"
    lines = shown(confusion_table(metrics), width=28).splitlines()
    assert lines[0].split() == ["1", "2", "3"]
    assert lines[3].split() == ["2", "dandelion", ".", "1", "."]


def test_twenty_classes_fit_80_columns_as_a_matrix():
    labels = np.arange(400) % 20
    text = shown(confusion_table(metrics_of(labels, labels, [f"class number {i}" for i in range(20)])))
    assert text.splitlines()[0].split() == [str(i + 1) for i in range(20)]


def test_diagonal_is_highlighted():
    text = styled(confusion_table(metrics_of([0, 0, 1], [0, 0, 0], ["a", "b"])))
    assert "\x1b[1;32m2\x1b[0m" in text.replace(" ", "")
    assert "\x1b[1;32m1\x1b[0m" not in text.replace(" ", "")


@pytest.mark.parametrize(("n_classes", "width"), [(21, 80), (20, 40)])
def test_frequent_confusions_replace_a_matrix_that_is_too_wide(n_classes, width):
    labels = [0] * 38 + [1] * 5 + list(range(2, n_classes))
    predicted = [0] * 31 + [1] * 7 + [2] * 5 + [0] * (n_classes - 2)
    classes = ["rose", "tulip", *(f"c{i}" for i in range(2, n_classes))]
    lines = [
        line.rstrip() for line in shown(confusion_table(metrics_of(labels, predicted, classes)), width).splitlines()
    ]
    assert lines[0] == f"most frequent confusions (10 of {n_classes})"
    assert lines[1:4] == [
        "- rose taken for tulip: 7 of 38",
        "- tulip taken for c2: 5 of 5",
        "- c2 taken for rose: 1 of 1",
    ]
    assert len(lines) == 11


def test_no_confusions():
    labels = list(range(21))
    text = shown(confusion_table(metrics_of(labels, labels, [f"c{i}" for i in labels])))
    assert text == "no confusions: every image was classified right\n"


# confusion.csv


def test_confusion_csv_round_trip_with_hostile_names():
    names = [
        "=1+1",
        "+a",
        "-b",
        "@c",
        "\tt",
        "\rr",
        "\nn",
        "'=quoted",
        "'plain",
        'say "hi"',
        "a,b",
        "c\rd",
        "漢字",
        "",
        "ant",
    ]
    matrix = np.arange(len(names) ** 2).reshape(len(names), -1)
    rows = list(csv.reader(io.StringIO(confusion_csv(matrix, names), newline="")))
    assert rows[0][0] == "true class"
    assert rows[0][1:] == [row[0] for row in rows[1:]]
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == matrix.tolist()
    assert not any(name.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for name in rows[0])
    back = [name[1:] if name.lstrip("'")[:1] in tuple("=+-@\t\r\n") else name for name in rows[0][1:]]
    assert back == names


def test_confusion_csv_of_plain_names():
    assert confusion_csv(np.array([[3, 1], [0, 2]]), ["ant", "bee"]) == (
        '"true class","ant","bee"\n"ant",3,1\n"bee",0,2\n'
    )


# curves.svg

SVG = "{http://www.w3.org/2000/svg}"


def row(epoch, train_loss, val_loss=None, val_accuracy=None, kept=True):
    return {
        "epoch": epoch,
        "step": 9 * epoch,
        "lr": 0.001,
        "train_loss": train_loss,
        "train_accuracy": 0.5,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "kept": kept,
        "images_per_s": 100.0,
        "time_s": 1.0,
    }


def falling(n):
    return [row(e, 2.3 * 0.9**e, 2.4 * 0.95**e + 0.1 * (e % 2), 1 - 0.8 * 0.9**e) for e in range(1, n + 1)]


def line(root, name):
    found = [p for p in root.iter(f"{SVG}polyline") if p.get("class") == name]
    return [tuple(map(float, pair.split(","))) for p in found for pair in p.get("points").split()]


def texts(root):
    return [(element.text, element) for element in root.iter(f"{SVG}text")]


def axis(root, anchor, column):
    """(place, number) of the tick labels: of a y-axis those that end left of `column`, of the x-axes all."""
    found = []
    for text, element in texts(root):
        if element.get("text-anchor") == anchor and text and text.lstrip("-").replace(".", "").isdigit():
            x, y = float(element.get("x")), float(element.get("y"))
            if anchor == "middle" and column <= x <= column + 280:
                found.append((x, float(text)))
            if anchor == "end" and column - 8 <= x < column:
                found.append((y - 4, float(text)))
    return found


def at(ticks, value):
    """Where the tick labels say that the value is."""
    (place0, value0), (place1, value1) = ticks[0], ticks[-1]
    return place0 + (place1 - place0) * (value - value0) / (value1 - value0)


@pytest.mark.parametrize("n", [2, 5, 60, 1000])
def test_every_epoch_is_drawn_where_the_axes_say(n):
    history = falling(n)
    root = ET.fromstring(curves_svg(history, "a run"))
    for name, left, factor in (("train_loss", 56, 1), ("val_loss", 56, 1), ("val_accuracy", 420, 100)):
        places, epochs, values = line(root, name), axis(root, "middle", left), axis(root, "end", left)
        assert len(places) == n
        assert all(a[0] < b[0] for a, b in pairwise(places))
        for (x, y), data in zip(places, history, strict=True):
            assert x == pytest.approx(at(epochs, data["epoch"]), abs=0.011)
            assert y == pytest.approx(at(values, factor * data[name]), abs=0.011)
            assert left <= x <= left + 280
            assert 90 <= y <= 304
        numbers = [factor * data[name] for data in history]
        assert min(y for _, y in places) == places[numbers.index(max(numbers))][1]
        assert max(y for _, y in places) == places[numbers.index(min(numbers))][1]


@pytest.mark.parametrize("low", [0.0, 1e-6, 0.013, 0.9, 57.3])
@pytest.mark.parametrize("span", [0.0, 1e-5, 0.04, 1.0, 93.0, 1e7])
def test_ticks_are_nice_distinct_and_hold_the_data(low, span):
    root = ET.fromstring(curves_svg([row(1, low + span), row(2, low)], "a run"))
    ticks = axis(root, "end", 56) or [(0.0, 0.0)]
    labels = [t for t, e in texts(root) if e.get("text-anchor") == "end" and float(e.get("x")) < 56]
    assert 2 <= len(labels) <= 8
    assert len(set(labels)) == len(labels)
    assert all(len(label) <= 8 for label in labels)
    if 0.01 <= low + span < 1e5 and span > 1e-3:
        steps = {round(b[1] - a[1], 9) for a, b in pairwise(ticks)}
        assert len(steps) == 1
        assert f"{steps.pop():e}"[0] in "125"
        assert ticks[0][1] <= low
        assert low + span <= ticks[-1][1] + 1e-9


def test_axes_stay_within_what_is_possible():
    for value in (0.0, 1.0):
        root = ET.fromstring(curves_svg([row(e, 0.0, 0.0, value) for e in (1, 2)], "a run"))
        loss, accuracy = axis(root, "end", 56), axis(root, "end", 420)
        assert 0 == loss[0][1] < loss[-1][1]
        assert 0 <= accuracy[0][1] < accuracy[-1][1] <= 100


def test_one_epoch_is_drawn_as_dots():
    root = ET.fromstring(curves_svg([row(1, 2.0, 2.1, 0.25)], "a run"))
    (x, y), (_, val_y) = line(root, "train_loss") + line(root, "val_loss")
    dots = {(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle") if c.get("fill") != "none"}
    assert {(x, y), (x, val_y)} <= dots
    assert x == 56 + 140
    assert [number for _, number in axis(root, "middle", 56)] == [1]


def test_history_without_validation():
    svg = curves_svg([row(e, 1 / e) for e in range(1, 6)], "a run")
    root = ET.fromstring(svg)
    assert len(line(root, "train_loss")) == 5
    assert line(root, "val_loss") == line(root, "val_accuracy") == []
    words = [text for text, _ in texts(root)]
    assert "no validation images" in words
    assert [axis(root, "end", 420)[i][1] for i in (0, -1)] == [0, 100]
    assert "validation" not in words  # no legend for a line that is not there
    assert "kept" not in svg
    assert "no validation images" not in curves_svg(falling(3), "a run")


def test_missing_and_infinite_values_are_left_out():
    history = [row(1, 2.0, 2.0, 0.3), row(2, math.inf, None, None), row(3, math.nan, 1.0, 0.6)]
    root = ET.fromstring(curves_svg(history, "a run"))
    assert len(line(root, "train_loss")) == 1
    assert [x for x, _ in line(root, "val_loss")] == [56, 336]
    assert [x for x, _ in line(root, "val_accuracy")] == [420, 700]


def test_kept_epoch_is_marked_on_its_point():
    history = [row(1, 2.0, 2.0, 0.5), row(2, 1.0, 1.5, 0.75), row(3, 0.5, 1.7, 0.25, kept=False)]
    root = ET.fromstring(curves_svg(history, "a run"))
    rings = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle") if c.get("class") == "kept"]
    assert line(root, "val_accuracy")[1] in rings
    assert "kept: epoch 2, 75.0 %" in [text for text, _ in texts(root)]


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([(0.5, True), (0.7, True), (0.2, False)], 2),
        ([(0.7, True), (0.7, True)], 2),
        ([(None, True)], None),
        ([], None),
    ],
)
def test_kept_epoch(rows, kept):
    assert kept_epoch([row(i + 1, 1.0, 1.0, *pair) for i, pair in enumerate(rows)]) == kept


@pytest.mark.parametrize(
    "title", ['</text><script>alert("1")</script>&amp; <', "a\x00b\x1b\ud800\uffff", "x" * 500, "漢" * 99, ""]
)
def test_any_title_gives_well_formed_xml(title):
    svg = curves_svg(falling(3), title)
    root = ET.fromstring(svg.encode("utf-8"))
    assert root.find(f"{SVG}title").text in (("".join(c if c.isprintable() else "\ufffd" for c in title)), None)
    assert not list(root.iter(f"{SVG}script"))
    heading = texts(root)[0][0] or ""
    assert cell_len(heading) <= 80
    assert title.isprintable() is False or heading == title or heading.endswith("…")


def test_svg_brings_its_background_and_loads_nothing():
    svg = curves_svg(falling(3), "a run")
    root = ET.fromstring(svg)
    assert (root.get("width"), root.get("height")) == ("720", "360")
    first = next(root.iter(f"{SVG}rect"))
    assert (first.get("width"), first.get("height"), first.get("fill")) == ("720", "360", "#ffffff")
    assert svg.count("http") == 1  # the name space
    assert {"Loss (nats)", "Validation accuracy (%)", "epoch", "training", "validation"} <= {t for t, _ in texts(root)}


def test_no_epochs_is_an_error():
    with pytest.raises(ValueError, match="curves_svg: expected at least one epoch, 0 were given"):
        curves_svg([], "a run")
