"""Full fine-tuning: every weight of the backbone is trained, or of the blocks that --targets chose.

What lies before the blocks is trained with the first, what lies after them with the last. The zero bias that timm
gives to a CLIP tower's projection is not part of the tower and stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from kadapt_cli.config import TrainConfig
from kadapt_cli.surgery import Segment

SUMMARY = "every weight of the backbone"
FORMULA = "all"
LR = 2e-4
OPTIONS: tuple[str, ...] = ()
UNMERGED = ""


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """Nothing to fill in."""
    return config


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Make every weight trainable; names are those of the backbone's state dict."""
    return train_existing(model, segments, lambda module, name: True)


def train_existing(
    model: nn.Module, segments: Sequence[Segment], wanted: Callable[[nn.Module, str], bool]
) -> dict[str, nn.Parameter]:
    """Make existing parameters of the chosen blocks trainable, those for which wanted(module, name) holds.

    ``name`` is the parameter's own name in the module that holds it ("weight", "bias", "q_bias", "pos_embed").

    Returns:
        The trainable parameters by their key in the backbone's state dict.
    """
    blocks = {segment.block for segment in segments}
    last = len(model.blocks) - 1  # type: ignore[arg-type]
    chosen = {}
    started = False
    for path, module in model.named_modules():
        parts = path.split(".")
        if parts[0] == "blocks":
            started = True
            inside = len(parts) > 1 and int(parts[1]) in blocks
        else:
            inside = last in blocks if started else 0 in blocks
        for name, parameter in module.named_parameters(recurse=False):
            key = f"{path}.{name}" if path else name
            if inside and key != "head.bias" and wanted(module, name):
                chosen[key] = parameter.requires_grad_(True)
    return chosen


def merge(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], segments: Sequence[Segment], config: TrainConfig
) -> None:
    """Put the trained values into the backbone's float64 state dict."""
    state.update({key: tensor.double() for key, tensor in tensors.items()})
