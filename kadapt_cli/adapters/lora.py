"""LoRA: ΔW = s · B A on row segments of frozen linears, A (r, K) normal with std 1/√K, B (rows, r) zero.

A and B of every block and segment are their own. On ViT-B with r = 4: 12 blocks · 2 segments · 2·4·768 = 147,456
trained parameters. B at zero leaves the model as it was; from the second step on A learns too. s = α/r, as in the
paper, with α = 16.

ΔW is never formed: h = A x of all segments of a layer is one thin product, and a second one adds s·B h to the frozen
layer's output where it lies. B is padded with zero rows there, which adds exactly nothing to the other rows; adding to
each segment's columns by itself makes autograd copy the whole gradient once a segment.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment, replace_linear

SUMMARY = "low-rank updates B A on q and v"
FORMULA = "L·2·2·d·r"
LR = 2e-3
OPTIONS = ("rank", "scale")
UNMERGED = ""

RANK = 4
ALPHA = 16.0


class LoraLinear(nn.Module):
    """A frozen linear layer with low-rank updates on some of its row segments; x (..., K) gives (..., N)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale = scale
        self.rows: list[tuple[int, int]] = []
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weight)
        rows = x.reshape(-1, x.shape[-1])
        h = F.linear(rows, torch.cat(list(self.a)))
        b = [F.pad(b, (0, 0, start, last - stop)) for b, (start, stop) in zip(self.b, self.rows, strict=True)]
        y = F.linear(rows, self.weight, self.bias)
        y.addmm_(h, torch.cat(b, 1).t().to(y.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], last)


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with the rank and the scale α/r filled in where they were not given."""
    rank = config.rank or RANK
    return config.model_copy(update={"rank": rank, "scale": config.scale or ALPHA / rank})


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Replace the linears that hold the segments by adapted ones; the output stays the same at first.

    Returns:
        The trainable tensors by their names.
    """
    rank, scale = config.rank, config.scale
    assert rank is not None
    assert scale is not None
    generator = torch.Generator().manual_seed(config.seed)
    parameters: dict[str, nn.Parameter] = {}
    for segment in segments:
        layer = model.get_submodule(segment.module)
        if not isinstance(layer, LoraLinear):
            layer = replace_linear(model, segment.module, lambda weight, bias: LoraLinear(weight, bias, scale))
        assert isinstance(layer, LoraLinear)
        columns = segment.in_features
        a = nn.Parameter(columns**-0.5 * torch.randn(rank, columns, generator=generator))
        b = nn.Parameter(torch.zeros(segment.stop - segment.start, rank))
        layer.rows.append((segment.start, segment.stop))
        layer.a.append(a)
        layer.b.append(b)
        here = segment.full_name
        parameters |= {f"{here}.a": a, f"{here}.b": b}
    return parameters


def merge(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], segments: Sequence[Segment], config: TrainConfig
) -> None:
    """Add s·B A to the backbone's float64 state dict, in place."""
    assert config.scale is not None
    for segment in segments:
        here = segment.full_name
        delta = tensors[f"{here}.b"].double() @ tensors[f"{here}.a"].double()
        state[f"{segment.module}.weight"][segment.start : segment.stop] += config.scale * delta
