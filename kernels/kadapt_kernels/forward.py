"""y = x Wᵀ + bias + (x R)(s L)ᵀ on the adapted rows, in one kernel: the row-fused forward.

A program owns BLOCK_M rows of x and a chunk of up to TILES · BLOCK_N rows of W that lie in one block of the layout.
While it multiplies its first tile it also accumulates h = x R in registers (the x tile is there already); each tile
then ends with one rank-R step against s Lᵀ. So ΔW is never in memory, x is read as often as the frozen layer reads it,
and h is written once, for the backward.

Extra work over the frozen layer for one segment: M·R·(rows/(TILES·BLOCK_N)·K + rows) multiply-adds; extra bytes M·R.
The tall factors R and s L are composed by `compose` beforehand, K·R and rows·R numbers. Composing them where they are
used would have to wait: in the loop for every product, since a tensor core reads its operand from shared memory; at the
end of a tile for some hundred loads of single factors with nothing beside them (0.24 ms in all instead of 0.20 for
d = 768, M = 25,216 on an H100).

Without adapters the same kernel is the frozen layer: the baseline that tells the cost of the fusion from that of the
matrix product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadapt_kernels.blocks import (
    Call,
    Launch,
    Layout,
    columns,
    descriptor,
    dot,
    layout,
    load_tile,
    locate,
    precision,
    repeat,
    row_stride,
)
from kadapt_kernels.factors import KronFactors, Rows
from kadapt_kernels.tiles import Tile, aligned, forward_tile

COMPOSE_ROWS = 32
LANGUAGE_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def compose_kernel(
    right,
    left,
    total,
    a,
    b,
    u,
    v,
    bias,
    shifts,
    scale,
    K,
    N,
    STARTS: tl.constexpr,
    SHAPES: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """right (K, G·R): b_t ⊗ v_t of all adapters side by side. left (N, R): s · a_t ⊗ u_t on each segment's rows.

    total (N,) fp32, where there are shifts: the bias, if any, plus each one on its rows. Program = (BLOCK rows, one of
    these).
    """
    G: tl.constexpr = len(SHAPES)
    PARTS: tl.constexpr = 2 * G + HAS_SHIFTS
    part = tl.program_id(0) % PARTS
    offs = (tl.program_id(0) // PARTS) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, COLUMNS)
    for g in tl.static_range(G):
        if part == 2 * g:
            tile = columns(b[g], v[g], 1.0, offs, SHAPES[g][0], SHAPES[g][2], SHAPES[g][3], SHAPES[g][4], COLUMNS)
            at = right + offs[:, None] * (G * COLUMNS) + g * COLUMNS + i[None, :]
            tl.store(at, tile.T.to(right.dtype.element_ty), mask=(offs < K)[:, None])
        if part == 2 * g + 1:
            tile = columns(a[g], u[g], scale, offs, SHAPES[g][0], SHAPES[g][1], SHAPES[g][3], SHAPES[g][4], COLUMNS)
            at = left + (STARTS[g] + offs)[:, None] * COLUMNS + i[None, :]
            tl.store(at, tile.T.to(left.dtype.element_ty), mask=(offs < SHAPES[g][0] * SHAPES[g][1])[:, None])
    if HAS_SHIFTS and part == 2 * G:
        acc = tl.zeros((BLOCK,), tl.float32)
        if HAS_BIAS:
            acc += tl.load(bias + offs, mask=offs < N, other=0.0).to(tl.float32)
        for g in tl.static_range(G):
            n = offs - STARTS[g]
            acc += tl.load(shifts[g] + n, mask=(n >= 0) & (n < SHAPES[g][0] * SHAPES[g][1]), other=0.0)
        tl.store(total + offs, acc, mask=offs < N)


@triton.jit
def forward_kernel(
    x,
    w,
    bias,
    y,
    h,
    right,
    left,
    M,
    stride_xm,
    stride_wn,
    stride_ym,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    G: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Program = (row block, chunk); the chunks of one row block are neighbours, so that x stays in the cache."""
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    pid = tl.program_id(0)
    m0 = (pid // CHUNKS) * BLOCK_M
    chunk0, start, stop, adapter = locate(pid % CHUNKS, TILES * BLOCK_N, BLOCKS, ALIGNMENT)

    h_tile = tl.zeros((BLOCK_M, COLUMNS), DTYPE)
    first = 0
    if G > 0:
        if adapter >= 0:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc_h = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                x_tile = load_tile(x, m0, k0, stride_xm, M, K, BLOCK_M, BLOCK_K, False, EVEN_K, DESCRIPTOR)
                w_tile = load_tile(w, chunk0, k0, stride_wn, stop, K, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, DESCRIPTOR)
                r_tile = load_tile(
                    right,
                    k0,
                    adapter * COLUMNS,
                    G * COLUMNS,
                    K,
                    G * COLUMNS,
                    BLOCK_K,
                    COLUMNS,
                    EVEN_K,
                    True,
                    DESCRIPTOR,
                )
                acc = dot(x_tile, w_tile.T, acc, PRECISION)
                acc_h = dot(x_tile, r_tile, acc_h, PRECISION)
            h_tile = acc_h.to(DTYPE)
            if chunk0 == start:
                _store_h(h, h_tile, m0, adapter, M, G, BLOCK_M, COLUMNS)
            _finish(
                y, acc, h_tile, bias, left, m0, chunk0, stop, adapter, M, stride_ym,
                G, COLUMNS, HAS_BIAS, EVEN_N, BLOCK_M, BLOCK_N, DESCRIPTOR, PRECISION,
            )  # fmt: skip
            first = 1
    for tile in range(first, TILES):
        n0 = chunk0 + tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x_tile = load_tile(x, m0, k0, stride_xm, M, K, BLOCK_M, BLOCK_K, False, EVEN_K, DESCRIPTOR)
            w_tile = load_tile(w, n0, k0, stride_wn, stop, K, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, DESCRIPTOR)
            acc = dot(x_tile, w_tile.T, acc, PRECISION)
        _finish(
            y, acc, h_tile, bias, left, m0, n0, stop, adapter, M, stride_ym,
            G, COLUMNS, HAS_BIAS, EVEN_N, BLOCK_M, BLOCK_N, DESCRIPTOR, PRECISION,
        )  # fmt: skip


@triton.jit
def _store_h(h, tile, m0, adapter, M, G: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    rows = m0 + tl.arange(0, BLOCK_M)
    at = h + rows[:, None].to(tl.int64) * (G * COLUMNS) + adapter * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, tile, mask=(rows < M)[:, None])


@triton.jit
def _finish(
    y,
    acc,
    h_tile,
    bias,
    left,
    m0,
    n0,
    stop,
    adapter,
    M,
    stride_ym,
    G: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + h (s L)ᵀ + bias into y."""
    n = n0 + tl.arange(0, BLOCK_N)
    if G > 0:
        if adapter >= 0:
            left_tile = load_tile(left, n0, 0, COLUMNS, stop, COLUMNS, BLOCK_N, COLUMNS, EVEN_N, True, DESCRIPTOR)
            acc = dot(h_tile, left_tile.T, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < stop, other=0.0).to(tl.float32)[None, :]
    if DESCRIPTOR:
        y.store([m0, n0], acc.to(y.dtype))
    else:
        m = m0 + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None]
        if not EVEN_N:
            inside = inside & (n < stop)[None, :]
        tl.store(y + m[:, None].to(tl.int64) * stride_ym + n[None, :], acc.to(y.dtype.element_ty), mask=inside)


class Kept(NamedTuple):
    """What the forward hands to the backward, in the dtype of x.

    Attributes:
        h: (M, G·R), x R of all adapters side by side.
        right: (K, G·R), R likewise.
        left: (N, R), s L on each segment's rows; the others are neither written nor read.
    """

    h: Tensor
    right: Tensor
    left: Tensor


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    shifts: Sequence[Tensor] = (),
    tile: Tile | None = None,
) -> tuple[Tensor, Kept]:
    """y (M, N) in the dtype of x, and what the backward needs; x (M, K) and weight (N, K) with unit column stride.

    Factors contiguous and in fp32, and so the shifts, one (rows,) a segment or none.
    """

    def make() -> Call:
        plan = layout(factors, segments, weight.shape[0])
        y, kept, total = forward_space(x, weight, plan)
        if len(x) == 0:
            return Call([y, *kept], [])
        launches = forward_launches(x, weight, bias, y, kept, total, factors, shifts, plan, scale, tile)
        return Call([y, *kept, total], launches)

    inputs = (x, weight, bias, *(t for group in factors for t in group), *shifts)
    made = repeat(("forward", scale, tuple(segments), tile, precision(x.dtype)), inputs, make)
    return made[0], Kept(*made[1:4])


def forward_space(x: Tensor, weight: Tensor, plan: Layout) -> tuple[Tensor, Kept, Tensor]:
    """y, what is kept, and the total bias (N,) fp32, all uninitialised. Also works on the meta device."""
    width = len(plan.shapes) * plan.columns
    kept = Kept(x.new_empty(len(x), width), x.new_empty(x.shape[1], width), x.new_empty(len(weight), plan.columns))
    return x.new_empty(len(x), len(weight)), kept, x.new_empty(len(weight), dtype=torch.float32)


def forward_launches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    kept: Kept,
    total: Tensor,
    factors: Sequence[KronFactors],
    shifts: Sequence[Tensor],
    plan: Layout,
    scale: float,
    tile: Tile | None = None,
) -> list[Launch]:
    """The launches that fill y, what is kept and, if there are shifts, the total bias; tile defaults to the table's."""
    (M, K), N = x.shape, weight.shape[0]
    tile = tile or forward_tile(x.device, x.dtype, M, K, plan, aligned(x, weight, y))
    chunks = sum(triton.cdiv(stop - start, tile.n * tile.tiles) for start, stop, _ in plan.blocks)
    tensors: dict[str, Any] = {"x": x, "w": weight, "y": y}
    tensors |= {"right": kept.right, "left": kept.left} if factors else {"right": weight, "left": weight}
    if tile.descriptor:
        shapes = {"x": (tile.m, tile.k), "w": (tile.n, tile.k), "y": (tile.m, tile.n)}
        shapes |= {"right": (tile.k, plan.columns), "left": (tile.n, plan.columns)}
        tensors = {name: descriptor(t, shapes[name]) for name, t in tensors.items()}
    launches = [_compose(kept, total, bias, factors, shifts, plan, scale)] if factors else []
    bias = total if shifts else bias
    arguments = tensors | {
        "bias": weight if bias is None else bias,
        "h": kept.h,
        "M": M,
        "stride_xm": row_stride(x),
        "stride_wn": row_stride(weight),
        "stride_ym": row_stride(y),
        "N": N,
        "K": K,
        "BLOCKS": plan.blocks,
        "G": len(factors),
        "COLUMNS": plan.columns,
        "ALIGNMENT": plan.alignment,
        "CHUNKS": chunks,
        "HAS_BIAS": bias is not None,
        "EVEN_N": plan.divides(tile.n * tile.tiles),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "TILES": tile.tiles,
        "DESCRIPTOR": tile.descriptor,
        "PRECISION": precision(x.dtype),
        "DTYPE": LANGUAGE_DTYPE[x.dtype],
    }
    launches.append(Launch(forward_kernel, (triton.cdiv(M, tile.m) * chunks,), arguments, tile.warps, tile.stages))
    return launches


def _compose(
    kept: Kept,
    total: Tensor,
    bias: Tensor | None,
    factors: Sequence[KronFactors],
    shifts: Sequence[Tensor],
    plan: Layout,
    scale: float,
) -> Launch:
    starts = {adapter: start for start, _, adapter in plan.blocks}
    arguments = {
        "right": kept.right,
        "left": kept.left,
        "total": total,
        "a": tuple(f.a for f in factors),
        "b": tuple(f.b for f in factors),
        "u": tuple(f.u for f in factors),
        "v": tuple(f.v for f in factors),
        "bias": total if bias is None else bias,
        "shifts": tuple(shifts) or tuple(f.a for f in factors),
        "scale": scale,
        "K": len(kept.right),
        "N": len(total),
        "STARTS": tuple(starts[i] for i in range(len(factors))),
        "SHAPES": plan.shapes,
        "COLUMNS": plan.columns,
        "HAS_BIAS": bias is not None,
        "HAS_SHIFTS": bool(shifts),
        "BLOCK": COMPOSE_ROWS,
    }
    longest = max(len(kept.right), *(side * p for side, p, _, _, _ in plan.shapes), len(total) if shifts else 0)
    programs = triton.cdiv(longest, COMPOSE_ROWS) * (2 * len(factors) + bool(shifts))
    return Launch(compose_kernel, (programs,), arguments, 4, 1)
