"""y = x H along the last axis in ⌈log2 L / 7⌉ launches, in place: `hadamard` on a GPU.

A launch multiplies one side of x with a small Hadamard matrix, y[o, :, i] = H_n x[o, :, i] for x seen as (outer, n,
inner), n of 16 to 128. A program owns BLOCK_C of the outer · inner columns, neighbours in memory as far as inner goes
(for inner = 1 a column is): it reads them BLOCK_K rows at a time, multiplies with as many columns of H_n, whose signs
it makes from the parity of popcount(i & k), and writes the result where they came from.

Products are IEEE fp32, so none are made by tensor cores: TF32 would round x.

Cost of a launch for D numbers: D·n multiply-adds, 8·D bytes. Predicted, not measured, for D = 2.36 M on an H200 (4.8
TB/s, 67 TFLOP/s in fp32): 18.9 MB take 3.9 µs; 0.15 GFLOP (n = 32) to 0.60 GFLOP (n = 128) take 2 to 9 µs at the peak,
of which such a product reaches perhaps a third; so about 15 µs for L = 1024 (twice 32) and 80 µs for L = 2^21 (three
times 128).
"""

import triton
import triton.language as tl
from torch import Tensor

from kadapt_kernels.blocks import Launch
from kadapt_kernels.hadamard import sides
from kadapt_kernels.tiles import Tile

SIDE = 128


@triton.jit
def _sign(i, j):
    """H[i, j] in fp32 for i, j < 256: popcount's parity by folding the bits onto the lowest."""
    bits = i & j
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit
def hadamard_kernel(x, count, N: tl.constexpr, INNER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """x (outer, N, INNER) becomes H_N x along the middle; program = BLOCK_C of its `count` columns."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (x + (c // INNER * (N * INNER) + c % INNER))[None, :]
    inside = (c < count)[None, :]
    i = tl.arange(0, N)[:, None]

    acc = tl.zeros((N, BLOCK_C), tl.float32)
    for k0 in range(0, N, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        tile = tl.load(column + k[:, None] * INNER, mask=inside, other=0.0)
        acc = tl.dot(_sign(i, k[None, :]), tile, acc, input_precision="ieee")

    tl.debug_barrier()  # all of the tile is read, by every warp that needs it, before any of it is written over
    tl.store(column + i * INNER, acc, mask=inside)


def hadamard_launches(rows: Tensor) -> list[Launch]:
    """The launches that transform rows (M, L) in place, one a side; fp32 and contiguous, L ≥ 16."""
    launches, inner = [], rows.shape[1]
    for n in sides(rows.shape[1], SIDE):
        inner //= n
        tile = hadamard_tile(n)
        count = rows.numel() // n
        arguments = {
            "x": rows,
            "count": count,
            "N": n,
            "INNER": inner,
            "BLOCK_C": tile.n,
            "BLOCK_K": tile.k,
        }
        launches.append(Launch(hadamard_kernel, (triton.cdiv(count, tile.n),), arguments, tile.warps, tile.stages))
    return launches


def hadamard_tile(n: int) -> Tile:
    """n by 64 columns, or as many as make 4096 numbers, contracted 16 at a time, by 8 warps: none spills (`aot`)."""
    return Tile(n, max(64, 4096 // n), 16, 8, 2)
