"""Adapter: a bottleneck after the MLP of every chosen block, h + up(ReLU(down(LN(h)))) on the MLP's output h.

It sits before layer scale and residual. LN (2d), down (w, d) with bias and up (d, w) with bias are trained. On ViT-B
with w = 64: 12 blocks · (2·768 + 64·768 + 64 + 768·64 + 768) = 1,208,064 trained parameters.

up starts at zero, so the model starts as it was; from the second step on everything learns. down is normal with std
1/√d, for which the bottleneck's entries have the size of LN's.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import ModelError
from kadapt_cli.surgery import Segment, block_widths

SUMMARY = "a bottleneck with a ReLU after the MLP of every block"
FORMULA = "L·(2·d·w + 3·d + w)"
LR = 2e-3
OPTIONS = ("width",)
UNMERGED = "its layers have a ReLU between them, and no linear layer computes what they do"

WIDTH = 64


class Bottleneck(nn.Module):
    """h (..., d) gives h + up(ReLU(down(LN(h)))), (..., d)."""

    def __init__(self, features: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        nn.init.normal_(self.down.weight, std=features**-0.5, generator=generator)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = h + self.up(F.relu(self.down(self.norm(h))))
        return y


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with the width filled in where it was not given."""
    return config.model_copy(update={"width": config.width or WIDTH})


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Put a bottleneck after the MLP of every block that has a segment; the output stays the same at first.

    Returns:
        The trainable tensors by their names.
    """
    width = config.width
    assert width is not None
    generator = torch.Generator().manual_seed(config.seed)
    return after_mlp(model, segments, "adapter", lambda features: Bottleneck(features, width, generator))


def after_mlp(
    model: nn.Module, segments: Sequence[Segment], name: str, make: Callable[[int], nn.Module]
) -> dict[str, nn.Parameter]:
    """Put make(d) behind the MLP of every block that has a segment.

    Returns:
        The parameters of the new modules, as 'blocks.3.NAME.…'.

    Raises:
        ModelError: A block has no ``mlp``.
    """
    parameters: dict[str, nn.Parameter] = {}
    widths = block_widths(model)
    for block in sorted({segment.block for segment in segments}):
        place = model.get_submodule(f"blocks.{block}")
        mlp = getattr(place, "mlp", None)
        if not isinstance(mlp, nn.Module):
            raise ModelError(f"{type(model).__name__}: block {block} has no module 'mlp'; choose a plain transformer")
        new = make(widths[block])
        place.mlp = nn.Sequential(mlp, new)
        parameters |= {f"blocks.{block}.{name}.{key}": parameter for key, parameter in new.named_parameters()}
    return parameters
