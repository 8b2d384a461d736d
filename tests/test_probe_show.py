"""How a probe is shown: probe.csv, the table at any width and encoding, probe.svg, and the board while it runs."""

import csv
import io
import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from kadapt_cli.probe import show
from kadapt_cli.progress import print_line

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ["[red]a[/red]", ":rose:", "=cmd|' /C calc'!A1", "<script>&\"'", "a\x1b[31mb", "two\nlines", "[/]", "漢字"]
DIMS = (4, 16, 64, 256)


def module(name="blocks.0.attn", group="attn", block=0, scores=(0.4, 0.5, 0.6, 0.7), direct=0.7, seeds=(0,), **more):
    trials = [
        {"d": d, "seed": s, "lr": 0.01, "score": score + 0.02 * s}
        for s in seeds
        for d, score in [*zip(DIMS, scores, strict=False), ("direct", direct)]
    ]
    found = {"d90": 84.6, "d90_low": 64, "d90_high": 256, "d90_full": None, "reason": ""}
    return (
        {"name": name, "group": group, "block": block, "D": 147456, "direct": direct, "trials": trials} | found | more
    )


def unknown(name, reason="no d up to 256 reached its target with every seed", **more):
    return module(name, **{"d90": None, "d90_low": 256, "d90_high": None, "reason": reason, **more})


def document(*modules, **more):
    settings = {"shots": 5, "images": 510, "metric": "accuracy", "folds": 5, "epochs": 30, "projection": "fastfood"}
    plan = {"seeds": [0], "said": False, "threshold": 0.9, "above": "zero", "selected": []}
    baseline = {"full": 0.75, "head": 0.4, "chance": 0.1}
    whole = [{"name": "full", "d": "direct", "seed": 0, "lr": 0.001, "score": 0.75}]
    baseline |= {"trials": [*whole, {"name": "head", "d": 0, "seed": 0, "lr": 0.01, "score": 0.4}]}
    about = {"schema_version": 1, "data": "flowers", "model": "deit_tiny", "baseline": baseline}
    return {**about, **settings, **plan, "modules": list(modules) or [module()], **more}


def twelve(**more):
    parts = [(group, block) for group in ("attn", "mlp") for block in range(6)]
    return document(*(module(f"blocks.{b}.{g}", g, b, d90=3.0 ** (b + 2), **more) for g, b in parts))


def shown(found, width=80, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    Console(width=width, file=stream, legacy_windows=False).print(show.table(found))
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


def row_of(text, name):
    """The cells of a module's row; an ASCII table has a | between them."""
    return next(line.replace("|", " ").split() for line in text.splitlines() if line.startswith(f"{name} "))


def texts(root):
    return [text.text for text in root.iter(f"{SVG}text")]


# probe.csv


def test_csv_has_every_trial_as_it_was_measured():
    found = document(module(seeds=(0, 1)), module("mlp", "mlp", None, D=99))
    text = show.trials_csv(found)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["module", "group", "block", "D", "d", "seed", "lr", "score"]
    trials = [(m, trial) for m in found["modules"] for trial in m["trials"]]
    assert len(rows) == len(trials) + 2 == 17
    assert list(rows[-2].values()) == ["full", "", "", "", "direct", "0", "0.001", "0.75"]
    assert list(rows[-1].values()) == ["head", "", "", "", "0", "0", "0.01", "0.4"]
    for row, (m, trial) in zip(rows, trials, strict=False):
        assert (row["module"], row["group"], row["D"]) == (m["name"], m["group"], str(m["D"]))
        assert row["block"] == ("" if m["block"] is None else str(m["block"]))
        assert (row["d"], row["seed"]) == (str(trial["d"]), str(trial["seed"]))
        assert (float(row["lr"]), float(row["score"])) == (trial["lr"], trial["score"])
    assert "direct" in {row["d"] for row in rows}
    assert "\r" not in text
    assert text.endswith("\n")


def test_csv_holds_no_formula_and_gives_names_back():
    names = [*HOSTILE, "@SUM(A1)", "'=1", "\t=1"]
    rows = list(csv.reader(io.StringIO(show.trials_csv(document(*(module(name, group=name) for name in names))))))
    for column in (0, 1):
        read = list(dict.fromkeys(row[column] for row in rows[1:-2]))
        assert not any(name.startswith(("=", "+", "-", "@", "\t")) for name in read)
        assert [name[1:] if re.match("'+[=@\t]", name) else name for name in read] == names


# The table


def test_table_has_the_numbers_of_each_module():
    text = shown(
        document(
            module(), module("blocks.1.mlp", "mlp", 1, d90=12345.6, d90_low=4096, d90_full=9e4, D=294912, direct=0.655)
        )
    )
    header = text.splitlines()[0].split()
    assert header == ["submodule", "D", "d90", "low", "high", "full", "d90/D", "%", "direct", "curve"]
    assert row_of(text, "blocks.0.attn")[1:8] == ["147,456", "85", "64", "256", "–", "0.057", "70.0"]
    assert row_of(text, "blocks.1.mlp")[1:8] == ["294,912", "12,346", "4,096", "256", "90,000", "4.2", "65.5"]
    assert "full fine-tuning 75.0%, head alone 40.0%, chance 10.0%" in text
    assert "scores: accuracy in %, 5-fold cross-validation on 510 images" in text


def test_small_dimensions_do_not_look_like_the_head_alone():
    alone = {"d90": 0.0, "d90_low": 0, "d90_high": 0, "reason": "the head alone reaches the target"}
    text = shown(document(module("a", d90=0.37, d90_low=0, d90_high=4), module("b", **alone)))
    assert row_of(text, "a")[2:5] == ["0.37", "0", "4"]
    assert row_of(text, "b")[2:7] == ["0", "0", "0", "–", "0"]
    assert "b: the head alone reaches the target" in text


def test_sparkline_goes_from_chance_to_the_best_score_of_the_document():
    low = module("a", scores=(0.05, 0.1, 0.2, 0.8), direct=0.8)
    high = module("b", scores=(0.1, 0.5, 0.8, 0.3), direct=0.3)
    found = document(low, high)
    assert row_of(shown(found), "a")[-1] == "▁▁▂█"
    assert row_of(shown(found), "b")[-1] == "▁▅█▃"
    assert row_of(shown(found, encoding="ascii"), "a")[-1] == "0019"
    top = document(low, high, baseline={"full": 0.9, "head": 0.4, "chance": 0.1})
    assert row_of(shown(top), "a")[-1] == "▁▁▂▇"  # the best is full fine-tuning
    flat = document(module("a", scores=(0.1,) * 4, direct=0.1), baseline={"full": 0.1, "head": 0.1, "chance": 0.1})
    assert row_of(shown(flat), "a")[-1] == "▁▁▁▁"


def test_sparkline_is_the_mean_over_the_seeds_in_order_of_d():
    trials = [(64, 0, 0.8), (64, 1, 0.4), (4, 0, 0.1), (4, 1, 0.1), (16, 0, 0.9), (4, 7, 0.9)]
    trials = [{"d": d, "seed": s, "lr": 0.1, "score": score} for d, s, score in trials]
    found = document(module("a", trials=trials, direct=0.6), seeds=[0, 1])
    found["baseline"] = {"full": 0.8, "head": 0.4, "chance": 0.1}
    assert row_of(shown(found), "a")[-1] == "▁▆"  # 16 has one seed only, seed 7 is of another probe
    assert "mean over 2 seeds" in shown(found)


def test_unknown_dimensions_are_dashes_with_their_reasons_grouped():
    other = "trained directly it scores 10.2%, no better than chance (13.1% at 95 %)"
    text = shown(document(unknown("a"), module("b"), unknown("c", other, d90_low=None), unknown("d")), width=120)
    assert row_of(text, "a")[2:6] == ["–", "256", "–", "–"]
    assert row_of(text, "c")[2:6] == ["–"] * 4
    assert "a, d: no d up to 256 reached its target with every seed" in text.splitlines()
    assert f"c: {other}" in text.splitlines()
    assert text.count("reached its target") == 1
    assert row_of(shown(document(unknown("a")), encoding="ascii"), "a")[2] == "-"


@pytest.mark.parametrize(
    ("width", "kept"), [(80, "D d90 low high full d90/D % direct curve"), (40, "d90 direct curve")]
)
def test_columns_that_do_not_fit_are_left_out_and_numbers_stay_whole(width, kept):
    found = twelve(d90_low=16384, d90_high=65536)
    text = shown(found, width)
    assert text.splitlines()[0].split()[1:] == kept.split()
    for m in found["modules"]:
        row = row_of(text, m["name"])
        assert f"{m['d90']:,.0f}" in row
        assert "70.0" in row
        assert ("147,456" in row) == ("16,384" in row) == ("65,536" in row) == (width == 80)
    assert "…" not in text
    assert ("low, high:" in text) == (width == 80)


def test_a_curve_of_many_d_makes_room_for_the_numbers():
    trials = [{"d": d, "seed": 0, "lr": 0.1, "score": 0.5} for d in range(1, 90)]
    text = shown(document(module(trials=trials)))
    assert text.splitlines()[0].split() == ["submodule", "D", "d90", "low", "high", "full", "d90/D", "%", "direct"]
    assert "curve" not in text


@pytest.mark.parametrize("width", [120, 40])
def test_names_in_the_table_are_not_interpreted(width):
    text = shown(document(*(module(name) for name in HOSTILE), selected=HOSTILE), width)
    for name in ("[red]a[/red]", ":rose:", "<script>&\"'", r"a\x1b[31mb", r"two\nlines", "[/]", "漢字"):
        assert text.count(name) >= 2  # a row and the selection
    assert "\x1b" not in text


def test_threshold_and_what_it_is_a_share_of():
    words = " ".join(shown(document(threshold=0.8)).split())
    assert "d80: the smallest d that reaches 80% of the score of training the weights directly" in words
    assert "d90" not in words
    words = " ".join(shown(document(above="head", folds=1)).split())
    assert "reaches 90% of what training the weights directly gains over the head alone" in words
    assert "validation on 510 images" in words
    assert "cross-validation" not in words


def test_selection_is_listed_in_its_order():
    assert "selected: b, a\n" in shown(document(module("a"), module("b"), selected=["b", "a"]))
    assert "selected: nothing\n" in shown(document(unknown("a")))


def test_ascii_console_gets_nothing_else():
    assert shown(document(unknown("a"), module("b"), above="head"), encoding="ascii")  # strict: raises at another one


# probe.svg


def points(root, kind):
    lines = [line.get("points") for line in root.iter(f"{SVG}polyline") if line.get("class") == kind]
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def cells(root):
    """The words, the colour and the place of each cell of the map, by the name in its tooltip."""
    found = {}
    for cell in (g for g in root.iter(f"{SVG}g") if g.get("class") == "cell"):
        rect, words = cell.find(f"{SVG}rect"), cell.find(f"{SVG}text").text
        name = cell.find(f"{SVG}title").text.split(":")[0]
        found[name] = (words, rect.get("fill"), float(rect.get("x")), float(rect.get("y")))
    return found


def test_lines_stand_at_log_d_and_at_their_score():
    found = document(module("a", scores=(0.4, 0.5, 0.6, 0.7), direct=0.7, D=1024))
    (line,) = points(ET.fromstring(show.picture(found)), "module")
    xs, ys = zip(*line, strict=True)
    assert len(line) == 5
    for x, d in zip(xs, (0, *DIMS), strict=True):
        assert (x - xs[0]) / (show.RIGHT - show.LEFT) == pytest.approx(math.log1p(d) / math.log1p(1024), abs=1e-3)
    assert ys[0] == ys[1]  # the head alone, and d = 4 with the same score
    assert ys[1] - ys[2] == pytest.approx(ys[3] - ys[4], abs=0.02)
    assert ys[1] > ys[2]
    dot = next(ET.fromstring(show.picture(found)).iter(f"{SVG}circle"))
    assert (float(dot.get("cx")), float(dot.get("cy"))) == (show.RIGHT, ys[4])


def test_baselines_are_dashed_at_their_score_and_named():
    root = ET.fromstring(show.picture(document(module(scores=(0.1, 0.4, 0.75, 0.7)))))
    dashed = [line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray") != "none"]
    (line,) = points(root, "module")
    assert sorted(float(rule.get("y1")) for rule in dashed) == sorted(y for _, y in line[1:4])
    assert {"full fine-tuning 75.0 %", "head alone 40.0 %", "chance 10.0 %"} <= set(texts(root))


@pytest.mark.parametrize(
    "baseline", [(0.41, 0.405, 0.4), (0.1, 0.1, 0.1), (0.9, 0.88, 0.1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
)
def test_names_of_baselines_do_not_collide(baseline):
    found = document(baseline=dict(zip(("full", "head", "chance"), baseline, strict=True)))
    root = ET.fromstring(show.picture(found))
    starts = ("full fine-tuning", "head alone", "chance ")
    heights = sorted(float(t.get("y")) for t in root.iter(f"{SVG}text") if t.text.startswith(starts))
    assert len(heights) == 3
    assert min(b - a for a, b in pairwise(heights)) >= 14
    axis = max(float(line.get("y1")) for line in root.iter(f"{SVG}line"))
    assert heights[-1] <= axis + 5


def test_groups_have_a_colour_a_name_and_their_mean():
    found = document(
        module("blocks.0.attn", "attn", 0, (0.4, 0.5)),
        module("blocks.1.attn", "attn", 1, (0.6, 0.7)),
        module("blocks.0.mlp", "mlp", 0, (0.2, 0.3)),
    )
    root = ET.fromstring(show.picture(found))
    first, second, third = points(root, "module")
    mean, other = points(root, "group")
    assert mean == [(x, pytest.approx((a + b) / 2, abs=0.01)) for (x, a), (_, b) in zip(first, second, strict=True)]
    assert other == third
    strokes = [
        g.get("stroke")
        for g in root.iter(f"{SVG}g")
        for line in g.iter(f"{SVG}polyline")
        if line.get("class") != "halo"
    ]
    assert strokes[0] == strokes[1] == strokes[3] != strokes[2] == strokes[4]
    assert {"attn", "mlp"} <= set(texts(root))


def test_mean_of_a_group_leaves_out_what_one_module_did_not_try():
    one = module("blocks.0.attn", "attn", 0, (0.4, 0.5, 0.6))
    two = module("blocks.1.attn", "attn", 1, (0.4, 0.5))
    root = ET.fromstring(show.picture(document(one, two)))
    assert [len(line) for line in points(root, "group")] == [3]  # the head alone, 4 and 16


def test_map_has_a_cell_for_each_group_and_block():
    found = twelve()
    found["modules"][3] = unknown("blocks.3.attn", block=3)
    found["selected"] = ["blocks.1.mlp"]
    root = ET.fromstring(show.picture(found))
    drawn = cells(root)
    assert [drawn[f"blocks.{b}.attn"][0] for b in range(6)] == ["9", "27", "81", "–", "729", "2.2k"]
    for m in found["modules"]:
        _, _, x, y = drawn[m["name"]]
        assert x == pytest.approx(drawn["blocks.0.attn"][2] + show.CELL * m["block"], abs=0.02)
        assert y == drawn["blocks.0.mlp" if m["group"] == "mlp" else "blocks.0.attn"][3]
    assert drawn["blocks.0.attn"][3] < drawn["blocks.0.mlp"][3]
    assert set("012345") <= set(texts(root))
    frames = [r for r in root.iter(f"{SVG}rect") if r.get("class") == "selected"]
    _, _, x, y = drawn["blocks.1.mlp"]
    assert frames
    assert all(0 < float(r.get("x")) - x < 4 and 0 < float(r.get("y")) - y < 4 for r in frames)
    assert "–: unknown; the reason is in the tooltip and in probe.json" in texts(root)


def test_map_is_darker_by_the_logarithm_of_d():
    modules = [module(f"b{i}", block=i, d90=math.expm1(2.0 * i)) for i in range(5)]
    fills = [fill for _, fill, _, _ in cells(ET.fromstring(show.picture(document(*modules)))).values()]
    assert fills == ["#{:02x}{:02x}{:02x}".format(*shade) for shade in show.SHADES]
    brightness = [sum(shade) for shade in show.SHADES]
    assert brightness == sorted(brightness, reverse=True)


def test_numbers_of_the_map_have_at_most_four_characters():
    values = (0, 0.012, 0.37, 3.96, 9.96, 84.6, 999.4, 999.6, 1234, 9960, 65536, 999_400, 999_600, 85e6)
    words = ["0", "<0.1", "0.37", "4", "10", "85", "999", "1k", "1.2k", "10k", "66k", "999k", "1M", "85M"]
    drawn = cells(
        ET.fromstring(show.picture(document(*(module(f"b{i}", block=i, d90=v) for i, v in enumerate(values)))))
    )
    assert [drawn[f"b{i}"][0] for i in range(len(values))] == words
    assert all(len(word) <= 4 for word in words)


def test_candidates_over_all_blocks_are_one_column_with_whole_numbers():
    found = document(module("attn", "attn", None, d90=4114.2), module("mlp", "mlp", None, d90=218.0))
    root = ET.fromstring(show.picture(found))
    drawn = cells(root)
    assert [drawn[name][0] for name in ("attn", "mlp")] == ["4,114", "218"]
    assert drawn["attn"][2] == drawn["mlp"][2]
    assert "d90 of all blocks" in texts(root)
    assert not any("thick" in text for text in texts(root))


@pytest.mark.parametrize("d90", [None, 0.0, 7.0])
def test_picture_without_a_range_of_dimensions_has_no_scale(d90):
    root = ET.fromstring(show.picture(document(*(unknown(f"b{i}", block=i, d90=d90, d90_high=256) for i in range(3)))))
    words = "–" if d90 is None else f"{d90:.0f}"
    assert [cell[0] for cell in cells(root).values()] == [words] * 3
    assert not list(root.iter(f"{SVG}linearGradient"))


@pytest.mark.parametrize("groups", [2, 6, 16])
def test_everything_lies_within_the_picture(groups):
    blocks = 24 if groups == 6 else 3
    modules = [module(f"blocks.{b}.{g}", f"group number {g}", b) for g in range(groups) for b in range(blocks)]
    root = ET.fromstring(show.picture(document(*modules)))
    width, height = float(root.get("width")), float(root.get("height"))
    for text in root.iter(f"{SVG}text"):
        x, y, wide = float(text.get("x")), float(text.get("y")), 0.5 * len(text.text) * float(text.get("font-size"))
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
        assert left >= 0, text.text
        assert left + wide <= width, text.text
        assert 0 < y <= height - 2
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height


@pytest.mark.parametrize("hostile", [*HOSTILE, "\ud800", "]]>", "x" * 500])
def test_picture_is_xml_whatever_the_names_are(hostile):
    found = document(module(hostile, hostile), model=hostile, data=hostile, selected=[hostile])
    found["modules"].append(unknown(hostile, reason=hostile, group=hostile, block=1))
    svg = show.picture(found)
    root = ET.fromstring(svg)
    assert not list(root.iter(f"{SVG}script"))
    readable, folder = ("".join(c if c.isprintable() else "\ufffd" for c in s) for s in (hostile, Path(hostile).name))
    assert root.find(f"{SVG}title").text == f"Local intrinsic dimension: {readable} on {folder}"
    assert any(cell.text.startswith(f"{readable}: D 147,456") for cell in root.iter(f"{SVG}title"))


def test_picture_brings_its_background_and_loads_nothing():
    svg = show.picture(document())
    assert f'<rect width="{ET.fromstring(svg).get("width")}"' in svg
    assert 'fill="#ffffff"/>' in svg
    assert not re.search(r"href|@import|<image|<style|url\((?!#)", svg)
    assert svg.count("http") == 1  # the name space


# The board


def terminal(width=80, height=25, **more):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, legacy_windows=False, **more)


def screen(text):
    """The lines a terminal would show in the end: understands cursor up, erase line and carriage return only."""
    lines, at = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            at -= int(up[1])
        elif part == "\x1b[2K":
            lines[at] = ""
        elif part[0] not in "\x1b\r":
            lines[at] += part
    return [line.rstrip() for line in lines]


ROWS = [
    {"name": "[red]a", "D": 147456, "direct": 0.612, "d90": 84.6, "d90_low": 64, "d90_high": 256},
    {"name": "b", "D": 99, "direct": None, "d90": None, "d90_low": None, "d90_high": None},
]


def test_board_shows_what_is_known_and_prints_lines_above():
    console = terminal()
    with show.Board(console, False, "d80") as board:
        board.show(ROWS, "blocks.3.attn, d = 256, seed 0 [bold]")
        print_line(console, "a line")
        lines = screen(console.file.getvalue())
        board.show(ROWS, "another")
        later = screen(console.file.getvalue())
    assert lines[0] == "a line"
    assert lines[1].split() == ["submodule", "D", "d80", "low", "high", "direct"]
    assert row_of("\n".join(lines), "[red]a") == ["[red]a", "147,456", "85", "64", "256", "61.2"]
    assert row_of("\n".join(lines), "b") == ["b", "99", "–", "–", "–"]
    assert "blocks.3.attn, d = 256, seed 0 [bold]" in lines
    assert "another" in later
    assert "blocks.3.attn, d = 256, seed 0 [bold]" not in later
    assert [line for line in screen(console.file.getvalue()) if line] == ["a line"]


def test_board_fits_its_terminal():
    console = terminal(width=40, height=12)
    rows = [{**ROWS[0], "name": f"blocks.{i}.attn"} for i in range(30)]
    with show.Board(console, False, "d80") as board:
        board.show(rows, "now")
        lines = screen(console.file.getvalue())
    assert len(lines) <= 12
    assert "now" in lines
    assert any(line.startswith("blocks.29.attn") for line in lines)
    assert all(cell_len(line) <= 40 for line in lines)


def test_board_is_silent_when_quiet_without_a_terminal_and_outside():
    quiet, plain, outside = terminal(), Console(file=io.StringIO()), terminal()
    for console, hush in ((quiet, True), (plain, False)):
        with show.Board(console, hush, "d90") as board:
            board.show(ROWS, "now")
        assert console.file.getvalue() == ""
    show.Board(outside, False, "d90").show(ROWS, "now")
    assert outside.file.getvalue() == ""


def test_board_leaves_a_terminal_as_it_was_after_an_error():
    console = terminal()
    board = show.Board(console, False, "d80")

    def interrupted():
        with board:
            board.show(ROWS, "now")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = console.file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    board.show(ROWS, "after")
    assert console.file.getvalue() == text
