"""The 22 sets of the comparison: the 20 of ELEVATER's few-shot track and the 7 of the full-shot table.

A row of `SETS` says what a set is, what lies where below its folder and who reads it. A reader turns files in their
original layout into class names and one `Table` a split; labels are read at once, pictures when they are asked for.

Where a set has no split of its own, or not the one of the comparison, `derive` draws it: of each class the images are
ranked by sha256(seed:path), and the first go to train, the next to val and then test. It depends on nothing but
`SPLIT_SEED` and the paths. The chosen indices are kept in the set's folder, in split.json.

Sizes and metrics: ELEVATER (Li et al. 2022). Distance classes of KITTI: VTAB (Zhai et al. 2019).
"""

import bisect
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kadapt_cli.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_SEED = 0
SPLIT_RULE = "of each class, by sha256(seed:path): first train, then val, then test; indices into the sorted paths"
# Metres. VTAB's classes of the nearest vehicle: up to 8, up to 20, farther, none.
KITTI_BOUNDS = (8.0, 20.0)
KITTI_VEHICLES = ("Car", "Van", "Truck")
FER_SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}

Label = int | tuple[int, ...]
Size = int | None


@dataclass(frozen=True)
class Table:
    """One split: row i is (picture, label). `opened` makes an open file or a PIL image of an item of `pictures`."""

    labels: list[Label]
    pictures: Any
    opened: Callable[[Any], Any] = itemgetter(0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Label]:
        return self.opened(self.pictures[index]), self.labels[index]


Opened = tuple[tuple[str, ...], dict[str, Table]]
Reader = Callable[["BenchmarkSet", Path], Opened]


@dataclass(frozen=True)
class BenchmarkSet:
    """One set of the comparison.

    ``sizes`` are the images of train, val and test (0: the set has no such split). ``needs`` are the paths that must
    lie in the set's folder, "a|b" being either. ``splits`` gives the arguments of the ``torchvision`` class for each
    split; ``archive`` is an address and an MD5 that stand in for it. A set with ``derived`` has no usable split: these
    are the sizes to draw, of the whole set or, with ``per_class``, of each class; None is the rest. ``page`` is where a
    set that must be fetched by hand comes from, and ``hf`` the Hugging Face data set that is read when it was not.
    """

    name: str
    classes: int
    sizes: tuple[int, int, int]
    read: Reader
    templates: tuple[str, ...]
    needs: tuple[str, ...]
    metric: str = "accuracy"
    benchmarks: tuple[str, ...] = ("few-shot",)
    torchvision: str = ""
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    derived: tuple[Size, Size, Size] | None = None
    per_class: bool = False
    squash: bool = False
    page: str = ""
    hf: str = ""
    archive: tuple[str, str] | None = None
    note: str = ""

    @property
    def obtained(self) -> str:
        """How the files come here: "download", "by hand" or "Hugging Face ID"."""
        return f"Hugging Face {self.hf}" if self.hf else "by hand" if self.page else "download"

    def is_present(self, root: Path) -> bool:
        """Whether all that the reader needs lies in `root`."""
        return all(any((root / path).exists() for path in need.split("|")) for need in self.needs)

    def by_hand(self, root: Path) -> str:
        """What to put where, as a part of a sentence."""
        source = f" from {self.page}" if self.page else ""
        return f"put {', '.join(self.needs).replace('|', ' or ')}{source} into {root}"


def open_tables(row: BenchmarkSet, root: Path) -> Opened:
    """Class names and tables of a set, downloaded into `root` where they can be; torchvision's errors are passed on.

    Raises:
        DataError: A set that must be fetched by hand, a missing package, too few or too many classes, a label of none,
            or a derived split other than the one kept in `root`.
    """
    if row.is_present(root) or not row.page:
        if not row.is_present(root):
            _download(row, root)
        classes, tables = row.read(row, root)
    elif row.hf:
        classes, tables = _hugging_face(row, root)
    else:
        raise DataError(f"{row.name}: cannot be downloaded by a program; {row.by_hand(root)}")
    _expect_classes(row, root, len(classes) if tables["train"].labels else 0)
    for split, table in tables.items():
        strange = [label for label in table.labels if isinstance(label, int) and not 0 <= label < row.classes]
        if strange:
            raise DataError(f"{row.name}: {split} has a label {strange[0]}, of {row.classes} classes; mend {root}")
    return classes, tables


def _download(row: BenchmarkSet, root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    for split in row.splits:
        _torchvision(row, root, split, download=True)
    if row.archive is not None:
        url, md5 = row.archive
        download_and_extract_archive(url, str(root), md5=md5)


def _expect_classes(row: BenchmarkSet, root: Path, found: int) -> None:
    if found != row.classes:
        raise DataError(f"{row.name}: {row.classes} classes of images were expected, {found} found; mend {root}")


# --- derived splits ---


def derive(
    names: Sequence[str], labels: Sequence[int], sizes: Sequence[Size], *, per_class: bool, seed: int = SPLIT_SEED
) -> dict[str, list[int]]:
    """Draw train, val and test, each with the classes in proportion: for each split, ascending indices into `names`.

    Args:
        names: Paths of the images, which rank them.
        labels: A label for each name.
        sizes: Images of train, val and test; None is all that is left. Shrunk in proportion when there are too few.
        per_class: Whether `sizes` hold for each class rather than in all.
        seed: Seed of the ranks.
    """
    groups: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for index in sorted(range(len(names)), key=lambda i: hashlib.sha256(os.fsencode(f"{seed}:{names[i]}")).digest()):
        groups[labels[index]].append(index)
    counts = [len(group) for group in groups.values()]
    shares = [_shares([n], sizes)[0] for n in counts] if per_class else _shares(counts, sizes)
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    for group, takes in zip(groups.values(), shares, strict=True):
        start = 0
        for split, take in zip(SPLITS, takes, strict=True):
            chosen[split] += group[start : start + take]
            start += take
    return {split: sorted(indices) for split, indices in chosen.items()}


def _shares(counts: list[int], sizes: Sequence[Size]) -> list[list[int]]:
    """For each class, how many of its images each split gets: parts in proportion, by largest remainder."""
    least = sum(1 if size is None else size for size in sizes)
    n, left = sum(counts), list(counts)
    takes: list[list[int]] = [[] for _ in counts]
    for size in sizes:
        rest = max(1, sum(left))
        total = rest if size is None else min(size, size * n // least)
        parts = [total * count // rest for count in left]
        by_remainder = sorted(range(len(left)), key=lambda i: (-(total * left[i] % rest), i))
        for i in by_remainder[: min(total, sum(left)) - sum(parts)]:
            parts[i] += 1
        left = [count - part for count, part in zip(left, parts, strict=True)]
        for take, part in zip(takes, parts, strict=True):
            take.append(part)
    return takes


def _drawn(row: BenchmarkSet, root: Path, names: list[str], labels: list[int]) -> dict[str, list[int]]:
    """The derived split of sorted names, kept in split.json; refused when another one is kept there."""
    assert row.derived is not None
    _expect_classes(row, root, len(set(labels)))  # before a split of half the files is kept
    chosen = derive(names, labels, row.derived, per_class=row.per_class)
    paths = hashlib.sha256("\n".join(names).encode()).hexdigest()
    document = {"seed": SPLIT_SEED, "rule": SPLIT_RULE, "images": len(names), "paths_sha256": paths, **chosen}
    file = root / "split.json"
    if not file.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"split.json.{os.getpid()}")
            part.write_text(json.dumps(document))
            part.replace(file)
        except OSError:
            return chosen  # a copy that may only be read is as good: the split follows from the paths
    elif json.loads(file.read_text()) != document:
        raise DataError(
            f"{row.name}: {file} holds the split of other files than the {len(names)} found; put the missing files "
            "back, or delete it to draw the split again"
        )
    return chosen


def _drawn_files(row: BenchmarkSet, root: Path, files: Sequence[tuple[Path, int]]) -> dict[str, Table]:
    pairs = sorted((path.relative_to(root).as_posix(), label) for path, label in files)
    names, labels = [name for name, _ in pairs], [label for _, label in pairs]
    chosen = _drawn(row, root, names, labels)
    return {split: _table([(root / names[i], labels[i]) for i in indices]) for split, indices in chosen.items()}


# --- readers ---


def _open_file(path: Path) -> io.BufferedReader:
    return open(path, "rb")  # whoever asked for the picture closes it


def _table(files: Sequence[tuple[Path, Label]]) -> Table:
    return Table([label for _, label in files], [path for path, _ in files], _open_file)


def class_names(name: str) -> Any:
    """The names kept for a set whose files have none: a list, or code -> name for country211; None for other sets."""
    with open(Path(__file__).parent / "assets" / "class_names.json", encoding="utf-8") as file:
        return json.load(file).get(name)


def _named(row: BenchmarkSet, found: Sequence[str]) -> tuple[str, ...]:
    """The names of classes for people and prompts, from those in the files."""
    kept = class_names(row.name)
    if isinstance(kept, dict):
        return tuple(kept.get(code, code) for code in found)
    return tuple(kept or (name.replace("_", " ") for name in found))


def _torchvision(row: BenchmarkSet, root: Path, split: str, **more: bool) -> Any:
    import torchvision.datasets

    return getattr(torchvision.datasets, row.torchvision)(str(root), **row.splits[split], **more)


def _files(dataset: Any) -> list[tuple[Path, int]]:
    """(file, label) of a torchvision data set; its classes keep them under one of these names."""
    for pairs in ("samples", "_samples"):
        if hasattr(dataset, pairs):
            return [(Path(path), int(label)) for path, label in getattr(dataset, pairs)]
    paths = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
    return [(Path(path), int(label)) for path, label in zip(paths, dataset._labels, strict=True)]


def _listed(row: BenchmarkSet, root: Path) -> Opened:
    """Sets of image files that torchvision lists, split by split."""
    parts = {split: _torchvision(row, root, split) for split in row.splits}
    names = _named(row, getattr(parts["train"], "classes", ()))
    return names, {split: _table(_files(part)) for split, part in parts.items()}


def _unsplit(row: BenchmarkSet, root: Path) -> Opened:
    """Sets of image files that torchvision lists without a split."""
    whole = _torchvision(row, root, "train")
    return tuple(name.replace("/", ", ") for name in _named(row, whole.classes)), _drawn_files(row, root, _files(whole))


def _arrays(row: BenchmarkSet, root: Path) -> Opened:
    """Sets whose pictures are not files of their own."""
    parts = {split: _torchvision(row, root, split) for split in row.splits}
    tables = {split: Table([int(label) for label in _labels(part)], part) for split, part in parts.items()}
    return _named(row, getattr(parts["train"], "classes", ())), tables


def _cifar(row: BenchmarkSet, root: Path) -> Opened:
    """The binary version, as torchvision's is made of pickles: the file of names, those of train, that of test.

    A record is the label, of CIFAR-100 the coarse one and the label, and a picture's planes of 32 x 32 bytes.
    """
    names, *train, test = (root / need for need in row.needs)
    size = (1 if row.classes == 10 else 2) + 3 * 32 * 32
    tables = {}
    for split, files in (("train", train), ("test", [test])):
        records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, size) for file in files])
        planes = records[:, -3 * 32 * 32 :].reshape(-1, 3, 32, 32)
        tables[split] = Table([int(label) for label in records[:, -3 * 32 * 32 - 1]], planes, _of_planes)
    return _named(row, names.read_text().split()), tables


def _of_planes(planes: Any) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def _labels(dataset: Any) -> Any:
    if hasattr(dataset, "h5py"):  # PatchCamelyon, whose labels are a file beside the pictures, of shape (n, 1, 1, 1)
        with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:
            return file["y"][:, 0, 0, 0]
    return dataset.targets if hasattr(dataset, "targets") else dataset.labels


def _class_folders(row: BenchmarkSet, root: Path) -> Opened:
    """Caltech-101 and RESISC45: a folder for each class below the only path needed, no split."""
    top = root / row.needs[0]
    folders = sorted(folder.name for folder in top.iterdir() if folder.is_dir())
    files = [(path, label) for label, name in enumerate(folders) for path in (top / name).glob("*.jpg")]
    names = ["background" if name == "BACKGROUND_Google" else name for name in folders]
    return _named(row, names), _drawn_files(row, root, files)


def _kitti(row: BenchmarkSet, root: Path) -> Opened:
    pictures, labels = (root / need for need in row.needs)
    files = [(path, kitti_class((labels / f"{path.stem}.txt").read_text())) for path in pictures.glob("*.png")]
    return _named(row, ()), _drawn_files(row, root, files)


def kitti_class(text: str) -> int:
    """The distance class of one KITTI label file: of the nearest Car, Van or Truck by z, the 14th field, in metres."""
    objects = [line.split() for line in text.splitlines()]
    depths = [float(fields[13]) for fields in objects if fields and fields[0] in KITTI_VEHICLES]
    return bisect.bisect_left(KITTI_BOUNDS, min(depths)) if depths else len(KITTI_BOUNDS) + 1


def _voc(row: BenchmarkSet, root: Path) -> Opened:
    """Every image of a split, also one without a positive class; 1 is positive, 0 (difficult) and -1 are not."""
    top = root / "VOCdevkit" / "VOC2007"
    names = _named(row, ())
    tables = {}
    for split in SPLITS:
        found: dict[str, list[int]] = {name: [] for name in (top / f"ImageSets/Main/{split}.txt").read_text().split()}
        for label, name in enumerate(names):
            fields = (top / f"ImageSets/Main/{name.replace(' ', '')}_{split}.txt").read_text().split()
            for image, value in zip(fields[::2], fields[1::2], strict=True):
                if value == "1":
                    found[image].append(label)
        tables[split] = _table([(top / f"JPEGImages/{image}.jpg", tuple(labels)) for image, labels in found.items()])
    return names, tables


def _fer(row: BenchmarkSet, root: Path) -> Opened:
    """Kaggle's CSV of 48 x 48 grey pixels. The half of its test images called PrivateTest is test, the other val."""
    file = next(root / name for name in row.needs[0].split("|") if (root / name).exists())
    labels: dict[str, list[Label]] = {split: [] for split in SPLITS}
    pixels: dict[str, list[Any]] = {split: [] for split in SPLITS}
    with file.open(newline="") as stream:
        for line in csv.DictReader(stream, skipinitialspace=True):
            split = FER_SPLITS[line["Usage"]]
            labels[split].append(int(line["emotion"]))
            pixels[split].append(np.array(line["pixels"].split(), dtype=np.uint8).reshape(48, 48))
    return _named(row, ()), {split: Table(labels[split], pixels[split], Image.fromarray) for split in SPLITS}


def _hateful_memes(row: BenchmarkSet, root: Path) -> Opened:
    tables = {}
    for split, need in (("train", row.needs[0]), ("test", row.needs[1])):
        file = next(root / name for name in need.split("|") if (root / name).exists())
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        tables[split] = _table([(root / meme["img"], int(meme["label"])) for meme in rows])
    return _named(row, ()), tables


def _in_bytes(cell: dict[str, Any]) -> io.BytesIO:
    return io.BytesIO(cell["image"]["bytes"])


def _hugging_face(row: BenchmarkSet, root: Path) -> Opened:
    """A set through the package datasets; a derived split ranks its rows by their numbers, as it has no paths."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{row.name}: is read by the package datasets, which is missing; run: pip install 'datasets>=3', or "
            f"{row.by_hand(root)}"
        ) from None
    parts = {split: datasets.load_dataset(row.hf, split=split, cache_dir=str(root / "hf")) for split in row.splits}
    names = _named(row, parts["train"].features["label"].names)
    if row.derived is not None:
        labels = [int(label) for label in parts["train"]["label"]]
        chosen = _drawn(row, root / "hf", [f"{number:06d}" for number in range(len(labels))], labels)
        parts = {split: parts["train"].select(indices) for split, indices in chosen.items()}
    raw = {split: part.cast_column("image", datasets.Image(decode=False)) for split, part in parts.items()}
    return names, {
        split: Table([int(label) for label in part["label"]], part, _in_bytes) for split, part in raw.items()
    }


# --- the table ---

BOTH = ("few-shot", "full-shot")
TRAIN_TEST = {split: {"split": split} for split in ("train", "test")}
TRAIN_VAL_TEST = {split: {"split": split} for split in SPLITS}
TRAIN_FLAG = {"train": {"train": True}, "test": {"train": False}}
PHOTO = ("a photo of a {}.", "a picture of the {}.", "a close view of a {}.")
IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
CIFAR_10 = ("batches.meta.txt", *(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR_100 = ("fine_label_names.txt", "train.bin", "test.bin")
CARS = "cars_test_annos_withlabels.mat"
MAIN = "VOCdevkit/VOC2007/ImageSets/Main"

ROWS = (
    BenchmarkSet("caltech-101", 102, (3060, 0, 6084), _class_folders, PHOTO, ("caltech101/101_ObjectCategories",),
        "mean-per-class", torchvision="Caltech101", splits={"train": {}}, derived=(30, 0, None), per_class=True,
        note="102 classes with the background; own split of 30 training images a class"),
    BenchmarkSet("cifar-10", 10, (50000, 0, 10000), _cifar, ("a small blurry photo of a {}.", "a tiny {}."),
        tuple(f"cifar-10-batches-bin/{file}" for file in CIFAR_10), benchmarks=BOTH,
        archive=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")),
    BenchmarkSet("cifar-100", 100, (50000, 0, 10000), _cifar, ("a small blurry photo of a {}.", "a tiny {}."),
        tuple(f"cifar-100-binary/{file}" for file in CIFAR_100), benchmarks=BOTH,
        archive=("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8")),
    BenchmarkSet("country211", 211, (31650, 10550, 21100), _listed, ("a photo taken in {}.", "a place in {}."),
        ("country211",), torchvision="Country211", splits=TRAIN_VAL_TEST | {"val": {"split": "valid"}}, note="11 GB"),
    BenchmarkSet("dtd", 47, (1880, 1880, 1880), _listed, ("a photo of a {} texture.", "a {} surface."), ("dtd/dtd",),
        benchmarks=BOTH, torchvision="DTD", splits={s: {"split": s, "partition": 1} for s in SPLITS}),
    BenchmarkSet("eurosat-clip", 10, (5000, 5000, 5000), _unsplit, ("a satellite photo of {}.", "{} seen from space."),
        ("eurosat/2750",), torchvision="EuroSAT", splits={"train": {}}, derived=(5000, 5000, 5000),
        note="own split of 15,000 of the 27,000 images"),
    BenchmarkSet("fer-2013", 7, (28709, 3589, 3589), _fer, ("a photo of a {} face.", "a person who looks {}."),
        ("fer2013.csv|icml_face_data.csv",), benchmarks=BOTH, note="test is Kaggle's PrivateTest, val its PublicTest",
        page="https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge"),
    BenchmarkSet("fgvc-aircraft", 100, (3334, 3333, 3333), _listed, ("a photo of a {}, a type of aircraft.",),
        ("fgvc-aircraft-2013b",), "mean-per-class", BOTH, "FGVCAircraft", TRAIN_VAL_TEST),
    BenchmarkSet("food-101", 101, (75750, 0, 25250), _listed, ("a photo of {}, a type of food.",),
        ("food-101/meta", "food-101/images"), torchvision="Food101", splits=TRAIN_TEST),
    BenchmarkSet("gtsrb", 43, (26640, 0, 12630), _listed, ("a photo of a traffic sign: {}.", "the sign '{}'."),
        ("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
        torchvision="GTSRB", splits=TRAIN_TEST, note="without ELEVATER's 12,569 validation images"),
    BenchmarkSet("hateful-memes", 2, (8500, 0, 500), _hateful_memes, ("a {}.",),
        ("train.jsonl", "dev_seen.jsonl|dev.jsonl", "img"), "roc_auc",
        page="https://hatefulmemeschallenge.com", note="research licence, which has to be accepted; the image alone"),
    BenchmarkSet("kitti-distance", 4, (6347, 423, 711), _kitti, ("{}.", "a photo of {}."),
        ("Kitti/raw/training/image_2", "Kitti/raw/training/label_2"), torchvision="Kitti", splits={"train": {}},
        derived=(6347, 423, 711), squash=True, note="distance to the nearest vehicle; own split; no centre crop"),
    BenchmarkSet("mnist", 10, (60000, 0, 10000), _arrays, ("a handwritten digit {}.",),
        tuple(f"MNIST/raw/{kind}-ubyte" for kind in IDX), torchvision="MNIST", splits=TRAIN_FLAG),
    BenchmarkSet("oxford-flower-102", 102, (1020, 1020, 6149), _listed, ("a photo of a {}, a type of flower.",),
        ("flowers-102/jpg", "flowers-102/setid.mat", "flowers-102/imagelabels.mat"), "mean-per-class",
        torchvision="Flowers102", splits=TRAIN_VAL_TEST),
    BenchmarkSet("oxford-iiit-pets", 37, (3680, 0, 3669), _listed, ("a photo of a {}, a breed of cat or dog.",),
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"), "mean-per-class",
        torchvision="OxfordIIITPet", splits={"train": {"split": "trainval"}, "test": {"split": "test"}}),
    BenchmarkSet("patch-camelyon", 2, (262144, 32768, 32768), _arrays, ("a microscope image of {}.",),
        tuple(f"pcam/camelyonpatch_level_2_split_{s}_{part}.h5" for s in ("train", "valid", "test") for part in "xy"),
        torchvision="PCAM", splits=TRAIN_VAL_TEST, note="over 6 GB; reading it takes h5py"),
    BenchmarkSet("rendered-sst2", 2, (6920, 872, 1821), _listed, ("a {} film review.", "a sentence with a {} opinion."),
        ("rendered-sst2",), torchvision="RenderedSST2", splits=TRAIN_VAL_TEST),
    BenchmarkSet("resisc45-clip", 45, (3150, 3150, 25200), _class_folders,
        ("a satellite photo of a {}.", "a {} from above."), ("NWPU-RESISC45",), splits={"train": {}},
        derived=(70, 70, 560), per_class=True, hf="jonathan-roberts1/NWPU-RESISC45",
        page="https://gcheng-nwpu.github.io", note="own split of 70, 70 and 560 images a class"),
    BenchmarkSet("stanford-cars", 196, (8144, 0, 8041), _listed, ("a photo of a {}.", "a {} parked on a street."),
        tuple(f"stanford_cars/{part}" for part in ("devkit", "cars_train", "cars_test", CARS)),
        torchvision="StanfordCars", splits=TRAIN_TEST, hf="tanganke/stanford_cars",
        page="https://github.com/pytorch/vision/issues/7545", note="its makers no longer offer it; see the page"),
    BenchmarkSet("voc-2007-cls", 20, (2501, 2510, 4952), _voc, PHOTO,
        ("VOCdevkit/VOC2007/JPEGImages", *(f"{MAIN}/{split}.txt" for split in SPLITS)), "11point_mAP",
        torchvision="VOCDetection", splits={s: {"year": "2007", "image_set": s} for s in SPLITS},
        note="several classes an image"),
    BenchmarkSet("sun397", 397, (19850, 0, 19850), _unsplit, ("a photo of a {}.", "a scene: {}."),
        ("SUN397/ClassName.txt",), benchmarks=("full-shot",), torchvision="SUN397", splits={"train": {}},
        derived=(50, 0, 50), per_class=True, note="own split of 50 and 50 images a class"),
    BenchmarkSet("stl10", 10, (5000, 0, 8000), _arrays, PHOTO, ("stl10_binary",),
        benchmarks=("full-shot",), torchvision="STL10", splits=TRAIN_TEST),
)  # fmt: skip
SETS = {row.name: row for row in ROWS}
ALIASES = {"eurosat": "eurosat-clip", "resisc45": "resisc45-clip"}
ALIASES |= {f"{prefix}cifar{number}": f"cifar-{number}" for prefix in ("", "torch/") for number in (10, 100)}
