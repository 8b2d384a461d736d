"""Calls that are repeated without Triton's lookup: what runs, on which tensors, when, and what is kept."""

import gc
import weakref

import pytest
import torch
import triton.language as tl
from torch import Tensor

from kadapt_kernels import blocks
from kadapt_kernels.blocks import Call, Launch, repeat


class Kernel:
    """y = factor · (x + Σ others), as a kernel that Triton would compile: by name first, then in order."""

    arg_names = ("x", "others", "factor", "y", "WIDTH")

    def __init__(self) -> None:
        self.compiled = 0

    def __getitem__(self, grid: tuple[int, ...]):
        def first(x, others, factor, y, WIDTH, **options):
            self.compiled += 1
            self.run(x, others, factor, y, WIDTH)
            return {(*grid, 1, 1): self.run}

        return first

    @staticmethod
    def run(x: Tensor, others: tuple[Tensor, ...], factor: float, y: Tensor, WIDTH: int) -> None:
        assert x.shape[1] == WIDTH
        y.copy_(factor * (x + sum(others)))


@pytest.fixture(autouse=True)
def compiled(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(blocks, "_RECORDED", {})


def call(kernel: Kernel, x: Tensor, others: list[Tensor], factor: float = 2.0, grid: int = 3) -> Tensor:
    def make() -> Call:
        y = torch.empty_like(x)
        arguments = {"x": x, "others": tuple(others), "factor": factor, "y": y, "WIDTH": x.shape[1]}
        return Call([y], [Launch(kernel, (grid,), arguments, 4, 2)])

    (y,) = repeat(("test", factor), [x, *others], make)
    return y


def test_a_repetition_takes_the_tensors_it_is_given():
    kernel = Kernel()
    for seed in range(3):
        x, a, b = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed)).unbind()
        torch.testing.assert_close(call(kernel, x, [a, b]), 2 * (x + a + b))
    assert kernel.compiled == 1


def test_one_tensor_in_two_places_is_not_two_tensors():
    kernel, (x, a, b) = Kernel(), torch.randn(3, 4, 5).unbind()
    torch.testing.assert_close(call(kernel, x, [a, a]), 2 * (x + a + a))
    torch.testing.assert_close(call(kernel, x, [a, b]), 2 * (x + a + b))
    torch.testing.assert_close(call(kernel, x, [b, b]), 2 * (x + b + b))
    assert kernel.compiled == 2


def test_what_a_kernel_is_compiled_for_is_looked_up_again():
    """Shape, strides, dtype, alignment to 16 bytes, and whatever else makes the call another one."""
    kernel, (x, a) = Kernel(), torch.randn(2, 4, 8).unbind()
    wide, long = torch.randn(4, 16), torch.randn(33)
    calls = [
        ((x, [a]), {}),
        ((x[:2], [a[:2]]), {}),
        ((wide[:, :8], [a]), {}),
        ((x.double(), [a.double()]), {}),
        ((long[1:].view(4, 8), [a]), {}),
        ((x, [a]), {"factor": 3.0}),
    ]
    for i, (given, more) in enumerate(calls):
        call(kernel, *given, **more)
        assert kernel.compiled == i + 1
    for given, more in calls:
        call(kernel, *given, **more)
    assert kernel.compiled == len(calls)


def test_no_tensor_is_kept():
    kernel, seen = Kernel(), []
    for _ in range(2):
        x, a = torch.randn(2, 4, 5).unbind()
        seen += [weakref.ref(t) for t in (x, a, call(kernel, x, [a]))]
        del x, a
    gc.collect()
    assert [ref() for ref in seen] == [None] * 6


def test_empty_grids_and_many_shapes(monkeypatch):
    kernel = Kernel()
    for _ in range(2):
        call(kernel, torch.ones(4, 5), [torch.ones(4, 5)], grid=0)
    assert kernel.compiled == 0
    monkeypatch.setattr(blocks, "MAX_RECORDED", 3)
    for rows in range(1, 9):
        call(kernel, torch.ones(rows, 5), [torch.ones(rows, 5)])
        assert len(blocks._RECORDED) <= 3
