"""Linear probe: the backbone stays as it is, and the head is solved for exactly by L-BFGS on cached features.

The objective is the mean cross-entropy (binary cross-entropy, summed over classes, for multi-label data) plus
weight_decay/2 · |W|² over standardised features, which is convex: no learning rate, no epochs, no augmentation.
scikit-learn's LogisticRegression has the same optimum at C = 1/(n · weight_decay).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment

SUMMARY = "the head alone, solved for exactly by L-BFGS"
FORMULA = "0"
LR = None
OPTIONS: tuple[str, ...] = ()
UNMERGED = ""
WEIGHT_DECAY = 0.1
MAX_STEPS = 1000


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with one epoch, and the weight decay filled in where it was not given."""
    decay = WEIGHT_DECAY if config.weight_decay is None else config.weight_decay
    return config.model_copy(update={"weight_decay": decay, "epochs": 1})


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Nothing to put in."""
    return {}


def merge(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], segments: Sequence[Segment], config: TrainConfig
) -> None:
    """Nothing to fold in."""


def solve(features: Tensor, labels: Tensor, classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """The optimal weight (C, D) and bias (C,), float64.

    Args:
        features: (n, D) standardised features.
        labels: (n,) class indices, or (n, C) multi-hot floats.
        classes: C.
        weight_decay: Of the weight; the bias is free.
    """
    x = features.double()
    y = labels.double() if labels.is_floating_point() else labels
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight.T + bias
        if y.is_floating_point():
            fit = F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(x)
        else:
            fit = F.cross_entropy(logits, y)
        loss: Tensor = fit + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
