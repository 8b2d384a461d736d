"""Deep visual prompts: w trained tokens stand before the tokens that enter each chosen block and are dropped after it.

On ViT-B/32 12 blocks · 10 · 768 = 92,160 trained parameters. The prompts take part in the softmax, so the adapted model
does not start equal to the backbone, and no change of its weights could do what they do.

They start uniform in ±√(6 / (c + d)), c numbers a patch of the image, as in the paper. Prompts have no place in the
image: rotary embeddings leave them alone and relative position biases are zero for them.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment, block_widths

SUMMARY = "prompt tokens that enter each block"
FORMULA = "L·w·d"
LR = 1e-2
OPTIONS = ("width",)
UNMERGED = "its prompts are further tokens, which no plain weights hold"

WIDTH = 10


class Prompted(nn.Module):
    """A frozen block that sees the prompts (w, d) before its own tokens; x (B, tokens, d) keeps its shape."""

    def __init__(self, block: nn.Module, prompts: nn.Parameter) -> None:
        super().__init__()
        self.block = block
        self.prompts = prompts
        attention: Any = block.attn
        width = len(prompts)
        if hasattr(attention, "num_prefix_tokens"):  # EVA: so many tokens at the front get no rotary embedding
            attention.num_prefix_tokens += width
        if getattr(attention, "relative_position_bias_table", None) is not None:  # BEiT
            attention._get_rel_pos_bias = partial(_padded_bias, attention, width)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, **further: Any) -> Tensor:
        if shared_rel_pos_bias is not None:
            further["shared_rel_pos_bias"] = _pad(shared_rel_pos_bias, len(self.prompts))
        prompts = self.prompts.to(x.dtype).expand(len(x), -1, -1)
        out: Tensor = self.block(torch.cat([prompts, x], dim=1), **further)
        return out[:, len(self.prompts) :]


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with 10 prompts a block where no width was given."""
    return config.model_copy(update={"width": config.width or WIDTH})


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Wrap the chosen blocks; names are blocks.N.prompts."""
    assert config.width is not None
    blocks: Any = model.blocks
    patch: Any = model.get_parameter("patch_embed.proj.weight")
    generator = torch.Generator().manual_seed(config.seed)
    widths = block_widths(model)
    chosen = {}
    for index in dict.fromkeys(segment.block for segment in segments):
        width = widths[index]
        bound = (6 / (patch[0].numel() + width)) ** 0.5
        values = torch.empty(config.width, width).uniform_(-bound, bound, generator=generator)
        chosen[f"blocks.{index}.prompts"] = nn.Parameter(values)
        blocks[index] = Prompted(blocks[index], chosen[f"blocks.{index}.prompts"])
    return chosen


def _padded_bias(attention: Any, width: int) -> Tensor:
    return _pad(type(attention)._get_rel_pos_bias(attention), width)


def _pad(bias: Tensor, width: int) -> Tensor:
    """A position bias (…, tokens, tokens) with zeros for the prompts at the front."""
    return F.pad(bias, (width, 0, width, 0))
