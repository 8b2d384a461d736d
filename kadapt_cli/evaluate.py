"""Load a finished run and measure it: `kadapt eval`, and the model behind `predict` and `merge-weights`."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kadapt_cli import descriptions, metrics, runs
from kadapt_cli.adapters import Adapted, adapt
from kadapt_cli.config import TrainConfig, resolve
from kadapt_cli.data import ImageSet, open_split, parse_manifest, restore
from kadapt_cli.errors import DataError, MachineError, ModelError, UsageError
from kadapt_cli.models import Backbone, load
from kadapt_cli.tensors import ImageDataset, Transform, make_transform

EVALUATION_BATCH = 128


@dataclass
class Run:
    """A trained run, ready to use: what `open_run` returns."""

    path: Path
    info: dict[str, Any]
    config: TrainConfig
    adapted: Adapted
    classes: tuple[str, ...]


def choose_device(name: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' as a device; `MachineError` when CUDA is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: this machine has no usable CUDA GPU; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def open_run(path: Path) -> Run:
    """Rebuild the adapted model of a run: backbone, checked by its digest, adapter and head. In eval mode, fp32, CPU.

    Raises:
        ModelError: No run, a damaged adapter, or a base model that is missing or not the one it was trained on.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; give the folder of a run made by `kadapt train`")
    tensors, info = runs.load_tensors(path / runs.ADAPTER, "adapter")
    descriptions.check(path / runs.ADAPTER, "adapter", info)
    config, classes, expected = (
        stored_config(info, path / runs.ADAPTER),
        tuple(info["classes"]),
        info["model"]["digest"],
    )
    room = sum(tensor.numel() for tensor in tensors.values())
    if max(config.rank or 0, config.width or 0, config.terms or 0) > room:  # each takes a number or more of the file
        raise ModelError(f"{path / runs.ADAPTER}: its tensors do not fit its description; train again")
    backbone = load_backbone(config)
    if backbone.digest != expected:
        raise ModelError(
            f"{path}: the adapter was trained on other weights of {config.model} (SHA-256 {expected[:12]}…) than those "
            f"found now ({backbone.digest[:12]}…); give back the weights it was trained on"
        )
    try:
        adapted = adapt(backbone, config, len(classes))
    except UsageError as error:
        raise ModelError(f"{path / runs.ADAPTER}: its description fits no model ({error}); train again") from None
    fill(adapted, tensors, path / runs.ADAPTER)
    return Run(path, info, config, adapted, classes)


def stored_config(info: Mapping[str, Any], source: Path) -> TrainConfig:
    """The configuration in a description; `ModelError` when it is none."""
    try:
        return resolve(info["config"])
    except UsageError as error:
        raise ModelError(f"{source}: its description is damaged ({error}); train again") from None


def load_backbone(config: TrainConfig) -> Backbone:
    """The configured backbone, frozen."""
    weights = Path(config.weights) if config.weights else None
    return load(config.model, pretrained=config.pretrained, weights=weights, img_size=config.img_size, seed=config.seed)


def fill(adapted: Adapted, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy saved tensors into the adapter and head; `ModelError` unless they match, and give finite numbers."""
    own = tensors_of(adapted)
    check_tensors(own, tensors, source)
    if not bool((tensors["head.std"] > 0).all()):
        raise ModelError(f"{source}: head.std was expected to be above 0; train again")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """`ModelError` unless tensors have the names, shapes and types of others, and all their values are finite."""

    def form(named: Mapping[str, Tensor], name: str) -> tuple[torch.Size, torch.dtype] | None:
        return (named[name].shape, named[name].dtype) if name in named else None

    differing = sorted(name for name in own.keys() | tensors.keys() if form(own, name) != form(tensors, name))
    if differing:
        raise ModelError(f"{source}: its tensors do not fit the model ({', '.join(differing[:3])}); train again")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ModelError(f"{source}: holds values that are not finite; train again with a smaller --lr")


def tensors_of(adapted: Adapted) -> dict[str, Tensor]:
    """All that an adapter file holds: the trainable tensors and the head's constants, by name."""
    return {**adapted.parameters(), "head.mean": adapted.head.mean, "head.std": adapted.head.std}


def logits(
    module: nn.Module, dataset: Dataset[Any], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(n, C) float32 logits and (n,) labels of a dataset, in its order, on the CPU; no gradients.

    Raises:
        MachineError: A batch of 128 images does not fit in the GPU's memory.
    """
    out, labels = [], []
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for images, target in DataLoader(dataset, batch_size=EVALUATION_BATCH):
            try:
                out.append(module(images.to(device)).float().cpu())
            except torch.OutOfMemoryError:
                raise MachineError(
                    f"out of memory with {len(images)} images; use a smaller --model or --img-size"
                ) from None
            labels.append(target)
    return torch.cat(out), torch.cat(labels)


def run_logits(run: Run, dataset: Dataset[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The logits of a run, and the labels; `ModelError` where its weights give values that are not finite."""
    values, labels = logits(run.adapted.module().to(device), dataset, device)
    if not bool(values.isfinite().all()):
        raise ModelError(f"{run.path}: its weights give values that are not finite; train again")
    return values, labels


def probabilities(values: Tensor) -> NDArray[np.float64]:
    """Softmax over the classes in float64."""
    result: NDArray[np.float64] = values.double().softmax(1).numpy()
    return result


def evaluate(
    path: Path, *, data: str | None, split: str, device: str, skip_bad: bool
) -> tuple[Run, metrics.Metrics | metrics.MultiLabel]:
    """Measure a run on a split of its own images, or on all images of another source with the same classes.

    Raises:
        ModelError: As `open_run`.
        DataError: The images are not those of the run any more, or the split is empty, or a class is unknown.
    """
    run = open_run(path)
    images = images_of(run, data, split, skip_bad)
    if not images.splits[split]:
        there = ", ".join(f"{name} {len(samples)}" for name, samples in images.splits.items() if samples)
        raise DataError(f"--split {split}: there are no such images ({there}); choose another split, or give --data")
    dataset = ImageDataset(images, split, transform_of(run), seed=run.config.seed)
    chosen = choose_device(device)
    values, labels = run_logits(run, dataset, chosen)
    if images.multi_label:
        score = metrics.score(images.metric, values.numpy(), labels.numpy())
        return run, metrics.MultiLabel(images.metric, score, len(labels))
    return run, metrics.evaluate(probabilities(values), labels.numpy(), run.classes)


def transform_of(run: Run) -> Transform:
    """How the run's model takes its images."""
    return make_transform(run.adapted.backbone.data_config, augment="none", squash=run.info.get("squash", False))


def images_of(run: Run, data: str | None, split: str, skip_bad: bool) -> ImageSet:
    """The run's own images as its manifest lists them, or another source's with the run's classes."""
    if data is not None:
        return open_split(data, split, run.classes, skip_bad=skip_bad)
    return run_images(run.path, run.config, run.info)


def run_images(path: Path, config: TrainConfig, info: Mapping[str, Any]) -> ImageSet:
    """The images that the manifest of the run folder `path` lists, each checked against its size and digest.

    Raises:
        ModelError: The manifest is missing, or is not that of the run that `info` describes.
        DataError: Images that are missing or have changed.
    """
    manifest = path / runs.MANIFEST
    if not manifest.is_file():
        raise ModelError(f"{manifest}: missing; restore it, or give the images with --data")
    text, classes = manifest.read_bytes(), tuple(info["classes"])
    if hashlib.sha256(text).hexdigest()[: len(info["manifest"])] != info["manifest"]:
        raise ModelError(f"{manifest}: not what the run wrote; restore it, or give the images with --data")
    try:
        return restore(config.data, parse_manifest(text.decode(), classes), classes)
    except UnicodeDecodeError:
        raise ModelError(f"{manifest}: not UTF-8; restore it, or give the images with --data") from None
