"""Damaged files: flipped bits, truncations, changed headers, swapped files. An error of exit 4, or the same bits; never
wrong numbers, never a traceback."""

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import pytest
import torch

from kadapt_cli import evaluate, models, probe, runs, study
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import MODEL, KadaptError
from kadapt_cli.train import _resumed_config

pytestmark = pytest.mark.faults
ROW = "damaged files: exit 4 or the same bits"


@dataclass
class Artefact:
    """A file that is read back, and what a reader makes of it: something that can be compared."""

    file: Path
    read: Callable[[], Any]


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """A run, its merged folder, a probe and a comparison."""
    folder = tmp_path_factory.mktemp("home")
    model = f"local-dir:{tiny.folder / 'model'}"
    data = ("--data", tiny.folder / "photos", "--model", model, "--shots", 3, "--epochs", 1)
    for command in (
        (*tiny.train, "--out", folder / "run"),
        ("merge-weights", folder / "run", "--out", folder / "merged"),
        ("probe-id", *data, "--per", "model", "--dims", 8, "--folds", 1, "--out", folder / "probe"),
        ("compare", *data, "--method", "linear", "--method", "layernorm", "--out", folder / "comparison"),
    ):
        found = faults.kadapt(*command)
        assert found.code == 0, found.err
    document = json.loads((folder / "probe" / "probe.json").read_text())
    chosen = runs.sealed(document | {"selected": ["blocks.0.mlp", "blocks.1.attn"]})  # so that there is a selection
    (folder / "probe" / "probe.json").write_text(json.dumps(chosen))
    return folder


def artefacts(home: Path) -> dict[str, Artefact]:
    """Every file that kadapt reads back, by name."""
    run, merged = home / "run", home / "merged"
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    grid = json.loads((home / "comparison" / study.RECORDS).read_text().splitlines()[0])
    grid = {key: value for key, value in grid.items() if key not in ("kind", "sha256")}

    def adapter() -> Any:
        found = evaluate.open_run(run)
        with torch.inference_mode():
            return found.adapted.module()(images).tolist(), found.classes, found.info

    def state() -> Any:
        tensors, info, _ = runs.load_state(run)
        return {name: tensor.tolist() for name, tensor in tensors.items()}, info

    def manifest() -> Any:
        info = runs.load_tensors(run / runs.ADAPTER, "adapter")[1]
        return evaluate.run_images(run, TrainConfig(**info["config"]), info).splits

    def backbone() -> Any:
        found = models.load(f"local-dir:{merged}")
        return found.digest, found.architecture, found.data_config, found.model_args

    def records() -> Any:
        return study.FileStudy(home / "comparison", grid).records()

    return {
        "adapter": Artefact(run / runs.ADAPTER, adapter),
        "state": Artefact(run / runs.STATE, state),
        "manifest": Artefact(run / runs.MANIFEST, manifest),
        "configuration": Artefact(run / runs.CONFIG, lambda: _resumed_config(TrainConfig(), run).model_dump()),
        "merged weights": Artefact(merged / "model.safetensors", backbone),
        "merged configuration": Artefact(merged / "config.json", backbone),
        "probe": Artefact(home / "probe" / probe.JSON, lambda: probe.read_selection(home / "probe" / probe.JSON)),
        "study": Artefact(home / "comparison" / study.RECORDS, records),
    }


TRIALS = {  # flipped bits and truncations of each
    "adapter": (200, 50),
    "state": (200, 50),
    "manifest": (50, 20),
    "configuration": (50, 20),
    "merged weights": (150, 50),
    "merged configuration": (100, 20),
    "probe": (50, 20),
    "study": (80, 20),
}


def mutations(data: bytes, name: str, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a file, named."""
    draw = random.Random(name)
    header = 8 + struct.unpack("<Q", data[:8])[0] if name in ("adapter", "state", "merged weights") else len(data)
    for number in range(flips):
        place = draw.randrange(header if number % 2 else len(data))  # headers are short: half of the flips go there
        bit = draw.randrange(8)
        yield f"bit {bit} of byte {place}", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    for number in range(cuts):
        yield f"cut {number}", data[: draw.randrange(len(data))]
    yield "nothing", b""
    yield "zeros", bytes(len(data))
    yield "a byte more", data + b"\0"
    if header < len(data):
        yield from headers(data, header)


def headers(data: bytes, end: int) -> Iterator[tuple[str, bytes]]:
    """A safetensors file whose header is another, though valid, JSON document."""
    head, body = json.loads(data[8:end]), data[end:]
    names = sorted(key for key in head if key != "__metadata__")
    first = names[0]
    second = next(n for n in names[1:] if head[n]["shape"] == head[first]["shape"] or n == names[-1])

    def packed(changed: dict[str, Any]) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + body

    yield "no metadata", packed({key: value for key, value in head.items() if key != "__metadata__"})
    yield "a tensor less", packed({key: value for key, value in head.items() if key != first})
    yield "renamed", packed({f"{key}x" if key == first else key: value for key, value in head.items()})
    yield "exchanged", packed(head | {first: head[second], second: head[first]})
    yield "reshaped", packed(head | {first: head[first] | {"shape": [1, *head[first]["shape"]]}})
    yield "other type", packed(head | {first: head[first] | {"dtype": "I32"}})
    for size in (0, 1, 2**20, 2**40, 2**63):
        yield f"header of {size} bytes", struct.pack("<Q", size) + data[8:]
    if "kadapt" in head["__metadata__"] and head["__metadata__"]["kadapt"].startswith("{"):
        info = json.loads(head["__metadata__"]["kadapt"])
        for key in info:
            less = {k: v for k, v in info.items() if k != key}
            yield f"{key} is missing", packed(head | {"__metadata__": {"kadapt": json.dumps(less)}})


def same(name: str, found: Any, whole: Any) -> bool:
    """Whether a reader got what was written; of a study, only records that were written, to be completed again."""
    return all(record in whole for record in found) if name == "study" else found == whole


@pytest.mark.parametrize("name", TRIALS)
def test_damaged(home, tmp_path, tally, quick, name):
    copy = tmp_path / "copy"
    shutil.copytree(home, copy)
    artefact = artefacts(copy)[name]
    (copy / "run" / runs.PREVIOUS_STATE).unlink()
    data, whole = artefact.file.read_bytes(), artefact.read()
    wrong, trials, caught = {}, 0, 0
    for what, damaged in mutations(data, name, *(number // (8 if quick else 1) for number in TRIALS[name])):
        artefact.file.write_bytes(damaged)
        trials += 1
        try:
            if not same(name, artefact.read(), whole):
                wrong[what] = "another result"
        except KadaptError as error:
            caught += 1
            if error.exit_code != MODEL or not str(error):
                wrong[what] = f"exit {error.exit_code}: {error}"
        except Exception as error:  # noqa: BLE001 - a user would see its traceback
            wrong[what] = repr(error)[:300]
    assert not wrong
    assert caught > trials / 2 or name == "study"
    tally(ROW, trials)


def test_a_damaged_state_goes_on_from_the_one_before(home, tiny, tmp_path, tally, quick):
    wrong, trials = {}, 2 if quick else 12
    for number in range(trials):
        out = tmp_path / str(number)
        shutil.copytree(home / "run", out)
        (out / runs.RESULT).unlink()
        data = bytearray((out / runs.STATE).read_bytes())
        data[random.Random(number).randrange(len(data))] ^= 1
        (out / runs.STATE).write_bytes(data)
        found = faults.kadapt(*tiny.train, "--out", out, "--resume")
        if found.code or runs.PREVIOUS_STATE not in found.err or faults.differences(home / "run", out):
            wrong[number] = found.err[-500:]
    assert not wrong
    tally(ROW, trials)


COMMANDS = {
    "adapter": ("eval", "run"),
    "state": ("train", "--resume", "--out", "run"),
    "manifest": ("eval", "run"),
    "configuration": ("train", "--resume", "--out", "run"),
    "merged weights": ("train", "--model", "local-dir:merged"),
    "merged configuration": ("train", "--model", "local-dir:merged"),
    "probe": ("train", "--targets", "probe/probe.json"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_it_in_one_line(home, tmp_path, tally, name, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(home, copy)
    monkeypatch.chdir(copy)
    (copy / "run" / runs.PREVIOUS_STATE).unlink()
    file = artefacts(copy)[name].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = faults.kadapt(*COMMANDS[name])
    assert (found.code, found.err.count("kadapt: "), found.out) == (4, 1, "")
    assert file.name in found.said or file.parent.name in found.said
    tally(ROW, 1)


def test_swapped_files(home, tiny, tmp_path, tally):
    """Whole files in the place of others: another run's adapter is that run's, all else is refused."""
    names = (runs.ADAPTER, runs.STATE, runs.CONFIG, runs.MANIFEST)
    wrong, trials = {}, 0
    for source in names:
        for target in names:
            if source == target:
                continue
            out = tmp_path / f"{source}-{target}"
            shutil.copytree(home / "run", out)
            (out / runs.PREVIOUS_STATE).unlink()
            shutil.copy(out / source, out / target)
            reader = ("train", "--resume", "--out", out) if target in (runs.STATE, runs.CONFIG) else ("eval", out)
            found = faults.kadapt(*reader)
            trials += 1
            if found.code != MODEL or "Traceback" in found.err or found.out:
                wrong[source, target] = found.code, found.err[-300:]
    assert not wrong
    tally(ROW, trials)
