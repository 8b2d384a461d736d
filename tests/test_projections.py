"""Random projections: what they are on the dense matrix in float64, their gradients, their memory."""

import pytest
import torch

from kadapt_cli import projections
from kadapt_cli.adapters import subspace
from kadapt_cli.projections import Dense, Fastfood, Identity, MovedLinear, Projection, Sparse
from kadapt_cli.surgery import Segment

SIZE, DIMS = 1000, 37


def drawn(kind: str, size: int = SIZE, dims: int = DIMS, seed: int = 0) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    if kind == "identity":
        return Identity(size).double()
    return {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}[kind](size, dims, generator).double()


def matrix(projection: Projection) -> torch.Tensor:
    return torch.stack([projection.multiply(z) for z in torch.eye(projection.dims, dtype=torch.float64)], 1)


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
@pytest.mark.parametrize(("size", "dims"), [(SIZE, DIMS), (64, 64), (1, 1), (5, 4), (300_000, 3), (4097, 1)])
def test_the_adjoint_is_that_of_the_dense_matrix(kind, size, dims):
    projection = drawn(kind, size, dims)
    p = matrix(projection)
    g = torch.randn(size, dtype=torch.float64)
    assert p.shape == (size, dims)
    torch.testing.assert_close(projection.adjoint(g.clone()), p.T @ g, rtol=1e-12, atol=1e-12)


def test_the_identity_gives_z_in_fresh_memory():
    z = torch.arange(3.0)
    found = Identity(3).multiply(z)
    assert torch.equal(found, z)
    assert found.data_ptr() != z.data_ptr()


@pytest.mark.parametrize(("kind", "off"), [("fastfood", 0.1), ("dense", 1e-5), ("sparse", 0.1)])
def test_columns_have_length_one_and_are_nearly_orthogonal(kind, off):
    p = matrix(drawn(kind, 20_000, 100))
    lengths = p.norm(dim=0)
    assert (lengths - 1).abs().max() < off
    assert (p.T @ p - torch.diag(lengths.square())).abs().max() < 0.05  # √(2 ln 100² / 20,000) = 0.03 for normal ones


def test_fastfood_entries_are_normal_numbers():
    """A sum of a column's products that dense Gaussian columns have, and that plain Hadamard columns have not."""
    p = matrix(drawn("fastfood", 20_000, 100)) * 20_000**0.5
    assert p.mean().abs() < 0.01
    assert (p.pow(2).mean() - 1).abs() < 0.02
    assert (p.pow(4).mean() - 3).abs() < 0.15
    rows = p @ p[:128].T / 100
    assert rows[128:].pow(2).mean().sqrt() < 0.105  # of other blocks: 1/√100, as for independent rows
    assert (rows[:128] - torch.diag(rows[:128].diagonal())).pow(2).mean().sqrt() < 0.2  # of one block


def test_two_columns_are_no_permutations_of_each_other():
    """Without Π they would be, block by block."""
    p = matrix(drawn("fastfood", 64, 64)).abs().sort(dim=0).values
    assert all(not torch.allclose(p[:, 0], p[:, k]) for k in range(1, 64))


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_a_seed_gives_one_projection(kind):
    assert torch.equal(matrix(drawn(kind, seed=1)), matrix(drawn(kind, seed=1)))
    assert not torch.equal(matrix(drawn(kind, seed=1)), matrix(drawn(kind, seed=2)))


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse", "identity"])
@pytest.mark.parametrize(("biased", "shape"), [(True, (2, 3, 10)), (False, (3, 10)), (True, (10,))])
def test_gradients_are_autograds_on_the_dense_matrix(kind, biased, shape):
    dims = 60 if kind == "identity" else 7
    projection, weight = drawn(kind, 60, dims), torch.randn(6, 10, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64) if biased else None
    p, x = matrix(projection), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    z = torch.randn(dims, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = MovedLinear.apply(x, z, scale, weight, bias, projection)
    dense = torch.nn.functional.linear(x, weight + (scale * (p @ z)).view(6, 10), bias)
    torch.testing.assert_close(y, dense, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y.sin().sum(), (x, z, scale))
    wanted = torch.autograd.grad(dense.sin().sum(), (x, z, scale))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_autocast_multiplies_in_16_bits_and_moves_in_32(kind):
    projection, weight = drawn(kind, 60, 7).float(), torch.randn(6, 10)
    x, z, one = torch.randn(3, 10, requires_grad=True), torch.randn(7, requires_grad=True), torch.tensor(1.0)
    p = torch.stack([projection.multiply(unit) for unit in torch.eye(7)], 1)
    moved = weight + (p @ z).view(6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = MovedLinear.apply(x, z, one, weight, None, projection)
        dense = torch.nn.functional.linear(x, moved)
        torch.testing.assert_close(projections._moved(z.detach(), one, weight, projection), moved, rtol=1e-5, atol=1e-5)
    assert y.dtype == torch.bfloat16
    found, wanted = (torch.autograd.grad(out.float().square().sum(), (x, z)) for out in (y, dense))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("shape", "dims", "most"),
    [
        ((2048, 2048), 64, 2.1),
        ((3072, 768), 1024, 2.2),
        ((3072, 768), 16384, 2.3),
        ((768, 768), 32768, 2.7),  # near a sixteenth of D, where the probe's own grid ends
        ((192, 192), 8, 2.3),
        ((3072, 768), 262144, 3.2),  # a ninth of D
    ],
)
def test_memory_is_two_numbers_a_weight_and_eleven_a_dimension(shape, dims, most):
    """G, and the moved weight or its gradient; all else, the optimizer's too, is of the size of d."""
    size = shape[0] * shape[1]
    projection = Fastfood(size, dims, torch.Generator().manual_seed(0))
    weight, x = torch.randn(shape), torch.randn(4, shape[1], requires_grad=True)
    z, scale = torch.zeros(dims, requires_grad=True), torch.tensor(1.0)
    optimizer = torch.optim.AdamW([z], lr=1e-3)
    kept = sum(b.numel() * b.element_size() for b in projection.buffers()) + 4 * 4 * dims  # z, gradient, two moments

    def step() -> None:
        optimizer.zero_grad()
        MovedLinear.apply(x, z, scale, weight, None, projection).sum().backward()
        optimizer.step()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert (kept + peak) / (4 * size) < most
    whole = Segment(0, "fc1", "blocks.0.mlp.fc1", 0, shape[0], shape[1], None, 0)
    activations = 4 * 2 * sum(shape)  # x, y and their gradients
    assert kept + peak <= 4 * (subspace.training_numbers([whole], dims) + activations)
