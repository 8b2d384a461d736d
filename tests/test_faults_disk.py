"""The n-th open, write, fsync, link or rename fails, for every n until none does: exit 5, one line, old state whole."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import faults
import pytest
import torch

from kadapt_cli import merge, runs, session
from kadapt_cli import train as training

pytestmark = pytest.mark.faults
ROW = "a failing disk: exit 5, one line, the old state whole"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, 0)  # 0: half a write, then ENOSPC
NO_MORE = 99  # exit code of a command with fewer operations


def failing(number: int, code: int, root: Path, *arguments: object) -> faults.Outcome:
    """The command line, whose operation `number` below `root` fails; NO_MORE where it does not get that far."""

    def act(count, name):
        if count != number:
            return
        if code == 0 and name == "write":
            raise faults.ShortWriteError(errno.ENOSPC, "")
        raise OSError(code or errno.ENOSPC, os.strerror(code or errno.ENOSPC))

    def action():
        seen = faults.Operations(root, act)
        try:
            faults.command(*arguments)()
        except SystemExit as done:
            sys.exit(NO_MORE if seen.count < number and not done.code else done.code)

    return faults.forked(action)


def sweep(root: Path, arguments, prepare, judge, rounds: int = 1, step: int = 1) -> int:
    """Fail every `step`-th operation of a command with `rounds` of the errors, and judge what is left.

    Args:
        root: Whose operations fail.
        arguments: The command line.
        prepare: Brings the folder into its state before the command.
        judge: Lists what is wrong with the folder after a failure, or with a command that got over it.
        rounds: Errors an operation, taken in turn.
        step: From one operation to the next.

    Returns:
        The number of trials.
    """
    wrong, trials, number = {}, 0, 1
    while True:
        for turn in range(rounds):
            code = ERRORS[(number + turn) % len(ERRORS)]
            prepare()
            found = failing(number, code, root, *arguments)
            if found.code == NO_MORE:
                assert number > 1
                assert not wrong
                return trials
            trials += 1
            done = found.code == 0  # some operations are tried again, such as the opening of a lock
            problems = judge(done)
            lines = [line for line in found.err.splitlines() if line.startswith("kadapt: ")]
            if not done and (found.code != 5 or len(lines) != 1 or "Traceback" in found.err or found.out):
                problems.append(f"exit {found.code}: {found.err[-600:]}")
            if problems:
                wrong[number, code] = problems
        number += step


def fresh(out: Path):
    """Removes a folder and what is beside it."""

    def prepare():
        for path in out.parent.glob(f"{out.name}*"):
            shutil.rmtree(path)

    return prepare


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    found = faults.kadapt(*tiny.train, "--out", out)
    assert found.code == 0, found.err
    return out


def test_train(tiny, finished, tmp_path, tally, quick):
    out = tmp_path / "run"
    going_on = [0]

    def judge(done):
        if done:
            return faults.differences(finished, out)
        if (out / runs.STATE).exists():
            runs.load_tensors(out / runs.STATE, "state")
        going_on[0] += 1
        if going_on[0] % (3 if quick else 10):
            return []
        resume = ["--resume"] if (out / runs.STATE).exists() else []
        found = faults.kadapt(*tiny.train, "--out", out, *resume)
        return [found.err[-500:]] if found.code else faults.differences(finished, out)

    arguments = (*tiny.train, "--out", out)
    trials = sweep(out, arguments, fresh(out), judge, 1 if quick else 2, 30 if quick else 1)
    tally(ROW, trials)


def test_a_run_that_goes_on(tiny, finished, tmp_path, tally, quick):
    """It takes up a state, and fails to write the next: the state that it took up is still there, to the bit."""
    half, out = tmp_path / "half" / "run", tmp_path / "run"

    def action():
        def act(count, name):
            if count == 70:
                os.kill(os.getpid(), signal.SIGKILL)

        faults.Operations(half, act)
        faults.command(*tiny.train, "--out", half)()

    assert faults.forked(action).code == -signal.SIGKILL
    step = runs.load_state(half)[1]["step"]
    assert 0 < step < 6

    def prepare():
        fresh(out)()
        shutil.copytree(half, out)

    def judge(done):
        if done:
            return faults.differences(finished, out)
        reached = runs.load_tensors(out / runs.STATE, "state")[1]["step"]
        return [] if reached >= step else [f"back at step {reached} of {step}"]

    arguments = (*tiny.train, "--out", out, "--resume")
    tally(ROW, sweep(out, arguments, prepare, judge, step=31 if quick else 1))


def test_out_of_memory_anywhere_is_one_line(tiny, tmp_path, tally):
    """Also where nothing is halved: in the optimizer, in a measurement, before training."""

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    for number, (module, name) in enumerate([(torch.optim.AdamW, "step"), (training, "logits"), (session, "logits")]):
        out = tmp_path / str(number)

        def action(module=module, name=name, out=out):
            setattr(module, name, full)
            faults.command(*tiny.train, "--out", out)()

        found = faults.forked(action)
        assert (found.code, "Traceback" in found.err) == (5, False), found.err
        assert "out of memory" in found.said
    tally(ROW, 3)


def test_a_merge_that_does_not_end_leaves_no_folder(finished, tmp_path, tally):
    """Neither one that nobody compared, nor one that differs; what a killed one left is removed by the next."""

    def merging(change):
        def action():
            change()
            faults.command("merge-weights", finished, "--out", tmp_path / "merged")()

        return faults.forked(action)

    def ended(number):
        return lambda: setattr(merge, "_verify", lambda *_: os.kill(os.getpid(), number))

    ends = {143: ended(signal.SIGTERM), 7: lambda: setattr(merge, "_verify", lambda *_: 0.1), -9: ended(signal.SIGKILL)}
    for code, change in ends.items():
        found = merging(change)
        assert found.code == code, found.err
        assert not (tmp_path / "merged").exists()
    assert len(list(tmp_path.iterdir())) == 1  # of the one that was killed
    assert merging(lambda: None).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    tally(ROW, 4)


def test_merge_weights(finished, tmp_path, tally, quick):
    """Nothing stands at --out unless it is whole."""
    out = tmp_path / "place" / "merged"

    def judge(done):
        return [path.name for path in out.parent.iterdir()] if out.parent.exists() and not done else []

    def prepare():
        shutil.rmtree(out.parent, ignore_errors=True)

    tally(ROW, sweep(out.parent, ("merge-weights", finished, "--out", out), prepare, judge, step=16 if quick else 1))


@pytest.mark.parametrize("name", faults.STUDIES)
def test_studies(tiny, tmp_path, tally, quick, name):
    """What was finished is kept, and the same command goes on."""
    whole, out = tmp_path / "whole", tmp_path / "study"
    options, found = faults.STUDIES[name]
    arguments = (name, "--data", tiny.folder / "photos", "--model", f"local-dir:{tiny.folder / 'model'}", *options)
    assert faults.kadapt(*arguments, "--out", whole).code == 0

    def judge(done):
        again = None if done else faults.kadapt(*arguments, "--out", out)
        if again and again.code:
            return [again.err[-500:]]
        return [] if found(out) == found(whole) else ["another result"]

    tally(ROW, sweep(out, (*arguments, "--out", out), fresh(out), judge, step=15 if quick else 1))
