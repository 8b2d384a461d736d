"""How fast and how exact each way of computing an adapted layer is: the worker of `kadapt bench-kernels`.

    options.plan -> run: accuracy gate -> rows, mode by mode -> Result -> tables, CSV, JSON, picture

Contenders that compute the same function are first held against float64 by the rule of `kadapt_kernels.testing`, and
only those that pass are timed: see `gate` and `timing`.

Modes: "fwd" is a forward pass that keeps what its backward needs, "bwd" the backward alone, "fwd+bwd" both, and "step"
a whole training step of a vision transformer (forward, loss, backward, AdamW) with the contender in every block. The
layer's bias is frozen in the first three. `frozen` has no adapter and computes the gradient of its input, as an adapter
in an earlier block needs it; in a step the gradient begins at the first block's qkv, where the adapters' begins.

On CUDA times come from events, by CUDA graph where the contender can be captured and by eager launches otherwise
(column `launch`), and `peak_bytes` is the largest memory in use during a call beyond the layer's inputs, or during a
step with everything it needs. On a CPU `peak_bytes` is not measured. Steps are launched eagerly: where `host_ms_p50` of
one is no less than its time, the GPU waits for Python.

It needs torch, rich and kadapt_kernels; timm for steps and peft for its adapters where they are installed.
"""

import importlib.util
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from kadapt_cli.bench import timing
from kadapt_cli.bench.contenders import CONTENDERS, DTYPES, Layer, Shape
from kadapt_cli.bench.options import Plan, chosen
from kadapt_cli.bench.picture import picture
from kadapt_cli.bench.step import Step, qkv_shape, training_step
from kadapt_cli.bench.tables import csv_writer
from kadapt_cli.bench.timing import LAYER_MODES, Row, Sampler, failures, one_line
from kadapt_cli.errors import MachineError, UsageError, shown
from kadapt_kernels import testing
from kadapt_kernels.aot import tf32
from kadapt_kernels.testing import Problem, Results
from kadapt_kernels.tiles import forward_tile

Say = Callable[[str], object]

JSON_COLUMNS = [f.name for f in fields(Row)][:12]  # up to eager_err


@dataclass
class Result:
    """The rows so far, the machine's name, and lines to print below the tables."""

    device: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        rows = [{name: _finite(getattr(row, name)) for name in JSON_COLUMNS} for row in self.rows]
        return {"schema_version": 1, "device": self.device, "rows": rows}


def _finite(value: Any) -> Any:
    """JSON has no NaN: the error of a contender that made one is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(wanted: Plan, say: Say = print, table: Path | None = None, drawing: Path | None = None) -> Result:
    """Measure a plan; rows go to the CSV file as soon as they are there, so that an interrupt keeps them.

    Args:
        wanted: What to measure.
        say: Gets a line of progress for every shape and mode, and what was left out.
        table: A CSV file to append to, or None.
        drawing: An SVG file to write, or None.

    Raises:
        UsageError: The CSV file has other columns, or a file cannot be written.
    """
    result = Result(device_name(wanted.device))
    write = csv_writer(table, result.device) if table else lambda rows: None
    if drawing:
        _write(drawing, "")

    def note(line: str) -> None:
        if line not in result.notes:
            result.notes.append(line)
            say(line)

    for line in wanted.missing:
        note(line)
    if wanted.device.type == "cpu":
        note(f"These are CPU figures ({result.device}); they say nothing about a GPU.")
    began = time.monotonic()
    with timing.on_stream(wanted.device):
        for rows in _all_rows(wanted, lambda line: say(f"{time.monotonic() - began:4.0f} s  {line}")):
            result.rows += rows
            write(rows)
            for row in rows:
                if row.note:
                    note(f"{row.contender} ({row.dtype}, d = {row.d}): {row.note}")
    if drawing:
        _write(drawing, picture(result.device, result.rows))
    return result


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--svg: {path} cannot be written: {error}") from error


def _all_rows(wanted: Plan, say: Say) -> Iterator[list[Row]]:
    """Dtype by dtype, width by width; the progress counts shapes and, last, the step."""
    shapes = sorted(wanted.shapes, key=lambda shape: shape.d) if wanted.modes != ("step",) else []
    total, done = len(wanted.dtypes) * (len(shapes) + ("step" in wanted.modes)), itertools.count(1)

    def counted() -> Say:
        place = f"{next(done)}/{total}"
        return lambda line: say(f"{place}  {line}")

    for dtype in wanted.dtypes:
        with tf32(dtype == "tf32"):
            for _, group in itertools.groupby(shapes, key=lambda shape: shape.d):
                torch.compiler.reset()  # or the code of other widths counts against the limit of recompilations
                for shape in group:
                    yield from layer_rows(wanted, shape, dtype, counted())
            if "step" in wanted.modes:
                torch.compiler.reset()
                yield step_rows(wanted, dtype, counted())


def gate(names: Sequence[str], shape: Shape, dtype: str, device: torch.device) -> dict[str, Row]:
    """A row for each contender with its error against float64; the note of one that must not be timed says why.

    Our own paths are held to the rule of `kadapt_kernels.testing`, at most twice the error of plain PyTorch plus eps;
    other people's algorithms, which sum in another order, to eight times. On CUDA with the rows that are timed, up to
    25,216, so that the tiles that are timed are those that were checked; elsewhere with 197.
    """
    rows = {name: Row(name, "", *shape, dtype) for name in names}
    most = 128 * 197 if device.type == "cuda" else 197
    whole = testing.make(Shape(shape.d, min(shape.M, most)).case, DTYPES[dtype], str(device))
    for computes, problem in (("adapted", whole), ("frozen", replace(whole, factors=[], segments=[]))):
        answers = {name: t for name, t in testing.exact(problem).items() if name != "dbias"}  # which nothing computes
        measure = testing.allowance(problem, answers)
        for row in rows.values():
            if CONTENDERS[row.contender].computes == computes:
                _judge(row, problem, answers, measure)
    return rows


def _judge(row: Row, problem: Problem, answers: Results, measure: Mapping[str, float]) -> None:
    """Fill in the errors, or the note."""
    contender = CONTENDERS[row.contender]
    build = contender.build
    assert build is not None
    try:
        found = testing.run(problem, lambda p: build(replace(p, bias=p.bias.detach())).forward())  # type: ignore[union-attr]
    except failures() as error:
        row.note = f"not timed: {one_line(error)}"
        return
    largest = {name: answer.abs().max().item() for name, answer in answers.items()}
    errors = testing.errors(found, answers)
    row.max_err, row.eager_err = (max(e[name] / largest[name] for name in answers) for e in (errors, measure))
    wrong = testing.failures(found, problem, factor=contender.factor, answers=answers, measure=measure)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        row.note = f"not timed: accuracy gate: {wrong[0]}{more}"


def layer_rows(wanted: Plan, shape: Shape, dtype: str, say: Say) -> Iterator[list[Row]]:
    """The rows of one shape, mode by mode."""
    where = f"{dtype}  d = {shape.d}  M = {shape.M}"
    say(f"{where}: accuracy")
    names = [name for name in wanted.contenders if CONTENDERS[name].build]
    checked = gate(names, shape, dtype, wanted.device)
    inputs = timing.problems(shape, dtype, wanted.device)
    for mode in LAYER_MODES:
        if mode in wanted.modes:
            say(f"{where}: {mode}")
            yield _timed_layers([replace(row, mode=mode) for row in checked.values()], inputs, wanted)


def _timed_layers(rows: list[Row], inputs: Sequence[Problem], wanted: Plan) -> list[Row]:
    samplers: dict[str, dict[str, Sampler]] = {"eager": {}, "graph": {}}
    turn = itertools.count()
    for row in rows:
        build = CONTENDERS[row.contender].build
        if build and not row.note:
            _prepare(row, [build(p) for p in inputs], wanted.device, samplers, turn)
    for launch, some in samplers.items():
        timing.fill({row.contender: row for row in rows}, timing.take_turns(some, wanted.rounds), launch)
    return rows


def _prepare(
    row: Row, layers: list[Layer], device: torch.device, samplers: dict[str, dict[str, Sampler]], turn: Iterator[int]
) -> None:
    """Warm a contender up, measure its memory, and add how to sample its time; what it raises becomes its note."""
    try:
        timing.calls(layers, row.mode)()
        row.saved_bytes = timing.saved_bytes(layers[0])
        row.peak_bytes = timing.peak_bytes(lambda: timing.calls(layers[:1], row.mode)(), device)
        samplers["eager"][row.contender] = timing.eager_sampler(layers, row.mode, device, turn)
    except failures() as error:
        row.note = f"not timed: {one_line(error)}"
        return
    row.trained = sum(t.numel() for t in layers[0].trained)
    row.tile = _tile(row, layers[0].problem)
    if device.type == "cuda":
        try:
            samplers["graph"][row.contender] = timing.graph_sampler(layers, row.mode, device)
        except failures() as error:
            row.note = f"no CUDA graph: {one_line(error)}"


def _tile(row: Row, problem: Problem) -> str:
    """The forward's tile of a contender that runs it."""
    if row.contender not in ("fused", "frozen-own-gemm"):
        return ""
    from kadapt_kernels.blocks import layout

    adapters = (problem.factors, problem.segments) if row.contender == "fused" else ([], [])
    how = layout(*adapters, len(problem.weight))
    tile = forward_tile(problem.x.device, problem.x.dtype, row.M, row.d, how)
    return " ".join(f"{name}={value}" for name, value in tile._asdict().items())


def step_rows(wanted: Plan, dtype: str, say: Say) -> list[Row]:
    """One row for each contender: a training step of the model on random images."""
    say(f"{dtype}  {wanted.model}  batch {wanted.batch_size}: step")
    checked = gate(wanted.contenders, qkv_shape(wanted.model, wanted.batch_size), dtype, wanted.device)
    about: dict[str, Any] = {"mode": "step", "model": wanted.model, "batch_size": wanted.batch_size}
    rows = {name: replace(row, **about) for name, row in checked.items()}
    samplers: dict[str, Sampler] = {}
    for row in rows.values():
        if not row.note:
            _prepare_step(row, wanted, samplers)
    timing.fill(rows, timing.take_turns(samplers, wanted.rounds), "eager")
    return list(rows.values())


def _prepare_step(row: Row, wanted: Plan, samplers: dict[str, Sampler]) -> None:
    steps: list[Step] = []

    def build_and_warm_up() -> None:
        contender = CONTENDERS[row.contender]
        steps.append(training_step(contender, wanted.model, wanted.batch_size, row.dtype, wanted.device))
        for _ in range(2):  # the optimizer's state comes with the first
            steps[0].call()

    try:
        row.peak_bytes = timing.peak_bytes(build_and_warm_up, wanted.device)
    except failures() as error:
        row.note = f"not timed: {one_line(error)}"
        return
    row.trained = steps[0].trained
    rounds = 5 if wanted.device.type == "cuda" else 1
    row.host_ms_p50 = statistics.median(timing.host_ms(steps[0].call, wanted.device) for _ in range(rounds))
    samplers[row.contender] = lambda: timing.timed(steps[0].call, wanted.device)


def aot(arch: str, dtype: str | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """The ahead-of-time report of the GPU kernels: what the compiler makes of them for an architecture, without one.

    Raises:
        UsageError: An unknown architecture or dtype; lists the known ones.
        MachineError: Triton is not installed.
    """
    from kadapt_kernels import aot as compiler

    if arch not in compiler.TARGETS:
        raise UsageError(f"--aot: unknown architecture {shown(arch)!r}; known: {', '.join(compiler.TARGETS)}")
    dtypes = chosen("--dtype", dtype, DTYPES)
    if importlib.util.find_spec("triton") is None:
        raise MachineError("--aot: it needs Triton, which is not installed; pip install triton")
    if quick:
        return compiler.report(arch, dtypes or ("bf16",), (768,), rows=(128 * 197,))
    return compiler.report(arch, dtypes or ("bf16", "fp16", "fp32"))
