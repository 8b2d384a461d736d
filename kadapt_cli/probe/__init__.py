"""`kadapt probe-id`: the local intrinsic dimension of submodules, and which of them to adapt.

For a submodule, d90 is the smallest d for which training in a random d-dimensional subspace of its weights reaches 90 %
of the score of training these weights directly. All else is frozen but the head, which is trained directly in both.
Scores are cross-validated within the shots: every image is in validation once, and no test image is looked at.

This is a property of how a task is learnt (Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR
2018). The intrinsic dimension of a data manifold is something else.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from kadapt_cli import runs, signals
from kadapt_cli.adapters import kadaptation, method, select, subspace
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import ImageSet, digest_of, folds, open_images
from kadapt_cli.errors import DivergedError, InterruptedRunError, ModelError, UsageError
from kadapt_cli.evaluate import load_backbone
from kadapt_cli.models import Backbone, Segment, segments
from kadapt_cli.probe import show
from kadapt_cli.probe.dimension import Curve, Dimension, choose, crossing, explore, grid, over_seeds, ranked
from kadapt_cli.progress import Display
from kadapt_cli.session import Material, choose_metric, prepare
from kadapt_cli.study import FileStudy
from kadapt_cli.train import fit

JSON, CSV, PICTURE = "probe.json", "probe.csv", "probe.svg"
SCHEMA_VERSION = 1
GROUPS = ("attn", "mlp")
Record = dict[str, Any]
Key = tuple[str, str, int]  # module, d and seed of a trial
AUTO: Record = {"epochs": 10, "batch_size": 8}  # of --targets auto
AUTO_DIMS, AUTO_FOLDS = (16, 256, 4096), 2
SIGNIFICANT = 1.64  # standard errors above chance: one-sided 95 %


@dataclass(frozen=True)
class Plan:
    """What is measured and how.

    Attributes:
        base: Data, model and how a trial is trained; its projection and said are those of the subspaces.
        groups: Names of `models.Segment.name` or `group`, or "blocks".
        per: A candidate for each block, or one over all blocks.
        threshold: Of d90, in (0, 1).
        above: What the threshold is a share of: the score, or what it gains over the head alone.
        dims: The d to try; 8, 64, 512, … when None.
        refine: How often the gap around the crossing is halved after that.
        seeds: Of the draw of images, the subspace and the order of images.
        folds: Of the cross-validation; 1 takes the data's own validation images.
        keep: Select so many modules of lowest d90; half of those measured when None.
        budget: Select by increasing d90 what kadaptation trains with so many parameters, instead.
    """

    base: TrainConfig
    groups: tuple[str, ...] = GROUPS
    per: Literal["block", "model"] = "block"
    threshold: float = 0.9
    above: Literal["zero", "head"] = "zero"
    dims: tuple[int, ...] | None = None
    refine: int = 2
    seeds: tuple[int, ...] = (0,)
    folds: int = 5
    keep: int | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A set of weights that is measured: a group of one block, or of all. Its name is a pattern of --targets."""

    name: str
    group: str
    block: int | None
    size: int
    tensors: int


def candidates(backbone: Backbone, groups: Sequence[str], per: str) -> list[Candidate]:
    """The candidates of some groups, by group and block.

    Raises:
        UsageError: A group that matches nothing; lists what there is.
    """
    available = segments(backbone.module)
    found = []
    for group in groups:
        members = [s for s in available if group in (s.name, s.group, "blocks")]
        if not members:
            known = dict.fromkeys(["attn", "mlp", *(s.name for s in available), "blocks"])
            raise UsageError(f"--groups: '{group}' matches nothing in {backbone.name}; it has {', '.join(known)}")
        blocks: list[int | None] = [None] if per == "model" else [*sorted({s.block for s in members})]
        for block in blocks:
            own = [s for s in members if block in (None, s.block)]
            if block is None:
                name = "blocks.*" if group == "blocks" else group
            else:
                name = f"blocks.{block}" + ("" if group == "blocks" else f".{group}")
            found.append(Candidate(name, group, block, sum(map(subspace.size, own)), len(own)))
    return found


def probe(plan: Plan, out: Path, display: Display) -> Record:
    """Measure as planned, write probe.json, probe.csv and probe.svg into `out` and return the document.

    Every trial is kept in `out` as soon as it is done: a probe that was stopped goes on where it was.

    Raises:
        KadaptError: Anything the user can mend, all that can be known before the first trial among it.
    """
    backbone = load_backbone(plan.base)
    found = candidates(backbone, plan.groups, plan.per)
    _check(plan, found)
    images = {seed: _images(plan, seed) for seed in plan.seeds}
    study = FileStudy(out, _settings(plan, backbone))
    with runs.held(out):
        with show.Board(display.console, display.quiet) as board:
            prober = Prober(plan, backbone, images, study, display, board)
            try:
                for candidate in found:
                    prober.measure(candidate)
            except (InterruptedRunError, signals.Stopped) as error:
                kept = f"{len(prober.scores)} trials are kept; the same command goes on"
                raise InterruptedRunError(f"stopped: {kept}", error.exit_code) from None
        document = prober.document(found)
        document["selected"] = selection(plan, backbone, document["modules"])
        document = runs.sealed(document)
        runs.commit(out / JSON, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        runs.commit(out / CSV, show.trials_csv(document))
        runs.commit(out / PICTURE, show.picture(document))
    return document


def _check(plan: Plan, found: Sequence[Candidate]) -> None:
    if not 0 < plan.threshold < 1:
        raise UsageError(f"--threshold: a number between 0 and 1 was expected, {plan.threshold:g} given")
    if plan.keep is not None and plan.budget is not None:
        raise UsageError("--keep: was given beside --budget; give one of them")
    if plan.folds > 1 and plan.base.shots is not None and plan.folds > plan.base.shots:
        raise UsageError(f"--folds: {plan.folds} folds of {plan.base.shots} shots a class; give at most as many")
    for candidate in found:
        least = candidate.tensors + 1 if plan.base.said else 1
        for d in plan.dims or ():
            if not least <= d <= candidate.size:
                raise UsageError(
                    f"--dims: {d} was given, but {candidate.name} has D = {candidate.size:,} weights"
                    f"{f' and --said takes {candidate.tensors} of d' if plan.base.said else ''}; "
                    f"give numbers from {least} to {candidate.size}"
                )


def _images(plan: Plan, seed: int) -> ImageSet:
    """The images that a seed draws."""
    base = plan.base
    val = "auto" if plan.folds == 1 else "none"
    images = open_images(base.data, shots=base.shots, seed=seed, val=val, skip_bad=base.skip_bad)
    choose_metric(images, base.metric)
    return images


def _settings(plan: Plan, backbone: Backbone) -> Record:
    """What decides the score of a trial: a folder holds trials of one such record."""
    shared = plan.base.model_dump(exclude={"seed", "targets", "method", "val", "save_every", "patience"})
    fixed = {key: list(value) if isinstance(value, tuple) else value for key, value in shared.items()}
    return fixed | {"folds": plan.folds, "backbone": backbone.digest[:16]}


class Prober:
    """Measures candidates, and keeps what trials on the same images share."""

    def __init__(
        self,
        plan: Plan,
        backbone: Backbone,
        images: Mapping[int, ImageSet],
        study: FileStudy,
        display: Display,
        board: show.Board,
    ) -> None:
        self.plan = plan
        self.board = board
        self.done: list[Candidate] = []
        self.backbone = backbone
        self.study = study
        self.display = display
        self.quiet = Display(display.console, quiet=True)
        self.materials = {seed: self._open(seed, images[seed]) for seed in plan.seeds}
        self.scores: dict[Key, float] = {_key(record): record["score"] for record in self._trials()}

    def measure(self, candidate: Candidate) -> None:
        """All trials of a candidate: direct training, the grid, the bisection; with each seed."""
        for seed in self.plan.seeds:
            for whole in ("head", "full"):
                self.score(seed, whole)
            direct = self.score(seed, candidate.name, "direct")
            explore(
                partial(self.score, seed, candidate.name),
                self.plan.dims or grid(candidate.size),
                zero=self.score(seed, "head"),
                target=self._target(seed, direct),
                refine=self.plan.refine,
                least=candidate.tensors + 1 if self.plan.base.said else 1,
            )
        self.done.append(candidate)
        known = self._dimension(candidate)
        if known.d is not None:
            words = f"{known.d:.0f} ({known.low} to {known.high}) of {candidate.size:,}"
            self.display.say(f"{candidate.name}: d{100 * self.plan.threshold:g} = {words}")

    def score(self, seed: int, name: str, d: int | Literal["direct"] = "direct") -> float:
        """The cross-validated score of one trial; from the study where it is there."""
        key = (name, str(d), seed)
        words = "" if name in ("head", "full") else ", directly" if d == "direct" else f", d = {d:,}"
        if key not in self.scores:
            self.board.show([self._known(candidate) for candidate in self.done], f"{name}{words}, seed {seed}")
            began = time.perf_counter()
            config = self._config(seed, name, d)
            parts = [(self._fold(config, material), material) for material in self.materials[seed]]
            counts = [len(material.images.splits["val"]) for _, material in parts]
            score = sum(s * n for (s, _), n in zip(parts, counts, strict=True)) / sum(counts)
            self.scores[key] = score
            record = {"kind": "trial", "module": name, "d": d, "seed": seed, "lr": config.lr, "score": score}
            self.study.add(record | {"time_s": time.perf_counter() - began})
            self.display.say(f"{name}{words}, seed {seed}: {score:.1%}")
        return self.scores[key]

    def _dimension(self, candidate: Candidate) -> Dimension:
        """What the trials of all seeds say, whether or not they are better than chance."""
        each = []
        for seed in self.plan.seeds:
            target = self._target(seed, self.score(seed, candidate.name))
            each.append(crossing(self._curve(seed, candidate.name), target))
        return over_seeds(each)

    def _known(self, candidate: Candidate) -> Record:
        """What the live display shows of a candidate."""
        found = self._dimension(candidate)
        direct = fmean(self.score(seed, candidate.name) for seed in self.plan.seeds)
        row = {"name": candidate.name, "D": candidate.size, "direct": direct}
        return row | {"d90": found.d, "d90_low": found.low, "d90_high": found.high}

    def document(self, found: Sequence[Candidate]) -> Record:
        """What probe.json holds, but the selection."""
        plan, seeds = self.plan, self.plan.seeds
        chances = [chance(m.images) for seed in seeds for m in self.materials[seed]]
        means = {whole: fmean(self.score(seed, whole) for seed in seeds) for whole in ("full", "head")}
        baseline = means | {"chance": fmean(chances)}
        return {
            "schema_version": SCHEMA_VERSION,
            "data": plan.base.data,
            "model": plan.base.model,
            "shots": plan.base.shots,
            "images": sum(len(m.images.splits["val"]) for m in self.materials[seeds[0]]),
            "metric": self.materials[seeds[0]][0].images.metric,
            "seeds": list(seeds),
            "folds": plan.folds,
            "epochs": plan.base.epochs,
            "projection": plan.base.projection,
            "said": plan.base.said,
            "threshold": plan.threshold,
            "above": plan.above,
            "baseline": baseline,
            "modules": [self._module(candidate, baseline) for candidate in found],
        }

    def _module(self, candidate: Candidate, baseline: Record) -> Record:
        seeds, name = self.plan.seeds, candidate.name
        known = self._known(candidate)
        images = sum(len(m.images.splits["val"]) for seed in seeds for m in self.materials[seed])
        at_chance = baseline["chance"] + SIGNIFICANT * math.sqrt(baseline["chance"] * (1 - baseline["chance"]) / images)
        reason = ""
        if known["direct"] <= at_chance:
            reason = (
                f"trained directly it scores {known['direct']:.1%}, no better than chance ({at_chance:.1%} at 95 %)"
            )
            known |= dict.fromkeys(("d90", "d90_low", "d90_high"))
        elif known["d90"] is None:
            reason = f"no d up to {known['d90_low']:,} reached its target with every seed"
        elif known["d90"] == 0:
            reason = "the head alone reaches the target"
        full = [crossing(self._curve(s, name), self._target(s, self.score(s, "full"))).d for s in seeds]
        return known | {
            "group": candidate.group,
            "block": candidate.block,
            "d90_full": over_seeds([Dimension(d, None, None) for d in full]).d,
            "reason": reason,
            "trials": [
                {key: record[key] for key in ("d", "seed", "lr", "score")}
                for record in self._trials()
                if record["module"] == name
            ],
        }

    def _curve(self, seed: int, name: str) -> Curve:
        """Scores by d of one seed; d = 0 is the head alone."""
        tried = {int(d): s for (n, d, of), s in self.scores.items() if (n, of) == (name, seed) and d != "direct"}
        return {0: self.score(seed, "head")} | tried

    def _target(self, seed: int, whole: float) -> float:
        """The score to reach, from that of training all weights."""
        floor = self.score(seed, "head") if self.plan.above == "head" else 0.0
        return floor + self.plan.threshold * (whole - floor)

    def _config(self, seed: int, name: str, d: int | str) -> TrainConfig:
        base = self.plan.base
        changes: Record = {"seed": seed, "patience": base.epochs, "val": "none"}
        if name in ("head", "full"):
            changes |= {"method": "linear" if name == "head" else "full", "lr": None, "scale": None}
            changes |= {"projection": "fastfood", "said": False, "targets": TrainConfig.model_fields["targets"].default}
        elif d == "direct":
            changes |= {"method": "subspace", "targets": (name,), "projection": "identity", "said": False}
        else:
            changes |= {"method": "subspace", "targets": (name,), "dims": d}
        config = base.model_copy(update=changes)
        return config.model_copy(update={"lr": config.lr or method(config.method).LR})

    def _fold(self, config: TrainConfig, material: Material) -> float:
        """The validation score of one training; 0 where it diverged, which is said."""
        session = prepare(config, None, self.quiet, material=material)
        try:
            fit(session, self.quiet)
        except DivergedError as error:
            self.display.say(f"counts as 0: {error}")
            return 0.0
        score: float = session.history[-1]["val_accuracy"]
        return score

    def _open(self, seed: int, images: ImageSet) -> list[Material]:
        """The folds of a seed's images, which must be those of the trials that are there."""
        base, count = self.plan.base, self.plan.folds
        known = {r["seed"]: r["digest"] for r in self.study.records() if r["kind"] == "images"}
        if seed not in known:
            self.study.add({"kind": "images", "seed": seed, "digest": digest_of(images)})
        elif known[seed] != digest_of(images):
            raise UsageError(
                f"--data: {base.data} is not what the trials in --out were made with: images were added, removed or "
                "changed; put them back, or use another --out"
            )
        return [Material(part, self.backbone) for part in (folds(images, count) if count > 1 else [images])]

    def _trials(self) -> list[Record]:
        return [record for record in self.study.records() if record["kind"] == "trial"]


def _key(record: Record) -> Key:
    return record["module"], str(record["d"]), record["seed"]


def chance(images: ImageSet) -> float:
    """The expected score of guessing without looking."""
    if images.metric == "roc_auc":
        return 0.5
    if images.metric == "mean-per-class":
        return 1 / len(images.classes)
    labels = [label for sample in images.splits["val"] for label in sample.labels]
    counts = [labels.count(c) for c in range(len(images.classes))]
    if images.multi_label:
        return sum(counts) / len(counts) / len(images.splits["val"])
    return max(counts) / len(labels)


def selection(plan: Plan, backbone: Backbone, modules: Sequence[Record]) -> list[str]:
    """Names of the modules to adapt, by increasing d90.

    Raises:
        UsageError: The budget is less than the cheapest of them costs.
    """
    if plan.budget is None:
        return [module["name"] for module in ranked(modules)[: plan.keep or (len(modules) + 1) // 2]]
    available = segments(backbone.module)

    def cost(names: Sequence[str]) -> int:
        return kadaptation_parameters(select(available, names))

    chosen = choose(modules, cost, plan.budget)
    if not chosen and ranked(modules):
        least = min(cost([module["name"]]) for module in ranked(modules))
        raise UsageError(f"--budget: {plan.budget:,} parameters were given, but the cheapest module takes {least:,}")
    return chosen


def kadaptation_parameters(chosen: Sequence[Segment]) -> int:
    """How many parameters kadaptation trains on some segments, the head left out."""
    config = kadaptation.resolve(TrainConfig(), chosen)
    return sum(math.prod(shape) for shape in kadaptation.shapes(chosen, config).values())


def auto_targets(config: TrainConfig, out: Path, display: Display) -> tuple[str, ...]:
    """The selection of a short probe on a run's own images, kept in `out`: attn and mlp of each block, three d."""
    given = ("data", "model", "shots", "metric", "img_size", "weights", "pretrained", "device", "precision", "skip_bad")
    base = TrainConfig(method="subspace", augment="none", **AUTO, **{name: getattr(config, name) for name in given})
    document = probe(Plan(base, dims=AUTO_DIMS, refine=0, seeds=(config.seed,), folds=AUTO_FOLDS), out, display)
    display.say(f"selected: {', '.join(document['selected'])} (see {out / JSON})")
    return read_selection(out / JSON)


MAX_PROBE_BYTES = 64 << 20


def read_selection(file: Path) -> tuple[str, ...]:
    """The selection of a probe.json, as --targets takes it.

    Raises:
        UsageError: No such file, or a probe that selected nothing.
        ModelError: Something else, or not what the probe wrote.
    """
    try:
        if file.exists() and (not file.is_file() or file.stat().st_size > MAX_PROBE_BYTES):
            raise ValueError
        document = json.loads(file.read_text(encoding="utf-8"))
        names = document["selected"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError
    except OSError as error:
        raise UsageError(f"--targets: {file} cannot be read ({error.strerror}); give a probe.json") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"--targets: {file} is no probe.json of kadapt; make one with kadapt probe-id") from None
    if not runs.is_sealed(document):
        raise ModelError(
            f"--targets: {file} is not as it was written (SHA-256 differs); restore it, or name the targets"
        )
    if not names:
        raise UsageError(f"--targets: {file} selected nothing; see the reasons in it")
    return tuple(names)
