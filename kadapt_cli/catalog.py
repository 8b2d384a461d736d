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
    part of a path before its number, a sequence of (picture, label). Validation serves as test where there is no test.
    """

    name: str
    classes: tuple[str, ...]
    entries: dict[str, list[tuple[str, int]]]
    tables: dict[str, Any] = field(repr=False)
    notes: list[str] = field(default_factory=list)

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
    with _reaching(source):
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
    entries: dict[str, list[tuple[str, int]]] = {}
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


@contextlib.contextmanager
def _reaching(source: str) -> Iterator[None]:
    """Turn what readers raise into one line that says what was tried and how to do it without a connection."""
    try:
        # Readers print their download progress; stdout belongs to the result of the command.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UNREACHABLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{source}: could not be opened under {data_root()} ({reason}); connect and try again, or open it on a "
            "connected machine and set KADAPT_DATA to a copy of that folder, or give a folder of images"
        ) from None


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
