"""The first stage of gpu_stages.py: every kernel and the operator against float64; graphs, compilation, autocast.

With what the stages share: `Setup`, `Job`, and the launches of the fused layer.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from csv import DictReader
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kadapt_cli.bench.contenders import DTYPES, Shape
from kadapt_kernels import KronFactors, kron_delta, kron_linear, testing
from kadapt_kernels.backward import Grads, backward_launches, workspace
from kadapt_kernels.blocks import INTERPRETED, Launch, layout
from kadapt_kernels.forward import forward_launches, forward_space
from kadapt_kernels.merge import dense_gradients, merge_weight
from kadapt_kernels.testing import Problem
from kadapt_kernels.tiles import BackwardTiles, Tile, aligned, backward_tiles

Row = dict[str, Any]
LIMIT_S = 150.0  # for a case


@dataclass(frozen=True)
class Setup:
    """Where a stage runs and writes, and until when (on the monotonic clock)."""

    out: Path
    deadline: float
    device: torch.device
    images: Path = Path("pretrain")
    only: str = ""

    @property
    def quick(self) -> bool:
        """Without a GPU: the interpreter, on small shapes."""
        return self.device.type == "cpu"

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 30

    def shapes(self, *widths: int) -> list[tuple[int, int]]:
        """(d, M) of the widths with M of 224-pixel images in batches of 32 and 128."""
        return [(16, 17)] if self.quick else [(d, m) for d in widths for m in (6304, 25216)]


class Job(NamedTuple):
    """A case: the columns that describe it, how it is measured, and the kernels to compile beforehand."""

    about: Row
    measure: Callable[[], list[Row]]
    launches: Callable[[], list[Launch]] = list

    @property
    def case(self) -> str:
        return case_of(*self.about.values())


def case_of(*values: object) -> str:
    return ", ".join(str(value) for value in values)


class Fused(NamedTuple):
    """The launches of the fused layer on one problem, and the tensors that they fill."""

    forward: list[Launch]
    backward: list[Launch]
    results: dict[str, Tensor]


def fused(p: Problem, tile: Tile | None = None, tiles: BackwardTiles | None = None) -> Fused:
    """The fused layer with these tiles or those of the table; what it is to fill is full of NaN."""
    plan = layout(p.factors, p.segments, len(p.weight))
    (M, K), is_aligned = p.x.shape, aligned(p.x, p.weight, p.dy)
    tiles = tiles or backward_tiles(p.x.device, p.x.dtype, M, K, plan, is_aligned)
    y, kept, total = forward_space(p.x, p.weight, plan)
    factors: Any = [tuple(torch.empty_like(t) for t in f if t is not None) for f in p.factors]
    grads = Grads(factors, [torch.empty_like(shift) for shift in p.shifts])
    results = {"y": y, "dx": torch.empty_like(p.x)}
    results |= {f"d{role}{i}": t for i, group in enumerate(factors) for role, t in zip("abuv", group, strict=True)}
    results |= {f"dshift{i}": t for i, t in enumerate(grads.shifts)}
    space = workspace(p.x, len(p.weight), plan, tiles)
    for tensor in (*kept, total, *results.values(), *space):
        tensor.fill_(torch.nan)
    rest = (plan, p.scale)
    return Fused(
        forward_launches(p.x, p.weight, p.bias, y, kept, total, p.factors, p.shifts, *rest, tile),
        backward_launches(p.dy, p.x, p.weight, kept, results["dx"], grads, space, p.factors, *rest, tiles),
        results,
    )


def run_all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def relative(found: Tensor, answer: Tensor) -> float:
    """The Frobenius norm of the error over that of the answer."""
    return float((found.double() - answer).norm() / answer.norm())


def wrong(found: Mapping[str, Tensor], p: Problem, names: Sequence[str]) -> list[str]:
    """Results outside the rule, a line each. The interpreter rounds bf16 towards zero: there 2 % (Frobenius) hold."""
    if not (INTERPRETED.value and p.x.dtype == torch.bfloat16):
        return testing.failures(found, p, names)
    answers = testing.exact(p)
    return [f"{name}: {e:.2e}" for name in names if not (e := relative(found[name], answers[name])) < 0.02]


def correct(setup: Setup) -> Iterator[list[Job]]:
    """All variants of all problems, dtype by dtype; then what is not a matter of numbers alone."""
    cases = dict(testing.CASES)
    if setup.quick:
        cases = {name: cases[name] for name in ("rank above a term", "different adapters")}
    else:
        shapes = [Shape(d, m) for m in (197, 6304) for d in (192, 384, 768, 1024)]
        cases |= {f"qkv d = {shape.d} M = {shape.M}": shape.case._replace(shifted=True) for shape in shapes}
    for dtype in ("fp32", "bf16") if setup.quick else ("bf16", "fp16", "fp32"):
        batch = []
        for name, case in cases.items():
            problem = functools.cache(functools.partial(testing.make, case, DTYPES[dtype], str(setup.device)))
            for variant, function in VARIANTS.items():
                about = {"dtype": dtype, "problem": name, "variant": variant}
                launches = functools.partial(launches_of, problem, variant)
                batch.append(Job(about, functools.partial(twice, problem, function), launches))
            dense = functools.partial(testing.make, case._replace(full=True), DTYPES[dtype], str(setup.device))
            about = {"dtype": dtype, "problem": name, "variant": "op merge, full A"}
            batch.append(Job(about, functools.partial(twice, functools.cache(dense), by_merge)))
        yield batch
        for variant, check in CHECKS.items():
            about = {"dtype": dtype, "problem": "one layer", "variant": variant}
            yield [Job(about, functools.partial(checked, check, setup, dtype))]
    for kind in ("factored", "full"):
        about = {"dtype": "fp32", "problem": f"{kind} A", "variant": "merge kernels with dropout"}
        yield [Job(about, functools.partial(with_dropout, setup, kind == "full"))]
    for name in ("packed qkv", "different adapters", "qkv d = 768 M = 197"):
        yield [Job({"tool": "memcheck", "problem": name}, functools.partial(memcheck, setup, name))]


def forms(p: Problem) -> dict[str, tuple[Tile | None, BackwardTiles | None]]:
    """Tiles that bring about each form of the kernels which takes the problem, whatever the table would choose."""
    blocks = layout(p.factors, p.segments, len(p.weight)).blocks
    n = gcd(128, *(stop - start for start, stop, _ in blocks))
    small = Tile(64, 64, 32, 4, 2)
    found = {"table": (None, None), "pointers": (small._replace(tiles=3), BackwardTiles(small, small, small, 3))}
    if n >= 16 and aligned(p.x, p.weight, p.dy):
        tile = Tile(128, n, 64 if p.x.element_size() == 2 else 32, 8, 3, 1, True)
        found["descriptors"] = (tile, BackwardTiles(tile._replace(n=64), small, small, 5))
    return found


def by_operator(p: Problem, backend: str) -> dict[str, Tensor]:
    return testing.run(p, functools.partial(layer, backend=backend))


by_merge = functools.partial(by_operator, backend="merge")


def layer(p: Problem, backend: str = "triton") -> Tensor:
    return kron_linear(
        p.x, p.weight, p.bias, p.factors, segments=p.segments, scale=p.scale, shifts=p.shifts, backend=backend
    )


def by_kernels(p: Problem, form: str) -> dict[str, Tensor] | None:
    if form not in forms(p):
        return None
    made = fused(p, *forms(p)[form])
    run_all([*made.forward, *made.backward])
    return made.results


FORMS = ("pointers", "descriptors")
BACKENDS = ("eager", "merge", "triton")
VARIANTS: dict[str, Callable[[Problem], dict[str, Tensor] | None]] = {
    **{f"op {backend}": functools.partial(by_operator, backend=backend) for backend in BACKENDS},
    **{form: functools.partial(by_kernels, form=form) for form in FORMS},
}


def launches_of(problem: Callable[[], Problem], variant: str) -> list[Launch]:
    form = "table" if variant == "op triton" else variant
    if form not in forms(problem()):
        return []
    made = fused(problem(), *forms(problem())[form])
    return [*made.forward, *made.backward]


def twice(problem: Callable[[], Problem], function: Callable[[Problem], dict[str, Tensor] | None]) -> list[Row]:
    """Whether the results are right, and the same bits in a second run."""
    first, second = function(problem()), function(problem())
    if first is None or second is None:
        return [{"result": "does not apply"}]
    lines = wrong(first, problem(), list(first))
    return verdict(lines + [f"{n}: other bits in a second run" for n in first if not torch.equal(first[n], second[n])])


def verdict(lines: Sequence[str]) -> list[Row]:
    return [{"result": "wrong" if lines else "right", "detail": "; ".join(lines)[:400]}]


def checked(check: Callable[[Setup, str], list[str]], setup: Setup, dtype: str) -> list[Row]:
    if setup.quick and check is graph_replays:
        return [{"result": "not run", "detail": "needs a GPU"}]
    return verdict(check(setup, dtype))


def sample(setup: Setup, dtype: str, seed: int = 0) -> Problem:
    case = testing.CASES["rank above a term" if setup.quick else "packed qkv"]
    return testing.make(case, DTYPES[dtype], str(setup.device), seed=seed)


def graph_replays(setup: Setup, dtype: str) -> list[str]:
    """A captured forward and backward, replayed on other inputs, has the bits of an eager one."""
    static, other = sample(setup, dtype), sample(setup, dtype, seed=1)
    other = replace(static, x=other.x, dy=other.dy)
    eager = testing.run(other, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        replayed = testing.run(static, layer)
    static.x.copy_(other.x)
    static.dy.copy_(other.dy)
    graph.replay()
    return [f"{name}: replayed is not eager" for name in eager if not torch.equal(replayed[name], eager[name])]


def compiles_whole(setup: Setup, dtype: str) -> list[str]:
    """torch.compile takes the operator without a break, and the bits stay but for dbias, which the compiler sums."""
    torch.compiler.reset()
    p, compiled = sample(setup, dtype), torch.compile(layer, fullgraph=True, backend=compiler(setup))
    found, eager = testing.run(p, compiled), testing.run(p, layer)
    same = [f"{n}: compiled is not eager" for n in eager if n != "dbias" and not torch.equal(found[n], eager[n])]
    return same + wrong(found, p, ["dbias"])


def compiler(setup: Setup) -> str:
    return "aot_eager" if setup.quick else "inductor"


def autocast_steps(setup: Setup, dtype: str) -> list[str]:
    """Two steps of an fp32 layer under autocast to the dtype: fp32 gradients, near those of the eager backend."""
    found: dict[str, list[Tensor]] = {}
    for backend in ("triton", "eager"):
        p = sample(setup, "fp32")
        flat = [t.clone().requires_grad_() for f in p.factors for t in f if t is not None]
        p = replace(p, factors=[KronFactors(*flat[i : i + 4]) for i in range(0, len(flat), 4)])
        optimizer = torch.optim.AdamW(flat, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(setup.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
                y = layer(p, backend)
            (y.float() - p.dy).square().mean().backward()
            optimizer.step()
        found[backend] = [t.grad for t in flat if t.grad is not None]
    pairs = enumerate(zip(found["triton"], found["eager"], strict=True))
    errors = {i: relative(t, o.double()) for i, (t, o) in pairs if t.dtype == torch.float32}
    return [f"gradient {i}: {errors.get(i)}" for i in range(len(flat)) if not errors.get(i, 1.0) < 0.02]


def keeps_a_small_update(setup: Setup, dtype: str) -> list[str]:
    """The adapter's contribution within 0.5 % (Frobenius) at |ΔW| = |W| / 1000; the interpreter truncates bf16: 2 %."""
    case = testing.CASES["rank above a term" if setup.quick else "packed qkv"]._replace(bias=False, shifted=False)
    p = testing.make(case, DTYPES[dtype], str(setup.device), delta=1e-3)
    y = layer(replace(p, weight=torch.zeros_like(p.weight)))
    lines = []
    for i, ((start, stop), group) in enumerate(zip(p.segments, p.factors, strict=True)):
        error = relative(y[:, start:stop], p.x.double() @ kron_delta(testing.wide(group), p.scale).t())
        if not error < (0.02 if setup.quick else 0.005):
            lines.append(f"contribution of adapter {i}: off by {error:.2%}")
    return lines


CHECKS = {
    "CUDA graph": graph_replays,
    "torch.compile": compiles_whole,
    "autocast": autocast_steps,
    "small update": keeps_a_small_update,
}


def with_dropout(setup: Setup, full: bool) -> list[Row]:
    """The merge kernels against float64, with the mask that a merge into zeros shows and the share that it keeps."""
    case = testing.CASES["different adapters" if setup.quick else "ViT-Ti, T = 32"]._replace(full=full)
    p, dropout = testing.make(case, torch.float32, str(setup.device)), 0.25
    options: dict[str, Any] = {"dropout": dropout, "seed": 7}
    merged = merge_weight(torch.zeros_like(p.weight), p.factors, p.segments, p.scale, **options)
    dw = [p.dy[:, start:stop].t() @ p.x for start, stop in p.segments]
    found = iter(dense_gradients(dw, p.factors, p.segments, p.scale, **options))
    lines = []
    for i, ((start, stop), group) in enumerate(zip(p.segments, p.factors, strict=True)):
        mask = merged[start:stop] != 0
        leaves: Any = [None if t is None else t.double().requires_grad_() for t in group]
        delta = kron_delta(KronFactors(*leaves), p.scale) * mask / (1 - dropout)
        answers = torch.autograd.grad((delta * dw[i].double()).sum(), [t for t in leaves if t is not None])
        pairs = [(merged[start:stop], delta.detach()), *((next(found), answer) for answer in answers)]
        lines += [
            f"result {j} of adapter {i}: {e:.1e}" for j, p_ in enumerate(pairs) if not (e := relative(*p_)) < 1e-5
        ]
        kept = mask.float().mean().item()
        lines += [] if abs(kept - 1 + dropout) < 0.05 else [f"adapter {i}: {kept:.3f} kept, not {1 - dropout}"]
    return verdict(lines)


def memcheck(setup: Setup, name: str) -> list[Row]:
    """The bf16 variants of a problem under compute-sanitizer, by this script in another process."""
    tool = None if setup.quick else shutil.which("compute-sanitizer")
    if tool is None:
        return [{"result": "not run", "detail": "needs a GPU and compute-sanitizer"}]
    with tempfile.TemporaryDirectory() as folder:
        script = this_script("correct", Path(folder), "--worker", "--case", f"bf16, {name}, ")
        command = [tool, "--tool", "memcheck", "--report-api-errors", "no", *script]
        apart = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocation of its own for every tensor
        done = subprocess.run(command, env=apart, capture_output=True, text=True, timeout=LIMIT_S - 5)
        summary = re.findall("ERROR SUMMARY: .*", done.stdout + done.stderr) or [done.stderr.strip()[-200:]]
        with (Path(folder) / "correct.csv").open(newline="") as file:
            results = [row["result"] or "failed" for row in DictReader(file)]
    words = f"{summary[-1]}; {', '.join(f'{results.count(r)} {r}' for r in sorted(set(results)))}"
    clean = summary[-1] == "ERROR SUMMARY: 0 errors" and "right" in results and not {"wrong", "failed"} & set(results)
    return [{"result": "right" if clean else "wrong", "detail": words}]


def this_script(stage: str, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(Path(__file__).resolve().with_name("gpu_stages.py")),
        stage,
        "--out",
        str(out),
        *options,
    ]
