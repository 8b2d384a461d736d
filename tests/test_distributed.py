"""Two processes under torchrun train what one process trains, and only the first writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kadapt_cli import runs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kadapt_cli"]


def run(command: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def trained(tasks, tmp_path_factory) -> tuple[Path, Path, dict, str]:
    """The same run by one and by two processes: 21 training images, so that the last of 3 batches has 5."""
    root = tmp_path_factory.mktemp("distributed")
    for name in ("daisy", "rose", "tulip"):
        (root / "photos" / name).mkdir(parents=True)
        for photo in sorted((tasks / "flowers5" / name).iterdir())[:12]:
            shutil.copy(photo, root / "photos" / name)
    options = ["train", "--data", "photos", "--shots", "9", "--epochs", "2", "--batch-size", "8", "--json"]
    one = run([sys.executable, "-m", "kadapt_cli", *options, "--out", "one"], cwd=root)
    assert one.returncode == 0, one.stderr
    two = run([*TORCHRUN, *options, "--out", "two"], cwd=root)
    assert two.returncode == 0, two.stderr
    return root / "one", root / "two", json.loads(two.stdout), two.stderr


def test_two_processes_give_the_result_of_one(trained):
    one, two, _, _ = trained
    left, right = (runs.load_tensors(folder / runs.ADAPTER, "adapter")[0] for folder in (one, two))
    assert left.keys() == right.keys()
    moved = 0.0
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-5, atol=1e-5)
        moved = max(moved, float(tensor.abs().max()) if name.endswith(".u") else 0.0)
    assert moved > 1e-3  # u starts at zero: training has happened


def test_history_and_result_are_those_of_one_process(trained):
    one, two, printed, _ = trained
    mine, theirs = (json.loads((folder / runs.RESULT).read_text()) for folder in (one, two))
    assert theirs["metrics"] == mine["metrics"]
    assert printed == theirs
    rows = [(folder / runs.METRICS).read_text().splitlines() for folder in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for first, second in zip(rows[0][1:], rows[1][1:], strict=True):
        loss, other = (float(line.split(",")[3]) for line in (first, second))
        assert other == pytest.approx(loss, rel=1e-5)


def test_only_the_first_process_speaks_and_writes(trained):
    _, two, _, stderr = trained
    assert stderr.count("reading photos") == 1
    assert stderr.count("epoch   1/2") == 1
    assert not list(two.glob(f"{runs.TEMPORARY}*"))
    assert {path.name for path in two.iterdir()} >= {runs.RESULT, runs.ADAPTER, runs.METRICS}
    assert len(list(two.parent.iterdir())) == 3  # photos, one, two
