"""Adaptation methods, one file each, and the model that a method makes of a backbone.

A method is a module with three functions: `resolve` (check its options and fill in what was not given), `inject` (put
its trainable tensors into the model) and `deltas` (what merging adds to the weights). `METHODS` names them all.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from kadapt_cli.adapters import kadaptation
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.models import Backbone, Segment, segments

METHODS: dict[str, ModuleType] = {"kadaptation": kadaptation}


class Head(nn.Module):
    """The classifier: features (B, D), standardised by constants of the training images, times a (C, D) weight.

    Mean and standard deviation are measured once on the backbone's features of the training images before training,
    are not trained, and fold into the weight and bias (`folded`).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear((x.float() - self.mean) / self.std, self.weight, self.bias)

    def start(self, features: Tensor, labels: Tensor) -> None:
        """Take the constants from training features (n, D), and the weight from their class means.

        The weight of a class is γ times its mean standardised feature m_c, the bias -γ|m_c|²/2: the nearest class mean
        wins. With γ = 0.1/√D the logits stay small, so that training decides how far to trust them; a zero head
        would pass no gradient to the adapter in the first step.
        """
        scale = 0.1 * features.shape[1] ** -0.5
        with torch.no_grad():
            self.mean.copy_(features.mean(0))
            spread = features.std(0, correction=0)
            self.std.copy_(spread + 1e-3 * spread.mean() + 1e-6)
            standard = (features - self.mean.to(features)) / self.std.to(features)
            for c in range(len(self.weight)):
                mean = standard[labels == c].mean(0)
                self.weight[c] = mean * scale
                self.bias[c] = -0.5 * scale * mean.square().sum()

    def folded(self) -> tuple[Tensor, Tensor]:
        """The same classifier on raw features: float64 weight (C, D) and bias (C,)."""
        weight = self.weight.detach().double() / self.std.double()
        return weight, self.bias.detach().double() - weight @ self.mean.double()


@dataclass
class Adapted:
    """A backbone with an adapter and a head, ready to train: what `adapt` returns. `config` is resolved."""

    config: TrainConfig
    backbone: Backbone
    segments: list[Segment]
    adapter: dict[str, nn.Parameter]
    head: Head

    def module(self) -> nn.Module:
        """Images (B, 3, H, W) to logits (B, C)."""
        return nn.Sequential(self.backbone.module, self.head)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All trainable tensors by name, the head's under 'head.'."""
        return self.adapter | {"head.weight": self.head.weight, "head.bias": self.head.bias}


def select(available: Sequence[Segment], patterns: Sequence[str]) -> list[Segment]:
    """The segments that a glob names: 'q' (every block's q), 'blocks.3.v', 'blocks.[0-5].*'.

    Raises:
        UsageError: A pattern that matches nothing; lists what there is.
    """
    chosen = set()
    for pattern in patterns:
        matches = [s for s in available if any(fnmatch.fnmatchcase(n, pattern) for n in (s.name, _full_name(s)))]
        if not matches:
            names = sorted({s.name for s in available})
            raise UsageError(
                f"--targets: '{pattern}' matches nothing; this model has {', '.join(names)} "
                f"in blocks 0 to {max(s.block for s in available)} (blocks.0.{names[0]}, …)"
            )
        chosen.update(matches)
    return [s for s in available if s in chosen]


def _full_name(segment: Segment) -> str:
    return f"blocks.{segment.block}.{segment.name}"


def method(name: str) -> ModuleType:
    """The method's module; `UsageError` with the known names when there is none."""
    if name not in METHODS:
        raise UsageError(f"--method: unknown method '{name}'; known: {', '.join(METHODS)}")
    return METHODS[name]


def adapt(backbone: Backbone, config: TrainConfig, classes: int) -> Adapted:
    """Put the configured method's adapter and a zero head on a backbone, which is changed in place."""
    how = method(config.method)
    chosen = select(segments(backbone.module), config.targets)
    config = how.resolve(config, chosen)
    adapter: dict[str, nn.Parameter] = how.inject(backbone.module, chosen, config)
    return Adapted(config, backbone, chosen, adapter, Head(backbone.feature_dim, classes))
