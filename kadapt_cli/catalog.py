"""Data that comes by name: scikit-learn's digits (``demo``) and whatever timm's prefixes reach.

A named set is a list of (path, label) for each split and a way to get the picture of a path. Pictures are handed over
as timm's readers give them; `kadapt_cli.data` converts and checks them like those of a folder.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from kadapt_cli.errors import DataError

PREFIXES = ("torch/", "hfds/", "hfids/", "wds/", "tfds/")
# torchvision classes with a train and a test part only: timm gives the test part for every other split name.
TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
# What timm's readers, torchvision and their download code raise when a set cannot be had.
UNREACHABLE = (ImportError, OSError, RuntimeError, ValueError, AssertionError, KeyError)
NO_SUCH_SPLIT = (ValueError, KeyError, RuntimeError)


@dataclass(frozen=True)
class NamedSet:
    """A named set before any draw.

    ``entries`` gives (path, label) for "train" and, where the set has them, "val" and "test". ``tables`` gives, for the
    part of a path before its number, a sequence of (picture, label).
    """

    name: str
    classes: tuple[str, ...]
    entries: dict[str, list[tuple[str, int]]]
    tables: dict[str, Any] = field(repr=False)

    def picture(self, path: str) -> Image.Image | BinaryIO:
        """The picture of one path: a PIL image in any mode, or an open file with its bytes."""
        table, number = path.rsplit("/", 1)
        picture: Image.Image | BinaryIO = self.tables[table][int(number)][0]
        return picture


def is_named(source: str) -> bool:
    """Whether `source` means a named set rather than a folder; ``./torch/x`` is always a folder."""
    return source == "demo" or source.lower().startswith(PREFIXES)


def open_named(source: str, *, cache_bytes: int) -> NamedSet:
    """Find a named set, downloading it where its reader can.

    Args:
        source: "demo" or a timm name with its prefix, such as "torch/cifar10" or "hfds/beans".
        cache_bytes: Upper limit for the pictures of a streamed set (hfids, wds, tfds), which has to fit in memory.

    Raises:
        DataError: The set does not exist, cannot be downloaded, needs a package that is not installed, or is a stream
            larger than `cache_bytes`.
    """
    return _digits() if source == "demo" else _timm_set(source, cache_bytes)


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
    entries = [(f"demo/{number:04d}", label) for number, label in enumerate(labels)]
    return NamedSet("demo", tuple(str(digit) for digit in range(10)), {"train": entries}, {"demo": table})


def _timm_set(source: str, cache_bytes: int) -> NamedSet:
    prefix, rest = source.split("/", 1)
    prefix = prefix.lower()
    if prefix == "torch" and rest.lower() in ("folder", "image_folder"):
        raise DataError(f"{source}: a folder of classes is given by its own path, not as a named set")
    splits = {"train": _open_split(source, "train")}
    if prefix == "torch":
        test = "test" if rest.lower() in TRAIN_AND_TEST else "val"
        splits["test"] = _open_split(source, test)
    else:
        splits |= _optional_splits(source)
    reader = splits["train"]
    names = _class_names(reader)
    entries, tables = {}, {}
    for split, dataset in splits.items():
        table = f"{source}/{split}"
        tables[table] = _table(dataset, source, cache_bytes)
        entries[split] = [(f"{table}/{i}", label) for i, label in enumerate(_labels(dataset, tables[table]))]
    if names is None:
        values = sorted({label for rows in entries.values() for _, label in rows})
        places = {value: place for place, value in enumerate(values)}
        entries = {split: [(path, places[label]) for path, label in rows] for split, rows in entries.items()}
        names = tuple(str(value) for value in values)
    return NamedSet(rest.rstrip("/").rsplit("/", 1)[-1].lower(), names, entries, tables)


def _open_split(source: str, split: str) -> Any:
    """One split through timm; `DataError` in one line when it cannot be had."""
    root = data_root()
    try:
        return _create(source, split, root)
    except UNREACHABLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{source}: the {split} split could not be opened under {root} ({reason}); connect and try again, or open "
            "it on a connected machine and set KADAPT_DATA to a copy of that folder, or give a folder of images"
        ) from None


def _create(source: str, split: str, root: Path) -> Any:
    # Readers print their download progress; stdout belongs to the result of the command.
    with contextlib.redirect_stdout(sys.stderr):
        from timm.data import create_dataset

        place = root / source.split("/", 1)[1] if source.lower().startswith("wds/") else root
        return create_dataset(source, root=str(place), split=split, download=True, input_img_mode=None)


def _optional_splits(source: str) -> dict[str, Any]:
    """The validation and test splits of a hub set; validation serves as test where there is no test split."""
    found: dict[str, Any] = {}
    for ours, theirs in (("val", ("validation", "val", "valid")), ("test", ("test",))):
        for split in theirs:
            if ours not in found:
                with contextlib.suppress(*NO_SUCH_SPLIT):
                    found[ours] = _create(source, split, data_root())
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
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
