"""Problems with known answers and the tolerance rule, shared by the tests and the benchmark.

The answer is float64 with ΔW written out. The yardstick is what plain PyTorch makes of the same numbers in the same
dtype, factored and with its own autograd. The rule, for every result alike:

    max|actual − exact| ≤ 2 · max|yardstick − exact| + eps(dtype) · max|exact|

In fp32, where rounding depends on the order of the sums alone, the yardstick is the worse of that and of W + ΔW in one
product. Gradients of the factors are a few numbers each, which can be right by luck: there the yardstick's error is the
worst relative one of all of them, times max|exact|.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kadapt_kernels.factors import KronFactors, kron_delta, tall

Results = dict[str, Tensor]
ROLES = ("a", "b", "u", "v")


class Case(NamedTuple):
    """A layer and its adapters: rows of x, columns and rows of W, and (first row, S, P, Q, T, r) of each adapter."""

    m: int
    k: int
    n: int
    adapters: tuple[tuple[int, int, int, int, int, int], ...]
    full: bool = False
    bias: bool = True
    row_padding: int = 0
    shifted: bool = False


CASES = {
    "packed qkv": Case(77, 96, 288, ((0, 4, 24, 24, 16, 1), (192, 4, 24, 24, 16, 1)), shifted=True),
    "ViT-Ti, T = 32": Case(33, 192, 576, ((0, 32, 6, 6, 32, 1), (384, 32, 6, 6, 32, 1))),
    "q, k and v": Case(50, 40, 120, ((0, 8, 5, 5, 8, 2), (40, 8, 5, 5, 8, 2), (80, 8, 5, 5, 8, 2))),
    "one linear": Case(45, 56, 40, ((0, 8, 5, 7, 16, 1),), bias=False, shifted=True),
    "different adapters": Case(33, 40, 71, ((3, 4, 5, 10, 3, 2), (50, 5, 4, 8, 7, 1)), row_padding=8, shifted=True),
    "one row": Case(1, 48, 144, ((48, 12, 4, 4, 12, 1),), row_padding=3),
    "rank above a term": Case(64, 64, 128, ((64, 4, 16, 16, 1, 5),)),
    "S a prime": Case(31, 74, 74, ((0, 37, 2, 2, 4, 1),)),
}


@dataclass
class Problem:
    """The tensors of a case: x, weight, bias and dy in one dtype, the factors in fp32 (fp64 beside fp64)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    factors: list[KronFactors]
    segments: list[tuple[int, int]]
    scale: float
    dy: Tensor
    shifts: list[Tensor] = field(default_factory=list)


def make(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seed: int = 0,
    scale: float = 1.3,
    delta: float | None = None,
) -> Problem:
    """Random numbers for a case; with `delta` the scale is such that |ΔW| / |W| of the segments has that value."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, wide: bool = False) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(torch.float64 if dtype == torch.float64 else torch.float32 if wide else dtype).to(device)

    x = normal(case.m, case.k + case.row_padding)[:, : case.k]
    weight = normal(case.n, case.k) / case.k**0.5
    bias = normal(case.n) if case.bias else None
    factors, segments = [], []
    for start, side, p, q, terms, rank in case.adapters:
        rule = [normal(terms, side, *([side] if case.full else []), wide=True), normal(terms, side, wide=True)]
        u, v = normal(terms, p, rank, wide=True), normal(terms, q, rank, wide=True)
        spread = (terms * rank * case.k) ** 0.25
        factors.append(KronFactors(rule[0], None if case.full else rule[1], u / spread, v / spread))
        segments.append((start, start + side * p))
    dy = normal(case.m, case.n + case.row_padding)[:, : case.n]
    if delta is not None:
        dense = torch.cat([kron_delta(wide(f)).flatten() for f in factors])
        frozen = torch.cat([weight[start:stop].double().flatten() for start, stop in segments])
        scale = delta * (frozen.norm() / dense.norm()).item()
    shifts = [normal(stop - start, wide=True) for start, stop in segments] if case.shifted else []
    return Problem(x, weight, bias, factors, segments, scale, dy, shifts)


def wide(factors: KronFactors) -> KronFactors:
    """The factors in float64."""
    return KronFactors(*(None if t is None else t.double() for t in factors))  # type: ignore[arg-type]


def exact(problem: Problem) -> Results:
    """y and every gradient in float64, with ΔW written out."""
    double = Problem(
        problem.x.double(),
        problem.weight.double(),
        None if problem.bias is None else problem.bias.double(),
        [wide(f) for f in problem.factors],
        problem.segments,
        problem.scale,
        problem.dy.double(),
        [shift.double() for shift in problem.shifts],
    )
    return run(double, lambda p: _add(p, [p.x @ kron_delta(f, p.scale).t() for f in p.factors]))


def yardstick(problem: Problem) -> Results:
    """y and every gradient by plain PyTorch in the problem's dtype: factored, autograd's own backward."""

    def update(p: Problem, factors: KronFactors) -> Tensor:
        a, b, u, v = factors
        if b is None:
            return p.x @ kron_delta(factors, p.scale).to(p.x.dtype).t()
        return (p.x @ tall(b, v).to(p.x.dtype)) @ tall(a * p.scale, u).to(p.x.dtype).t()

    return run(problem, lambda p: _add(p, [update(p, f) for f in p.factors]))


def merged(problem: Problem) -> Results:
    """y and every gradient by plain PyTorch in the problem's dtype: ΔW added to W, autograd's own backward."""

    def whole(p: Problem) -> Tensor:
        weight = p.weight.clone()
        for (start, stop), factors in zip(p.segments, p.factors, strict=True):
            weight[start:stop] += kron_delta(factors, p.scale).to(weight.dtype)
        return _add(replace(p, weight=weight), [0.0] * len(p.segments))

    return run(problem, whole)


def _add(p: Problem, updates: Sequence[Tensor | float]) -> Tensor:
    """The frozen layer with an update (M, rows) and a shift on every segment."""
    y = F.linear(p.x, p.weight, p.bias)
    parts, end = [], 0
    for i in sorted(range(len(updates)), key=lambda i: p.segments[i]):
        start, stop = p.segments[i]
        adapted = y[:, start:stop] + updates[i]
        parts += [y[:, end:start], adapted + p.shifts[i].to(y.dtype) if p.shifts else adapted]
        end = stop
    return torch.cat([*parts, y[:, end:]], 1)


def run(problem: Problem, function: Callable[[Problem], Tensor]) -> Results:
    """y and its gradients for the problem's dy: y, dx, dbias, and da0, db0, du0, dv0, dshift0, da1, …"""
    x = problem.x.detach().requires_grad_()
    bias = None if problem.bias is None else problem.bias.detach().clone().requires_grad_()
    factors = [
        KronFactors(*(None if t is None else t.detach().clone().requires_grad_() for t in f))  # type: ignore[arg-type]
        for f in problem.factors
    ]
    shifts = [shift.detach().clone().requires_grad_() for shift in problem.shifts]
    y = function(Problem(x, problem.weight, bias, factors, problem.segments, problem.scale, problem.dy, shifts))
    y.backward(problem.dy)
    found = {"y": y.detach(), "dx": x.grad, "dbias": None if bias is None else bias.grad}
    for i, group in enumerate(factors):
        found |= {f"d{role}{i}": t.grad for role, t in zip(ROLES, group, strict=True) if t is not None}
    found |= {f"dshift{i}": shift.grad for i, shift in enumerate(shifts)}
    return {name: t for name, t in found.items() if t is not None}


def errors(actual: Mapping[str, Tensor], answers: Results) -> dict[str, float]:
    """max|actual − exact| of every result; NaN where a number is missing."""
    return {name: _largest(actual[name].double() - answers[name]) for name in answers}


def allowance(problem: Problem, answers: Results) -> dict[str, float]:
    """max|yardstick − exact| of every result."""
    found = errors(yardstick(problem), answers)
    if problem.x.element_size() > 2:
        other = errors(merged(problem), answers)
        found = {name: max(error, other[name]) for name, error in found.items()}
    return found


def failures(
    actual: Mapping[str, Tensor],
    problem: Problem,
    names: Sequence[str] | None = None,
    *,
    factor: float = 2.0,
    answers: Results | None = None,
    measure: Mapping[str, float] | None = None,
) -> list[str]:
    """One line for each result outside the rule, saying where and by how much; empty when all hold.

    Args:
        actual: The results, by name.
        problem: What they are results of.
        names: Which to hold against the rule; all answers when None.
        factor: How many times the yardstick's error is allowed.
        answers: What `exact` makes of the problem, where the caller has it already; all or some of the results.
        measure: The `allowance` for these answers, likewise.
    """
    answers = exact(problem) if answers is None else answers
    measure = allowance(problem, answers) if measure is None else measure
    largest = {name: _largest(answer) for name, answer in answers.items()}
    small = [name for name in answers if name[:2] in ("da", "db", "du", "dv") and name[2:].isdigit()]
    luckless = max(measure[name] / largest[name] for name in small) if small else 0.0
    lines = []
    for name in names or answers:
        given, answer = actual[name], answers[name]
        if given.shape != answer.shape:
            lines.append(f"{name}: shape {tuple(given.shape)} instead of {tuple(answer.shape)}")
            continue
        eps = torch.finfo(given.dtype).eps
        own = luckless * largest[name] if name in small else measure[name]
        allowed = factor * own + eps * largest[name]
        difference = (given.double() - answer).abs()
        if not _largest(difference) <= allowed:
            at = tuple(int(i) for i in torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), answer.shape))
            lines.append(
                f"{name}: at {at} {given[at].item():.6g} instead of {answer[at].item():.6g}; "
                f"error {difference[at].item():.2e}, allowed {allowed:.2e}"
            )
    return lines


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
