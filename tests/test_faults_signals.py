"""SIGINT, SIGTERM and SIGUSR1 in every phase of every command: the exit code, in under 5 s, no process left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import faults
import pytest

from kadapt_cli import evaluate, merge, predict, runs, session
from kadapt_cli import train as training
from kadapt_cli.compare import worker
from kadapt_cli.probe import Prober

pytestmark = pytest.mark.faults
ROW = "signals in every phase: exit code, under 5 s, no child left"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
PHASES = {  # a function in whose first call the signal comes, by command
    "train": (
        (session, "open_images"),
        (session, "load_backbone"),
        (session, "adapt"),
        (training, "save_state"),
        (training, "_gradients"),
        (training, "logits"),
        (training, "_end_epoch"),
        (training, "save_adapter"),
        (training, "_finish"),
        (training.report, "curves_svg"),
    ),
    "train --resume": (
        (session, "run_images"),
        (runs, "load_tensors"),
        (training, "restore"),
        (training, "_gradients"),
    ),
    "eval": ((evaluate, "open_run"), (evaluate, "run_images"), (evaluate, "logits"), (evaluate.metrics, "evaluate")),
    "predict": ((predict, "open_run"), (predict, "_readable")),
    "merge-weights": ((merge, "open_run"), (merge, "merged_state"), (merge, "_write"), (merge, "_verify")),
    "compare": ((worker, "open_images"), (worker, "fit"), (worker, "logits"), (worker.Worker, "_record")),
    "probe-id": ((Prober, "measure"), (Prober, "score"), (training, "_gradients"), (runs, "commit")),
}


def with_a_signal(place, number, arguments, limit_s=faults.LIMIT_S) -> tuple[faults.Outcome, float, list[int]]:
    """Run the command line; the signal comes in the first call of a function.

    Returns:
        The outcome, the seconds from the signal to the end, and the processes that are left.
    """
    module, name = place
    real, sent = getattr(module, name), []

    def interrupted(*given, **options):
        if not sent:
            sent.append(number)
            os.write(2, f"sent {time.time()}\n".encode())
            os.kill(os.getpid(), number)
        return real(*given, **options)

    def action():
        setattr(module, name, interrupted)
        faults.command(*arguments)()

    trial = faults.Trial(action, limit_s)
    found = trial.wait()
    ended = time.time()
    stamps = [float(line.split()[1]) for line in found.err.splitlines() if line.startswith("sent ")]
    return found, ended - stamps[0] if stamps else -1.0, trial.children()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert faults.kadapt(*tiny.train, "--out", out).code == 0
    return out


@pytest.fixture
def lines(tiny, finished, tmp_path):
    """The command lines, each with a folder of its own."""
    data = ("--data", tiny.folder / "photos", "--model", f"local-dir:{tiny.folder / 'model'}")
    small = ("--shots", "3", "--epochs", "2")

    def line(command, trial):
        out = tmp_path / str(trial)
        if command == "train --resume":
            faults.forked(lambda: _stopped_run(tiny, out))
            return (*tiny.train, "--out", out, "--resume")
        return {
            "train": (*tiny.train, "--out", out),
            "eval": ("eval", finished),
            "predict": ("predict", finished, tiny.folder / "photos" / "dark"),
            "merge-weights": ("merge-weights", finished, "--out", out),
            "compare": ("compare", *data, *small, "--method", "bitfit", "--seeds", "0", "--out", out),
            "probe-id": ("probe-id", *data, *small, "--dims", "8", "--per", "model", "--folds", "1", "--out", out),
        }[command]

    return line


def _stopped_run(tiny, out):
    """A run that SIGTERM stopped after its first step."""
    real = training._gradients

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    training._gradients = interrupted
    with suppress(SystemExit):
        faults.command(*tiny.train, "--out", out)()


@pytest.mark.parametrize("command", PHASES)
def test_signals(finished, lines, tiny, tmp_path, tally, quick, command):
    wrong, trials = {}, 0
    for place in PHASES[command][:: 3 if quick else 1]:
        for number, code in list(CODES.items())[: 1 if quick else 3]:
            arguments = lines(command, trials)
            out = tmp_path / str(trials)
            found, seconds, left = with_a_signal(place, number, arguments)
            trials += 1
            said = found.err.count("kadapt: ") == 1 and "Traceback" not in found.err
            if found.code != code or not 0 <= seconds < 5 or left or not said or found.out:
                wrong[place[1], number.name] = (found.code, seconds, left, found.err[-500:])
            elif command.startswith("train") and (out / runs.STATE).exists():
                again = faults.kadapt(*tiny.train, "--out", out, "--resume")
                if again.code or faults.differences(finished, out):
                    wrong[place[1], number.name] = again.err[-500:] or "other bits"
    assert not wrong
    tally(ROW, trials)


def test_a_second_signal_ends_a_save_at_once(tiny, tmp_path, tally):
    """And the state before it is whole."""
    real, out = runs.save_tensors, tmp_path / "run"

    def slow(path, *given, **options):
        if path.name == runs.STATE and path.exists():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(path, *given, **options)

    def action():
        runs.save_tensors = slow
        faults.command(*tiny.train, "--out", out)()

    found = faults.forked(action)
    assert found.code == 130
    assert "saving; once more to quit at once" in found.err
    assert runs.load_state(out)[1]["step"] == 0
    tally(ROW, 1)


@pytest.fixture
def two_jobs(tiny, tmp_path):
    """A comparison with --jobs 2 of which either process has done a cell, and the number of the second."""
    out, started = tmp_path / "compared", []

    def start(seeds):
        data = ("--data", tiny.folder / "photos", "--model", f"local-dir:{tiny.folder / 'model'}")
        options = ("--shots", 3, "--epochs", 20, "--method", "bitfit", "--seeds", seeds, "--jobs", 2, "--out", out)
        command = [sys.executable, "-m", "kadapt_cli", "compare", *map(str, (*data, *options))]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, start_new_session=True, **streams)
        started.append(process)
        pids = {process.pid}
        while len(pids) < 2 and process.poll() is None:
            time.sleep(0.01)
            pids |= {record["pid"] for record in finals(out)}
        return process, *(pids - {process.pid})

    yield start, out
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finals(out):
    """The final runs that a study holds."""
    study = out / "study.jsonl"
    lines = study.read_text().splitlines(keepends=True)[1:] if study.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "final"]


def skip_unless(in_the_sample, quick):
    """Some of the trials that start whole programs are left to the full run."""
    if quick and not in_the_sample:
        pytest.skip("not in the sample")


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_all_processes_of_a_comparison(two_jobs, number, tally, quick):
    skip_unless(number == signal.SIGTERM, quick)
    start, out = two_jobs
    process, _ = start(",".join(map(str, range(100))))
    process.send_signal(number)
    began = time.time()
    error = process.communicate(timeout=30)[1]
    assert (process.returncode, time.time() - began < 5) == (CODES[number], True), error
    assert re.search(r"kadapt: stopped: \d+ of 100 cells are done and kept; the same command goes on", error)
    while time.time() - began < 5 and faults.group(process.pid):  # Python's own helper ends after the last of them
        time.sleep(0.01)
    assert faults.group(process.pid) == []
    assert len(finals(out)) < 100
    tally(ROW, 1)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGKILL,)])
def test_the_workers_of_a_comparison_end_with_it(two_jobs, numbers, tally, quick):
    """Also where it has no time to end them: at a second signal, and when it is killed."""
    skip_unless(numbers == (signal.SIGKILL,), quick)
    start, _ = two_jobs
    process, _ = start(",".join(map(str, range(100))))
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)
    began = time.time()
    process.wait(timeout=30)
    while time.time() - began < 5 and faults.group(process.pid):
        time.sleep(0.01)
    assert faults.group(process.pid) == []
    tally(ROW, 1)


@pytest.mark.parametrize("delay", [0.0, 1.0, 2.0, 4.0])
def test_ctrl_c_in_a_terminal_reaches_all_processes_of_a_comparison(tiny, tmp_path, delay, tally, quick):
    """While the second is imported, before its first step and in it: one line, and nobody is left."""
    skip_unless(delay == 1.0, quick)
    data = ("--data", tiny.folder / "photos", "--model", f"local-dir:{tiny.folder / 'model'}")
    options = (
        "--shots",
        3,
        "--epochs",
        500,
        "--method",
        "bitfit",
        "--seeds",
        "0,1,2",
        "--jobs",
        2,
        "--out",
        tmp_path / "c",
    )
    command = [sys.executable, "-m", "kadapt_cli", "compare", *map(str, (*data, *options))]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while len(faults.group(process.pid)) < 3:  # the two, and Python's own helper
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    began = time.time()
    error = process.communicate(timeout=30)[1]
    assert (process.returncode, error.count("kadapt: "), "Traceback" in error) == (130, 1, False), error
    assert time.time() - began < 5
    tally(ROW, 1)


def test_a_worker_that_is_killed_loses_no_cell(two_jobs, tally, quick):
    """The first process fills all that is left, and says what happened."""
    skip_unless(False, quick)
    start, out = two_jobs
    process, second = start(",".join(map(str, range(50))))
    os.kill(second, signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 5
    assert "kadapt: a worker ended with exit code -9 (see above); the same command goes on" in error
    assert len({record["seed"] for record in finals(out)}) == len(finals(out)) == 50
    tally(ROW, 1)


@pytest.mark.parametrize("to_all", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_the_compilers_of_bench_kernels(number, to_all, tally, quick):
    """Each of the two would otherwise be followed by another until all is compiled."""
    skip_unless(number == signal.SIGINT and to_all, quick)
    command = [sys.executable, "-m", "kadapt_cli", "bench-kernels", "--aot", "sm_90"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        while len(faults.group(process.pid)) < 3:
            time.sleep(0.01)
        time.sleep(1.0)
        (os.killpg if to_all else os.kill)(process.pid, number)
        began = time.time()
        out, error = process.communicate(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, error) == (CODES[number], "", "kadapt: interrupted\n")
    assert time.time() - began < 5
    assert faults.group(process.pid) == []
    tally(ROW, 1)


def takes(pid: int) -> bool:
    """Whether a process has a handler for all of our signals."""
    mask = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return all(int(mask[1], 16) >> (number - 1) & 1 for number in CODES)


@pytest.mark.parametrize("number", CODES)
def test_signals_while_the_program_is_imported(number, tally):
    """From the moment that the program takes signals, which is before its first slow import."""
    wrong, delays = {}, (0.0, 0.1, 0.5, 2.0)
    for delay in delays:
        process = subprocess.Popen(
            [sys.executable, "-m", "kadapt_cli", "eval", "nowhere"], stderr=subprocess.PIPE, text=True
        )
        while not takes(process.pid):
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(number)
        began = time.time()
        error = process.communicate(timeout=30)[1]
        if process.returncode not in (CODES[number], 4) or time.time() - began > 5 or "Traceback" in error:
            wrong[delay] = process.returncode, error[-500:]
    assert not wrong
    tally(ROW, len(delays))


BUILDING = """
import os
from pydantic._internal import _generate_schema
from kadapt_cli import signals
from kadapt_cli.config import TrainConfig

real = _generate_schema.GenerateSchema.generate_schema

def interrupted(self, *given, **options):
    os.kill(os.getpid(), {number})
    return real(self, *given, **options)

_generate_schema.GenerateSchema.generate_schema = interrupted
signals.install(signals.stop)
TrainConfig()
"""


@pytest.mark.parametrize("number", CODES)
def test_signals_while_the_configuration_is_prepared(number, tally, quick):
    """Below code of Rust, which makes errors of its own of what a handler raises."""
    skip_unless(number == signal.SIGTERM, quick)
    script = BUILDING.format(number=int(number))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (CODES[number], "kadapt: interrupted\n")
    tally(ROW, 1)
