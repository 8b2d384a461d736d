"""The gradients of the fused layer: dx, and da, db, du, dv of every adapter, without a dense dW.

With the tall factors L (rows, R) and R (K, R) of a segment, h = x R kept by the forward, and dy_seg the segment's
columns of dy::

    g  = dy_seg (s L)           (M, R)         dx = dy W + Σ g Rᵀ       (M, K)
    dL = s · dy_segᵀ h          (rows, R)      dR = xᵀ g                (K, R)
    da_t[j] = Σ_kρ dL[j·P + k, tρ] u_t[k, ρ]   du_t[k, ρ] = Σ_j dL[j·P + k, tρ] a_t[j]      and db, dv from dR alike

R and s L are those that the forward composed, and h is its. The launches:

    project    g, by one pass over dy_seg
    tall       dL, by another; and the sums of dy_seg's columns, the gradient of a shift
    tall       dR in one pass over x, for all adapters at once
    contract   dL and dR to da, db, du, dv; and the runs of those sums to one
    dx         the frozen layer's product plus one product with all columns of g and R

Extra work over the frozen layer's backward for one segment: 2·M·R·(rows + K) multiply-adds, where a dense dW takes
M·rows·K. Extra bytes: two reads of dy_seg, one of x, and g and h, M·R numbers each. One pass over dy_seg for both g and
dL needs a whole segment in a program's registers and both its products on mma.sync; at every width and number of rows
that was measured it was slower, or as fast (benchmarks/README.md).

dL and dR are sums over M. Each of `splits` runs of rows gives its own partial sum in fp32 and `contract` adds them in a
fixed order: no atomics, the same bits every time.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadapt_kernels.blocks import (
    Call,
    Launch,
    Layout,
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
from kadapt_kernels.forward import Kept
from kadapt_kernels.tiles import RANK_STEP, BackwardTiles, Tile, aligned, backward_tiles

CONTRACT_ROWS, SHIFT_ROWS = 32, 256
SUMS = tl.constexpr(16)  # the narrowest product of a tensor core
CONTRACT_NUMBERS = 16384  # partials that one program of `contract` has under way at most: 64 registers a thread


@triton.jit
def project_kernel(
    dy,
    left,
    g,
    M,
    stride_dym,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LONGEST: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g from s L, left (N, R): program = (row block, adapter)."""
    G: tl.constexpr = len(BLOCKS)
    m0 = (tl.program_id(0) // G) * BLOCK_M
    start, _, stop, adapter = locate(tl.program_id(0) % G, LONGEST, BLOCKS, ALIGNMENT)
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for n0 in range(start, stop, BLOCK_K):
        dy_tile = load_tile(dy, m0, n0, stride_dym, M, stop, BLOCK_M, BLOCK_K, False, EVEN_N, False)
        left_tile = load_tile(left, n0, 0, COLUMNS, stop, COLUMNS, BLOCK_K, COLUMNS, EVEN_N, True, False)
        acc = dot(dy_tile, left_tile, acc, PRECISION)
    m = m0 + tl.arange(0, BLOCK_M)
    at = g + m[:, None].to(tl.int64) * (G * COLUMNS) + adapter * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, acc.to(g.dtype.element_ty), mask=(m < M)[:, None])


@triton.jit
def tall_kernel(
    x,
    z,
    partial,
    sums,
    M,
    span,
    stride_xm,
    stride_zm,
    D,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (splits, D, WIDTH) of x_blockᵀ z_block: program = (run of `span` rows, BLOCK_N columns of x).

    Block i of BLOCKS are columns of x (M, D) and meet the WIDTH columns from adapter·WIDTH of z. COLUMNS is WIDTH as a
    power of two. For dR there is one block, all of x, and all of g: x is read once whatever the number of adapters.
    sums (splits, D) are those of x_block's columns: a product with a column of ones, since a tensor core has x there.
    """
    split = tl.program_id(0) // CHUNKS
    n0, _, stop, adapter = locate(tl.program_id(0) % CHUNKS, BLOCK_N, BLOCKS, ALIGNMENT)
    first = adapter * WIDTH
    acc = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    acc_sums = tl.zeros((BLOCK_N, SUMS), tl.float32)
    ones = tl.where(tl.arange(0, SUMS)[None, :] == 0, 1.0, tl.zeros((BLOCK_M, SUMS), tl.float32)).to(x.dtype.element_ty)
    for m0 in range(split * span, tl.minimum(M, (split + 1) * span), BLOCK_M):
        x_tile = load_tile(x, m0, n0, stride_xm, M, stop, BLOCK_M, BLOCK_N, False, EVEN_N, False)
        z_tile = load_tile(z, m0, first, stride_zm, M, first + WIDTH, BLOCK_M, COLUMNS, False, COLUMNS == WIDTH, False)
        acc = dot(x_tile.T, z_tile, acc, PRECISION)
        if HAS_SUMS:
            acc_sums = dot(x_tile.T, ones, acc_sums, PRECISION)
    n = n0 + tl.arange(0, BLOCK_N)
    i = tl.arange(0, COLUMNS)
    at = partial + (split.to(tl.int64) * D + n)[:, None] * WIDTH + i[None, :]
    tl.store(at, acc, mask=(n < stop)[:, None] & (i < WIDTH)[None, :])
    if HAS_SUMS:
        tl.store(sums + split * D + n, tl.sum(acc_sums, 1), mask=n < stop)


@triton.jit
def dx_kernel(
    dy,
    w,
    dx,
    g,
    right,
    M,
    stride_dym,
    stride_wn,
    stride_dxm,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = dy W + g Rᵀ with the WIDTH columns of all adapters; BLOCK_N cuts K (the columns of dx), BLOCK_K cuts N.

    The programs of one row block are neighbours: together they read those rows of dy once from memory, and all of W
    stays in the cache.
    """
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    EVEN_N: tl.constexpr = N % BLOCK_K == 0
    EVEN_K: tl.constexpr = K % BLOCK_N == 0
    m0 = (tl.program_id(0) // TILES) * BLOCK_M
    k0 = (tl.program_id(0) % TILES) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n0 in range(0, N, BLOCK_K):
        dy_tile = load_tile(dy, m0, n0, stride_dym, M, N, BLOCK_M, BLOCK_K, False, EVEN_N, DESCRIPTOR)
        w_tile = load_tile(w, n0, k0, stride_wn, N, K, BLOCK_K, BLOCK_N, EVEN_N, EVEN_K, DESCRIPTOR)
        acc = dot(dy_tile, w_tile, acc, PRECISION)
    for column0 in tl.static_range(0, WIDTH, STEP):
        g_tile = load_tile(g, m0, column0, WIDTH, M, WIDTH, BLOCK_M, STEP, False, True, DESCRIPTOR)
        right_tile = load_tile(right, k0, column0, WIDTH, K, WIDTH, BLOCK_N, STEP, EVEN_K, True, DESCRIPTOR)
        acc = dot(g_tile, right_tile.T, acc, PRECISION)
    if DESCRIPTOR:
        dx.store([m0, k0], acc.to(dx.dtype))
    else:
        m = m0 + tl.arange(0, BLOCK_M)
        k = k0 + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None]
        if not EVEN_K:
            inside = inside & (k < K)[None, :]
        tl.store(dx + m[:, None].to(tl.int64) * stride_dxm + k[None, :], acc.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def contract_kernel(
    d_left,
    d_right,
    sums,
    a,
    b,
    u,
    v,
    da,
    db,
    du,
    dv,
    d_shift,
    scale,
    left_splits,
    right_splits,
    N,
    K,
    STARTS: tl.constexpr,
    SHAPES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_SHIFTS: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
):
    """Each adapter has S + P programs for da and du, then S + Q for db and dv; one makes one j of a or one k of u.

    Then come those for the shifts, if there are any, SHIFT_ROWS numbers each.
    """
    G: tl.constexpr = len(SHAPES)
    task = tl.program_id(0)
    for i in tl.static_range(G):
        if (task >= 0) & (task < SHAPES[i][0] + SHAPES[i][1]):
            _contract(
                d_left + STARTS[i] * COLUMNS, left_splits, N * COLUMNS, COLUMNS, a[i], u[i], da[i], du[i], scale, task,
                SHAPES[i][0], SHAPES[i][1], SHAPES[i][3], SHAPES[i][4], COLUMNS, ROWS, AT_ONCE,
            )  # fmt: skip
        task -= SHAPES[i][0] + SHAPES[i][1]
        if (task >= 0) & (task < SHAPES[i][0] + SHAPES[i][2]):
            _contract(
                d_right + i * COLUMNS, right_splits, K * G * COLUMNS, G * COLUMNS, b[i], v[i], db[i], dv[i], 1.0, task,
                SHAPES[i][0], SHAPES[i][2], SHAPES[i][3], SHAPES[i][4], COLUMNS, ROWS, AT_ONCE,
            )  # fmt: skip
        task -= SHAPES[i][0] + SHAPES[i][2]
    if HAS_SHIFTS:
        for i in tl.static_range(G):
            if (task >= 0) & (task * SHIFT_ROWS < SHAPES[i][0] * SHAPES[i][1]):
                row0 = task * SHIFT_ROWS
                _add_runs(d_shift[i], sums + STARTS[i], left_splits, N, row0, SHAPES[i][0] * SHAPES[i][1], SHIFT_ROWS)
            task -= (SHAPES[i][0] * SHAPES[i][1] + SHIFT_ROWS - 1) // SHIFT_ROWS


@triton.jit
def _add_runs(total, sums, splits, stride_split, row0, rows, ROWS: tl.constexpr):
    """total[row0 : row0 + ROWS] from the sums of the runs of rows, eight under way at a time."""
    n = row0 + tl.arange(0, ROWS)
    acc = tl.zeros((8, ROWS), tl.float32)
    for s0 in range(0, splits, 8):
        s = s0 + tl.arange(0, 8)
        inside = (s < splits)[:, None] & (n < rows)[None, :]
        acc += tl.load(sums + s[:, None] * stride_split + n[None, :], mask=inside, other=0.0)
    tl.store(total + n, tl.sum(acc, 0), mask=n < rows)


@triton.jit
def _contract(
    partial,
    splits,
    stride_split,
    stride_row,
    a,
    u,
    da,
    du,
    scale,
    task,
    SIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    T: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """da[:, j] for j = task < SIDE, else du[:, k, :] for k = task - SIDE, from the partials of one tall factor."""
    i = tl.arange(0, R)
    t = i // r
    rho = i % r
    inside = i < T * r
    if task < SIDE:
        found = tl.zeros((R,), tl.float32)
        for k0 in range(0, LENGTH, ROWS):
            k = k0 + tl.arange(0, ROWS)
            mask = (k < LENGTH)[:, None] & inside[None, :]
            d = _sum(partial, splits, stride_split, stride_row, task * LENGTH + k0, 1, LENGTH - k0, R, ROWS, AT_ONCE)
            weight = tl.load(u + (t[None, :] * LENGTH + k[:, None]) * r + rho[None, :], mask=mask, other=0.0)
            found += tl.sum(d * weight, 0)
        total = tl.sum(tl.where(t[None, :] == i[:, None], found[None, :], 0.0), 1)
        tl.store(da + i * SIDE + task, scale * total, mask=i < T)
    else:
        k = task - SIDE
        found = tl.zeros((R,), tl.float32)
        for j0 in range(0, SIDE, ROWS):
            j = j0 + tl.arange(0, ROWS)
            mask = (j < SIDE)[:, None] & inside[None, :]
            d = _sum(partial, splits, stride_split, stride_row, j0 * LENGTH + k, LENGTH, SIDE - j0, R, ROWS, AT_ONCE)
            weight = tl.load(a + t[None, :] * SIDE + j[:, None], mask=mask, other=0.0)
            found += tl.sum(d * weight, 0)
        tl.store(du + (t * LENGTH + k) * r + rho, scale * found, mask=inside)


@triton.jit
def _sum(
    partial,
    splits,
    stride_split,
    stride_row,
    row0,
    step,
    count,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The (ROWS, R) sum over splits of the rows row0, row0 + step, …; zero from the count-th on.

    AT_ONCE splits are under way at a time: one by one, each would wait for memory.
    """
    e = tl.arange(0, AT_ONCE * ROWS)
    i = tl.arange(0, R)
    at = (row0 + (e % ROWS) * step)[:, None] * stride_row + i[None, :]
    acc = tl.zeros((AT_ONCE * ROWS, R), tl.float32)
    for s0 in range(0, splits, AT_ONCE):
        s = s0 + e // ROWS
        mask = ((s < splits) & (e % ROWS < count))[:, None]
        acc += tl.load(partial + s[:, None].to(tl.int64) * stride_split + at, mask=mask, other=0.0)
    return tl.sum(tl.reshape(acc, (AT_ONCE, ROWS, R)), 0)


class Workspace(NamedTuple):
    """What the launches hand to each other.

    Attributes:
        g: (M, G·R) in the compute dtype.
        d_left: (splits, N, R) partial sums of dL, unscaled; rows of frozen blocks are neither written nor read.
        d_right: (splits, K, G·R) partial sums of dR.
        sums: (splits, N) partial sums of the columns of dy; frozen ones are neither written nor read.
    """

    g: Tensor
    d_left: Tensor
    d_right: Tensor
    sums: Tensor


class Grads(NamedTuple):
    """da, db, du, dv of each adapter, and the gradient of each shift, if there are shifts."""

    factors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
    shifts: Sequence[Tensor]


def fused_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Kept,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    shifts: Sequence[Tensor] = (),
    *,
    need_dx: bool = True,
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (M, K) in the dtype of x, or None, and [da0, db0, du0, dv0, da1, …, shift gradients] in fp32.

    dy (M, N), x (M, K) and weight (N, K) have unit column stride and any row stride above zero: an expanded dy is made
    contiguous by the caller. `kept` is the forward's. M = 0 gives zeros.
    """

    def make() -> Call:
        plan = layout(factors, segments, weight.shape[0])
        used = tiles or backward_tiles(x.device, x.dtype, len(x), x.shape[1], plan, aligned(dy, weight))
        dx = x.new_empty(x.shape) if need_dx else None
        groups: Any = [tuple(torch.empty_like(t) for t in f if t is not None) for f in factors]
        grads = Grads(groups, [torch.empty_like(t) for t in shifts])
        space = workspace(x, weight.shape[0], plan, used)
        launches = backward_launches(dy, x, weight, kept, dx, grads, space, factors, plan, scale, used)
        results = [*([] if dx is None else [dx]), *(t for group in groups for t in group), *grads.shifts]
        return Call([*results, *space], launches)

    flat = [t for group in factors for t in group]
    what = ("backward", scale, tuple(segments), need_dx, tiles, precision(x.dtype))
    made = repeat(what, (dy, x, weight, *kept, *flat, *shifts), make)
    small = made[need_dx : need_dx + len(flat) + len(shifts)]
    return (made[0] if need_dx else None), small


def workspace(x: Tensor, rows: int, plan: Layout, tiles: BackwardTiles) -> Workspace:
    """Uninitialised; x (M, K), of a weight with that many rows. Also works on the meta device."""
    (M, K), width = x.shape, len(plan.shapes) * plan.columns
    left_splits, right_splits = _splits(K, plan, tiles)
    return Workspace(
        x.new_empty(M, width),
        x.new_empty(left_splits, rows, plan.columns, dtype=torch.float32),
        x.new_empty(right_splits, K, width, dtype=torch.float32),
        x.new_empty(left_splits, rows, dtype=torch.float32),
    )


def backward_launches(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Kept,
    dx: Tensor | None,
    grads: Grads,
    space: Workspace,
    factors: Sequence[KronFactors],
    plan: Layout,
    scale: float,
    tiles: BackwardTiles,
) -> list[Launch]:
    """The launches that fill dx (unless None), the grads of each adapter and the workspace."""
    launches = []
    if factors:
        adapted, whole = [block for block in plan.blocks if block[2] >= 0], [(0, x.shape[1], 0)]
        sums = space.sums if grads.shifts else None
        launches = [
            _project(dy, kept.left, space.g, adapted, plan, tiles.project),
            _tall(dy, kept.h, space.d_left, sums, adapted, plan.alignment, tiles.tall),
            _tall(x, space.g, space.d_right, None, whole, gcd(16, x.shape[1]), tiles.tall),
            _contraction(grads, space, factors, plan, scale),
        ]
    if dx is not None and dx.numel():
        launches.append(_dx(dy, weight, dx, space.g, kept.right, tiles.dx))
    return launches


def _splits(K: int, plan: Layout, tiles: BackwardTiles) -> tuple[int, int]:
    """Runs of rows for dL, and for dR: as many programs in all."""
    chunks = sum(triton.cdiv(stop - start, tiles.tall.n) for start, stop, adapter in plan.blocks if adapter >= 0)
    return tiles.splits, triton.cdiv(tiles.splits * chunks, triton.cdiv(K, tiles.tall.n))


def _project(
    dy: Tensor, left: Tensor, g: Tensor, blocks: Sequence[tuple[int, int, int]], plan: Layout, tile: Tile
) -> Launch:
    arguments = {
        "dy": dy,
        "left": left,
        "g": g,
        "M": len(dy),
        "stride_dym": row_stride(dy),
        "BLOCKS": tuple(blocks),
        "COLUMNS": plan.columns,
        "ALIGNMENT": plan.alignment,
        "LONGEST": max(stop - start for start, stop, _ in blocks),
        "EVEN_N": all((stop - start) % tile.k == 0 for start, stop, _ in blocks),
        "BLOCK_M": tile.m,
        "BLOCK_K": tile.k,
        "PRECISION": precision(dy.dtype),
    }
    return Launch(project_kernel, (triton.cdiv(len(dy), tile.m) * len(blocks),), arguments, tile.warps, tile.stages)


def _tall(
    x: Tensor,
    z: Tensor,
    partial: Tensor,
    sums: Tensor | None,
    blocks: Sequence[tuple[int, int, int]],
    alignment: int,
    tile: Tile,
) -> Launch:
    splits, D, width = partial.shape
    chunks = sum(triton.cdiv(stop - start, tile.n) for start, stop, _ in blocks)
    arguments = {
        "x": x,
        "z": z,
        "partial": partial,
        "sums": partial if sums is None else sums,
        "M": len(x),
        "span": triton.cdiv(triton.cdiv(len(x), tile.m), splits) * tile.m,  # no tile reaches into the next run
        "stride_xm": row_stride(x),
        "stride_zm": z.shape[1],
        "D": D,
        "BLOCKS": tuple(blocks),
        "CHUNKS": chunks,
        "ALIGNMENT": alignment,
        "WIDTH": width,
        "COLUMNS": triton.next_power_of_2(width),
        "HAS_SUMS": sums is not None,
        "EVEN_N": all((stop - start) % tile.n == 0 for start, stop, _ in blocks),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "PRECISION": precision(x.dtype),
    }
    return Launch(tall_kernel, (splits * chunks,), arguments, tile.warps, tile.stages)


def _dx(dy: Tensor, weight: Tensor, dx: Tensor, g: Tensor, right: Tensor, tile: Tile) -> Launch:
    (M, K), N, width = dx.shape, weight.shape[0], g.shape[1]
    step = gcd(RANK_STEP, width)
    tensors: dict[str, Any] = {"dy": dy, "w": weight, "dx": dx}
    tensors |= {"g": g, "right": right} if width else {"g": dy, "right": weight}
    if tile.descriptor:
        blocks = {"dy": (tile.m, tile.k), "w": (tile.k, tile.n), "dx": (tile.m, tile.n)}
        blocks |= {"g": (tile.m, step), "right": (tile.n, step)}
        tensors = {name: descriptor(t, blocks[name]) for name, t in tensors.items()}
    arguments = tensors | {
        "M": M,
        "stride_dym": row_stride(dy),
        "stride_wn": row_stride(weight),
        "stride_dxm": row_stride(dx),
        "N": N,
        "K": K,
        "WIDTH": width,
        "STEP": step,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "DESCRIPTOR": tile.descriptor,
        "PRECISION": precision(dy.dtype),
    }
    grid = (triton.cdiv(M, tile.m) * triton.cdiv(K, tile.n),)
    return Launch(dx_kernel, grid, arguments, tile.warps, tile.stages)


def _contraction(grads: Grads, space: Workspace, factors: Sequence[KronFactors], plan: Layout, scale: float) -> Launch:
    starts = {adapter: start for start, _, adapter in plan.blocks}
    splits = max(len(space.d_left), len(space.d_right))
    at_once = min(triton.next_power_of_2(splits), CONTRACT_NUMBERS // (CONTRACT_ROWS * plan.columns))
    arguments = {
        "d_left": space.d_left,
        "d_right": space.d_right,
        "sums": space.sums,
        "a": tuple(f.a for f in factors),
        "b": tuple(f.b for f in factors),
        "u": tuple(f.u for f in factors),
        "v": tuple(f.v for f in factors),
        "da": tuple(group[0] for group in grads.factors),
        "db": tuple(group[1] for group in grads.factors),
        "du": tuple(group[2] for group in grads.factors),
        "dv": tuple(group[3] for group in grads.factors),
        "d_shift": tuple(grads.shifts) or tuple(f.a for f in factors),
        "scale": scale,
        "left_splits": len(space.d_left),
        "right_splits": len(space.d_right),
        "N": space.d_left.shape[1],
        "K": space.d_right.shape[1],
        "STARTS": tuple(starts[i] for i in range(len(factors))),
        "SHAPES": plan.shapes,
        "COLUMNS": plan.columns,
        "ROWS": CONTRACT_ROWS,
        "AT_ONCE": max(1, at_once),
        "HAS_SHIFTS": bool(grads.shifts),
        "SHIFT_ROWS": SHIFT_ROWS,
    }
    tasks = sum(2 * side + p + q for side, p, q, _, _ in plan.shapes)
    tasks += sum(triton.cdiv(len(shift), SHIFT_ROWS) for shift in grads.shifts)
    return Launch(contract_kernel, (tasks,), arguments, 8, 1)
