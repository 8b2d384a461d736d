"""The kernels that merge ΔW into a weight and take a dense dW apart, against the definition in float64.

Bounds are those of fp32 sums: some roundings of the sum of absolute values, element by element.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kadapt_kernels.blocks import INTERPRETED
from kadapt_kernels.factors import KronFactors, kron_delta
from kadapt_kernels.merge import (
    dense_gradient_launches,
    dense_gradients,
    gradient_partials,
    merge_launches,
    merge_tile,
    merge_weight,
)
from kadapt_kernels.testing import wide
from kadapt_kernels.tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.7
EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """Columns and rows of W, and (first row, S, P, Q, T, r, full A) of each adapter."""

    k: int
    n: int
    adapters: tuple[tuple[int, int, int, int, int, int, bool], ...]


CASES = {
    "24 by 24": Case(96, 99, ((2, 4, 24, 24, 16, 1, False),)),
    "24 by 24, full": Case(96, 99, ((2, 4, 24, 24, 16, 1, True),)),
    "T·r = 80": Case(28, 20, ((0, 4, 5, 7, 40, 2, False),)),
    "T·r = 80, full": Case(28, 23, ((3, 4, 5, 7, 40, 2, True),)),
    "several tiles both ways": Case(72, 90, ((0, 9, 9, 8, 18, 4, False),)),
    "several tiles both ways, full": Case(72, 81, ((0, 9, 9, 8, 18, 1, True),)),
    "long tiles": Case(80, 16, ((1, 2, 6, 40, 3, 1, False),)),
    "q, k and v": Case(40, 120, ((0, 8, 5, 5, 8, 2, False), (40, 8, 5, 5, 8, 2, False), (80, 8, 5, 5, 8, 2, False))),
    "all different, not in order": Case(30, 77, ((41, 5, 7, 6, 17, 1, False), (3, 6, 6, 5, 3, 4, True))),
    "S = 1": Case(37, 13, ((1, 1, 11, 37, 2, 3, True),)),
    "P = Q = 1": Case(20, 20, ((0, 20, 1, 1, 3, 1, False),)),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[KronFactors], list[tuple[int, int]]]:
    """A weight whose rows are farther apart than K, factors and segments."""
    weight = random(case.n, case.k + 3).to(dtype)[:, : case.k]
    factors, segments = [], []
    for i, (start, S, P, Q, T, r, full) in enumerate(case.adapters):
        a, b = random(T, S, *([S] if full else []), seed=4 * i + 1), random(T, S, seed=4 * i + 2)
        u, v = random(T, P, r, seed=4 * i + 3), random(T, Q, r, seed=4 * i + 4)
        factors.append(KronFactors(a, None if full else b, u / (T * r) ** 0.5, v))
        segments.append((start, start + S * P))
    return weight, factors, segments


def leaves(group: KronFactors) -> list[Tensor]:
    return [t for t in group if t is not None]


def absolute(group: KronFactors) -> KronFactors:
    return KronFactors._make(None if t is None else t.abs() for t in group)


def merged_exactly(weight: Tensor, factors: Sequence[KronFactors], segments: Sequence[tuple[int, int]]) -> Tensor:
    total = weight.double()
    for group, (start, stop) in zip(factors, segments, strict=True):
        total[start:stop] += kron_delta(wide(group), SCALE)
    return total


def gradients_exactly(
    dw: Sequence[Tensor], factors: Sequence[KronFactors], masks: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Those of sum(dW · mask · ΔW) in float64 by autograd; without masks nothing is dropped."""
    found: list[Tensor] = []
    for i, (d, group) in enumerate(zip(dw, factors, strict=True)):
        double = KronFactors._make(None if t is None else t.requires_grad_() for t in wide(group))
        product = kron_delta(double, SCALE) * d.double()
        found += torch.autograd.grad(product.sum() if masks is None else (product * masks[i]).sum(), leaves(double))
    return found


def assert_gradients(
    actual: list[Tensor],
    dw: Sequence[Tensor],
    factors: Sequence[KronFactors],
    masks: Sequence[Tensor] | None = None,
) -> None:
    exact = gradients_exactly(dw, factors, masks)
    sizes = gradients_exactly([d.abs() for d in dw], [absolute(group) for group in factors], masks)
    assert len(actual) == len(exact)
    for i, (given, answer, size) in enumerate(zip(actual, exact, sizes, strict=True)):
        assert (given.shape, given.dtype) == (answer.shape, torch.float32)
        error = (given - answer).abs() / size
        assert error.max() <= 8 * EPS, f"gradient {i}: {error.max() / EPS:.1f} eps of the sum of absolute values"


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once, as this device does it: the interpreter cuts bf16 off instead of rounding to the nearest."""
    if dtype == torch.bfloat16 and INTERPRETED.value:
        return (values.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return values.to(dtype)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_merge_equals_the_definition(name):
    weight, factors, segments = make(CASES[name])
    with poisoned_memory():
        merged = merge_weight(weight, factors, segments, SCALE)
    exact = merged_exactly(weight, factors, segments)
    sizes = merged_exactly(weight.abs(), [absolute(group) for group in factors], segments)
    assert (merged.shape, merged.dtype) == (weight.shape, weight.dtype)
    assert ((merged - exact).abs() / sizes).max() <= 4 * EPS
    assert (exact != weight).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["24 by 24", "T·r = 80, full", "all different, not in order"])
def test_16_bit_weights_are_rounded_once(name, dtype):
    weight, factors, segments = make(CASES[name], dtype)
    merged = merge_weight(weight, factors, segments, SCALE)
    exact = merged_exactly(weight, factors, segments)
    wanted = rounded(exact, dtype)
    sizes = merged_exactly(weight.abs(), [absolute(group) for group in factors], segments)
    assert merged.dtype == dtype
    # An fp32 sum next to a boundary between two numbers of the dtype can fall on its other side: rare, one step off.
    assert (merged != wanted).double().mean() < 0.003
    assert ((merged - wanted.double()).abs() <= torch.finfo(dtype).eps * exact.abs() + 4 * EPS * sizes).all()


def test_frozen_rows_are_copied_to_the_bit_and_nan_stays_where_it_is():
    weight, factors, segments = make(CASES["all different, not in order"], torch.bfloat16)
    frozen = torch.ones(len(weight), dtype=torch.bool, device=DEVICE)
    for start, stop in segments:
        frozen[start:stop] = False
    assert frozen.sum() == len(weight) - 35 - 36
    weight[0, :4] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-40])
    weight[segments[0][0], 3] = torch.nan
    merged = merge_weight(weight, factors, segments, SCALE)
    assert torch.equal(bits(merged[frozen]), bits(weight[frozen]))
    assert torch.equal(merged.isnan(), weight.isnan())
    assert (merged[~frozen] != weight[~frozen]).any(1).all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd_through_the_dense_matrix(name):
    weight, factors, segments = make(CASES[name])
    whole = random(*weight.shape, seed=99)
    dw = [whole[start:stop] for start, stop in segments]
    with poisoned_memory():
        gradients = dense_gradients(dw, factors, segments, SCALE)
    assert_gradients(gradients, dw, factors)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["T·r = 80, full", "all different, not in order"])
def test_same_bits_twice_and_inputs_unchanged(name, dropout):
    weight, factors, segments = make(CASES[name])
    dw = [random(stop - start, weight.shape[1] + 5, seed=9)[:, : weight.shape[1]] for start, stop in segments]
    inputs = [weight, *dw, *(t for group in factors for t in leaves(group))]
    before = [t.clone() for t in inputs]

    def both() -> list[Tensor]:
        merged = merge_weight(weight, factors, segments, SCALE, dropout=dropout, seed=3)
        return [merged, *dense_gradients(dw, factors, segments, SCALE, dropout=dropout, seed=3)]

    for first, second in zip(both(), both(), strict=True):
        assert torch.equal(bits(first), bits(second))
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def merged_by(tile: Tile, case: Case, dropout: float) -> Tensor:
    weight, factors, segments = make(case)
    merged = weight.clone()
    for launch in merge_launches(weight, merged, factors, segments, SCALE, dropout=dropout, seed=11, tile=tile):
        launch.run()
    return merged


@pytest.mark.parametrize("tile", [Tile(16, 32, 32, 4, 1), Tile(64, 16, 16, 4, 1)])
def test_tiles_change_roundings_only_and_the_mask_not_at_all(tile):
    weight, factors, segments = make(CASES["several tiles both ways, full"])
    assert tile != merge_tile(factors[0])
    usual = merge_weight(weight, factors, segments, SCALE, dropout=0.5, seed=11)
    other = merged_by(tile, CASES["several tiles both ways, full"], 0.5)
    assert torch.equal(usual == weight, other == weight)
    torch.testing.assert_close(usual, other, rtol=0, atol=64 * EPS)

    dw = [random(stop - start, weight.shape[1], seed=9) for start, stop in segments]
    gradients = [KronFactors._make(None if t is None else torch.full_like(t, torch.nan) for t in g) for g in factors]
    partials = [gradient_partials(group, tile) for group in factors]
    for launch in dense_gradient_launches(dw, factors, segments, SCALE, partials, gradients, tile=tile):
        launch.run()
    gradients[0].a.copy_(partials[0].a.sum(0).view_as(factors[0].a))
    assert_gradients(leaves(gradients[0]), dw, factors)


@triton.jit
def rand_kernel(out, seed, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    tl.store(out + offset, tl.rand(seed, offset))


def kept(shape: tuple[int, int], dropout: float, seed: int) -> Tensor:
    """The mask by its definition: Philox of the element's number in W, at least the probability of dropping."""
    uniform = torch.empty(triton.next_power_of_2(shape[0] * shape[1]), device=DEVICE)
    rand_kernel[(1,)](uniform, seed, len(uniform))
    return uniform[: shape[0] * shape[1]].view(shape) >= dropout


@pytest.mark.parametrize("seed", [0, 5, 5 + 2**32])
@pytest.mark.parametrize("name", ["24 by 24", "24 by 24, full", "all different, not in order"])
def test_dropout_zeroes_elements_and_divides_the_others(name, seed):
    weight, factors, segments = make(CASES[name])
    weight.zero_()
    dropped = merge_weight(weight, factors, segments, SCALE, dropout=0.3, seed=seed)
    whole = merge_weight(weight, factors, segments, SCALE / (1 - 0.3))
    mask = kept(tuple(weight.shape), 0.3, seed)
    assert torch.equal(dropped, torch.where(mask, whole, 0.0))
    updated = whole != 0
    count = updated.sum().item()
    assert count > 2000
    deviation = (0.3 * 0.7 * count) ** 0.5
    assert abs((updated & ~mask).sum().item() - 0.3 * count) < 4 * deviation


def test_the_mask_depends_on_the_seed_and_the_element_alone():
    def mask(adapters: tuple, seed: int, padding: int = 0) -> Tensor:
        case = Case(24, 50, adapters)
        weight, factors, segments = make(case)
        weight = random(50, 24 + padding).zero_()[:, :24]
        return merge_weight(weight, factors, segments, SCALE, dropout=0.5, seed=seed)[2:26] != 0

    first = mask(((2, 4, 6, 6, 3, 1, True),), 1)
    assert torch.equal(first, mask(((2, 6, 4, 4, 20, 2, False),), 1, padding=9))
    assert torch.equal(first, mask(((14, 4, 3, 6, 3, 1, True), (2, 2, 6, 12, 3, 1, True)), 1))
    for other in (0, 2, 1 + 2**32):
        agreement = (first == mask(((2, 4, 6, 6, 3, 1, True),), other)).double().mean().item()
        assert 0.4 < agreement < 0.6


@pytest.mark.parametrize("name", ["T·r = 80, full", "several tiles both ways", "all different, not in order"])
def test_gradients_drop_what_the_merge_dropped(name):
    weight, factors, segments = make(CASES[name])
    weight.zero_()
    merged = merge_weight(weight, factors, segments, SCALE, dropout=0.4, seed=6)
    masks = [(merged[start:stop] != 0) / (1 - 0.4) for start, stop in segments]
    dw = [random(stop - start, weight.shape[1], seed=7 + i) for i, (start, stop) in enumerate(segments)]
    with poisoned_memory():
        gradients = dense_gradients(dw, factors, segments, SCALE, dropout=0.4, seed=6)
    assert_gradients(gradients, dw, factors, masks)


@pytest.mark.parametrize("name", ["T·r = 80", "all different, not in order"])
def test_launches_need_no_memory(name):
    weight, factors, segments = make(CASES[name])

    def launches(move: Callable[[Tensor], Tensor]) -> list:
        groups = [KronFactors._make(None if t is None else move(t) for t in group) for group in factors]
        dw = [move(weight[start:stop]) for start, stop in segments]
        partials = [gradient_partials(group) for group in groups]
        found = merge_launches(move(weight), move(weight), groups, segments, SCALE)
        found += dense_gradient_launches(dw, groups, segments, SCALE, partials, groups)
        return [
            (x.kernel, x.grid, {k: v.shape if isinstance(v, Tensor) else v for k, v in x.arguments.items()})
            for x in found
        ]

    assert launches(lambda t: t.to("meta")) == launches(lambda t: t.clone(memory_format=torch.preserve_format))
