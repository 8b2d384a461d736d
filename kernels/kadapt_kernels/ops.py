"""The public operations: check, pick a path, launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kadapt_kernels.factors import KronFactors, check_factors, kron_delta
from kadapt_kernels.reference import Rows, eager_kron_linear

BACKENDS = ("auto", "eager", "triton")


def kron_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[KronFactors],
    *,
    segments: Sequence[Rows],
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """A frozen linear layer with Kronecker updates on some of its row blocks; ΔW is never formed.

    y = x Wᵀ + bias, and for each segment i: y[..., start:stop] += s · x ΔW_iᵀ with ΔW_i = Σ_t A_t ⊗ (u_t v_tᵀ).

    Args:
        x: (..., K), any leading shape, M = 0 rows included.
        weight: (N, K), the dtype of x; frozen, it gets no gradient.
        bias: (N,) or None; gets a gradient when it requires one.
        factors: One `KronFactors` a segment: all with factored A_t or all with full A_t; fp32 beside 16-bit x.
        segments: Rows [start, stop) of `weight` that factors[i] updates; disjoint. Rows in none stay frozen.
        scale: s.
        backend: "eager" is the factored form in PyTorch; "auto" takes it on every device. "triton" raises.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ValueError: Shapes or segments do not fit; an unknown backend.
        RuntimeError: A backend asked for by name that cannot run.

    Cost over the frozen layer, factored, R = T·r: M·R·(K + rows) multiply-adds a segment forward, twice that
    backward; M·(K + R) numbers saved.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kron_linear: backend must be one of {', '.join(BACKENDS)}, but {backend!r} was given")
    if backend == "triton":
        raise RuntimeError("kron_linear: this version has no Triton kernels; use backend='auto'")
    _check(x, weight, factors, segments, "kron_linear")
    y = eager_kron_linear(x.reshape(-1, x.shape[-1]), weight, bias, factors, segments, scale)
    return y.view(*x.shape[:-1], weight.shape[0])


def kron_merge(
    weight: Tensor, factors: Sequence[KronFactors], *, segments: Sequence[Rows], scale: float = 1.0
) -> Tensor:
    """A copy of `weight` (N, K) with s·ΔW_i added to the rows of segment i; summed in float64, rounded once.

    Args and errors as `kron_linear`. Costs T·rows·K multiply-adds a segment, once, after training.
    """
    _check(weight, weight, factors, segments, "kron_merge")
    merged = weight.to(torch.float64, copy=True)
    for (start, stop), group in zip(segments, factors, strict=True):
        wide = KronFactors(*(None if t is None else t.double() for t in group))  # type: ignore[arg-type]
        merged[start:stop] += kron_delta(wide, scale)
    return merged.to(weight.dtype)


def _check(x: Tensor, weight: Tensor, factors: Sequence[KronFactors], segments: Sequence[Rows], name: str) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: x (..., K) and weight (N, K) must fit, but {tuple(x.shape)}, {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: x and weight must share a dtype, but {x.dtype}, {weight.dtype} were given")
    if len(factors) != len(segments) or not factors:
        raise ValueError(f"{name}: expected one KronFactors a segment, but {len(factors)} for {len(segments)}")
    if len({group.b is None for group in factors}) > 1:
        raise ValueError(f"{name}: A_t must be factored in all segments or full in all; split the call otherwise")
    end = 0
    for i in sorted(range(len(segments)), key=lambda i: segments[i]):
        start, stop = segments[i]
        if not end <= start < stop <= weight.shape[0]:
            raise ValueError(
                f"{name}: segments must be disjoint, non-empty row ranges within 0..{weight.shape[0]}, "
                f"but {list(segments)} was given"
            )
        end = stop
        check_factors(factors[i], stop - start, weight.shape[1], f"{name}: segment {i}")
        if torch.is_floating_point(weight) and not torch.is_floating_point(factors[i].a):
            raise ValueError(f"{name}: segment {i}: factors must be floating point, but {factors[i].a.dtype}")
