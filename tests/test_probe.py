"""Intrinsic dimension: curves, a planted case, the selection, and probes of real photos from end to end."""

import math

import pytest
import torch
from torch import nn

from kadapt_cli import probe
from kadapt_cli.adapters.subspace import SubspaceLinear
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import folds, open_images
from kadapt_cli.errors import UsageError
from kadapt_cli.evaluate import load_backbone
from kadapt_cli.probe.dimension import Dimension, choose, crossing, explore, grid, halfway, over_seeds
from kadapt_cli.projections import Fastfood


def test_the_grid_is_of_powers_of_eight_up_to_a_quarter():
    assert grid(255) == [8]
    assert grid(256) == [8, 64]
    assert grid(147456) == [8, 64, 512, 4096, 32768]
    assert grid(3) == [3]


@pytest.mark.parametrize(
    ("curve", "target", "wanted"),
    [
        ({0: 0.2, 4: 0.3, 16: 0.5, 64: 0.9}, 0.7, Dimension(math.sqrt(17 * 65) - 1, 16, 64)),
        ({0: 0.2, 4: 0.6, 16: 0.5, 64: 0.9}, 0.55, Dimension(5 ** (0.35 / 0.4) - 1, 0, 4)),
        ({0: 0.2, 4: 0.3}, 0.7, Dimension(None, 4, None)),
        ({0: 0.8, 4: 0.9}, 0.7, Dimension(0, 0, 0)),
        ({0: 0.2, 4: 0.7}, 0.7, Dimension(4, 0, 4)),
    ],
)
def test_where_a_curve_reaches_its_target(curve, target, wanted):
    found = crossing(curve, target)
    assert found[1:] == wanted[1:]
    assert found.d == (None if wanted.d is None else pytest.approx(wanted.d))


def test_the_bisection_halves_the_gap_until_nothing_is_between():
    curve = {0: 0.0, 16: 0.1, 64: 0.9}
    assert halfway(curve, 0.5) == round(math.sqrt(17 * 65)) - 1
    assert halfway({0: 0.0, 1: 0.9}, 0.5) is None
    assert halfway({0: 0.0, 64: 0.1}, 0.5) is None
    found = explore(lambda d: float(d >= 40), [4, 16, 64, 256], zero=0.0, target=0.9, refine=9)
    assert crossing(found, 0.9)[1:] == (39, 40)
    assert set(explore(lambda d: 0.5, [4, 16], zero=0.0, target=0.4, refine=9, least=9)) == {0, 9, 16}


def test_seeds_are_combined_in_the_logarithm():
    both = over_seeds([Dimension(3, 1, 4), Dimension(15, 9, 16)])
    assert both.d == pytest.approx(7)
    assert both[1:] == (1, 16)
    assert over_seeds([Dimension(3, 1, 4), Dimension(None, 64, None)]) == (None, 1, None)
    assert over_seeds([]) == (None, None, None)


def test_the_selection_takes_the_lowest_that_the_budget_pays():
    modules = [
        {"name": "a", "d90": 9.0, "direct": 0.5},
        {"name": "b", "d90": 4.0, "direct": 0.5},
        {"name": "c", "d90": None, "direct": 0.9},
        {"name": "d", "d90": 4.0, "direct": 0.6},
        {"name": "e", "d90": 50.0, "direct": 0.5},
    ]
    price = {"a": 5, "b": 3, "c": 1, "d": 3, "e": 1}
    assert choose(modules, lambda names: sum(price[n] for n in names), 8) == ["d", "b", "e"]
    assert choose(modules, lambda names: 100, 8) == []


class Planted(nn.Module):
    """y = W2 W1 x. Four inputs, W2 of rank four and sixteen outputs: what W1 can change of the outputs has 4 · 4
    dimensions, what W2 can 4 · 16. The task is a change that either layer can make."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)
        left, right = (nn.init.orthogonal_(torch.empty(n, 4), generator=generator) for n in (16, 32))
        with torch.no_grad():
            self.first.weight.copy_(nn.init.orthogonal_(torch.empty(32, 32), generator=generator))
            self.second.weight.copy_(left @ right.T)
        self.x = torch.eye(32)[:4]
        self.target = self(self.x).detach() + torch.randn(4, 4, generator=generator) @ left.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))

    def score(self, layer: str, d: int, seed: int) -> float:
        """The share of the change that is learnt when `layer` moves in d dimensions."""
        frozen = getattr(self, layer)
        start = (self(self.x) - self.target).square().sum().item()
        z = nn.Parameter(torch.zeros(d))
        moving = SubspaceLinear(frozen.weight.detach(), None, z)
        moving.rows, moving.scales, moving.factors = [(0, frozen.out_features)], [1.0], [None]
        moving.projections.append(Fastfood(frozen.weight.numel(), d, torch.Generator().manual_seed(seed)))
        setattr(self, layer, moving)
        optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (self(self.x) - self.target).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        end = (self(self.x) - self.target).square().sum().item()
        setattr(self, layer, frozen)
        return 1 - end / start


def test_a_planted_dimension_is_found():
    found: dict[str, list[Dimension]] = {"first": [], "second": []}
    for seed in range(5):
        net = Planted(seed)
        for layer, dimensions in found.items():
            score = lambda d, layer=layer: net.score(layer, d, seed)  # noqa: B023, E731
            curve = explore(score, [4, 16, 64, 256], zero=0.0, target=0.9, refine=3)
            dimensions.append(crossing(curve, 0.9))
    first, second = over_seeds(found["first"]), over_seeds(found["second"])
    assert 8 <= first.d <= 32  # 16 within a factor of two
    assert 32 <= second.d <= 128
    assert all(a.d < b.d for a, b in zip(found["first"], found["second"], strict=True))


def plan(data, **changes) -> probe.Plan:
    own = {"shots": 4, "epochs": 3, "batch_size": 8, **changes.pop("base", {})}
    base = TrainConfig(data=str(data), method="subspace", augment="none", **own)
    return probe.Plan(base, **{"dims": (4, 64), "refine": 1, "folds": 2, "groups": ("attn",), **changes})


class Quiet(probe.Display):
    def __init__(self) -> None:
        from rich.console import Console

        super().__init__(Console(stderr=True), quiet=True)


def test_every_image_validates_once(photos):
    images = open_images(str(photos), shots=5, seed=0, val="none")
    parts = folds(images, 5)
    every = [sample for part in parts for sample in part.splits["val"]]
    assert sorted(s.path for s in every) == sorted(s.path for s in images.splits["train"])
    for part in parts:
        assert not set(part.splits["val"]) & set(part.splits["train"])
        assert sorted(s.label for s in part.splits["val"]) == [0, 1, 2]
        assert part.splits["test"] == images.splits["test"]


def test_candidates_are_patterns_of_targets():
    backbone = load_backbone(TrainConfig())
    found = probe.candidates(backbone, ("attn", "fc1", "blocks"), "block")
    assert [c.name for c in found[:2]] == ["blocks.0.attn", "blocks.1.attn"]
    assert {c.group: c.size for c in found} == {"attn": 4 * 192**2, "fc1": 4 * 192**2, "blocks": 12 * 192**2}
    assert [c.name for c in probe.candidates(backbone, ("attn", "blocks"), "model")] == ["attn", "blocks.*"]
    for candidate in [*found, *probe.candidates(backbone, ("mlp", "blocks"), "model")]:
        chosen = probe.select(probe.segments(backbone.module), [candidate.name])
        assert sum(map(probe.subspace.size, chosen)) == candidate.size
        assert len(chosen) == candidate.tensors
    with pytest.raises(UsageError, match=r"--groups: 'atn' matches nothing in vit32; it has attn, mlp, q, k, v, proj"):
        probe.candidates(backbone, ("atn",), "block")
