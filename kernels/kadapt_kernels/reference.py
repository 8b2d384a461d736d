"""y = x Wᵀ + bias, plus s · x ΔWᵀ on some row segments, in plain PyTorch: two forms, forward and backward.

This is the CPU path and what every kernel is held against. Shapes: x (M, K), W (N, K), dy (M, N); one segment has rows
[start, stop) of W and factors (a, b, u, v) as in `factors`. With the tall factors L (rows, R) and R (K, R) of a
factored A_t, R = T·r:

    factored   h = x R            y[:, seg] += h (s L)ᵀ
               g = dy[:, seg] (s L)    dx = dy W + g Rᵀ    d(sL) = dy[:, seg]ᵀ h    dR = xᵀ g

    merged     W' = W + s ΔW      y = x W'ᵀ
               dx = dy W'         dΔW = dy[:, seg]ᵀ x, contracted; or dL, dR as above, where that is less work

and dL, dR or dΔW are contracted to da, du, db, dv, which are as small as the factors.

Extra multiply-adds a segment over the frozen layer's M·K·N, forward: factored M·R·(K + rows), merged R·rows·K, hence
merged for many rows. Backward: factored 2·M·R·(K + rows); merged the same (h again, but no step in dx) or M·rows·K by
dΔW, whichever is less work. Both save x (the frozen layer saves nothing), factored also h.

The scale is folded into the fp32 factors, ΔW is composed in fp32, products and W' are rounded once to the dtype of x,
factor gradients are fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kadapt_kernels.factors import KronFactors, Rows, kron_delta, tall


def factored_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and h (M, R of all segments side by side, so that x is read once)."""
    right, left = sides(factors, scale, x.dtype)
    h = x @ right
    y = F.linear(x, weight, bias)
    for (start, stop), columns, side in zip(segments, h.split([s.shape[1] for s in left], 1), left, strict=True):
        y[:, start:stop].addmm_(columns, side.t())
    return y, h


def factored_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    need_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (M, K) and da, db, du, dv of every segment."""
    right, left = sides(factors, scale, x.dtype)
    g = _g(dy, left, segments)
    dx = (dy @ weight).addmm_(g, right.t()) if need_dx else None
    return dx, low_rank_gradients(dy, x, h, g, factors, segments, scale)


def merged_weight(
    weight: Tensor, factors: Sequence[KronFactors], segments: Sequence[Rows], scale: float, dropout: float, seed: int
) -> Tensor:
    """W' (N, K) = W + s·ΔW in the dtype of W; with dropout that share of ΔW's elements is zero, the rest larger."""
    merged = weight.clone()
    masks = _masks(factors, dropout, seed)
    for (start, stop), group, mask in zip(segments, factors, masks, strict=True):
        if mask is None and group.b is not None and group.a.dtype == weight.dtype:
            merged[start:stop].addmm_(tall(group.a * scale, group.u), tall(group.b, group.v).t())
        else:
            delta = kron_delta(group, scale)
            merged[start:stop] = (weight[start:stop] + (delta if mask is None else delta * mask)).to(weight.dtype)
    return merged


def merged_gradients(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    dropout: float,
    seed: int,
) -> list[Tensor]:
    """da, db, du, dv (da, du, dv where A_t is full) of every segment by the cheaper of the two ways."""
    if not dropout and all(group.b is not None and low_rank_is_cheaper(group) for group in factors):
        right, left = sides(factors, scale, x.dtype)
        return low_rank_gradients(dy, x, x @ right, _g(dy, left, segments), factors, segments, scale)
    gradients: list[Tensor] = []
    for (start, stop), group, mask in zip(segments, factors, _masks(factors, dropout, seed), strict=True):
        dw = wide_mm(dy[:, start:stop].t(), x, group.a.dtype)
        gradients += dense_gradients(dw if mask is None else dw * mask, group, scale)
    return gradients


def low_rank_is_cheaper(group: KronFactors) -> bool:
    """Whether h, g, dL and dR cost less than dΔW: a thin multiply-add costs about 1.4 of a square product's."""
    rows, columns, rank = group.out_features, group.in_features, group.u.shape[0] * group.u.shape[2]
    return 1.4 * 2 * rank * (rows + columns) < rows * columns


def low_rank_gradients(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    g: Tensor,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
) -> list[Tensor]:
    """da, db, du, dv of every segment from h = x R and g = dy (s L), both (M, R of all segments)."""
    ranks = [group.u.shape[0] * group.u.shape[2] for group in factors]
    dtype = factors[0].a.dtype
    gradients: list[Tensor] = []
    d_right = wide_mm(x.t(), g, dtype).split(ranks, 1)
    for (start, stop), group, columns, dr in zip(segments, factors, h.split(ranks, 1), d_right, strict=True):
        a, b, u, v = group
        assert b is not None
        da, du = _contract(wide_mm(dy[:, start:stop].t(), columns, dtype) * scale, a, u)
        db, dv = _contract(dr, b, v)
        gradients += [da, db, du, dv]
    return gradients


def dense_gradients(dw: Tensor, group: KronFactors, scale: float) -> list[Tensor]:
    """da, db, du, dv (da, du, dv where A_t is full) from dΔW (rows, K) in the factors' dtype."""
    a, b, u, v = group
    if b is not None:
        da, du = _contract((dw @ tall(b, v)) * scale, a, u)
        db, dv = _contract(dw.t() @ tall(a * scale, u), b, v)
        return [da, db, du, dv]
    blocks = dw.view(a.shape[1], u.shape[1], a.shape[1], v.shape[1]) * scale
    z = torch.einsum("ipjq,tqr->ijtpr", blocks, v)
    return [
        torch.einsum("ijtpr,tpr->tij", z, u),
        torch.einsum("ijtpr,tij->tpr", z, a),
        torch.einsum("tpq,tpr->tqr", torch.einsum("ipjq,tij->tpq", blocks, a), u),
    ]


def total_bias(
    weight: Tensor, bias: Tensor | None, shifts: Sequence[Tensor], segments: Sequence[Rows]
) -> Tensor | None:
    """bias (N,) with each segment's shift added on its rows, in the dtype of W; None if there is neither."""
    if not shifts:
        return bias
    total = shifts[0].new_zeros(len(weight)) if bias is None else bias.to(shifts[0].dtype, copy=True)
    for (start, stop), shift in zip(segments, shifts, strict=True):
        total[start:stop] += shift
    return total.to(weight.dtype)


def shift_gradients(dy: Tensor, shifts: Sequence[Tensor], segments: Sequence[Rows]) -> list[Tensor]:
    """The column sums of dy over each segment, in the shifts' dtype."""
    return [dy[:, start:stop].sum(0, dtype=shift.dtype) for (start, stop), shift in zip(segments, shifts, strict=False)]


def sides(factors: Sequence[KronFactors], scale: float, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """R of all segments side by side, (K, R of all), and s·L of each, (rows, R); rounded once to the dtype."""
    right = torch.cat([tall(b, v) for _, b, _, v in factors if b is not None], 1).to(dtype)
    return right, [tall(a * scale, u).to(dtype) for a, _, u, _ in factors]


def wide_mm(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y in the wide dtype, from 16-bit operands without rounding the sums where the device can do that."""
    if x.is_cuda and x.dtype != dtype and torch.version.hip is None:
        return torch.mm(x, y, out_dtype=dtype)
    return (x @ y).to(dtype)


def _g(dy: Tensor, left: Sequence[Tensor], segments: Sequence[Rows]) -> Tensor:
    return torch.cat([dy[:, start:stop] @ side for (start, stop), side in zip(segments, left, strict=True)], 1)


def _contract(d_tall: Tensor, a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (T, S) a and (T, P, r) u from that of their tall matrix (S·P, T·r)."""
    d = d_tall.view(a.shape[1], u.shape[1], a.shape[0], u.shape[2])
    da = (d * u.transpose(0, 1)).sum((1, 3))
    du = (d * a.t()[:, None, :, None]).sum(0)
    return da.t().contiguous(), du.transpose(0, 1).contiguous()


def _masks(factors: Sequence[KronFactors], dropout: float, seed: int) -> list[Tensor | None]:
    """What each ΔW is multiplied with: 0 for the dropped share, 1/(1 - dropout) for the rest; None without dropout."""
    if not dropout:
        return [None] * len(factors)
    generator = torch.Generator(factors[0].a.device).manual_seed(seed)
    masks: list[Tensor | None] = []
    for group in factors:
        draw = torch.rand(group.out_features, group.in_features, generator=generator, device=group.a.device)
        masks.append((draw >= dropout).to(group.a.dtype) / (1 - dropout))
    return masks
