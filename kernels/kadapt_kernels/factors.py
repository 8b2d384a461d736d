"""The factors of a Kronecker-adapted linear layer: their layout, checks, and the dense ΔW as the oracle.

A segment is a block of rows of a frozen weight W. Its update is ::

    ΔW = s · Σ_t A_t ⊗ B_t,   B_t = u_t v_tᵀ        t = 1..T

    A_t = a_t b_tᵀ   (factored: a, b of shape (T, S))    or    A_t full: a of shape (T, S, S), b None
    u of shape (T, P, r), v of shape (T, Q, r), segment rows N = S·P, in_features K = S·Q

In the factored form ΔW = s · L Rᵀ is a matrix of rank at most R = T·r with Khatri-Rao factors: column (t, ρ) of L is
a_t ⊗ u_t[:, ρ], column (t, ρ) of R is b_t ⊗ v_t[:, ρ]. Applying it costs M·R·(K + N) multiply-adds instead of the
M·K·N of a dense ΔW, and ΔW itself (N·K numbers) is never needed.

Source: He et al., "Parameter-efficient Model Adaptation for Vision Transformers", AAAI 2023.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Rows = tuple[int, int]  # [start, stop) of a segment's rows of W


class KronFactors(NamedTuple):
    """The factors of one segment's ΔW; fp32 in training, any float dtype for the oracle.

    Attributes:
        a: (T, S) output side of A_t, or (T, S, S) when A_t is full.
        b: (T, S) input side of A_t, or None when A_t is full.
        u: (T, P, r) output side of B_t.
        v: (T, Q, r) input side of B_t.
    """

    a: Tensor
    b: Tensor | None
    u: Tensor
    v: Tensor

    @property
    def out_features(self) -> int:
        """N = S·P, rows of the segment."""
        return self.a.shape[1] * self.u.shape[1]

    @property
    def in_features(self) -> int:
        """K = S·Q, columns of the segment."""
        return self.a.shape[1] * self.v.shape[1]


def check_factors(factors: KronFactors, rows: int, in_features: int, where: str) -> None:
    """Raise `ValueError` unless the shapes fit together and make a (rows, in_features) matrix."""
    a, b, u, v = factors
    full = b is None
    if a.dim() != (3 if full else 2) or (full and a.shape[1] != a.shape[2]) or (b is not None and b.shape != a.shape):
        expected = "a of shape (T, S, S) with b None" if full else "a and b of one shape (T, S)"
        given = f"a {tuple(a.shape)}" + ("" if b is None else f", b {tuple(b.shape)}")
        raise ValueError(f"{where}: expected {expected}, but {given} was given")
    if u.dim() != 3 or v.dim() != 3 or not (u.shape[0] == v.shape[0] == a.shape[0]) or u.shape[2] != v.shape[2]:
        raise ValueError(
            f"{where}: expected u (T, P, r) and v (T, Q, r) with T = {a.shape[0]}, "
            f"but u {tuple(u.shape)}, v {tuple(v.shape)} were given"
        )
    if factors.out_features != rows or factors.in_features != in_features:
        raise ValueError(
            f"{where}: S·P = {factors.out_features} must be the segment's {rows} rows and S·Q = "
            f"{factors.in_features} the layer's {in_features} columns; choose S from {divisors(rows, in_features)}"
        )


def divisors(*numbers: int) -> list[int]:
    """The common divisors of the numbers, ascending: the sides S that fit a layer of these widths."""
    return [s for s in range(1, min(numbers) + 1) if all(n % s == 0 for n in numbers)]


def tall(a: Tensor, u: Tensor) -> Tensor:
    """The Khatri-Rao columns a_t ⊗ u_t[:, ρ] of (T, S) and (T, P, r): a matrix of shape (S·P, T·r)."""
    return (a.t()[:, None, :, None] * u.transpose(0, 1)).reshape(a.shape[1] * u.shape[1], -1)


def kron_delta(factors: KronFactors, scale: float = 1.0) -> Tensor:
    """The dense ΔW (N, K) = s · Σ_t A_t ⊗ (u_t v_tᵀ), in the factors' dtype.

    For merging, tests and inspection: it costs T·N·K multiply-adds and N·K numbers, which training never pays.
    """
    a, b, u, v = factors
    rule = a if b is None else a.unsqueeze(2) * b.unsqueeze(1)
    block = u @ v.transpose(1, 2)
    return scale * torch.einsum("tij,tpq->ipjq", rule, block).reshape(factors.out_features, factors.in_features)
