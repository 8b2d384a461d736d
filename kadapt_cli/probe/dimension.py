"""From scores at several d to a dimension: which d to try, where a curve reaches its target, what to adapt then.

A curve maps d to a score; d = 0 is the head alone. Between two d it is read off linearly in log(1 + d).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Curve = Mapping[int, float]
Module = Mapping[str, Any]
FACTOR = 8  # between two d of the grid


class Dimension(NamedTuple):
    """The d at which a curve reaches its target, and the d around it that were tried.

    All are None when nothing was measured; `d` and `high` are None when no d that was tried reaches the target.
    """

    d: float | None
    low: float | None
    high: float | None


def grid(size: int) -> list[int]:
    """8, 64, 512, … up to a sixteenth of a size D, where a trial takes up to 3·D numbers; D itself where D is tiny."""
    return [FACTOR**k for k in range(1, 32) if 16 * FACTOR**k <= size] or [size]


def crossing(curve: Curve, target: float) -> Dimension:
    """The smallest d of the curve that reaches the target, read off between it and the d before it."""
    below: int | None = None
    for d in sorted(curve):
        if curve[d] < target:
            below = d
            continue
        if below is None:
            return Dimension(d, d, d)
        share = (target - curve[below]) / (curve[d] - curve[below])
        at = math.expm1(math.log1p(below) + share * (math.log1p(d) - math.log1p(below)))
        return Dimension(at, below, d)
    return Dimension(None, below, None)


def halfway(curve: Curve, target: float) -> int | None:
    """The next d of the bisection, between the two around the crossing; None when there is none between them."""
    found = crossing(curve, target)
    if found.low is None or found.high is None:
        return None
    middle = round(math.expm1((math.log1p(found.low) + math.log1p(found.high)) / 2))
    return middle if found.low < middle < found.high else None


def explore(
    score: Callable[[int], float], dims: Iterable[int], *, zero: float, target: float, refine: int, least: int = 1
) -> dict[int, float]:
    """The curve through `dims`, and `refine` times through a d halfway around its crossing.

    Args:
        score: Measures at a d.
        dims: Of the grid.
        zero: The score at d = 0.
        target: The score to reach.
        refine: Halvings of the gap around the crossing.
        least: The smallest d that can be measured.
    """
    curve = {0: zero} | {d: score(d) for d in sorted({max(d, least) for d in dims})}
    for _ in range(refine):
        middle = halfway(curve, target)
        if middle is None or middle < least:
            break
        curve[middle] = score(middle)
    return curve


def over_seeds(found: Sequence[Dimension]) -> Dimension:
    """The geometric mean of 1 + d, minus 1, and the range of what was tried around each; None when one is None."""
    lows = [x.low for x in found if x.low is not None]
    highs = [x.high for x in found if x.high is not None]
    ds = [x.d for x in found if x.d is not None]
    whole = len(ds) == len(found) > 0
    mean = math.expm1(sum(map(math.log1p, ds)) / len(ds)) if whole else None
    return Dimension(mean, min(lows, default=None), max(highs, default=None) if whole else None)


def ranked(modules: Iterable[Module], by: str = "d90") -> list[Module]:
    """Those that need some dimensions, the lowest first; of equal ones that with the higher direct score.

    A module whose target the head alone reaches (0) gains nothing when it is adapted, and is not among them. `by` is
    "d90", whose target is of a module's own score, or "d90_full", of that of full fine-tuning, the same for all.
    """
    return sorted((m for m in modules if m[by]), key=lambda m: (m[by], -m["direct"]))


def choose(modules: Iterable[Module], cost: Callable[[list[str]], int], budget: int, by: str = "d90") -> list[str]:
    """Names as `ranked`, each taken if all taken so far still cost at most `budget` with it."""
    taken: list[str] = []
    for module in ranked(modules, by):
        if cost([*taken, module["name"]]) <= budget:
            taken.append(module["name"])
    return taken
