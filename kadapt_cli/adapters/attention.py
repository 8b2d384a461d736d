"""Attention tuning: all weights and biases of the attention of the chosen blocks.

On ViT-B/32 CLIP 12 blocks · (4·768² + 4·768) = 28,348,416 trained parameters. Norms inside the attention and BEiT's
relative position tables belong to it; the norm before it, its layer scale and a pool after the blocks do not. A block
is chosen by any target in it: 'mlp' trains the same as 'q'.

Source: Touvron et al., "Three things everyone should know about Vision Transformers", ECCV 2022.
"""

from collections.abc import Sequence

from torch import nn

from kadapt_cli.adapters.full import merge, resolve, train_existing
from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment

__all__ = ["FORMULA", "LR", "OPTIONS", "SUMMARY", "UNMERGED", "inject", "merge", "resolve"]

SUMMARY = "every weight of the attention"
FORMULA = "L·(4·d² + 4·d)"
LR = 2e-4
OPTIONS: tuple[str, ...] = ()
UNMERGED = ""


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Make the attention trainable; names are those of the backbone's state dict."""
    inside = {module for segment in segments for module in _attention(model, segment).modules()}
    return train_existing(model, segments, lambda module, name: module in inside)


def _attention(model: nn.Module, segment: Segment) -> nn.Module:
    return model.get_submodule(f"blocks.{segment.block}.attn")
