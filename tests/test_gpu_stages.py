"""The GPU stages on a CPU, in the interpreter, on tiny shapes: rows, columns, resuming, and what may go wrong."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_correct
from benchmarks import gpu_stages as script
from kadapt_cli.bench import timing
from kadapt_cli.bench.sweep import literal
from kadapt_kernels.testing import Case

SCRIPT = Path(script.__file__)
MACHINE = ["error", "seconds", "device", "driver", "machine", "torch", "triton", "date"]
TINY = {
    "rank above a term": Case(17, 16, 32, ((16, 4, 4, 4, 1, 5),)),
    "different adapters": Case(9, 12, 23, ((3, 2, 4, 6, 3, 2), (13, 3, 3, 4, 5, 1)), row_padding=8),
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stages would run at full size on the GPU")


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    """The smallest problems that reach every form of the kernels."""
    monkeypatch.setattr(script.testing, "CASES", script.testing.CASES | TINY)


def run(stage: str, out: Path, *options: str) -> list[dict[str, str]]:
    """Run a stage in this process; returns the rows of its CSV file."""
    assert script.main([stage, "--out", str(out), "--worker", *options]) == 0
    path = out / f"{stage}.csv"
    return read(path) if path.exists() else []


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_resumes(stage: str, out: Path, *options: str) -> None:
    """A second run measures nothing and leaves the file as it is."""
    before = (out / f"{stage}.csv").read_bytes()
    run(stage, out, *options)
    assert (out / f"{stage}.csv").read_bytes() == before


def check_columns(stage: str, rows: list[dict[str, str]]) -> None:
    assert list(rows[0]) == ["case", *script.STAGES[stage].columns, *MACHINE]
    assert all(row["torch"] == torch.__version__ and row["date"] and row["device"] for row in rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_correct_holds_every_variant_against_float64(tmp_path, dtype):
    rows = run("correct", tmp_path, "--case", dtype)
    check_columns("correct", rows)
    results = {(row["problem"], row["variant"]): row["result"] for row in rows}
    expected = {(problem, v): "right" for problem in TINY for v in (*gpu_correct.VARIANTS, "op merge, full A")}
    same = ("torch.compile", "autocast", "small update")
    expected |= {("one layer", name): "right" for name in same}
    expected |= {("different adapters", "descriptors"): "does not apply", ("one layer", "CUDA graph"): "not run"}
    if dtype == "fp32":
        expected |= {(f"{kind} A", "merge kernels with dropout"): "right" for kind in ("factored", "full")}
    assert results == expected
    check_resumes("correct", tmp_path, "--case", dtype)


def test_correct_says_what_is_wrong(tmp_path, monkeypatch):
    def spoiled(problem):
        results = gpu_correct.by_operator(problem, "eager")
        results["y"][3, 2] += 1.0
        return results

    monkeypatch.setattr(gpu_correct, "VARIANTS", {"spoiled": spoiled})
    (row,) = run("correct", tmp_path, "--case", "fp32, rank above a term, spoiled")
    assert row["result"] == "wrong"
    assert row["detail"].startswith("y: at (3, 2) ")


def test_correct_notices_other_bits_in_a_second_run(tmp_path, monkeypatch):
    runs: list[int] = []

    def wavering(problem):
        results = gpu_correct.by_operator(problem, "eager")
        results["dx"][0, 0] *= 1 + len(runs) * torch.finfo(torch.float32).eps
        runs.append(1)
        return results

    monkeypatch.setattr(gpu_correct, "VARIANTS", {"wavering": wavering})
    (row,) = run("correct", tmp_path, "--case", "fp32, rank above a term, wavering")
    assert (row["result"], row["detail"]) == ("wrong", "dx: other bits in a second run")


def test_gemm_compares_tiles_with_cublas(tmp_path):
    rows = run("gemm", tmp_path)
    check_columns("gemm", rows)
    forward = [row for row in rows if row["part"] == "frozen forward"]
    assert [row["tile"] for row in forward] == [
        "cuBLAS",
        *map(literal, script.forward_tiles(quick(tmp_path), 16, 17)),
    ]
    assert {row["part"] for row in rows} == {"frozen forward", "frozen dx"}
    for row in rows:
        assert 0 < float(row["time_ms_p20"]) <= float(row["time_ms_p50"]) <= float(row["time_ms_p80"])
        base = next(r for r in rows if r["part"] == row["part"])
        if row is not base:
            assert float(row["ratio"]) == pytest.approx(
                float(row["time_ms_p50"]) / float(base["time_ms_p50"]), rel=1e-4
            )
            assert row["predicted_ratio"] == "1.05-1.20"
    check_resumes("gemm", tmp_path)


def quick(out: Path) -> object:
    return script.Setup(out, 1e9, torch.device("cpu"))


def test_a_wrong_tile_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "wrong", lambda found, p, names: ["y: at (0, 0)"])
    rows = run("gemm", tmp_path)
    own = [row for row in rows if row["tile"] != "cuBLAS"]
    assert own
    assert all(row["error"] == "not timed, wrong: y: at (0, 0)" and not row["time_ms_p50"] for row in own)


def test_a_case_that_fails_is_a_row(tmp_path, monkeypatch):
    def raising(setup, calls):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(script, "clock", raising)
    rows = run("gemm", tmp_path)
    assert len(rows) > 3
    assert {row["error"] for row in rows} == {"RuntimeError: no memory"}


def test_sweep_prints_the_table_to_commit(tmp_path, capsys, monkeypatch):
    """With later tiles the faster, so that each field's candidates must start from the best of the field before."""
    times = iter(range(100, 0, -1))
    monkeypatch.setattr(
        script, "clock", lambda setup, calls: dict.fromkeys(["time_ms_p50", "time_ms_p20"], next(times))
    )
    rows = run("sweep", tmp_path)
    check_columns("sweep", rows)
    assert [row["part"] for row in rows].count("gradients") == 2
    check_resumes("sweep", tmp_path)
    script.summarise("sweep", quick(tmp_path))
    tables: dict[str, dict[str, dict[tuple[int, int, int], object]]] = {}
    text = capsys.readouterr().out
    table = text[text.index("FORWARD_MEASURED") : text.index("8 cases, 0 failed")]
    exec(table, {"Tile": script.Tile, "BackwardTiles": script.BackwardTiles}, tables)
    best = {part: fastest(rows, part) for part in ("forward", "dx", "gradients")}
    assert literal(tables["FORWARD_MEASURED"]["generic"][2, 16, 17]) == best["forward"]
    assert literal(tables["BACKWARD_MEASURED"]["generic"][2, 16, 17]) == best["gradients"]
    assert best["gradients"].startswith(f"BackwardTiles({best['dx']}, ")


def fastest(rows: list[dict[str, str]], part: str) -> str:
    own = [row for row in rows if row["part"] == part and row["tile"] != "cuBLAS"]
    return min(own, key=lambda row: float(row["time_ms_p50"]))["tile"]


def test_matrix_has_the_rows_of_bench_kernels(tmp_path):
    rows = run("matrix", tmp_path)
    check_columns("matrix", rows)
    found = {(row["contender"], row["mode"]) for row in rows}
    assert found == {(c, m) for c in ("frozen", "kadapt", "merge-lowrank") for m in ("fwd", "bwd", "fwd+bwd")}
    assert all(float(row["ratio_frozen"]) > 0 for row in rows)
    check_resumes("matrix", tmp_path)


def test_predictions_are_those_of_the_contender():
    def row(contender: str, mode: str, d: int = 768, m: int = 25216, dtype: str = "bf16") -> object:
        return script.predicted(timing.Row(contender, mode, d, m, dtype))

    assert row("fused", "fwd") == row("kadapt", "fwd") == 1.07
    assert row("merge-dense", "fwd") == row("merge-lowrank", "fwd") == 1.03
    assert (row("merge-lowrank", "fwd+bwd"), row("merge-dense", "fwd+bwd")) == (1.20, 1.38)
    assert row("peft-lokr", "fwd+bwd") == 3.1
    assert {
        row("fused", "bwd"),
        row("frozen", "fwd"),
        row("fused", "fwd", 1280),
        row("kadapt", "fwd", dtype="fp32"),
    } == {""}


def test_step_compares_training_steps(tmp_path):
    pytest.importorskip("timm")
    rows = run("step", tmp_path)
    check_columns("step", rows)
    trained = {row["contender"]: int(row["trained"]) for row in rows}
    assert trained["linear-probe"] == trained["frozen"] == 10 * 193 < trained["kadapt"] < trained["full"]
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["time_ms_p50"]), rel=1e-4)
    check_resumes("step", tmp_path)


def test_profile_times_every_kernel_where_nsight_is_missing(tmp_path):
    rows = run("profile", tmp_path)
    check_columns("profile", rows)
    assert {row["kernel"] for row in rows} == set(script.PROFILED)
    timed = {row["kernel"] for row in rows if row["tool"] == "events" and float(row["time_ms"]) > 0}
    other = {row["kernel"] for row in rows if row["tool"] == "not chosen by the table"}
    assert timed >= {"forward", "frozen forward", "dx", "tall"}
    assert timed | other == set(script.PROFILED)
    check_resumes("profile", tmp_path)


def test_figures_of_nsight_compute():
    prefix = "smsp__pcsamp_warps_issue_stalled_"
    metrics = {
        "Kernel Name": ("", "forward_kernel"), "gpu__time_duration.sum": ("ns", "123,000"),
        "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "61.5"),
        "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": ("%", "0"),
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "58.2"),
        "dram__bytes_read.sum": ("byte", "45,000,000"), "dram__bytes_write.sum": ("byte", "120,000,000"),
        f"{prefix}wait": ("warp", "60"), f"{prefix}barrier": ("warp", "30"), f"{prefix}math": ("warp", "8"),
        f"{prefix}sleeping": ("warp", "2"), f"{prefix}wait_not_issued": ("warp", "500"),
    }  # fmt: skip
    lines = [metrics, *([pair[i] for pair in metrics.values()] for i in (0, 1))]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    assert script.ncu_figures(text) == {
        "time_ms": 0.123, "tensor_percent": 58.2, "sm_percent": 61.5,
        "dram_read_bytes": 45e6, "dram_write_bytes": 120e6, "stalls": "wait 60%, barrier 30%, math 8%",
    }  # fmt: skip


@pytest.fixture
def images(tmp_path) -> Path:
    """Folders train/ and test/ of two classes with eight small images each."""
    for split in ("train", "test"):
        for name, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (8, 8), (shade, shade + 4 * i, shade)).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_backbone_trains_for_the_epochs_that_fit(tmp_path, images):
    pytest.importorskip("timm")
    out = tmp_path / "out"
    rows = run("backbone", out, "--images", str(images))
    check_columns("backbone", rows)
    assert [(row["run"], row["epochs"]) for row in rows] == [("trial", "3"), ("whole", "3")]
    assert 0 <= float(rows[1]["test_accuracy"]) <= 1
    assert len(read(out / "backbone" / "log.csv")) == 3
    check_resumes("backbone", out, "--images", str(images))


def test_backbone_without_images_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"must hold one \*train\* and one \*test\*"):
        run("backbone", tmp_path, "--images", str(tmp_path))


@pytest.mark.parametrize("stage", list(script.STAGES))
def test_no_case_is_begun_after_the_time(tmp_path, capsys, stage):
    assert run(stage, tmp_path, "--minutes", "0") == []
    assert "stopped at --minutes" in capsys.readouterr().out


def test_a_case_that_killed_its_process_is_not_tried_again(tmp_path):
    tmp_path.joinpath("gemm.running").write_text("frozen dx, 16, 17, cuBLAS")
    rows = run("gemm", tmp_path)
    assert [row["case"] for row in rows if row["error"]] == ["frozen dx, 16, 17, cuBLAS"]
    assert rows[0]["error"] == "ended its process, or took too long"
    assert not tmp_path.joinpath("gemm.running").exists()


def test_a_killed_worker_is_followed_by_another(tmp_path, monkeypatch):
    """A dead worker with a case under way is replaced, one without is an error of the script itself."""
    codes: Iterator[int] = iter([-6, script.RESTART, 1])
    commands: list[list[str]] = []

    def worker(command):
        code = next(codes)
        commands.append(command)
        tmp_path.joinpath("gemm.running").write_text("a case") if code == -6 else None
        if code == 1:
            tmp_path.joinpath("gemm.running").unlink()
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(script.subprocess, "run", worker)
    assert script.supervise("gemm", quick(tmp_path), ["gemm", "--minutes", "8"]) == 1
    assert len(commands) == 3
    assert commands[0][:2] == [sys.executable, str(SCRIPT)]
    assert commands[0][-1] == "--worker"


def test_other_columns_are_not_mixed(tmp_path):
    tmp_path.joinpath("gemm.csv").write_text("case,time\n")
    with pytest.raises(SystemExit, match="other columns"):
        run("gemm", tmp_path)


def test_as_a_command_it_says_that_nothing_is_a_gpu_figure(tmp_path):
    command = [sys.executable, SCRIPT, "gemm", "--out", tmp_path, "--case", "frozen forward"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "No GPU: small shapes in Triton's interpreter. Nothing printed here is a GPU figure." in lines
    assert "predicted_ratio: our product takes 1.05-1.20 of cuBLAS's time" in lines
    assert lines[-1] == f"3 cases, 0 failed; rows in {tmp_path / 'gemm.csv'}"
    assert sum(line.startswith("frozen forward") for line in lines) == 3
