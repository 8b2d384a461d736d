"""Adaptation methods, one file each, and the model that a method makes of a backbone.

A method is a module with

    SUMMARY     what it trains, in a line
    FORMULA     its trained parameters without the head, on q and v; d width, L blocks, r rank, w width of the option,
                T = S terms
    LR          its learning rate when none is given
    OPTIONS     which of the options in `SPECIFIC` it takes
    UNMERGED    why it cannot be folded into plain weights; empty when it can
    resolve     check its options and fill in what was not given
    inject      put its trainable tensors into the model
    merge       fold them into the backbone's state dict; only where UNMERGED is empty

`METHODS` names them all. The segments given to a method are what --targets chose; methods that work on whole blocks
take the blocks of these segments.
"""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kadapt_cli.adapters import (
    adapter,
    attention,
    bitfit,
    compacter,
    full,
    kadaptation,
    kadaptation_full,
    layernorm,
    linear,
    lokr,
    lora,
    ssf,
    subspace,
    vpt,
)
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.models import Backbone
from kadapt_cli.surgery import Segment, segments

METHODS: dict[str, ModuleType] = {
    "kadaptation": kadaptation,
    "kadaptation-full": kadaptation_full,
    "linear": linear,
    "full": full,
    "lora": lora,
    "lokr": lokr,
    "adapter": adapter,
    "compacter": compacter,
    "bitfit": bitfit,
    "layernorm": layernorm,
    "attention": attention,
    "vpt": vpt,
    "ssf": ssf,
    "subspace": subspace,
}
COMPARED = tuple(name for name in METHODS if name != "subspace")  # subspace is how dimensions are measured
WEIGHT_DECAY = 1e-4
# Of the globs in --targets, so that none takes long to try.
MAX_PATTERNS, MAX_PATTERN, MAX_STARS = 1000, 200, 10
# Options that only some methods take, and their value when they are not given.
SPECIFIC: dict[str, Any] = {"terms": None, "rank": None, "width": None, "scale": None, "rule": "factored"}
SPECIFIC |= {"backend": "auto", "dims": None, "projection": "fastfood", "said": False}


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

    def start(self, features: Tensor, labels: Tensor, init: str = "means", text: Tensor | None = None) -> None:
        """Take the constants from training features (n, D), and weight and bias as `init` says.

        "means": the weight of a class is γ times its mean standardised feature m_c, the bias -γ|m_c|²/2: the nearest
        class mean wins. With γ = 0.1/√D the logits stay small, so that training decides how far to trust them.
        Multi-label data: the bias is always the log odds of the class, at the mean feature.
        "zero": no logits at first; the adapter then gets no gradient in the first step.
        "text": the logits are x · `text` over the features' mean length: a CLIP tower's zero-shot answer.

        Args:
            features: Of the training images, from the backbone before it was adapted.
            labels: (n,) class indices, or (n, C) multi-hot.
            init: "means", "zero" or "text".
            text: (C, D), for "text": unit vectors times CLIP's logit scale.
        """
        scale = 0.1 * features.shape[1] ** -0.5
        member = labels.bool() if labels.dim() == 2 else nn.functional.one_hot(labels, len(self.weight)).bool()
        with torch.no_grad():
            self.mean.copy_(features.mean(0))
            spread = features.std(0, correction=0)
            self.std.copy_(spread + 1e-3 * spread.mean() + 1e-6)
            standard = (features - self.mean.to(features)) / self.std.to(features)
            if init == "text":
                assert text is not None
                weight = text.to(self.weight) / features.norm(dim=1).mean().to(self.weight)
                self.weight.copy_(weight * self.std)
                if labels.dim() == 1:
                    self.bias.copy_(weight @ self.mean)
            elif init == "means":
                for c in member.any(0).nonzero()[:, 0].tolist():
                    mean = standard[member[:, c]].mean(0)
                    self.weight[c] = mean * scale
                    self.bias[c] = -0.5 * scale * mean.square().sum()
            if labels.dim() == 2:
                odds = (member.sum(0) + 1) / (len(member) - member.sum(0) + 1)
                self.bias.copy_(odds.log())

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
        """All trainable tensors by name: the head's under "head.", a CLIP projection's under "backbone.head."."""
        own = {f"backbone.{name}" if name.startswith("head.") else name: p for name, p in self.adapter.items()}
        return own | {"head.weight": self.head.weight, "head.bias": self.head.bias}


def select(available: Sequence[Segment], patterns: Sequence[str]) -> list[Segment]:
    """The segments that a glob names, in the order of the model.

    A glob is tried on segments first: 'q' (every block's q), 'blocks.3.fc1', 'blocks.[0-5].*'. If it matches none, it
    is tried on groups and blocks: 'mlp' (every block's), 'blocks.[0-2].attn', 'blocks.3' (all of block 3). A * stands
    for any text, dots too: 'blocks.1*' is blocks 1, 10, 11 and so on.

    Raises:
        UsageError: A pattern that matches nothing; lists what there is.
    """
    chosen: set[Segment] = set()
    if len(patterns) > MAX_PATTERNS:
        raise UsageError(f"--targets: {len(patterns):,} were given; at most {MAX_PATTERNS:,} can be")
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN or pattern.count("*") > MAX_STARS:
            raise UsageError(
                f"--targets: '{pattern[:40]}…' was given; at most {MAX_PATTERN} characters and {MAX_STARS} * can be"
            )
        matches = [s for s in available if _matches(pattern, s.name, s.full_name)]
        if not matches:
            matches = [
                s for s in available if _matches(pattern, s.group, f"blocks.{s.block}.{s.group}", f"blocks.{s.block}")
            ]
        if not matches:
            names, groups = dict.fromkeys(s.name for s in available), dict.fromkeys(s.group for s in available)
            raise UsageError(
                f"--targets: '{pattern}' matches nothing; this model has {', '.join(names)} and the groups "
                f"{', '.join(groups)} in blocks 0 to {max(s.block for s in available)} (blocks.0.q, blocks.0.attn, …)"
            )
        chosen.update(matches)
    return [s for s in available if s in chosen]


def _matches(pattern: str, *names: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def method(name: str) -> ModuleType:
    """The method's module; `UsageError` with the closest names when there is none."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(METHODS)}"
        raise UsageError(f"--method: unknown method '{name}'; {hint}")
    return METHODS[name]


def adapt(backbone: Backbone, config: TrainConfig, classes: int) -> Adapted:
    """Put the configured method's adapter and a zero head on a backbone, which is changed in place."""
    how = method(config.method)
    for option in SPECIFIC:
        if getattr(config, option) != SPECIFIC[option] and option not in how.OPTIONS:
            takes = ", ".join(f"--{name}" for name in how.OPTIONS) or "none of these"
            raise UsageError(f"--{option}: {config.method} has no such option; it takes {takes}")
    if how.LR is None and config.lr is not None:
        raise UsageError(f"--lr: {config.method} has no learning rate; leave it out")
    chosen = select(segments(backbone.module), config.targets)
    config = how.resolve(config, chosen)
    decay = WEIGHT_DECAY if config.weight_decay is None else config.weight_decay
    config = config.model_copy(update={"lr": config.lr or how.LR, "weight_decay": decay})
    adapter: dict[str, nn.Parameter] = how.inject(backbone.module, chosen, config)
    return Adapted(config, backbone, chosen, adapter, Head(backbone.feature_dim, classes))
