"""Every kernel compiled ahead of time for a named GPU, without one, and what came out: a table of plain rows.

A launch says all that a compiler needs (`Launch`: kernel, arguments, warps, stages), and launches are built on the meta
device, so what is compiled here is what would run. Each row says how many registers a thread has and what it spills,
the shared memory of a program, the tensor-core instructions in the code, and what the main loops leave in flight while
an iteration waits.

Compilers may abort the process that runs them, so the work is done by two processes that print one row after another;
the row after which one dies is the error, and the rest goes to a fresh one. By hand::

    python -m kadapt_kernels.aot sm_90 --dtype bf16 --width 768
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch
from torch import Tensor

from kadapt_kernels.factors import KronFactors, Rows
from kadapt_kernels.tiles import DX, FORWARD, PROJECT, TALL, BackwardTiles, Tile, backward_tiles, forward_tile

if TYPE_CHECKING:
    from kadapt_kernels.blocks import Launch

TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
WIDTHS = (192, 384, 768, 1024, 1280)
ROWS = (197, 8 * 197, 32 * 197, 128 * 197)
HADAMARD_BITS = (*range(4, 15), 21)
TENSOR_CORE = {"ptx": r"wgmma\.mma_async|tcgen05\.mma\.|\bmma\.sync", "amdgcn": r"\bv_mfma"}
IN_FLIGHT = {
    "products": r"warp_group_dot_wait.*\{pendings = [1-9]|tc_gen5_mma.*is_async",
    "copies": r"ttg\.async_wait.*\{num = [1-9]|ttg\.local_store",
}
FIGURES = ("registers", "spill_bytes", "shared_bytes", "tensor_core_ops", "pipelined", "error")
Row = dict[str, Any]


class Job(NamedTuple):
    """One launch, named so that another process can build it again: the number-th of a stage's launches.

    Attributes:
        stage: One of `STAGES`.
        arch: One of `TARGETS`.
        dtype: One of `DTYPES`; "tf32" is fp32 with TF32 allowed.
        width: in_features d of a packed qkv layer (3d, d) with adapters on q and v.
        rows: M.
        terms: T = R of each adapter.
        aligned: False for the tiles of operands that no descriptor can hold.
        tile: In place of the table's choice for the forward.
        tiles: In place of the table's choice for the backward.
        number: Which of the stage's launches.
    """

    stage: str
    arch: str
    dtype: str
    width: int
    rows: int
    terms: int = 32
    aligned: bool = True
    tile: Tile | None = None
    tiles: BackwardTiles | None = None
    number: int = 0


class Layer(NamedTuple):
    """The tensors of a job's layer, without memory: x, W, bias, dy, the factors of q and v, and their rows of W."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    factors: list[KronFactors]
    segments: list[Rows]


def report(
    arch: str,
    dtypes: Sequence[str] = ("bf16", "fp16", "fp32"),
    widths: Sequence[int] = WIDTHS,
    kernels: Sequence[str] | None = None,
    rows: Sequence[int] = ROWS,
) -> list[Row]:
    """Compile what a layer of each dtype and width launches at each number of rows; one row for each distinct kernel.

    Args:
        arch: One of `TARGETS`.
        dtypes: Among "bf16", "fp16", "fp32" (IEEE products) and "tf32" (fp32 with TF32 products).
        widths: in_features d of a packed qkv layer (3d, d) with adapters of T = 32 terms on q and v.
        kernels: Names to keep, such as "forward.forward" or "backward.dx"; all when None.
        rows: Rows M of x.

    Returns:
        As `run`.

    Raises:
        ValueError: An unknown architecture or dtype.
        RuntimeError: Triton is not installed.

    Cost: about two seconds of a core a row; two processes run at a time.
    """
    _check(arch, dtypes)
    jobs = [
        Job(stage, arch, dtype, width, m, aligned=aligned)
        for dtype in dtypes
        for width in widths
        for stage in STAGES
        for m in rows
        for aligned in (True, False)
    ]
    return run(_numbered(jobs, kernels))


def shipped(arch: str, dtypes: Sequence[str] = ("bf16", "fp16", "fp32")) -> list[Row]:
    """Compile every tile in the tables, whether or not a usual shape takes it, at R = 32 and at the widest it holds.

    Arguments, rows and errors as of `report`.
    """
    _check(arch, dtypes)
    return run([job for dtype in dtypes for job in _tabled(arch, dtype)])


def run(jobs: Sequence[Job]) -> list[Row]:
    """Compile the jobs, two at a time.

    Returns:
        For each job "kernel", "arch", "dtype", "width", "tile" (text); "registers" and "spill_bytes" a thread;
        "shared_bytes" a program; "tensor_core_ops"; "pipelined" (see `pipelined`); and "error", which is None, or the
        compiler's last words with the figures None.
    """
    compiler = _Compiler()
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(2) as pool:
        try:
            halves = list(pool.map(lambda half: _batch(half, cache, compiler), (jobs[0::2], jobs[1::2])))
        finally:
            compiler.end()
    return [halves[i % 2][i // 2] for i in range(len(jobs))]


def _check(arch: str, dtypes: Sequence[str]) -> None:
    if arch not in TARGETS:
        raise ValueError(f"aot: expected one of the architectures {', '.join(TARGETS)}, but {arch!r} was given")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"aot: expected dtypes among {', '.join(DTYPES)}, but {dtype!r} was given")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError("aot: expected Triton, but it is not installed; pip install 'triton>=3.4'") from error


def _numbered(jobs: Iterable[Job], kernels: Sequence[str] | None) -> list[Job]:
    """A job for each launch, as far as the compiled code differs: most numbers of rows share their tiles."""
    distinct: dict[str, Job] = {}
    for job in jobs:
        for number, launch in enumerate(_launches(job)):
            if kernels is None or _name(launch) in kernels:
                distinct.setdefault(
                    f"{job.dtype} {_name(launch)} {_specialisation(launch)}", job._replace(number=number)
                )
    return list(distinct.values())


def _tabled(arch: str, dtype: str) -> list[Job]:
    """The jobs of `shipped`."""
    size, rows, jobs, any_ = DTYPES[dtype].itemsize, ROWS[-1], [], Tile(64, 64, 32, 4, 2)
    for tile in FORWARD[arch][size]:
        for terms in {32, tile.columns}:
            job = Job("forward", arch, dtype, 768, rows, terms, tile=tile._replace(tiles=min(3, tile.tiles)))
            jobs += _numbered([job], ["forward.forward"])
    for field, table in (("dx", DX), ("project", PROJECT), ("tall", TALL)):
        for tile in table.get(arch, {}).get(size, ()):
            for terms in {tile.columns // 2} if field == "tall" else {32, tile.columns}:
                chosen: dict[str, Any] = {"dx": any_, "project": any_, "tall": any_, "splits": 8}
                job = Job("backward", arch, dtype, 768, rows, terms, tiles=BackwardTiles(**chosen | {field: tile}))
                jobs += _numbered([job], [f"backward.{field}"])
    return jobs


class _Compiler:
    """Starts the processes that compile, for several threads, until another one, stopped by a signal, ends them all."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.ended = False
        self.lock = threading.Lock()

    def run(self, jobs: str, environment: dict[str, str]) -> tuple[int, str, str]:
        """The exit code, stdout and stderr of one process."""
        command = [sys.executable, "-m", "kadapt_kernels.aot", "--worker"]
        pipe = subprocess.PIPE
        with self.lock:
            if self.ended:
                return -signal.SIGKILL, "", ""
            process = subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
            self.running.add(process)
        out, error = process.communicate(jobs)
        with self.lock:
            self.running.remove(process)
        return process.returncode, out, error

    def end(self) -> None:
        """Kill what runs, and start nothing more."""
        with self.lock:
            self.ended = True
            for process in self.running:
                process.kill()


def _batch(jobs: Sequence[Job], cache: str, compiler: _Compiler) -> list[Row]:
    """The rows of the jobs in order; a process that dies leaves an error row and the next one goes on after it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = str(Path(__file__).parents[1])
    environment |= {
        "TRITON_CACHE_DIR": cache,
        "TRITON_ALWAYS_COMPILE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([folder, environment.get("PYTHONPATH", "")]),
    }
    found: list[Row] = []
    while len(found) < len(jobs) and not compiler.ended:
        code, out, error = compiler.run(json.dumps(jobs[len(found) :]), environment)
        found += [json.loads(line) for line in out.splitlines() if line.startswith('{"kernel"')]
        if len(found) < len(jobs):
            words = error.strip().splitlines()[-1:] or ["no message"]
            found.append(_row(jobs[len(found)], {"error": f"the compiler ended ({code}): {words[0]}"}))
    return found


def _work(source: TextIO) -> None:
    """The other process: jobs as JSON in, one row a line out."""
    for fields in json.load(source):
        job = Job(*fields)
        tile = Tile(*job.tile) if job.tile else None
        job = job._replace(tile=tile, tiles=_tiles(job.tiles) if job.tiles else None)
        print(json.dumps(_row(job, _compile(job))), flush=True)


def _tiles(fields: Sequence[Any]) -> BackwardTiles:
    """From JSON, which knows lists only."""
    dx, project, tall, splits = fields
    return BackwardTiles(Tile(*dx), Tile(*project), Tile(*tall), splits)


def _row(job: Job, figures: Row) -> Row:
    launch = _launches(job)[job.number]
    row: Row = {
        "kernel": _name(launch) + (", frozen" if job.stage == "frozen" else ""),
        "arch": job.arch,
        "dtype": job.dtype,
        "width": job.width,
        "tile": _tile_text(launch),
    }
    return row | {name: figures.get(name) for name in FIGURES}


def _name(launch: "Launch") -> str:
    """The file and the kernel: backward.dx."""
    function = launch.kernel.fn
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__.removesuffix('_kernel')}"


def _tile_text(launch: "Launch") -> str:
    """What a launch's kernel works on: 128x256x64 x3 R32 w8 s3 descriptor."""
    given = launch.arguments
    parts = ["x".join(str(value) for name, value in given.items() if name.startswith("BLOCK") and name != "BLOCKS")]
    parts += [f"x{given['TILES']}"] if "TILES" in given else []
    parts += [f"R{given['COLUMNS']}"] if "COLUMNS" in given else []
    parts += [f"w{launch.warps} s{launch.stages}"] + (["descriptor"] if given.get("DESCRIPTOR") else [])
    return " ".join(filter(None, parts))


def _layer(job: Job) -> Layer:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    width, dtype = job.width, DTYPES[job.dtype]
    side = gcd(32, width)
    rule, block = empty(job.terms, side), empty(job.terms, width // side, 1)
    return Layer(
        empty(job.rows, width, dtype=dtype),
        empty(3 * width, width, dtype=dtype),
        empty(3 * width, dtype=dtype),
        empty(job.rows, 3 * width, dtype=dtype),
        [KronFactors(rule, rule, block, block) for _ in range(2)],
        [(0, width), (2 * width, 3 * width)],
    )


def _forward(job: Job, layer: Layer) -> list["Launch"]:
    from kadapt_kernels.blocks import layout
    from kadapt_kernels.forward import forward_launches, forward_space

    x, weight, bias, _, factors, segments = layer
    if job.stage == "frozen":
        factors, segments = [], []
    plan = layout(factors, segments, weight.shape[0])
    tile = job.tile or forward_tile(job.arch, x.dtype, job.rows, job.width, plan, job.aligned)
    y, kept, total = forward_space(x, weight, plan)
    shifts = [total[start:stop] for start, stop in segments]
    return forward_launches(x, weight, bias, y, kept, total, factors, shifts, plan, 1.0, tile)


def _backward(job: Job, layer: Layer) -> list["Launch"]:
    from kadapt_kernels.backward import Grads, backward_launches, workspace
    from kadapt_kernels.blocks import layout
    from kadapt_kernels.forward import forward_space

    x, weight, _, dy, factors, segments = layer
    plan = layout(factors, segments, weight.shape[0])
    tiles = job.tiles or _backward_tiles(job, layer)
    space = workspace(x, weight.shape[0], plan, tiles)
    _, kept, total = forward_space(x, weight, plan)
    grads = Grads([(f.a, f.a, f.u, f.v) for f in factors], [total[start:stop] for start, stop in segments])
    return backward_launches(dy, x, weight, kept, x, grads, space, factors, plan, 1.0, tiles)


def _backward_tiles(job: Job, layer: Layer) -> BackwardTiles:
    from kadapt_kernels.blocks import layout

    plan = layout(layer.factors, layer.segments, layer.weight.shape[0])
    return backward_tiles(job.arch, DTYPES[job.dtype], job.rows, job.width, plan, job.aligned)


def _merge(job: Job, layer: Layer) -> list["Launch"]:
    """Factored A_t without dropout, full A_t with it."""
    from kadapt_kernels.merge import dense_gradient_launches, gradient_partials, merge_launches

    weight, segments = layer.weight, layer.segments
    full = [f._replace(a=f.a.new_empty(*f.a.shape, f.a.shape[1]), b=None) for f in layer.factors]
    dw = [torch.empty(stop - start, job.width, device="meta") for start, stop in segments]
    launches = []
    for factors, dropout in ((layer.factors, 0.0), (full, 0.5)):
        partials = [gradient_partials(f) for f in factors]
        launches += merge_launches(weight, weight, factors, segments, 1.0, dropout=dropout)
        launches += dense_gradient_launches(dw, factors, segments, 1.0, partials, factors, dropout=dropout)
    return launches


def _hadamard(job: Job, layer: Layer) -> list["Launch"]:
    """Vectors of powers of two, made of about as many numbers as x; in fp32 only."""
    from kadapt_kernels.hadamard_kernel import hadamard_launches

    if job.dtype != "fp32":
        return []
    lengths = [2**bits for bits in HADAMARD_BITS]
    vectors = [layer.x.new_empty(max(1, layer.x.numel() // length), length) for length in lengths]
    return [launch for rows in vectors for launch in hadamard_launches(rows)]


STAGES: Mapping[str, Callable[[Job, Layer], list["Launch"]]] = {
    "forward": _forward,
    "frozen": _forward,
    "backward": _backward,
    "merge": _merge,
    "hadamard": _hadamard,
}


def _launches(job: Job) -> list["Launch"]:
    with tf32(job.dtype == "tf32"):
        return STAGES[job.stage](job, _layer(job))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products of fp32 by TF32 tensor cores, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _specialisation(launch: "Launch") -> tuple[dict[str, Any], dict[str, Any], dict[Any, Any], dict[str, Any]]:
    """What Triton would compile for a launch: signature, constants, known divisibility and options."""
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, (name, parameter) in enumerate(inspect.signature(launch.kernel.fn).parameters.items()):
        value = launch.arguments[name]
        if "constexpr" in str(parameter.annotation):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        signature[name] = _type(value)
        for path, part in [((i, j), p) for j, p in enumerate(value)] if type(value) is tuple else [((i,), value)]:
            if isinstance(part, Tensor) or (isinstance(part, int) and part % 16 == 0):
                attributes[path] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return signature, constants, attributes, options


def _type(value: Any) -> Any:
    """Triton's name of an argument's type."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    if type(value) is tuple:
        return tuple(_type(part) for part in value)
    if isinstance(value, Tensor):
        return "*" + names[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{names[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def _compile(job: Job) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    launch = _launches(job)[job.number]
    signature, constants, attributes, options = _specialisation(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            code = triton.compile(source, target=GPUTarget(*TARGETS[job.arch]), options=options)
    except (TritonError, RuntimeError, ValueError, AssertionError) as error:  # anything else ends the worker
        return {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
    return _figures(code.asm, code.metadata.shared, log.getvalue())


def _figures(asm: Mapping[str, str], shared_bytes: int, log: str) -> Row:
    """The figures of compiled code: ptxas says them in its log, the AMD back end in the assembly's notes."""
    if "ptx" in asm:
        language = "ptx"
        registers = _number(r"Used (\d+) registers", log)
        spills = max(_number(r"(\d+) bytes spill stores", log), _number(r"(\d+) bytes spill loads", log))
    else:
        language = "amdgcn"
        registers = _number(r"\.vgpr_count:\s+(\d+)", asm[language])
        spills = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", asm[language])
    return {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": shared_bytes,
        "tensor_core_ops": len(re.findall(TENSOR_CORE[language], asm[language])),
        "pipelined": pipelined(asm["ttgir"]),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"aot: expected {pattern!r} in the compiler's output, but it is not there: {text[:300]!r}")
    return int(found[1])


def pipelined(ttgir: str) -> str | bool | None:
    """What the innermost loops that hold a product leave in flight: the least of "products", "copies" and False.

    "products": a wgmma or tcgen05 product is not waited for in the iteration that issues it. "copies": only tiles on
    their way from memory overlap with the work: cp.async waits that leave a group open, or, on AMD, a tile loaded in
    one iteration and written to shared memory for the next. None when no loop holds a product.
    """
    found = [
        next((name for name, pattern in IN_FLIGHT.items() if re.search(pattern, body)), False)
        for body in _innermost_loops(ttgir)
        if re.search(r"warp_group_dot |tc_gen5_mma|tt\.dot ", body)
    ]
    return min(found, key=(False, "copies", "products").index) if found else None


def _innermost_loops(ttgir: str) -> list[str]:
    """The bodies of the loops that hold no other loop; MLIR indents what a region holds."""
    loops: list[str] = []
    lines = ttgir.splitlines()
    for start, line in enumerate(lines):
        if "scf.for " not in line:
            continue
        end = " " * (len(line) - len(line.lstrip())) + "}"
        stop = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(end))
        body = "\n".join(lines[start + 1 : stop])
        if "scf.for " not in body:
            loops.append(body)
    return loops


def _main() -> None:
    if sys.argv[1:] == ["--worker"]:
        _work(sys.stdin)
        return
    parser = argparse.ArgumentParser(prog="python -m kadapt_kernels.aot", description="Compile every kernel for a GPU.")
    parser.add_argument("arch", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--dtype", action="append", help="bf16, fp16, fp32, tf32; repeatable")
    parser.add_argument("--width", action="append", type=int, help="in_features of the layer; repeatable")
    parser.add_argument("--kernel", action="append", help="name of a kernel; repeatable")
    parser.add_argument("--shipped", action="store_true", help="every tile of the tables instead")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    options = parser.parse_args()
    dtypes = options.dtype or ("bf16", "fp16", "fp32")
    if options.shipped:
        found = shipped(options.arch, dtypes)
    else:
        found = report(options.arch, dtypes, options.width or WIDTHS, options.kernel)
    if options.json:
        print(json.dumps({"rows": found}, indent=1))
        return
    for row in found:
        print(" ".join(f"{name}={value}" for name, value in row.items() if value is not None))


if __name__ == "__main__":
    _main()
