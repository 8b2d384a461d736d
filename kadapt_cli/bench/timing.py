"""How long a call takes and what memory it needs, and the row of the result that holds it.

All contenders of a shape take turns within each round, on random inputs that rotate through more memory than the
last-level cache holds; a ratio is the median over the rounds of the time divided by that of `frozen` in the same round.
"""

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kadapt_cli.bench.contenders import DTYPES, Layer, Shape, flat
from kadapt_kernels import testing
from kadapt_kernels.testing import Problem

LAYER_MODES = ("fwd", "bwd", "fwd+bwd")
Sampler = Callable[[], float]  # ms of one call


@dataclass
class Row:
    """One line of the result; times are None where a contender was not timed, and `note` says why.

    `max_err` and `eager_err` are the largest error of y or any gradient relative to the largest number of the exact
    answer: the contender's, and that of plain PyTorch in the same dtype (`kadapt_kernels.testing.allowance`). FLOPs and
    bytes are the frozen layer's. `host_ms_p50` is how long a training step keeps one core, which launches it: a GPU
    that is done sooner waits.
    """

    contender: str
    mode: str
    d: int
    M: int
    dtype: str
    time_ms_p20: float | None = None
    time_ms_p50: float | None = None
    time_ms_p80: float | None = None
    ratio_frozen: float | None = None
    peak_bytes: int | None = None
    max_err: float | None = None
    eager_err: float | None = None
    ratio_own_gemm: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    saved_bytes: int | None = None
    trained: int | None = None
    tile: str = ""
    launch: str = ""
    eager_ms_p50: float | None = None
    host_ms_p50: float | None = None
    rounds: int = 0
    model: str = ""
    batch_size: int | None = None
    note: str = ""


def fill(rows: Mapping[str, Row], times: Mapping[str, list[float]], launch: str) -> None:
    """Write sampled times (ms) into the rows, and what follows from them."""
    for name, samples in times.items():
        row = rows[name]
        row.time_ms_p20, row.time_ms_p50, row.time_ms_p80 = quantiles(samples)
        row.launch, row.rounds = launch, len(samples)
        if launch == "eager":
            row.eager_ms_p50 = row.time_ms_p50
        row.ratio_frozen = _ratio(samples, times.get("frozen"))
        row.ratio_own_gemm = _ratio(samples, times.get("frozen-own-gemm"))
        if row.mode in LAYER_MODES:
            shape = Shape(row.d, row.M)
            row.tflops = shape.flops(row.mode) / row.time_ms_p50 * 1e-9
            row.gb_per_s = shape.bytes(row.mode, DTYPES[row.dtype].itemsize) / row.time_ms_p50 * 1e-6


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 5], statistics.median(ordered), ordered[-1 - len(ordered) // 5]


def _ratio(samples: list[float], base: list[float] | None) -> float | None:
    return statistics.median(t / b for t, b in zip(samples, base, strict=True)) if base else None


def problems(shape: Shape, dtype: str, device: torch.device) -> list[Problem]:
    """Sets of random inputs that together do not fit the last-level cache; at most 128."""
    size = DTYPES[dtype].itemsize * (7 * shape.M * shape.d + 3 * shape.d**2)
    count = min(math.ceil(1.25 * cache_bytes(device) / size), 128)
    return [_problem(shape, DTYPES[dtype], device, seed) for seed in range(count)]


def _problem(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """As `testing.make`, but its large tensors are drawn where they are used."""
    small = testing.make(Shape(shape.d, 1).case, dtype, str(device), seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    x, dy = (
        torch.randn(shape.M, columns, dtype=dtype, device=device, generator=generator)
        for columns in (shape.d, 3 * shape.d)
    )
    for tensor in (x, *flat(small)):
        tensor.requires_grad_()
    return replace(small, x=x, dy=dy)


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache; 32 MiB where a CPU does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max([int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units], default=32 * 2**20)


def take_turns(samplers: Mapping[str, Sampler], rounds: int) -> dict[str, list[float]]:
    """Times (ms) of each contender; within a round every one has its turn."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            times[name].append(sample())
    return times


def eager_sampler(layers: Sequence[Layer], mode: str, device: torch.device, turn: Iterator[int]) -> Sampler:
    """A sample is one call on the next inputs; on CUDA, one call on each, since an event cannot resolve a short one.

    `turn` counts the samples of all contenders that share inputs: the next one must not find its own in the cache.
    """

    def sample() -> float:
        some = layers if device.type == "cuda" else [layers[next(turn) % len(layers)]]
        return timed(calls(some, mode), device) / len(some)

    return sample


def graph_sampler(layers: Sequence[Layer], mode: str, device: torch.device) -> Sampler:
    """A sample is the replay of a CUDA graph with one call on each of the inputs."""
    replay = captured(calls(layers, mode, keep=mode == "bwd"))
    return lambda: timed(replay, device) / len(layers)


def calls(layers: Sequence[Layer], mode: str, keep: bool = False) -> Callable[[], None]:
    """What is timed: one call on each of the layers. In "bwd" their forward passes are done here, beforehand."""
    outputs = [layer.forward() for layer in layers] if mode == "bwd" else []

    def work() -> None:
        for i, layer in enumerate(layers):
            y = outputs[i] if outputs else layer.forward()
            if mode != "fwd":
                layer.backward(y, keep)

    return work


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """A function that replays the work from a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()

    def replay(work: object = work) -> None:  # the graph reads what the work keeps alive
        graph.replay()

    return replay


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the work on the device."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def host_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until the work is launched, on a device that has nothing else to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The largest CUDA memory in use during the work beyond what was in use before it; None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(layer: Layer) -> int:
    """Bytes that the forward keeps for the backward, without weights, factors and whatever else was there before."""
    p = layer.problem
    known = {t.untyped_storage().data_ptr() for t in (p.weight, p.bias, *flat(p), *layer.trained) if t is not None}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer.forward()
    del y
    return sum(storages.values())


def on_stream(device: torch.device) -> AbstractContextManager[object]:
    """A CUDA stream of one's own: the default one cannot be captured, and a backward runs where its forward ran."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def failures() -> tuple[type[Exception], ...]:
    """What a contender may raise: out of memory, a compiler that is missing or fails, a kernel that does not fit."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
