"""BitFit: every bias of the chosen blocks and of what lies before and after them, those of the LayerNorms included.

On ViT-B/32 CLIP 12 blocks · 11 · 768 + 2 norms · 768 = 102,912 trained parameters.

The q_bias and v_bias that EVA and BEiT keep beside qkv count as biases. A fused qkv bias is trained whole, as the paper
does. Its k third is nearly idle where keys are not normalised: one vector added to all keys shifts each query's scores
by a constant, which softmax ignores, so that third sees rounding noise only and changes nothing.

Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022.
"""

from collections.abc import Sequence

from torch import nn

from kadapt_cli.adapters.full import merge, resolve, train_existing
from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment

__all__ = ["FORMULA", "LR", "OPTIONS", "SUMMARY", "UNMERGED", "inject", "merge", "resolve"]

SUMMARY = "every bias"
FORMULA = "11·L·d + outer biases"
LR = 4e-3
OPTIONS: tuple[str, ...] = ()
UNMERGED = ""


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Make the biases trainable; names are those of the backbone's state dict."""
    return train_existing(model, segments, lambda module, name: name == "bias" or name.endswith("_bias"))
