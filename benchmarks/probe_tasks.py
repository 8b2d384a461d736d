"""What probe-id finds on small tasks, and what that is worth: python benchmarks/probe_tasks.py TASKS --out DIR

TASKS is a folder of image sets. Each is probed with kadapt probe-id, 10 epochs of batches of 8, seed 0: attention and
MLP of each block, or of all blocks together, at the d of DIMS and around the crossing. Then kadaptation is trained for
15 epochs of batches of 16, with its default rate, on what the probe selects, by either ranking, on the complement of
the first, on random selections of as many attention and MLP modules as the first, and on the default q and v; 3 seeds.
DIR keeps probes and comparisons, so that the same command goes on; probe.csv and probe_selection.csv are made of them
anew.
"""

import argparse
import csv
import random
from pathlib import Path
from typing import Any, Literal

from kadapt_cli import compare
from kadapt_cli.compare.grid import Grid
from kadapt_cli.config import PROBE_BATCH_SIZE, PROBE_EPOCHS, TrainConfig
from kadapt_cli.probe import CSV, Plan, probe
from kadapt_cli.probe.dimension import ranked
from kadapt_cli.progress import Display, new_console

PROBES: tuple[tuple[str, int, int, Literal["block", "model"]], ...] = (  # task, shots, folds, per
    ("sign_digits", 5, 5, "block"),
    ("flowers5", 20, 2, "block"),
    ("wbc_subtypes", 10, 2, "block"),
    ("trashnet", 20, 2, "block"),
    ("sign_digits", 20, 2, "model"),
    ("flowers5", 20, 2, "model"),
    ("wbc_subtypes", 10, 2, "model"),
    ("trashnet", 20, 2, "model"),
)
DIMS = tuple(8**k for k in range(1, 6))
RANDOM = 4  # selections
SEEDS = (0, 1, 2)
Row = dict[str, Any]


def measure(tasks: Path, out: Path, display: Display) -> tuple[list[Row], dict[tuple[str, int], Row]]:
    """All trials as rows of probe.csv, and the documents of the probes block by block."""
    rows: list[Row] = []
    documents = {}
    for task, shots, folds, per in PROBES:
        base = TrainConfig(
            data=str(tasks / task), shots=shots, method="subspace", augment="none",
            epochs=PROBE_EPOCHS, batch_size=PROBE_BATCH_SIZE,
        )  # fmt: skip
        place = out / f"{task}-{shots}-{per}"
        document = probe(Plan(base, per=per, dims=DIMS, folds=folds), place, display)
        about = {"task": task, "shots": shots, "folds": folds, "images": document["images"]}
        with (place / CSV).open(newline="") as file:
            rows += [about | row for row in csv.DictReader(file)]
        if per == "block":
            documents[task, shots] = document
    return rows, documents


def selections(document: Row) -> dict[str, list[str]]:
    """What is compared with a probe's selection, the same modules never twice."""
    groups = {module["name"]: module["group"] for module in document["modules"]}
    chosen = document["selected"]
    found = {"selection": chosen, "complement": [name for name in groups if name not in chosen]}
    draw = random.Random(0)
    while len(found) < 2 + RANDOM:
        some: list[str] = []
        for group in dict.fromkeys(groups.values()):
            names = [name for name in groups if groups[name] == group]
            some += draw.sample(names, sum(name in chosen for name in names))
        if sorted(some) not in map(sorted, found.values()):
            found[f"random{len(found) - 1}"] = some
    by_full = [module["name"] for module in ranked(document["modules"], "d90_full")][: len(chosen)]
    if by_full and sorted(by_full) not in map(sorted, found.values()):
        found["selection by full"] = by_full
    return found | {"default": ["q", "v"]}


def train(tasks: Path, out: Path, documents: dict[tuple[str, int], Row], display: Display) -> list[Row]:
    """Rows of probe_selection.csv."""
    rows: list[Row] = []
    for (task, shots), document in documents.items():
        if not document["selected"]:
            continue
        wanted = selections(document)
        methods = {f"kadaptation@{','.join(names)}": what for what, names in wanted.items()}
        base = TrainConfig(shots=shots, epochs=15, batch_size=16)
        grid = Grid(data=(str(tasks / task),), methods=tuple(methods), seeds=SEEDS, base=base)
        found = compare.compare(grid, out / f"{task}-selection", display, storage=None, jobs=1, m0=1e8)
        for row in found.document["rows"]:
            what = methods[row["method"]]
            about = {"task": task, "shots": shots, "seed": row["seed"], "what": what, "modules": ";".join(wanted[what])}
            rows.append(about | {key: row[key] for key in ("accuracy", "adapter", "lr")} | {"epochs": 15})
    return rows


def write(file: Path, rows: list[Row]) -> None:
    """Write rows of the same keys."""
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Fill both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    display = Display(new_console(stderr=True))
    rows, documents = measure(options.tasks, options.out, display)
    write(options.out / "probe.csv", rows)
    write(options.out / "probe_selection.csv", train(options.tasks, options.out, documents, display))


if __name__ == "__main__":
    main()
