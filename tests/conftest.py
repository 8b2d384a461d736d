"""Real photos for the tests: the shared image sets, and small labelled folders copied from them."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tests run in as many processes as there are cores, and fork: numpy and torch, which read this, must not start threads.
os.environ["OMP_NUM_THREADS"] = "1"
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be known before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
import numpy as np
import pytest
import timm
from PIL import Image
from timm.models import save_for_hf

from kadapt_cli import cli

ROWS = "fault trials"
TASKS = Path(__file__).parents[2] / "shared" / "data" / "tasks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="of the fault tests, a sample of the trials")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of fault trials: each test counts its own, the rows are summed over tests and processes."""
    totals: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        totals.update(dict(value for name, value in report.user_properties if name == ROWS))
    if totals:
        terminalreporter.section(ROWS)
        for row, count in sorted(totals.items()):
            terminalreporter.write_line(f"{count:>7,}  {row}")


@pytest.fixture
def tally(record_property) -> Callable[[str, int], None]:
    """tally("kills", 40) adds the trials of a test to the table of counts."""
    return lambda row, count: record_property(ROWS, (row, count))


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether a sample of the trials is enough."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def tasks() -> Path:
    """The folder of shared image sets; tests that need it are skipped where it is absent."""
    if not TASKS.is_dir():
        pytest.skip(f"the shared image sets are not at {TASKS}")
    return TASKS


@pytest.fixture
def copy_photos(tasks: Path) -> Callable[..., Path]:
    """copy_photos(folder, {"rose": 6, "tulip": 6}, start=0) copies that many flowers of each class into a folder."""

    def copy(folder: Path, counts: dict[str, int], start: int = 0) -> Path:
        for name, count in counts.items():
            (folder / name).mkdir(parents=True)
            for photo in sorted((tasks / "flowers5" / name).iterdir())[start : start + count]:
                shutil.copy(photo, folder / name / photo.name)
        return folder

    return copy


@pytest.fixture
def photos(copy_photos: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of three classes with 12, 10 and 8 real photos."""
    return copy_photos(tmp_path / "photos", {"daisy": 12, "rose": 10, "tulip": 8})


@pytest.fixture
def split_photos(copy_photos: Callable[..., Path], tmp_path: Path) -> Path:
    """The same classes in train/ (8 each), val/ (3 each) and test/ (4 each)."""
    root = tmp_path / "split"
    for split, count, start in (("train", 8, 0), ("val", 3, 20), ("test", 4, 40)):
        copy_photos(root / split, {"daisy": count, "rose": count, "tulip": count}, start)
    return root


@pytest.fixture
def run_cli(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """run_cli("train", …) -> (exit code, stdout, stderr), through the same `main` as the console script."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kadapt", *map(str, arguments)])
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@dataclass
class Tiny:
    """A transformer of 40 thousand random weights and 18 images: a run on them takes half a second."""

    folder: Path

    @property
    def train(self) -> tuple[object, ...]:
        """`kadapt train` with six steps in two epochs and a save after each step, without --out."""
        options = ("--shots", 5, "--epochs", 2, "--batch-size", 4, "--config", self.folder / "save.toml")
        return ("train", "--data", self.folder / "photos", "--model", f"local-dir:{self.folder / 'model'}", *options)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Made here, so that the fault tests need no other data."""
    folder = tmp_path_factory.mktemp("tiny")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    save_for_hf(model, folder / "model", model_args=size, safe_serialization=True)
    draw = np.random.default_rng(0)
    for label, middle in (("dark", 80), ("light", 150)):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(9):
            pixels = draw.normal(middle, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / label / f"{number}.png")
    (folder / "save.toml").write_text("save_every = 0.0\n")
    return Tiny(folder)
