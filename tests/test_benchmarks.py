"""The benchmark scripts run, and their rows say what they should."""

import csv
import io
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageOps

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_train_step_compares_all_contenders_in_one_run(tmp_path):
    command = [sys.executable, BENCHMARKS / "train_step.py", "--rounds", "1", "--batch-size", "4", "--threads", "1"]
    subprocess.run([*command, "--csv", tmp_path / "rows.csv"], check=True, capture_output=True)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    head = 10 * 193
    counts = {name: int(row["trained"]) - head for name, row in rows.items()}
    assert list(counts) == [
        "frozen, input gradient",
        "kadaptation",
        "peft LoRA r=32 on qkv",
        "peft LoKr r=32 on qkv",
        "full fine-tuning",
    ]
    assert counts["frozen, input gradient"] == 0
    assert counts["kadaptation"] == 9_856
    assert counts["peft LoRA r=32 on qkv"] == 6 * 32 * (192 + 576)
    assert counts["full fine-tuning"] == 2_691_648
    assert float(rows["frozen, input gradient"]["ratio_p50"]) == 1


def test_target_rates_makes_its_tasks_of_disjoint_classes(tmp_path):
    for split, count in (("train", 31), ("test", 2)):
        with zipfile.ZipFile(tmp_path / f"cifar100-{split}.zip", "w") as archive:
            for name in range(50):
                for number in range(count):
                    picture = io.BytesIO()
                    Image.new("RGB", (32, 32), (number, name, 9)).save(picture, "WEBP", lossless=True)
                    archive.writestr(f"class{name:02}/{number:04}.webp", picture.getvalue())
    scripts = runpy.run_path(str(BENCHMARKS / "target_rates.py"))
    scripts["make"](tmp_path, tmp_path / "tasks")
    found = {task: sorted(p.name for p in (tmp_path / "tasks" / task / "train").iterdir()) for task in scripts["TASKS"]}
    assert [len(names) for names in found.values()] == [10, 10, 20, 10]
    assert len({name for names in found.values() for name in names}) == 50
    some = found["plain1"][0]
    counts = [len(list((tmp_path / "tasks" / "plain1" / split / some).iterdir())) for split in ("train", "test")]
    assert counts == [30, 2]
    with Image.open(tmp_path / "tasks" / "plain1" / "train" / some / "0007.png") as image:
        assert image.getpixel((0, 0)) == (7, int(some[-2:]), 9)
    other = found["negative"][0]
    with Image.open(tmp_path / "tasks" / "negative" / "train" / other / "0000.png") as image:
        red, green, blue = image.getpixel((0, 0))
    grey = ImageOps.grayscale(Image.new("RGB", (1, 1), (0, int(other[-2:]), 9))).getpixel((0, 0))
    assert red == green == blue == 255 - grey


def test_random_selections_are_as_large_as_the_probes():
    names = [(f"blocks.{block}.{group}", group) for group in ("attn", "mlp") for block in range(6)]
    chosen = ["blocks.3.mlp", "blocks.0.attn", "blocks.5.attn"]
    document = {"modules": [{"name": name, "group": group} for name, group in names], "selected": chosen}
    for number, module in enumerate(document["modules"]):
        module |= {"d90_full": number + 1.0, "direct": 0.5}
    found = runpy.run_path(str(BENCHMARKS / "probe_tasks.py"))["selections"](document)
    assert list(found) == [
        "selection",
        "complement",
        "random1",
        "random2",
        "random3",
        "random4",
        "selection by full",
        "default",
    ]
    assert found["selection by full"] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert sorted(found["selection"] + found["complement"]) == sorted(name for name, _ in names)
    for name in ("selection", "random1", "random2", "random3", "random4"):
        assert sorted(part.split(".")[2] for part in found[name]) == ["attn", "attn", "mlp"]
    assert len({tuple(sorted(names)) for names in found.values()}) == len(found)
