"""The benchmark scripts run, and their rows say what they should."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
