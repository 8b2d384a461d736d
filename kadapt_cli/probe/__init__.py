"""`kadapt probe-id`: the local intrinsic dimension of submodules, and which of them to adapt.

For a submodule, d90 is the smallest d for which training in a random d-dimensional subspace of its weights reaches 90 %
of the score of training these weights directly. All else is frozen but the head, which is trained in all alike: d = 0
is the head alone, trained like the others.
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
from kadapt_cli.config import PROBE_BATCH_SIZE, PROBE_EPOCHS, TrainConfig
from kadapt_cli.data import ImageSet, digest_of, folds, open_images
from kadapt_cli.errors import DivergedError, InterruptedRunError, ModelError, UsageError
from kadapt_cli.evaluate import load_backbone
from kadapt_cli.models import Backbone
from kadapt_cli.probe import show
from kadapt_cli.probe.dimension import Curve, Dimension, choose, crossing, explore, grid, over_seeds, ranked
from kadapt_cli.progress import Display
from kadapt_cli.session import Material, choose_metric, prepare
from kadapt_cli.study import FileStudy
from kadapt_cli.surgery import Segment, segments
from kadapt_cli.train import fit

JSON, CSV, PICTURE = "probe.json", "probe.csv", "probe.svg"
SCHEMA_VERSION = 1
GROUPS = ("attn", "mlp")
Record = dict[str, Any]
Key = tuple[str, str, int]  # module, d and seed of a trial
AUTO_DIMS, AUTO_FOLDS = (16, 256, 4096), 2  # of --targets auto
HEAD, FULL = "head", "full"  # trials that belong to no module: the head alone, and all weights
SIGNIFICANT = 1.64  # standard errors above chance: one-sided 95 %, of an accuracy; of other metrics a rule of thumb


@dataclass(frozen=True)
class Plan:
    """What is measured and how.

    Attributes:
        base: Data, model and how a trial is trained; its projection and said are those of the subspaces.
        groups: Names of `surgery.Segment.name` or `group`, or "blocks".
        per: A candidate for each block, or one over all blocks.
        threshold: Of d90, in (0, 1).
        above: What the threshold is a share of: the score, or what it gains over the head alone.
        dims: The d to try; 8, 64, 512, … when None, as far as P can be stored.
        refine: How often the gap around the crossing is halved after that.
        seeds: Of the draw of images, the subspace and the order of images.
        folds: Of the cross-validation; 1 takes the data's own validation images.
        keep: Select so many modules of lowest d90; half of those measured when None.
        budget: Select by increasing d90 what kadaptation trains with so many parameters, instead.
        rank_by: The d90 that selects: of the score of training a module directly, or of full fine-tuning.
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
    rank_by: Literal["direct", "full"] = "direct"


@dataclass(frozen=True)
class Candidate:
    """A set of weights that is measured: a group of one block, or of all. Its name is a pattern of --targets."""

    name: str
    group: str
    block: int | None
    members: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """D, the weights that may move."""
        return sum(map(subspace.size, self.members))


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
            own = tuple(s for s in members if block in (None, s.block))
            if block is None:
                name = "blocks.*" if group == "blocks" else group
            else:
                name = f"blocks.{block}" + ("" if group == "blocks" else f".{group}")
            found.append(Candidate(name, group, block, own))
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
        with show.Board(display.console, display.quiet, show.measure(plan.threshold)) as board:
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
        least = _least(plan, candidate)
        for d in _dims(plan, candidate):
            if not least <= d <= candidate.size:
                raise UsageError(
                    f"--dims: {d} was given, but {candidate.name} has D = {candidate.size:,} weights"
                    f"{f' and --said takes {len(candidate.members)} of d' if plan.base.said else ''}; "
                    f"give numbers from {least} to {candidate.size}"
                )
            subspace.resolve(plan.base.model_copy(update={"dims": d}), candidate.members)
    cheapest = min(kadaptation_parameters(candidate.members) for candidate in found)
    if plan.budget is not None and plan.budget < cheapest:
        raise UsageError(
            f"--budget: {plan.budget:,} parameters were given, but the cheapest module takes {cheapest:,}; give more"
        )


def _least(plan: Plan, candidate: Candidate) -> int:
    """The smallest d that a candidate can be measured at."""
    return len(candidate.members) + 1 if plan.base.said else 1


def _dims(plan: Plan, candidate: Candidate) -> list[int]:
    """The d of a candidate's grid: those given, or the first of 8, 64, 512, … and the others that memory has room for.

    By Fastfood a trial then takes at most 3·D numbers beside the frozen model; other P are large by nature.
    """
    if plan.dims is not None:
        return list(plan.dims)
    projection, members = plan.base.projection, candidate.members

    def has_room(d: int) -> bool:
        if subspace.stored_bytes(members, projection, d) > subspace.MAX_BYTES:
            return False
        return projection != "fastfood" or subspace.training_numbers(members, d) <= 3 * candidate.size

    first, *more = sorted({max(d, _least(plan, candidate)) for d in grid(candidate.size)})
    return [first, *filter(has_room, more)]


def _images(plan: Plan, seed: int) -> ImageSet:
    """The images that a seed draws."""
    base = plan.base
    val = "auto" if plan.folds == 1 else "none"
    images = open_images(base.data, shots=base.shots, seed=seed, val=val, skip_bad=base.skip_bad)
    choose_metric(images, base.metric)
    return images


def _settings(plan: Plan, backbone: Backbone) -> Record:
    """What decides the score of a trial: a folder holds trials of one such record."""
    shared = plan.base.model_dump(exclude={"data", "seed", "targets", "method", "val", "save_every", "patience"})
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
        self.curves: dict[tuple[str, int], Curve] = {}  # by module and seed, of the d that this plan asks for
        folded = [material.images for seed in plan.seeds for material in self.materials[seed]]
        self.chance = fmean(map(chance, folded))
        count = sum(len(part.splits["val"]) for part in folded)
        self.at_chance = self.chance + SIGNIFICANT * math.sqrt(self.chance * (1 - self.chance) / count)

    def measure(self, candidate: Candidate) -> None:
        """All trials of a candidate: direct training, the grid, the bisection; with each seed.

        Where direct training is no better than chance there is no dimension to look for, and no more is tried.
        """
        name = candidate.name
        for seed in self.plan.seeds:
            self.score(seed, HEAD, 0)
            self.score(seed, FULL)
            self.score(seed, name)
        if self._mean(name) > self.at_chance:
            for seed in self.plan.seeds:
                self.curves[name, seed] = explore(
                    partial(self.score, seed, name),
                    _dims(self.plan, candidate),
                    zero=self.score(seed, HEAD, 0),
                    target=self._target(seed, name),
                    refine=self.plan.refine,
                    least=_least(self.plan, candidate),
                )
        self.done.append(candidate)
        found = self._dimension(name, name)
        words = self._reason(name, found)
        if not words and found.d is not None:
            words = f"{show.measure(self.plan.threshold)} = {found.d:.0f} ({found.low} to {found.high})"
            words += f" of {candidate.size:,}"
        self.display.say(f"{name}: {words}")

    def score(self, seed: int, name: str, d: int | Literal["direct"] = "direct") -> float:
        """The cross-validated score of a trial of a module, `HEAD` at 0, or `FULL`; from the study if it is there."""
        key = (name, str(d), seed)
        words = "" if name in (HEAD, FULL) else ", directly" if d == "direct" else f", d = {d:,}"
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

    def _mean(self, name: str, d: int | Literal["direct"] = "direct") -> float:
        """The score of a trial, mean over seeds."""
        return fmean(self.score(seed, name, d) for seed in self.plan.seeds)

    def _dimension(self, name: str, whole: str) -> Dimension:
        """Where a module's curves reach their share of the score of `whole`: itself trained directly, or `FULL`.

        All None where either is no better than chance: there is nothing to reach, or nothing that reaches it.
        """
        if min(self._mean(name), self._mean(whole)) <= self.at_chance:
            return Dimension(None, None, None)
        return over_seeds([crossing(self.curves[name, s], self._target(s, whole)) for s in self.plan.seeds])

    def _reason(self, name: str, found: Dimension) -> str:
        """Why a module has no dimension, or none that is worth anything; empty where it has one."""
        direct = self._mean(name)
        if direct <= self.at_chance:
            return f"trained directly it scores {direct:.1%}, no better than chance ({self.at_chance:.1%} at 95 %)"
        if found.d is None:
            return f"no d up to {found.low:,} reached its target with every seed"
        return "the head alone reaches the target" if found.d == 0 else ""

    def _known(self, candidate: Candidate) -> Record:
        """What the live display shows of a candidate."""
        found = self._dimension(candidate.name, candidate.name)
        row = {"name": candidate.name, "D": candidate.size, "direct": self._mean(candidate.name)}
        return row | {"d90": found.d, "d90_low": found.low, "d90_high": found.high}

    def document(self, found: Sequence[Candidate]) -> Record:
        """What probe.json holds, but the selection."""
        plan, seeds = self.plan, self.plan.seeds
        means = {"full": self._mean(FULL), "head": self._mean(HEAD, 0), "chance": self.chance}
        trials = {"trials": [{"name": name} | trial for name in (FULL, HEAD) for trial in self._trials_of(name)]}
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
            "rank_by": plan.rank_by,
            "baseline": means | trials,
            "modules": [self._module(candidate) for candidate in found],
        }

    def _module(self, candidate: Candidate) -> Record:
        name = candidate.name
        return self._known(candidate) | {
            "group": candidate.group,
            "block": candidate.block,
            "d90_full": self._dimension(name, FULL).d,
            "reason": self._reason(name, self._dimension(name, name)),
            "trials": self._trials_of(name),
        }

    def _trials_of(self, name: str) -> list[Record]:
        """The trials that this plan asks for; the folder may hold more, of other --dims and seeds."""
        wanted: set[tuple[int, int | str]] = {(seed, "direct") for seed in self.plan.seeds}
        wanted |= {(seed, d) for (of, seed), curve in self.curves.items() if of == name for d in curve}
        wanted |= {(seed, 0) for seed in self.plan.seeds if name == HEAD}
        trials = (record for record in self._trials() if record["module"] == name)
        return [{key: r[key] for key in ("d", "seed", "lr", "score")} for r in trials if (r["seed"], r["d"]) in wanted]

    def _target(self, seed: int, whole: str) -> float:
        """The score to reach: a share of that of training `whole` directly."""
        floor = self.score(seed, HEAD, 0) if self.plan.above == "head" else 0.0
        return floor + self.plan.threshold * (self.score(seed, whole) - floor)

    def _config(self, seed: int, name: str, d: int | str) -> TrainConfig:
        base = self.plan.base
        changes: Record = {"seed": seed, "patience": base.epochs, "val": "none"}
        if name == FULL:
            changes |= {"method": "full", "lr": None, "projection": "fastfood", "said": False}
        elif name == HEAD:
            changes |= {"method": "subspace", "dims": 0, "said": False}
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
        """All trials that the folder holds."""
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
    """Names of the modules to adapt, by increasing d90; none where the budget pays for none of those that have one."""
    by = "d90_full" if plan.rank_by == "full" else "d90"
    if plan.budget is None:
        return [module["name"] for module in ranked(modules, by)[: plan.keep or (len(modules) + 1) // 2]]
    available = segments(backbone.module)

    def cost(names: Sequence[str]) -> int:
        return kadaptation_parameters(select(available, names))

    return choose(modules, cost, plan.budget, by)


def kadaptation_parameters(chosen: Sequence[Segment]) -> int:
    """How many parameters kadaptation trains on some segments, the head left out."""
    config = kadaptation.resolve(TrainConfig(), chosen)
    return sum(math.prod(shape) for shape in kadaptation.shapes(chosen, config).values())


def auto_targets(config: TrainConfig, out: Path, display: Display) -> tuple[str, ...]:
    """The selection of a short probe on a run's own images, kept in `out`: attn and mlp of each block, three d.

    Raises:
        UsageError: Too few shots to hold some of them out.
    """
    if config.shots is not None and config.shots < AUTO_FOLDS:
        raise UsageError(f"--targets: auto holds images out and takes --shots {AUTO_FOLDS} or more; name the targets")
    given = ("data", "model", "shots", "metric", "img_size", "weights", "pretrained", "device", "precision", "skip_bad")
    own = {name: getattr(config, name) for name in given}
    base = TrainConfig(method="subspace", augment="none", epochs=PROBE_EPOCHS, batch_size=PROBE_BATCH_SIZE, **own)
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
        raise UsageError(f"--targets: {file} selected nothing; see the reasons in it, or name modules: --targets q,v")
    return tuple(names)
