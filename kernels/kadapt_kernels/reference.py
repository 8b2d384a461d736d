"""y = x Wᵀ + bias, plus s · x ΔWᵀ on some row segments, in plain PyTorch with a hand-written backward.

This is the CPU path and what every kernel is held against. Shapes: x (M, K), W (N, K), dy (M, N); one segment has rows
[start, stop) of W and factors (a, b, u, v) as in `factors`. With the tall factors L (rows, R) and R (K, R):

    forward    h = x R            y[:, seg] += h (s L)ᵀ
    backward   g = dy[:, seg] (s L)    dx = dy W + g Rᵀ    d(sL) = dy[:, seg]ᵀ h    dR = xᵀ g

and dL, dR are contracted to da, du, db, dv, which are as small as the factors. ΔW and dW (rows·K numbers each) never
exist. Extra work over the frozen layer: forward M·R·(K + rows) multiply-adds a segment, backward twice that, against
M·K·N; extra saved activations x (the frozen layer saves none) and h. The tall factors of all segments lie side by side,
so that x is read once.

A full A_t is applied between the two thin products instead (x as (M, S, Q), contract Q, then S with A_t, then widen
to P): M·T·r·(K + S² + rows) multiply-adds.

The scale is folded into the fp32 factors, products are rounded once to the dtype of x, factor gradients are fp32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kadapt_kernels.factors import KronFactors, tall

Rows = tuple[int, int]


def eager_kron_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
) -> Tensor:
    """The adapted linear of `kadapt_kernels.kron_linear`, unchecked; x (M, K) of the weight's dtype gives (M, N)."""
    function = _Full if any(group.b is None for group in factors) else _Factored
    flat = [tensor for group in factors for tensor in group if tensor is not None]
    result: Tensor = function.apply(x, weight, bias, scale, tuple(segments), *flat)
    return result


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        segments: tuple[Rows, ...],
        *flat: Tensor,
    ) -> Tensor:
        groups = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        right = torch.cat([tall(b, v) for _, b, _, v in groups], 1).to(x.dtype)
        left = [tall(a * scale, u).to(x.dtype) for a, _, u, _ in groups]
        h = x @ right
        y = F.linear(x, weight, bias)
        for (start, stop), columns, side in zip(segments, h.split([m.shape[1] for m in left], 1), left, strict=True):
            y[:, start:stop].addmm_(columns, side.t())
        ctx.save_for_backward(x, weight, h, right, *left, *flat)
        ctx.scale, ctx.segments, ctx.has_bias = scale, segments, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (dy,) = grads
        n = len(ctx.segments)
        x, weight, h, right, *rest = ctx.saved_tensors
        left, flat = rest[:n], rest[n:]
        groups = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        parts = [dy[:, start:stop] for start, stop in ctx.segments]
        ranks = [side.shape[1] for side in left]
        g = torch.cat([part @ side for part, side in zip(parts, left, strict=True)], 1)
        dx = dy.mm(weight).addmm_(g, right.t()) if ctx.needs_input_grad[0] else None
        small: list[Tensor] = []
        d_right = (x.t() @ g).float() if x.dtype != torch.float64 else x.t() @ g
        for group, part, columns, dr in zip(groups, parts, h.split(ranks, 1), d_right.split(ranks, 1), strict=True):
            a, b, u, v = group
            da, du = _contract((part.t() @ columns).to(a.dtype) * ctx.scale, a, u)
            db, dv = _contract(dr.to(b.dtype), b, v)
            small += [da, db, du, dv]
        dbias = dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, None, dbias, None, None, *small


def _contract(d_tall: Tensor, a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (T, S) a and (T, P, r) u from that of their tall matrix (S·P, T·r)."""
    d = d_tall.view(a.shape[1], u.shape[1], a.shape[0], u.shape[2])
    return torch.einsum("sptr,tpr->ts", d, u), torch.einsum("sptr,ts->tpr", d, a)


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        segments: tuple[Rows, ...],
        *flat: Tensor,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        for (start, stop), (a, u, v) in zip(segments, _triples(flat), strict=True):
            _, w = _inner(x, a * scale, v)
            y[:, start:stop] += (w.flatten(2) @ _thin(u, x.dtype).t()).flatten(1)
        ctx.save_for_backward(x, weight, *flat)
        ctx.scale, ctx.segments, ctx.has_bias = scale, segments, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (dy,) = grads
        x, weight, *flat = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        small: list[Tensor] = []
        for (start, stop), (a, u, v) in zip(ctx.segments, _triples(flat), strict=True):
            z, w = _inner(x, a * ctx.scale, v)  # recomputed: M·S·T·r numbers are too many to keep
            dy3 = dy[:, start:stop].reshape(len(x), a.shape[1], u.shape[1])
            gw = (dy3 @ _thin(u, x.dtype)).view_as(w)
            gz = torch.einsum("tsc,mstr->mctr", (a * ctx.scale).to(x.dtype), gw)
            x3 = x.view(len(x), a.shape[1], v.shape[1])
            da = torch.einsum("mstr,mctr->tsc", gw, z).to(a.dtype) * ctx.scale
            du = torch.einsum("msp,mstr->tpr", dy3, w).to(u.dtype)
            dv = torch.einsum("mcq,mctr->tqr", x3, gz).to(v.dtype)
            if dx is not None:
                dx += (gz.flatten(2) @ _thin(v, x.dtype).t()).flatten(1)
            small += [da, du, dv]
        dbias = dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, None, dbias, None, None, *small


def _triples(flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [flat[i : i + 3] for i in range(0, len(flat), 3)]


def _thin(u: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, P, r) as a matrix (P, T·r)."""
    return u.permute(1, 0, 2).flatten(1).to(dtype)


def _inner(x: Tensor, rule: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """z = x contracted with v over Q, and w = A_t applied to z: both (M, S, T, r)."""
    z = (x.view(len(x), rule.shape[1], v.shape[1]) @ _thin(v, x.dtype)).view(
        len(x), rule.shape[1], v.shape[0], v.shape[2]
    )
    return z, torch.einsum("tsc,mctr->mstr", rule.to(x.dtype), z)
