"""What a comparison consists of: data sets, methods and seeds, and the settings that all its runs share."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kadapt_cli.adapters import method
from kadapt_cli.catalog import is_named, known_name
from kadapt_cli.compare.search import BUDGETS, Search, coarse, faithful, none, tpe
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError, shown
from kadapt_cli.evaluate import choose_device
from kadapt_cli.models import Backbone
from kadapt_cli.session import precision_of


@dataclass(frozen=True)
class Grid:
    """What is compared and how.

    Attributes:
        data: Folders or names of data sets.
        methods: Names of adaptation methods, or variants of them: METHOD@TARGETS, where TARGETS are those of
            `kadapt train` or "probe", what a short probe of the cell's images selects.
        seeds: Of the draw, the initialisation and the order of images.
        base: Settings that all runs share; its epochs are those of the final run.
        search: "none" takes each method's defaults, "coarse", "faithful" and "optuna" are those of `search`.
        search_epochs: Epochs of a trial.
        trials: Of Optuna's search.
        select: "validation" takes the best trial of the cell; "pooled" one setting a method, the best on average over
            the data sets with the first seed, the only one that is searched; "test-best" is "validation" but reports
            the best epoch on the test images, as some benchmarks do.
    """

    data: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    base: TrainConfig
    search: Literal["none", "coarse", "faithful", "optuna"] = "none"
    search_epochs: int = 10
    trials: int = 20
    select: Literal["validation", "pooled", "test-best"] = "validation"

    def cells(self) -> list["Cell"]:
        """All cells, those on the same images together."""
        return [Cell(*key) for key in product(self.data, self.seeds, self.methods)]

    def settings(self, backbone: Backbone) -> dict[str, Any]:
        """What decides the result of a cell, beside its images: a study holds cells of one such record."""
        shared = self.base.model_dump(
            exclude={"data", "method", "seed", "lr", "weight_decay", "val", "save_every", "weights", "pretrained"}
        )
        fixed = {f"{key}": list(value) if isinstance(value, tuple) else value for key, value in shared.items()}
        trials = {"trials": self.trials} if self.search == "optuna" else {}
        is_pooled = self.select == "pooled" and self.search != "none"
        pool = {"pool": [label(data) for data in self.data], "pool_seed": self.seeds[0]} if is_pooled else {}
        device = choose_device(self.base.device)
        own: dict[str, Any] = {"search": self.search, "select": self.select}
        if self.search != "none":
            own |= {"search_epochs": self.search_epochs}
        elif self.select == "pooled":  # no trials to choose from
            own |= {"select": "validation"}
        own |= {"backbone": backbone.digest[:16], "device": device.type}
        own |= {"precision": str(precision_of(self.base.precision, device)).removeprefix("torch.")}
        return fixed | trials | pool | own

    def searched(self, cell: "Cell") -> list["Cell"]:
        """The cells whose trials decide the settings of a cell: its own, or those of its method with the first seed."""
        if self.select != "pooled":
            return [cell]
        return [Cell(data, self.seeds[0], cell.method) for data in self.data]

    def plan(self, cell: "Cell") -> Search:
        """The search in a cell; empty where others decide its settings."""
        if self.select == "pooled" and cell.seed != self.seeds[0]:
            return none()
        has_rate = method(variant(cell.method)[0]).LR is not None
        if self.search == "optuna":
            return tpe(has_rate, self.trials, cell.seed)
        return none() if self.search == "none" else {"coarse": coarse, "faithful": faithful}[self.search](has_rate)

    def budget(self) -> str:
        """The budget of trials in words."""
        most = self.trials if self.search == "optuna" else BUDGETS[self.search]
        if not most:
            return f"no search: each method's defaults, {self.base.epochs} epochs on training and validation images"
        most_of = "" if self.search != "faithful" else ", of linear 15, as it has decays alone,"
        where = f"and data set, with seed {self.seeds[0]}" if self.select == "pooled" else "in every cell"
        return (
            f"search {self.search}: at most {most} trials{most_of} of {self.search_epochs} epochs for every method "
            f"{where}; then {self.base.epochs} epochs on training and validation images with the best in validation"
        )


class Cell(NamedTuple):
    """One data set, seed and method of a grid."""

    data: str
    seed: int
    method: str

    def __str__(self) -> str:
        return f"{label(self.data)} {self.method} seed {self.seed}"


def variant(name: str) -> tuple[str, tuple[str, ...] | None]:
    """The method of METHOD or METHOD@TARGETS, and its targets where it has its own; `UsageError` for an empty one."""
    base, at, targets = name.partition("@")
    parts = tuple(part.strip() for part in targets.split(","))
    if at and not all(parts):
        raise UsageError(f"--method: targets were expected behind the @, separated by commas, {shown(name)!r} given")
    return base, parts if at else None


def label(data: str) -> str:
    """A data set's name in tables: the one name that a known set has, however it was spelt; a folder's own name."""
    return known_name(data) if is_named(data) else Path(data).resolve().name
