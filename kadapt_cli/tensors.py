"""From the images of a split to the tensors of a training run, the same wherever and however often they are made."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from kadapt_cli.data import ImageSet, Sample
from kadapt_cli.errors import UsageError

CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Transform:
    """From an RGB picture to a normalised float32 tensor (3, H, W); `is_random` when it draws random numbers."""

    steps: Callable[[Image.Image], torch.Tensor]
    is_random: bool

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Apply the steps to one picture."""
        return self.steps(image)


def make_transform(data_config: dict[str, Any], *, augment: str, squash: bool = False) -> Transform:
    """timm's transform for a model.

    Args:
        data_config: What `timm.data.resolve_model_data_config` gives: input_size, interpolation, mean, std, crop_pct,
            crop_mode.
        augment: "none" is the evaluation transform. "light" crops to 35 % of the area or more and jitters colours; it
            never mirrors, which would make another class of a letter or a hand. "strong" crops to 20 % or more, mirrors
            half of the time, solarises, greys or blurs (timm's "3a"), and erases rectangles.
        squash: Without augmentation, resize the whole picture to the input size, whatever its shape, and crop nothing.

    Raises:
        UsageError: Another value of `augment`.
    """
    from timm.data import create_transform

    choices: dict[str, dict[str, Any]] = {
        "none": {},
        "light": {"scale": (0.35, 1.0), "hflip": 0.0, "color_jitter": 0.3},
        "strong": {"scale": (0.2, 1.0), "hflip": 0.5, "color_jitter": 0.4, "auto_augment": "3a", "re_prob": 0.25},
    }
    if augment not in choices:
        raise UsageError(f"augment: one of {', '.join(choices)} was expected, {augment!r} given")
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    is_random = augment != "none"
    chosen = {key: data_config.get(key) for key in keys} | ({"crop_mode": "squash", "crop_pct": 1.0} if squash else {})
    steps = create_transform(**chosen, **choices[augment], is_training=is_random)
    return Transform(steps, is_random)


class ImageDataset(torch.utils.data.Dataset[tuple[torch.Tensor, Any]]):
    """The samples of one split as (float32 tensor (3, H, W), label), in the order of the manifest.

    A label is an int; in a multi-label set it is a float32 tensor (C,) of zeros and ones.

    With a random transform, the numbers drawn for a sample depend on the seed, the epoch and its index alone: not on
    the order of samples, on workers, or on where a run was resumed; the global generators are left as they were. With
    another, tensors are kept if those of the split fit in 512 MiB; they are shared, not to be changed in place.
    """

    def __init__(
        self,
        images: ImageSet,
        split: str,
        transform: Callable[[Image.Image], torch.Tensor],
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        self.images = images
        self.samples = images.splits[split]
        self.transform = transform
        self.seed = seed
        self.epoch = epoch
        self.is_random: bool = getattr(transform, "is_random", True)
        self.kept: dict[int, torch.Tensor] = {}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random numbers the next samples are made with."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        sample = self.samples[index]
        label = self._label(sample)
        if index in self.kept:
            return self.kept[index], label
        with _seeded(f"{self.seed}:{self.epoch}:{index}") if self.is_random else contextlib.nullcontext():
            tensor = self.transform(self.images.image(sample))
        if not self.is_random and tensor.nbytes * len(self.samples) <= CACHE_BYTES:
            self.kept[index] = tensor
        return tensor, label

    def _label(self, sample: Sample) -> int | torch.Tensor:
        if not self.images.multi_label:
            return sample.label
        label = torch.zeros(len(self.images.classes))
        label[list(sample.labels)] = 1
        return label


@contextlib.contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Seed the generators that timm's transforms draw from, and put their states back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n samples in one epoch: a permutation given by seed and epoch, the same on every machine."""
    return random.Random(f"{seed}:{epoch}").sample(range(n), n)
