"""The fused forward and backward against float64, every kernel and both forms; Triton's interpreter without a GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kadapt_kernels.backward import fused_backward
from kadapt_kernels.blocks import layout
from kadapt_kernels.forward import fused_forward
from kadapt_kernels.testing import CASES, ROLES, Case, Problem, exact, failures, make
from kadapt_kernels.tiles import BackwardTiles, Tile

Tiles = tuple[Tile, BackwardTiles]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
POINTERS = (
    Tile(64, 64, 64, 4, 2, 2),
    BackwardTiles(Tile(64, 64, 64, 4, 2), Tile(64, 0, 64, 4, 2), Tile(32, 128, 0, 4, 2), 2),
)
SHORT = (
    Tile(32, 128, 32, 4, 2, 1),
    BackwardTiles(Tile(32, 128, 32, 4, 2), Tile(32, 0, 32, 4, 2), Tile(16, 128, 0, 4, 2), 3),
)
DESCRIPTORS = (
    Tile(64, 32, 64, 4, 2, 3, True),
    POINTERS[1]._replace(dx=Tile(32, 128, 64, 4, 2, descriptor=True)),
)
MORE_CASES = {
    "segments out of order": Case(34, 24, 64, ((48, 4, 4, 6, 5, 1), (8, 3, 8, 8, 2, 3)), shifted=True),
    "strided, for descriptors": Case(45, 48, 192, ((0, 12, 8, 4, 8, 1), (96, 4, 24, 12, 4, 1)), row_padding=16),
    "long shifts": Case(9, 24, 640, ((0, 12, 24, 2, 12, 1), (320, 12, 24, 2, 12, 1)), shifted=True),
    "long u and v": Case(20, 72, 96, ((16, 2, 40, 36, 4, 1),), bias=False, shifted=True),
}
ALL = CASES | MORE_CASES


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that a number that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(2).new_empty(5).isnan().all()
    assert torch.empty_like(torch.ones(5)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def fused(problem: Problem, tiles: Tiles = POINTERS) -> dict[str, Tensor]:
    """y, dx and the factors' gradients by the kernels; also checks that they change no input."""
    p = problem
    inputs = [p.x, p.weight, p.dy, *([] if p.bias is None else [p.bias]), *(t for f in p.factors for t in f), *p.shifts]
    before = [t.clone() for t in inputs]
    y, kept = fused_forward(p.x, p.weight, p.bias, p.factors, p.segments, p.scale, p.shifts, tiles[0])
    before += [t.clone() for t in kept]
    dx, grads = fused_backward(p.dy, p.x, p.weight, kept, p.factors, p.segments, p.scale, p.shifts, tiles=tiles[1])
    torch.testing.assert_close([*inputs, *kept], before, rtol=0, atol=0, equal_nan=True)
    assert dx is not None
    names = [f"d{role}{i}" for i in range(len(p.factors)) for role in ROLES]
    names += [f"dshift{i}" for i in range(len(p.shifts))]
    return {"y": y, "dx": dx} | dict(zip(names, grads, strict=True))


def for_descriptors(problem: Problem) -> bool:
    """Whether rows start at multiples of 16 bytes and the forward's column tiles end with the blocks."""
    plan = layout(problem.factors, problem.segments, len(problem.weight))
    rows = (problem.x, problem.weight, problem.dy)
    return plan.divides(DESCRIPTORS[0].n * DESCRIPTORS[0].tiles) and all(
        t.stride(0) * t.element_size() % 16 == 0 for t in rows
    )


def relative(actual: Tensor, answer: Tensor) -> float:
    return ((actual.double() - answer).norm() / answer.norm()).item()


@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [
        pytest.param(POINTERS, torch.float32, id="large, fp32"),
        pytest.param(SHORT, torch.float32, id="short, fp32"),
        pytest.param(SHORT, torch.float16, id="short, fp16"),
        pytest.param(POINTERS, torch.bfloat16, id="large, bf16"),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_every_result_is_as_accurate_as_pytorch(name: str, tiles: Tiles, dtype: torch.dtype) -> None:
    problem = make(ALL[name], dtype, DEVICE)
    results = fused(problem, tiles)
    assert {results[f"d{role}{i}"].dtype for i in range(len(problem.factors)) for role in ROLES} == {torch.float32}
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter truncates to bf16 where a GPU rounds: twice the error, and all in one direction.
        answers = exact(problem)
        assert {n: e for n in results if not (e := relative(results[n], answers[n])) < 1.5e-2} == {}
    else:
        assert failures(results, problem, list(results)) == []


@pytest.mark.parametrize("name", [n for n in ALL if for_descriptors(make(ALL[n], torch.float16))])
def test_descriptors_give_what_pointers_give(name: str) -> None:
    problem = make(ALL[name], torch.float16, DEVICE)
    results = fused(problem, DESCRIPTORS)
    assert failures(results, problem, list(results)) == []


def test_descriptor_cases_are_there() -> None:
    names = [n for n in ALL if for_descriptors(make(ALL[n], torch.float16))]
    assert {"packed qkv", "ViT-Ti, T = 32", "strided, for descriptors"} <= set(names)


@pytest.mark.parametrize("tiles", [POINTERS, SHORT], ids=["large", "short"])
def test_nan_stays_in_its_row(tiles: Tiles) -> None:
    problem = make(MORE_CASES["strided, for descriptors"], torch.float32, DEVICE)
    problem.x[17, 3] = torch.nan
    problem.dy[30, 190] = torch.nan
    results = fused(problem, tiles)
    assert results["y"].isnan().any(1).nonzero().tolist() == [[17]]
    assert results["dx"].isnan().any(1).nonzero().tolist() == [[30]]
    assert results["y"][17].isnan().all()
    assert results["dx"][30].isnan().all()


def amid_nan(matrix: Tensor) -> Tensor:
    """The matrix as the corner of a larger one whose other numbers are NaN."""
    larger = matrix.new_full((matrix.shape[0] + 64, matrix.shape[1] + 24), torch.nan)
    corner = larger[: matrix.shape[0], : matrix.shape[1]]
    return corner.copy_(matrix)


@pytest.mark.parametrize("tiles", [POINTERS, SHORT], ids=["large", "short"])
def test_nothing_outside_comes_in(tiles: Tiles) -> None:
    problem = make(CASES["different adapters"], torch.float32, DEVICE)
    results = fused(problem, tiles)
    problem.x, problem.weight, problem.dy = amid_nan(problem.x), amid_nan(problem.weight), amid_nan(problem.dy)
    torch.testing.assert_close(fused(problem, tiles), results, rtol=0, atol=0)

    frozen = torch.ones(problem.dy.shape[1], dtype=torch.bool)
    for start, stop in problem.segments:
        frozen[start:stop] = False
    problem.dy[:, frozen] = torch.nan
    again = fused(problem, tiles)
    assert again["dx"].isnan().all()
    assert all(torch.equal(again[name], results[name]) for name in results if name != "dx")


@pytest.mark.parametrize("tiles", [POINTERS, SHORT], ids=["large", "short"])
def test_same_bits_twice(tiles: Tiles) -> None:
    problem = make(ALL["segments out of order"], torch.float32, DEVICE)
    first, second = fused(problem, tiles), fused(problem, tiles)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tiles", [POINTERS, SHORT], ids=["large", "short"])
@pytest.mark.parametrize("splits", [1, 5, 12])
def test_the_number_of_splits_changes_only_rounding(tiles: Tiles, splits: int) -> None:
    forward, backward = tiles
    problem = make(CASES["one linear"], torch.float32, DEVICE)
    here = fused(problem, (forward, backward))
    other = fused(problem, (forward, backward._replace(splits=splits)))
    assert torch.equal(here["dx"], other["dx"])
    assert failures(other, problem, list(other)) == []


@pytest.mark.parametrize("tiles", [POINTERS, SHORT, DESCRIPTORS], ids=["large", "short", "descriptors"])
def test_no_rows(tiles: Tiles) -> None:
    problem = make(MORE_CASES["strided, for descriptors"]._replace(m=0, row_padding=0), torch.float16, DEVICE)
    p, forward = problem, tiles[0]._replace(descriptor=False)
    shifts = [torch.ones(stop - start, device=DEVICE) for start, stop in p.segments]
    y, kept = fused_forward(p.x, p.weight, None, p.factors, p.segments, p.scale, shifts, forward)
    dx, grads = fused_backward(p.dy, p.x, p.weight, kept, p.factors, p.segments, p.scale, shifts, tiles=tiles[1])
    assert (y.shape, kept.h.shape) == ((0, 192), (0, 32))
    assert dx is not None
    assert dx.shape == (0, 48)
    shapes = [t.shape for t in (*(t for f in problem.factors for t in f if t is not None), *shifts)]
    assert [t.shape for t in grads] == shapes
    assert all((t == 0).all() for t in grads)


@pytest.mark.parametrize("tiles", [POINTERS, SHORT, DESCRIPTORS], ids=["large", "short", "descriptors"])
def test_without_adapters_it_is_the_frozen_layer(tiles: Tiles) -> None:
    problem = make(Case(45, 48, 192, ()), torch.float32, DEVICE)
    results = fused(problem, tiles)
    torch.testing.assert_close(results["y"], F.linear(problem.x, problem.weight, problem.bias))
    torch.testing.assert_close(results["dx"], problem.dy @ problem.weight)
    assert list(results) == ["y", "dx"]


def test_dx_can_be_left_out() -> None:
    problem = make(CASES["one row"], torch.float32, DEVICE)
    p = problem
    _, kept = fused_forward(p.x, p.weight, p.bias, p.factors, p.segments, p.scale, p.shifts, POINTERS[0])
    rest = (p.factors, p.segments, p.scale)
    dx, grads = fused_backward(p.dy, p.x, p.weight, kept, *rest, need_dx=False, tiles=POINTERS[1])
    assert dx is None
    whole = fused(problem)
    assert all(torch.equal(grad, whole[f"d{role}0"]) for grad, role in zip(grads, ROLES, strict=True))
