"""The Walsh-Hadamard transform against scipy's matrix in float64, its kernel in the interpreter, what it refuses."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise

import pytest
import torch
from scipy.linalg import hadamard as by_scipy
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kadapt_kernels import aot, hadamard, hadamard_
from kadapt_kernels.hadamard import CHUNK, sides
from kadapt_kernels.hadamard_kernel import hadamard_launches
from kadapt_kernels.tiles import SHARED_LIMIT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_definition(x: Tensor) -> Tensor:
    return x.double() @ torch.from_numpy(by_scipy(x.shape[-1])).to(x.device).double()


def assert_close(actual: Tensor, exact: Tensor, relative: float) -> None:
    error = (actual.double() - exact).abs().max() / exact.abs().max()
    assert error <= relative, f"error {error:.1e} of the largest, allowed {relative:.1e}"


def assert_fp32(actual: Tensor, x: Tensor) -> None:
    """A sum of L signed numbers, in passes: an eps of their norm a doubling, eightfold for the largest of all sums."""
    allowed = 8 * EPS * x.shape[-1].bit_length() * x.double().norm(dim=-1).max()
    assert (actual.dtype, actual.shape) == (torch.float32, x.shape)
    assert (actual.cpu().double() - by_definition(x.cpu())).abs().max() <= allowed


@contextmanager
def empty_is_nan() -> Iterator[None]:
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes at a time of all that PyTorch allocates on the CPU within a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("bits", range(13))
def test_equals_the_matrix(bits):
    x = random(3, 5, 2**bits)
    assert_close(hadamard(x), by_definition(x), 1e-10)


@pytest.mark.parametrize(("rows", "bits"), [(3, 16), (5, 17), (3, 19)])
def test_twice_is_the_length(rows, bits):
    """Several chunks, the last not full; rows longer than a chunk; not the identity."""
    x = random(rows, 2**bits)
    with empty_is_nan():
        y = hadamard(x)
    assert_close(hadamard(y), 2**bits * x, 1e-10)
    assert_close(y[:, 0], x.sum(1), 1e-10)
    at = 2**bits - 3
    signs = torch.tensor([(-1.0) ** (j & at).bit_count() for j in range(2**bits)], dtype=torch.float64)
    assert_close(y[:, at], x @ signs, 1e-10)


def test_gradients_of_any_order():
    x = random(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(hadamard, (x,))
    assert torch.autograd.gradgradcheck(lambda x: hadamard(x).pow(3), (x,))


def test_one_and_no_rows():
    assert hadamard(random(1)).equal(random(1))
    assert hadamard(random(16)).shape == (16,)
    assert hadamard(torch.empty(0, 64)).shape == (0, 64)
    assert hadamard(torch.empty(2, 0, 64, device=DEVICE), "triton").shape == (2, 0, 64)


def strided(kind: str, length: int) -> Tensor:
    if kind == "transposed":
        return random(length, 7, dtype=torch.float32).T
    if kind == "every other":
        return random(5, 2 * length, dtype=torch.float32)[:, ::2]
    return random(1, length, dtype=torch.float32).expand(4, length)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["transposed", "every other", "expanded"])
def test_any_strides_and_no_change_of_x(kind, backend):
    x = strided(kind, 256).to(DEVICE)
    before = x.clone()
    y = hadamard(x, backend)
    assert y.is_contiguous()
    assert_fp32(y, x)
    assert x.equal(before)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_in_place(backend):
    x = random(3, 5, 64, dtype=torch.float32).to(DEVICE)
    y = x.clone()
    assert hadamard_(y, backend) is y
    assert_fp32(y, x)


def test_in_place_bounds():
    """What lies beside x in memory stays."""
    memory = random(9, 64, dtype=torch.float32)
    before = memory.clone()
    hadamard_(memory[2:7])
    assert memory[:2].equal(before[:2])
    assert memory[7:].equal(before[7:])
    assert_fp32(memory[2:7], before[2:7])


@pytest.mark.parametrize(
    ("rows", "bits"),
    [(1, 4), (301, 4), (131, 5), (7, 6), (67, 7), (1, 8), (37, 8), (3, 9), (5, 10), (3, 11), (1, 13), (3, 14), (1, 15)],
)
def test_the_kernel(rows, bits):
    x = random(rows, 2**bits, dtype=torch.float32).to(DEVICE)
    with empty_is_nan():
        y = hadamard(x, "triton")
    if bits <= 12:
        assert_fp32(y, x)
    else:
        assert_close(y, hadamard(x.double(), "torch"), 8 * EPS * bits)


def test_the_kernel_writes_no_more_than_x():
    memory = torch.full((7, 512), torch.nan, device=DEVICE)
    memory[2:5] = random(3, 512, dtype=torch.float32).to(DEVICE)
    x = memory[2:5].clone()
    hadamard_(memory[2:5], "triton")
    assert_fp32(memory[2:5], x)
    assert memory[:2].isnan().all()
    assert memory[5:].isnan().all()


def test_the_kernel_has_gradients():
    x = random(3, 32, dtype=torch.float32).to(DEVICE).requires_grad_()
    (dx,) = torch.autograd.grad(hadamard(x, "triton").square().sum(), x, create_graph=True)
    assert_close(dx, 64 * x.detach().double(), 8 * EPS * 5)
    (dxdx,) = torch.autograd.grad(dx.sum(), x)
    assert_close(dxdx, torch.full_like(x, 64.0).double(), 8 * EPS * 5)


def test_passes():
    for bits in range(4, 40):
        found = [launch.arguments for launch in hadamard_launches(torch.empty(3, 2**bits, device="meta"))]
        assert len(found) == -(-bits // 7)
        assert all(16 <= one["N"] <= 128 and one["N"] * one["count"] == 3 * 2**bits for one in found)
        assert found[-1]["INNER"] == 1
        assert all(a["INNER"] == b["INNER"] * b["N"] for a, b in pairwise(found))
        assert found[0]["INNER"] * found[0]["N"] == 2**bits
    assert sides(2**18, 32) == [16, 16, 32, 32]
    assert sides(1, 32) == []


def test_which_backend_runs(monkeypatch):
    ran = []
    monkeypatch.setattr("kadapt_kernels.hadamard_kernel.hadamard_launches", lambda rows: ran.append(rows.shape) or [])
    x = torch.ones(2, 3, 16, device=DEVICE)
    hadamard(x, "triton")
    assert ran == [(6, 16)]
    hadamard(x, "torch")
    hadamard(x[..., :8])
    hadamard(x.double())
    hadamard(x.cpu())
    assert len(ran) == 1
    hadamard(x)
    assert len(ran) == (2 if DEVICE == "cuda" else 1)


def test_autocast_keeps_the_precision():
    x = random(3, 128, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hadamard(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert_fp32(y.detach(), x.detach())
    assert dx.dtype == torch.float32


@pytest.mark.parametrize(("rows", "bits"), [(2**6, 4), (2**17, 4), (2**9, 10), (5, 17), (3, 19), (1, 21)])
def test_temporary_memory(rows, bits):
    x = torch.ones(rows, 2**bits)
    hadamard_(x)  # the small matrices are there
    assert 0 < peak_bytes(lambda: hadamard_(x)) <= 4 * min(2 * CHUNK, x.numel())


def test_compiles_whole():
    x = random(3, 64, dtype=torch.float32)
    compiled = torch.compile(lambda x: hadamard(x).sin().sum(), fullgraph=True, backend="aot_eager")
    found, wanted = [], []
    for function, kept in ((compiled, found), (lambda x: hadamard(x).sin().sum(), wanted)):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        kept.append(leaf.grad)
    torch.testing.assert_close(found[0], wanted[0])


@pytest.mark.parametrize("function", [hadamard, hadamard_])
@pytest.mark.parametrize("shape", [(2, 12), (3,), (4, 0)])
def test_lengths_that_are_no_power_of_two(function, shape):
    where = "hadamard" if function is hadamard else "hadamard_"
    expected = f"{where}: the last axis of x must be a power of two long, but x is {shape}; pad it"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        function(torch.ones(shape))


def test_what_is_refused(monkeypatch):
    x = torch.ones(2, 16)
    with pytest.raises(ValueError, match=r"but x is \(\); pad it"):
        hadamard(torch.tensor(1.0))
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        with pytest.raises(TypeError, match=f"hadamard: x must be fp32 or fp64, but {dtype} was given"):
            hadamard(x.to(dtype))
    with pytest.raises(ValueError, match="hadamard: backend must be one of auto, torch, triton, but 'cuda' was given"):
        hadamard(x, "cuda")
    with pytest.raises(ValueError, match=r"backend 'triton' takes L ≥ 16, but x is \(2, 8\); use backend='auto'"):
        hadamard(x[:, :8], "triton")
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: its kernel is for fp32, but x is torch\.float64"):
        hadamard(x.double(), "triton")
    monkeypatch.setattr(sys.modules["kadapt_kernels.hadamard"], "why_no_triton", lambda x: "it is not here")
    with pytest.raises(
        RuntimeError, match="hadamard_: backend 'triton' cannot run: it is not here; use backend='auto'"
    ):
        hadamard_(x, "triton")
    with pytest.raises(ValueError, match=r"x must be contiguous, but shape \(16, 2\) with strides \(1, 16\) was given"):
        hadamard_(torch.ones(2, 16).T)
    with pytest.raises(
        RuntimeError, match="hadamard_: x must need no gradient, but requires_grad is set; use hadamard"
    ):
        hadamard_(torch.ones(2, 16, requires_grad=True))
    with torch.no_grad():
        hadamard_(torch.ones(2, 16, requires_grad=True))


def assert_fits(rows: list[aot.Row]) -> None:
    for row in rows:
        assert row["error"] is None, row
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT[row["arch"]], row


def test_the_widest_kernels_compile_for_hopper():
    job = aot.Job("hadamard", "sm_90", "fp32", 768, 128 * 197)
    widest = [i for i, one in enumerate(aot._launches(job)) if one.arguments["N"] == 128][:2]
    rows = aot.run([job._replace(number=i) for i in widest])
    assert [row["kernel"] for row in rows] == ["hadamard_kernel.hadamard"] * 2
    assert_fits(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(aot.TARGETS))
def test_every_kernel_compiles(arch):
    rows = aot.report(arch, ["fp32"], [768], ["hadamard_kernel.hadamard"], rows=[128 * 197])
    launches = aot._launches(aot.Job("hadamard", arch, "fp32", 768, 128 * 197))
    assert len(rows) >= len({(one.arguments["N"], one.arguments["INNER"]) for one in launches}) == 12
    assert_fits(rows)
