"""The method `subspace`: what it leaves alone, what it moves, and that it merges."""

import pytest
import torch
from torch.nn import functional as F

from kadapt_cli.adapters import adapt, subspace
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.evaluate import load_backbone
from kadapt_cli.merge import merged_state
from kadapt_cli.models import full_model

CHOICES = [
    {"dims": 50},
    {"dims": 50, "said": True},
    {"dims": 50, "projection": "dense"},
    {"dims": 50, "projection": "sparse"},
    {"projection": "identity"},
]


def adapted_with(targets=("blocks.1.attn", "blocks.4.fc1"), **options):
    config = TrainConfig(method="subspace", targets=targets, **options)
    return adapt(load_backbone(config), config, 3)


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", CHOICES)
def test_it_starts_equal_lives_and_merges(options, images):
    adapted = adapted_with(**options)
    plain = load_backbone(TrainConfig()).module
    with torch.no_grad():
        assert torch.equal(adapted.backbone.module(images[:1]).argmax(), plain(images[:1]).argmax())
        torch.testing.assert_close(adapted.backbone.module(images), plain(images), rtol=1e-5, atol=1e-5)
    adapted.head.start(adapted.backbone.module(images).detach(), torch.tensor([0, 1, 2, 0]))
    optimizer = torch.optim.Adam(adapted.parameters().values(), lr=1e-2)
    module = adapted.module()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    for name, tensor in adapted.adapter.items():
        start = torch.ones_like(tensor) if name.endswith(".factor") else torch.zeros_like(tensor)
        assert (tensor != start).all(), name
    with torch.no_grad():
        moved = module(images)
        assert (moved - adapted.head(plain(images))).abs().max() > 1e-2
        merged = full_model(adapted.backbone, 3).eval()
        merged.load_state_dict(merged_state(adapted, plain.state_dict(), torch.float32)[0])
        torch.testing.assert_close(merged(images), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", CHOICES)
def test_only_the_targets_move_and_by_s_p_z(options):
    adapted = adapted_with(**options)
    plain = load_backbone(TrainConfig()).module.state_dict()
    with torch.no_grad():
        for tensor in adapted.adapter.values():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    merged = merged_state(adapted, plain, torch.float64)[0]
    changed = {key for key, tensor in plain.items() if not torch.equal(merged[key], tensor.double())}
    weights = {"blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight", "blocks.4.mlp.fc1.weight"}
    assert changed == weights
    dims = 2 * 4 * 192**2 if options.get("projection") == "identity" else 50
    assert sum(tensor.numel() for tensor in adapted.adapter.values()) == adapted.config.dims == dims
    if not options.get("said"):
        moved = torch.cat([(merged[key] - plain[key]).flatten() for key in sorted(weights)])
        size = 1 if options.get("projection") == "identity" else 16 * adapted.adapter["z"].detach().norm() / dims**0.5
        assert moved.std().item() == pytest.approx(float(size), rel=0.1)


def test_rows_between_targets_stay_and_direct_training_is_plain_training(images):
    """With the identity, z's gradient is the weight's own, in the rows of v and no others."""
    adapted = adapted_with(targets=("blocks.2.v",), projection="identity")
    plain = load_backbone(TrainConfig()).module
    weight = plain.blocks[2].attn.qkv.weight.requires_grad_()
    plain(images).square().sum().backward()
    adapted.backbone.module(images).square().sum().backward()
    torch.testing.assert_close(
        adapted.adapter["blocks.2.v.z"].grad.view(192, 192), weight.grad[384:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 36865}, r"--dims: 36865 was given, but the targets have D = 36,864 weights; give at most as many"),
        ({"dims": 5, "projection": "identity"}, r"D = 36,864 weights; leave it out, as --projection identity trains"),
        ({"dims": 1, "said": True}, r"--dims: --said takes one of them for each of 1 tensors; give more than 1"),
        (
            {"said": True, "projection": "identity"},
            r"--said: is for a random projection, but --projection identity was",
        ),
        ({"dims": 20000, "projection": "dense"}, r"--projection dense: 20,000 columns of 36,864 numbers need 3 GB"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(UsageError, match=message):
        adapted_with(targets=("blocks.2.v",), **options)


def test_a_seed_is_a_subspace():
    def drawn(seed):
        config = TrainConfig(method="subspace", dims=9, seed=seed)
        found = subspace.pieces(adapted_with(dims=9).segments, config.model_copy(update={"scale": 1.0}))
        return torch.cat([projection.multiply(torch.ones(9)) for _, _, projection, _ in found])

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_a_step_is_that_of_direct_training_at_d_equal_to_all():
    assert adapted_with(targets=("blocks.2.v",), dims=36864).config.scale == 1
    assert adapted_with(targets=("blocks.2.v",), dims=9216).config.scale == 4  # √4 · √4
    assert adapted_with(targets=("blocks.2.v",), dims=9).config.scale == 16 * 64
