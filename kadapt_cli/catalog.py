"""Data that comes by name: scikit-learn's digits (``demo``), the comparison's sets, and what timm's prefixes reach.

A named set is a list of (path, label) for each split and a way to get the picture of a path. Pictures are handed over
as timm's readers give them; `kadapt_cli.data` converts and checks them like those of a folder.
"""

import contextlib
import csv
import difflib
import hashlib
import os
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from kadapt_cli.benchmark_sets import ALIASES, SETS, SPLITS, Label, open_tables
from kadapt_cli.downloads import resumable
from kadapt_cli.errors import DataError

PREFIXES = ("torch/", "hfds/", "hfids/", "wds/", "tfds/")
# torchvision classes with a train and a test part only: timm gives the test part for every other split name.
TRAIN_AND_TEST = ("mnist", "kmnist", "fashion_mnist", "qmnist")
# What timm's readers, torchvision and their download code raise when a set cannot be had.
UNREACHABLE = (OSError, RuntimeError, ValueError, AssertionError, KeyError)
DAMAGED = (IndexError, EOFError, csv.Error, zipfile.BadZipFile, tarfile.TarError, zlib.error)  # files of a known layout
NO_SUCH_SPLIT = (ValueError, KeyError, RuntimeError)


@dataclass(frozen=True)
class NamedSet:
    """A named set before any draw.

    ``entries`` gives (path, label) for "train" and, where the set has them, "val" and "test". ``tables`` gives, for the
    part of a path before its number, a sequence of (picture, label). Validation serves as test where there is no test.
    A label is an index into the classes; for a multi-label set (``metric`` "11point_mAP") it is a tuple of them, maybe
    empty. ``templates`` make a sentence of a class name. ``squash`` asks for the whole picture, not a crop.
    """

    name: str
    classes: tuple[str, ...]
    entries: dict[str, list[tuple[str, Label]]]
    tables: dict[str, Any] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    metric: str = "accuracy"
    templates: tuple[str, ...] = ("a photo of a {}.",)
    squash: bool = False

    def picture(self, path: str) -> Image.Image | BinaryIO:
        """The picture of one path: a PIL image in any mode, or an open file with its bytes."""
        table, number = path.rsplit("/", 1)
        picture: Image.Image | BinaryIO = self.tables[table][int(number)][0]
        return picture


def is_named(source: str) -> bool:
    """Whether `source` means a named set rather than a folder; ``./torch/x`` and ``./mnist`` are always folders."""
    return source == "demo" or _benchmark_name(source) in SETS or source.lower().startswith(PREFIXES)


def known_name(source: str) -> str:
    """The name of a set of the comparison, for all its spellings; other names as they are."""
    name = _benchmark_name(source)
    return name if name in SETS else source


def _benchmark_name(source: str) -> str:
    return ALIASES.get(source.lower(), source.lower())


def suggest(source: str) -> list[str]:
    """At most three known names like `source`, best first: those that hold it, then those spelt like it."""
    text = source.lower()
    names = ["demo", *SETS]
    holding = [name for name in names if len(text) > 2 and text in name]
    spelt = difflib.get_close_matches(text, names, n=3, cutoff=0.6)
    return list(dict.fromkeys(holding + spelt))[:3]


def open_named(source: str, *, cache_bytes: int) -> NamedSet:
    """Find a named set, downloading it where its reader can.

    Args:
        source: "demo", a set of the comparison ("oxford-iiit-pets"), or a timm name with its prefix, such as
            "torch/kmnist" or "hfds/beans".
        cache_bytes: Upper limit for the pictures of a streamed set (hfids, wds, tfds), which has to fit in memory.

    Raises:
        DataError: The set does not exist, cannot be downloaded, needs a package that is not installed, is damaged, or
            is a stream larger than `cache_bytes`.
    """
    if source == "demo":
        return _digits()
    name = _benchmark_name(source)
    return _benchmark_set(name, source) if name in SETS else _timm_set(source, cache_bytes)


def data_root() -> Path:
    """Where downloaded sets live: $KADAPT_DATA, else $XDG_CACHE_HOME/kadapt/data, else ~/.cache/kadapt/data."""
    if chosen := os.environ.get("KADAPT_DATA"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kadapt" / "data"


def _digits() -> NamedSet:
    """1,797 handwritten digits of 8x8 pixels with 17 grey levels, bundled with scikit-learn; no network."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = [int(label) for label in digits.target]
    table = [(Image.fromarray(pixels), label) for pixels, label in zip(grey, labels, strict=True)]
    entries: list[tuple[str, Label]] = [(f"demo/{number:04d}", label) for number, label in enumerate(labels)]
    return NamedSet("demo", tuple(str(digit) for digit in range(10)), {"train": entries}, {"demo": table})


def _timm_set(source: str, cache_bytes: int) -> NamedSet:
    prefix, rest = source.split("/", 1)
    prefix = prefix.lower()
    if prefix == "torch" and rest.lower() in ("folder", "image_folder"):
        raise DataError(f"{source}: a folder of classes is given by its own path, not as a named set")
    with _reaching(source), resumable():
        splits = {"train": _create(source, "train")}
        if prefix == "torch":
            splits["test"] = _create(source, "test" if rest.lower() in TRAIN_AND_TEST else "val")
        else:
            splits |= _optional_splits(source)
        tables = {f"{source}/{split}": _table(dataset, source, cache_bytes) for split, dataset in splits.items()}
        labels = {split: _labels(dataset, tables[f"{source}/{split}"]) for split, dataset in splits.items()}
    names = _class_names(splits["train"])
    values = sorted(set(labels["train"])) if names is None else list(range(len(names)))
    places = {value: place for place, value in enumerate(values)}
    entries: dict[str, list[tuple[str, Label]]] = {}
    notes = []
    for split, found in labels.items():
        strange = [label for label in found if label not in places]
        if not strange:
            entries[split] = [(f"{source}/{split}/{index}", places[label]) for index, label in enumerate(found)]
        elif split == "train":
            raise DataError(f"{source}: label {strange[0]} has no class name; choose a set made for classification")
        else:
            notes.append(f"the {split} split has labels that are no class ({strange[0]}) and was ignored")
    if "test" not in entries and "val" in entries:
        entries["test"] = entries.pop("val")
    classes = names or tuple(str(value) for value in values)
    return NamedSet(rest.rstrip("/").rsplit("/", 1)[-1].lower(), classes, entries, tables, notes)


def _benchmark_set(name: str, source: str) -> NamedSet:
    """A set of the comparison, in a folder of its name below `data_root`."""
    row, root = SETS[name], data_root() / name
    with _reaching(name, row.by_hand(root)), resumable():
        classes, tables = open_tables(row, root)
    tables = {split: tables[split] for split in SPLITS if len(tables.get(split, ()))}
    counts = {split: (len(tables.get(split, ())), size) for split, size in zip(SPLITS, row.sizes, strict=True)}
    wrong = {split: pair for split, pair in counts.items() if pair[0] != pair[1]}
    notes = [row.note] if row.note else []
    notes += [f"{name}: {split} has {n:,} images, {size:,} were expected" for split, (n, size) in wrong.items()]
    if Path(source).is_dir():
        notes.append(f"the folder {source} here was not used; write ./{source} for it")
    entries = {
        split: [(f"{name}/{split}/{number}", label) for number, label in enumerate(table.labels)]
        for split, table in tables.items()
    }
    by_path = {f"{name}/{split}": table for split, table in tables.items()}
    return NamedSet(name, classes, entries, by_path, notes, row.metric, row.templates, row.squash)


@contextlib.contextmanager
def _reaching(source: str, by_hand: str = "give a folder of images") -> Iterator[None]:
    """Turn what readers raise into one line that says what was tried and how to do it without a connection."""
    try:
        # Readers print their download progress; stdout belongs to the result of the command.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ImportError as error:
        name = error.name or "it"
        raise DataError(f"{source}: is read by the package {name}, which is missing; run: pip install {name}") from None
    except (*UNREACHABLE, *DAMAGED) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{source}: could not be opened under {data_root()} ({reason}); connect and try again, or open it on a "
            f"connected machine and set KADAPT_DATA to a copy of that folder, or {by_hand}"
        ) from None


# --- timm's readers ---


def _create(source: str, split: str) -> Any:
    """One split as timm's dataset, which raises one of `UNREACHABLE` when it cannot be had."""
    from timm.data import create_dataset

    # A web dataset is found by its folder, all others by their name below the root.
    root = data_root() / source.split("/", 1)[1] if source.lower().startswith("wds/") else data_root()
    return create_dataset(source, root=str(root), split=split, download=True, input_img_mode=None)


def _optional_splits(source: str) -> dict[str, Any]:
    """The validation and test splits of a set, where it has them."""
    found: dict[str, Any] = {}
    for ours, theirs in (("val", ("validation", "val", "valid")), ("test", ("test",))):
        for split in theirs:
            if ours not in found:
                with contextlib.suppress(*NO_SUCH_SPLIT):
                    found[ours] = _create(source, split)
    return found


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    if not names:
        places: dict[str, int] = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
        names = sorted(places, key=lambda name: places[name])
    # ImageNet's names are tuples of synonyms, and two of its classes share a name.
    texts = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    unique = [text if texts.count(text) == 1 else f"{text} ({place})" for place, text in enumerate(texts)]
    return tuple(unique) or None


def _table(dataset: Any, source: str, cache_bytes: int) -> Any:
    """A sequence of (picture, label); not through timm's ImageDataset, which replaces a corrupt image by the next."""
    if not hasattr(dataset, "__getitem__") or source.lower().startswith(("hfids/", "wds/", "tfds/")):
        return list(_within(dataset, source, cache_bytes))
    return getattr(dataset, "reader", dataset)


def _within(stream: Iterable[tuple[Any, Any]], source: str, cache_bytes: int) -> Iterator[tuple[Image.Image, int]]:
    used = 0
    for picture, label in stream:
        used += 3 * picture.width * picture.height
        if used > cache_bytes:
            raise DataError(
                f"{source}: a streamed set has to fit in {cache_bytes >> 20} MiB of memory and does not; use hfds/ "
                "instead, or save its images as a folder of classes"
            )
        yield picture, int(label)


def _labels(dataset: Any, table: Any) -> list[int]:
    """The labels of all samples, without decoding pictures where the reader can give them."""
    if isinstance(table, list):
        return [label for _, label in table]
    if hasattr(table, "iter_targets"):
        return [int(label) for label in table.iter_targets()]
    targets = getattr(dataset, "targets", None)
    if targets is not None and not hasattr(targets, "ndim"):
        return [int(label) for label in targets]
    if targets is not None and targets.ndim == 1:
        return [int(label) for label in targets]
    return [int(table[index][1]) for index in range(len(table))]


# --- what `kadapt data` prints ---


def listing() -> list[dict[str, Any]]:
    """The sets of the comparison: what they are, how they are obtained and whether they are on this machine."""
    rows = []
    for row in SETS.values():
        root = data_root() / row.name
        present = row.is_present(root) or (bool(row.hf) and any((root / "hf").glob("**/*.arrow")))
        sizes = {"name": row.name, "classes": row.classes} | dict(zip(SPLITS, row.sizes, strict=True))
        how = {"metric": row.metric, "benchmarks": list(row.benchmarks), "obtained": row.obtained}
        rows.append(sizes | how | {"present": present, "note": row.note})
    return rows


def check(source: str, *, shots: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Open a folder or a named set as a run would, decode every image drawn, and say what is there.

    Returns:
        ``splits`` counts the images of the run's splits, ``own`` those that the source itself has (named sets only) and
        ``expected`` those that it should have (sets of the comparison only). ``digest`` is the SHA-256 of the manifest:
        equal where images, labels and splits are. ``bad`` names every image that cannot be used, with the reason; the
        counts are of the others.

    Raises:
        DataError: As `kadapt_cli.data.open_images` that leaves out bad images.
    """
    from kadapt_cli.data import manifest_csv, open_images

    images = open_images(source, shots=shots, seed=seed, skip_bad=True, cache_bytes=0)
    named = open_named(source, cache_bytes=1 << 30) if is_named(source) else None
    row = SETS.get(_benchmark_name(source)) if named else None
    return {
        "schema_version": 1,
        "data": source,
        "name": images.name,
        "classes": list(images.classes),
        "metric": images.metric,
        "splits": {split: len(images.splits[split]) for split in SPLITS},
        "own": {split: len(rows) for split, rows in named.entries.items()} if named else None,
        "expected": dict(zip(SPLITS, row.sizes, strict=True)) if row else None,
        "digest": hashlib.sha256(manifest_csv(images).encode()).hexdigest(),
        "bad": images.bad,
        "notes": images.notes,
    }
