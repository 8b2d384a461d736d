"""Which tiles are the fastest on this GPU, as the table to commit in tiles.py."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kadapt_cli.bench import timing
from kadapt_cli.bench.contenders import MAX_SIDE, Shape
from kadapt_cli.bench.options import Plan
from kadapt_cli.errors import MachineError
from kadapt_kernels.aot import tf32
from kadapt_kernels.testing import Problem
from kadapt_kernels.tiles import BackwardTiles, Tile, architecture, backward_tiles, forward_tile, shared_limit

Candidate = TypeVar("Candidate")
Say = Callable[[str], object]


class Choice(NamedTuple):
    """The fastest tile of a pass ("forward" or "backward") for a shape and bytes an element, and its time."""

    direction: str
    element: int
    shape: Shape
    tile: Tile | BackwardTiles
    ms: float


def sweep(wanted: Plan, say: Say) -> Iterator[Choice]:
    """The fastest forward and backward tiles of every shape and dtype of the plan, measured on this GPU.

    Backward tiles are found one field after the other, from those of `tiles.backward_tiles`. A tile whose results
    differ from those of the table's tile is left out and said.

    Raises:
        MachineError: There is no CUDA GPU.
    """
    if wanted.device.type != "cuda":
        raise MachineError("--sweep: it measures tiles on a CUDA GPU, and this runs on the CPU; run it where one is")
    with timing.on_stream(wanted.device), torch.no_grad():
        for dtype in wanted.dtypes:
            with tf32(dtype == "tf32"):
                for shape in wanted.shapes:
                    say(f"{dtype}  d = {shape.d}  M = {shape.M}: tiles")
                    yield from sweep_shape(timing.problems(shape, dtype, wanted.device), shape, wanted.rounds, say)


def sweep_shape(inputs: Sequence[Problem], shape: Shape, rounds: int, say: Say) -> Iterator[Choice]:
    """The fastest tiles on these inputs of the shape."""
    from kadapt_kernels.backward import fused_backward
    from kadapt_kernels.blocks import layout
    from kadapt_kernels.forward import fused_forward

    first, device, dtype = inputs[0], inputs[0].x.device, inputs[0].x.dtype

    def forward(p: Problem, tile: Tile | None) -> list[Tensor]:
        y, kept = fused_forward(p.x, p.weight, p.bias, p.factors, p.segments, p.scale, p.shifts, tile)
        return [y, kept.h]

    def backward(p: Problem, tiles: BackwardTiles | None) -> list[Tensor]:
        rest = (p.factors, p.segments, p.scale, p.shifts)
        dx, gradients = fused_backward(p.dy, p.x, p.weight, kept, *rest, tiles=tiles)
        return [*([] if dx is None else [dx]), *gradients]

    kept = fused_forward(first.x, first.weight, first.bias, first.factors, first.segments, first.scale, first.shifts)[1]
    asked = (device, dtype, shape.M, shape.d, layout(first.factors, first.segments, len(first.weight)))
    candidates = forward_candidates(shape, dtype.itemsize, shared_limit(architecture(device)))
    time_of = _timer(forward, inputs, rounds, say)
    yield Choice("forward", dtype.itemsize, shape, *fastest([forward_tile(*asked), *candidates], time_of))
    tiles = backward_tiles(*asked)
    time_of = _timer(backward, inputs, rounds, say)
    for name in tiles._fields:
        tiles, ms = fastest([tiles, *backward_candidates(tiles, name)], time_of)
    yield Choice("backward", dtype.itemsize, shape, tiles, ms)


def forward_candidates(shape: Shape, element: int, shared_limit: int) -> list[Tile]:
    """Tiles of the forward worth a measurement: chunks that divide d, operands that fit the shared memory (bytes)."""
    found = []
    sizes = itertools.product((64, 128), (64, 128, 256), (32, 64), (2, 3, 4), (1, 2, 3, 6), (False, True))
    for m, n, k, stages, tiles, descriptor in sizes:
        operands = stages * (m + n + MAX_SIDE) * k * element
        whole = shape.d % (n * tiles) == 0 and shape.d % k == 0
        if whole and k * element >= 64 and operands <= shared_limit and m <= max(64, shape.M):
            found.append(Tile(m, n, k, 4 if m * n <= 64 * 128 else 8, stages, tiles, descriptor))
    return found


def backward_candidates(base: BackwardTiles, name: str) -> list[BackwardTiles]:
    """The tiles with other values of one field."""
    if name == "splits":
        return [base._replace(splits=splits) for splits in (4, 8, 16, 33, 66, 132)]
    product = itertools.product
    sizes: dict[str, list[Any]] = {
        "dx": [
            Tile(m, n, k, 4 if m * n <= 64 * 128 else 8, stages, 1, descriptor)
            for m, n, k, stages, descriptor in product((64, 128), (64, 128, 256), (32, 64), (3, 4), (False, True))
        ],
        "project": [Tile(m, 0, k, 4, stages) for m, k, stages in product((64, 128), (64, 128), (3, 4))],
        "tall": [Tile(m, n, 0, 4, stages) for m, n, stages in product((32, 64), (64, 128), (3, 4))],
    }
    return [base._replace(**{name: tile}) for tile in sizes[name]]


def fastest(candidates: Sequence[Candidate], time_of: Callable[[Candidate], float]) -> tuple[Candidate, float]:
    """The candidate with the least time, and that time: infinite when none can run."""
    times = [time_of(candidate) for candidate in candidates]
    return candidates[times.index(min(times))], min(times)


def _timer(
    call: Callable[[Problem, Any], Sequence[Tensor]], inputs: Sequence[Problem], rounds: int, say: Say
) -> Callable[[Any], float]:
    """Times a tile in ms, median over the rounds; infinite where it fails or its results are not the default's."""
    expected = call(inputs[0], None)

    def time_of(tile: Any) -> float:
        try:
            if not agree(call(inputs[0], tile), expected):
                raise RuntimeError("its results differ from those of the table's tile")
            replay = timing.captured(lambda: [call(p, tile) for p in inputs] and None)
        except timing.failures() as error:
            say(f"{tile}: left out, {timing.one_line(error)}")
            return math.inf
        return statistics.median(timing.timed(replay, inputs[0].x.device) for _ in range(rounds)) / len(inputs)

    return time_of


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results differ by no more than another order of summation explains: 1 % of their norm."""
    return all(
        bool((x.float() - y.float()).norm() <= 1e-2 * y.float().norm()) for x, y in zip(found, expected, strict=True)
    )


def table_literal(choices: Sequence[Choice], arch: str) -> str:
    """The choices that can run, as Python to commit in tiles.py: architecture -> (bytes an element, d, M) -> tile."""
    lines = []
    choices = [choice for choice in choices if math.isfinite(choice.ms)]
    for direction in dict.fromkeys(choice.direction for choice in choices):
        lines += [f"{direction.upper()}_MEASURED = {{", f'    "{arch}": {{']
        for c in choices:
            if c.direction == direction:
                lines.append(f"        ({c.element}, {c.shape.d}, {c.shape.M}): {literal(c.tile)},  # {c.ms:.4f} ms")
        lines += ["    },", "}"]
    return "\n".join(lines)


def literal(tile: object) -> str:
    """A tile as the Python that makes it, without the names of its fields."""
    return f"{type(tile).__name__}({', '.join(map(literal, tile))})" if isinstance(tile, tuple) else repr(tile)
