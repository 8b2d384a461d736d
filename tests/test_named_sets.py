"""Data that comes by name: the demo, timm's readers, multi-label sets."""

import hashlib
import io
import struct
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import CONFIG, paths, per_class, refused
from PIL import Image

from kadapt_cli import catalog, data
from kadapt_cli.data import manifest_csv, open_images, open_split, parse_manifest, restore
from kadapt_cli.images import read_image
from kadapt_cli.tensors import ImageDataset, make_transform


def test_demo_is_ten_shots_of_the_digits() -> None:
    images = open_images("demo")
    assert (images.name, images.root, images.classes) == ("demo", None, tuple("0123456789"))
    assert per_class(images, "train") == [8] * 10
    assert per_class(images, "val") == [2] * 10
    assert len(images.splits["test"]) == 1797 - 100
    from sklearn.datasets import load_digits

    digits = load_digits()
    for sample in images.splits["train"]:
        number = int(sample.path.removeprefix("demo/"))
        assert sample.label == digits.target[number]
        pixels = np.asarray(images.image(sample))
        assert np.array_equal(pixels[..., 0], np.rint(digits.images[number] * 255 / 16))
        assert (sample.size, sample.digest) == (192, hashlib.sha256(pixels.tobytes()).hexdigest())
    assert len(open_images("demo", shots=3).splits["train"]) == 20
    manifest = parse_manifest(manifest_csv(images), images.classes)
    assert restore("demo", manifest, images.classes).splits == images.splits
    assert len(open_split("demo", "test", images.classes).splits["test"]) == 1797


def write_idx(path: Path, values: np.ndarray) -> None:
    """The file layout of MNIST: two zero bytes, type 8, the number of dimensions, the dimensions, the bytes."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MNIST in miniature, 80 train and 30 test pictures, made from photos of hands that show digits."""
    raw = tmp_path / "sets" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, start, count in (("train", 0, 8), ("t10k", 8, 3)):
        hands = [
            path
            for digit in range(10)
            for path in sorted((tasks / "sign_digits" / str(digit)).iterdir())[start:][:count]
        ]
        pixels = np.stack([np.asarray(Image.open(path).convert("L").resize((28, 28))) for path in hands])
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array([int(path.parent.name) for path in hands]))
    monkeypatch.setenv("KADAPT_DATA", str(tmp_path / "sets"))
    return raw


def test_a_named_set_through_timm(mnist: Path) -> None:
    images = open_images("torch/mnist", shots=5)
    assert (images.name, images.root, images.classes[3]) == ("mnist", None, "3 - three")
    assert per_class(images, "train") == [4] * 10
    assert per_class(images, "val") == [1] * 10
    assert per_class(images, "test") == [3] * 10, "the test part of the set, not what the draw leaves"
    assert images.splits["test"][0].path.startswith("torch/mnist/test/")
    stored = np.frombuffer((mnist / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(-1, 28, 28)
    for sample in images.splits["train"]:
        number = int(sample.path.removeprefix("torch/mnist/train/"))
        assert sample.label == number // 8
        assert np.array_equal(np.asarray(images.image(sample))[..., 1], stored[number])
    small = open_images("torch/mnist", shots=5, cache_bytes=0)
    assert small.cache == {}
    assert small.image(small.splits["train"][0]).tobytes() == images.image(images.splits["train"][0]).tobytes()


def test_a_named_set_can_be_restored_and_opened_by_split(mnist: Path) -> None:
    images = open_images("torch/mnist", shots=5)
    manifest = parse_manifest(manifest_csv(images), images.classes)
    assert restore("torch/mnist", manifest, images.classes).splits == images.splits
    assert len(open_split("torch/mnist", "train", images.classes).splits["train"]) == 80
    assert "has no val split, only train, test" in refused(lambda: open_split("torch/mnist", "val", images.classes))
    assert "not those of the run (rose, tulip)" in refused(lambda: open_split("torch/mnist", "test", ("rose", "tulip")))
    content = bytearray((mnist / "t10k-images-idx3-ubyte").read_bytes())
    content[20] ^= 1
    (mnist / "t10k-images-idx3-ubyte").write_bytes(content)
    assert "1 of 80 images of the run are missing or changed: torch/mnist/test/0: changed" in refused(
        lambda: restore("torch/mnist", manifest, images.classes)
    )


def test_a_set_that_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADAPT_DATA", str(tmp_path))
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the proxies of its first request for good
    message = refused(lambda: open_images("torch/kmnist"))
    assert message.startswith(f"torch/kmnist: could not be opened under {tmp_path} (")
    assert "set KADAPT_DATA" in message
    assert "Unknown torchvision dataset nonsense" in refused(lambda: open_images("torch/nonsense"))
    assert "given by its own path" in refused(lambda: open_images("torch/image_folder"))


class Pictures(list[tuple[Image.Image, int]]):
    """What a reader gives: pictures with labels, and perhaps class names."""

    classes: list[object]


def pictures(labels: list[int], classes: list[object]) -> Pictures:
    made = Pictures((Image.new("RGB", (8, 8), (place, 0, 0)), label) for place, label in enumerate(labels))
    made.classes = classes
    return made


def test_a_test_split_without_labels_is_replaced_by_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub sets of competitions carry -1 as the label of every test image."""
    splits = {
        "train": pictures([0, 0, 1, 1], ["cat", "dog"]),
        "validation": pictures([1, 0, 1], ["cat", "dog"]),
        "test": pictures([-1, -1], ["cat", "dog"]),
    }
    monkeypatch.setattr(catalog, "_create", lambda source, split: splits[split])
    images = open_images("hfds/org/Pets")
    assert (images.name, images.classes) == ("pets", ("cat", "dog"))
    assert paths(images, "test") == ["hfds/org/Pets/val/0", "hfds/org/Pets/val/1", "hfds/org/Pets/val/2"]
    assert len(images.splits["val"]) == 2
    assert images.notes[0] == "the test split has labels that are no class (-1) and was ignored"
    splits["train"][0] = (splits["train"][0][0], 7)
    assert "label 7 has no class name" in refused(lambda: open_images("hfds/org/Pets"))


def test_val_none_also_leaves_out_the_validation_of_a_named_set(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pictures([0, 0, 0, 1, 1, 1], ["cat", "dog"])
    monkeypatch.setattr(catalog, "_create", lambda source, split: made)
    sizes = {
        val: [len(open_images("hfds/pets", val=val).splits[split]) for split in data.SPLITS] for val in ("auto", "none")
    }
    assert sizes == {"auto": [6, 6, 6], "none": [6, 0, 6]}


def test_class_names_of_named_sets_are_texts_and_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[object] = [("tench", "Tinca tinca"), "crane", "crane"]
    monkeypatch.setattr(catalog, "_create", lambda source, split: pictures([0, 1, 2] * 3, names))
    assert open_images("torch/imagenet").classes == ("tench, Tinca tinca", "crane (1)", "crane (2)")
    monkeypatch.setattr(catalog, "_create", lambda source, split: pictures([20, 5] * 3, []))
    images = open_images("torch/imagenet")
    assert images.classes == ("5", "20")
    assert {sample.label for sample in images.splits["train"] if int(sample.path[-1]) % 2 == 0} == {1}


def test_a_stream_has_to_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"train": pictures([0, 1] * 3, ["cat", "dog"])}
    monkeypatch.setattr(catalog, "_create", lambda source, split: made[split])
    assert len(open_images("wds/pets", cache_bytes=6 * 192).splits["train"]) == 2
    assert "a streamed set has to fit in 0 MiB of memory" in refused(
        lambda: open_images("wds/pets", cache_bytes=6 * 192 - 1)
    )


def test_a_bad_image_in_a_named_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pictures([0, 0, 0, 1, 1, 1, 1], ["cat", "dog"])
    made[3] = (io.BytesIO(b"damaged"), 1)  # type: ignore[assignment]
    monkeypatch.setattr(catalog, "_create", lambda source, split: made)
    message = refused(lambda: open_images("torch/imagenet"))
    assert "cannot be used: torch/imagenet/train/3: not an image of a known format" in message
    assert per_class(open_images("torch/imagenet", val="none", skip_bad=True), "train") == [3, 3]


def test_a_hub_set_is_read_by_its_own_reader(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the extra 'hf'")
    monkeypatch.setenv("KADAPT_DATA", str(tmp_path / "sets"))
    images = open_images(f"hfds/{photos}", shots=5)
    assert images.classes == ("daisy", "rose", "tulip")
    assert (len(images.splits["train"]), len(images.splits["val"]), len(images.splits["test"])) == (12, 3, 15)
    first = images.splits["train"][0]
    original = {read_image(path).tobytes(): path.parent.name for path in photos.rglob("*.jpg")}
    assert original[images.image(first).tobytes()] == images.classes[first.label]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    assert "datasets" in refused(lambda: open_images("hfds/beans"))


def test_where_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADAPT_DATA", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert catalog.data_root() == Path("/a")
    monkeypatch.delenv("KADAPT_DATA")
    assert catalog.data_root() == Path("/b/kadapt/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalog.data_root() == Path.home() / ".cache/kadapt/data"


def test_an_unknown_name_is_met_with_the_closest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "suggest", lambda source: ["mnist", "kmnist"] if source == "mnits" else [])
    assert "mnits: not a folder; did you mean mnist or kmnist? Otherwise give a folder" in refused(
        lambda: open_images("mnits")
    )
    assert "did you mean" not in refused(lambda: open_images("nowhere"))


# --- multi-label sets, and what else a named set brings ---

VOC = ("aeroplane", "bird", "cat", "dog")


def voc(seed: int, split: str = "train") -> list[tuple[str, tuple[int, ...]]]:
    """Rows of an invented multi-label set: about every second image shows dog, few show aeroplane, some show none."""
    draws = np.random.default_rng(seed).random((80, 4)) < (0.1, 0.2, 0.3, 0.5)
    return [(f"voc/{split}/{number}", tuple(np.flatnonzero(row).tolist())) for number, row in enumerate(draws)]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[..., catalog.NamedSet]:
    """named({"train": rows}, **fields) makes "torch/voc" a multi-label set of these rows, each picture another."""

    def make(entries: dict[str, list[tuple[str, tuple[int, ...]]]], **fields: object) -> catalog.NamedSet:
        table = [(Image.new("RGB", (4, 2), (number, 0, 0)), 0) for number in range(256)]
        tables = {f"voc/{split}": table for split in data.SPLITS}
        chosen = {"classes": VOC, "metric": "11point_mAP", "templates": ("a {}.",), "squash": True} | fields
        made = catalog.NamedSet(name="voc", entries=entries, tables=tables, **chosen)  # type: ignore[arg-type]
        monkeypatch.setattr(data, "open_named", lambda source, cache_bytes: made)
        return made

    return make


def test_the_draw_of_a_multi_label_set_is_greedy_in_the_order_of_the_hash(named: Callable[..., object]) -> None:
    for seed in range(20):
        rows = voc(seed)
        named({"train": rows})
        images = open_images("torch/voc", shots=3, seed=seed, val="none")
        expected, counts = set(), Counter[int]()
        for path, labels in sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row[0]}".encode()).digest()):
            if any(counts[label] < 3 for label in labels):
                expected.add(path)
                counts.update(labels)
        assert set(paths(images, "train")) == expected
        assert min(counts.values()) >= 3
        assert set(paths(images, "test")) == {path for path, _ in rows} - expected
        span = f"which have {min(counts.values())} to {max(counts.values())} each"
        assert f"roughly 3 shots: an image counts for all its classes, {span}" in images.notes
        named({"train": rows[::-1]})
        assert open_images("torch/voc", shots=3, seed=seed, val="none").splits == images.splits


def test_test_and_validation_of_a_multi_label_set_leave_every_class_to_train_on(named: Callable[..., object]) -> None:
    """A fifth of each class or a little more, but not all of one whose images also show others that are wanted."""
    rows = [(f"voc/train/{n}", labels) for n, labels in enumerate([(0, 1), (0, 2), (0, 3), *[(1,), (2,), (3,)] * 2])]
    sizes = []
    for seed in range(40):
        for entries, shots in (({"train": rows}, None), ({"train": rows, "test": voc(0, "test")}, 3)):
            named(entries)
            images = open_images("torch/voc", shots=shots, seed=seed)
            assert {label for sample in images.splits["train"] for label in sample.labels} == {0, 1, 2, 3}
        named({"train": voc(seed), "test": voc(0, "test")})
        images = open_images("torch/voc", seed=seed)
        sizes.append(len(images.splits["val"]))
        assert all(sample.labels for sample in images.splits["val"])
    assert 0.15 * 80 < np.mean(sizes) < 0.3 * 80


def test_multi_label_samples_are_vectors_of_zeros_and_ones(named: Callable[..., object]) -> None:
    rows = [("voc/train/0", (3, 1)), ("voc/train/1", ()), ("voc/train/2", (2,)), ("voc/train/3", (0, 1, 2, 3))]
    named({"train": rows, "test": [("voc/test/9", (3,)), ("voc/test/8", (0, 2))]})
    images = open_images("torch/voc", val="none")
    assert "no test images of class bird" in images.notes
    assert [sample.labels for sample in images.splits["train"]] == [(1, 3), (), (2,), (0, 1, 2, 3)]
    assert images.splits["train"][1].label == -1
    dataset = ImageDataset(images, "train", make_transform(CONFIG, augment="none"))
    for _ in range(2):
        _, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
        assert labels.dtype == torch.float32
        assert labels.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]


def test_the_manifest_of_a_multi_label_set(named: Callable[..., object], photos: Path) -> None:
    named({"train": voc(0), "test": voc(1, "test")})
    images = open_images("torch/voc", shots=3)
    text = manifest_csv(images)
    assert {"", "dog", "cat|dog"} <= {line.split(",")[1] for line in text.splitlines()}
    assert parse_manifest(text, images.classes) == images.splits
    assert restore("torch/voc", parse_manifest(text, images.classes), images.classes).splits == images.splits
    assert "('ant')" in refused(lambda: parse_manifest(text.replace("cat|dog", "cat|ant"), images.classes))
    named({"train": voc(0)}, classes=("a|b", "c", "d", "e"))
    assert "class names without '|' were expected of a multi-label set, a|b given" in refused(
        lambda: open_images("torch/voc")
    )
    (photos / "rose").rename(photos / "daisy|tulip")
    single = open_images(str(photos), shots=4)
    assert parse_manifest(manifest_csv(single), single.classes) == single.splits
    manifest = parse_manifest(manifest_csv(single).replace(",tulip,", ",tulip|daisy,"), single.classes)
    message = refused(lambda: restore(str(photos), manifest, single.classes))
    assert "was expected to have one class, 2 given; the run is damaged" in message


def test_a_set_brings_its_metric_templates_and_squash(named: Callable[..., object], photos: Path) -> None:
    named({"train": voc(0), "test": voc(1, "test")})
    images = open_images("torch/voc")
    for opened in (images, open_split("torch/voc", "test", VOC), restore("torch/voc", images.splits, VOC)):
        assert (opened.metric, opened.templates, opened.squash) == ("11point_mAP", ("a {}.",), True)
    folder = open_images(str(photos))
    assert (folder.metric, folder.templates, folder.squash) == ("accuracy", ("a photo of a {}.",), False)
