"""A set whose images have several labels, from its files to a trained run, its evaluation and its predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kadapt_cli import train as training
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.evaluate import evaluate
from kadapt_cli.predict import predict
from kadapt_cli.progress import Display, show_result


def colours(red: bool, green: bool, rng: np.random.Generator) -> Image.Image:
    """Noise with a red left half, a green right half, both or neither: two labels that can be learned."""
    pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
    pixels[:, :16, 0] += np.uint8(190 * red)
    pixels[:, 16:, 1] += np.uint8(190 * green)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict, Path]:
    """VOC 2007 in its own layout, in which 'cat' is a red half and 'dog' a green one, trained and kept."""
    root = tmp_path_factory.mktemp("data")
    voc = root / "voc-2007-cls" / "VOCdevkit" / "VOC2007"
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (voc / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = json.loads((Path(training.__file__).parent / "assets" / "class_names.json").read_text())["voc-2007-cls"]
    for split, count in (("train", 64), ("val", 24), ("test", 48)):
        rows = [(f"{split}{i:04d}", i % 4 in (1, 3), i % 4 in (2, 3)) for i in range(count)]
        for stem, red, green in rows:
            colours(red, green, rng).save(voc / "JPEGImages" / f"{stem}.jpg", quality=95)
            (voc / "Annotations" / f"{stem}.xml").write_text("<annotation/>")
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem, _, _ in rows))
        for name in names:
            there = {"cat": 1, "dog": 2}.get(name, 0)
            # every other class has one training image, so that the set can be drawn from
            lines = [
                f"{row[0]} {1 if (there and row[there]) or (not there and i == names.index(name)) else -1}\n"
                for i, row in enumerate(rows)
            ]
            (voc / "ImageSets" / "Main" / f"{name.replace(' ', '')}_{split}.txt").write_text("".join(lines))
    out = root / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KADAPT_DATA", str(root))
        config = TrainConfig(data="voc-2007-cls", epochs=12, lr=1e-2, batch_size=16, augment="none")
        result = training.train(config, out, resume=False, display=Display(Console(stderr=True), quiet=True))
    return out, result, root


def test_it_learns_both_labels(trained, monkeypatch):
    out, result, root = trained
    monkeypatch.setenv("KADAPT_DATA", str(root))
    assert result["metrics"]["test"]["metric"] == "11point_mAP"
    assert result["metrics"]["test"]["accuracy"] is None
    both = root / "voc-2007-cls" / "VOCdevkit" / "VOC2007" / "JPEGImages" / "test0023.jpg"  # 23 % 4 == 3
    neither = both.with_name("test0044.jpg")
    predictions, _ = predict(out, [both, neither], top=20, device="cpu", skip_bad=False)
    found = [{c["name"]: c["probability"] for c in p["classes"]} for p in predictions]
    assert min(found[0]["cat"], found[0]["dog"]) > 0.5 > max(found[1]["cat"], found[1]["dog"])


def test_evaluation_is_the_mean_average_precision(trained, monkeypatch):
    out, result, root = trained
    monkeypatch.setenv("KADAPT_DATA", str(root))
    _, found = evaluate(out, data=None, split="test", device="cpu", skip_bad=False)
    assert found.to_json() == {"metric": "11point_mAP", "score": pytest.approx(found.score), "images": 48}
    assert found.score == pytest.approx(result["metrics"]["test"]["score"], abs=1e-6)
    assert found.score > 0.1
    console = Console(record=True, width=100)
    show_result(result, console)
    assert "11point_mAP" in console.export_text()


def test_a_multi_label_set_cannot_have_an_accuracy(trained, tmp_path, monkeypatch):
    _, _, root = trained
    monkeypatch.setenv("KADAPT_DATA", str(root))
    display = Display(Console(stderr=True), quiet=True)
    with pytest.raises(UsageError, match="cannot have accuracy; use 11point_mAP"):
        training.prepare(TrainConfig(data="voc-2007-cls", metric="accuracy"), tmp_path, display)
