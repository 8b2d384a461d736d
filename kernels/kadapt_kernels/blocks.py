"""What every Triton kernel here is built from: a launch as a value, the layout of a call, and device functions.

A call's layout is known when a kernel is compiled, so it is passed as constants, not as tables in memory:

    blocks    ((start, stop, adapter), ...)   all rows of W in order; adapter is an index, or -1 for frozen rows
    shapes    ((S, P, Q, T, r), ...)          of each adapter

R is the padded number of columns that each adapter has in h and g: the largest T·r, as a power of two of at least 16
(the smallest contraction of a tensor core). Columns beyond T·r are zero.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kadapt_kernels.factors import KronFactors, Rows

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Launch(NamedTuple):
    """One kernel with everything it is launched with, so that it can be run or compiled ahead of time."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int

    def run(self) -> Any:
        """Launch on the current device of the tensors among the arguments; empty grids are left out.

        Returns:
            The compiled kernel; None from the interpreter or an empty grid.
        """
        if 0 in self.grid:
            return None
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return self.kernel[self.grid](**self.arguments, **options)


class Call(NamedTuple):
    """One pass over a layer: the tensors made for it, results and workspace, and the launches that fill them."""

    made: list[Tensor]
    launches: list[Launch]


class _Launched(NamedTuple):
    """A launch that was made once.

    Attributes:
        kernel: The compiled kernel with its grid.
        arguments: In order, None where tensors belong; descriptors without their tensor.
        single: Place and number of each tensor.
        several: Place and numbers of each tuple of tensors.
        described: Place and number of each tensor in a descriptor.
    """

    kernel: Callable[..., object]
    arguments: list[Any]
    single: list[tuple[int, int]]
    several: list[tuple[int, list[int]]]
    described: list[tuple[int, int]]


_RECORDED: dict[Hashable, tuple[list[tuple[torch.Size, torch.dtype]], list[_Launched]]] = {}
MAX_RECORDED = 1024


def repeat(what: Hashable, inputs: Sequence[Tensor | None], make: Callable[[], Call]) -> list[Tensor]:
    """Run the launches of `make`, and return what it made.

    When it was run before for the same `what` and for inputs of the same shapes, strides, dtypes, device and alignment,
    the kernels that were compiled then are launched on these inputs and on new tensors: to choose tiles, lay out the
    arguments and let Triton look for its kernel takes longer than the kernel does, unless there are many rows.
    """
    if INTERPRETED.value:
        call = make()
        for launch in call.launches:
            launch.run()
        return call.made
    first, same = inputs[0], [id(t) for t in inputs]
    assert first is not None
    alike = [t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in inputs]
    key = (what, first.device, tuple(alike), tuple(map(same.index, same)))
    recorded = _RECORDED.get(key)
    if recorded is None:
        call = make()
        launches = [launched for launch in call.launches if (launched := _launch(launch, [*inputs, *call.made]))]
        if len(_RECORDED) >= MAX_RECORDED:  # one for each number of rows
            _RECORDED.clear()
        _RECORDED[key] = [(t.shape, t.dtype) for t in call.made], launches
        return call.made
    shapes, launches = recorded
    made = [first.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    tensors = [*inputs, *made]
    for kernel, template, single, several, described in launches:
        arguments = template.copy()
        for place, i in single:
            arguments[place] = tensors[i]
        for place, numbers in several:
            arguments[place] = tuple([tensors[i] for i in numbers])
        for place, i in described:
            arguments[place] = _over(template[place], tensors[i])
        kernel(*arguments)
    return made


def _launch(launch: Launch, tensors: Sequence[Tensor | None]) -> _Launched | None:
    """Launch, and note what a repetition needs; nothing for an empty grid."""
    compiled = launch.run()
    if compiled is None:
        return None
    numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
    found = _Launched(compiled[(*launch.grid, 1, 1)[:3]], [], [], [], [])
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            found.single.append((place, numbers[id(value)]))
            value = None
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            found.several.append((place, [numbers[id(t)] for t in value]))
            value = None
        elif isinstance(value, TensorDescriptor):
            found.described.append((place, numbers[id(value.base)]))
            value = _over(value, None)
        found.arguments.append(value)
    return found


def _over(descriptor: TensorDescriptor, base: Tensor | None) -> TensorDescriptor:
    """The descriptor over another tensor of the same layout, without the checks that the first has passed."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(descriptor.__dict__)
    found.base = base
    return found


class Layout(NamedTuple):
    """The constants of a call: which rows carry which adapter, and the adapters' shapes."""

    blocks: tuple[tuple[int, int, int], ...]
    shapes: tuple[tuple[int, int, int, int, int], ...]
    columns: int

    @property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides where every block begins and ends."""
        return gcd(16, *(row for start, stop, _ in self.blocks for row in (start, stop)))

    def divides(self, block_n: int) -> bool:
        """Whether tiles of that many rows never reach over the end of a block."""
        return all((stop - start) % block_n == 0 for start, stop, _ in self.blocks)


def layout(factors: Sequence[KronFactors], segments: Sequence[Rows], rows: int) -> Layout:
    """The layout of a weight of that many rows whose segments carry the (factored) factors."""
    blocks, end = [], 0
    for adapter, (start, stop) in sorted(enumerate(segments), key=lambda item: item[1]):
        if start > end:
            blocks.append((end, start, -1))
        blocks.append((start, stop, adapter))
        end = stop
    if end < rows:
        blocks.append((end, rows, -1))
    shapes = tuple((f.a.shape[1], f.u.shape[1], f.v.shape[1], f.u.shape[0], f.u.shape[2]) for f in factors)
    columns = padded_rank(max((t * r for _, _, _, t, r in shapes), default=0))
    return Layout(tuple(blocks), shapes, columns)


def padded_rank(rank: int) -> int:
    """R for adapters of ranks T·r up to `rank`."""
    return max(16, int(triton.next_power_of_2(rank)))


def precision(dtype: torch.dtype) -> str:
    """How a dot multiplies: fp32 as PyTorch is set to on CUDA (ieee unless TF32 is allowed), 16 bits exactly."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def row_stride(tensor: Tensor) -> int:
    """The stride between rows; an empty or one-row tensor may report anything, its width is as good."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A tensor descriptor that moves blocks of that shape; rows and strides in multiples of 16 bytes."""
    return TensorDescriptor(matrix, list(matrix.shape), [row_stride(matrix), 1], list(block))


@triton.jit
def dot(x, w, acc, PRECISION: tl.constexpr):
    """acc + x @ w with fp32 accumulation.

    The interpreter multiplies bf16 bit patterns, so it gets fp32 operands there: the products of 16-bit numbers are
    exact in fp32. In fp32 the products of a tile are summed before acc is added: one chain of multiply-adds over the
    whole contraction, which the compiler makes of both unless `max_num_imprecise_acc` is set, was measured to err up to
    four times as much as cuBLAS.
    """
    if INTERPRETED:
        return acc + tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    elif PRECISION == "ieee" and x.dtype == tl.float32:
        return acc + tl.dot(x, w, input_precision=PRECISION, max_num_imprecise_acc=x.shape[-1])
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def columns(
    a, u, scale, rows, SIDE: tl.constexpr, LENGTH: tl.constexpr, T: tl.constexpr, r: tl.constexpr, R: tl.constexpr
):
    """The tile (R, rows) of a tall factor: s · a_t[row // LENGTH] · u_t[row % LENGTH, ρ] at (t·r + ρ, row), else 0.

    a is (T, SIDE), u is (T, LENGTH, r), both fp32 and contiguous: neighbouring rows are neighbours in memory.
    """
    i = tl.arange(0, R)[:, None]
    t = i // r
    j = (rows // LENGTH)[None, :]
    k = (rows % LENGTH)[None, :]
    inside = (i < T * r) & (rows < SIDE * LENGTH)[None, :]
    left = tl.load(a + t * SIDE + j, mask=inside, other=0.0)
    right = tl.load(u + (t * LENGTH + k) * r + i % r, mask=inside, other=0.0)
    return scale * left * right


@triton.jit
def load_tile(
    source,
    row0,
    column0,
    stride,
    rows,
    columns,
    R: tl.constexpr,
    C: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """The tile (R, C) at (row0, column0) of a matrix (rows, columns); zeros outside. A descriptor or a pointer."""
    if DESCRIPTOR:
        return source.load([row0, column0])
    else:
        row = row0 + tl.arange(0, R)
        column = column0 + tl.arange(0, C)
        at = source + row[:, None].to(tl.int64) * stride + column[None, :]
        if EVEN_R and EVEN_C:
            return tl.load(at)
        elif EVEN_C:
            return tl.load(at, mask=(row < rows)[:, None], other=0.0)
        elif EVEN_R:
            return tl.load(at, mask=(column < columns)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def locate(chunk, SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The chunk-th run of up to SIZE rows when each block is cut on its own: its first row, its block's first row and
    stop, and the adapter."""
    row0 = 0
    start = 0
    stop = 0
    adapter = -1
    first = 0
    for b in tl.static_range(len(BLOCKS)):
        count = (BLOCKS[b][1] - BLOCKS[b][0] + SIZE - 1) // SIZE
        here = (chunk >= first) & (chunk < first + count)
        row0 = tl.where(here, BLOCKS[b][0] + (chunk - first) * SIZE, row0)
        start = tl.where(here, BLOCKS[b][0], start)
        stop = tl.where(here, BLOCKS[b][1], stop)
        adapter = tl.where(here, BLOCKS[b][2], adapter)
        first += count
    return tl.multiple_of(row0, ALIGNMENT), start, tl.multiple_of(stop, ALIGNMENT), adapter
