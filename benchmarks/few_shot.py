"""KAdaptation against a linear probe on small real tasks: python benchmarks/few_shot.py TASKS --csv FILE

TASKS is a folder of image folders. For each task, number of shots and seed both methods get the same draw of training
and validation images and the same test images, the rest of the task. Nothing is chosen on the test images.

kadaptation   `kadapt train` at each learning rate and scale given, else at its defaults; the epoch is kept by
              validation. The pair with the highest mean validation accuracy is what the summary shows.
linear        scikit-learn's L-BFGS logistic regression on the frozen backbone's features, standardised; C is the best
              of seven in validation (the smaller of equals), and the test is of the fit on the training images alone.
linear+val    the same C, fitted on training and validation images.

Rows are appended to the CSV as they come, and a row that is there already is not computed again.
"""

import argparse
import csv
import itertools
import statistics
import sys
import tempfile
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kadapt_cli.adapters.kadaptation import LR as KADAPTATION_LR
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import open_images
from kadapt_cli.evaluate import logits
from kadapt_cli.models import load
from kadapt_cli.progress import Display
from kadapt_cli.tensors import ImageDataset, make_transform
from kadapt_cli.train import train

CHOICES_OF_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
KEYS = ("method", "task", "shots", "seed", "lr", "scale")


def linear_probe(task: Path, shots: int, seed: int) -> dict[str, dict[str, float]]:
    """Validation and test accuracy of both linear probes."""
    backbone = load("vit32")
    images = open_images(str(task), shots=shots, seed=seed)
    transform = make_transform(backbone.data_config, augment="none")
    found = {}
    for split in ("train", "val", "test"):
        features, labels = logits(backbone.module, ImageDataset(images, split, transform), torch.device("cpu"))
        found[split] = (features.numpy(), labels.numpy())
    scores = {}
    for c in CHOICES_OF_C:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(*found["train"])
        scores[c] = (probe.score(*found["val"]), -c, probe.score(*found["test"]))
    c = max(scores, key=lambda key: scores[key][:2])
    both = [np.concatenate(parts) for parts in zip(found["train"], found["val"], strict=True)]
    final = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(*both)
    return {
        "linear": {"val_accuracy": scores[c][0], "test_accuracy": scores[c][2]},
        "linear+val": {"val_accuracy": scores[c][0], "test_accuracy": final.score(*found["test"])},
    }


def kadaptation(task: Path, shots: int, seed: int, lr: float, scale: float | None) -> dict[str, float]:
    """Validation and test accuracy of `kadapt train` at a learning rate and scale (None: its own)."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(data=str(task), shots=shots, seed=seed, lr=lr, scale=scale)
        display = Display(Console(stderr=True), quiet=True)
        result = train(config, Path(folder) / "run", resume=False, display=display)
    return {f"{split}_accuracy": result["metrics"][split]["accuracy"] for split in ("val", "test")}


def main() -> None:
    """Fill the CSV and print the mean over tasks and seeds by method and shots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, nargs="+", default=[KADAPTATION_LR])
    parser.add_argument("--scale", type=float, nargs="+", default=[None])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", ConvergenceWarning)
    tasks = sorted(path for path in options.tasks.iterdir() if path.is_dir())
    rows = read(options.csv)
    done = {tuple(str(row[key]) for key in KEYS) for row in rows}
    for shots, seed, task in itertools.product(options.shots, options.seeds, tasks):
        if ("linear+val", task.name, str(shots), str(seed), "", "") not in done:
            for method, scores in linear_probe(task, shots, seed).items():
                rows.append(append(options.csv, (method, task.name, shots, seed, "", ""), scores))
        for lr, scale in itertools.product(options.lr, options.scale):
            key = ("kadaptation", task.name, shots, seed, lr, "" if scale is None else scale)
            if tuple(map(str, key)) not in done:
                rows.append(append(options.csv, key, kadaptation(task, shots, seed, lr, scale)))
    summarise(rows)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of the CSV, none when it is not there yet."""
    if not file.exists():
        return []
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def append(file: Path, key: tuple[Any, ...], scores: dict[str, float]) -> dict[str, Any]:
    """Add one row to the CSV, print it and return it."""
    row: dict[str, Any] = dict(zip(KEYS, key, strict=True))
    row |= {key: round(value, 4) for key, value in scores.items()}
    row |= {"date": date.today().isoformat(), "torch": torch.__version__, "timm": timm.__version__}
    new = not file.exists()
    with file.open("a", newline="") as text:
        writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(*row.values(), file=sys.stderr)
    return row


def summarise(rows: list[dict[str, Any]]) -> None:
    """Print mean validation accuracy by setting, then mean test accuracy of the chosen setting by task.

    Settings that were not run with all seeds, having been dropped on the way, are shown but not chosen.
    """
    tasks = sorted({row["task"] for row in rows})
    for shots in sorted({int(row["shots"]) for row in rows}):
        here = [row for row in rows if int(row["shots"]) == shots]
        settings: dict[str, list[dict[str, Any]]] = {}
        for row in here:
            if row["method"] == "kadaptation":
                settings.setdefault(f"lr {row['lr']} scale {row['scale'] or 'default'}", []).append(row)
        for name, chosen in sorted(settings.items()):
            seeds = " ".join(sorted({str(row["seed"]) for row in chosen}))
            print(f"{shots} shots, {name}, seeds {seeds}: validation {mean(chosen, tasks, 'val_accuracy'):.1f}")
        most = max(len(chosen) for chosen in settings.values())
        whole = {name: chosen for name, chosen in settings.items() if len(chosen) == most}
        best = max(whole, key=lambda name: mean(whole[name], tasks, "val_accuracy"))
        groups = {m: [r for r in here if r["method"] == m] for m in ("linear", "linear+val")}
        groups[f"kadaptation, {best}"] = whole[best]
        print(f"{shots:>2} shots, test" + " " * 25 + "".join(f"{task[:12]:>13}" for task in [*tasks, "mean"]))
        for name, chosen in groups.items():
            each = [mean(chosen, [task], "test_accuracy") for task in tasks]
            print(f"{name:39}" + "".join(f"{m:13.1f}" for m in [*each, mean(chosen, tasks, "test_accuracy")]))


def mean(rows: list[dict[str, Any]], tasks: list[str], key: str) -> float:
    """Mean over tasks of the mean over seeds, in %."""
    return 100 * statistics.mean(statistics.mean(float(r[key]) for r in rows if r["task"] == task) for task in tasks)


if __name__ == "__main__":
    main()
