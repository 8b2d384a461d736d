"""The sets of the comparison, from miniatures in their original layout; derived splits; downloads; `kadapt data`."""

import io
import json
import pickle
import struct
import sys
import types
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadapt_cli import benchmark_sets, catalog, cli, data, downloads
from kadapt_cli.benchmark_sets import SETS, SPLITS, derive, kitti_class
from kadapt_cli.errors import DataError

# --- miniatures ---


def colour(label: int) -> tuple[int, int, int]:
    """A colour that tells the class of a picture, also after JPEG."""
    return 16 * (label % 16) + 8, 10 * (label // 16) + 8, 120


def label_of(picture: Image.Image) -> int:
    red, green, _ = np.asarray(picture.convert("RGB")).reshape(-1, 3).mean(0)
    return round((red - 8) / 16) + 16 * round((green - 8) / 10)


def put(path: Path, label: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(label)).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def lines(path: Path, rows: list[str]) -> None:
    write(path, "".join(f"{row}\n" for row in rows))


def folders(top: Path, names: list[str], count: int, suffix: str = ".jpg") -> None:
    for label, name in enumerate(names):
        for i in range(count):
            put(top / name / f"{name.rsplit('/', 1)[-1]}_{i:04d}{suffix}", label)


def numbered(count: int) -> list[str]:
    return [f"class_{label:03d}" for label in range(count)]


def planes(labels: Any, side: int) -> np.ndarray:
    """Pictures as rows of red, green and blue planes."""
    return np.stack([np.repeat(np.array(colour(label), np.uint8), side * side) for label in labels])


def cifar(root: Path, folder: str, files: list[str], names: list[str], named: str) -> None:
    labels = np.arange(len(names), dtype=np.uint8)[:, None]
    coarse = [labels // 5] if len(names) == 100 else []
    for file in files:
        write(root / folder / file, np.hstack([*coarse, labels, planes(range(len(names)), 32)]).tobytes())
    write(root / folder / named, "\n".join(names) + "\n\n")


def dtd(root: Path) -> None:
    folders(root / "dtd/dtd/images", numbered(47), 3)
    for number, split in enumerate(SPLITS):
        lines(root / f"dtd/dtd/labels/{split}1.txt", [f"{name}/{name}_{number:04d}.jpg" for name in numbered(47)])


def fer(root: Path, name: str = "fer2013.csv", header: str = "emotion,pixels,Usage") -> None:
    usages = ["Training"] * 2 + ["PublicTest", "PrivateTest"]
    pixels = " ".join(["8"] * 48 * 48)
    values = [{"emotion": str(label), "pixels": pixels, "Usage": usage} for usage in usages for label in range(7)]
    lines(root / name, [header] + [",".join(row[key.strip()] for key in header.split(",")) for row in values])


def aircraft(root: Path) -> None:
    top = root / "fgvc-aircraft-2013b/data"
    lines(top / "variants.txt", ["F-16A/B", *numbered(99)])
    for number, split in enumerate(SPLITS):
        names = [f"{number}{label:05d}" for label in range(100)]
        for label, name in enumerate(names):
            put(top / f"images/{name}.jpg", label)
        classes = ["F-16A/B", *numbered(99)]
        lines(top / f"images_variant_{split}.txt", [f"{n} {c}" for n, c in zip(names, classes, strict=True)])


def food(root: Path) -> None:
    folders(root / "food-101/images", ["apple_pie", *numbered(100)], 2)
    for number, split in enumerate(("train", "test")):
        meta = {name: [f"{name}/{name}_{number:04d}"] for name in ["apple_pie", *numbered(100)]}
        write(root / f"food-101/meta/{split}.json", json.dumps(meta))


def gtsrb(root: Path) -> None:
    folders(root / "gtsrb/GTSRB/Training", [f"{label:05d}" for label in range(43)], 2, ".ppm")
    for label in range(43):
        put(root / f"gtsrb/GTSRB/Final_Test/Images/{label:05d}.ppm", label)
    rows = [f"{label:05d}.ppm;53;54;6;5;48;49;{label}" for label in range(43)]
    lines(root / "gtsrb/GT-final_test.csv", ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows])


def memes(root: Path, dev: str = "dev_seen.jsonl") -> None:
    for file, count in (("train.jsonl", 6), (dev, 2)):
        rows = [{"id": i, "img": f"img/{file[:3]}{i}.png", "label": i % 2, "text": "…"} for i in range(count)]
        lines(root / file, [json.dumps(row) for row in rows])
        for row in rows:
            put(root / str(row["img"]), int(row["label"]))  # type: ignore[call-overload]


def vehicle(kind: str, z: float) -> str:
    return f"{kind} 0.00 0 -1.5 600 150 700 250 1.5 1.6 3.9 -2.0 1.7 {z} -1.6"


KITTI = [[vehicle("Car", 7.5), vehicle("Van", 30.0)], [vehicle("Truck", 19.0)], [vehicle("Van", 45.0)], []]


def kitti(root: Path) -> None:
    for i in range(40):
        put(root / f"Kitti/raw/training/image_2/{i:06d}.png", i % 4, (24, 8))
        lines(root / f"Kitti/raw/training/label_2/{i:06d}.txt", [*KITTI[i % 4], vehicle("Pedestrian", 2.0)])


def mnist(root: Path) -> None:
    for part, count in (("train", 20), ("t10k", 10)):
        grey = np.zeros((count, 28, 28), np.uint8)
        write(root / f"MNIST/raw/{part}-images-idx3-ubyte", struct.pack(">4i", 2051, count, 28, 28) + grey.tobytes())
        labels = bytes(i % 10 for i in range(count))
        write(root / f"MNIST/raw/{part}-labels-idx1-ubyte", struct.pack(">2i", 2049, count) + labels)


def flowers(root: Path) -> None:
    from scipy.io import savemat

    labels = [label for label in range(102) for _ in range(3)]
    for number, label in enumerate(labels, 1):
        put(root / f"flowers-102/jpg/image_{number:05d}.jpg", label)
    numbers = np.arange(1, 307)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array(labels) + 1})
    ids = {"trnid": numbers[0::3], "valid": numbers[1::3], "tstid": numbers[2::3]}
    savemat(root / "flowers-102/setid.mat", ids)


def pets(root: Path) -> None:
    names = ["Abyssinian", "american_bulldog", *numbered(35)]
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        files = [(f"{name}_{number}", label) for label, name in enumerate(names) for number in numbers]
        for file, label in files:
            put(root / f"oxford-iiit-pet/images/{file}.jpg", label)
        lines(root / f"oxford-iiit-pet/annotations/{split}.txt", [f"{file} {label + 1} 1 1" for file, label in files])


def patch_camelyon(root: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="PatchCamelyon's files need h5py, which is not installed")
    (root / "pcam").mkdir(parents=True)
    for split, count in (("train", 4), ("valid", 2), ("test", 2)):
        labels = np.arange(count) % 2
        pixels = np.stack([np.full((96, 96, 3), colour(label), np.uint8) for label in labels])
        for part, array in (("x", pixels), ("y", labels.reshape(-1, 1, 1, 1))):
            with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{split}_{part}.h5", "w") as file:
                file[part] = array


def cars(root: Path) -> None:
    from scipy.io import savemat

    top = root / "stanford_cars"
    (top / "devkit").mkdir(parents=True)
    kind = [("fname", object), ("class", np.int64)]
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([(f"{label:05d}.jpg", label + 1) for label in range(196)], dtype=kind)
        savemat(top / file, {"annotations": rows})
        for label in range(196):
            put(top / f"cars_{split}/{label:05d}.jpg", label)
    savemat(top / "devkit/cars_meta.mat", {"class_names": np.array(numbered(196), dtype=object)})


VOC = {"train": ["000001", "000002", "000003"], "val": ["000004"], "test": ["000005", "000006"]}
VOC_POSITIVE = {
    "000001": (0, 14),
    "000002": (10,),
    "000003": (),
    "000004": (19,),
    "000005": (3, 6, 14),
    "000006": (15,),
}


def voc(root: Path) -> None:
    main = root / "VOCdevkit/VOC2007/ImageSets/Main"
    files = [name.replace(" ", "") for name in benchmark_sets.class_names("voc-2007-cls")]
    for split, images in VOC.items():
        lines(main / f"{split}.txt", images)
        for label, file in enumerate(files):
            values = {image: "1" if label in VOC_POSITIVE[image] else "-1" for image in images}
            values |= {image: " 0" for image in images if image == "000003" and label == 5}  # only difficult objects
            lines(main / f"{file}_{split}.txt", [f"{image} {value:>2}" for image, value in values.items()])
    for image in VOC_POSITIVE:
        put(root / f"VOCdevkit/VOC2007/JPEGImages/{image}.jpg")


def sun397(root: Path) -> None:
    names = ["a/abbey", "a/apartment_building/outdoor", *(f"c/{name}" for name in numbered(395))]
    lines(root / "SUN397/ClassName.txt", [f"/{name}" for name in names])
    for label, name in enumerate(names):
        for i in range(3):
            put(root / "SUN397" / name / f"sun_{i}{label:04d}.jpg", label)


def stl10(root: Path) -> None:
    for part, count in (("train", 20), ("test", 10)):
        labels = np.arange(count) % 10
        write(root / f"stl10_binary/{part}_X.bin", planes(labels, 96).tobytes())
        write(root / f"stl10_binary/{part}_y.bin", (labels + 1).astype(np.uint8).tobytes())
    write(root / "stl10_binary/unlabeled_X.bin", b"")
    lines(root / "stl10_binary/class_names.txt", ["airplane", *numbered(9)])


def openai(top: Path, names: list[str], suffix: str) -> None:
    for folder in ("train", "valid", "test"):
        folders(top / folder, names, 2, suffix)


BATCHES = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
CIFAR_10 = ("cifar-10-batches-bin", BATCHES, numbered(10), "batches.meta.txt")
CIFAR_100 = ("cifar-100-binary", ["train.bin", "test.bin"], numbered(100), "fine_label_names.txt")
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop"]
EUROSAT += ["Residential", "River", "SeaLake"]
COUNTRIES = sorted(benchmark_sets.class_names("country211"))[:211]
CALTECH = ["BACKGROUND_Google", "Faces", *numbered(100)]


def resisc45(root: Path) -> None:
    folders(root / "NWPU-RESISC45", numbered(45), 20)


# Set -> its miniature and the images of train, val and test that must be found in it.
MINIATURES: dict[str, tuple[Callable[[Path], None], tuple[int, int, int]]] = {
    "caltech-101": (lambda root: folders(root / "caltech101/101_ObjectCategories", CALTECH, 4), (3 * 102, 0, 102)),
    "cifar-10": (lambda root: cifar(root, *CIFAR_10), (50, 0, 10)),
    "cifar-100": (lambda root: cifar(root, *CIFAR_100), (100, 0, 100)),
    "country211": (lambda root: openai(root / "country211", COUNTRIES, ".jpg"), (422, 422, 422)),
    "dtd": (dtd, (47, 47, 47)),
    "eurosat-clip": (lambda root: folders(root / "eurosat/2750", EUROSAT, 6), (20, 20, 20)),
    "fer-2013": (fer, (14, 7, 7)),
    "fgvc-aircraft": (aircraft, (100, 100, 100)),
    "food-101": (food, (101, 0, 101)),
    "gtsrb": (gtsrb, (86, 0, 43)),
    "hateful-memes": (memes, (6, 0, 2)),
    "kitti-distance": (kitti, (33, 2, 3)),
    "mnist": (mnist, (20, 0, 10)),
    "oxford-flower-102": (flowers, (102, 102, 102)),
    "oxford-iiit-pets": (pets, (74, 0, 37)),
    "patch-camelyon": (patch_camelyon, (4, 2, 2)),
    "rendered-sst2": (lambda root: openai(root / "rendered-sst2", ["negative", "positive"], ".png"), (4, 4, 4)),
    "resisc45-clip": (resisc45, (2 * 45, 2 * 45, 16 * 45)),
    "stanford-cars": (cars, (196, 0, 196)),
    "voc-2007-cls": (voc, (3, 1, 2)),
    "sun397": (sun397, (397, 0, 397)),
    "stl10": (stl10, (20, 0, 10)),
}
GREY = ("fer-2013", "mnist", "voc-2007-cls")  # no class in the colour of the miniature


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder; torchvision's MD5 checks pass whatever is there, and there is no network."""
    from torchvision.datasets import flowers102
    from torchvision.datasets import stl10 as stl

    for module in (flowers102, stl):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("KADAPT_DATA", str(tmp_path))
    return tmp_path


def no_network(request: Any, timeout: float = 0) -> None:
    raise urllib.error.URLError("no network")


def make(root: Path, name: str) -> catalog.NamedSet:
    MINIATURES[name][0](root / name)
    return catalog.open_named(name, cache_bytes=1 << 20)


@pytest.mark.parametrize("name", MINIATURES)
def test_every_set_opens_from_its_original_layout(name: str, root: Path) -> None:
    named = make(root, name)
    row = SETS[name]
    assert named.name == name
    assert len(named.classes) == len(set(named.classes)) == row.classes
    assert tuple(len(named.entries.get(split, ())) for split in SPLITS) == MINIATURES[name][1]
    missing = {f"{name}: train has {len(named.entries['train']):,} images, {row.sizes[0]:,} were expected"}
    assert missing < {*named.notes, ""}
    assert (named.metric, named.templates, named.squash) == (row.metric, row.templates, name == "kitti-distance")
    paths = [path for rows in named.entries.values() for path, _ in rows]
    assert len(set(paths)) == len(paths)
    for split, rows in named.entries.items():
        assert [path for path, _ in rows] == [f"{name}/{split}/{number}" for number in range(len(rows))]
        if name != "voc-2007-cls" and (split, name) not in (("val", "kitti-distance"), ("test", "kitti-distance")):
            assert {label for _, label in rows} == set(range(row.classes))
        for path, label in rows[:: max(1, len(rows) // 7)]:
            _, _, image = data._load_named(named, path)
            assert image.mode == "RGB"
            assert name in GREY or label_of(image) == label, path


def test_the_table_is_complete() -> None:
    assert set(MINIATURES) == set(SETS)
    assert sum("few-shot" in row.benchmarks for row in SETS.values()) == 20
    assert sum("full-shot" in row.benchmarks for row in SETS.values()) == 7
    # The mean over the 20 sets of a head of width 512 (method: classes * 513), known from the reference's counts.
    assert sum(row.classes * 513 for row in SETS.values() if "few-shot" in row.benchmarks) / 20 == 29523.15
    others = {name: row.metric for name, row in SETS.items() if row.metric != "accuracy"}
    assert others == {"hateful-memes": "roc_auc", "voc-2007-cls": "11point_mAP"} | dict.fromkeys(
        ("caltech-101", "fgvc-aircraft", "oxford-flower-102", "oxford-iiit-pets"), "mean-per-class"
    )
    for row in SETS.values():
        assert all("{}" in template for template in row.templates)


@pytest.mark.parametrize("name", MINIATURES)
def test_no_set_is_unpickled(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any, **options: Any) -> Any:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "load", refused)
    monkeypatch.setattr(pickle, "loads", refused)
    monkeypatch.setattr(pickle, "Unpickler", refused)
    found = make(root, name)
    for rows in found.entries.values():
        found.picture(rows[0][0])


def test_class_names_are_for_people(root: Path) -> None:
    names = {name: make(root, name).classes for name in ("country211", "eurosat-clip", "oxford-iiit-pets", "sun397")}
    assert names["country211"][:2] == ("Andorra", "United Arab Emirates")
    assert names["eurosat-clip"][9] == "sea or lake"
    assert names["oxford-iiit-pets"][:2] == ("Abyssinian", "American Bulldog")
    assert names["sun397"][1] == "apartment building, outdoor"
    assert make(root, "fgvc-aircraft").classes[0] == "F-16A/B"
    assert make(root, "caltech-101").classes[0] == "background"
    assert make(root, "mnist").classes == tuple("0123456789")


def test_voc_is_multi_label(root: Path) -> None:
    named = make(root, "voc-2007-cls")
    found = {split: [label for _, label in rows] for split, rows in named.entries.items()}
    assert found == {split: [VOC_POSITIVE[image] for image in images] for split, images in VOC.items()}


def test_fer_reads_either_file_of_kaggle(root: Path) -> None:
    fer(root / "fer-2013", "icml_face_data.csv", "emotion, Usage, pixels")
    named = catalog.open_named("fer-2013", cache_bytes=1)
    assert {split: len(rows) for split, rows in named.entries.items()} == {"train": 14, "val": 7, "test": 7}
    assert data._load_named(named, "fer-2013/test/3")[2].getpixel((47, 0)) == (8, 8, 8)


@pytest.mark.parametrize(
    ("depths", "expected"), [((8.0,), 0), ((8.1, 30), 1), ((20.0,), 1), ((20.1, 90), 2), ((), 3), ((-1.0,), 0)]
)
def test_kitti_classes_follow_the_nearest_vehicle(depths: tuple[float, ...], expected: int) -> None:
    rows = [vehicle("Van", z) for z in depths] + [vehicle(kind, 1.0) for kind in ("Cyclist", "Tram", "DontCare")]
    assert kitti_class("\n".join(rows) + "\n") == expected


# --- derived splits ---


def test_a_derived_split_is_disjoint_stratified_and_always_the_same() -> None:
    names = [f"{'ab'[i % 3 == 0]}/{i}.jpg" for i in range(27000)]
    labels = [int(i % 3 == 0) for i in range(27000)]
    chosen = derive(names, labels, (5000, 5000, 5000), per_class=False)
    assert [len(indices) for indices in chosen.values()] == [5000] * 3
    assert len({i for indices in chosen.values() for i in indices}) == 15000
    for indices in chosen.values():
        assert Counter(labels[i] for i in indices)[1] in (1666, 1667)
    assert chosen == derive(names, labels, (5000, 5000, 5000), per_class=False)
    assert chosen != derive(names, labels, (5000, 5000, 5000), per_class=False, seed=1)
    back = derive(names[::-1], labels[::-1], (5000, 5000, 5000), per_class=False)
    assert {split: {names[i] for i in indices} for split, indices in chosen.items()} == {
        split: {names[::-1][i] for i in indices} for split, indices in back.items()
    }
    assert chosen["train"][:6] == EXPECTED_DRAW  # a change of the rule would change everybody's results


EXPECTED_DRAW = [3, 7, 10, 21, 23, 24]


def test_derived_sizes() -> None:
    labels = [0] * 1000 + [1] * 300 + [2] * 6181

    def sizes(wanted: tuple[int | None, ...], n: int, *, per_class: bool) -> list[int]:
        chosen = derive([str(i) for i in range(n)], labels[:n], wanted, per_class=per_class)
        return [len(indices) for indices in chosen.values()]

    assert sizes((6347, 423, 711), 7481, per_class=False) == [6347, 423, 711]
    assert sizes((70, 70, 560), 1300, per_class=True) == [70 + 30, 70 + 30, 560 + 240]
    assert sizes((30, 0, None), 7481, per_class=True) == [90, 0, 7391]
    assert sizes((30, 0, None), 3, per_class=True) == [2, 0, 1]


def test_a_derived_split_is_kept_and_other_files_are_refused(root: Path) -> None:
    named = make(root, "kitti-distance")
    kept = json.loads((root / "kitti-distance/split.json").read_text())
    assert {split: len(kept[split]) for split in SPLITS} == {"train": 33, "val": 2, "test": 3}
    assert (kept["seed"], kept["images"]) == (benchmark_sets.SPLIT_SEED, 40)
    assert catalog.open_named("kitti-distance", cache_bytes=1).entries == named.entries
    (root / "kitti-distance/Kitti/raw/training/image_2/000003.png").unlink()
    with pytest.raises(DataError, match=r"split.json holds the split of other files than the 39 found"):
        catalog.open_named("kitti-distance", cache_bytes=1)


# --- what cannot be opened ---


def test_names_and_suggestions() -> None:
    assert all(catalog.is_named(name) for name in [*SETS, "demo", "eurosat", "CIFAR-10", "torch/mnist"])
    assert not any(catalog.is_named(name) for name in ("pets", "./mnist", "photos", ""))
    assert catalog.suggest("pets") == ["oxford-iiit-pets"]
    assert catalog.suggest("cifar-1O")[0] == "cifar-10"
    assert catalog.suggest("my-holiday-photos") == []


def test_sets_that_must_be_fetched_by_hand_say_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"fer-2013: .*put fer2013.csv or icml_face_data.csv from https://www.kaggle"):
        catalog.open_named("fer-2013", cache_bytes=1)
    with pytest.raises(DataError, match=rf"train.jsonl, dev_seen.jsonl or dev.jsonl, img from \S+ into {root}/hateful"):
        catalog.open_named("hateful-memes", cache_bytes=1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("stanford-cars", "resisc45"):
        with pytest.raises(DataError, match=r"run: pip install 'datasets>=3', or put .* into"):
            catalog.open_named(name, cache_bytes=1)


@pytest.mark.parametrize("name", [name for name, row in SETS.items() if not row.page])
def test_offline_says_what_could_not_be_fetched_and_where_to_put_it(name: str, root: Path) -> None:
    with pytest.raises(DataError) as caught:
        catalog.open_named(name, cache_bytes=1)
    text = str(caught.value)
    assert "http" in text
    assert "no network" in text
    assert SETS[name].needs[0] in text
    assert str(root / name) in text
    assert "\n" not in text


def test_damage_is_named(root: Path) -> None:
    mnist(root / "mnist")
    write(root / "mnist/MNIST/raw/train-labels-idx1-ubyte", struct.pack(">2i", 2051, 20))
    with pytest.raises(DataError, match="mnist: could not be opened"):
        catalog.open_named("mnist", cache_bytes=1)
    kitti(root / "kitti-distance")
    lines(root / "kitti-distance/Kitti/raw/training/label_2/000000.txt", ["Car 0 0"])
    with pytest.raises(DataError, match="kitti-distance: could not be opened"):
        catalog.open_named("kitti-distance", cache_bytes=1)
    folders(root / "resisc45-clip/NWPU-RESISC45", numbered(44), 1)
    with pytest.raises(DataError, match=r"45 classes of images were expected, 44 found"):
        catalog.open_named("resisc45-clip", cache_bytes=1)
    openai(root / "rendered-sst2/rendered-sst2", ["negative", "positive"], ".png")
    for picture in (root / "rendered-sst2/rendered-sst2/train").rglob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match="rendered-sst2"):
        catalog.open_named("rendered-sst2", cache_bytes=1)
    food(root / "food-101")
    for pictures, found in ((["apple_pie/apple_pie_0000"], 1), ([], 0)):
        write(root / "food-101/food-101/meta/train.json", json.dumps({"apple_pie": pictures}))
        with pytest.raises(DataError, match=rf"101 classes of images were expected, {found} found"):
            catalog.open_named("food-101", cache_bytes=1)


class FakePart:
    """A part of a set of the package datasets, as far as it is used: 20 rows of each of 45 classes, at first."""

    features = {"label": types.SimpleNamespace(names=numbered(45))}  # noqa: RUF012

    def __init__(self, labels: list[int], decode: bool = True) -> None:
        self.labels, self.decode = labels, decode

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return {"label": self.labels}[key]
        assert not self.decode
        file = io.BytesIO()
        Image.new("RGB", (4, 4), colour(self.labels[key])).save(file, "PNG")
        return {"image": {"bytes": file.getvalue()}}

    def select(self, indices: list[int]) -> "FakePart":
        return FakePart([self.labels[i] for i in indices])

    def cast_column(self, column: str, decode: bool) -> "FakePart":
        return FakePart(self.labels, decode)


def test_a_set_from_hugging_face(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str, cache_dir: str) -> FakePart:
        assert (name, split, cache_dir) == (SETS["resisc45-clip"].hf, "train", str(root / "resisc45-clip/hf"))
        return FakePart([label for label in range(45) for _ in range(20)])

    hub = types.SimpleNamespace(load_dataset=load, Image=lambda decode: decode)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    named = catalog.open_named("resisc45-clip", cache_bytes=1)
    assert {split: len(rows) for split, rows in named.entries.items()} == {"train": 90, "val": 90, "test": 720}
    for path, label in named.entries["test"][::50]:
        assert label_of(data._load_named(named, path)[2]) == label


# --- downloads ---


def test_every_file_of_a_downloaded_set_has_a_checksum(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's or ours: no set is read from files that nobody vouches for. Every download is taken as done."""
    from torchvision.datasets import utils

    fetched: list[str] = []
    checked: dict[str, bool] = {}

    def whole(file: Any, md5: str | None = None) -> bool:
        """Missing when first asked for, there after that."""
        name = Path(file).name
        is_new = name not in checked
        checked[name] = checked.get(name, False) or md5 is not None
        return not is_new

    monkeypatch.setattr(utils, "check_integrity", whole)
    monkeypatch.setattr(utils, "extract_archive", lambda *given, **options: None)
    monkeypatch.setattr(downloads, "_fetch", lambda url, file: fetched.append(file.name) or file.touch())
    monkeypatch.setattr(downloads, "_digest", lambda file, kind: downloads.CHECKSUMS[file.name][1])
    monkeypatch.setattr(downloads, "_decompress", lambda archive: None)
    for name in (name for name, row in SETS.items() if not row.page):
        before = len(fetched)
        with pytest.raises(DataError):
            catalog.open_named(name, cache_bytes=1)
        assert len(fetched) > before, name
    assert set(downloads.CHECKSUMS) <= set(fetched)
    assert [name for name in fetched if not checked.get(name, name in downloads.CHECKSUMS)] == []


def test_a_cifar_record_is_red_green_and_blue_planes_row_by_row(root: Path) -> None:
    MINIATURES["cifar-100"][0](root / "cifar-100")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    record = bytes([19, 98]) + b"".join(pixels[:, :, channel].tobytes() for channel in range(3))
    (root / "cifar-100/cifar-100-binary/test.bin").write_bytes(record)
    found = catalog.open_named("cifar-100", cache_bytes=1)
    assert found.entries["test"] == [("cifar-100/test/0", 98)]
    assert np.array_equal(np.asarray(found.picture("cifar-100/test/0")), pixels)


def test_a_label_of_no_class_is_named(root: Path) -> None:
    MINIATURES["cifar-10"][0](root / "cifar-10")
    file = root / "cifar-10/cifar-10-batches-bin/test_batch.bin"
    file.write_bytes(b"\xc8" + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"cifar-10: test has a label 200, of 10 classes; mend .*cifar-10"):
        catalog.open_named("cifar-10", cache_bytes=1)


# --- kadapt data ---


def run_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["kadapt", "data", *words, "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_data_list(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fer(root / "fer-2013")
    sets = {row["name"]: row for row in run_json(capsys, monkeypatch, "list")["sets"]}
    assert list(sets) == list(SETS)
    assert [name for name, row in sets.items() if row["present"]] == ["fer-2013"]
    assert sets["dtd"] | {"note": ""} == {
        "name": "dtd", "classes": 47, "train": 1880, "val": 1880, "test": 1880, "metric": "accuracy",
        "benchmarks": ["few-shot", "full-shot"], "obtained": "download", "present": False, "note": "",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["kadapt", "data", "list"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert all(name in text for name in SETS)
    assert str(root) in text.replace("\n", "")


def test_data_check(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    resisc45(root / "resisc45-clip")
    found = run_json(capsys, monkeypatch, "check", "resisc45", "--shots", "1")
    assert found["splits"] == {"train": 45, "val": 90, "test": 720}
    assert found["own"] == {"train": 90, "val": 90, "test": 720}
    assert found["expected"] == {"train": 3150, "val": 3150, "test": 25200}
    assert found["metric"] == "accuracy"
    assert "resisc45-clip: test has 720 images, 25,200 were expected" in found["notes"]
    same = run_json(capsys, monkeypatch, "check", "resisc45", "--shots", "1")
    other = run_json(capsys, monkeypatch, "check", "resisc45", "--shots", "1", "--seed", "1")
    assert found["digest"] == same["digest"] != other["digest"]
    put(root / "resisc45-clip/NWPU-RESISC45/class_000/class_000_0003.jpg", 1)
    assert run_json(capsys, monkeypatch, "check", "resisc45", "--shots", "1")["digest"] != found["digest"]


def test_data_check_of_a_folder_and_of_what_cannot_be_used(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(root / "photos", ["ant", "bee"], 5)
    found = run_json(capsys, monkeypatch, "check", str(root / "photos"))
    assert (found["classes"], found["splits"]) == (["ant", "bee"], {"train": 6, "val": 2, "test": 2})
    assert (found["own"], found["expected"]) == (None, None)
    for source, words in (("fer-2013", "put fer2013.csv"), (str(root / "gone"), "not a folder")):
        monkeypatch.setattr(sys, "argv", ["kadapt", "data", "check", source])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 3
        assert words in capsys.readouterr().err
