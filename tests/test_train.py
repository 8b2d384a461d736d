"""Training on real photos: it learns, it resumes to the same bits, and its run folder says the truth."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path

import faults
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from kadapt_cli import metrics, runs, signals
from kadapt_cli import train as training
from kadapt_cli.config import TrainConfig, resolve
from kadapt_cli.errors import DivergedError, InterruptedRunError, KadaptError, MachineError, ModelError, UsageError
from kadapt_cli.evaluate import open_run
from kadapt_cli.models import load
from kadapt_cli.progress import Display

TIMES = ("images_per_s", "time_s")


def quiet() -> Display:
    return Display(Console(stderr=True), quiet=True)


def config_for(photos: Path, **changes) -> TrainConfig:
    return TrainConfig(data=str(photos), epochs=4, batch_size=8, **changes)


@pytest.fixture(scope="module")
def photos(tasks, tmp_path_factory) -> Path:
    """Three classes of twelve flowers, as links' targets would be: plain copies."""
    import shutil

    root = tmp_path_factory.mktemp("photos")
    for name in ("daisy", "rose", "tulip"):
        (root / name).mkdir()
        for photo in sorted((tasks / "flowers5" / name).iterdir())[:12]:
            shutil.copy(photo, root / name)
    return root


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> tuple[Path, dict]:
    """One short run that the reading tests share."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, training.train(config_for(photos), out, resume=False, display=quiet())


def same_training(a: Path, b: Path) -> None:
    """Weights bit for bit, and metrics.csv but for the times."""
    left, right = ({**runs.load_tensors(p / runs.ADAPTER, "adapter")[0]} for p in (a, b))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(p)] for p in (a, b)]
    assert rows[0] == rows[1]
    states = [runs.load_tensors(p / runs.STATE, "state")[0] for p in (a, b)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / runs.METRICS).open(newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder(finished, photos):
    out, result = finished
    assert {p.name for p in out.iterdir()} - {runs.LOCK} == {
        "config.toml", "manifest.csv", "adapter.safetensors", "adapter.json", "state.safetensors",
        "state-previous.safetensors",         "metrics.csv", "result.json", "confusion.csv", "curves.svg",
    }  # fmt: skip
    assert json.loads((out / "result.json").read_text()) == result
    assert result["data"] == {"name": photos.name, "classes": 3, "train": 24, "val": 6, "test": 6}
    counts = result["parameters"]
    assert (counts["adapter"], counts["head"], counts["trainable"]) == (9_856, 3 * 193, 9_856 + 3 * 193)
    assert counts["live"] == counts["trainable"]
    assert counts["backbone"] == 2_691_648
    assert [row["epoch"] for row in read_metrics(out)] == ["1", "2", "3", "4"]
    assert set(result["metrics"]["test"]) == {"accuracy", "balanced_accuracy", "metric", "score"}
    assert result["metrics"]["test"]["score"] == result["metrics"]["test"]["accuracy"]
    ET.parse(out / "curves.svg")
    info = json.loads((out / "adapter.json").read_text())
    assert info["classes"] == ["daisy", "rose", "tulip"]
    assert info["modules"][0] == {"module": "blocks.0.attn.qkv", "segment": "q", "rows": [0, 192]}
    assert info["model"]["digest"] == load("vit32").digest
    with safe_open(out / "adapter.safetensors", "pt") as file:
        assert {n: list(file.get_slice(n).get_shape()) for n in file.keys()} == {  # noqa: SIM118
            name: tensor["shape"] for name, tensor in info["tensors"].items()
        }


def test_config_reproduces_the_run(finished, tmp_path):
    out, _ = finished
    again = resolve({}, out / "config.toml")
    training.train(again, tmp_path / "again", resume=False, display=quiet())
    same_training(out, tmp_path / "again")


def test_another_seed_is_another_run(finished, photos, tmp_path):
    out, _ = finished
    training.train(config_for(photos, seed=1), tmp_path / "b", resume=False, display=quiet())
    with pytest.raises(AssertionError):
        same_training(out, tmp_path / "b")


def test_it_learns(photos, tmp_path):
    """Loss falls by half in 12 epochs, and the adapter, not the head alone, has moved."""
    config = TrainConfig(data=str(photos), epochs=12, batch_size=8, val="none")
    training.train(config, tmp_path / "run", resume=False, display=quiet())
    losses = [float(row["train_loss"]) for row in read_metrics(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
    adapter = open_run(tmp_path / "run").adapted.adapter
    assert all(tensor.abs().max() > 1e-3 for tensor in adapter.values())
    assert read_metrics(tmp_path / "run")[0]["val_loss"] == ""


def test_keeps_the_latest_epoch_that_is_not_clearly_worse(finished):
    out, result = finished
    rows = read_metrics(out)
    best, kept = 0.0, 0
    for row in rows:
        accuracy = float(row["val_accuracy"])
        best = max(best, accuracy)
        part = (6 * best + 1) / 8
        clearly_worse = accuracy < best - (2 * part * (1 - part) / 8) ** 0.5
        assert row["kept"] == str(not clearly_worse)
        kept = kept if clearly_worse else int(row["epoch"])
    assert result["kept_epoch"] == kept
    stored = runs.load_tensors(out / runs.ADAPTER, "adapter")[1]
    assert stored["epoch"] == kept
    assert result["metrics"]["val"]["accuracy"] == pytest.approx(float(rows[kept - 1]["val_accuracy"]))


def test_stops_when_validation_gets_clearly_worse(photos, tmp_path, monkeypatch):
    """Accuracy 1, then 0 from the third epoch: patience 3 ends the run at epoch 5 and keeps the second."""
    real = training.logits

    def forgetting(module, dataset, *rest):
        values, labels = real(module, dataset, *rest)
        if dataset.samples and dataset.samples[0].path in validation:
            calls.append(1)
            values = torch.nn.functional.one_hot(labels if len(calls) <= 2 else (labels + 1) % 3, 3).float()
        return values, labels

    calls: list[int] = []
    config = config_for(photos, patience=3).model_copy(update={"epochs": 30})
    validation = {s.path for s in training.prepare(config, tmp_path, quiet()).images.splits["val"]}
    monkeypatch.setattr(training, "logits", forgetting)
    result = training.train(config, tmp_path / "run", resume=False, display=quiet())
    assert (result["epochs"], result["kept_epoch"]) == (5, 2)


def stopped_after(steps, config, out, monkeypatch):
    """Train until Ctrl-C after some steps; what was patched is as before then."""
    real = training._step

    def interrupted(session, *rest):
        real(session, *rest)
        if session.step == steps:
            session.stop = signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", interrupted)
        with pytest.raises(KadaptError, match="--resume") as caught:
            training.train(config, out, resume=False, display=quiet())
    assert caught.value.exit_code == 130


def test_what_validation_chose_survives_a_stop(photos, tmp_path, monkeypatch):
    """The second of six epochs is the best; a run that stops in the fourth and goes on keeps it too."""
    real = training._end_epoch

    def scored(session, display):
        values = {1: 0.5, 2: 1.0}
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "score", lambda *_: values.get(session.epoch + 1, 0.0))
            real(session, display)

    monkeypatch.setattr(training, "_end_epoch", scored)
    config = config_for(photos, patience=3).model_copy(update={"epochs": 6})
    whole = training.train(config, tmp_path / "whole", resume=False, display=quiet())
    steps = read_metrics(tmp_path / "whole")[0]["step"]
    stopped_after(3 * int(steps) + 1, config, tmp_path / "run", monkeypatch)
    again = training.train(config, tmp_path / "run", resume=True, display=quiet())
    assert whole["kept_epoch"] == again["kept_epoch"] == 2
    assert whole["epochs"] == again["epochs"] == 5
    same_training(tmp_path / "whole", tmp_path / "run")


def test_the_halved_micro_batch_survives_a_stop(photos, tmp_path, monkeypatch):
    real = training._gradients

    def refusing(session, images, labels, batch):
        if session.micro > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(session, images, labels, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_gradients", refusing)
        stopped_after(1, config_for(photos), tmp_path / "run", monkeypatch)
    result = training.train(config_for(photos), tmp_path / "run", resume=True, display=quiet())
    assert result["micro_batch"] == 2


def test_the_scale_of_half_precision_survives_a_stop(photos, tmp_path):
    config = config_for(photos)
    session = training.prepare(config, tmp_path, quiet())
    session.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    training.save_state(session)
    other = training.prepare(config, tmp_path, quiet())
    other.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    training.restore(other)
    assert other.scaler.state_dict()["scale"] == 4.0


def test_a_signal_as_training_ends_stops_before_the_test(photos, tmp_path, monkeypatch):
    """In the last moment in which training answers for signals: after its last look for one."""
    real = training._leave_if

    def late(stop, session):
        real(stop, session)
        if session.finished:
            session.stop = signal.SIGTERM

    monkeypatch.setattr(training, "_leave_if", late)
    with pytest.raises(KadaptError, match="--resume") as caught:
        training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("stop_after", [1, 3, 5, 6, 10])
def test_resume_from_any_step_ends_with_the_same_bits(finished, photos, tmp_path, monkeypatch, stop_after):
    out, _ = finished
    stopped_after(stop_after, config_for(photos), tmp_path / "run", monkeypatch)
    torch.manual_seed(999)  # whatever the new process's generator holds
    training.train(config_for(photos), tmp_path / "run", resume=True, display=quiet())
    same_training(out, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(3))
def test_killed_at_a_random_moment_and_resumed(finished, photos, tmp_path, trial):
    out, _ = finished
    command = [sys.executable, "-m", "kadapt_cli", "train", "--out", str(tmp_path / "run")]
    (tmp_path / "config.toml").write_text(
        (out / "config.toml").read_text().replace("save_every = 30.0", "save_every = 0.0")
    )
    options = ["--config", str(tmp_path / "config.toml")]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    time.sleep(random.Random(trial).random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    same_training(out, tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path):
    out, _ = finished
    command = [sys.executable, "-m", "kadapt_cli", "train", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([*command, "--config", str(out / "config.toml")], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=20) == 130
    assert "once more to quit at once" in rest
    assert f"kadapt train --out {tmp_path / 'run'} --resume" in rest
    assert runs.load_tensors(tmp_path / "run" / runs.STATE, "state")


def test_micro_batches_give_the_same_gradient(photos, tmp_path):
    whole = training.prepare(config_for(photos), tmp_path / "a", quiet())
    parts = training.prepare(config_for(photos, micro_batch=3), tmp_path / "b", quiet())
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    for session in (whole, parts):
        training._gradients(session, images, labels, len(labels))
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parts.parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(finished, photos, tmp_path, monkeypatch):
    """An allocator that refuses more than 3 images at a time: the run succeeds, in micro-batches of 2."""
    seen = []

    def refusing(session, images, labels, batch):
        if session.micro > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(labels))
        return real(session, images, labels, batch)

    real = training._gradients
    monkeypatch.setattr(training, "_gradients", refusing)
    result = training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert result["micro_batch"] == 2
    assert set(seen) == {8}
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [row["step"] for row in read_metrics(finished[0])]


def test_out_of_memory_with_one_image_is_an_error_of_the_machine(photos, tmp_path, monkeypatch):
    def refusing(session, images, labels, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "_gradients", refusing)
    with pytest.raises(MachineError, match="one image at a time") as caught:
        training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == 5


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(photos, tmp_path, monkeypatch):
    real = training._gradients

    def poisoned(session, images, labels, batch):
        sums = real(session, images, labels, batch)
        return sums * float("nan") if session.step == 4 else sums

    monkeypatch.setattr(training, "_gradients", poisoned)
    with pytest.raises(DivergedError, match=r"not finite at step 5 with learning rate .*; try --lr ") as caught:
        training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == 6
    tensors, info = runs.load_tensors(tmp_path / "run" / runs.STATE, "state")
    assert info["step"] == 3
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_tensor_that_never_gets_a_gradient_is_named(photos, tmp_path, monkeypatch):
    from kadapt_cli.adapters import kadaptation

    real = kadaptation.initial

    def both_zero(segments, config):
        return {n: torch.zeros_like(t) if n.endswith(".v") else t for n, t in real(segments, config).items()}

    monkeypatch.setattr(kadaptation, "initial", both_zero)
    with pytest.raises(ModelError, match=r"28 of 36 trainable tensors never received a gradient \(rule.q.a, "):
        training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())


def test_dry_run_writes_nothing_and_estimates_memory(photos, tmp_path):
    small, large = (training.dry_run(config_for(photos, micro_batch=n), tmp_path / "run", quiet()) for n in (1, 8))
    assert not (tmp_path / "run").exists()
    assert "metrics" not in small
    assert small["parameters"]["trainable"] == 9_856 + 3 * 193
    per_image = (large["memory_estimate_bytes"] - small["memory_estimate_bytes"]) / 7
    assert 65 * 192 * 4 * 10 * 6 < per_image < 65 * 192 * 4 * 20 * 6  # 10 to 20 times the tokens a block, fp32


def test_out_that_holds_something_else_is_left_untouched(photos, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="already holds something else") as caught:
        training.train(config_for(photos), tmp_path, resume=False, display=quiet())
    assert caught.value.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_out_that_holds_a_run_asks_for_resume(finished, photos):
    with pytest.raises(UsageError, match="already holds a run; pass --resume"):
        training.train(config_for(photos), finished[0], resume=False, display=quiet())


def test_resume_refuses_other_options(finished, photos):
    with pytest.raises(UsageError, match=r"--lr: .* was started with 0.004, but 0.1 was given"):
        training.train(TrainConfig(lr=0.1), finished[0], resume=True, display=quiet())


def test_resuming_a_finished_run_changes_nothing(finished, photos):
    out, result = finished
    before = (out / runs.ADAPTER).read_bytes()
    again = training.train(TrainConfig(), out, resume=True, display=quiet())
    assert (out / runs.ADAPTER).read_bytes() == before
    assert again["metrics"] == result["metrics"]


def test_second_writer_is_refused(photos, tmp_path):
    with runs.writing(tmp_path / "run"):
        script = (
            "import sys; from pathlib import Path; from kadapt_cli import runs\n"
            "with runs.writing(Path(sys.argv[1])): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=False
        )
    assert done.returncode != 0
    assert f"being written by process {os.getpid()} on " in done.stderr


def test_a_base_model_with_other_weights_is_refused(photos, tmp_path):
    """--weights FILE whose content changes after training: exit 4, and both digests are named."""
    import shutil

    from safetensors.torch import load_file, save_file

    from kadapt_cli.models import BUNDLED

    weights = tmp_path / "weights.safetensors"
    shutil.copy(BUNDLED / "model.safetensors", weights)
    config = config_for(photos, weights=str(weights)).model_copy(update={"epochs": 1})
    training.train(config, tmp_path / "run", resume=False, display=quiet())
    open_run(tmp_path / "run")
    changed = load_file(weights)
    changed["norm.weight"] = changed["norm.weight"] + 0.5
    save_file(changed, weights)
    with pytest.raises(ModelError, match="trained on other weights of vit32") as caught:
        open_run(tmp_path / "run")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign", "pickle"])
def test_a_damaged_adapter_is_refused(finished, tmp_path, damage):
    out, _ = finished
    data = bytearray((out / runs.ADAPTER).read_bytes())
    run = tmp_path / "run"
    run.mkdir()
    if damage == "flip":
        data[-100] ^= 1
    elif damage == "truncate":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    (run / runs.ADAPTER).write_bytes(bytes(data))
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(3)}, run / runs.ADAPTER)
    if damage == "pickle":
        torch.save({"x": torch.zeros(3)}, run / runs.ADAPTER)
    with pytest.raises(
        ModelError, match=r"adapter.safetensors: (damaged|not a readable|no whole|not written by kadapt)"
    ) as caught:
        open_run(run)
    assert caught.value.exit_code == 4


def test_config_does_not_depend_on_the_working_directory(photos, tmp_path, monkeypatch):
    """Trained with a relative path, resumed with the same one, and read from elsewhere."""
    monkeypatch.chdir(photos.parent)
    config = TrainConfig(data=photos.name, epochs=1, batch_size=32)
    training.train(config, tmp_path / "run", resume=False, display=quiet())
    training.train(TrainConfig(data=photos.name), tmp_path / "run", resume=True, display=quiet())
    monkeypatch.chdir(tmp_path)
    assert open_run(tmp_path / "run").config.data == str(photos.resolve())
    training.train(TrainConfig(), tmp_path / "run", resume=True, display=quiet())


def test_a_tensor_outside_the_graph_is_named_too(photos, tmp_path, monkeypatch):
    """A layer that the model never calls leaves no gradient at all."""
    real = training.prepare

    def with_a_stray(*arguments, **options):
        session = real(*arguments, **options)
        session.parameters["stray"] = torch.nn.Parameter(torch.zeros(2))
        session.live["stray"] = torch.zeros(2, dtype=torch.bool)
        return session

    monkeypatch.setattr(training, "prepare", with_a_stray)
    with pytest.raises(ModelError, match=r"1 of 37 trainable tensors never received a gradient \(stray\)") as caught:
        training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == 4


def test_killed_before_the_last_row_of_metrics_was_written(finished, tmp_path):
    import shutil

    out, _ = finished
    run = shutil.copytree(out, tmp_path / "run")
    lines = (run / runs.METRICS).read_text().splitlines(keepends=True)
    (run / runs.METRICS).write_text("".join(lines[:-1]))
    (run / runs.RESULT).unlink()
    training.train(TrainConfig(), run, resume=True, display=quiet())
    assert (run / runs.METRICS).read_text() == "".join(lines)
    assert (run / runs.RESULT).exists()


def test_a_signal_during_validation_stops_before_the_measurement(photos, tmp_path, monkeypatch):
    real = training._end_epoch

    def interrupted(session, display):
        real(session, display)
        if session.epoch == session.config.epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "_end_epoch", interrupted)
    with pytest.raises(KadaptError, match="SIGTERM: saved after 12 steps") as caught:
        training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == 143
    assert not (tmp_path / "run" / runs.RESULT).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_validation_does_not_wait_for_its_end(finished, photos, tmp_path, monkeypatch, number):
    """The epoch's steps are saved; the run that goes on begins with the validation and ends with the same bits."""
    real, calls = training.logits, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
            pytest.fail("the signal waited")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "logits", interrupted)
        with pytest.raises(InterruptedRunError, match=f"{number.name}: saved after 6 steps") as caught:
            training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == {signal.SIGINT: 130, signal.SIGUSR1: 75}[number]
    training.train(config_for(photos), tmp_path / "run", resume=True, display=quiet())
    same_training(finished[0], tmp_path / "run")


def in_loss(call, act, monkeypatch):
    """`act` is called in the loss of a step of training."""
    real, calls = training.loss_sum, []

    def acting(values, labels):
        calls.extend([1] * values.requires_grad)
        if len(calls) == call and values.requires_grad:
            act()
        return real(values, labels)

    monkeypatch.setattr(training, "loss_sum", acting)


def test_a_step_is_ended_and_saved_at_a_signal(finished, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_loss(5, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(InterruptedRunError, match="SIGTERM: saved after 5 steps") as caught:
            training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == 143
    assert runs.load_state(tmp_path / "run")[1]["step"] == 5
    training.train(config_for(photos), tmp_path / "run", resume=True, display=quiet())
    same_training(finished[0], tmp_path / "run")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_long_step_is_left_at_a_signal_and_done_again(finished, photos, tmp_path, monkeypatch, earlier):
    """The step of a large model takes half a minute on a CPU. It drew numbers, which a run that goes on draws again.

    Also where the signal comes, and has waited for as long as it waits, before the step.
    """
    real = training._step

    def step(session, *rest):
        if session.step == 4 and earlier:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.15)
        real(session, *rest)

    def take_long():
        torch.rand(3)
        time.sleep(30)

    with monkeypatch.context() as patch:
        patch.setattr(signals, "LATE_S", 0.1)
        patch.setattr(training, "_step", step)
        in_loss(5, take_long if earlier else lambda: (os.kill(os.getpid(), signal.SIGTERM), take_long()), patch)
        before = time.perf_counter()
        with pytest.raises(InterruptedRunError, match="SIGTERM: saved after 4 steps"):
            training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
        assert time.perf_counter() - before < 20
    assert runs.load_state(tmp_path / "run")[1]["step"] == 4
    training.train(config_for(photos), tmp_path / "run", resume=True, display=quiet())
    same_training(finished[0], tmp_path / "run")


@pytest.fixture
def leave_step(monkeypatch):
    """leave_step(5, train, seen): what `train` says when a signal ends it in its fifth step, after a call of `seen`."""
    monkeypatch.setattr(signals, "LATE_S", 0.1)

    def leave(number, train, seen=lambda: None):
        with monkeypatch.context() as patch:
            in_loss(number, lambda: (seen(), os.kill(os.getpid(), signal.SIGTERM), time.sleep(30)), patch)
            with pytest.raises(InterruptedRunError) as caught:
                train()
        return str(caught.value)

    return leave


@pytest.mark.parametrize("save_every", [0.0, 30.0])
def test_what_is_saved_is_not_saved_again(photos, tmp_path, leave_step, save_every):
    """A step that is left changes nothing; the steps before it are saved where they are not yet."""
    out, files = tmp_path / "run", []

    def look():
        files.append((out / runs.STATE).stat().st_ino)

    config = config_for(photos, save_every=save_every)
    said = leave_step(5, lambda: training.train(config, out, resume=False, display=quiet()), look)
    look()
    assert "SIGTERM: saved after 4 steps" in said
    assert (files[0] == files[1]) == (save_every == 0)
    assert "saved after 4 steps" in leave_step(1, lambda: training.train(config, out, resume=True, display=quiet()))
    look()
    assert files[1] == files[2]
    assert runs.load_tensors(out / runs.STATE, "state")[1]["step"] == 4


def test_a_first_state_is_saved(photos, tmp_path, leave_step):
    session = training.prepare(config_for(photos), tmp_path, quiet())
    assert "saved after 0 steps" in leave_step(1, lambda: training.fit(session, quiet()))
    assert runs.load_tensors(tmp_path / runs.STATE, "state")[1]["step"] == 0


def test_a_micro_batch_that_is_halved_in_a_step_that_is_left_is_saved(photos, tmp_path, monkeypatch, leave_step):
    real = training._gradients

    def refusing(session, *rest):
        if session.micro > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(session, *rest)

    monkeypatch.setattr(training, "_gradients", refusing)
    leave_step(1, lambda: training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet()))
    assert runs.load_state(tmp_path / "run")[1]["micro"] == 4


def test_a_state_is_saved_in_the_place_of_a_damaged_one(photos, tmp_path, leave_step):
    config, out = config_for(photos), tmp_path / "run"
    leave_step(1, lambda: training.train(config, out, resume=False, display=quiet()))
    (out / runs.STATE).rename(out / runs.PREVIOUS_STATE)
    (out / runs.STATE).write_bytes(b"damaged")
    leave_step(1, lambda: training.train(config, out, resume=True, display=quiet()))
    assert runs.load_tensors(out / runs.STATE, "state")[1]["step"] == 0


@pytest.mark.parametrize("method", ["kadaptation", "full", "lora"])
def test_a_backward_pass_is_left_between_layers(photos, tmp_path, monkeypatch, method):
    real, sessions = training.prepare, []

    def prepared(*arguments, **options):
        sessions.append(real(*arguments, **options))
        last = sessions[0].adapted.backbone.module.blocks[-1]
        last.register_forward_hook(lambda block, given, output: slow(output) if output.requires_grad else None)
        return sessions[0]

    def slow(output):
        output.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(training, "prepare", prepared)
    monkeypatch.setattr(signals, "LATE_S", 1e-4)  # after the hook, in the block's last layers
    with pytest.raises(InterruptedRunError, match="SIGTERM: saved after 0 steps"):
        training.train(config_for(photos, method=method), tmp_path / "run", resume=False, display=quiet())
    reached = [name for name, parameter in sessions[0].parameters.items() if parameter.grad is not None]
    assert reached
    assert not [name for name in reached if ".0." in name or ".5.attn" in name]


def test_a_parameter_that_a_layer_passes_on_keeps_no_hooks(photos, tmp_path):
    """Those of an output go with it, a parameter would gather them step by step."""
    session = training.prepare(config_for(photos), tmp_path, quiet())
    layer = session.adapted.backbone.module.passing = torch.nn.Identity()
    parameter = next(iter(session.parameters.values()))
    with training._heard_in_backward(session):
        layer(parameter)
    assert not parameter._backward_hooks


def test_a_signal_in_the_last_measurement_says_how_to_go_on(finished, photos, tmp_path, monkeypatch):
    def interrupted(session, display):
        signals.stop(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_finish", interrupted)
        with pytest.raises(InterruptedRunError, match=r"trained, not measured yet; go on with: .* --resume") as caught:
            training.train(config_for(photos), tmp_path / "run", resume=False, display=quiet())
    assert caught.value.exit_code == 143
    training.train(config_for(photos), tmp_path / "run", resume=True, display=quiet())
    assert (tmp_path / "run" / runs.RESULT).exists()
    same_training(finished[0], tmp_path / "run")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_training_is_close_to_fp32(finished, photos, tmp_path, precision):
    """The first epoch's loss agrees to 2 %, factors stay fp32, and the run evaluates like any other."""
    config = config_for(photos, precision=precision).model_copy(update={"epochs": 1})
    result = training.train(config, tmp_path / "run", resume=False, display=quiet())
    loss, wanted = (float(read_metrics(run)[0]["train_loss"]) for run in (tmp_path / "run", finished[0]))
    assert loss == pytest.approx(wanted, rel=0.02)
    assert loss != wanted
    tensors, _ = runs.load_tensors(tmp_path / "run" / runs.ADAPTER, "adapter")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert 0 <= result["metrics"]["test"]["accuracy"] <= 1


def test_deterministic_asks_for_it_and_changes_nothing_on_a_cpu(tiny, tmp_path):
    def action():
        with suppress(SystemExit):
            faults.command(*tiny.train, "--out", tmp_path / "asked", "--deterministic")()
        print(torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"])

    assert faults.forked(action).out.endswith("True :4096:8\n")
    assert faults.kadapt(*tiny.train, "--out", tmp_path / "plain").code == 0
    assert faults.differences(tmp_path / "asked", tmp_path / "plain") == []
