"""Compacter: the bottleneck of `adapter`, its matrices sums of Kronecker products: h + up(gelu(down(LN(h)))).

down and up are Σ_t A_t ⊗ (u_t v_tᵀ), t = 1..4, each with a bias. The rules A (4, 4, 4) are one tensor, trained and
used by both layers of all blocks; u and v are each layer's own. On ViT-B with w = 64: 64 for the rules and
12 blocks · (2·768 for LN + (768 + 64 + 64) for down + (64 + 768 + 768) for up) = 48,448 trained parameters.

u of up starts at zero, so the model starts as it was; up's v, the rules and what lies before learn from the second
step on. The normals' std keeps entries at the size of LN's: 1/√(4·4) for A, 1 for down's u, 1/√Q for v of length Q.

No d × w matrix is formed: with x in 4 parts x_j, h_jt = x_j·v_t, and a (16, rows) matrix of A_t[i, j] u_t[p] takes
h to the output: 4·K + 16·rows multiply-adds a token for a layer of K columns.

Source: Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_cli.adapters.adapter import after_mlp
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.surgery import Segment

SUMMARY = "a bottleneck of Kronecker products after the MLP of every block, rules shared by all"
FORMULA = "64 + L·(5·d + 3·w)"
LR = 2e-3
OPTIONS = ("width",)
UNMERGED = "its layers have a GELU between them, and no linear layer computes what they do"

WIDTH = 64
RULES = 4


class KronSum(nn.Module):
    """A trained linear layer, x (..., columns) to (..., rows), whose matrix is Σ_t A_t ⊗ (u_t v_tᵀ)."""

    def __init__(self, rule: nn.Parameter, rows: int, columns: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        p, q = rows // RULES, columns // RULES
        self.rule = rule
        self.u = nn.Parameter(std * torch.randn(RULES, p, generator=generator))
        self.v = nn.Parameter(q**-0.5 * torch.randn(RULES, q, generator=generator))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x.unflatten(-1, (RULES, -1)), self.v)  # (…, j, t)
        outer = torch.einsum("tij,tp->ipjt", self.rule, self.u)
        return F.linear(h.flatten(-2), outer.reshape(len(self.bias), -1), self.bias)


class KronBottleneck(nn.Module):
    """h (..., d) gives h + up(gelu(down(LN(h)))), (..., d)."""

    def __init__(self, rule: nn.Parameter, features: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.down = KronSum(rule, width, features, 1.0, generator)
        self.up = KronSum(rule, features, width, 0.0, generator)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = h + self.up(F.gelu(self.down(self.norm(h))))
        return y


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with the width filled in where it was not given.

    Raises:
        UsageError: The rules do not divide the width.
    """
    width = config.width or WIDTH
    if width % RULES:
        raise UsageError(f"--width: compacter takes a multiple of {RULES}, but {width} was given")
    return config.model_copy(update={"width": width})


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Put a bottleneck after the MLP of every block that has a segment; the output stays the same at first.

    Returns:
        The trainable tensors by their names, the shared rules once.
    """
    width = config.width
    assert width is not None
    generator = torch.Generator().manual_seed(config.seed)
    rule = nn.Parameter(torch.randn(RULES, RULES, RULES, generator=generator) / RULES)
    own = after_mlp(model, segments, "compacter", lambda features: KronBottleneck(rule, features, width, generator))
    return {"rule": rule} | {name: parameter for name, parameter in own.items() if parameter is not rule}
