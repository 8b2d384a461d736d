"""`kadapt compare`: every method on every data set at equal footing.

A cell is a data set, a method and a seed. In each, a search over learning rate and weight decay trains on the training
images and measures on the validation images; the best setting is then trained on both, and the test images are looked
at once. What is finished is in a study, so that a comparison can be stopped, continued, extended by data sets, methods
and seeds, and shared between processes.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import RenderableType

from kadapt_cli import __version__, runs, signals
from kadapt_cli.adapters import adapt, method
from kadapt_cli.compare import page, summary
from kadapt_cli.compare.grid import Grid, label, variant
from kadapt_cli.compare.worker import Worker, check_images, open_cell
from kadapt_cli.data import digest_of
from kadapt_cli.errors import (
    EXIT_CODES,
    TERMINATED,
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
        jobs: Processes that work on this machine, this one among them.
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
    for name, digest in drawn.items():
        check_images(study, name, grid.seeds[0], digest)
    display.say(f"{len(grid.data)} data sets × {len(grid.methods)} methods × {len(grid.seeds)} seeds; {grid.budget()}")
    if grid.select == "test-best":
        display.say("WARNING: --select test-best takes the best epoch on the test images: no honest estimate")
    before = len(study.records())
    try:
        with _others(grid, out, storage, jobs, before) as others:
            Worker(grid, study, display, backbone, out, before=before).work()
    except (InterruptedRunError, signals.Stopped) as error:
        done = len(results(grid, study)[0])
        raise InterruptedRunError(
            f"stopped: {done} of {len(grid.cells())} cells are done and kept; the same command goes on",
            error.exit_code,
        ) from None
    if storage is None:
        _say_overhead(study.records()[before:], [os.getpid(), *others], time.perf_counter() - began, display)
    found = write(grid, study, out, m0, grid.settings(backbone))
    for note in found.document["notes"]:
        display.say(f"note: {note}")
    if not found.document["rows"]:
        raise CheckFailedError(f"every run failed; the first: {found.document['failures'][0]['reason']}")
    return found


def _say_overhead(fresh: list[Record], processes: Sequence[int], time_s: float, display: Display) -> None:
    """How much of the time of these processes went into neither training nor measuring."""
    busy = [record["busy_s"] for record in fresh if record["pid"] in processes]
    if busy:
        share = 1 - sum(busy) / (len(processes) * time_s)
        display.say(f"{share:.1%} of the time went into other things than training and measuring")


def write(grid: Grid, study: Study, out: Path, m0: float, settings: Record) -> Comparison:
    """Write comparison.csv, .json, .html and .svg from what a study holds of the grid."""
    rows, failures = results(grid, study)
    notes = _notes(rows)
    document = summary.document(rows, failures, m0) | {"select": grid.select, "notes": notes}
    setting: Record = {"kadapt": __version__, "torch": torch.__version__, "seeds": list(grid.seeds)}
    setting |= {key: value for key, value in settings.items() if value is not None}
    setting |= {"notes": notes} if notes else {}
    out.mkdir(parents=True, exist_ok=True)
    runs.commit(out / CSV, summary.comparison_csv(rows, failures))
    runs.commit(out / JSON, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    runs.commit(out / PAGE, page.page(rows, failures, m0=m0, title="Comparison of adaptation methods", setting=setting))
    runs.commit(out / PICTURE, page.pareto_svg(rows, m0))
    return Comparison(document, summary.show(rows, failures, m0))


def _notes(rows: list[Record]) -> list[str]:
    """What there is to say of the images, once for each data set, with the seeds where it is not true of all."""
    every: dict[str, set[int]] = {}
    seeds: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        every.setdefault(row["data"], set()).add(row["seed"])
        for note in row["notes"]:
            seeds.setdefault((row["data"], note), set()).add(row["seed"])
    return [
        f"{data}: {note}" if mine == every[data] else f"{data}, seed {', '.join(map(str, sorted(mine)))}: {note}"
        for (data, note), mine in seeds.items()
    ]


def results(grid: Grid, study: Study) -> tuple[list[Record], list[Record]]:
    """The rows of the grid's finished cells, and its failures, in the grid's order; trials count from 1."""
    order = {(label(cell.data), cell.method, cell.seed): place for place, cell in enumerate(grid.cells())}
    keyed = [(order.get((r["data"], r["method"], r["seed"]), -1), r) for r in study.records()]
    mine = [record for place, record in sorted(keyed, key=lambda pair: pair[0]) if place >= 0]
    newest = {(r["data"], r["method"], r["seed"], r["trial"]): r for r in mine}.values()
    failures = [r for r in newest if r["kind"] == "failure"]
    counted = [r if r["trial"] is None else r | {"trial": r["trial"] + 1} for r in failures]
    return [r for r in newest if r["kind"] == "final"], counted


def _check(grid: Grid, backbone: Backbone) -> dict[str, str]:
    """Whatever can be known to be wrong before the first run is said; the digests of the first seed's images."""
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
        images = open_cell(grid, data, grid.seeds[0])
        drawn[label(data)] = digest_of(images)
        if not images.splits["test"]:
            raise UsageError(f"--data: {data} leaves no test images; draw fewer with --shots")
        text_start(grid.base, Material(images, backbone))
    for name in grid.methods:
        base, targets = variant(name)
        own = grid.base.targets if targets in (None, ("probe",)) else targets
        adapt(backbone.shared(), grid.base.model_copy(update={"method": base, "targets": own}), 2)
    return drawn


@contextmanager
def _others(grid: Grid, out: Path, storage: str | None, jobs: int, before: int) -> Iterator[list[int]]:
    """Start jobs - 1 further workers, which share the study and the machine's cores, and wait for them at the end.

    Gives their process numbers. They end when this process stops, fails or is killed.

    Raises:
        MachineError: One of them failed, which it has said.
    """
    context = multiprocessing.get_context("spawn")
    all_threads = torch.get_num_threads()
    threads = max(1, all_threads // jobs)
    workers = [context.Process(target=_worker, args=(grid, out, storage, threads, before)) for _ in range(jobs - 1)]
    try:
        if workers:
            resource_tracker.ensure_running()  # here, as its start lets signals through
        with signals.blocked():  # for good in the workers, which Ctrl-C in a terminal reaches as well
            for worker in workers:
                worker.start()
        torch.set_num_threads(threads)
        yield [worker.pid or 0 for worker in workers]
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        torch.set_num_threads(all_threads)
        for worker in workers:
            if worker.pid:
                worker.join()
    codes = {worker.exitcode for worker in workers} - {0}
    if codes:
        code = codes.pop()
        error = MachineError(f"a worker ended with exit code {code} (see above); the same command goes on")
        error.exit_code = code if code in EXIT_CODES else error.exit_code
        raise error


def _worker(grid: Grid, out: Path, storage: str | None, threads: int, before: int) -> None:
    """A further worker process; signals reach it through the first, which ends it by SIGTERM, or by its own end."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        backbone = load_backbone(grid.base)
        study = open_study(out, storage, grid.settings(backbone))
        Worker(grid, study, Display(new_console(stderr=True)), backbone, out, before=before).work()
    except KadaptError as error:
        if not isinstance(error, InterruptedRunError):
            print_line(new_console(stderr=True), f"kadapt: {error}")
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone; what was finished is in the study."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(TERMINATED)
