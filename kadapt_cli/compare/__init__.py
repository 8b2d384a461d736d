"""`kadapt compare`: every method on every data set at equal footing.

A cell is a data set, a method and a seed. In each, a search over learning rate and weight decay trains on the training
images and measures on the validation images; the best setting is then trained on both, and the test images are looked
at once. What is finished is in a study, so that a comparison can be stopped, continued, extended by data sets, methods
and seeds, and shared between processes.
"""

import copy
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import RenderableType

from kadapt_cli import __version__, runs, signals
from kadapt_cli.adapters import adapt, method
from kadapt_cli.compare import page, summary
from kadapt_cli.compare.grid import Grid, label, variant
from kadapt_cli.compare.worker import Worker, open_cell
from kadapt_cli.data import ImageSet, digest_of
from kadapt_cli.errors import (
    CheckFailedError,
    InterruptedRunError,
    KadaptError,
    MachineError,
    UsageError,
)
from kadapt_cli.evaluate import load_backbone
from kadapt_cli.models import Backbone
from kadapt_cli.progress import Display, new_console, print_line
from kadapt_cli.session import Material, text_start
from kadapt_cli.study import Record, Study, import_optuna, open_study

__all__ = ["CSV", "JSON", "PAGE", "Comparison", "Grid", "compare", "results", "write"]

CSV, JSON, PAGE, PICTURE = "comparison.csv", "comparison.json", "comparison.html", "comparison.svg"


class Comparison(NamedTuple):
    """A result: the JSON document, and the same as tables."""

    document: Record
    shown: RenderableType


def compare(grid: Grid, out: Path, display: Display, *, storage: str | None, jobs: int, m0: float) -> Comparison:
    """Fill the grid, write the result into `out` and return it.

    Args:
        grid: What to compare.
        out: The folder of the result, and of the study where no storage is given.
        display: For a line a trial.
        storage: As `open_study` takes it.
        jobs: Worker processes on this machine.
        m0: M0 of the PE score.

    Raises:
        UsageError: An unknown method or data set, two data sets of one name, or a study of another grid.
        DataError: A data set that cannot be used.
        CheckFailedError: Every run failed.
        InterruptedRunError: Stopped; what is finished is kept.
    """
    began = time.perf_counter()
    backbone = load_backbone(grid.base)
    drawn = _check(grid, backbone)
    study = open_study(out, storage, grid.settings(backbone))
    _check_images(study, drawn, grid.seeds[0])
    display.say(f"{len(grid.data)} data sets × {len(grid.methods)} methods × {len(grid.seeds)} seeds; {grid.budget()}")
    if grid.select == "test-best":
        display.say("WARNING: --select test-best takes the best epoch on the test images: no honest estimate")
    before = len(study.records())
    try:
        if jobs == 1:
            Worker(grid, study, display, backbone, out).work()
        else:
            _work_in_processes(grid, out, storage, jobs)
    except (InterruptedRunError, signals.Stopped) as error:
        done = len(results(grid, study)[0])
        raise InterruptedRunError(
            f"stopped: {done} of {len(grid.cells())} cells are done and kept; the same command goes on",
            error.exit_code,
        ) from None
    fresh = study.records()[before:]
    if fresh and storage is None:
        share = 1 - sum(r["busy_s"] for r in fresh) / (jobs * (time.perf_counter() - began))
        display.say(f"{share:.1%} of the time went into other things than training and measuring")
    found = write(grid, study, out, m0, grid.settings(backbone))
    if not found.document["rows"]:
        raise CheckFailedError(f"every run failed; the first: {found.document['failures'][0]['reason']}")
    return found


def write(grid: Grid, study: Study, out: Path, m0: float, settings: Record) -> Comparison:
    """Write comparison.csv, .json, .html and .svg from what a study holds of the grid."""
    rows, failures = results(grid, study)
    document = summary.document(rows, failures, m0) | {"select": grid.select}
    setting = {"kadapt": __version__, "torch": torch.__version__, "seeds": ", ".join(map(str, grid.seeds))}
    setting |= {key: str(value) for key, value in settings.items() if value is not None}
    out.mkdir(parents=True, exist_ok=True)
    runs.commit(out / CSV, summary.comparison_csv(rows, failures))
    runs.commit(out / JSON, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    runs.commit(out / PAGE, page.page(rows, failures, m0=m0, title="Comparison of adaptation methods", setting=setting))
    runs.commit(out / PICTURE, page.pareto_svg(rows, m0))
    return Comparison(document, summary.show(rows, failures, m0))


def results(grid: Grid, study: Study) -> tuple[list[Record], list[Record]]:
    """The rows of the grid's finished cells, and its failures, in the grid's order."""
    order = {(label(cell.data), cell.method, cell.seed): place for place, cell in enumerate(grid.cells())}
    keyed = [(order.get((r["data"], r["method"], r["seed"]), -1), r) for r in study.records()]
    mine = [record for place, record in sorted(keyed, key=lambda pair: pair[0]) if place >= 0]
    newest = {(r["data"], r["method"], r["seed"], r["trial"]): r for r in mine}.values()
    return [r for r in newest if r["kind"] == "final"], [r for r in newest if r["kind"] == "failure"]


def _check(grid: Grid, backbone: Backbone) -> dict[str, ImageSet]:
    """Whatever can be known to be wrong before the first run is said now; returns the images of the first seed."""
    if grid.search == "optuna":
        import_optuna()
    names = [label(data) for data in grid.data]
    for what, values in (("--data", names), ("--method", grid.methods), ("--seeds", grid.seeds)):
        if len(set(values)) < len(values):
            raise UsageError(f"{what}: one of {', '.join(map(str, values))} is there twice; give each name once")
    for name in grid.methods:
        method(variant(name)[0])
    drawn = {}
    for data in grid.data:
        drawn[label(data)] = images = open_cell(grid, data, grid.seeds[0])
        if not images.splits["test"]:
            raise UsageError(f"--data: {data} leaves no test images; draw fewer with --shots")
        text_start(grid.base, Material(images, backbone))
    for name in grid.methods:
        base, targets = variant(name)
        own = grid.base.targets if targets in (None, ("probe",)) else targets
        adapt(copy.deepcopy(backbone), grid.base.model_copy(update={"method": base, "targets": own}), 2)
    return drawn


def _check_images(study: Study, drawn: Mapping[str, ImageSet], seed: int) -> None:
    """The study's records are of these images."""
    for record in study.records():
        images = drawn.get(record["data"])
        if images is not None and record["seed"] == seed and record["images"] != digest_of(images):
            raise UsageError(
                f"--data: {record['data']} is not what the study was made with: images were added, removed or changed, "
                "or it is another folder of that name; put them back, or use another --out"
            )


def _work_in_processes(grid: Grid, out: Path, storage: str | None, jobs: int) -> None:
    """Start workers and wait for them; they share the study and the machine's cores."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    workers: list[BaseProcess] = [
        context.Process(target=_worker, args=(grid, out, storage, threads)) for _ in range(jobs)
    ]
    asked: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        asked.append(number)
        for worker in workers:
            if worker.is_alive():
                worker.terminate()

    with signals.handled(stop):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if asked:
        raise InterruptedRunError("", signals.EXIT_CODES[asked[0]])
    codes = {worker.exitcode for worker in workers} - {0}
    if codes:
        raise MachineError(f"a worker ended with exit code {codes.pop()} (see above); the same command goes on")


def _worker(grid: Grid, out: Path, storage: str | None, threads: int) -> None:
    """One worker process; signals reach it through its parent, which ends it by SIGTERM."""
    torch.set_num_threads(threads)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        backbone = load_backbone(grid.base)
        study = open_study(out, storage, grid.settings(backbone))
        Worker(grid, study, Display(new_console(stderr=True)), backbone, out).work()
    except KadaptError as error:
        if not isinstance(error, InterruptedRunError):
            print_line(new_console(stderr=True), f"kadapt: {error}")
        sys.exit(error.exit_code)
