"""KAdaptation: ΔW = s · Σ_t A_t ⊗ (u_t v_tᵀ) on row segments of frozen linears, A shared by all blocks.

One rule (a, b) for all q segments and one for all v segments, each a single Parameter used by every block; u and v per
block and segment; one bias of the segments' width per block, added to q and v. On ViT-B (d = 768, T = S = 32, r = 1):
2 rules · 2·32·32 + 12 blocks · (2 segments · 2·32·24 + 768) = 50,176 trained parameters.

Every other segment has a rule too, one a name, but no bias: q and v alone have one. A segment's u and v are
r·(rows + K) numbers, so --targets attn,mlp trains on the same ViT-B, with the common divisor T = 32 of 768 and 3072,
6 rules · 2·32·32 + 12 blocks · (4 segments · 2·768 + 2 segments · 5·768 + 768) = 187,392 parameters.

u starts at zero and the rest as unit normals, so the adapted model starts equal to the backbone and every tensor
receives a gradient from the second step on: at zero u only u (and the bias) can move. Starting with both u and v at
zero, as the paper's released code does, leaves every gradient of ΔW at zero for ever.

The scale defaults to 14/√K, K the fewest columns of a segment: a random rank-one direction of x sees numbers of size
√K, so the first steps change the output alike at any width. The 14 and the learning rate were chosen on six small tasks
(benchmarks/README.md).

With more than two segments a block, which change its output at once, the learning rate of q and v overshoots: it is a
quarter then (benchmarks/README.md).

k never gets a bias: adding one vector to all keys shifts each query's scores by a constant, which softmax ignores.

Source: He et al., "Parameter-efficient Model Adaptation for Vision Transformers", AAAI 2023.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.surgery import Segment, replace_linear
from kadapt_kernels import FUSED_RANK, KronFactors, divisors, kron_delta, kron_linear

SUMMARY = "Kronecker updates A ⊗ (u vᵀ) on q and v, A shared by all blocks, and a bias a block"
FORMULA = "2·2·T·S + L·(2·2·d·r + d)"
LR = 4e-3
OPTIONS = ("terms", "rank", "scale", "rule", "backend")
UNMERGED = ""

MAX_TERMS = 32
SCALE = 14.0
BIASED = ("q", "v")


class KronLinear(nn.Module):
    """A frozen linear layer with Kronecker updates on some of its row segments; x (..., K) gives (..., N)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale = scale
        self.backend = backend
        self.rows: list[tuple[int, int]] = []
        self.factors: list[KronFactors] = []
        self.shifts: list[Tensor | None] = []

    def forward(self, x: Tensor) -> Tensor:
        return kron_linear(
            x,
            self.weight,
            self.bias,
            self.factors,
            segments=self.rows,
            scale=self.scale,
            shifts=self.shifts,
            backend=self.backend,
        )


def tensor_names(segment: Segment, rule: str) -> dict[str, str]:
    """Names of one segment's tensors by role: a, b (factored only), u, v and, where it has one, bias."""
    here = segment.full_name
    names = {"a": f"rule.{segment.name}.a", "u": f"{here}.u", "v": f"{here}.v"}
    if rule == "factored":
        names["b"] = f"rule.{segment.name}.b"
    if segment.name in BIASED and segment.bias is not None:
        names["bias"] = f"blocks.{segment.block}.bias{segment.stop - segment.start}"
    return names


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with T = S and the scale filled in where they were not given.

    T is the largest common divisor of the segments' rows and columns up to 32.

    Raises:
        UsageError: The T given does not divide all of them (lists those that do); --backend does not take the shape.
    """
    widths = sorted({width for s in segments for width in (s.stop - s.start, s.in_features)})
    fitting = divisors(*widths)
    terms = config.terms or max(t for t in fitting if t <= MAX_TERMS)
    if terms not in fitting:
        what = f"width{'s' if len(widths) > 1 else ''} {', '.join(map(str, widths))}"
        raise UsageError(f"--terms: T must divide the {what}, but {terms} was given; choose from {fitting}")
    rank = config.rank or 1
    if config.rule == "full" and config.backend in ("eager", "triton"):
        raise UsageError(f"--backend {config.backend} takes --rule factored; use --backend merge or auto")
    if config.backend == "triton" and terms * rank > FUSED_RANK:
        raise UsageError(
            f"--backend triton takes T·r up to {FUSED_RANK}, but --terms {terms} and --rank {rank} make "
            f"{terms * rank}; use --backend auto"
        )
    scale = config.scale or SCALE / min(s.in_features for s in segments) ** 0.5
    is_wide = len(segments) > 2 * len({s.block for s in segments})
    lr = config.lr or (LR / 4 if is_wide else LR)
    return config.model_copy(update={"terms": terms, "rank": rank, "scale": scale, "lr": lr})


def shapes(segments: Sequence[Segment], config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every adapter tensor by its name, for a resolved configuration."""
    t, r = config.terms, config.rank
    assert t is not None
    assert r is not None
    result: dict[str, tuple[int, ...]] = {}
    for segment in segments:
        rows = segment.stop - segment.start
        by_role = {
            "a": (t, t) if config.rule == "factored" else (t, t, t),
            "b": (t, t),
            "u": (t, rows // t, r),
            "v": (t, segment.in_features // t, r),
            "bias": (rows,),
        }
        result |= {name: by_role[role] for role, name in tensor_names(segment, config.rule).items()}
    return result


def initial(segments: Sequence[Segment], config: TrainConfig) -> dict[str, Tensor]:
    """Fresh adapter tensors (fp32): u and the biases zero, the rest normal, seeded by the config."""
    generator = torch.Generator().manual_seed(config.seed)
    tensors = {}
    for name, shape in shapes(segments, config).items():
        if name.endswith(".u") or ".bias" in name:
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Replace the linears that hold the segments by adapted ones; the output stays the same at first.

    Returns:
        The trainable tensors by their names, each once.
    """
    parameters = {name: nn.Parameter(tensor) for name, tensor in initial(segments, config).items()}
    scale = config.scale
    assert scale is not None
    by_module: dict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_module[segment.module].append(segment)
    for path, members in by_module.items():
        linear = replace_linear(model, path, lambda weight, bias: KronLinear(weight, bias, scale, config.backend))
        assert isinstance(linear, KronLinear)
        for segment in sorted(members, key=lambda s: s.start):
            names = tensor_names(segment, config.rule)
            linear.rows.append((segment.start, segment.stop))
            linear.factors.append(_factors(parameters, names))
            linear.shifts.append(parameters[names["bias"]] if "bias" in names else None)
            for name in names.values():  # registered, so that the module can be moved; shared ones stay one Parameter
                linear.register_parameter(name.replace(".", "_"), parameters[name])
    return parameters


def merge(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], segments: Sequence[Segment], config: TrainConfig
) -> None:
    """Add s·ΔW and the biases to the backbone's float64 state dict, in place."""
    assert config.scale is not None
    for segment in segments:
        names = tensor_names(segment, config.rule)
        wide = {name: tensors[name].double() for name in names.values()}
        delta = kron_delta(_factors(wide, names), config.scale)
        state[f"{segment.module}.weight"][segment.start : segment.stop] += delta
        if "bias" in names:
            assert segment.bias is not None
            bias = wide[names["bias"]]
            state[segment.bias][segment.bias_start : segment.bias_start + len(bias)] += bias


def _factors(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> KronFactors:
    b = tensors[names["b"]] if "b" in names else None
    return KronFactors(tensors[names["a"]], b, tensors[names["u"]], tensors[names["v"]])
