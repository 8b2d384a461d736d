"""`kadapt predict`: the most probable classes of images, in the order given."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kadapt_cli.data import visible_entries
from kadapt_cli.errors import DataError, UsageError, shown
from kadapt_cli.evaluate import choose_device, open_run, probabilities, run_logits, transform_of
from kadapt_cli.images import IMAGE_SUFFIXES, read_image


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files as tensors, in order; the label is always 0."""

    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_image(self.paths[index])), 0


def predict(
    path: Path, images: Sequence[Path], *, top: int, device: str, skip_bad: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Classify files and folders with a run.

    Args:
        path: The run folder.
        images: Files, and folders of which every image below is taken, in the order of their paths.
        top: How many classes to give an image, at most all.
        device: 'auto', 'cpu' or 'cuda'.
        skip_bad: Leave out images that cannot be read instead of stopping.

    Returns:
        [{"path", "classes": [{"name", "probability"}]}] in the order given, and what was wrong with those left out:
        with `skip_bad` images that cannot be read, and links out of a folder always.

    Raises:
        DataError: A path that does not exist, a folder without images, images that cannot be read.
        UsageError: `top` below 1.
    """
    if top < 1:
        raise UsageError(f"--top: expected 1 or more, but {top} was given")
    run = open_run(path)
    links: list[str] = []
    files = [file for image in images for file in _below(image, links)]
    good, bad = _readable(files)
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} of {len(files)} images cannot be used: {'; '.join(bad[:5])}; pass --skip-bad to leave them out"
        )
    if not good:
        raise DataError("no image is left to classify")
    chosen = choose_device(device)
    values, _ = run_logits(run, _Files(good, transform_of(run)), chosen)
    several = run.info.get("metric") == "11point_mAP"  # labels that do not exclude each other
    found = values.double().sigmoid() if several else torch.from_numpy(probabilities(values))
    best = found.topk(min(top, len(run.classes)))
    return [
        {
            "path": str(file),
            "classes": [{"name": run.classes[int(c)], "probability": float(p)} for p, c in zip(ps, cs, strict=True)],
        }
        for file, ps, cs in zip(good, best.values, best.indices, strict=True)
    ], links + bad


def _below(path: Path, links: list[str]) -> list[Path]:
    """The file itself, or all images below a folder but hidden ones, by path.

    Links to folders are not followed; those to files outside the folder neither, and are added to `links`.
    """
    if not path.is_dir():
        return [path]
    root, left, found = path.resolve(), visible_entries(path), list[Path]()
    while left:
        entry = left.pop()
        if entry.is_dir(follow_symlinks=False):
            left += visible_entries(Path(entry.path))
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not os.path.isdir(entry.path):
            if Path(os.path.realpath(entry.path)).is_relative_to(root):
                found.append(Path(entry.path))
            else:
                links.append(f"{shown(entry.path)}: a link out of the folder, which is not followed")
    if not found:
        raise DataError(f"{shown(str(path))}: holds no images; give image files or folders of them")
    return sorted(found)


def _readable(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    good, bad = [], []
    for file in files:
        try:
            read_image(file)
            good.append(file)
        except DataError as error:
            bad.append(str(error))
    return good, bad
