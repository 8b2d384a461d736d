"""The operator: every backend against float64, dispatch, and what PyTorch does with operators."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kadapt_kernels import KronFactors, kron_delta, kron_linear, ops, reference
from kadapt_kernels.testing import CASES, Case, Problem, exact, failures, make, run, wide

QKV = Case(20, 48, 144, ((0, 4, 12, 12, 16, 1), (96, 4, 12, 12, 16, 1)))
BACKENDS = ["eager", "merge", "triton"]


def apply(problem: Problem, backend: str = "auto", **options: object) -> Tensor:
    p = problem
    options |= {"scale": p.scale, "shifts": p.shifts, "backend": backend}
    return kron_linear(p.x, p.weight, p.bias, p.factors, segments=p.segments, **options)


class Layer(nn.Module):
    """Two adapted layers that share a and b, as the blocks of a model do."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        p = make(Case(8, 48, 48, ((0, 4, 12, 12, 4, 1),)), torch.float32)
        self.rule = nn.ParameterList([p.factors[0].a, p.factors[0].b])
        self.own = nn.ParameterList([t.clone() for _ in range(2) for t in (p.factors[0].u, p.factors[0].v)])
        self.weight = nn.Parameter(p.weight, requires_grad=False)
        self.bias = nn.Parameter(p.bias)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 2):
            factors = [KronFactors(self.rule[0], self.rule[1], self.own[i], self.own[i + 1])]
            x = kron_linear(x, self.weight, self.bias, factors, segments=[(0, 48)], scale=0.1, backend=self.backend)
        return x


@pytest.mark.parametrize("backend", ["eager", "merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_pytorch_backends_are_as_accurate_as_pytorch(name, dtype, backend):
    problem = make(CASES[name]._replace(shifted=True), dtype)
    assert not failures(run(problem, lambda p: apply(p, backend)), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["different adapters", "one row"])
def test_triton_is_as_accurate_as_pytorch(name, dtype):
    """Through the operator; every kernel and case on its own is in test_fused."""
    problem = make(CASES[name]._replace(shifted=True), dtype)
    assert not failures(run(problem, lambda p: apply(p, "triton")), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_full_rules_are_as_accurate_as_pytorch(name, dtype):
    problem = make(CASES[name]._replace(full=True), dtype)
    assert not failures(run(problem, apply), problem)


SMALL = Case(64, 192, 192, ((0, 32, 6, 6, 32, 1),), bias=False)


def contribution_error(found: Tensor, problem: Problem) -> float:
    wanted = problem.x.double() @ kron_delta(wide(problem.factors[0]), problem.scale).t()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [("eager", torch.bfloat16, 0.005), ("eager", torch.float16, 0.0006), ("triton", torch.float16, 0.0006)],
)
def test_keeps_a_small_update_in_16_bits(backend, dtype, limit):
    """The adapter's contribution within 0.5 % (Frobenius) at |ΔW| = |W| / 1000; in fp16 within its eighth of that."""
    problem = make(SMALL, dtype, delta=1e-3)
    alone = Problem(**vars(problem) | {"weight": torch.zeros_like(problem.weight)})
    assert contribution_error(apply(alone, backend), problem) < limit


def test_merging_loses_a_small_update_in_16_bits():
    """Which is why it is not the default there, and why the docstring of kron_linear says so."""
    for delta, low, high in ((1e-2, 0.15, 0.19), (1e-3, 0.7, 0.85)):
        problem = make(SMALL, torch.bfloat16, delta=delta)
        merged = reference.merged_weight(problem.weight, problem.factors, problem.segments, problem.scale, 0.0, 0)
        left = problem.x.double() @ (merged.double() - problem.weight.double()).t()
        assert low < contribution_error(left, problem) < high


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice_and_inputs_unchanged(backend):
    problem = make(QKV, torch.float32)
    tensors = [problem.x, problem.weight, problem.bias, problem.dy, *problem.factors[0], *problem.factors[1]]
    before = [t.clone() for t in tensors]
    first, second = (run(problem, lambda p: apply(p, backend)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    problem = make(QKV._replace(m=0), torch.float32)
    found = run(problem, lambda p: apply(p, backend))
    assert found["y"].shape == (0, 144)
    assert all(
        found[name].shape == t.shape for name, t in zip(("da0", "db0", "du0", "dv0"), problem.factors[0], strict=True)
    )
    assert not any(found[name].any() for name in found if name not in ("y", "dx"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    problem = make(QKV, torch.float32)
    problem.x[5, 3] = torch.nan
    y = apply(problem, backend)
    assert y[5].isnan().all()
    assert not y[torch.arange(len(y)) != 5].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shape_and_strides(backend):
    problem = make(QKV._replace(m=12), torch.float32)
    wide = torch.randn(3, 4, 48, 2)
    wide[..., 0] = problem.x.view(3, 4, 48)
    wanted = apply(problem, backend)
    problem.x = wide[..., 0]
    problem.weight = problem.weight.t().contiguous().t()
    problem.factors = [KronFactors(*(t.mT.contiguous().mT for t in group)) for group in problem.factors]
    torch.testing.assert_close(apply(problem, backend), wanted.view(3, 4, 144), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_sum(backend):
    """dy of a sum is one number expanded: strides of zero."""
    problem = make(QKV, torch.float32)
    x = problem.x.clone().requires_grad_()
    problem.x, problem.dy = x, torch.ones_like(problem.dy)
    apply(problem, backend).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact(problem)["dx"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    problem = make(Case(6, 24, 48, ((0, 4, 6, 6, 4, 1), (24, 4, 6, 6, 3, 2))), torch.float32)
    flat = [t.requires_grad_() for f in problem.factors for t in f]
    arguments = (problem.x.requires_grad_(), problem.weight, problem.bias.requires_grad_(), flat)
    shifts = [torch.ones(24, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(ops._linear, (*arguments, shifts, [0, 24, 24, 48], False, 0.5, backend, 0.0, 0))


@pytest.mark.parametrize("backend", ["eager", "merge"])
def test_gradcheck(backend):
    problem = make(Case(3, 12, 16, ((4, 4, 3, 3, 2, 2),)), torch.float64)

    def function(x: Tensor, bias: Tensor, *flat: Tensor) -> Tensor:
        return apply(Problem(x, problem.weight, bias, [KronFactors(*flat)], problem.segments, 0.7, problem.dy), backend)

    leaves = [t.requires_grad_() for t in (problem.x, problem.bias, *problem.factors[0])]
    assert torch.autograd.gradcheck(function, leaves, check_undefined_grad=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    layer, x = Layer(backend), torch.randn(2, 5, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.rule))
    got = torch.autograd.grad(compiled(x).square().sum(), list(layer.rule))
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)), (
        "the operator computes what eager mode does"
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_computes_in_16_bits_and_keeps_the_factors(compiled):
    layer, x = Layer("eager"), torch.randn(2, 5, 48)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in (*layer.rule, *layer.own, layer.bias)} == {torch.float32}
    assert (y.float() - layer(x)).abs().max() < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    layer, x = Layer(backend), torch.randn(2, 5, 48, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.rule])
    got = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *layer.rule])
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("backend", ["merge", "triton"])
def test_training_with_any_backend_follows_the_same_curve(backend):
    """A teacher's update is learned from zero: the loss halves, alike with every backend."""
    wanted = make(Case(64, 24, 48, ((0, 4, 6, 6, 4, 1),), bias=False), torch.float32)
    target = apply(wanted)

    def losses(backend: str) -> list[float]:
        start = make(Case(64, 24, 48, ((0, 4, 6, 6, 4, 1),), bias=False), torch.float32, seed=1).factors[0]
        flat = [nn.Parameter(t.clone()) for t in start._replace(u=torch.zeros_like(start.u))]
        optimizer = torch.optim.Adam(flat, lr=0.1)
        found = []
        for _ in range(20):
            y = apply(Problem(**vars(wanted) | {"factors": [KronFactors(*flat)]}), backend)
            loss = (y - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    curve = losses(backend)
    assert curve == pytest.approx(losses("eager"), rel=1e-3, abs=1e-4)
    assert curve[-1] < curve[0] / 2


def test_export():
    layer, x = Layer("eager").eval(), torch.randn(2, 5, 48)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def _train_on_two(rank: int, folder: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    layer = nn.parallel.DistributedDataParallel(Layer("eager"))
    layer(torch.randn(3, 48)).square().mean().backward()
    torch.save([p.grad for p in layer.module.parameters() if p.requires_grad], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_averages_the_shared_factors_once(tmp_path: Path):
    torch.multiprocessing.spawn(_train_on_two, (str(tmp_path),), nprocs=2)
    layer, sums = Layer("eager"), None
    for rank in range(2):
        torch.manual_seed(rank)
        layer(torch.randn(3, 48)).square().mean().div(2).backward()
    sums = [p.grad for p in layer.parameters() if p.requires_grad]
    for rank in range(2):
        for got, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), sums, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("full", [False, True])
def test_dropout_zeroes_elements_and_keeps_the_mean(full):
    problem = make(QKV._replace(full=full, bias=False), torch.float32)
    problem.x = torch.eye(48)
    kept = (apply(problem, dropout=0.25, seed=1) - problem.x @ problem.weight.t())[:, :48]
    dense = (apply(problem) - problem.x @ problem.weight.t())[:, :48]
    dropped = kept.abs() < 1e-6
    assert 0.21 < dropped.float().mean() < 0.29  # 2304 elements, 4.4 standard deviations
    torch.testing.assert_close(kept[~dropped], dense[~dropped] / 0.75, rtol=1e-3, atol=1e-4)
    assert torch.equal(apply(problem, dropout=0.25, seed=1), apply(problem, dropout=0.25, seed=1))
    assert not torch.equal(apply(problem, dropout=0.25, seed=1), apply(problem, dropout=0.25, seed=2))


@pytest.mark.parametrize("full", [False, True])
def test_dropout_gradients_are_of_the_elements_kept(full):
    """Linear in every factor alone, so that a difference quotient is exact."""
    problem = make(Case(5, 24, 24, ((0, 4, 6, 6, 3, 1),), full=full), torch.float64)

    def function(*flat: Tensor) -> Tensor:
        factors = [KronFactors(flat[0], None if full else flat[1], flat[-2], flat[-1])]
        p = problem
        return kron_linear(p.x, p.weight, p.bias, factors, segments=p.segments, dropout=0.5, seed=3)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in problem.factors[0] if t is not None])


def test_a_shift_moves_its_segment_alone():
    problem = make(QKV, torch.float32)
    shift = torch.arange(48.0)
    moved = kron_linear(
        problem.x, problem.weight, None, problem.factors, segments=problem.segments, shifts=[None, shift]
    ) - kron_linear(problem.x, problem.weight, None, problem.factors, segments=problem.segments)
    torch.testing.assert_close(moved[:, 96:], shift.expand(20, 48), rtol=1e-5, atol=1e-5)
    assert not moved[:, :96].any()
    with pytest.raises(ValueError, match=r"shift 1 must be \(48,\), torch.float32, on cpu .*, but \(47,\)"):
        apply(Problem(**vars(problem) | {"shifts": [shift, shift[:47]]}))
    with pytest.raises(ValueError, match="one shift or None a segment, but 1 for 2"):
        apply(Problem(**vars(problem) | {"shifts": [shift]}))


def test_dispatch():
    """The table in the docstring of kron_linear, as far as a CPU reaches."""
    few, many = torch.zeros(20, 48), torch.zeros(200, 48)
    problem = make(QKV, torch.float32)
    full = make(QKV._replace(full=True), torch.float32).factors

    def chosen(x: Tensor, backend: str = "auto", factors: list = problem.factors, dropout: float = 0.0) -> str:
        return ops.choose(x, factors, problem.segments, backend, dropout)

    assert chosen(few) == "eager"
    assert chosen(many) == chosen(many.double()) == "merge"
    assert chosen(many.bfloat16()) == "eager"
    assert chosen(few, factors=full) == chosen(few.bfloat16(), dropout=0.5) == "merge"
    assert [chosen(few, backend) for backend in BACKENDS] == BACKENDS
    assert chosen(torch.zeros(200, 48, device="meta")) == "eager"


def test_triton_says_what_it_does_not_take():
    x, segments = torch.zeros(4, 96), [(0, 96)]
    high = make(Case(4, 96, 96, ((0, 4, 24, 24, 33, 2),)), torch.float32).factors
    full = make(Case(4, 96, 96, ((0, 4, 24, 24, 2, 1),), full=True), torch.float32).factors
    low = make(Case(4, 96, 96, ((0, 4, 24, 24, 2, 1),)), torch.float32).factors
    with pytest.raises(ValueError, match=r"T·r up to 64 and no dropout, but T·r = 66 was given; use backend='merge'"):
        ops.choose(x, high, segments, "triton")
    with pytest.raises(ValueError, match="but full A_t was given"):
        ops.choose(x, full, segments, "triton")
    with pytest.raises(RuntimeError, match=r"cannot run: its kernels .* fp32, but x is torch\.float64"):
        ops.choose(x.double(), low, segments, "triton")


def test_triton_without_a_gpu_says_so(monkeypatch):
    from kadapt_kernels import blocks

    monkeypatch.setattr(blocks, "INTERPRETED", type(blocks.INTERPRETED)(False))
    with pytest.raises(RuntimeError, match="cannot run: it needs a GPU, but the device is cpu; use backend='auto'"):
        apply(make(QKV, torch.float32), "triton")
