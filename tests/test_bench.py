"""kadapt bench-kernels: what it measures is right before it is timed, what it prints is what it measured."""

import csv
import importlib.util
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kadapt_cli import bench
from kadapt_cli.bench import contenders, options, step, timing
from kadapt_cli.bench.contenders import CONTENDERS, Layer, Shape, adapted, kron
from kadapt_cli.errors import MachineError
from kadapt_kernels import aot as compiler
from kadapt_kernels import testing
from kadapt_kernels.blocks import INTERPRETED

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
UNCOMPILED = [name for name in CONTENDERS if name not in ("compiled-eager", "fused", "frozen-own-gemm", "linear-probe")]
JSON_COLUMNS = [
    "contender", "mode", "d", "M", "dtype", "time_ms_p20", "time_ms_p50", "time_ms_p80", "ratio_frozen", "peak_bytes",
    "max_err", "eager_err",
]  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run_bench(run_cli) -> Callable[..., tuple[int, str, str]]:
    """run_bench("--quick", …) -> (exit code, stdout, stderr) of `kadapt bench-kernels`, on the CPU."""
    return partial(run_cli, "bench-kernels", "--device", "cpu")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A shapes file with one small layer, and a cache that a few of its inputs fill."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 300_000)
    path = tmp_path / "tiny.csv"
    path.write_text("d,M\n32,64\n")
    return path


def refuse(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The command ended with this code and one line that holds the words, and measured nothing."""
    got, out, err = result
    assert (got, out) == (code, ""), err
    assert ": accuracy" not in err
    lines = [line for line in err.splitlines() if line.startswith("kadapt:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_json_csv_and_svg_hold_the_same_measurement(run_bench, tiny, tmp_path):
    table, drawing = tmp_path / "rows.csv", tmp_path / "ratios.svg"
    arguments = (
        "--quick",
        "--shapes",
        tiny,
        "--contenders",
        ",".join(UNCOMPILED),
        "--modes",
        "fwd,bwd,fwd+bwd",
        "--json",
    )
    code, out, err = run_bench(*arguments, "--csv", table, "--svg", drawing)
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == {"schema_version", "device", "rows"}
    assert document["schema_version"] == 1
    rows = document["rows"]
    assert [(r["contender"], r["mode"]) for r in rows] == [
        (name, mode) for mode in ("fwd", "bwd", "fwd+bwd") for name in UNCOMPILED
    ]
    exact = {name for name in UNCOMPILED if CONTENDERS[name].computes != "other"}
    for row in rows:
        assert list(row) == JSON_COLUMNS
        assert (row["d"], row["M"], row["dtype"], row["peak_bytes"]) == (32, 64, "fp32", None)
        assert (row["max_err"] is not None) == (row["eager_err"] is not None) == (row["contender"] in exact)
        assert 0 < row["time_ms_p20"] <= row["time_ms_p50"] <= row["time_ms_p80"]
        assert row["ratio_frozen"] > 0
        if row["contender"] == "frozen":
            assert row["ratio_frozen"] == 1
    assert "1/1  fp32  d = 32  M = 64: fwd+bwd" in err

    def lines() -> list[dict[str, str]]:
        with table.open(newline="") as file:
            return list(csv.DictReader(file))

    assert [float(line["ratio_frozen"]) for line in lines()] == [r["ratio_frozen"] for r in rows]
    kadapt = next(line for line in lines() if (line["contender"], line["mode"]) == ("kadapt", "fwd"))
    assert kadapt["torch"] == torch.__version__
    assert float(kadapt["tflops"]) == pytest.approx(6 * 64 * 32**2 / float(kadapt["time_ms_p50"]) * 1e-9)
    root = ET.parse(drawing).getroot()
    assert root.tag == f"{SVG}svg"
    drawn = {line.get("class") for line in root.iter(f"{SVG}polyline")}
    assert drawn == {None, "legend", *UNCOMPILED}
    assert "fwd+bwd, d = 32, fp32" in [text.text for text in root.iter(f"{SVG}text")]

    assert run_bench(*arguments, "--csv", table)[0] == 0
    assert len(lines()) == 2 * len(rows)


def test_step_trains_what_it_says_and_is_shown_as_a_table(run_bench, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "aot", lambda arch, quick: [{"kernel": f"made for {arch}", "error": None}])
    names = "kadapt,peft-lokr,full,linear-probe"
    table = tmp_path / "rows.csv"
    arguments = ("--quick", "--shapes", tiny, "--contenders", names, "--modes", "step", "--csv", table)
    code, out, err = run_bench(*arguments)
    assert code == 0, err
    with table.open(newline="") as file:
        hosts = {row["contender"]: float(row["host_ms_p50"]) for row in csv.DictReader(file)}
    assert 0 < hosts["linear-probe"] < hosts["full"]
    trained = {words[0]: words[5] for line in out.splitlines() if len(words := line.split()) == 7}
    # 2 rules · 2·32·32, 6 blocks · (2 · 2·32·6 + 192), and a head of 1,930
    assert (trained["frozen"], trained["linear-probe"], trained["kadapt"]) == ("1,930", "1,930", "11,786")
    assert int(trained["full"].replace(",", "")) > 2_600_000
    assert "training step of vit32, batch 8, fp32" in out
    assert "These are CPU figures" in out
    assert "made for sm_90" in out


@pytest.mark.parametrize("name", ["kadapt", "merge-lowrank", "merge-dense", "lycoris-bypass", "frozen"])
def test_every_trained_tensor_gets_a_gradient_in_a_step(name, monkeypatch):
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.extend(
                p.grad is not None and bool(p.grad.abs().sum() > 0) for g in self.param_groups for p in g["params"]
            )

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    step.training_step(CONTENDERS[name], "vit32", 2, "fp32", CPU).call()
    assert len(seen) == (2 if name == "frozen" else 2 + 4 + 6 * 5)
    assert all(seen)


def test_the_frozen_step_computes_the_gradients_that_an_adapter_needs():
    model = step.vit("vit32").requires_grad_(False)
    images = torch.randn(1, 3, 32, 32)
    assert not model(images).requires_grad
    CONTENDERS["frozen"].fit(model)
    assert model(images).requires_grad


def test_gate_stops_a_contender_with_a_wrong_scale(run_bench, tiny, monkeypatch):
    wrong = adapted(lambda p: kron(replace(p, scale=1.01 * p.scale), "eager"))
    monkeypatch.setitem(CONTENDERS, "kadapt", wrong)
    code, out, err = run_bench("--quick", "--shapes", tiny, "--contenders", "kadapt", "--modes", "fwd", "--json")
    assert code == 0
    rows = {row["contender"]: row for row in json.loads(out)["rows"]}
    assert rows["kadapt"]["time_ms_p50"] is rows["kadapt"]["ratio_frozen"] is None
    assert rows["kadapt"]["max_err"] > 1e-3
    assert rows["frozen"]["time_ms_p50"] > 0
    assert "kadapt (fp32, d = 32): not timed: accuracy gate: y: at (" in err


def test_gate_lists_what_a_contender_raises(run_bench, tiny, monkeypatch):
    def broken(problem):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setitem(CONTENDERS, "kadapt", adapted(broken))
    _, out, err = run_bench("--quick", "--shapes", tiny, "--contenders", "kadapt", "--modes", "fwd", "--json")
    assert [row["time_ms_p50"] is None for row in json.loads(out)["rows"]] == [False, True]
    assert "kadapt (fp32, d = 32): not timed: RuntimeError: no such kernel" in err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["kadapt", "merge-lowrank", "merge-dense", "reference-einsum", "frozen"])
def test_contenders_pass_the_gate(name, dtype):
    row = bench.gate([name], Shape(96, 50), dtype, CPU)[name]
    assert row.note == ""
    assert 0 <= row.max_err <= {"fp32": 1e-5, "bf16": 2e-2}[dtype]


@pytest.mark.slow
def test_compiled_contender_passes_the_gate_and_compiles_once():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    names = ["compiled-eager"]
    assert [bench.gate(names, Shape(32, m), "fp32", CPU)["compiled-eager"].note for m in (50, 70)] == ["", ""]
    assert counters["stats"]["unique_graphs"] == 1


def test_other_algorithms_may_err_more_than_our_own_paths(monkeypatch):
    others = {name for name, contender in CONTENDERS.items() if contender.factor != 2.0}
    assert others == {"compiled-eager", "reference-einsum", "lycoris-bypass"}
    shape = Shape(96, 50)
    problem = testing.make(shape.case, torch.float32)
    error = testing.errors(testing.yardstick(problem), testing.exact(problem))["y"]

    def shifted(factor: float) -> str:
        spoiled = adapted(lambda p: kron(p, "eager") + 4 * error, factor=factor)
        monkeypatch.setitem(CONTENDERS, "kadapt", spoiled)
        return bench.gate(["kadapt"], shape, "fp32", CPU)["kadapt"].note

    assert shifted(2.0).startswith("not timed: accuracy gate: y: at (")
    assert shifted(contenders.OTHERS_FACTOR) == ""


def test_bypass_is_the_kronecker_product():
    problem = testing.make(Shape(96, 50).case, torch.float64)
    answer = testing.exact(problem)["y"]
    assert (contenders.bypass(problem) - answer).abs().max() <= 1e-12 * answer.abs().max()


@pytest.mark.skipif(not INTERPRETED.value and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("name", ["fused", "frozen-own-gemm"])
def test_gpu_contenders_pass_the_gate(name):
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    row = bench.gate([name], Shape(32, 33), "fp32", device)[name]
    assert row.note == ""
    assert row.max_err < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_everything_is_timed():
    wanted = replace(options.plan(quick=True, contenders="fused,frozen-own-gemm,kadapt"), shapes=(Shape(768, 6304),))
    result = bench.run(wanted, lambda line: None)
    assert all(row.time_ms_p50 and row.peak_bytes for row in result.rows)
    assert {row.launch for row in result.rows if row.mode != "step"} == {"graph"}


def test_what_is_not_installed_is_named(run_bench, tiny, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    wanted = options.plan(device="cpu", shapes=tiny)
    assert "peft-lora: not measured, it needs peft, which is not installed" in wanted.missing
    assert "fused: not measured, it needs a GPU" in wanted.missing
    assert not {"peft-lora", "peft-lokr", "fused"} & set(wanted.contenders)
    assert "lycoris-bypass" in wanted.contenders
    said = []
    bench.run(replace(wanted, contenders=("frozen",), modes=("fwd",)), said.append)
    assert said[: len(wanted.missing)] == list(wanted.missing)
    refuse(run_bench("--contenders", "kadapt,peft-lora"), 5, "peft-lora", "needs peft")


def test_saved_bytes_are_those_of_x_and_h():
    problem = timing.problems(Shape(96, 50), "fp32", CPU)[0]
    by_name = {n: timing.saved_bytes(CONTENDERS[n].build(problem)) for n in ("frozen", "full", "merge-dense")}
    assert by_name == {"frozen": 0, "full": 4 * 50 * 96, "merge-dense": 4 * 50 * 96}
    eager = adapted(lambda p: kron(p, "eager"))
    assert timing.saved_bytes(eager.build(problem)) == 4 * 50 * (96 + 2 * 32)


def test_inputs_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 10**6)
    sets = timing.problems(Shape(96, 50), "fp32", CPU)
    size = 4 * (50 * 96 * 7 + 3 * 96**2)
    assert len(sets) * size > 10**6 >= (len(sets) - 2) * size / 1.25
    assert not torch.equal(sets[0].x, sets[1].x)


def test_no_two_turns_in_a_row_take_the_same_inputs():
    used = []

    def layer(number):
        return Layer(None, lambda: used.append(number), [])  # type: ignore[arg-type,func-returns-value]

    turn = itertools.count()
    layers = [layer(0), layer(1), layer(2)]
    timing.take_turns({name: timing.eager_sampler(layers, "fwd", CPU, turn) for name in "ab"}, 3)
    assert used == [0, 1, 2, 0, 1, 2]


def test_ratios_are_taken_within_a_round():
    rows = {name: timing.Row(name, "fwd", 32, 64, "fp32") for name in ("frozen", "kadapt")}
    clock = iter([1.0, 2.0, 10.0, 50.0, 100.0, 300.0])
    times = timing.take_turns({name: lambda: next(clock) for name in rows}, 3)
    assert times == {"frozen": [1, 10, 100], "kadapt": [2, 50, 300]}
    timing.fill(rows, times, "eager")
    found = rows["kadapt"]
    assert (found.time_ms_p20, found.time_ms_p50, found.time_ms_p80, found.ratio_frozen) == (2, 50, 300, 3)


def test_an_interrupt_keeps_the_rows_so_far(run_bench, tiny, tmp_path, monkeypatch):
    rounds = timing.take_turns
    calls = []

    def interrupted(samplers, count):
        calls.append(samplers)
        if len(calls) > 2:  # eager and graph of the first mode
            raise KeyboardInterrupt
        return rounds(samplers, count)

    monkeypatch.setattr(timing, "take_turns", interrupted)
    table = tmp_path / "rows.csv"
    arguments = ("--quick", "--shapes", tiny, "--contenders", "kadapt", "--modes", "fwd,bwd", "--csv", table)
    assert run_bench(*arguments)[0] == 130
    with table.open(newline="") as file:
        assert [(line["contender"], line["mode"]) for line in csv.DictReader(file)] == [
            ("frozen", "fwd"),
            ("kadapt", "fwd"),
        ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contenders", "kadapt,lora"], ["--contenders", "'lora'", "peft-lora", "frozen"]),
        (["--dtype", "fp8"], ["--dtype", "'fp8'", "bf16, fp16, fp32, tf32"]),
        (["--modes", "forward"], ["--modes", "'forward'", "fwd, bwd, fwd+bwd, step"]),
        (["--model", "vit_base_patch16_225"], ["--model", "'vit_base_patch16_225'", "vit_base_patch16_224"]),
        (["--aot", "sm_91"], ["--aot", "'sm_91'", "sm_90", "gfx942"]),
        (["--aot", "sm_90", "--dtype", "fp8"], ["--dtype", "'fp8'", "bf16"]),
        (["--shapes", "absent.csv"], ["--shapes", "absent.csv", "cannot be read"]),
    ],
)
def test_bad_options_are_usage_errors(run_bench, arguments, words):
    refuse(run_bench(*arguments), 2, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("d,rows\n192,197\n", ["line 1", "expected the columns d,M", "d, rows"]),
        ("", ["line 1", "nothing"]),
        ("d,M\n", ["no rows"]),
        ("d,M\n192,197\n192,-1\n", ["line 3", "M must be", "'-1'"]),
        ("d,M\n192.5,197\n", ["line 2", "d must be", "'192.5'"]),
        ("d,M\n192\n", ["line 2", "M must be", "''"]),
        ("d,M\n0,197\n", ["line 2", "d must be", "'0'"]),
        ("d,M\n192,2147483648\n", ["line 2", "M must be", "'2147483648'"]),
        ("M,d\n197,37\n", ["line 2", "d = 37", "no divisor"]),
    ],
)
def test_shapes_that_do_not_fit_are_usage_errors(run_bench, tmp_path, text, words):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    refuse(run_bench("--shapes", path), 2, str(path), *words)


def test_a_model_without_packed_qkv_is_a_usage_error(run_bench, tiny):
    refuse(run_bench("--shapes", tiny, "--model", "resnet18"), 2, "resnet18", "blocks.N.attn.qkv")


def test_what_the_machine_lacks_is_a_machine_error(run_bench, monkeypatch):
    refuse(run_bench("--sweep"), 5, "--sweep", "CUDA GPU")
    refuse(run_bench("--dtype", "tf32"), 5, "tf32", "fp32")
    refuse(run_bench("--contenders", "fused"), 5, "fused", "needs a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="no CUDA GPU"):
        options.plan(device="cuda")


def test_files_that_cannot_be_written_are_refused_before_measuring(run_bench, tiny, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    refuse(run_bench("--shapes", tiny, "--csv", other), 2, str(other), "other columns")
    assert other.read_text() == "a,b\n1,2\n"
    refuse(run_bench("--shapes", tiny, "--csv", tmp_path / "absent" / "rows.csv"), 2, "--csv", "cannot be written")
    refuse(run_bench("--shapes", tiny, "--svg", tmp_path), 2, "--svg", "cannot be written")


def test_cases_csv_is_the_default_list():
    assert options.read_shapes(ROOT / "benchmarks" / "cases.csv") == options.default_shapes(cuda=True, quick=False)
    assert {s.d for s in options.DEFAULT_SHAPES} == {192, 384, 768, 1024, 1280}
    assert {s.M for s in options.DEFAULT_SHAPES} == {197, 1576, 6304, 25216, 100864, 6400}


def test_the_worker_needs_neither_pydantic_nor_scikit_learn():
    script = "import sys, kadapt_cli.bench; print(*{'pydantic', 'sklearn', 'timm', 'peft', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_aot_prints_the_report_and_nothing_else(run_bench, monkeypatch):
    asked = []
    row = {"kernel": "forward_kernel", "tile": "128x128x64", "dtype": "bf16", "width": 768, "registers": 124}
    row |= {"spill_bytes": 0, "shared_bytes": 131072, "tensor_core_ops": 8, "pipelined": True, "error": None}

    def report(arch, dtypes, widths=compiler.WIDTHS, kernels=None, rows=compiler.ROWS):
        asked.append((arch, tuple(dtypes), tuple(widths)))
        return [row, row | {"kernel": "broken_kernel", "error": "out of registers"}]

    monkeypatch.setattr(compiler, "report", report)
    code, out, _ = run_bench("--aot", "sm_90", "--dtype", "bf16,fp32", "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["schema_version"], document["arch"], document["rows"][0]) == (1, "sm_90", row)
    code, out, _ = run_bench("--aot", "sm_90", "--quick")
    assert code == 0
    assert "131072" in out
    assert "does not compile: out of registers" in " ".join(out.split())
    assert asked == [("sm_90", ("bf16", "fp32"), compiler.WIDTHS), ("sm_90", ("bf16",), (768,))]
