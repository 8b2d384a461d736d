"""LoKr: ΔW = s · W1 ⊗ (u vᵀ) on row segments of frozen linears, one Kronecker term, shared by nothing.

W1 is a full (S, S) matrix, S the largest common divisor of the segment's rows and columns up to the root of the
smaller; u (rows/S, r) and v (K/S, r). On ViT-B (S = 24, r = 4): 12 blocks · 2 segments · (24² + 2·32·4) = 19,968
trained parameters.

u starts at zero, W1 and v as normals with std 1/√S and 1/√(K/S): the input of u then has entries of the size of x's,
as in lora, and s = α/r is lora's. The layer is `kadaptation.KronLinear` with T = 1 and a full rule.

Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kadapt_cli.adapters import lora
from kadapt_cli.adapters.kadaptation import KronLinear
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.surgery import Segment, replace_linear
from kadapt_kernels import KronFactors, divisors, kron_delta

SUMMARY = "one Kronecker update W1 ⊗ (u vᵀ) on each q and v, nothing shared"
FORMULA = "L·2·(S² + 2·r·d/S), S ≤ √d"
LR = 2e-3
OPTIONS = ("rank", "scale", "backend")
UNMERGED = ""


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with the rank and the scale α/r filled in where they were not given.

    Raises:
        UsageError: --backend does not take full matrices W1.
    """
    if config.backend in ("eager", "triton"):
        raise UsageError(f"--backend {config.backend} takes factored rules, but lokr's W1 is full; use merge or auto")
    return lora.resolve(config, segments)


def side(segment: Segment) -> int:
    """S: the largest common divisor of the segment's rows and columns up to the root of the smaller."""
    rows, columns = segment.stop - segment.start, segment.in_features
    return max(s for s in divisors(rows, columns) if s <= math.isqrt(min(rows, columns)))


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Replace the linears that hold the segments by adapted ones; the output stays the same at first.

    Returns:
        The trainable tensors by their names.
    """
    rank, scale = config.rank, config.scale
    assert rank is not None
    assert scale is not None
    generator = torch.Generator().manual_seed(config.seed)
    parameters = {}
    for segment in segments:
        layer = model.get_submodule(segment.module)
        if not isinstance(layer, KronLinear):
            make = lambda weight, bias: KronLinear(weight, bias, scale, config.backend)  # noqa: E731
            layer = replace_linear(model, segment.module, make)
        assert isinstance(layer, KronLinear)
        s = side(segment)
        p, q = (segment.stop - segment.start) // s, segment.in_features // s
        own = {
            "a": nn.Parameter(s**-0.5 * torch.randn(1, s, s, generator=generator)),
            "u": nn.Parameter(torch.zeros(1, p, rank)),
            "v": nn.Parameter(q**-0.5 * torch.randn(1, q, rank, generator=generator)),
        }
        layer.rows.append((segment.start, segment.stop))
        layer.factors.append(KronFactors(own["a"], None, own["u"], own["v"]))
        layer.shifts.append(None)
        for role, parameter in own.items():  # registered, so that the module can be moved
            layer.register_parameter(f"{segment.name}_{role}", parameter)
            parameters[f"{segment.full_name}.{role}"] = parameter
    return parameters


def merge(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], segments: Sequence[Segment], config: TrainConfig
) -> None:
    """Add s·W1 ⊗ (u vᵀ) to the backbone's float64 state dict, in place."""
    assert config.scale is not None
    for segment in segments:
        a, u, v = (tensors[f"{segment.full_name}.{role}"].double() for role in "auv")
        delta = kron_delta(KronFactors(a, None, u, v), config.scale)
        state[f"{segment.module}.weight"][segment.start : segment.stop] += delta
