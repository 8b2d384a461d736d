"""SIGKILL at every step, before every operation on the run folder, and in every evaluation.

After each kill what is on disk can be loaded, and the run that goes on ends with the bits of one that nothing ended.
"""

import os
import random
import signal
from pathlib import Path

import faults
import pytest

from kadapt_cli import evaluate, runs, session
from kadapt_cli import train as training

pytestmark = pytest.mark.faults
ROW = "SIGKILL in a run: a whole state, the same bits after going on"
STUDIES = "SIGKILL in a comparison or a probe: the same result after going on"


def killed_at(number: int, tiny, out: Path, *options: object) -> faults.Outcome:
    """A run that is killed before its operation `number`; 0 lets it end and prints the count and the names."""

    def action():
        names = []

        def act(count, name):
            names.append(name)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        seen = faults.Operations(out, act)
        seen.also(training, "_gradients")
        seen.also(training, "logits")
        seen.also(session, "logits")
        faults.command(*tiny.train, "--out", out, *options)()

    return faults.forked(action)


def go_on(tiny, out: Path) -> faults.Outcome:
    """The command that a user would type after a crash."""
    has_state = (out / runs.STATE).exists()
    return faults.kadapt(*tiny.train, "--out", out, *(["--resume"] if has_state else []))


def problems(tiny, whole: Path, out: Path) -> list[str]:
    """What is wrong with a killed run and with the one that goes on."""
    if (out / runs.STATE).exists():
        runs.load_tensors(out / runs.STATE, "state")
    if (out / runs.ADAPTER).exists():
        evaluate.open_run(out)
    found = go_on(tiny, out)
    if found.code:
        return [found.err[-500:]]
    left = [path.name for path in out.iterdir() if path.name.startswith(runs.TEMPORARY)]
    return faults.differences(whole, out) + left


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run that nothing ends, and how many operations it has."""
    out = tmp_path_factory.mktemp("whole") / "run"
    counts = []

    def act(count, name):
        counts.append(name)
        Path(out.parent / "count").write_text(" ".join(counts))

    def action():
        seen = faults.Operations(out, act)
        seen.also(training, "_gradients")
        seen.also(training, "logits")
        seen.also(session, "logits")
        faults.command(*tiny.train, "--out", out)()

    found = faults.forked(action)
    assert found.code == 0, found.err
    return out, (out.parent / "count").read_text().split()


def test_what_is_written_is_on_the_disk_before_it_has_its_name(whole):
    """SIGKILL leaves the system's buffers alone, a power cut does not: file, then name, then folder are flushed.

    Files of tensors are written in two parts.
    """
    pairs = zip(whole[1], ["", *whole[1]], strict=False)
    names = [name for name, before in pairs if (before, name) != ("write", "write")]
    places = [i for i, name in enumerate(names) if name == "write"]
    assert len(places) > 15
    assert {tuple(names[i - 1 : i + 5]) for i in places} == {("open", "write", "fsync", "rename", "open", "fsync")}


def test_killed_anywhere(tiny, whole, tmp_path, tally, quick):
    run, names = whole
    assert {"open", "write", "fsync", "rename", "_gradients", "logits"} <= set(names)
    assert len(names) >= 140
    wrong, trials = {}, range(1, len(names) + 1)
    trials = sorted({*trials[::12], *trials[-8:]}) if quick else trials
    for number in trials:
        out = tmp_path / str(number)
        assert killed_at(number, tiny, out).code == -signal.SIGKILL, number
        if found := problems(tiny, run, out):
            wrong[number, names[number - 1]] = found
    assert not wrong
    tally(ROW, len(trials))


def test_killed_again_and_again(tiny, whole, tmp_path, tally, quick):
    """Five times in one run, at random operations."""
    run, names = whole
    wrong, seeds = {}, range(2 if quick else 20)
    for seed in seeds:
        draw, out = random.Random(seed), tmp_path / str(seed)
        for _ in range(5):
            resume = ["--resume"] if (out / runs.STATE).exists() else []
            killed_at(draw.randint(1, len(names) // 3), tiny, out, *resume)
        if found := problems(tiny, run, out):
            wrong[seed] = found
    assert not wrong
    tally(ROW, 5 * len(seeds))


@pytest.mark.parametrize("name", faults.STUDIES)
def test_studies(tiny, tmp_path, tally, quick, name):
    """Killed before every operation on its folder, a study goes on by the same command."""
    options, found = faults.STUDIES[name]
    arguments = (name, "--data", tiny.folder / "photos", "--model", f"local-dir:{tiny.folder / 'model'}", *options)
    whole, wrong, number = tmp_path / "whole", {}, 0
    assert faults.kadapt(*arguments, "--out", whole).code == 0
    while True:
        number += 1 if not quick else 15
        out = tmp_path / str(number)

        def act(count, _, number=number):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def action(out=out, act=act):
            faults.Operations(out, act)
            faults.command(*arguments, "--out", out)()

        if faults.forked(action).code == 0:
            break
        again = faults.kadapt(*arguments, "--out", out)
        if again.code or found(out) != found(whole):
            wrong[number] = again.err[-500:]
    assert not wrong
    assert number > 15
    tally(STUDIES, number - 1 if not quick else number // 15 - 1)
