"""On a GPU, by `pytest -m gpu -n 0`: every kernel and the operator, by the cases of the benchmark's first stage; layers
in a subspace, several processes on one GPU, and what `--deterministic` promises."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_correct
from kadapt_cli import train as training
from kadapt_cli.bench import timing
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import InterruptedRunError
from kadapt_cli.progress import Display
from kadapt_cli.projections import Fastfood, MovedLinear
from kadapt_kernels import hadamard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none here"),
]
SETUP = gpu_correct.Setup(Path(), 0.0, torch.device("cuda"))
JOBS = [job for batch in gpu_correct.correct(SETUP) for job in batch]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.case)
def test_case_of_the_first_stage(job):
    with timing.on_stream(SETUP.device):
        (row,) = job.measure()
    if row["result"] in ("does not apply", "not run"):
        pytest.skip(row.get("detail") or "this form of the kernels does not take the problem")
    assert row["result"] == "right", row["detail"]


@pytest.mark.parametrize("length", [16, 1024, 1 << 17, 1 << 21])
def test_the_transform_is_as_accurate_as_products(length):
    x = torch.randn(3, length, device="cuda")
    answer = hadamard(x.double(), backend="torch")
    found, products = hadamard(x, backend="triton"), hadamard(x.cpu(), backend="torch").cuda()
    assert (found - answer).norm() <= 2 * (products - answer).norm() + 1e-7 * answer.norm()
    assert torch.equal(found, hadamard(x, backend="triton"))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_a_layer_in_a_subspace_has_the_gradients_of_the_dense_matrix(dtype, close):
    projection = Fastfood(768 * 192, 512, torch.Generator().manual_seed(0)).cuda()
    x, weight = torch.randn(4, 197, 192, device="cuda", requires_grad=True), torch.randn(768, 192, device="cuda")
    z = torch.randn(512, device="cuda", requires_grad=True)
    p = torch.stack([projection.multiply(unit) for unit in torch.eye(512, device="cuda")], 1).double()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        y = MovedLinear.apply(x, z, torch.tensor(1.0, device="cuda"), weight, None, projection)
    dense = torch.nn.functional.linear(x.double(), weight + (p @ z.double()).view(weight.shape))
    assert y.dtype == dtype
    found, wanted = (torch.autograd.grad(out.square().sum(), (x, z)) for out in (y.float(), dense))
    for ours, theirs in zip((y, *found), (dense, *wanted), strict=True):
        assert (ours.double() - theirs).norm() <= close * theirs.norm()


def test_two_processes_compare_on_one_gpu(tmp_path):
    command = [sys.executable, "-m", "kadapt_cli", "compare", "--data", "demo", "--method", "bitfit", "--epochs", "2"]
    options = ["--device", "cuda", "--seeds", "0,1,2,3", "--jobs", "2", "--json", "--out", str(tmp_path / "c")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 4


def test_a_deterministic_run_that_was_stopped_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = TrainConfig(shots=8, epochs=3, batch_size=16, device="cuda", deterministic=True)
    display, real = Display(Console(stderr=True), quiet=True), training._step
    training.train(config, tmp_path / "whole", resume=False, display=display)

    def interrupted(session, *rest):
        real(session, *rest)
        if session.step == 4:
            session.stop = signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", interrupted)
        with pytest.raises(InterruptedRunError):
            training.train(config, tmp_path / "run", resume=False, display=display)
    training.train(config, tmp_path / "run", resume=True, display=display)
    assert faults.differences(tmp_path / "whole", tmp_path / "run") == []
