"""The pretraining script on a few real photos: timm loads what it writes, and a resumed run is the unbroken one."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from kadapt_cli.models import load

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "pretrain_backbone.py"
CLASSES = ("daisy", "rose", "tulip")
SIZES = {"--dim": 32, "--depth": 1, "--heads": 1, "--image-size": 16, "--batch-size": 8}
TINY = [*(str(part) for item in SIZES.items() for part in item), "--lr", "0.003", "--device", "cpu"]
TIMES = ("images_per_s", "time_s", "test_accuracy")  # a stopped run is tested where it stopped


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_backbone", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _load_script()


@pytest.fixture(scope="module")
def sources(tasks, tmp_path_factory) -> Path:
    """Folders train/ (8 photos a class) and test/ (20), and train.zip with the photos of train/ in another order."""
    root = tmp_path_factory.mktemp("sources")
    for split, first, count in (("train", 0, 8), ("test", 20, 20)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for photo in sorted((tasks / "flowers5" / name).iterdir())[first : first + count]:
                shutil.copy(photo, root / split / name)
    (root / "train" / "LICENSE.txt").write_text("passed by")
    with ZipFile(root / "train.zip", "w") as archive:
        for file in sorted((root / "train").glob("*/*"), reverse=True):
            archive.write(file, file.relative_to(root / "train"))
    return root


def pretrain(source: Path, out: Path, *options: str, epochs: int = 12) -> int:
    test = source.parent / "test"
    return script.main([str(source), "--test", str(test), "--out", str(out), "--epochs", str(epochs), *TINY, *options])


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory) -> Path:
    """One run of twelve epochs that the reading tests share."""
    out = tmp_path_factory.mktemp("runs") / "backbone"
    assert pretrain(sources / "train", out) == 0
    return out


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def error_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_timm_loads_the_folder_and_finds_the_logged_accuracy(finished, sources):
    model = timm.create_model(f"local-dir:{finished}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted((sources / "test").glob("*/*"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        found = model(images).argmax(1)
    assert len(set(found.tolist())) > 1, "a model with one answer proves nothing"
    right = sum(CLASSES[label] == file.parent.name for label, file in zip(found, files, strict=True))
    log = read_log(finished)
    assert [row["epoch"] for row in log] == [str(epoch) for epoch in range(1, 13)]
    assert [row["epoch"] for row in log if row["test_accuracy"]] == ["10", "12"]
    assert log[-1]["test_accuracy"] == str(right / len(files))
    # Three steps an epoch; the rate logged is that of the last.
    assert [float(row["lr"]) for row in log] == [script.learning_rate(step, 36, 0.003) for step in range(2, 36, 3)]
    card = (finished / "README.md").read_text()
    assert f"| {right / len(files):.2%}, last epoch" in card
    assert "| 12 of the 12 that" in card


def test_the_weights_are_the_average_in_float16(finished):
    weights, state = load_file(finished / "model.safetensors"), load_file(finished / "state.safetensors")
    assert all(torch.equal(tensor, state[f"ema.{name}"].half()) for name, tensor in weights.items())
    assert all(not torch.equal(state[f"model.{name}"], state[f"ema.{name}"]) for name in weights)


def test_kadapt_loads_the_folder(finished):
    backbone = load(f"local-dir:{finished}")
    assert (backbone.feature_dim, backbone.tag, backbone.license) == (32, "train", "apache-2.0")
    assert backbone.data_config["input_size"] == (3, 16, 16)
    config = json.loads((finished / "config.json").read_text())
    assert (config["label_names"], config["num_features"]) == (list(CLASSES), 32)


def test_a_resumed_run_equals_an_unbroken_one(sources, tmp_path):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert pretrain(sources / "train", unbroken, epochs=3) == 0
    assert pretrain(sources / "train", resumed, "--minutes", "0", epochs=3) == 0
    assert "| 1 of the 3 that" in (resumed / "README.md").read_text()
    assert pretrain(sources / "train", resumed, "--minutes", "0", "--resume", epochs=3) == 0
    assert len(read_log(resumed)) == 2
    for _ in range(2):  # the second time, nothing is left to do
        assert pretrain(sources / "train", resumed, "--resume", epochs=3) == 0
    expected, found = (load_file(out / "state.safetensors") for out in (unbroken, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert (resumed / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    for a, b in zip(read_log(unbroken), read_log(resumed), strict=True):
        assert {key: a[key] for key in a if key not in TIMES} == {key: b[key] for key in b if key not in TIMES}


def test_what_an_epoch_draws_depends_on_seed_and_epoch_alone():
    draws = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        script.seed_epoch(seed, epoch)
        draws.append(torch.rand(4).tolist() + script.np.random.rand(4).tolist())
    assert draws[0] == draws[3]
    assert len(set(draws[0] + draws[1] + draws[2])) == 24


def test_a_zip_gives_the_weights_of_the_folder(sources, finished, tmp_path):
    assert pretrain(sources / "train.zip", tmp_path / "zip") == 0
    assert (tmp_path / "zip" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_images_are_decoded_as_timm_evaluates(sources):
    transform = timm.data.create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=1.0, mean=(0,) * 3, std=(1,) * 3
    )
    file = next((sources / "train" / "rose").iterdir())
    with Image.open(file) as image:
        wide = image.convert("RGB").resize((101, 50))
    wide.save(sources / "wide.png")
    decoded = torch.from_numpy(script.decode((sources / "wide.png").read_bytes(), 32))
    assert torch.equal(decoded, (transform(wide) * 255).round().byte())


def photos_as_tensor(sources: Path, size: int = 32) -> torch.Tensor:
    return script.read_images(sources / "train", size, torch.device("cpu")).pixels


def test_augmentation_keeps_shape_and_range_and_differs_between_images(sources):
    pixels = photos_as_tensor(sources)[:1].expand(64, -1, -1, -1)
    torch.manual_seed(0)
    x = script.augment(pixels)
    assert (x.shape, x.dtype) == (pixels.shape, torch.float32)
    assert x.min() >= 0
    assert x.max() <= 1
    assert len({image.numpy().tobytes() for image in x}) == 64
    assert not torch.equal(x, script.augment(pixels))


def test_an_image_that_is_only_moved_stays_sharp(sources):
    x = photos_as_tensor(sources).float() / 255
    torch.manual_seed(0)
    moved = script.warp(x, torch.zeros(len(x), 4))
    found = []
    for before, after in zip(x, moved, strict=True):
        candidates = {
            (down, right, flip): (before.flip(-1) if flip else before)[:, down : down + 24, right : right + 24]
            for down in range(9) for right in range(9) for flip in (False, True)
        }  # fmt: skip
        found.append(min(candidates, key=lambda key: (candidates[key] - after[:, 4:28, 4:28]).abs().max()))
        assert (candidates[found[-1]] - after[:, 4:28, 4:28]).abs().max() < 1e-4
    assert len(set(found)) > len(x) // 2
    assert {flip for _, _, flip in found} == {False, True}


def test_colours_are_kept_at_strength_zero_and_every_operation_does_something(sources):
    x = photos_as_tensor(sources)[:2].float() / 255
    still = torch.zeros(2, 3, 1, 1, 1)
    torch.testing.assert_close(script.recolour(x, still), x)
    for index in range(3):
        strength = still.clone()
        strength[0, index] = 0.5
        changed = script.recolour(x, strength)
        assert (changed[0] - x[0]).abs().max() > 0.02
        torch.testing.assert_close(changed[1], x[1])
    for index in range(4):
        torch.manual_seed(0)
        plain = script.warp(x, torch.zeros(2, 4))
        torch.manual_seed(0)
        changed = script.warp(x, torch.eye(4)[[index, index]] * torch.tensor([[1.0], [0.0]]))
        assert (changed[0] - plain[0]).abs().max() > 0.02
        torch.testing.assert_close(changed[1], plain[1])


def test_a_quarter_of_the_images_loses_a_rectangle():
    torch.manual_seed(0)
    erased = (script.erase(torch.full((2000, 3, 32, 32), -1.0)) >= 0).all(1)
    hit = erased.any(2).any(1)
    assert 0.22 < hit.float().mean() < 0.28
    share = erased[hit].float().mean((1, 2))
    assert 0.005 < share.min() < 0.04
    assert 0.28 < share.max() < 0.36
    rows, columns = erased[hit].any(2).sum(1), erased[hit].any(1).sum(1)
    assert torch.equal(rows * columns, erased[hit].sum((1, 2)))


def test_the_learning_rate_warms_up_and_falls_to_nearly_zero():
    rates = [script.learning_rate(step, 200, 2.0) for step in range(200)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[105] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3


def test_a_bad_source_ends_with_one_line_and_code_2_without_kadapt_or_its_libraries(tmp_path):
    # The script has to run where only torch, timm, safetensors, numpy and Pillow are installed.
    absent = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(['kadapt_cli', 'pydantic', 'typer', 'rich', 'sklearn']));"
    )
    code = f"{absent} runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, "nowhere.zip", "--test", "nowhere", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain_backbone: nowhere.zip: the source cannot be read (")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def break_zip(source: Path) -> None:
    shutil.rmtree(source)
    source.write_bytes(b"no archive")


def empty(source: Path) -> None:
    for name in CLASSES:
        shutil.rmtree(source / name)


def cut_image(source: Path) -> None:
    photo = min((source / "rose").iterdir())
    photo.write_bytes(photo.read_bytes()[:2000])


def break_class(source: Path) -> None:
    (source / "rose").rename(source / "weed")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (break_zip, "train: the source cannot be read (File is not a zip file)"),
        (empty, "train: expected CLASS/IMAGE files of two classes or more, found 0"),
        (cut_image, "cannot be read (image file is truncated"),
        (break_class, "test: its classes are not those of the training images (rose, …)"),
    ],
)
def test_a_damaged_source_is_named_in_one_line(damage, text, sources, tmp_path, capsys):
    shutil.copytree(sources / "train", tmp_path / "train")
    shutil.copytree(sources / "test", tmp_path / "test")
    damage(tmp_path / "train")
    assert pretrain(tmp_path / "train", tmp_path / "out") == 2
    assert text in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "is not empty; give a new folder, or --resume"),
        (("--resume", "--seed", "3"), "--resume: seed was 0, now 3"),
        (("--resume", "--heads", "5"), "--dim must be a multiple of --heads"),
        (("--batch-size", "1"), "--batch-size from 2"),
    ],
)
def test_options_that_cannot_be_are_refused_and_the_run_stays(options, text, sources, finished, capsys):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    assert pretrain(sources / "train", finished, *options) == 2
    assert text in error_line(capsys)
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_resuming_what_is_no_run_and_diverging_are_errors(sources, tmp_path, capsys):
    assert pretrain(sources / "train", tmp_path / "none", "--resume") == 2
    assert "state.safetensors cannot be read" in error_line(capsys)
    assert pretrain(sources / "train", tmp_path / "high", "--lr", "1e30") == 2
    assert "start again with a lower --lr" in error_line(capsys)


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    script.commit(tmp_path / "file", "old")
    monkeypatch.setattr(script.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        script.commit(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
