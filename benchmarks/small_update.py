"""How much of a small ΔW survives in 16 bits: kept apart (factored, fused) and merged into a rounded weight.

Relative error (Frobenius) of the adapter's contribution x ΔWᵀ against float64, for one square layer of width 768 whose
ΔW has rank 32 and a given size next to W. Runs on a CPU in seconds:

    python benchmarks/small_update.py --csv benchmarks/results/small_update.csv
"""

import argparse
import csv
import datetime
from pathlib import Path

import torch
from torch import Tensor

from kadapt_kernels import kron_delta, kron_linear, reference
from kadapt_kernels.testing import Case, Problem, make, wide

LAYER = Case(512, 768, 768, ((0, 32, 24, 24, 32, 1),), bias=False)


def contributions(problem: Problem) -> dict[str, Tensor]:
    """What the adapter adds to y by each way, (M, N), without the rounding of y itself that all of them share."""
    nothing = torch.zeros_like(problem.weight)
    factored = kron_linear(
        problem.x, nothing, None, problem.factors, segments=problem.segments, scale=problem.scale, backend="eager"
    )
    merged = reference.merged_weight(problem.weight, problem.factors, problem.segments, problem.scale, 0.0, 0)
    return {"factored": factored, "merged": problem.x.double() @ (merged.double() - problem.weight.double()).t()}


def main() -> None:
    """Print the rows, and append them to a CSV if one is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for size in (1e-1, 1e-2, 1e-3, 1e-4):
            problem = make(LAYER, dtype, delta=size)
            wanted = problem.x.double() @ kron_delta(wide(problem.factors[0]), problem.scale).t()
            for way, found in contributions(problem).items():
                error = ((found.double() - wanted).norm() / wanted.norm()).item()
                today = datetime.date.today().isoformat()
                rows.append([today, str(dtype).removeprefix("torch."), size, way, f"{error:.4f}", torch.__version__])
                print(*rows[-1])
    if given.csv:
        new = not given.csv.exists()
        with given.csv.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["date", "dtype", "delta_over_weight", "way", "error", "torch"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
