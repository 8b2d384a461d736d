"""SSF: y·γ + β after every linear layer, norm and patch convolution; γ and β have a number an output channel.

On ViT-B/32 CLIP 12 blocks · 2 · 11 · 768 + 2 outer norms · 2 · 768 + convolution 768 + projection 512 = 207,104 trained
parameters. γ starts at 1 and β at 0, so that the adapted model starts equal to the backbone.

Both fold into the layer, W ← diag(γ)·W and b ← γ·b + β. Where the plain model has no bias to fold β into, γ alone is
trained: CLIP's convolution and projection, RMS norms, and the k rows of EVA's and BEiT's qkv.

Source: Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kadapt_cli.adapters.full import resolve, train_existing
from kadapt_cli.adapters.layernorm import NORMS
from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment, replace_linear

__all__ = ["FORMULA", "LR", "OPTIONS", "SUMMARY", "UNMERGED", "inject", "merge", "resolve"]

SUMMARY = "scale and shift after every linear layer and norm"
FORMULA = "22·L·d + outer layers"
LR = 4e-3
OPTIONS: tuple[str, ...] = ()
UNMERGED = ""
PLAIN = (nn.Linear, nn.Conv2d)  # not what derives from them: a standardised convolution cannot take a scale


class ScaleShift(nn.Module):
    """A frozen layer, its output times γ (C,) plus β (C,), (2C/3,) for q and v alone, or none; in the layer's dtype."""

    def __init__(self, layer: nn.Module, channels: int, shifts: int) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(shifts)) if shifts else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        place = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        moved = y * self.scale.view(place)
        if self.shift is not None:
            moved = moved + _spread(self.shift, len(self.scale)).view(place)
        return moved.to(y.dtype)


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Wrap the layers; names are the layer's path with .scale and .shift."""
    existing = train_existing(model, segments, lambda module, name: type(module) in PLAIN or isinstance(module, NORMS))
    for parameter in existing.values():
        parameter.requires_grad_(False)  # γ and β are trained in their place
    chosen: dict[str, nn.Parameter] = {}
    for path in [key.removesuffix(".weight") for key in existing if key.endswith(".weight")]:
        channels = len(existing[f"{path}.weight"])
        wrapped = _wrap(model, path, channels, channels if f"{path}.bias" in existing else 0)
        chosen |= {f"{path}.{name}": parameter for name, parameter in wrapped.named_parameters(recurse=False)}
    return chosen


def merge(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], segments: Sequence[Segment], config: TrainConfig
) -> None:
    """Fold γ and β into the backbone's float64 state dict, in place."""
    for path in [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]:
        scale = tensors[f"{path}.scale"].double()
        shift = _spread(tensors.get(f"{path}.shift", torch.zeros(len(scale))).double(), len(scale))
        weight = state[f"{path}.weight"]
        weight *= scale.view(-1, *[1] * (weight.dim() - 1))
        beside, third = path.removesuffix("qkv"), len(scale) // 3
        if f"{path}.bias" in state:
            state[f"{path}.bias"].mul_(scale).add_(shift)
        elif beside != path and f"{beside}q_bias" in state:
            state[f"{beside}q_bias"].mul_(scale[:third]).add_(shift[:third])
            state[f"{beside}v_bias"].mul_(scale[-third:]).add_(shift[-third:])


def _wrap(model: nn.Module, path: str, channels: int, shifts: int) -> ScaleShift:
    """Put a ScaleShift in place of the layer at a path; a qkv with biases beside it gets the β of q and v."""
    parent, _, leaf = path.rpartition(".")
    holder, layer = model.get_submodule(parent), model.get_submodule(path)
    if leaf == "qkv" and getattr(holder, "q_bias", None) is not None:
        layer, shifts = replace_linear(model, path, _joined), 2 * channels // 3
    wrapped = ScaleShift(layer, channels, shifts)
    setattr(holder, leaf, wrapped)
    return wrapped


def _joined(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.requires_grad_(False)


def _spread(shift: Tensor, channels: int) -> Tensor:
    """β with zeros for the k rows where it belongs to q and v alone."""
    q, v = shift.chunk(2)
    return shift if len(shift) == channels else torch.cat([q, torch.zeros_like(q), v])
