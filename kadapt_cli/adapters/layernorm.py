"""LayerNorm tuning: weights and biases of all norms of the chosen blocks and of what lies before and after them.

On ViT-B/32 CLIP 12 blocks · 2 norms · 2 · 768 + 2 outer norms · 2 · 768 = 39,936 trained parameters. Norms inside the
attention, the MLP and the attention pool count too, and so do RMS norms, which have no bias.

Source: Kim et al., "How to Adapt Your Large-Scale Vision-and-Language Model", 2021; as LN-tune in Basu et al.,
"Strong Baselines for Parameter-Efficient Few-Shot Fine-Tuning", AAAI 2024.
"""

from collections.abc import Sequence

from timm.layers import RmsNorm, RmsNormFp32, SimpleNorm, SimpleNormFp32
from torch import nn

from kadapt_cli.adapters.full import merge, resolve, train_existing
from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment

__all__ = ["FORMULA", "LR", "NORMS", "OPTIONS", "SUMMARY", "UNMERGED", "inject", "merge", "resolve"]

SUMMARY = "weights and biases of the LayerNorms"
FORMULA = "4·L·d + outer norms"
LR = 4e-3
OPTIONS: tuple[str, ...] = ()
UNMERGED = ""

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32, SimpleNorm, SimpleNormFp32)


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Make the norms trainable; names are those of the backbone's state dict."""
    return train_existing(model, segments, lambda module, name: isinstance(module, NORMS))
