"""W' = W + ΔW and the gradients of the factors from a dense dW, for what the fused kernels do not take.

That is a full A_t, a low rank T·r above 64, and dropout on the elements of ΔW, whose mask leaves no low rank to use.

Seen as a matrix whose rows are the blocks (i, j) of ΔW and whose columns are the places (p, q) within a block, ΔW is
an ordinary product of T columns by T rows (Van Loan and Pitsianis, "Approximation with Kronecker products", 1993)::

    ΔW[i·P + p, j·Q + q] = s · Σ_t A[t, (i, j)] · B[t, (p, q)]     A (T, S²), B = u_t v_tᵀ as (T, P·Q)
    dA[t, (i, j)] = s · Σ_pq B[t, (p, q)] · dW[i·P + p, j·Q + q]
    dB[t, (p, q)] = s · Σ_ij A[t, (i, j)] · dW[i·P + p, j·Q + q]

so that one kernel serves a full A_t (read as it lies in memory) and a factored one (a_t ⊗ b_t, multiplied on the way),
for any S, P, Q, T and r: the contraction is T long, r is summed while a tile of B is composed. Then u, v and a, b get
their gradients from dB and dA:

    du_t = dB_t v_t    dv_t = dB_tᵀ u_t    da_t = dA_t b_t    db_t = dA_tᵀ a_t

Cost of a segment of N·K weights: merging T·N·K multiply-adds, W read and written once; gradients twice as many, dW read
once, and partial sums of T·N·K·(1/tile.m + 1/tile.n) numbers written and read, since every program sees only its own
tile: sums in a fixed order instead of atomics give the same bits every time. Everything is fp32 (the sums are
short, and a merged weight should be wrong by one rounding only); W' is rounded once.

Dropout sets elements of ΔW to zero with probability p and divides the others by 1 − p. The mask is a function of the
seed and of the element's row and column in W alone (Philox), so the backward draws it again, whatever the tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadapt_kernels.blocks import Launch, layout, row_stride
from kadapt_kernels.factors import KronFactors, Rows
from kadapt_kernels.tiles import Tile

CONTRACT_ROWS = 16
CONTRACT_COLUMNS = 32


class Partials(NamedTuple):
    """What the programs of `dense_gradient_kernel` leave to be summed for one adapter, both fp32.

    Attributes:
        a: (tiles of P·Q, T, S²) shares of dA.
        b: (tiles of S², T, P·Q) shares of dB.
    """

    a: Tensor
    b: Tensor


@triton.jit
def _rule(a, b, t, block, T: tl.constexpr, S: tl.constexpr, FULL: tl.constexpr):
    """A[t, (i, j)] as a tile (t, block) with block = i·S + j; zero outside."""
    inside = (t < T)[:, None] & (block < S * S)[None, :]
    if FULL:
        return tl.load(a + t[:, None] * (S * S) + block[None, :], mask=inside, other=0.0)
    else:
        left = tl.load(a + t[:, None] * S + (block // S)[None, :], mask=inside, other=0.0)
        right = tl.load(b + t[:, None] * S + (block % S)[None, :], mask=inside, other=0.0)
        return left * right


@triton.jit
def _block(u, v, t, place, T: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, r: tl.constexpr):
    """B[t, (p, q)] = Σ_ρ u[t, p, ρ] · v[t, q, ρ] as a tile (t, place) with place = p·Q + q; zero outside."""
    inside = (t < T)[:, None] & (place < P * Q)[None, :]
    left = u + (t[:, None] * P + (place // Q)[None, :]) * r
    right = v + (t[:, None] * Q + (place % Q)[None, :]) * r
    total = tl.load(left, mask=inside, other=0.0) * tl.load(right, mask=inside, other=0.0)
    for rho in range(1, r):
        total += tl.load(left + rho, mask=inside, other=0.0) * tl.load(right + rho, mask=inside, other=0.0)
    return total


@triton.jit
def _position(block, place, S: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Row and column within the segment of the elements (block, place), and which of them exist."""
    row = (block // S * P)[:, None] + (place // Q)[None, :]
    column = (block % S * Q)[:, None] + (place % Q)[None, :]
    return row, column, (block < S * S)[:, None] & (place < P * Q)[None, :]


@triton.jit
def _keep(values, row, column, seed, K: tl.constexpr, DROPOUT: tl.constexpr):
    """The values with those of the dropped elements of W set to zero."""
    if DROPOUT > 0:
        return tl.where(tl.rand(seed, row.to(tl.int64) * K + column) >= DROPOUT, values, 0.0)
    else:
        return values


@triton.jit(do_not_specialize=["seed"])
def merge_kernel(
    w,
    merged,
    a,
    b,
    u,
    v,
    scale,
    seed,
    start,
    stride_w,
    stride_m,
    S: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    r: tl.constexpr,
    FULL: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program = (BLOCK_M blocks of ΔW, BLOCK_N places in them); scale holds the 1 / (1 − p) of dropout."""
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rule = _rule(a, b, t, block, T, S, FULL)
        acc = tl.dot(rule.T, _block(u, v, t, place, T, P, Q, r), acc, input_precision="ieee")

    row, column, inside = _position(block, place, S, P, Q)
    row += start
    delta = _keep(acc * scale, row, column, seed, S * Q, DROPOUT)
    frozen = tl.load(w + row.to(tl.int64) * stride_w + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(merged + row.to(tl.int64) * stride_m + column, (frozen + delta).to(merged.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def dense_gradient_kernel(
    dw,
    a,
    b,
    u,
    v,
    partial_a,
    partial_b,
    scale,
    seed,
    start,
    stride_dw,
    S: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    r: tl.constexpr,
    FULL: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program = tile of dW as in `merge_kernel`: its share of dA (T, S²) over its places and of dB over its blocks."""
    block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column, inside = _position(block, place, S, P, Q)
    tile = scale * tl.load(dw + row.to(tl.int64) * stride_dw + column, mask=inside, other=0.0)
    tile = _keep(tile, row + start, column, seed, S * Q, DROPOUT)

    to_a = partial_a + tl.program_id(1).to(tl.int64) * (T * S * S) + block[None, :]
    to_b = partial_b + tl.program_id(0).to(tl.int64) * (T * P * Q) + place[None, :]
    zero_a = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    zero_b = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        d_rule = tl.dot(_block(u, v, t, place, T, P, Q, r), tile.T, zero_a, input_precision="ieee")
        tl.store(to_a + t[:, None] * (S * S), d_rule, mask=(t < T)[:, None] & (block < S * S)[None, :])
        d_block = tl.dot(_rule(a, b, t, block, T, S, FULL), tile, zero_b, input_precision="ieee")
        tl.store(to_b + t[:, None] * (P * Q), d_block, mask=(t < T)[:, None] & (place < P * Q)[None, :])


@triton.jit
def contract_kernel(
    partial,
    left,
    right,
    d_left,
    d_right,
    X: tl.constexpr,
    Y: tl.constexpr,
    T: tl.constexpr,
    r: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """d_left (T, X, r) = D_t right_t and d_right (T, Y, r) = D_tᵀ left_t for D (T, X, Y), the sum of the partials.

    Program = (BLOCK_X of the T·X rows of d_left, or after those of the T·Y rows of d_right; column ρ).
    """
    BLOCKS: tl.constexpr = (T * X + BLOCK_X - 1) // BLOCK_X
    here = tl.program_id(0)
    if here < BLOCKS:
        _contract(partial, right, d_left, here * BLOCK_X, X, Y, Y, 1, T, r, PARTS, BLOCK_X, BLOCK_Y)
    else:
        _contract(partial, left, d_right, (here - BLOCKS) * BLOCK_X, Y, X, 1, Y, T, r, PARTS, BLOCK_X, BLOCK_Y)


@triton.jit
def _contract(
    partial,
    other,
    out,
    first,
    X: tl.constexpr,
    Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    T: tl.constexpr,
    r: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """out[t, x, ρ] = Σ_y D[t, x, y] · other[t, y, ρ] for BLOCK_X rows t·X + x; the partials are added in order."""
    rho = tl.program_id(1)
    row = first + tl.arange(0, BLOCK_X)
    t = (row // X)[:, None]
    acc = tl.zeros((BLOCK_X,), tl.float32)
    for y0 in range(0, Y, BLOCK_Y):
        y = y0 + tl.arange(0, BLOCK_Y)[None, :]
        inside = (row < T * X)[:, None] & (y < Y)
        at = partial + t.to(tl.int64) * (X * Y) + (row % X)[:, None] * STRIDE_X + y * STRIDE_Y
        total = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        for _ in tl.range(0, PARTS, loop_unroll_factor=8):  # the loads wait for memory together
            total += tl.load(at, mask=inside, other=0.0)
            at += T * X * Y
        acc += tl.sum(total * tl.load(other + (t * Y + y) * r + rho, mask=inside, other=0.0), 1)
    tl.store(out + row * r + rho, acc, mask=row < T * X)


def merge_weight(
    weight: Tensor,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """W' (N, K) = W with s·ΔW_i added to the rows of segment i, in the dtype of W; the other rows are copied.

    Args:
        weight: (N, K) with unit column stride, any float dtype of up to 32 bits.
        factors: fp32 and contiguous; each adapter may have its own S, P, Q, T and r, factored or full A_t.
        segments: Rows [start, stop) of factors[i]; disjoint.
        scale: s.
        dropout: Probability that an element of ΔW is zero; the others are divided by 1 − dropout.
        seed: Of the mask, 64 bits.
    """
    merged = weight.new_empty(weight.shape)
    for start, stop, adapter in layout(factors, segments, weight.shape[0]).blocks:
        if adapter < 0:
            merged[start:stop] = weight[start:stop]
    for launch in merge_launches(weight, merged, factors, segments, scale, dropout=dropout, seed=seed):
        launch.run()
    return merged


def merge_launches(
    weight: Tensor,
    merged: Tensor,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    tile: Tile | None = None,
) -> list[Launch]:
    """The launches that fill the segments' rows of merged, one an adapter; tile defaults to `merge_tile`."""
    launches = []
    for group, (start, _) in zip(factors, segments, strict=True):
        here = tile or merge_tile(group)
        arguments = _arguments(group, start, scale, dropout, seed, here) | {
            "w": weight,
            "merged": merged,
            "stride_w": row_stride(weight),
            "stride_m": row_stride(merged),
        }
        launches.append(Launch(merge_kernel, _grid(group, here), arguments, here.warps, here.stages))
    return launches


def dense_gradients(
    dw: Sequence[Tensor],
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[Tensor]:
    """The fp32 gradients of all factors, in their layouts: da, db (if factored), du, dv of each adapter in turn.

    Args:
        dw: For each segment the gradient (rows, K) of its rows of W', fp32 with unit column stride.
        factors, segments, scale, dropout, seed: As `merge_weight` had them.
    """
    gradients = [KronFactors._make(None if t is None else torch.empty_like(t) for t in group) for group in factors]
    partials = [gradient_partials(group) for group in factors]
    for launch in dense_gradient_launches(
        dw, factors, segments, scale, partials, gradients, dropout=dropout, seed=seed
    ):
        launch.run()
    for group, partial in zip(gradients, partials, strict=True):
        if group.b is None:
            torch.sum(partial.a.view(-1, *group.a.shape), 0, out=group.a)
    return [tensor for group in gradients for tensor in group if tensor is not None]


def dense_gradient_launches(
    dw: Sequence[Tensor],
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    partials: Sequence[Partials],
    gradients: Sequence[KronFactors],
    *,
    dropout: float = 0.0,
    seed: int = 0,
    tile: Tile | None = None,
) -> list[Launch]:
    """The launches that fill the partials and from them the gradients, all but a full dA: the sum of partials.a."""
    launches = []
    for d, group, (start, _), partial, gradient in zip(dw, factors, segments, partials, gradients, strict=True):
        here = tile or merge_tile(group)
        arguments = _arguments(group, start, scale, dropout, seed, here) | {
            "dw": d,
            "partial_a": partial.a,
            "partial_b": partial.b,
            "stride_dw": row_stride(d),
        }
        launches.append(Launch(dense_gradient_kernel, _grid(group, here), arguments, here.warps, here.stages))
        launches.append(_contract_launch(partial.b, group.u, group.v, gradient.u, gradient.v))
        if group.b is not None and gradient.b is not None:
            launches.append(_contract_launch(partial.a, group.a, group.b, gradient.a, gradient.b))
    return launches


def _contract_launch(partial: Tensor, left: Tensor, right: Tensor, d_left: Tensor, d_right: Tensor) -> Launch:
    (T, X), Y = left.shape[:2], right.shape[1]
    r = left.shape[2] if left.dim() == 3 else 1
    arguments = {
        "partial": partial,
        "left": left,
        "right": right,
        "d_left": d_left,
        "d_right": d_right,
        "X": X,
        "Y": Y,
        "T": T,
        "r": r,
        "PARTS": partial.shape[0],
        "BLOCK_X": CONTRACT_ROWS,
        "BLOCK_Y": CONTRACT_COLUMNS,
    }
    blocks = triton.cdiv(T * X, CONTRACT_ROWS) + triton.cdiv(T * Y, CONTRACT_ROWS)
    return Launch(contract_kernel, (blocks, r), arguments, 4, 1)


def merge_tile(group: KronFactors) -> Tile:
    """Blocks (i, j) by places (p, q) by terms: 64 by 64, or what there is of a short side by 128.

    Terms are taken 16 at a time (the least a dot contracts): a thread holds its operands of all of them in registers.
    """
    blocks, places = group.a.shape[1] ** 2, group.u.shape[1] * group.v.shape[1]
    return Tile(_side(blocks, places), _side(places, blocks), 16, 8, 1)


def _side(length: int, other: int) -> int:
    padded: int = triton.next_power_of_2(length)
    return min(max(16, padded), 64 if other > 32 else 128)


def gradient_partials(group: KronFactors, tile: Tile | None = None) -> Partials:
    """Uninitialised space for the partial sums of one adapter; tile as in the launches."""
    m, n = _grid(group, tile or merge_tile(group))
    T, S, P, Q = *group.a.shape[:2], group.u.shape[1], group.v.shape[1]
    return Partials(group.a.new_empty(n, T, S * S), group.a.new_empty(m, T, P * Q))


def _grid(group: KronFactors, tile: Tile) -> tuple[int, int]:
    blocks, places = group.a.shape[1] ** 2, group.u.shape[1] * group.v.shape[1]
    return triton.cdiv(blocks, tile.m), triton.cdiv(places, tile.n)


def _arguments(
    group: KronFactors, start: int, scale: float, dropout: float, seed: int, tile: Tile
) -> dict[str, object]:
    return {
        "a": group.a,
        "b": group.a if group.b is None else group.b,
        "u": group.u,
        "v": group.v,
        "scale": scale / (1.0 - dropout),
        "seed": seed,
        "start": start,
        "S": group.a.shape[1],
        "P": group.u.shape[1],
        "Q": group.v.shape[1],
        "T": group.a.shape[0],
        "r": group.u.shape[2],
        "FULL": group.b is None,
        "DROPOUT": dropout,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_T": tile.k,
    }
