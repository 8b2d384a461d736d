"""The Kronecker linear against its definition in float64: torch.kron written out, gradcheck, shapes, errors."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kadapt_kernels import KronFactors, divisors, kron_delta, kron_linear, kron_merge, reference

# T, S, P (one a segment), Q, r, leading shape: ones, primes, non-square blocks, odd row counts, no rows
SHAPES = [
    (3, 4, (5, 5), 2, 1, (2, 7)),
    (1, 1, (1,), 1, 1, (1,)),
    (2, 3, (7, 2, 5), 5, 2, (33,)),
    (8, 8, (3,), 3, 1, (3, 1, 5)),
    (2, 2, (3, 3), 4, 3, (0,)),
    (32, 32, (6, 6), 6, 1, (4, 9)),
]


def make_factors(shape: tuple, rule: str, dtype: torch.dtype = torch.float64) -> list[KronFactors]:
    T, S, Ps, Q, r, _ = shape
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    return [
        KronFactors(
            random(T, S, S) if rule == "full" else random(T, S),
            None if rule == "full" else random(T, S),
            random(T, P, r),
            random(T, Q, r),
        )
        for P in Ps
    ]


def make_case(shape: tuple, rule: str, dtype: torch.dtype = torch.float64):
    """x, W, bias, factors and segments with a frozen block of rows before, between and after the adapted ones."""
    _, S, Ps, Q, _, lead = shape
    generator = torch.Generator().manual_seed(0)
    segments, row = [], 2
    for P in Ps:
        segments.append((row, row + S * P))
        row += S * P + 3
    x = torch.randn(*lead, S * Q, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(row, S * Q, dtype=torch.float64, generator=generator).to(dtype)
    bias = torch.randn(row, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return x, weight, bias, make_factors(shape, rule, dtype), segments


def delta_by_definition(group: KronFactors, scale: float) -> Tensor:
    """s · Σ_t A_t ⊗ (u_t v_tᵀ), term by term with torch.kron."""
    terms = []
    for t in range(len(group.a)):
        rule = group.a[t] if group.b is None else torch.outer(group.a[t], group.b[t])
        terms.append(torch.kron(rule, group.u[t] @ group.v[t].T))
    return scale * torch.stack(terms).sum(0)


def weight_by_definition(weight: Tensor, factors: list[KronFactors], segments: list, scale: float) -> Tensor:
    total = weight.clone()
    for (start, stop), group in zip(segments, factors, strict=True):
        total[start:stop] = total[start:stop] + delta_by_definition(group, scale)
    return total


@pytest.mark.parametrize("rule", ["factored", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, rule):
    x, weight, bias, factors, segments = make_case(shape, rule)
    wanted = F.linear(x, weight_by_definition(weight, factors, segments, 0.7), bias)
    y = kron_linear(x, weight, bias, factors, segments=segments, scale=0.7)
    assert y.shape == wanted.shape
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12 * max(1, x.shape[-1]))


@pytest.mark.parametrize("rule", ["factored", "full"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradients_equal_autograd_through_the_dense_matrix(shape, rule):
    x, weight, bias, factors, segments = make_case(shape, rule)
    leaves = [x, bias, *(t for group in factors for t in group if t is not None)]
    dense = F.linear(x, weight_by_definition(weight, factors, segments, 0.7), bias)
    dy = torch.randn(dense.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(dense, leaves, dy)
    got = torch.autograd.grad(kron_linear(x, weight, bias, factors, segments=segments, scale=0.7), leaves, dy)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", ["factored", "full"])
def test_gradcheck(rule):
    x, weight, bias, factors, segments = make_case((2, 3, (2, 1), 2, 2, (3,)), rule)
    flat = [t for group in factors for t in group if t is not None]
    size = len(flat) // len(factors)

    def function(x: Tensor, bias: Tensor, *flat: Tensor) -> Tensor:
        groups = [flat[i : i + size] for i in range(0, len(flat), size)]
        rebuilt = [KronFactors(g[0], None if rule == "full" else g[1], g[-2], g[-1]) for g in groups]
        return kron_linear(x, weight, bias, rebuilt, segments=segments, scale=0.7)

    assert torch.autograd.gradcheck(function, (x, bias, *flat), check_undefined_grad=False)


@pytest.mark.parametrize("rule", ["factored", "full"])
def test_merge_and_delta(rule):
    _, weight, _, factors, segments = make_case(SHAPES[2], rule)
    for group in factors:
        torch.testing.assert_close(kron_delta(group, 0.7), delta_by_definition(group, 0.7), rtol=0, atol=1e-12)
    merged = kron_merge(weight, factors, segments=segments, scale=0.7)
    torch.testing.assert_close(merged, weight_by_definition(weight, factors, segments, 0.7), rtol=0, atol=1e-12)
    assert not torch.equal(merged, weight)


def test_rows_outside_every_segment_stay_frozen():
    x, weight, bias, factors, segments = make_case(SHAPES[0], "factored")
    y, frozen = kron_linear(x, weight, bias, factors, segments=segments), F.linear(x, weight, bias)
    inside = torch.zeros(len(weight), dtype=torch.bool)
    for start, stop in segments:
        inside[start:stop] = True
    assert torch.equal(y[..., ~inside], frozen[..., ~inside])
    assert (y[..., inside] != frozen[..., inside]).all()


def test_strided_input_and_no_bias():
    x, weight, _, factors, segments = make_case(SHAPES[0], "factored")
    wide = torch.stack([x, x + 1], -1)
    strided = wide[..., 0]
    assert not strided.is_contiguous()
    wanted = F.linear(x, weight_by_definition(weight, factors, segments, 1.0))
    torch.testing.assert_close(kron_linear(strided, weight, None, factors, segments=segments), wanted)


@pytest.mark.parametrize("rule", ["factored", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_the_dense_linear_of_that_dtype(rule, dtype):
    """max|actual − ref64| ≤ 2 · max|dense eager − ref64| + eps · max|ref64|."""
    x, weight, bias, factors, segments = make_case(SHAPES[5], rule)
    ref = F.linear(x, weight_by_definition(weight, factors, segments, 0.3), bias)
    low = [KronFactors(*(None if t is None else t.detach().float() for t in group)) for group in factors]
    dense = weight_by_definition(weight, factors, segments, 0.3).to(dtype)
    eager = F.linear(x.to(dtype), dense, bias.to(dtype))
    y = kron_linear(x.to(dtype), weight.to(dtype), bias.to(dtype), low, segments=segments, scale=0.3)
    assert y.dtype == dtype
    allowed = 2 * (eager.double() - ref).abs().max() + torch.finfo(dtype).eps * ref.abs().max()
    assert (y.double() - ref).abs().max() <= allowed


def test_factor_gradients_are_fp32_beside_bf16_inputs():
    x, weight, bias, factors, segments = make_case(SHAPES[0], "factored", torch.bfloat16)
    fp32 = [KronFactors(*(t.detach().float().requires_grad_() for t in group)) for group in factors]
    kron_linear(x, weight, bias, fp32, segments=segments).float().sum().backward()
    assert {t.grad.dtype for group in fp32 for t in group} == {torch.float32}


def test_factored_never_holds_a_matrix_of_the_size_of_the_weight():
    """Neither forward nor backward makes a tensor as large as a segment of W: ΔW and dΔW are never formed."""
    d, rows = 256, 4
    x, weight, dy = torch.randn(rows, d), torch.randn(3 * d, d), torch.randn(rows, 3 * d)
    factors = make_factors((8, 8, (32, 32), 32, 1, ()), "factored", torch.float32)
    segments = [(0, d), (2 * d, 3 * d)]
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                    made.append(t.numel())
            return out

    with Watch(), torch.no_grad():
        _, h = reference.factored_forward(x, weight, None, factors, segments, 1.0)
        reference.factored_backward(dy, x, weight, h, factors, segments, 1.0, True)
    assert rows * 3 * d in made
    assert max(made) < d * d


def test_inputs_are_not_changed():
    x, weight, bias, factors, segments = make_case(SHAPES[0], "factored")
    before = [t.detach().clone() for t in (x, weight, bias, *factors[0])]
    kron_linear(x, weight, bias, factors, segments=segments).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, *factors[0]), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": [(0, 20), (10, 30)]}, "disjoint"),
        ({"segments": [(0, 20)]}, "one KronFactors a segment, but 2 for 1"),
        ({"segments": [(0, 20), (20, 41)]}, r"S·P = 20 must be the segment's 21 rows .* choose S from \[1\]"),
        ({"segments": [(0, 20), (40, 60)]}, r"within 0\.\.48"),
        ({"backend": "cuda"}, "backend must be one of auto, eager, merge, triton, but 'cuda'"),
        ({"x": torch.zeros(2, 9, dtype=torch.float64)}, r"must fit, but \(2, 9\), \(48, 8\)"),
        ({"bias": torch.zeros(47, dtype=torch.float64)}, r"bias must have shape \(48,\), but \(47,\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), but 1.0"),
        ({"dropout": 0.5, "backend": "eager"}, "dropout = 0.5 has no factored form; use backend='merge'"),
    ],
)
def test_wrong_arguments_say_what_to_do(change, message):
    x, weight, bias, factors, segments = make_case(SHAPES[0], "factored")
    arguments = {"x": x, "bias": bias, "segments": segments} | change
    with pytest.raises(ValueError, match=message):
        kron_linear(arguments.pop("x"), weight, arguments.pop("bias"), factors, **arguments)


def test_dtypes_that_do_not_go_together_are_named():
    x, weight, bias, factors, segments = make_case(SHAPES[0], "factored")
    with pytest.raises(TypeError, match=r"share one float dtype, but torch.float32, torch.float64, torch.float64"):
        kron_linear(x.float(), weight, bias, factors, segments=segments)
    with pytest.raises(TypeError, match=r"0: factors must be torch.float32 beside x of torch.bfloat16, but .*64"):
        kron_linear(x.bfloat16(), weight.bfloat16(), None, factors, segments=segments)


def test_divisors():
    assert divisors(192, 768) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192]
    assert divisors(7, 5) == [1]
