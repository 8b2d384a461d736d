"""The gradients of the fused layer: dx, and da, db, du, dv of every adapter, without a dense dW.

With the tall factors L (rows, R) and R (K, R) of a segment, h = x R kept by the forward, and dy_seg the segment's
columns of dy::

    g  = s · dy_seg L           (M, R)         dx = dy W + Σ g Rᵀ       (M, K)
    dL = s · dy_segᵀ h          (rows, R)      dR = xᵀ g                (K, R)
    da_t[j] = Σ_kρ dL[j·P + k, tρ] u_t[k, ρ]   du_t[k, ρ] = Σ_j dL[j·P + k, tρ] a_t[j]      and db, dv from dR alike

The launches:

    compose    L and R, as in the forward
    left       g and dL in one pass over dy_seg, where a segment is short enough for one program's registers; else
               `project` makes g and `tall` makes dL, and dy_seg is read twice
    tall       dR in one pass over x, for all adapters at once
    contract   dL and dR to da, db, du, dv
    dx         the frozen layer's product plus one product with all columns of g and R

Extra work over the frozen layer's backward for one segment: 2·M·R·(rows + K) multiply-adds, where a dense dW takes
M·rows·K. Extra bytes: one read (or two) of dy_seg, one of x, and g and h, M·R numbers each.

dL and dR are sums over M. Each of `splits` runs of rows gives its own partial sum in fp32 and `contract` adds them in a
fixed order: no atomics, the same bits every time. s multiplies fp32 sums, never a 16-bit factor, so a large s cannot
overflow fp16 before g itself does.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadapt_kernels.blocks import (
    Launch,
    Layout,
    columns,
    descriptor,
    dot,
    layout,
    load_tile,
    locate,
    precision,
    row_stride,
)
from kadapt_kernels.factors import KronFactors, Rows
from kadapt_kernels.forward import compose_launch
from kadapt_kernels.tiles import RANK_STEP, BackwardTiles, Tile, aligned, backward_tiles

CONTRACT_ROWS = 32
CONTRACT_NUMBERS = 16384  # partials that one program of `contract` has under way at most: 64 registers a thread


@triton.jit
def left_kernel(
    dy,
    h,
    g,
    partial,
    a,
    u,
    scale,
    M,
    span,
    stride_dym,
    N,
    BLOCKS: tl.constexpr,
    SHAPES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g, and partial (splits, N, R) of dy_segᵀ h: program = (run of `span` rows, adapter), BLOCK_N covers a segment.

    The segment's columns are cut in SLICES of C, one a warp, and both products are batched over the slices: dy
    (slices, m, C) · L (slices, C, R), summed over the slices, and hᵀ (R, m) · dy. As plain products every warp would
    read the whole dy tile, and one product on wgmma beside one on mma.sync would be wrong: the compiler gives their
    common operand the single buffer that mma.sync needs, and refills it while wgmma may still read.
    L is composed once, before the loop. BLOCKS are the adapted ones only.
    """
    G: tl.constexpr = len(SHAPES)
    C: tl.constexpr = BLOCK_N // SLICES
    split = tl.program_id(0) // G
    n0, start, stop, adapter = locate(tl.program_id(0) % G, BLOCK_N, BLOCKS, ALIGNMENT)
    length = tl.multiple_of(stop - start, ALIGNMENT)
    left = tl.zeros((COLUMNS, BLOCK_N), tl.float32)
    for i in tl.static_range(G):
        if adapter == i:
            left = columns(
                a[i], u[i], 1.0, tl.arange(0, BLOCK_N), SHAPES[i][0], SHAPES[i][1], SHAPES[i][3], SHAPES[i][4], COLUMNS
            )
    left = tl.reshape(left.to(dy.dtype.element_ty).T, (SLICES, C, COLUMNS))
    m = tl.arange(0, BLOCK_M)[None, :, None]
    n = (tl.arange(0, SLICES) * C)[:, None, None] + tl.arange(0, C)[None, None, :]
    row0 = split * span
    rows = dy + row0.to(tl.int64) * stride_dym + n0
    acc = tl.zeros((SLICES, COLUMNS, C), tl.float32)
    for m0 in range(row0, tl.minimum(M, row0 + span), BLOCK_M):
        inside = m0 + m < M
        if not EVEN_N:
            inside = inside & (n < length)
        dy_tile = tl.load(rows + (m * stride_dym + n), mask=inside, other=0.0)
        h_tile = load_tile(h, m0, adapter * COLUMNS, G * COLUMNS, M, G * COLUMNS, BLOCK_M, COLUMNS, False, True, False)
        g_tile = dot(dy_tile, left, tl.zeros((SLICES, BLOCK_M, COLUMNS), tl.float32), PRECISION)
        acc = dot(tl.broadcast_to(h_tile.T[None, :, :], (SLICES, COLUMNS, BLOCK_M)), dy_tile, acc, PRECISION)
        _store_g(g, tl.sum(g_tile, 0), scale, m0, adapter, M, G, BLOCK_M, COLUMNS)
        rows += BLOCK_M * stride_dym
    acc = tl.reshape(tl.permute(acc, (0, 2, 1)), (BLOCK_N, COLUMNS))
    _store_partial(partial, acc, split, n0, stop, N, COLUMNS, BLOCK_N, COLUMNS)


@triton.jit
def project_kernel(
    dy,
    left,
    g,
    scale,
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
    """g from left (N, R): program = (row block, adapter)."""
    G: tl.constexpr = len(BLOCKS)
    m0 = (tl.program_id(0) // G) * BLOCK_M
    start, _, stop, adapter = locate(tl.program_id(0) % G, LONGEST, BLOCKS, ALIGNMENT)
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for n0 in range(start, stop, BLOCK_K):
        dy_tile = load_tile(dy, m0, n0, stride_dym, M, stop, BLOCK_M, BLOCK_K, False, EVEN_N, False)
        left_tile = load_tile(left, n0, 0, COLUMNS, stop, COLUMNS, BLOCK_K, COLUMNS, EVEN_N, True, False)
        acc = dot(dy_tile, left_tile, acc, PRECISION)
    _store_g(g, acc, scale, m0, adapter, M, G, BLOCK_M, COLUMNS)


@triton.jit
def tall_kernel(
    x,
    z,
    partial,
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
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (splits, D, WIDTH) of x_blockᵀ z_block: program = (run of `span` rows, BLOCK_N columns of x).

    Block i of BLOCKS are columns of x (M, D) and meet the WIDTH columns from adapter·WIDTH of z. COLUMNS is WIDTH as a
    power of two. For dR there is one block, all of x, and all of g: x is read once whatever the number of adapters.
    """
    split = tl.program_id(0) // CHUNKS
    n0, _, stop, adapter = locate(tl.program_id(0) % CHUNKS, BLOCK_N, BLOCKS, ALIGNMENT)
    first = adapter * WIDTH
    acc = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    for m0 in range(split * span, tl.minimum(M, (split + 1) * span), BLOCK_M):
        x_tile = load_tile(x, m0, n0, stride_xm, M, stop, BLOCK_M, BLOCK_N, False, EVEN_N, False)
        z_tile = load_tile(z, m0, first, stride_zm, M, first + WIDTH, BLOCK_M, COLUMNS, False, COLUMNS == WIDTH, False)
        acc = dot(x_tile.T, z_tile, acc, PRECISION)
    _store_partial(partial, acc, split, n0, stop, D, WIDTH, BLOCK_N, COLUMNS)


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
    a,
    b,
    u,
    v,
    da,
    db,
    du,
    dv,
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
):
    """Each adapter has S + P programs for da and du, then S + Q for db and dv; one makes one j of a or one k of u."""
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


@triton.jit
def _store_g(g, tile, scale, m0, adapter, M, G: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    m = m0 + tl.arange(0, BLOCK_M)
    at = g + m[:, None].to(tl.int64) * (G * COLUMNS) + adapter * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, (scale * tile).to(g.dtype.element_ty), mask=(m < M)[:, None])


@triton.jit
def _store_partial(
    partial, tile, split, n0, stop, D, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr
):
    n = n0 + tl.arange(0, BLOCK_N)
    i = tl.arange(0, COLUMNS)
    at = partial + (split.to(tl.int64) * D + n)[:, None] * WIDTH + i[None, :]
    tl.store(at, tile, mask=(n < stop)[:, None] & (i < WIDTH)[None, :])


class Workspace(NamedTuple):
    """What the launches hand to each other.

    Attributes:
        g: (M, G·R) in the compute dtype.
        right: (K, G·R), R of all adapters side by side, in the compute dtype.
        left: (N, R), L on the adapted rows, likewise.
        d_left: (splits, N, R) partial sums of dL, unscaled; rows of frozen blocks are neither written nor read.
        d_right: (splits, K, G·R) partial sums of dR.
    """

    g: Tensor
    right: Tensor
    left: Tensor
    d_left: Tensor
    d_right: Tensor


Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def fused_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    *,
    need_dx: bool = True,
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx (M, K) in the dtype of x, or None, and [da0, db0, du0, dv0, da1, …] in fp32 and the factors' shapes.

    dy (M, N), x (M, K) and weight (N, K) have unit column stride and any row stride above zero: an expanded dy is made
    contiguous by the caller. h (M, G·R) is the forward's. M = 0 gives zeros.
    """
    plan = layout(factors, segments, weight.shape[0])
    tiles = tiles or backward_tiles(x.device, x.dtype, len(x), x.shape[1], plan, aligned(dy, weight))
    dx = x.new_empty(x.shape) if need_dx else None
    grads: list[Grads] = [tuple(torch.empty_like(t) for t in f) for f in factors]  # type: ignore[arg-type, misc]
    space = workspace(x, weight.shape[0], plan, tiles)
    for launch in backward_launches(dy, x, weight, h, dx, grads, space, factors, plan, scale, tiles):
        launch.run()
    return dx, [grad for group in grads for grad in group]


def workspace(x: Tensor, rows: int, plan: Layout, tiles: BackwardTiles) -> Workspace:
    """Uninitialised; x (M, K), of a weight with that many rows. Also works on the meta device."""
    (M, K), width = x.shape, len(plan.shapes) * plan.columns
    left_splits, right_splits = _splits(K, plan, tiles)
    return Workspace(
        x.new_empty(M, width),
        x.new_empty(K, width),
        x.new_empty(rows, plan.columns),
        x.new_empty(left_splits, rows, plan.columns, dtype=torch.float32),
        x.new_empty(right_splits, K, width, dtype=torch.float32),
    )


def backward_launches(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    dx: Tensor | None,
    grads: Sequence[Grads],
    space: Workspace,
    factors: Sequence[KronFactors],
    plan: Layout,
    scale: float,
    tiles: BackwardTiles,
) -> list[Launch]:
    """The launches that fill dx (unless None), the grads of each adapter and the workspace."""
    launches = []
    if factors:
        one_pass = tiles.left is not None
        launches.append(compose_launch(space.right, space.left, factors, plan, 1.0))
        launches += (_left if one_pass else _project_and_tall)(dy, h, space, factors, plan, scale, tiles)
        whole = ((0, x.shape[1], 0),)
        launches.append(_tall(x, space.g, space.d_right, whole, gcd(16, x.shape[1]), tiles.tall))
        launches.append(_contraction(grads, space, factors, plan, scale))
    if dx is not None and dx.numel():
        launches.append(_dx(dy, weight, dx, space, tiles.dx))
    return launches


def _adapted(plan: Layout) -> tuple[tuple[int, int, int], ...]:
    return tuple(block for block in plan.blocks if block[2] >= 0)


def _splits(K: int, plan: Layout, tiles: BackwardTiles) -> tuple[int, int]:
    """Runs of rows for dL, and for dR: as many programs in all, since its columns of x are cut besides."""
    chunks = [triton.cdiv(stop - start, tiles.tall.n) for start, stop, _ in _adapted(plan)]
    programs = tiles.splits * (len(chunks) if tiles.left else sum(chunks))
    return tiles.splits, triton.cdiv(programs, triton.cdiv(K, tiles.tall.n))


def _span(M: int, splits: int, block: int) -> int:
    """Rows of a run: whole blocks, so that no tile reaches into the next run."""
    return int(triton.cdiv(triton.cdiv(M, block), splits)) * block


def _left(
    dy: Tensor,
    h: Tensor,
    space: Workspace,
    factors: Sequence[KronFactors],
    plan: Layout,
    scale: float,
    tiles: BackwardTiles,
) -> list[Launch]:
    tile, blocks = tiles.left, _adapted(plan)
    assert tile is not None
    block_n = max(16 * tile.warps, triton.next_power_of_2(max(stop - start for start, stop, _ in blocks)))
    arguments = {
        "dy": dy,
        "h": h,
        "g": space.g,
        "partial": space.d_left,
        "a": tuple(f.a for f in factors),
        "u": tuple(f.u for f in factors),
        "scale": scale,
        "M": len(dy),
        "span": _span(len(dy), len(space.d_left), tile.m),
        "stride_dym": row_stride(dy),
        "N": dy.shape[1],
        "BLOCKS": blocks,
        "SHAPES": plan.shapes,
        "COLUMNS": plan.columns,
        "ALIGNMENT": plan.alignment,
        "EVEN_N": all(stop - start == block_n for start, stop, _ in blocks),
        "BLOCK_M": tile.m,
        "BLOCK_N": block_n,
        "SLICES": tile.warps,
        "PRECISION": precision(dy.dtype),
    }
    return [Launch(left_kernel, (len(space.d_left) * len(blocks),), arguments, tile.warps, tile.stages)]


def _project_and_tall(
    dy: Tensor,
    h: Tensor,
    space: Workspace,
    factors: Sequence[KronFactors],
    plan: Layout,
    scale: float,
    tiles: BackwardTiles,
) -> list[Launch]:
    tile, blocks = tiles.project, _adapted(plan)
    project = {
        "dy": dy,
        "left": space.left,
        "g": space.g,
        "scale": scale,
        "M": len(dy),
        "stride_dym": row_stride(dy),
        "BLOCKS": blocks,
        "COLUMNS": plan.columns,
        "ALIGNMENT": plan.alignment,
        "LONGEST": max(stop - start for start, stop, _ in blocks),
        "EVEN_N": all((stop - start) % tile.k == 0 for start, stop, _ in blocks),
        "BLOCK_M": tile.m,
        "BLOCK_K": tile.k,
        "PRECISION": precision(dy.dtype),
    }
    return [
        Launch(project_kernel, (triton.cdiv(len(dy), tile.m) * len(blocks),), project, tile.warps, tile.stages),
        _tall(dy, h, space.d_left, blocks, plan.alignment, tiles.tall),
    ]


def _tall(
    x: Tensor, z: Tensor, partial: Tensor, blocks: tuple[tuple[int, int, int], ...], alignment: int, tile: Tile
) -> Launch:
    splits, D, width = partial.shape
    chunks = sum(triton.cdiv(stop - start, tile.n) for start, stop, _ in blocks)
    arguments = {
        "x": x,
        "z": z,
        "partial": partial,
        "M": len(x),
        "span": _span(len(x), splits, tile.m),
        "stride_xm": row_stride(x),
        "stride_zm": z.shape[1],
        "D": D,
        "BLOCKS": blocks,
        "CHUNKS": chunks,
        "ALIGNMENT": alignment,
        "WIDTH": width,
        "COLUMNS": triton.next_power_of_2(width),
        "EVEN_N": all((stop - start) % tile.n == 0 for start, stop, _ in blocks),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "PRECISION": precision(x.dtype),
    }
    return Launch(tall_kernel, (splits * chunks,), arguments, tile.warps, tile.stages)


def _dx(dy: Tensor, weight: Tensor, dx: Tensor, space: Workspace, tile: Tile) -> Launch:
    (M, K), N, width = dx.shape, weight.shape[0], space.g.shape[1]
    step = gcd(RANK_STEP, width)
    tensors: dict[str, Any] = {"dy": dy, "w": weight, "dx": dx}
    tensors |= {"g": space.g, "right": space.right} if width else {"g": dy, "right": weight}
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


def _contraction(
    grads: Sequence[Grads], space: Workspace, factors: Sequence[KronFactors], plan: Layout, scale: float
) -> Launch:
    starts = {adapter: start for start, _, adapter in _adapted(plan)}
    splits = max(len(space.d_left), len(space.d_right))
    at_once = min(triton.next_power_of_2(splits), CONTRACT_NUMBERS // (CONTRACT_ROWS * plan.columns))
    arguments = {
        "d_left": space.d_left,
        "d_right": space.d_right,
        "a": tuple(f.a for f in factors),
        "b": tuple(f.b for f in factors),
        "u": tuple(f.u for f in factors),
        "v": tuple(f.v for f in factors),
        "da": tuple(group[0] for group in grads),
        "db": tuple(group[1] for group in grads),
        "du": tuple(group[2] for group in grads),
        "dv": tuple(group[3] for group in grads),
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
    }
    tasks = sum(2 * side + p + q for side, p, q, _, _ in plan.shapes)
    return Launch(contract_kernel, (tasks,), arguments, 8, 1)
