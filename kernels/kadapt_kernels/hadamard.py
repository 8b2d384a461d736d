"""y = x H along the last axis: the fast Walsh-Hadamard transform, and its PyTorch path.

H is the Sylvester-Hadamard matrix of order L = 2^b, H[i, j] = (-1)^popcount(i & j), unnormalised: H = Hᵀ, H H = L·1. It
is a Kronecker product of smaller ones, so with x seen as a box of sides n_1 · n_2 · … = L one product with a small
matrix along each side makes the whole::

    H_L = H_{n_1} ⊗ H_{n_2} ⊗ …        y[o, :, i] = H_n x[o, :, i]   for x seen as (outer, n, inner), n = n_1, n_2, …

The gradient of x is dy H: the same transform. Its use is the random projection of Le, Sarlós and Smola ("Fastfood —
Approximating Kernel Expansions in Loglinear Time", ICML 2013), where H between random signs, a permutation and Gaussian
numbers stands for a dense Gaussian matrix; the transform itself is classical.

The PyTorch path takes sides of up to `SIDE`, or one of up to `ONLY_SIDE` where that is all of L, and for a chunk of at
most `CHUNK` numbers all sides before the next chunk, so that a chunk stays in the cache: D·Σ n multiply-adds for D
numbers, each read from memory and written once (twice for L > CHUNK). Temporary memory is at most 2 · CHUNK numbers (2
MiB in fp32) however large x, and never more than an eighth of x or one row. On one core of an EPYC 2.36 M numbers in
fp32 take about 6 ms for L of 64 to 2^16 and 9 ms for 2^21. A loop of butterflies (a sum and a difference of strided
views for each of the log2 L bits, D·log2 L additions in all) takes 3 to 6 times as long, and sides of up to 64 or 128
up to twice as long. The GPU's path is in `hadamard_kernel`, with its cost.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kadapt_kernels.ops import why_no_triton

HADAMARD_BACKENDS = ("auto", "torch", "triton")
CHUNK = 2**18
SIDE, ONLY_SIDE = 32, 64
LEAST_TRITON = 16  # the least length that a dot contracts


def hadamard(x: Tensor, backend: str = "auto") -> Tensor:
    """x H along the last axis, not normalised; differentiable, to any order.

    Args:
        x: (..., L), L a power of two, fp32 or fp64; any strides. It is not changed.
        backend: How it is computed: "torch" takes everything; "triton", the kernel of `hadamard_kernel`, takes fp32 on
            CUDA with L ≥ 16; "auto" is "triton" for what that takes and "torch" for the rest.

    Returns:
        (..., L), contiguous, in the dtype of x, under autocast too. Products of "torch" follow PyTorch's setting for
        TF32 on CUDA, those of "triton" are IEEE fp32.

    Raises:
        ValueError: L is no power of two; an unknown backend; an L that the named backend does not take.
        TypeError: Another dtype.
        RuntimeError: A backend asked for by name that cannot run here; says why.

    Cost: as the module says, and a copy of x.
    """
    y: Tensor = _Hadamard.apply(x, backend)
    return y


def hadamard_(x: Tensor, backend: str = "auto") -> Tensor:
    """`hadamard` in place; without autograd, in temporary memory of at most 2 · CHUNK numbers.

    Args:
        x: As for `hadamard`, but contiguous. Holds x H afterwards.
        backend: As for `hadamard`.

    Returns:
        x.

    Raises:
        As `hadamard`; also ValueError when x is not contiguous, RuntimeError when autograd would have to record it.
    """
    path = _choose(x, backend, "hadamard_")
    if not x.is_contiguous():
        raise ValueError(
            f"hadamard_: x must be contiguous, but shape {tuple(x.shape)} with strides {x.stride()} was given; "
            "use hadamard"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("hadamard_: x must need no gradient, but requires_grad is set; use hadamard or no_grad")
    rows = x.detach().view(-1, x.shape[-1])
    if path == "triton":
        from kadapt_kernels.hadamard_kernel import hadamard_launches

        with torch.cuda.device_of(x):
            for launch in hadamard_launches(rows):
                launch.run()
    else:
        _by_products(rows)
    return x


class _Hadamard(torch.autograd.Function):
    """H is symmetric, so the backward is the transform again, and so is the backward of that."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, backend: str) -> Tensor:
        _choose(x, backend, "hadamard")
        ctx.backend = backend  # type: ignore[attr-defined]
        return hadamard_(x.clone(memory_format=torch.contiguous_format), backend)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return hadamard(dy, ctx.backend), None  # type: ignore[attr-defined]


def _choose(x: Tensor, backend: str, where: str) -> str:
    """The backend that x (..., L) takes: "torch" or "triton". Errors as `hadamard`; `where` begins the message."""
    if backend not in HADAMARD_BACKENDS:
        known = ", ".join(HADAMARD_BACKENDS)
        raise ValueError(f"{where}: backend must be one of {known}, but {backend!r} was given")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: x must be fp32 or fp64, but {x.dtype} was given; x.float() has room for the sums")
    length = x.shape[-1] if x.dim() else 0
    if length < 1 or length & (length - 1):
        raise ValueError(f"{where}: the last axis of x must be a power of two long, but x is {tuple(x.shape)}; pad it")
    if backend == "triton":
        if length < LEAST_TRITON:
            raise ValueError(
                f"{where}: backend 'triton' takes L ≥ {LEAST_TRITON}, but x is {tuple(x.shape)}; use backend='auto'"
            )
        missing = _why_no_triton(x)
        if missing:
            raise RuntimeError(f"{where}: backend 'triton' cannot run: {missing}; use backend='auto'")
        return backend
    if backend == "auto" and x.is_cuda and length >= LEAST_TRITON and not _why_no_triton(x):
        return "triton"
    return "torch"


def _why_no_triton(x: Tensor) -> str:
    if x.dtype != torch.float32:
        return f"its kernel is for fp32, but x is {x.dtype}"
    return why_no_triton(x)


def _by_products(rows: Tensor) -> None:
    """The transform of each row (M, L) in place, for contiguous rows."""
    if rows.shape[1] > CHUNK:
        _high_sides(rows)
        rows = rows.view(-1, CHUNK)
    length = rows.shape[1]
    together = max(1, min(CHUNK, rows.numel() // 8) // length)
    spare = rows.new_empty(min(rows.numel(), together * length))
    for part in rows.split(together):
        x = part.view(-1, length, 1)
        found = _along(x, spare[: part.numel()].view(x.shape))
        if found is not x:
            x.copy_(found)


def _high_sides(rows: Tensor) -> None:
    """H_{L / CHUNK} ⊗ 1 on each row (M, L), L > CHUNK, in place: the columns of a row seen as (L / CHUNK, CHUNK).

    They are copied together, as many as a chunk holds, since products are slow with numbers that lie far apart.
    """
    high = rows.shape[1] // CHUNK
    block, spare = rows.new_empty(2, 1, high, max(1, CHUNK // high))
    for row in rows.view(-1, 1, high, CHUNK):
        for columns in row.split(block.shape[2], dim=2):
            columns.copy_(_along(block.copy_(columns), spare))


def _along(x: Tensor, spare: Tensor) -> Tensor:
    """The transform of x (outer, L, inner) along the middle: in x or in spare, whichever the last side writes."""
    _, length, step = x.shape
    step *= length
    for n in sides(length, ONLY_SIDE if length <= ONLY_SIDE else SIDE):
        h, step = _matrix(n, x.dtype, x.device), step // n
        if step == 1:
            torch.mm(x.view(-1, n), h, out=spare.view(-1, n))
        else:
            boxes = x.view(-1, n, step)
            torch.bmm(h.expand(len(boxes), n, n), boxes, out=spare.view(-1, n, step))
        x, spare = spare, x
    return x


def sides(length: int, most: int) -> list[int]:
    """The fewest powers of two of up to `most` with that product, as equal as they can be, the smaller first."""
    bits = length.bit_length() - 1
    count = -(-bits // (most.bit_length() - 1))
    return [2 ** ((bits + i) // count) for i in range(count)]


@lru_cache(maxsize=32)
def _matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H_order; few and small, so they are kept."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h
