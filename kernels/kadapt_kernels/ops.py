"""The public operations: check, pick a path, run it as one operator that autograd and torch.compile know."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kadapt_kernels import reference
from kadapt_kernels.factors import KronFactors, Rows, check_factors, kron_delta

BACKENDS = ("auto", "eager", "merge", "triton")
FUSED_RANK = 64


def kron_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[KronFactors],
    *,
    segments: Sequence[Rows],
    scale: float = 1.0,
    shifts: Sequence[Tensor | None] = (),
    backend: str = "auto",
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """A frozen linear layer with Kronecker updates on some of its row blocks.

    y = x Wᵀ + bias, and for each segment i: y[..., start:stop] += s · x ΔW_iᵀ + shift_i, ΔW_i = Σ_t A_t ⊗ (u_t v_tᵀ).

    Args:
        x: (..., K), any leading shape, M = 0 rows included, any row stride.
        weight: (N, K), the dtype of x; frozen, it gets no gradient.
        bias: (N,) or None; gets a gradient when it requires one.
        factors: One `KronFactors` a segment, of any sizes: all with factored A_t or all with full A_t. fp32, also
            beside 16-bit x; fp64 beside fp64. Their gradients have their dtype.
        segments: Rows [start, stop) of `weight` that factors[i] updates; disjoint. Rows in none stay frozen.
        scale: s.
        shifts: A (rows,) tensor or None a segment, in the factors' dtype: a trained bias, whose gradient reads the
            segments' columns of dy alone, where that of `bias` reads all.
        backend: How it is computed, see below.
        dropout: Share of the elements of ΔW that are zero in this call, the others divided by 1 - dropout, as in the
            authors' code; "merge" only.
        seed: Of the dropped elements: equal seeds drop equal elements on one device.

    Under autocast, x, weight and bias are cast to its dtype and the factors are not; a weight kept in that dtype saves
    the cast.

    | backend | what runs | takes |
    |---|---|---|
    | "eager" | two thin products beside the frozen one, in PyTorch | factored A_t |
    | "triton" | the fused kernels of `forward` and `backward` | factored A_t, T·r ≤ 64, CUDA |
    | "merge" | W' = W + s·ΔW composed in fp32 and rounded once to the dtype of x, then one product | everything |

    "auto" takes

    | device and dtype | T·r ≤ 64, no dropout | T·r > 64 | full A_t, or dropout |
    |---|---|---|---|
    | CUDA, 16 bits | triton | merge | merge |
    | CUDA, fp32 | merge | merge | merge |
    | CPU, fp32 and fp64 | merge for more than K·rows/(K + rows) rows of x, else eager | the same | merge |
    | CPU, 16 bits; other devices | eager | eager | merge |

    In 16 bits "merge" loses what the rounding of W' hides: about 17 % of a ΔW of 1 % of W. The others keep ΔW apart.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ValueError: Shapes or segments do not fit; an unknown backend; factors that the named backend does not take.
        TypeError: Dtypes that do not go together.
        RuntimeError: A backend asked for by name that cannot run here; says why.

    Cost over the frozen layer, factored, R = T·r: M·R·(K + rows) multiply-adds a segment forward, twice that
    backward; saved for the backward are x and h, M·(K + R) numbers, and on "triton" L and R, R·(K + rows). Merged:
    R·rows·K multiply-adds each way, and for the gradients the lesser of 2·M·R·(K + rows) and M·rows·K; x is saved.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check(x, weight, bias, factors, segments, "kron_linear")
    moved = _shifts(shifts, factors, segments)
    rows = x.reshape(-1, x.shape[-1])
    path = choose(rows, factors, segments, backend, dropout)
    flat = [tensor for group in factors for tensor in group if tensor is not None]
    bounds = [row for segment in segments for row in segment]
    rest = (bounds, factors[0].b is None, scale, path, dropout, seed)
    with torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling():
            y = _linear(rows, weight, bias, flat, moved, *rest)[0]
        else:
            y = _Direct.apply(rows, weight, bias, len(flat), rest, *flat, *moved)
    result: Tensor = y.view(*x.shape[:-1], weight.shape[0])
    return result


def kron_merge(
    weight: Tensor, factors: Sequence[KronFactors], *, segments: Sequence[Rows], scale: float = 1.0
) -> Tensor:
    """A copy of `weight` (N, K) with s·ΔW_i added to the rows of segment i; summed in float64, rounded once.

    Args and errors as `kron_linear`, but factors of any float dtype. Costs T·rows·K multiply-adds a segment, once,
    after training.
    """
    check(weight, weight, None, factors, segments, "kron_merge", any_float=True)
    merged = weight.to(torch.float64, copy=True)
    for (start, stop), group in zip(segments, factors, strict=True):
        wide = KronFactors(*(None if t is None else t.double() for t in group))  # type: ignore[arg-type]
        merged[start:stop] += kron_delta(wide, scale)
    return merged.to(weight.dtype)


def choose(
    x: Tensor, factors: Sequence[KronFactors], segments: Sequence[Rows], backend: str = "auto", dropout: float = 0.0
) -> str:
    """The backend that `kron_linear` takes for x (M, K): "eager", "merge" or "triton". Errors as there."""
    if backend not in BACKENDS:
        raise ValueError(f"kron_linear: backend must be one of {', '.join(BACKENDS)}, but {backend!r} was given")
    if not 0 <= dropout < 1:
        raise ValueError(f"kron_linear: dropout must be in [0, 1), but {dropout} was given")
    rank = max(group.u.shape[0] * group.u.shape[2] for group in factors)
    only_merge = "full A_t" if factors[0].b is None else f"dropout = {dropout}" if dropout else ""
    if backend == "triton":
        too_much = only_merge or (f"T·r = {rank}" if rank > FUSED_RANK else "")
        if too_much:
            raise ValueError(
                f"kron_linear: backend 'triton' takes factored A_t, T·r up to {FUSED_RANK} and no dropout, but "
                f"{too_much} was given; use backend='merge' or 'auto'"
            )
        missing = why_no_triton(x)
        if missing:
            raise RuntimeError(f"kron_linear: backend 'triton' cannot run: {missing}; use backend='auto'")
        return backend
    if backend == "eager" and only_merge:
        raise ValueError(f"kron_linear: {only_merge} has no factored form; use backend='merge' or 'auto'")
    if backend != "auto":
        return backend
    if only_merge:
        return "merge"
    if x.is_cuda:
        fused = x.element_size() == 2 and rank <= FUSED_RANK and not why_no_triton(x)
        return "triton" if fused else "merge"
    if x.device.type == "cpu" and x.element_size() > 2:
        wide, width = x.shape[1], min(stop - start for start, stop in segments)
        return "merge" if x.shape[0] * (wide + width) > wide * width else "eager"
    return "eager"


def why_no_triton(x: Tensor) -> str:
    """Why the Triton kernels cannot take x, or nothing if they can."""
    try:
        from kadapt_kernels.blocks import INTERPRETED
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels are for bf16, fp16 and fp32, but x is {x.dtype}"
    if INTERPRETED.value:
        return ""
    if not x.is_cuda:
        return f"it needs a GPU, but the device is {x.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(x.device)
        return f"it needs compute capability 8.0 or later, but {x.device} has {major}.{minor}"
    return ""


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    flat: list[Tensor],
    shifts: list[Tensor],
    bounds: list[int],
    full: bool,
    scale: float,
    path: str,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (M, N), and what the backward of the path keeps: h, R and s L, or h, or nothing."""
    factors, segments = _groups(flat, full), _segments(bounds)
    with torch.cuda.device_of(x):
        if path == "triton":
            from kadapt_kernels.forward import fused_forward

            y, kept = fused_forward(_rows(x), _rows(weight), bias, factors, segments, scale, shifts)
            return y, *kept
        bias = reference.total_bias(weight, bias, shifts, segments)
        if path == "eager":
            return *reference.factored_forward(x, weight, bias, factors, segments, scale), _nothing(x), _nothing(x)
        y = F.linear(x, _merged(weight, factors, segments, scale, dropout, seed), bias)
        return y, _nothing(x), _nothing(x), _nothing(x)


_linear = torch.library.custom_op("kadapt::kron_linear", _forward, mutates_args=())


@_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, flat: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, full, _, path, _, _ = rest
    y = x.new_empty(x.shape[0], weight.shape[0])
    if path == "merge":
        return y, _nothing(x), _nothing(x), _nothing(x)
    ranks = [group.u.shape[0] * group.u.shape[2] for group in _groups(flat, full)]
    if path == "triton":
        from kadapt_kernels.blocks import padded_rank

        columns = padded_rank(max(ranks))
        h, right = (x.new_empty(rows, len(ranks) * columns) for rows in x.shape)
        return y, h, right, x.new_empty(weight.shape[0], columns)
    return y, x.new_empty(x.shape[0], sum(ranks)), _nothing(x), _nothing(x)


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    right: Tensor,
    left: Tensor,
    flat: list[Tensor],
    shifts: list[Tensor],
    bounds: list[int],
    full: bool,
    scale: float,
    path: str,
    dropout: float,
    seed: int,
    need_dx: bool,
) -> list[Tensor]:
    """dx (empty unless needed) and the gradients of the factors and the shifts."""
    factors, segments = _groups(flat, full), _segments(bounds)
    dx: Tensor | None
    with torch.cuda.device_of(x):
        if path == "eager":
            dx, small = reference.factored_backward(dy, x, weight, h, factors, segments, scale, need_dx)
        elif path == "triton":
            from kadapt_kernels.backward import fused_backward
            from kadapt_kernels.forward import Kept

            kept, dy, x, weight = Kept(h, right, left), _rows(dy), _rows(x), _rows(weight)
            dx, small = fused_backward(dy, x, weight, kept, factors, segments, scale, shifts, need_dx=need_dx)
        else:
            dx = dy @ _merged(weight, factors, segments, scale, dropout, seed) if need_dx else None
            small = _merged_gradients(dy, x, factors, segments, scale, dropout, seed)
        if path != "triton":
            small += reference.shift_gradients(dy, shifts, segments)
    return [dy.new_empty(0) if dx is None else dx, *small]


_linear_backward = torch.library.custom_op("kadapt::kron_linear_backward", _backward, mutates_args=())


@_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, h: Tensor, right: Tensor, left: Tensor, *rest: Any) -> list[Tensor]:
    flat, shifts, *_, need_dx = rest
    dx = dy.new_empty(x.shape) if need_dx else dy.new_empty(0)
    return [dx, *(t.new_empty(t.shape) for t in (*flat, *shifts))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, flat, shifts, *ctx.rest = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, *output[1:], *flat, *shifts)
    ctx.has_bias, ctx.count = bias is not None, len(flat)


def _autograd(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, h, right, left, *small = ctx.saved_tensors
    flat, shifts = small[: ctx.count], small[ctx.count :]
    need_dx, _, need_bias, *_ = ctx.needs_input_grad
    dx, *small = _linear_backward(dy, x, weight, h, right, left, flat, shifts, *ctx.rest, need_dx)
    dbias = dy.sum(0) if ctx.has_bias and need_bias else None
    nothing = [None] * len(ctx.rest)
    return dx if need_dx else None, None, dbias, small[: ctx.count], small[ctx.count :], *nothing


_linear.register_autograd(_autograd, setup_context=_setup)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, whose bookkeeping takes longer than the arithmetic of a small layer.

    What is being compiled or exported takes the operator.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: int, rest: tuple[Any, ...], *small: Tensor
    ) -> Tensor:
        y, *kept = _forward(x, weight, bias, list(small[:count]), list(small[count:]), *rest)
        ctx.save_for_backward(x, weight, *kept, *small)
        ctx.has_bias, ctx.count, ctx.rest = bias is not None, count, rest
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (dy,) = grads
        x, weight, h, right, left, *small = ctx.saved_tensors
        need_dx, _, need_bias, *_ = ctx.needs_input_grad
        flat, shifts = small[: ctx.count], small[ctx.count :]
        rest: tuple[Any, ...] = (*ctx.rest, need_dx)
        dx, *small = _backward(dy, x, weight, h, right, left, flat, shifts, *rest)
        dbias = dy.sum(0) if ctx.has_bias and need_bias else None
        return dx if need_dx else None, None, dbias, None, None, *small


def _merged(
    weight: Tensor, factors: Sequence[KronFactors], segments: Sequence[Rows], scale: float, dropout: float, seed: int
) -> Tensor:
    if why_no_triton(weight) or not weight.is_cuda:
        return reference.merged_weight(weight, factors, segments, scale, dropout, seed)
    from kadapt_kernels.merge import merge_weight

    return merge_weight(_rows(weight), factors, segments, scale, dropout=dropout, seed=seed)


def _merged_gradients(
    dy: Tensor,
    x: Tensor,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    scale: float,
    dropout: float,
    seed: int,
) -> list[Tensor]:
    by_reference = why_no_triton(x) or not x.is_cuda
    if by_reference or (not dropout and all(g.b is not None and reference.low_rank_is_cheaper(g) for g in factors)):
        return reference.merged_gradients(dy, x, factors, segments, scale, dropout, seed)
    from kadapt_kernels.merge import dense_gradients

    dw = [reference.wide_mm(dy[:, start:stop].t(), x, torch.float32) for start, stop in segments]
    return dense_gradients(dw, factors, segments, scale, dropout=dropout, seed=seed)


def _groups(flat: Sequence[Tensor], full: bool) -> list[KronFactors]:
    """The factors again, contiguous as the kernels need them."""
    flat = [tensor.contiguous() for tensor in flat]
    if full:
        return [KronFactors(a, None, u, v) for a, u, v in zip(*[iter(flat)] * 3, strict=True)]
    return [KronFactors(*group) for group in zip(*[iter(flat)] * 4, strict=True)]


def _segments(bounds: Sequence[int]) -> list[Rows]:
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with unit column stride, which the kernels need."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[KronFactors],
    segments: Sequence[Rows],
    where: str,
    any_float: bool = False,
) -> None:
    """Raise ValueError or TypeError unless everything fits together; `where` begins the message."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{where}: x (..., K) and weight (N, K) must fit, but {tuple(x.shape)}, {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{where}: bias must have shape ({weight.shape[0]},), but {tuple(bias.shape)} was given")
    if len({t.dtype for t in (x, weight, bias) if t is not None}) > 1 or not x.is_floating_point():
        given = ", ".join(str(t.dtype) for t in (x, weight, bias) if t is not None)
        raise TypeError(f"{where}: x, weight and bias must share one float dtype, but {given} were given")
    if len(factors) != len(segments) or not factors:
        raise ValueError(f"{where}: expected one KronFactors a segment, but {len(factors)} for {len(segments)}")
    if len({group.b is None for group in factors}) > 1:
        raise ValueError(f"{where}: A_t must be factored in all segments or full in all; split the call otherwise")
    end = 0
    for i in sorted(range(len(segments)), key=lambda i: segments[i]):
        start, stop = segments[i]
        if not end <= start < stop <= weight.shape[0]:
            raise ValueError(
                f"{where}: segments must be disjoint, non-empty row ranges within 0..{weight.shape[0]}, "
                f"but {list(segments)} was given"
            )
        end = stop
        check_factors(factors[i], stop - start, weight.shape[1], f"{where}: segment {i}")
        _check_kind(factors[i], x, f"{where}: segment {i}", any_float)


def _shifts(shifts: Sequence[Tensor | None], factors: Sequence[KronFactors], segments: Sequence[Rows]) -> list[Tensor]:
    """One shift a segment, zeros where it has none; nothing if none has."""
    if all(shift is None for shift in shifts):
        return []
    if len(shifts) != len(segments):
        raise ValueError(f"kron_linear: expected one shift or None a segment, but {len(shifts)} for {len(segments)}")
    found = []
    for i, ((start, stop), shift, group) in enumerate(zip(segments, shifts, factors, strict=True)):
        shift = group.a.new_zeros(stop - start) if shift is None else shift
        if shift.shape != (stop - start,) or shift.dtype != group.a.dtype or shift.device != group.a.device:
            raise ValueError(
                f"kron_linear: shift {i} must be ({stop - start},), {group.a.dtype}, on {group.a.device} like its "
                f"factors, but {tuple(shift.shape)}, {shift.dtype}, on {shift.device} was given"
            )
        found.append(shift)
    return found


def _check_kind(group: KronFactors, x: Tensor, where: str, any_float: bool) -> None:
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    for tensor in group:
        if tensor is None:
            continue
        if tensor.dtype != expected and not (any_float and tensor.is_floating_point()):
            raise TypeError(
                f"{where}: factors must be {expected} beside x of {x.dtype}, but {tensor.dtype} was given; "
                "keep them out of .half() and .bfloat16()"
            )
        if tensor.device != x.device:
            raise ValueError(f"{where}: factors must be on {x.device} like x, but one is on {tensor.device}")
