"""What test files share: a transform, what a split holds, a call that must be refused, weights that count."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from kadapt_cli.data import ImageSet
from kadapt_cli.errors import KadaptError

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def paths(images: ImageSet, split: str) -> list[str]:
    return [sample.path for sample in images.splits[split]]


def per_class(images: ImageSet, split: str) -> list[int]:
    counts = Counter(sample.label for sample in images.splits[split])
    return [counts[label] for label in range(len(images.classes))]


def refused(call: Callable[[], object], exit_code: int = 3) -> str:
    """The message of a call that must be refused: one line, with the documented exit code."""
    with pytest.raises(KadaptError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == exit_code
    assert "\n" not in message
    return message


def randomise(model: nn.Module) -> None:
    """Give biases and layer scales values that count: timm starts them at 0 and 1e-6, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            parameter.data.fill_(1.0)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.3, generator=generator)
