"""One process that fills the cells of a comparison."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from kadapt_cli import metrics
from kadapt_cli.compare import search
from kadapt_cli.compare.grid import Cell, Grid, label, variant
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import ImageSet, digest_of, merged, open_images
from kadapt_cli.errors import (
    ENVIRONMENT,
    InterruptedRunError,
    KadaptError,
    MachineError,
    UsageError,
    is_out_of_memory,
)
from kadapt_cli.evaluate import logits
from kadapt_cli.models import Backbone
from kadapt_cli.probe import auto_targets
from kadapt_cli.progress import Display, new_console
from kadapt_cli.session import Material, Session, choose_metric, prepare, text_start
from kadapt_cli.study import Record, Study
from kadapt_cli.train import costs, fit, forget_peak

WAIT_S = 1.0


class OtherImagesError(UsageError):
    """The images of a cell are not those of the study's records: no failure of the cell, but the end of the work."""


class Worker:
    """Fills cells until all are done, and keeps what cells on the same images share."""

    def __init__(
        self, grid: Grid, study: Study, display: Display, backbone: Backbone, out: Path, *, before: int
    ) -> None:
        """`before` records are of earlier comparisons, whose failures are tried again."""
        self.grid = grid
        self.out = out
        self.study = study
        self.display = display
        self.quiet = Display(new_console(stderr=True), quiet=True)
        self.backbone = backbone
        self.before = before
        self.indexed = 0
        self.by_cell: dict[tuple[str, str, int], list[tuple[int, Record]]] = {}  # records and their places in the study
        self.texts: dict[str, Tensor | None] = {}  # CLIP's embeddings of the class names, by data
        self.opened: tuple[str, int] | None = None
        self.probed: dict[tuple[str, int], tuple[str, ...]] = {}  # targets by data and seed
        self.materials: tuple[Material, Material]

    def work(self) -> None:
        """Fill all cells that nobody else claims; wait for those that somebody does."""
        left = [cell for cell in self.grid.cells() if not self._is_done(cell)]
        while left:
            before = len(left)
            for cell in list(left):
                with self.study.claim(str(cell)) as mine:
                    filled = mine and not self._is_done(cell) and self._fill(cell)
                if self._is_done(cell):
                    left.remove(cell)
                if filled:
                    open_cells = sum(not self._is_done(other) for other in left)
                    self.display.say(f"{open_cells} of {len(self.grid.cells())} cells left")
            if len(left) == before:
                time.sleep(WAIT_S)

    def _is_done(self, cell: Cell) -> bool:
        """Whether the final run is there; one that failed in an earlier comparison is tried again."""
        return any(
            r["kind"] == "final" or (r["trial"] is None and place >= self.before) for place, r in self._records(cell)
        )

    def _fill(self, cell: Cell) -> bool:
        """Do what is left of a cell; False when it has to wait for the trials of other cells."""
        while settings := self._next(cell):
            self._trial(cell, settings)
        if any(self._next(other) is not None for other in self.grid.searched(cell)):
            return False
        self._final(cell)
        return True

    def _records(self, cell: Cell) -> list[tuple[int, Record]]:
        """The cell's records, each with its place in the study."""
        records = self.study.records()
        for place in range(self.indexed, len(records)):
            key = (records[place]["data"], records[place]["method"], records[place]["seed"])
            self.by_cell.setdefault(key, []).append((place, records[place]))
        self.indexed = len(records)
        return self.by_cell.get(key_of(cell), [])

    def _trials(self, cell: Cell) -> list[Record]:
        """The cell's trials in their order, up to the first that is missing: each depends on those before it.

        One that the machine could not do in an earlier comparison, for want of memory say, is tried again.
        """
        trials = {
            r["trial"]: r
            for place, r in self._records(cell)
            if place >= self.before or r["kind"] != "failure" or r["exit_code"] != ENVIRONMENT
        }
        return [trials[number] for number in itertools.takewhile(trials.__contains__, itertools.count())]

    def _next(self, cell: Cell) -> search.Settings | None:
        """What to try next in a cell; None when its search is over, or waits for the trials of other cells."""
        count = len(self._trials(cell))
        trials = [self._trials(other) for other in self.grid.searched(cell)] if count else []
        if any(len(own) < count for own in trials):
            return None
        return search.following(self.grid.plan(cell), [_mean([_value(own[i]) for own in trials]) for i in range(count)])

    def _trial(self, cell: Cell, settings: search.Settings) -> None:
        """Train on the training images and measure on the validation images."""
        number = len(self._trials(cell))

        def run() -> Record:
            session, busy_s = self._fitted(cell, settings, self.grid.search_epochs, self._material(cell)[0])
            last = [row for row in session.history if row["kept"]][-1]
            self.display.say(f"{cell}: trial {number + 1}, {_words(settings)}: validation {last['val_accuracy']:.1%}")
            return {"score": last["val_accuracy"], "loss": last["val_loss"], "busy_s": busy_s}

        head = {"kind": "trial", "trial": number, "lr": settings[0], "weight_decay": settings[1]}
        self._record(cell, head, f"trial {number + 1}, {_words(settings)}", run)

    def _final(self, cell: Cell) -> None:
        """Train the best setting on training and validation images, and look at the test images."""
        trials = [r for other in self.grid.searched(cell) for r in self._trials(other)]
        best = _best(trials)

        def run() -> Record:
            if trials and best is None:
                raise MachineError("every trial failed")
            settings = (best["lr"], best["weight_decay"]) if best else None
            material = self._material(cell)[1]
            forget_peak(self.grid.base)
            session, busy_s = self._fitted(cell, settings, self.grid.base.epochs, material)
            began = time.perf_counter()
            accuracy = self._test_score(session)
            busy_s += time.perf_counter() - began
            self.display.say(f"{cell}: {_words((session.config.lr, session.config.weight_decay))}: test {accuracy:.1%}")
            adapter = sum(p.numel() for p in session.adapted.adapter.values())
            return {
                "shots": self.grid.base.shots,
                "metric": material.images.metric,
                "accuracy": accuracy,
                "trainable": adapter + sum(p.numel() for p in session.adapted.head.parameters()),
                "adapter": adapter,
                "lr": session.config.lr,
                "weight_decay": session.config.weight_decay,
                "trials": len(trials) // len(self.grid.searched(cell)),
                "val": best["score"] if best else None,
                "select": self.grid.select,
                "peak_bytes": costs(session)["peak_bytes"],
                "busy_s": busy_s,
                "notes": material.images.notes,
            }

        self._record(cell, {"kind": "final", "trial": None}, "final run", run)

    def _record(self, cell: Cell, head: Record, words: str, run: Callable[[], Record]) -> None:
        """Keep what a run came to, or why it failed."""
        head = head | {"data": label(cell.data), "method": cell.method, "seed": cell.seed, "pid": os.getpid()}
        began = time.perf_counter()
        try:
            found = {"images": digest_of(self._material(cell)[0].images)} | run()
        except (InterruptedRunError, OtherImagesError):
            raise
        except KadaptError as error:
            found = self._failure(cell, words, error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            found = self._failure(cell, words, MachineError("out of memory; give a smaller --batch-size or --jobs"))
        self.study.add(head | found | {"time_s": time.perf_counter() - began})

    def _failure(self, cell: Cell, words: str, error: KadaptError) -> Record:
        """The record of a run that failed, which is said."""
        reason = " ".join(str(error).split())
        self.display.say(f"{cell}: {words}: FAILED: {reason}")
        about = {"shots": self.grid.base.shots, "busy_s": 0.0, "images": None}
        return {"kind": "failure", "reason": reason, "exit_code": error.exit_code} | about

    def _fitted(
        self, cell: Cell, settings: search.Settings | None, epochs: int, material: Material
    ) -> tuple[Session, float]:
        """A trained run of a cell and the seconds that training took; settings None are the method's own."""
        changes: dict[str, Any] = {"epochs": epochs, "patience": epochs}  # every run has all its epochs
        if settings is not None:
            changes |= {"lr": settings[0], "weight_decay": settings[1]}
        config = self._config(cell).model_copy(update=changes)
        session = prepare(config, None, self.quiet, material=material)
        began = time.perf_counter()
        fit(session, self.quiet)
        return session, time.perf_counter() - began

    def _config(self, cell: Cell) -> TrainConfig:
        """The settings that all runs of a cell share; a variant's targets are probed when that was not done yet."""
        name, targets = variant(cell.method)
        config = self.grid.base.model_copy(update={"data": cell.data, "method": name, "seed": cell.seed})
        if targets == ("probe",):
            targets = self._probed(cell, config)
        return config.model_copy(update={"targets": targets}) if targets else config

    def _probed(self, cell: Cell, config: TrainConfig) -> tuple[str, ...]:
        """What a probe of the cell's images selects; the same probe serves several methods and workers."""
        if cell[:2] not in self.probed:
            place = self.out / "probes" / f"{label(cell.data).replace('/', '-')}-{cell.seed}"
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):
                self.probed[cell[:2]] = auto_targets(config, place, self.quiet)
        return self.probed[cell[:2]]

    def _test_score(self, session: Session) -> float:
        if self.grid.select == "test-best":
            return max(float(row["val_accuracy"]) for row in session.history)
        plain = session.material.plain("test")
        if session.config.method == "linear":
            features, labels = session.material.features("test", session.device, session.dtype)
            values = session.adapted.head.cpu()(features).detach()
        else:
            values, labels = logits(session.module, plain, session.device, session.dtype)
        return metrics.score(session.images.metric, values.numpy(), labels.numpy())

    def _material(self, cell: Cell) -> tuple[Material, Material]:
        """Images and backbone of a cell for the search and for the final run; opened again when the images change."""
        if self.opened != (cell.data, cell.seed):
            images = open_cell(self.grid, cell.data, cell.seed)
            check_images(self.study, label(cell.data), cell.seed, digest_of(images))
            final = merged(images)
            if self.grid.select == "test-best":
                final.splits["val"] = final.splits["test"]
            self.materials = (Material(images, self.backbone), Material(final, self.backbone))
            if cell.data not in self.texts:
                self.texts[cell.data] = text_start(self.grid.base, self.materials[0])
            for material in self.materials:
                material.text = self.texts[cell.data]
            self.opened = (cell.data, cell.seed)
        return self.materials


def check_images(study: Study, data: str, seed: int, digest: str) -> None:
    """Raise `OtherImagesError` where a study's records of a data set and seed are of other images."""
    for record in study.records():
        if (record["data"], record["seed"]) == (data, seed) and record["images"] not in (None, digest):
            raise OtherImagesError(
                f"--data: {data} is not what the study was made with: images were added, removed or changed, or it is "
                "another folder of that name; put them back, or use another --out"
            )


def open_cell(grid: Grid, data: str, seed: int) -> ImageSet:
    """A cell's images. Validation is part of the shots, whatever else the set has; without search there is none."""
    val = "none" if grid.search == "none" else "auto" if grid.base.shots is None else "drawn"
    images = open_images(data, shots=grid.base.shots, seed=seed, val=val, skip_bad=grid.base.skip_bad)
    choose_metric(images, grid.base.metric)
    return images


def key_of(cell: Cell) -> tuple[str, str, int]:
    """How a cell's records name it."""
    return label(cell.data), cell.method, cell.seed


def _value(record: Record) -> search.Value:
    """What a search compares trials by."""
    return search.FAILED if record["kind"] == "failure" else (record["score"], -record["loss"])


def _mean(values: Sequence[search.Value]) -> search.Value:
    return sum(v[0] for v in values) / len(values), sum(v[1] for v in values) / len(values)


def _best(trials: Sequence[Record]) -> Record | None:
    """The settings with the best mean value, of those tried in as many cells as any, and that value as their score.

    None when there are none, or all failed.
    """
    values: dict[tuple[Any, Any], list[search.Value]] = {}
    for record in trials:
        values.setdefault((record["lr"], record["weight_decay"]), []).append(_value(record))
    most = max(map(len, values.values()), default=0)
    means = {key: _mean(v) for key, v in values.items() if len(v) == most}
    best = max(means, key=lambda key: means[key], default=None)
    if best is None or means[best] == search.FAILED:
        return None
    return {"lr": best[0], "weight_decay": best[1], "score": means[best][0]}


def _words(settings: tuple[float | None, float | None]) -> str:
    rate, decay = settings
    return (f"rate {rate:.2g}, " if rate is not None else "") + f"decay {decay:.2g}"
