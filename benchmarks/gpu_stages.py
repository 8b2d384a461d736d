"""Everything about the kernels that needs a GPU, stage by stage, from a bare checkout:

    PYTHONPATH=.:kernels python3 benchmarks/gpu_stages.py STAGE --minutes 8 --out DIR

correct    every kernel and the operator against float64, twice; CUDA graphs, torch.compile, autocast, compute-sanitizer
gemm       cuBLAS against our own kernels with nothing to fuse, tile by tile
sweep      the tiles of the forward and the backward; prints the table to commit to tiles.py
matrix     the contenders of `kadapt bench-kernels` on packed qkv layers
step       training steps of vision transformers
profile    Nsight Compute on each large kernel, or its time where that tool is missing
backbone   pretrains the bundled backbone by pretrain_backbone.py

Rows go to DIR/STAGE.csv as they are measured; a second run adds what is missing. A case that fails is a row that says
how, and one that kills its process (a compiler that aborts, an illegal address, a hang) costs that process only.

What is timed has been held against float64 before, by the rule of `kadapt_kernels.testing`. Times are those of
`kadapt_cli.bench`: CUDA-graph replays and eager launches between events, on random inputs that rotate past the
last-level cache; medians with p20 and p80. `predicted_ratio` is to the frozen layer, by a roofline of 790 TFLOP/s and
4.3 TB/s that was written down before anything was measured, and takes our own product to be as fast as cuBLAS.

It needs torch, triton and rich, timm and peft for some contenders, and of kadapt only what needs no more than those.
Without a GPU every stage runs small shapes in Triton's interpreter, to test this script.
"""

import argparse
import csv
import faulthandler
import functools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for gpu_correct, which is beside this script
if not torch.cuda.is_available():  # Triton must know before it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from torch.nn import functional as F
from triton.errors import TritonError

from benchmarks.gpu_correct import LIMIT_S, Fused, Job, Row, Setup, case_of, correct, fused, run_all, this_script, wrong
from kadapt_cli import bench
from kadapt_cli.bench import options, timing
from kadapt_cli.bench.contenders import Shape
from kadapt_cli.bench.step import BUNDLED
from kadapt_cli.bench.sweep import Choice, backward_candidates, forward_candidates, literal, table_literal
from kadapt_kernels import testing
from kadapt_kernels.aot import tf32
from kadapt_kernels.blocks import INTERPRETED, Launch, layout
from kadapt_kernels.testing import Problem
from kadapt_kernels.tiles import BackwardTiles, Tile, architecture, backward_tiles, shared_limit

# What a kernel, its compiler, PyTorch, our own checks and tools raise: such a case is a row, not the end of the stage.
ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, TritonError, subprocess.SubprocessError)
RESTART = 75  # exit code of a worker whose CUDA context is lost

# (d, M): of the frozen layer's time, forward and then forward and backward, of the contenders of each order.
PREDICTED = {
    (192, 6304): ((1.08, 1.90, 16, 9.1), (3.2, 3.6, 3.6, 19, 10, 8)),
    (192, 25216): ((1.08, 1.23, 8.2, 6.6), (2.0, 2.0, 1.93, 9.2, 6.7, 5.0)),
    (192, 100864): ((1.08, 1.06, 6.2, 6.0), (1.7, 1.6, 1.51, 6.6, 5.8, 4.2)),
    (384, 6304): ((1.14, 1.32, 9.3, 5.2), (2.0, 2.1, 2.1, 11, 5.4, 4.9)),
    (384, 25216): ((1.14, 1.08, 5.2, 4.3), (1.54, 1.48, 1.52, 5.8, 4.3, 3.8)),
    (384, 100864): ((1.14, 1.02, 4.2, 4.1), (1.42, 1.33, 1.38, 4.5, 4.0, 3.5)),
    (768, 6304): ((1.07, 1.11, 6.0, 2.8), (1.39, 1.40, 1.53, 7.1, 2.8, 3.4)),
    (768, 25216): ((1.07, 1.03, 3.6, 2.6), (1.23, 1.20, 1.38, 4.0, 2.5, 3.1)),
    (768, 100864): ((1.07, 1.01, 3.0, 2.5), (1.19, 1.15, 1.35, 3.3, 2.5, 3.0)),
    (1024, 25216): ((1.05, 1.02, 3.2, 2.2), (1.17, 1.14, 1.36, 3.7, 2.1, 2.9)),
    (1024, 100864): ((1.05, 1.00, 2.7, 2.1), (1.14, 1.11, 1.34, 3.0, 2.1, 2.9)),
}
ORDERS = {
    "fwd": ("fused", "merge-lowrank", "reference-einsum", "peft-lora"),
    "fwd+bwd": ("fused", "merge-lowrank", "merge-dense", "reference-einsum", "peft-lora", "peft-lokr"),
}
PREDICTED_GEMM = "1.05-1.20"
PREDICTED_STEP = "1.04-1.07"


class Log:
    """DIR/STAGE.csv: what earlier runs found, and rows as they come. DIR/STAGE.running names the case under way."""

    def __init__(self, setup: Setup, stage: str) -> None:
        self.setup, self.limit_s = setup, STAGES[stage].limit_s
        self.path, self.marker = setup.out / f"{stage}.csv", setup.out / f"{stage}.running"
        self.machine = machine(setup.device)
        self.columns = ["case", *STAGES[stage].columns, "error", "seconds", *self.machine]
        self.rows: list[Row] = []
        setup.out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = list(reader)
            if reader.fieldnames != self.columns:
                raise SystemExit(
                    f"gpu_stages: {self.path} has other columns than this version writes; name a new --out"
                )
        if self.marker.exists():
            self.add(self.marker.read_text(), [{"error": "ended its process, or took too long"}])

    def wants(self, case: str) -> bool:
        """Whether the case is asked for, not measured yet, and there is time for it."""
        in_time = time.monotonic() < self.setup.deadline
        return in_time and self.setup.only in case and all(row["case"] != case for row in self.rows)

    def begin(self, case: str, times: int = 1) -> None:
        """Note the case for the process that comes after this one, should it die, or be ended for taking too long."""
        print(f"  {case[:110]}", flush=True)
        self.marker.write_text(case)
        faulthandler.dump_traceback_later(times * self.limit_s, exit=True, file=2)

    def end(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.marker.unlink(missing_ok=True)

    def add(self, case: str, found: Sequence[Row], **about: Any) -> None:
        """Append the rows of a case, which has ended."""
        new = not self.path.exists()
        full = [{"case": case} | about | row | self.machine for row in found]
        rows = [{name: rounded(row.get(name)) for name in self.columns} for row in full]
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows
        self.end()


def rounded(value: Any) -> str:
    """As a CSV file holds it, with the six digits that a time is good for."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> Row:
    """The columns that say where and when."""
    smi = shutil.which("nvidia-smi") if device.type == "cuda" else None
    return {
        "device": bench.device_name(device),
        "driver": shell([smi, "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0] if smi else "",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
    }


def shell(command: Sequence[str]) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = (done.stdout + done.stderr).strip()[-300:]
        raise RuntimeError(f"{Path(command[0]).name} ended with code {done.returncode}: {words}")
    return done.stdout


# What the stages share


def precompile(jobs: Sequence[Job]) -> None:
    """Compile the kernels of many cases at once, in threads; what does not compile fails again where it is launched."""
    if INTERPRETED.value:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for job in jobs:
            with suppress(*ERRORS):
                for kernel, grid, arguments, warps, stages in job.launches():
                    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
                    kernel.warmup(**arguments, **options, grid=grid)


@functools.lru_cache(2)
def inputs(setup: Setup, d: int, m: int) -> list[Problem]:
    """bf16 packed qkv layers with adapters on q and v, as many as do not fit the cache."""
    if setup.quick:
        return [testing.make(Shape(d, m).case, torch.bfloat16)]
    with torch.no_grad():
        return [replace(p, x=p.x.detach()) for p in timing.problems(Shape(d, m), "bf16", setup.device)]


def frozen(p: Problem) -> Problem:
    return replace(p, factors=[], segments=[])


def clock(setup: Setup, calls: Sequence[Callable[[], object]]) -> Row:
    """Times of a call, given one function for each set of inputs: by CUDA graph, and launched eagerly."""

    def each() -> None:
        for call in calls:
            call()

    def times(work: Callable[[], None]) -> list[float]:
        return [timing.timed(work, setup.device) / len(calls) for _ in range(setup.rounds)]

    each()
    eager = times(each)
    found = eager if setup.quick else times(timing.captured(each))
    names = ("time_ms_p20", "time_ms_p50", "time_ms_p80")
    return dict(zip(names, timing.quantiles(found), strict=True)) | {"eager_ms_p50": statistics.median(eager)}


# 2 gemm and 3 sweep


class Part(NamedTuple):
    """What is timed of the fused layer: some of its launches; and the results that must be right before."""

    adapted: bool
    launches: Callable[[Fused], list[Launch]]
    names: tuple[str, ...]


GRADIENTS = tuple(f"d{role}{i}" for i in range(2) for role in "abuv")
PARTS = {
    "frozen forward": Part(False, lambda made: made.forward, ("y",)),
    "frozen dx": Part(False, lambda made: made.backward, ("dx",)),
    "forward": Part(True, lambda made: made.forward, ("y",)),
    "dx": Part(True, lambda made: made.backward[-1:], ("dx",)),
    "gradients": Part(True, lambda made: made.backward[:-1], GRADIENTS),
}


class Timed(NamedTuple):
    """A part of a packed qkv layer with d columns and M rows of x."""

    setup: Setup
    log: Log
    part: str
    d: int
    m: int

    def about(self, tile: object) -> Row:
        tile = tile.dx if isinstance(tile, BackwardTiles) and self.part.endswith("dx") else tile
        return {"part": self.part, "d": self.d, "M": self.m, "tile": tile if tile == "cuBLAS" else literal(tile)}

    def cublas(self) -> Job:
        """The frozen product of the part by PyTorch."""

        def measure() -> list[Row]:
            sets = inputs(self.setup, self.d, self.m)
            if self.part.endswith("dx"):
                return self.row(clock(self.setup, [functools.partial(torch.matmul, p.dy, p.weight) for p in sets]))
            return self.row(clock(self.setup, [functools.partial(F.linear, p.x, p.weight, p.bias) for p in sets]))

        return Job(self.about("cuBLAS"), measure)

    def job(self, tile: Tile | BackwardTiles, predicted: object = "") -> Job:
        """The part with that tile, held against float64 and timed."""
        part = PARTS[self.part]
        tiles: tuple[Tile | None, BackwardTiles | None] = (tile, None) if isinstance(tile, Tile) else (None, tile)

        def make(p: Problem) -> Fused:
            return fused(p if part.adapted else frozen(p), *tiles)

        def needed(made: Fused) -> list[Launch]:
            return made.forward if part.names == ("y",) else [*made.forward, *made.backward]

        def launches() -> list[Launch]:
            return needed(make(inputs(self.setup, self.d, self.m)[0]))

        def measure() -> list[Row]:
            sets = inputs(self.setup, self.d, self.m)
            p, made = sets[0], [make(q) for q in sets]
            for one in made:
                run_all(needed(one))
            lines = wrong(made[0].results, p if part.adapted else frozen(p), part.names)
            if lines:
                return [{"error": f"not timed, wrong: {'; '.join(lines)[:300]}"}]
            times = clock(self.setup, [functools.partial(run_all, part.launches(one)) for one in made])
            return self.row(times | {"predicted_ratio": predicted})

        return Job(self.about(tile), measure, launches)

    def row(self, times: Row) -> list[Row]:
        """With the ratio to cuBLAS and TFLOP/s of the frozen product, where the part has one."""
        base = [r for r in self.log.rows if r["case"] == case_of(*self.about("cuBLAS").values()) and r["time_ms_p50"]]
        ratio = times["time_ms_p50"] / float(base[0]["time_ms_p50"]) if base else ""
        flops = {} if self.part == "gradients" else {"tflops": 6e-9 * self.m * self.d**2 / times["time_ms_p50"]}
        return [times | flops | {"ratio": ratio}]

    def best(self, candidates: Sequence[BackwardTiles]) -> BackwardTiles:
        """The fastest of the candidates that were measured, or the first."""
        times = {row["case"]: float(row["time_ms_p50"]) for row in self.log.rows if row["time_ms_p50"]}
        return min(candidates, key=lambda tiles: times.get(case_of(*self.about(tiles).values()), float("inf")))


def fastest(rows: Sequence[Row], count: int) -> list[Row]:
    """cuBLAS and the fastest of our own tiles, for each part and shape."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["time_ms_p50"]:
            groups.setdefault(case_of(row["part"], row["d"], row["M"], row["tile"] == "cuBLAS"), []).append(row)
    return [row for g in groups.values() for row in sorted(g, key=lambda row: float(row["time_ms_p50"]))[:count]]


def forward_tiles(setup: Setup, d: int, m: int) -> list[Tile]:
    """The candidates of `kadapt bench-kernels --sweep` with the longer contraction, or one of each form."""
    if setup.quick:
        return [Tile(32, 16, 16, 4, 2, 1, form) for form in (False, True)]
    found = forward_candidates(Shape(d, m), 2, shared_limit(architecture(setup.device)))
    return [tile for tile in found if tile.k == 64 and tile.stages > 2]


def table_tiles(setup: Setup, d: int, m: int) -> BackwardTiles:
    p = inputs(setup, d, m)[0]
    return backward_tiles(setup.device, p.x.dtype, m, d, layout(p.factors, p.segments, 3 * d))


def tiles_around(setup: Setup, base: BackwardTiles, field: str) -> list[BackwardTiles]:
    found = [tiles for tiles in backward_candidates(base, field) if field != "dx" or tiles.dx.k == 64]
    return [base, *(found[: field in ("dx", "splits")] if setup.quick else found)]


def gemm(setup: Setup, log: Log) -> Iterator[list[Job]]:
    """cuBLAS against our own kernels without adapters."""
    for d, m in setup.shapes(768, 384, 1024, 192, 1280):
        forward, dx = Timed(setup, log, "frozen forward", d, m), Timed(setup, log, "frozen dx", d, m)
        yield [forward.cublas(), *(forward.job(tile, PREDICTED_GEMM) for tile in forward_tiles(setup, d, m))]
        candidates = tiles_around(setup, table_tiles(setup, d, m), "dx")
        yield [dx.cublas(), *(dx.job(tiles, PREDICTED_GEMM) for tiles in candidates)]


def sweep(setup: Setup, log: Log) -> Iterator[list[Job]]:
    """Tiles of the adapted layer: the forward's, then one field of the backward's after the other, each from the best.

    The predicted ratios count products alone: 32 columns of h beside every program's first tile, and the rank-32 steps.
    """
    for d, m in setup.shapes(768, 384, 1024, 192):
        forward, tiles = Timed(setup, log, "forward", d, m), table_tiles(setup, d, m)
        candidates = forward_tiles(setup, d, m)
        jobs = [forward.job(tile, 1 + 32 / (tile.tiles * tile.n) + 64 / 3 / d) for tile in candidates]
        yield [forward.cublas(), *jobs]
        for field in tiles._fields:
            part = Timed(setup, log, "dx" if field == "dx" else "gradients", d, m)
            found = tiles_around(setup, tiles, field)
            jobs = [part.job(some, 1 + 64 / 3 / d if field == "dx" else "") for some in found]
            yield [part.cublas(), *jobs] if field == "dx" else jobs
            tiles = part.best(found)


def tile_table(rows: Sequence[Row], arch: str) -> str:
    """The fastest tiles as Python, to commit in tiles.py."""
    names: dict[str, Any] = {"Tile": Tile, "BackwardTiles": BackwardTiles, "__builtins__": {}}
    choices = []
    for row in fastest(rows, 1):
        if row["tile"] != "cuBLAS" and row["part"] in ("forward", "gradients"):
            direction = "forward" if row["part"] == "forward" else "backward"
            shape = Shape(int(row["d"]), int(row["M"]))
            tile = eval(str(row["tile"]), names)  # what `literal` wrote
            choices.append(Choice(direction, 2, shape, tile, float(row["time_ms_p50"])))
    return table_literal(sorted(choices, key=lambda choice: choice.direction, reverse=True), arch)


# 4 matrix and 5 step


def matrix(setup: Setup, log: Log) -> Iterator[list[Job]]:
    """The layer modes of `kadapt bench-kernels`, one case a shape, since its contenders take turns."""
    order = [("bf16", d, m) for d in (768, 384, 1024, 192) for m in (25216, 6304, 197, 1576, 6400, 100864)]
    order += [(dtype, 768, m) for dtype in ("fp16", "tf32", "fp32") for m in (6304, 25216)]
    for dtype, d, m in [("fp32", 192, 788)] if setup.quick else order:
        shape = Shape(d, m)
        yield [Job({"dtype": dtype, "d": d, "M": m}, functools.partial(compare, setup, dtype, shape))]


def compare(setup: Setup, dtype: str, shape: Shape) -> list[Row]:
    names = "frozen,kadapt,merge-lowrank" if setup.quick else None
    wanted = options.plan(device=setup.device.type, contenders=names, modes=",".join(timing.LAYER_MODES))
    wanted = replace(wanted, shapes=(shape,), dtypes=(dtype,), rounds=setup.rounds)
    torch.compiler.reset()
    with tf32(dtype == "tf32"):
        groups = list(bench.layer_rows(wanted, shape, dtype, say))
    return [asdict(row) | {"predicted_ratio": predicted(row)} for rows in groups for row in rows]


def say(line: str) -> None:
    print(f"    {line}", flush=True)


def predicted(row: timing.Row) -> object:
    """The prediction for a row, or nothing; "kadapt" takes the fused kernels there, and both merges one forward."""
    names = {"kadapt": "fused"} | ({"merge-dense": "merge-lowrank"} if row.mode == "fwd" else {})
    if row.dtype not in ("bf16", "fp16") or row.mode not in ORDERS or (row.d, row.M) not in PREDICTED:
        return ""
    values = PREDICTED[row.d, row.M][row.mode != "fwd"]
    return dict(zip(ORDERS[row.mode], values, strict=True)).get(names.get(row.contender, row.contender), "")


def step(setup: Setup, log: Log) -> Iterator[list[Job]]:
    """Training steps of whole models."""
    models = [(f"vit_{size}_patch16_224", batch) for batch in (128, 32) for size in ("base", "large")]
    for model, batch in [(BUNDLED, 2)] if setup.quick else models:
        yield [Job({"model": model, "batch_size": batch}, functools.partial(train_steps, setup, model, batch))]


def train_steps(setup: Setup, model: str, batch: int) -> list[Row]:
    names = "frozen,kadapt,full,linear-probe" + ("" if setup.quick else ",merge-lowrank,peft-lora,peft-lokr")
    wanted = options.plan(device=setup.device.type, contenders=names, modes="step", model=model)
    wanted = replace(wanted, batch_size=batch, rounds=setup.rounds)
    torch.compiler.reset()
    rows = bench.step_rows(wanted, wanted.dtypes[0], say)
    found = []
    for row in rows:
        speed = batch / row.time_ms_p50 * 1e3 if row.time_ms_p50 else ""
        expected = PREDICTED_STEP if row.contender == "kadapt" and "base" in model else ""
        found.append(asdict(row) | {"images_per_s": speed, "predicted_ratio": expected})
    return found


# 6 profile

PROFILED = {
    "forward": "forward_kernel", "frozen forward": "forward_kernel", "dx": "dx_kernel",
    "project": "project_kernel", "tall": "tall_kernel",
}  # fmt: skip
RAW = ("--print-units", "base")


def profile(setup: Setup, log: Log) -> Iterator[list[Job]]:
    """The large kernels at d = 768, M = 25,216, with the tiles of the table."""
    for name in PROFILED:
        d, m = setup.shapes(768)[-1]
        yield [Job({"kernel": name, "d": d, "M": m}, functools.partial(profile_one, setup, name, d, m))]


def chosen(setup: Setup, name: str) -> tuple[list[Launch], list[Launch]]:
    """All launches of the layer, and the last of the kernel; none if the table chooses another one."""
    p = inputs(setup, *setup.shapes(768)[-1])[0]
    made = fused(frozen(p) if name.startswith("frozen") else p)
    launches = [*made.forward, *made.backward]
    return launches, [launch for launch in launches if launch.kernel.fn.__name__ == PROFILED[name]][-1:]


def profile_one(setup: Setup, name: str, d: int, m: int) -> list[Row]:
    """Figures of Nsight Compute, whose report becomes DIR/profile-NAME.txt, or else the kernel's time."""
    launches, last = chosen(setup, name)
    if not last:
        return [{"tool": "not chosen by the table"}]
    tile = {key: value for key, value in last[0].arguments.items() if re.match("BLOCK_|TILES|DESCRIPTOR", key)}
    row = {"tile": tile, "ideal_bytes": ideal_bytes(name, d, m)}
    tool = None if setup.quick else shutil.which("ncu")
    if tool is None:
        run_all(launches)
        return [row | {"tool": "events", "time_ms": clock(setup, [last[0].run])["time_ms_p50"]}]
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "report.ncu-rep")
        which = ["--kernel-name", PROFILED[name], "--launch-skip", "2", "--launch-count", "1", "-o", report]
        script = this_script("profile", setup.out, "--one", name)
        shell([tool, "--set", "full", "--clock-control", "none", *which, *script])
        text = shell([tool, "-i", report, "--page", "details"])
        (setup.out / f"profile-{name.replace(' ', '-')}.txt").write_text(text[: 15 * 2**20])
        return [row | {"tool": "ncu"} | ncu_figures(shell([tool, "-i", report, "--page", "raw", "--csv", *RAW]))]


def run_one(setup: Setup, name: str) -> None:
    """What runs under the profiler: everything once, then the kernel three times more."""
    launches, last = chosen(setup, name)
    run_all([*launches, *last * 3])
    if not setup.quick:
        torch.cuda.synchronize()


def ideal_bytes(name: str, d: int, m: int) -> int:
    """Bytes that a bf16 kernel moves when it moves each matrix once; h and g have 64 columns, q and v are 2/3 of dy."""
    x, y, w, h = 2 * m * d, 6 * m * d, 6 * d * d, 2 * m * 64
    kernels = {"forward": x + w + y + h, "frozen forward": x + w + y, "dx": y + w + x + h}
    kernels |= {"project": y * 2 // 3 + h, "tall": x + h}
    return kernels[name]


def ncu_figures(text: str) -> Row:
    """Time, tensor throughput, DRAM bytes and top stall reasons from `ncu --page raw --csv`: names, units, values."""
    names, _, values = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))[:3]
    metrics = {}
    for name, value in zip(names, values, strict=True):
        with suppress(ValueError):
            metrics[name] = float(value.replace(",", ""))

    def largest(pattern: str) -> float | str:
        return max((value for name, value in metrics.items() if re.fullmatch(pattern, name)), default="")

    prefix = "smsp__pcsamp_warps_issue_stalled_"
    stalls = {n.removeprefix(prefix): v for n, v in metrics.items() if n.startswith(prefix) and "not_issued" not in n}
    top, total = sorted(stalls, key=lambda name: -stalls[name])[:3], sum(stalls.values())
    return {
        "time_ms": metrics.get("gpu__time_duration.sum", 0.0) * 1e-6 or "",
        "tensor_percent": largest(r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_\w+"),
        "sm_percent": largest(r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed"),
        "dram_read_bytes": largest(r"dram__bytes_read\.sum"),
        "dram_write_bytes": largest(r"dram__bytes_write\.sum"),
        "stalls": ", ".join(f"{name} {stalls[name] / total:.0%}" for name in top if total),
    }


# 7 backbone


def backbone(setup: Setup, log: Log) -> Iterator[list[Job]]:
    """A trial of two epochs, then as many as fit; the second case has no row before its last epoch is done."""
    yield [Job({"run": "trial"}, functools.partial(trial, setup))]
    yield [Job({"run": "whole"}, functools.partial(pretrain, setup, log))]


def pretrain_command(setup: Setup, out: Path, epochs: int) -> list[str]:
    train, test = (sorted(setup.images.glob(f"*{split}*")) for split in ("train", "test"))
    if len(train) != 1 or len(test) != 1:
        raise SystemExit(f"gpu_stages: --images: {setup.images} must hold one *train* and one *test* archive or folder")
    script = str(Path(__file__).resolve().parent / "pretrain_backbone.py")
    small = ["--dim", "16", "--depth", "1", "--heads", "1", "--image-size", "8", "--batch-size", "8"]
    options = ["--test", str(test[0]), "--out", str(out), "--epochs", str(epochs), *(small if setup.quick else [])]
    return [sys.executable, script, str(train[0]), *options]


def trial(setup: Setup) -> list[Row]:
    """Images a second, and how many epochs fit into nine tenths of the time that is left."""
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder) / "trial", time.monotonic()
        shell(pretrain_command(setup, out, 2))
        first, second = read_rows(out / "log.csv")
    start_s = time.monotonic() - began - float(first["time_s"]) - float(second["time_s"])
    fit = int((0.9 * (setup.deadline - time.monotonic()) - start_s) / float(second["time_s"]))
    epochs = max(2, min(3 if setup.quick else 1000, fit))
    return [{"epochs": epochs, "images_per_s": second["images_per_s"], "start_s": start_s}]


def pretrain(setup: Setup, log: Log) -> list[Row]:
    out, planned = setup.out / "backbone", int(next(row["epochs"] for row in log.rows if row["case"] == "trial"))
    resume = ["--resume"] if (out / "state.safetensors").exists() else []
    minutes = str(max(0.0, setup.deadline - time.monotonic()) / 60)
    shell([*pretrain_command(setup, out, planned), "--minutes", minutes, *resume])
    epochs = read_rows(out / "log.csv")
    if len(epochs) < planned:
        say(f"{len(epochs)} of {planned} epochs are done")
        return []
    speed = statistics.median(float(row["images_per_s"]) for row in epochs)
    return [{"epochs": planned, "images_per_s": speed, "test_accuracy": epochs[-1]["test_accuracy"]}]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The stages, and how they run


class Stage(NamedTuple):
    """Its jobs, in batches that are compiled together; its columns; those printed at the end, of the rows picked."""

    jobs: Callable[[Setup, Log], Iterator[list[Job]]]
    columns: tuple[str, ...]
    shown: tuple[str, ...]
    pick: Callable[[list[Row]], list[Row]] = list
    limit_s: float = LIMIT_S


def not_right(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["result"] not in ("right", "does not apply")]


def main_rows(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["mode"] != "bwd" and (str(r["M"]) in ("788", "25216") or r["contender"] == "fused")]


CHECKED = ("problem", "variant", "dtype", "result", "detail")
PART = ("part", "d", "M", "time_ms_p50", "eager_ms_p50", "ratio", "predicted_ratio", "tflops", "tile")
BENCH = (*(field.name for field in fields(timing.Row)), "predicted_ratio")
MATRIX = ("dtype", "d", "M", "mode", "contender", "time_ms_p50", "ratio_frozen", "ratio_own_gemm", "predicted_ratio")
STEP = (
    "model", "batch_size", "contender", "time_ms_p50", "host_ms_p50", "images_per_s", "ratio_frozen",
    "predicted_ratio", "peak_bytes",
)  # fmt: skip
PROFILE = (
    "kernel", "d", "M", "tool", "time_ms", "tensor_percent", "sm_percent", "dram_read_bytes", "dram_write_bytes",
    "ideal_bytes", "stalls", "tile",
)  # fmt: skip
BACKBONE = ("run", "epochs", "images_per_s", "start_s", "test_accuracy")
TIMES = ("time_ms_p20", "time_ms_p80")

STAGES = {
    "correct": Stage(lambda setup, log: correct(setup), CHECKED, CHECKED, not_right),
    "gemm": Stage(gemm, (*PART, *TIMES), PART, functools.partial(fastest, count=2)),
    "sweep": Stage(sweep, (*PART, *TIMES), PART, functools.partial(fastest, count=1)),
    "matrix": Stage(matrix, BENCH, MATRIX, main_rows, 400.0),
    "step": Stage(step, (*BENCH, "images_per_s"), STEP, list, 400.0),
    "profile": Stage(profile, PROFILE, PROFILE),
    "backbone": Stage(backbone, BACKBONE, BACKBONE, list, 3600.0),
}


def work(stage: str, setup: Setup) -> int:
    """Do what is missing of a stage, in this process; RESTART asks for another one."""
    log = Log(setup, stage)
    with timing.on_stream(setup.device):
        for batch in STAGES[stage].jobs(setup, log):
            if time.monotonic() >= setup.deadline:
                print("stopped at --minutes; run it again to go on", flush=True)
                break
            wanted = [job for job in batch if log.wants(job.case)]
            if wanted and log.wants(compiling := f"compile before {wanted[0].case}"):
                log.begin(compiling, times=3)
                precompile(wanted)
                log.end()
            for job in wanted:
                if not log.wants(job.case):
                    break
                log.begin(job.case)
                began = time.monotonic()
                try:
                    found = job.measure()
                except ERRORS as error:
                    found = [{"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}]
                log.add(job.case, found, seconds=time.monotonic() - began, **job.about)
                if context_lost(setup.device):
                    return RESTART
    return 0


def context_lost(device: torch.device) -> bool:
    """Whether an error has left CUDA unusable in this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return True
    return False


def supervise(stage: str, setup: Setup, arguments: Sequence[str]) -> int:
    """Run a stage in a process of its own, and again whenever a case has killed that."""
    while True:
        left = str(max(0.0, setup.deadline - time.monotonic()) / 60)
        script = str(Path(__file__).resolve())
        code = subprocess.run([sys.executable, script, *arguments, "--minutes", left, "--worker"]).returncode
        if code != RESTART and not (code and (setup.out / f"{stage}.running").exists()):
            return code


def announce(stage: str, setup: Setup) -> None:
    """Where this runs, and what was predicted."""
    print(f"{stage}: {case_of(*machine(setup.device).values())}")
    if setup.quick:
        print("No GPU: small shapes in Triton's interpreter. Nothing printed here is a GPU figure.")
    if stage == "gemm":
        print(f"predicted_ratio: our product takes {PREDICTED_GEMM} of cuBLAS's time")
    if stage == "step":
        print(f"predicted_ratio: kadapt takes {PREDICTED_STEP} of the frozen step of ViT-B/16")
    for mode, order in ORDERS.items() if stage == "matrix" else ():
        print(f"predicted_ratio, {mode}, bf16: {', '.join(order)}")
        for (d, m), values in PREDICTED.items():
            print(f"  d = {d:4}  M = {m:6} " + "".join(f"{value:7}" for value in values[mode != "fwd"]))


def summarise(stage: str, setup: Setup) -> None:
    """A short table, what failed, and where the rows are."""
    log, heads = Log(setup, stage), STAGES[stage].shown
    failed = [row for row in log.rows if row["error"]]
    rows = STAGES[stage].pick([row for row in log.rows if not row["error"]])[-60:]
    lines = [list(heads), *([short(row[name]) for name in heads] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines if rows else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if stage == "sweep":
        print(tile_table(log.rows, architecture(setup.device)))
    for row in failed[:20]:
        print(f"failed: {row['case']}: {row['error'][:160]}")
    print(f"{len({row['case'] for row in log.rows})} cases, {len(failed)} failed; rows in {log.path}")


def short(cell: str) -> str:
    try:
        return f"{float(cell):.4g}"
    except ValueError:
        return cell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is begun after that")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases that contain this")
    words = "backbone: a folder with one *train* and one *test* archive of CLASS/IMAGE files"
    parser.add_argument("--images", type=Path, default=Path("pretrain"), metavar="DIR", help=words)
    parser.add_argument("--one", choices=list(PROFILED), help="profile: run one kernel and leave, under a profiler")
    parser.add_argument("--worker", action="store_true", help="work in this process and print no table")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setup = Setup(options.out, time.monotonic() + 60 * options.minutes, device, options.images, options.case)
    if options.one:
        run_one(setup, options.one)
        return 0
    if options.worker:
        return work(options.stage, setup)
    announce(options.stage, setup)
    code = supervise(options.stage, setup, sys.argv[1:] if arguments is None else arguments)
    summarise(options.stage, setup)
    return code


if __name__ == "__main__":
    sys.exit(main())
