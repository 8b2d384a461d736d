"""What to adapt, and at which learning rate: python benchmarks/target_rates.py CIFAR100 --csv FILE

CIFAR100 is a folder with cifar100-train.zip and cifar100-test.zip, CLASS/NUMBER.webp in each. Five development tasks,
none of them one that the README reports on, so that a default chosen here has not seen their test images: three of
random classes of CIFAR-100 (10, 10 and 20), one of 10 more in grey and inverted, and scikit-learn's digits. 5 shots,
3 seeds, 15 epochs of batches of 16, test on 600 to 1,200 images.

Rows are appended to the CSV as they come, and a row that is there already is not computed again.
"""

import argparse
import csv
import random
import tempfile
import zipfile
from datetime import date
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rich.console import Console

from kadapt_cli.config import TrainConfig
from kadapt_cli.data import open_images
from kadapt_cli.evaluate import load_backbone, logits
from kadapt_cli.progress import Display
from kadapt_cli.session import Material, prepare
from kadapt_cli.train import fit

TASKS = {"plain1": (0, 10), "plain2": (10, 20), "fine20": (20, 40), "negative": (40, 50)}  # of the shuffled classes
SETTINGS = (  # method, targets, learning rate
    ("kadaptation", "q,v", 1e-3),
    ("kadaptation", "q,v", 4e-3),
    ("kadaptation", "attn,mlp", 1e-3),
    ("kadaptation", "attn,mlp", 4e-3 / 3),
    ("kadaptation", "attn,mlp", 4e-3),
    ("attention", "q,v", 1e-3),
    ("ssf", "q,v", 2e-2),
    *(("lora", "attn,mlp", lr) for lr in (5e-4, 2e-3, 4e-3)),
    *(("lokr", "attn,mlp", lr) for lr in (5e-4, 2e-3, 8e-3)),
)
COUNTS = {"train": 30, "test": 60}  # images a class
DIGITS = 600


def make(source: Path, folder: Path) -> None:
    """Write the tasks as folders of PNG files."""
    archives = {split: zipfile.ZipFile(source / f"cifar100-{split}.zip") for split in COUNTS}
    classes = sorted({name.split("/")[0] for name in archives["train"].namelist()})
    random.Random(0).shuffle(classes)
    for task, (first, last) in TASKS.items():
        for name in classes[first:last]:
            for split, archive in archives.items():
                (folder / task / split / name).mkdir(parents=True)
                members = sorted(m for m in archive.namelist() if m.startswith(f"{name}/"))
                for member in members[: COUNTS[split]]:
                    with archive.open(member) as file:
                        image = Image.open(file).convert("RGB")
                    if task == "negative":
                        image = ImageOps.invert(ImageOps.grayscale(image)).convert("RGB")
                    image.save(folder / task / split / name / f"{Path(member).stem}.png")


def measure(material: Material, config: TrainConfig) -> tuple[float, int]:
    """Test accuracy, and how many numbers the adapter trains."""
    quiet = Display(Console(stderr=True), quiet=True)
    session = prepare(config, None, quiet, material=material)
    fit(session, quiet)
    values, labels = logits(session.module, material.plain("test"), session.device, session.dtype)
    return (values.argmax(1) == labels).double().mean().item(), sum(p.numel() for p in session.adapted.adapter.values())


def main() -> None:
    """Fill the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cifar100", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    keys = ("method", "targets", "lr", "task", "seed")
    done = set()
    if options.csv.exists():
        with options.csv.open(newline="") as file:
            done = {tuple(row[key] for key in keys) for row in csv.DictReader(file)}
    backbone = load_backbone(TrainConfig())
    with tempfile.TemporaryDirectory() as folder, options.csv.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            writer.writerow([*keys, "accuracy", "adapter", "date", "torch"])
        make(options.cifar100, Path(folder))
        for task in (*TASKS, "demo"):
            data = "demo" if task == "demo" else str(Path(folder) / task)
            for seed in range(3):
                images = open_images(data, shots=5, seed=seed, val="none")
                images.splits["test"] = images.splits["test"][: DIGITS if task == "demo" else None]
                material = Material(images, backbone)
                for method, targets, lr in SETTINGS:
                    row = (method, targets, f"{lr:.2g}", task, str(seed))
                    if row not in done:
                        config = TrainConfig(
                            data=data, shots=5, seed=seed, val="none", epochs=options.epochs, batch_size=16,
                            method=method, targets=tuple(targets.split(",")), lr=lr,
                        )  # fmt: skip
                        accuracy, adapter = measure(material, config)
                        writer.writerow([*row, f"{accuracy:.4f}", adapter, date.today(), torch.__version__])
                        file.flush()


if __name__ == "__main__":
    main()
