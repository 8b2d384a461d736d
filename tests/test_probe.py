"""Intrinsic dimension: curves, a planted case, the selection, and probes of real photos from end to end."""

import json
import math
import signal
import tomllib
from dataclasses import replace

import pytest
import torch
from torch import nn

from kadapt_cli import probe, runs, signals
from kadapt_cli.adapters import subspace
from kadapt_cli.adapters.subspace import Part, SubspaceLinear
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import folds, open_images
from kadapt_cli.errors import DivergedError, InterruptedRunError, UsageError
from kadapt_cli.evaluate import load_backbone
from kadapt_cli.probe.dimension import Dimension, choose, crossing, explore, grid, halfway, over_seeds
from kadapt_cli.projections import Fastfood


def test_the_grid_is_of_powers_of_eight_up_to_a_sixteenth():
    assert grid(1023) == [8]
    assert grid(1024) == [8, 64]
    assert grid(147456) == [8, 64, 512, 4096]
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
        {"name": "a", "d90": 9.0, "d90_full": 90.0, "direct": 0.5},
        {"name": "b", "d90": 4.0, "d90_full": None, "direct": 0.5},
        {"name": "c", "d90": None, "d90_full": 7.0, "direct": 0.9},
        {"name": "d", "d90": 4.0, "d90_full": 200.0, "direct": 0.6},
        {"name": "e", "d90": 50.0, "d90_full": 60.0, "direct": 0.5},
        {"name": "f", "d90": 0.0, "d90_full": 0.0, "direct": 0.9},  # the head alone reaches the target
    ]
    price = {"a": 5, "b": 3, "c": 1, "d": 3, "e": 1, "f": 1}
    assert choose(modules, lambda names: sum(price[n] for n in names), 8) == ["d", "b", "e"]
    assert choose(modules, lambda names: 100, 8) == []
    assert choose(modules, lambda names: sum(price[n] for n in names), 8, "d90_full") == ["c", "e", "a"]


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
        moving = SubspaceLinear(frozen.weight.detach(), None)
        projection = Fastfood(frozen.weight.numel(), d, torch.Generator().manual_seed(seed))
        moving.add(Part(0, frozen.out_features, z, 1.0, None, projection), "whole")
        setattr(self, layer, moving)
        optimizer = torch.optim.LBFGS([z], max_iter=60, line_search_fn="strong_wolfe")

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
        assert len(chosen) == len(candidate.members)
    with pytest.raises(UsageError, match=r"--groups: 'atn' matches nothing in vit32; it has attn, mlp, q, k, v, proj"):
        probe.candidates(backbone, ("atn",), "block")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, request):
    """A probe of two groups over all blocks: its folder, plan and document."""
    tasks = request.getfixturevalue("tasks")
    out = tmp_path_factory.mktemp("probe") / "out"
    wanted = plan(tasks / "flowers5", groups=("q", "fc1"), per="model")
    return out, wanted, probe.probe(wanted, out, Quiet())


def test_a_probe_writes_what_it_found(measured):
    out, _, document = measured
    assert json.loads((out / "probe.json").read_text()) == document
    assert document["schema_version"] == 1
    baseline = document["baseline"]
    assert baseline["chance"] == 0.2
    trials = {trial["name"]: trial for trial in baseline["trials"]}
    assert {name: trial["score"] for name, trial in trials.items()} == {key: baseline[key] for key in ("full", "head")}
    assert (trials["head"]["d"], trials["head"]["lr"]) == (0, 1e-3)
    assert [m["name"] for m in document["modules"]] == ["q", "fc1"]
    for module in document["modules"]:
        keys = {"name", "D", "direct", "d90", "d90_low", "d90_high", "trials"}
        assert keys <= module.keys()
        tried = [t["d"] for t in module["trials"]]
        assert {"direct", 4, 64} <= set(tried)
        assert len(tried) == len(set(tried)) <= 4  # one halving at most
        assert all(t.keys() == {"d", "seed", "lr", "score"} for t in module["trials"])
        target = 0.9 * module["direct"]
        curve = {t["d"]: t["score"] for t in module["trials"] if t["d"] != "direct"}
        curve[0] = baseline["head"]
        if module["d90"] is not None:
            assert module["d90_low"] <= module["d90"] <= module["d90_high"]
            assert curve[module["d90_high"]] >= target
    assert set(document["selected"]) <= {"q", "fc1"}
    assert (out / "probe.csv").read_text().count("\n") == 3 + sum(len(m["trials"]) for m in document["modules"])
    assert (out / "probe.svg").read_text().startswith("<svg")


def test_a_second_probe_trains_nothing_and_another_threshold_uses_what_is_there(measured, monkeypatch):
    out, wanted, document = measured
    monkeypatch.setattr(probe, "fit", None)
    assert probe.probe(wanted, out, Quiet()) == document
    other = probe.probe(replace(wanted, threshold=0.5, refine=0), out, Quiet())
    for module, before in zip(other["modules"], document["modules"], strict=True):
        assert [t["d"] for t in module["trials"]] == ["direct", 4, 64]
        assert all(trial in before["trials"] for trial in module["trials"])
    changed = replace(wanted, base=wanted.base.model_copy(update={"epochs": 4}))
    with pytest.raises(UsageError, match=r"holds a study made with epochs 3, not 4"):
        probe.probe(changed, out, Quiet())


def test_trials_of_other_images_are_refused(photos, tmp_path, monkeypatch):
    def score(self, seed, name, d="direct"):
        return 0.9

    monkeypatch.setattr(probe.Prober, "score", score)
    probe.probe(plan(photos, per="model"), tmp_path / "out", Quiet())
    probe.probe(plan(photos, per="model"), tmp_path / "out", Quiet())
    first = sorted((photos / "rose").iterdir())
    for photo in first[:6]:
        photo.unlink()
    with pytest.raises(UsageError, match=r"photos is not what the trials in --out were made with: images were added"):
        probe.probe(plan(photos, per="model"), tmp_path / "out", Quiet())


def test_a_stopped_probe_goes_on_to_the_same_numbers(measured, tmp_path, monkeypatch):
    _, wanted, document = measured
    real, count = probe.fit, 0

    def fit(session, display):
        nonlocal count
        count += 1
        if count == 7:
            raise InterruptedRunError("SIGINT: stopped", 130)
        real(session, display)

    monkeypatch.setattr(probe, "fit", fit)
    with pytest.raises(InterruptedRunError, match=r"stopped: 3 trials are kept; the same command goes on") as caught:
        probe.probe(wanted, tmp_path / "out", Quiet())
    assert caught.value.exit_code == 130
    assert not (tmp_path / "out" / "probe.json").exists()
    assert probe.probe(wanted, tmp_path / "out", Quiet()) == document
    trials = 2 + sum(len(m["trials"]) for m in document["modules"])
    assert count == 1 + 2 * trials  # two folds each; the interrupted one was done again


def test_ctrl_c_between_two_trainings_says_what_is_kept(photos, tmp_path, monkeypatch):
    def score(self, seed, name, d="direct"):
        self.scores[name, str(d), seed] = 0.9
        if d == 64:
            raise signals.Stopped(signal.SIGINT)
        return 0.9

    monkeypatch.setattr(probe.Prober, "score", score)
    with pytest.raises(InterruptedRunError, match=r"stopped: 5 trials are kept; the same command goes on") as caught:
        probe.probe(plan(photos, per="model"), tmp_path / "out", Quiet())
    assert caught.value.exit_code == 130


def test_what_is_no_better_than_chance_has_no_dimension(tasks, tmp_path, monkeypatch):
    tried, said = [], []

    def score(self, seed, name, d="direct"):
        tried.append(d)
        return 0.9 if name == "full" else 0.25

    monkeypatch.setattr(probe.Prober, "score", score)
    monkeypatch.setattr(Quiet, "say", lambda self, line: said.append(line))
    document = probe.probe(plan(tasks / "flowers5", per="model"), tmp_path / "out", Quiet())
    (module,) = document["modules"]
    assert (module["d90"], module["d90_low"], module["d90_high"], module["d90_full"]) == (None, None, None, None)
    assert module["reason"] == "trained directly it scores 25.0%, no better than chance (34.7% at 95 %)"
    assert said == [f"attn: {module['reason']}"]
    assert set(tried) == {0, "direct"}  # no d is tried for what cannot have one
    assert document["selected"] == []
    with pytest.raises(UsageError, match=r"selected nothing; see the reasons in it"):
        probe.read_selection(tmp_path / "out" / "probe.json")


def test_full_fine_tuning_at_chance_is_no_target(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(probe.Prober, "score", lambda self, seed, name, d="direct": 0.25 if name == "full" else 0.9)
    (module,) = probe.probe(plan(tasks / "flowers5", per="model"), tmp_path / "out", Quiet())["modules"]
    assert (module["d90"], module["d90_full"]) == (0, None)


def test_what_else_the_folder_holds_does_not_matter(tasks, tmp_path, monkeypatch):
    """The same command finds the same dimension, whatever was tried before in its folder."""
    real = {0: 0.1, 4: 0.9, 8: 0.5, 64: 0.6, 512: 0.9, "direct": 0.9}
    monkeypatch.setattr(probe.Prober, "_fold", lambda self, config, material: real[config.dims or 0])
    direct = lambda self, seed, name, d: config(self, seed, name, d).model_copy(  # noqa: E731
        update={"dims": d if name == "attn" else {"head": 0}.get(name, "direct")}
    )
    config = probe.Prober._config
    monkeypatch.setattr(probe.Prober, "_config", direct)
    wanted = plan(tasks / "flowers5", per="model", dims=(8, 64, 512), refine=0)
    alone = probe.probe(wanted, tmp_path / "alone", Quiet())
    probe.probe(replace(wanted, dims=(4, 8)), tmp_path / "both", Quiet())
    assert probe.probe(wanted, tmp_path / "both", Quiet())["modules"][0]["d90"] == alone["modules"][0]["d90"]
    assert alone["modules"][0]["d90_low"] == 64


def test_seeds_are_measured_apart_and_reported_together(tasks, tmp_path, monkeypatch):
    scores = {0: {0: 0.1, 4: 0.9, 64: 0.9, "direct": 0.9}, 1: {0: 0.1, 4: 0.2, 64: 0.9, "direct": 1.0}}
    monkeypatch.setattr(probe.Prober, "score", lambda self, seed, name, d="direct": scores[seed][d])
    wanted = plan(tasks / "flowers5", per="model", seeds=(0, 1), refine=0)
    document = probe.probe(wanted, tmp_path / "out", Quiet())
    (module,) = document["modules"]
    assert document["seeds"] == [0, 1]
    assert module["direct"] == pytest.approx(0.95)
    assert (module["d90_low"], module["d90_high"]) == (0, 64)
    low, high = 5 ** (0.71 / 0.8), 5 * 13  # 1 + d of seed 0; of seed 1 the end, whose target is the score at 64
    assert module["d90"] == pytest.approx((low * high) ** 0.5 - 1)


def test_above_the_head_the_target_is_a_part_of_the_gain(tasks, tmp_path, monkeypatch):
    scores = {0: 0.5, 4: 0.6, 64: 0.9, "direct": 0.9}
    monkeypatch.setattr(probe.Prober, "score", lambda self, seed, name, d="direct": scores[d])
    wanted = plan(tasks / "flowers5", per="model", threshold=0.5, refine=0)
    of_all, of_gain = (
        probe.probe(replace(wanted, above=above), tmp_path / above, Quiet())["modules"][0] for above in ("zero", "head")
    )
    assert of_all["d90"] == 0  # 0.45, less than the head alone has
    assert (of_gain["d90_low"], of_gain["d90_high"]) == (4, 64)  # 0.7


@pytest.mark.parametrize("options", [{"projection": "dense"}, {"projection": "sparse"}, {"said": True}])
def test_the_other_subspaces_are_measured_too(tasks, tmp_path, options):
    wanted = plan(tasks / "flowers5", groups=("q",), per="model", dims=(16,), refine=0, base={"epochs": 1} | options)
    document = probe.probe(wanted, tmp_path / "out", Quiet())
    assert {key: document[key] for key in options} == options
    assert {t["d"] for t in document["modules"][0]["trials"]} <= {"direct", 16}


def test_the_grid_leaves_out_what_cannot_be_stored(monkeypatch):
    backbone = load_backbone(TrainConfig())
    (whole,) = probe.candidates(backbone, ("mlp",), "model")  # D = 1,769,472
    dims = {kind: probe._dims(plan("x", dims=None, base={"projection": kind}), whole) for kind in ("dense", "sparse")}
    assert dims == {"dense": [8, 64], "sparse": [8, 64, 512, 4096]}
    assert probe._dims(plan("x", dims=None), whole) == [8, 64, 512, 4096, 32768]
    (attention,) = probe.candidates(backbone, ("attn",), "model")  # 24 small weights, D = 884,736
    assert probe._dims(plan("x", dims=None), attention) == [8, 64, 512, 4096]
    for candidate in (whole, attention):
        for d in probe._dims(plan("x", dims=None), candidate):
            config = subspace.resolve(TrainConfig(method="subspace", dims=d), candidate.members)
            drawn = subspace.pieces(candidate.members, config)
            stored = sum(b.nbytes for *_, projection, _ in drawn for b in projection.buffers()) / 4
            assert stored == subspace.stored_bytes(candidate.members, "fastfood", d) / 4
            assert stored + max(map(subspace.size, candidate.members)) + 8 * d < 3 * candidate.size


def test_the_selection_keeps_to_its_budget(tasks, tmp_path, monkeypatch):
    def score(self, seed, name, d="direct"):
        return 0.9 if d == "direct" or (name == "blocks.4.q" and d == 4) or d == 64 else 0.1

    monkeypatch.setattr(probe.Prober, "score", score)
    wanted = plan(tasks / "flowers5", groups=("q",), budget=2 * 32**2 + 12 * 32 + 192)  # of one block's q
    assert probe.probe(wanted, tmp_path / "out", Quiet())["selected"] == ["blocks.4.q"]


def test_the_selection_by_full_fine_tuning_has_one_target_for_all(tasks, tmp_path, monkeypatch):
    """blocks.1.q needs more dimensions, but for a higher score: the only one that is near full fine-tuning."""
    scores = {"full": {"direct": 0.9}, "head": {0: 0.1}, "blocks.1.q": {"direct": 0.9, 4: 0.3, 64: 0.9}}

    def score(self, seed, name, d="direct"):
        return scores.get(name, {"direct": 0.5, 4: 0.5, 64: 0.5})[d]

    monkeypatch.setattr(probe.Prober, "score", score)
    wanted = plan(tasks / "flowers5", groups=("q",), keep=1, refine=0)
    assert probe.probe(wanted, tmp_path / "direct", Quiet())["selected"] == ["blocks.0.q"]
    assert probe.probe(replace(wanted, rank_by="full"), tmp_path / "full", Quiet())["selected"] == ["blocks.1.q"]


def test_a_trial_that_diverges_counts_as_nothing_and_is_said(photos, tmp_path, monkeypatch):
    real, said = probe.fit, []

    def fit(session, display):
        if session.config.dims == 64:
            raise DivergedError("the loss is not finite at step 3")
        real(session, display)

    monkeypatch.setattr(probe, "fit", fit)
    monkeypatch.setattr(Quiet, "say", lambda self, line: said.append(line))
    document = probe.probe(plan(photos, per="model", refine=0), tmp_path / "out", Quiet())
    scores = {t["d"]: t["score"] for t in document["modules"][0]["trials"]}
    assert scores[64] == 0 < scores[4]
    assert said.count("counts as 0: the loss is not finite at step 3") == 2


def test_a_target_that_is_not_reached_has_a_lower_end_only(tasks, tmp_path, monkeypatch):
    scores = {"direct": 0.9, 0: 0.2, 4: 0.3, 64: 0.5}
    monkeypatch.setattr(probe.Prober, "score", lambda self, seed, name, d="direct": scores[d])
    document = probe.probe(plan(tasks / "flowers5", per="model"), tmp_path / "out", Quiet())
    (module,) = document["modules"]
    assert (module["d90"], module["d90_low"], module["d90_high"]) == (None, 64, None)
    assert module["reason"] == "no d up to 64 reached its target with every seed"


def test_train_adapts_exactly_the_selection(run_cli, measured, tmp_path):
    document = measured[2]
    chosen = tmp_path / "probe.json"
    chosen.write_text(json.dumps(runs.sealed(document | {"selected": ["blocks.2.fc1", "blocks.0.q"]})))
    data = ("--data", document["data"], "--shots", 5)
    code, text, _ = run_cli("train", *data, "--targets", chosen, "--dry-run", "--json")
    assert code == 0
    counts = json.loads(text)["parameters"]
    assert counts["adapter"] == 4 * 32**2 + (6 + 6) * 32 + 192 + (24 + 6) * 32  # rules; q's u, v and bias; fc1's u, v
    with_glob = run_cli("train", *data, "--targets", "blocks.2.fc1,blocks.0.q", "--dry-run", "--json")
    assert json.loads(with_glob[1])["parameters"] == counts
    (tmp_path / "bad.json").write_text("[1, 2]")
    (tmp_path / "edited.json").write_text(json.dumps(document | {"selected": ["blocks.2.fc1"]}))
    for name, wanted, words in (
        ("none.json", 2, "cannot be read"),
        ("bad.json", 4, "is no probe.json of kadapt"),
        ("edited.json", 4, "is not as it was written"),
    ):
        code, _, errors = run_cli("train", *data, "--targets", tmp_path / name, "--dry-run")
        assert code == wanted
        assert words in errors


def test_train_probes_first_when_asked_to(run_cli, tasks, tmp_path, monkeypatch):
    def score(self, seed, name, d="direct"):
        """blocks.4.mlp needs least."""
        return {"direct": 0.9, 0: 0.3, 16: 0.85 if name == "blocks.4.mlp" else 0.4, 256: 0.85, 4096: 0.9}[d]

    monkeypatch.setattr(probe.Prober, "score", score)
    data = ("--data", tasks / "flowers5", "--shots", 4, "--epochs", 1, "--targets", "auto")
    code, _, errors = run_cli("train", *data, "--out", tmp_path / "run", "--json")
    assert code == 0, errors
    selected = json.loads((tmp_path / "run-probe" / "probe.json").read_text())["selected"]
    assert selected[0] == "blocks.4.mlp"
    assert len(selected) == 6
    with (tmp_path / "run" / "config.toml").open("rb") as file:
        assert tomllib.load(file)["targets"] == selected
    assert run_cli("train", *data, "--out", tmp_path / "other", "--dry-run")[0] == 2
    code, _, errors = run_cli("train", "--data", tasks / "flowers5", "--shots", 1, "--val", "none", "--targets", "auto")
    assert (code, "--targets: auto holds images out and takes --shots 2 or more" in errors) == (2, True)


WRONG = [
    (
        ["--groups", "attn,conv"],
        "--groups: 'conv' matches nothing in vit32; it has attn, mlp, q, k, v, proj,",
    ),
    (
        ["--dims", "4,147457"],
        "--dims: 147457 was given, but blocks.0.attn has D = 147,456 weights; give numbers",
    ),
    (["--dims", "0"], "--dims: 0 was given, but blocks.0.attn has D = 147,456 weights"),
    (["--dims", "many"], "--dims: whole numbers from 0 were expected, separated by commas, 'many' given"),
    (["--said", "--dims", "4"], "and --said takes 4 of d; give numbers from 5 to 147456"),
    (["--threshold", "1"], "--threshold: a number between 0 and 1 was expected, 1 given"),
    (["--threshold", "0"], "--threshold: a number between 0 and 1 was expected, 0 given"),
    (["--folds", "6"], "--folds: 6 folds of 5 shots a class; give at most as many"),
    (["--budget", "9"], "--budget: 9 parameters were given, but the cheapest module takes"),
    (
        ["--projection", "dense", "--dims", "8,32768"],
        "--projection dense: 32,768 columns of 147,456 numbers need 19 GB; give fewer --dims, or use fastfood",
    ),
    (["--keep", "2", "--budget", "9"], "--keep: was given beside --budget; give one of them"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_wrong_options_leave_nothing_behind(run_cli, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    code, out, errors = run_cli("probe-id", *options)
    assert (code, out) == (2, "")
    assert words in errors
    assert list(tmp_path.iterdir()) == []


def test_probe_id_shows_its_table_and_prints_its_json(run_cli, measured, tmp_path):
    out, _, document = measured
    options = ("--data", document["data"], "--groups", "q,fc1", "--per", "model", "--dims", "4,64", "--shots", 4)
    options += ("--epochs", 3, "--folds", 2, "--refine", 1, "--out", out)
    code, text, _ = run_cli("probe-id", *options)
    assert code == 0
    assert "fc1" in text
    assert "full fine-tuning" in text
    code, text, _ = run_cli("probe-id", *options, "--json")
    assert json.loads(text) == document
