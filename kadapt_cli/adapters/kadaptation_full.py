"""KAdaptation with full rules: every A_t is a trained (S, S) matrix and not a product a_t b_tᵀ; else as kadaptation.

On ViT-B 2 rules · 32·32·32 + 12 blocks · (2 segments · 2·32·24 + 768) = 120,832 trained parameters.

Source: He et al., "Parameter-efficient Model Adaptation for Vision Transformers", AAAI 2023.
"""

from collections.abc import Sequence

from kadapt_cli.adapters import kadaptation
from kadapt_cli.adapters.kadaptation import inject, merge
from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment

__all__ = ["FORMULA", "LR", "OPTIONS", "SUMMARY", "UNMERGED", "inject", "merge", "resolve"]

SUMMARY = "kadaptation with full matrices A"
FORMULA = "2·T·S² + L·(2·2·d·r + d)"
LR = kadaptation.LR
OPTIONS = kadaptation.OPTIONS
UNMERGED = ""


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration of kadaptation with the full rule."""
    return kadaptation.resolve(config.model_copy(update={"rule": "full"}), segments)
