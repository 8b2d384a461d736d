"""Several processes and one folder: one writes and the others are told who, readers see whole states."""

import csv
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
import torch

from kadapt_cli import cli, compare, evaluate, probe, runs, study, train  # noqa: F401 - imported once for all forks

pytestmark = pytest.mark.faults

ROW = "two processes in one run folder, readers during a save, stale locks"
TIMES = ("time_s", "images_per_s")


@pytest.fixture(scope="module")
def images(tasks, tmp_path_factory) -> Path:
    """Twelve photos of two classes in train/, val/ and test/."""
    root = tmp_path_factory.mktemp("images")
    for split, count, start in (("train", 3, 0), ("val", 1, 20), ("test", 2, 40)):
        for name in ("daisy", "rose"):
            (root / split / name).mkdir(parents=True)
            for photo in sorted((tasks / "flowers5" / name).iterdir())[start : start + count]:
                shutil.copy(photo, root / split / name)
    return root


def options(images: Path, *, method: str = "linear", epochs: int = 1) -> list[object]:
    given = ["--method", method, "--epochs", epochs] if method != "linear" else ["--method", method]
    return ["train", "--data", images, "--batch-size", 4, "--save-every", 0, *given]


def result_of(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, str]]]:
    """What has to be the same to the last bit: adapter, state, metrics.csv but for the times."""
    with (run / runs.METRICS).open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return runs.load_tensors(run / runs.ADAPTER, "adapter")[0], runs.load_tensors(run / runs.STATE, "state")[0], rows


def differences(a: Path, b: Path) -> list[str]:
    (adapter, state, rows), (other_adapter, other_state, other_rows) = result_of(a), result_of(b)
    found = [] if rows == other_rows else ["metrics.csv"]
    for left, right in ((adapter, other_adapter), (state, other_state)):
        found += [n for n in left.keys() | right.keys() if n not in left or n not in right]
        found += [n for n in left.keys() & right.keys() if not torch.equal(left[n], right[n])]
    return found


def left_over(out: Path) -> list[str]:
    return [p.name for p in out.iterdir() if p.name.startswith(runs.TEMPORARY) or p.name == runs.HOLDER]


def until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    """Undisturbed runs: linear/ and kadaptation/."""
    root = tmp_path_factory.mktemp("alone")
    for method in ("linear", "kadaptation"):
        assert faults.kadapt(*options(images, method=method, epochs=2), "--out", root / method).code == 0
    return root


def test_two_trainings_with_one_out(images, alone, tmp_path, tally, quick):
    """Exactly one wins, with the result of an undisturbed run; the other exits 2 and says which process it is.

    A second that comes when the first has ended, which a busy machine decides, is told of the run that is there.
    """
    wrong, named = [], 0
    offsets = [0.0, 0.03, 0.5] if quick else [0.0] * 8 + [k * 0.04 for k in range(32)]
    for number, offset in enumerate(offsets):
        out = tmp_path / str(number)
        first = faults.Trial(faults.command(*options(images), "--out", out))
        time.sleep(offset)
        second = faults.Trial(faults.command(*options(images), "--out", out))
        found = {trial.pid: trial.wait() for trial in (second, first)}
        winners = [pid for pid, outcome in found.items() if outcome.code == 0]
        losers = [outcome for outcome in found.values() if outcome.code == 2]
        if len(winners) != 1 or len(losers) != 1:
            wrong.append((offset, [(outcome.code, outcome.err) for outcome in found.values()]))
            continue
        if f"is being written by process {winners[0]} on {socket.gethostname()} since 2" in losers[0].said:
            named += 1
        elif "already holds a run" not in losers[0].said:
            wrong.append((offset, losers[0].said))
        wrong += [(offset, name) for name in differences(out, alone / "linear") + left_over(out)]
    assert not wrong
    assert named >= len(offsets) / 5  # most offsets are longer than a run
    tally(ROW, len(offsets))


def test_resume_of_a_run_that_is_running(images, alone, tmp_path, tally, quick):
    wrong = []
    offsets = [0.3] if quick else [k * 0.1 for k in range(12)]
    for offset in offsets:
        out = tmp_path / f"{offset:.1f}"
        first = faults.Trial(faults.command(*options(images, method="kadaptation", epochs=2), "--out", out))
        until((out / runs.STATE).exists)
        time.sleep(offset)
        second = faults.kadapt("train", "--out", out, "--resume")
        found = first.wait()
        named = f"written by process {first.pid} on" in second.said
        if found.code != 0 or (second.code, named) not in ((2, True), (0, False)):  # 0: the first had ended
            wrong.append((offset, found.code, second.code, second.err))
        wrong += [(offset, name) for name in differences(out, alone / "kadaptation") + left_over(out)]
    assert not wrong
    tally(ROW, len(offsets))


def test_readers_during_saves_see_whole_states(tmp_path, tally, quick):
    """Each state is filled with its number, in the tensors and beside them: half of one and half of another differ."""
    out = tmp_path / "run"
    out.mkdir()
    shape, saves = (300_000,), 40 if quick else 60

    def save() -> None:
        with runs.held(out):
            for number in range(1, saves + 1):
                tensors = {name: torch.full(shape, float(number)) for name in ("a", "b")}
                runs.save_tensors(out / runs.ADAPTER, "adapter", tensors, {"number": number})
                runs.save_tensors(
                    out / runs.STATE, "state", tensors, {"number": number}, previous=out / runs.PREVIOUS_STATE
                )

    writer = faults.Trial(save)
    until((out / runs.STATE).exists)
    reads, seen, last = 0, set(), 0
    while last < saves:
        for name, kind in ((runs.STATE, "state"), (runs.ADAPTER, "adapter")):
            tensors, info = runs.load_tensors(out / name, kind)
            assert all(bool((tensor == info["number"]).all()) for tensor in tensors.values())
            reads += 1
            seen.add((name, info["number"]))
        assert info["number"] >= last
        last = info["number"]
        _, info, why = runs.load_state(out)
        assert why == ""
    found = writer.wait()
    assert (found.code, found.err) == (0, "")
    assert reads >= len(seen) > 20
    assert not left_over(out)
    tally(ROW, len(seen))


def test_eval_while_a_run_saves_after_every_step(images, tmp_path, tally, quick):
    """`kadapt eval` is right or says that there is no adapter yet; never half of one."""
    out, epochs, count = tmp_path / "run", 100_000, 1 if quick else 12
    longer = ("--patience", epochs, "--out", out)  # than all that is read meanwhile
    writer = faults.Trial(faults.command(*options(images, method="kadaptation", epochs=epochs), *longer), limit_s=120)
    try:
        until((out / runs.STATE).exists)
        found = faults.kadapt("eval", out, "--json")
        assert found.code == 0 or (found.code == 4 and runs.ADAPTER in found.said)
        until((out / runs.ADAPTER).exists)
        epoch = runs.load_state(out)[1]["epoch"]
        for _ in range(count):
            found = faults.kadapt("eval", out, "--json")
            assert (found.code, found.err) == (0, ""), found
            assert json.loads(found.out)["split"] == "test"
        assert runs.load_state(out)[1]["epoch"] > epoch
    finally:
        writer.send(signal.SIGTERM)
    assert writer.wait().code == 143
    tally(ROW, count + 1)


HERE = socket.gethostname()
HOLDERS = {  # what the holder's file says, and what a second process is told; HOLDER is the process that holds the lock
    "nothing": (None, "does not name; wait for it"),
    "garbage": (b"\x00\xff{", "does not name; wait for it"),
    "other JSON": (b'["pid"]', "does not name; wait for it"),
    "deep JSON": (b"[" * 100_000, "does not name; wait for it"),
    "words": (b'{"pid": "x", "host": "", "since": ""}', "does not name; wait for it"),
    "a group": (b'{"pid": -1, "host": "' + HERE.encode() + b'", "since": "x"}', "does not name; wait for it"),
    "a huge number": (b'{"pid": 1' + b"0" * 30 + b', "host": "h", "since": "x"}', "does not name|on h since x"),
    "infinity": (b'{"pid": 1e999, "host": "h", "since": "x"}', "does not name; wait for it"),
    "another host": (
        b'{"pid": 7, "host": "node9", "since": "noon"}',
        "process 7 on node9 since noon; wait for it, if ",
    ),
    "escapes": (b'{"pid": 7, "host": "\\u001b[31m", "since": "\\n"}', "process 7 on \\x1b[31m since \\n; wait for it"),
}


@pytest.fixture
def holding(tmp_path) -> Iterator[Path]:
    """A run folder whose lock another process holds."""
    out = tmp_path / "run"

    def hold() -> None:
        with runs.held(out):
            (out / "held").touch()
            time.sleep(60)

    trial = faults.Trial(hold, limit_s=90)
    until((out / "held").exists)
    (out / "held").unlink()
    yield out
    trial.send(signal.SIGKILL)
    trial.wait()


def test_what_the_second_process_is_told(holding, images, tally, quick):
    wrong = []
    cases = dict(list(HOLDERS.items())[-2:]) if quick else HOLDERS
    said = json.loads((holding / runs.HOLDER).read_text())
    own = holding / f"{runs.TEMPORARY}{said['pid']}-state.safetensors"
    own.write_text("of the process that writes")
    for name, (content, expected) in cases.items():
        (holding / runs.HOLDER).unlink(missing_ok=True)
        if content is not None:
            (holding / runs.HOLDER).write_bytes(content)
        found = faults.kadapt(*options(images), "--out", holding)
        told = any(words in found.said for words in expected.split("|")) and "or give another --out" in found.said
        if found.code != 2 or not told or found.time_s > 5 or not own.exists():
            wrong.append((name, found.code, found.err))
    assert not wrong
    tally(ROW, len(cases))


def killed_while_writing(out: Path) -> None:
    """A process that held the lock, wrote half of a first state and was killed."""

    def action() -> None:
        with runs.held(out):
            (out / runs.CONFIG).write_text("")
            (out / f"{runs.TEMPORARY}{os.getpid()}-{runs.STATE}").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert faults.forked(action).code == -signal.SIGKILL
    assert (out / runs.HOLDER).exists()


def left(name: str, content: bytes) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        out.mkdir()
        (out / name).write_bytes(content)

    return make


def left_both(out: Path) -> None:
    killed_while_writing(out)
    (out / runs.HOLDER).write_text('{"pid": 1, "host": "node9", "since": "noon"}')


def left_by_us_and_others(out: Path) -> None:
    left(f"{runs.TEMPORARY}999-a b\n.json", b"")(out)
    (out / f"{runs.TEMPORARY}12-adapter.safetensors").symlink_to("/etc/hostname")


TAKEN_OVER = {
    "killed while writing": killed_while_writing,
    "killed twice": lambda out: [killed_while_writing(out) for _ in range(2)],
    "its number is another process's now": left(runs.HOLDER, b'{"pid": 1, "host": "%s", "since": "x"}' % HERE.encode()),
    "killed on another host": left_both,
    "an empty lock": left(runs.LOCK, b""),
    "a lock of garbage": left(runs.LOCK, os.urandom(5000)),
    "a lock that names a process": left(runs.LOCK, b"1\n"),
    "a holder of garbage": left(runs.HOLDER, b"\xff" * 100),
    "temporaries": left_by_us_and_others,
}  # fmt: skip


def test_stale_locks_and_temporaries_are_taken_over(images, alone, tmp_path, tally, quick):
    wrong = []
    cases = dict(list(TAKEN_OVER.items())[:1]) if quick else TAKEN_OVER
    for name, make in cases.items():
        out = tmp_path / name
        make(out)
        found = faults.kadapt(*options(images), "--out", out)
        if found.code != 0 or differences(out, alone / "linear") or left_over(out):
            wrong.append((name, found.code, found.err, left_over(out)))
    assert not wrong
    assert Path("/etc/hostname").exists()
    tally(ROW, len(cases))


def foreign(out: Path) -> None:
    left("notes.txt", b"precious")(out)
    (out / runs.LOCK).touch()


REFUSED = {  # what is in the folder, the exit code and what is said
    "another program's temporary": (left(f"{runs.TEMPORARY}notes.txt", b"precious"), 2, "already holds something else"),
    "folder named as a temporary": (lambda out: (out / f"{runs.TEMPORARY}1-x").mkdir(parents=True), 0, ""),
    "foreign folder with a lock": (foreign, 2, "already holds something else (notes.txt"),
    "the lock is a folder": (lambda out: (out / runs.LOCK).mkdir(parents=True), 5, "written (Is a directory)"),
    "the lock is a link": (lambda out: (out.mkdir(), (out / runs.LOCK).symlink_to(out / "x")), 5, "cannot be written"),
    "the holder is a folder": (lambda out: (out / runs.HOLDER).mkdir(parents=True), 5, "Is a directory"),
}  # fmt: skip


def test_what_is_not_ours_is_left_alone(images, tmp_path, tally, quick):
    wrong = []
    for name, (make, code, words) in REFUSED.items():
        out = tmp_path / name
        make(out)
        before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
        there = set(out.iterdir())
        found = faults.kadapt(*options(images), "--out", out)
        changed = [p.name for p, content in before.items() if not p.exists() or p.read_bytes() != content]
        if found.code != code or words not in found.said or changed or there - set(out.iterdir()):
            wrong.append((name, found.code, found.err, changed))
        if quick:
            break
    assert not wrong
    tally(ROW, 1 if quick else len(REFUSED))


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "EIO"])
def test_a_file_system_without_locks(number, tmp_path, tally):
    def action() -> None:
        def refuse(*_: object) -> None:
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

        fcntl.flock = refuse
        faults.command("train", "--data", tmp_path, "--out", tmp_path / "run")()

    found = faults.forked(action)
    assert found.code == 5
    assert f"cannot be written ({os.strerror(getattr(errno, number))})" in found.said
    assert ("its file system has no locks" in found.said) == (number != "EIO")
    tally(ROW, 1)


def test_a_folder_that_may_not_be_written(images, tmp_path, tally):
    """A folder that is there, a new one, and one two levels below."""
    there = tmp_path / "there"
    there.mkdir()
    for folder in (there, tmp_path):
        folder.chmod(0o555)
    for out in (there, tmp_path / "new", there / "deep" / "new"):
        found = faults.unprivileged(*options(images), "--out", out)
        assert found.code == 5, found.err
        assert "cannot be written (Permission denied); give a folder that can be" in found.said
        assert not list(there.iterdir())
    tmp_path.chmod(0o755)
    tally(ROW, 3)


def test_a_start_that_fails_leaves_nothing(tmp_path, tally):
    """The lock is taken before the images are read; a folder that nothing was written to goes with it."""
    (tmp_path / "images").mkdir()
    found = faults.kadapt("train", "--data", tmp_path / "images", "--out", tmp_path / "run")
    assert found.code == 3, found.err
    assert not (tmp_path / "run").exists()
    tally(ROW, 1)


def study_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "study.jsonl").read_text().splitlines()]


def test_two_comparisons_share_a_folder(images, tmp_path, tally, quick):
    wrong = []
    offsets = [0.0] if quick else [0.0, 0.0, 0.1, 0.4, 0.8]
    for number, offset in enumerate(offsets):
        out = tmp_path / str(number)
        arguments = ["compare", "--data", images, "--method", "linear", "--seeds", "0,1", "--shots", 2, "--out", out]
        first = faults.Trial(faults.command(*arguments))
        time.sleep(offset)
        found = [faults.kadapt(*arguments), first.wait()]
        finals = [r["seed"] for r in study_of(out) if r["kind"] == "final"]
        rows = json.loads((out / compare.JSON).read_text())["rows"]
        if [o.code for o in found] != [0, 0] or sorted(finals) != [0, 1] or len(rows) != 2 or left_over(out):
            wrong.append((offset, finals, [o.err for o in found]))
    assert not wrong
    tally(ROW, len(offsets))


def test_two_probes_of_one_folder(images, tmp_path, tally, quick):
    """One goes on, the other is told which process it is; the same command then finds all trials there."""
    arguments = ["probe-id", "--data", images, "--shots", 2, "--groups", "attn", "--per", "model", "--dims", 4]
    arguments += ["--refine", 0, "--folds", 1, "--epochs", 60]  # still at work when the second has started
    wrong = []
    seconds = [""] if quick else ["", runs.HOLDER, study.RECORDS]  # what the first has written when the second starts
    for number, second in enumerate(seconds):
        out = tmp_path / str(number)
        pair = [faults.Trial(faults.command(*arguments, "--out", out))]
        while second and not (out / second).exists():
            time.sleep(0.001)
        pair.append(faults.Trial(faults.command(*arguments, "--out", out)))
        found = {trial.pid: trial.wait() for trial in pair}
        winners = [pid for pid, outcome in found.items() if outcome.code == 0]
        losers = [outcome.said for outcome in found.values() if outcome.code == 2]
        trials = [(r["module"], r["d"]) for r in study_of(out) if r["kind"] == "trial"]
        named = len(winners) == len(losers) == 1 and f"by process {winners[0]} on" in losers[0]
        if not named or len(set(trials)) != len(trials) or not (out / "probe.json").exists() or left_over(out):
            wrong.append((second, trials, [(o.code, o.err) for o in found.values()]))
    assert not wrong
    tally(ROW, len(seconds))


def test_many_contenders_for_one_lock(tmp_path, tally, quick):
    """Holders that come and go, are killed, and make and remove the folder: never two at once."""
    out, inside = tmp_path / "run", tmp_path / "inside"
    inside.mkdir()
    ended = []

    def contend() -> None:
        for turn in range(100):
            try:
                with runs.held(out):
                    (inside / "one").mkdir()  # fails when another is inside
                    if turn == 70:
                        (inside / "one").rmdir()
                        os.kill(os.getpid(), signal.SIGKILL)
                    (inside / "one").rmdir()
            except (runs.UsageError, runs.MachineError):
                pass

    for _ in range(1 if quick else 6):
        pair = [faults.Trial(contend) for _ in range(2)]
        ended += [trial.wait() for trial in pair]
    wrong = [(o.code, o.err[-500:]) for o in ended if o.code not in (0, -signal.SIGKILL)]
    assert not wrong
    assert any(o.code == -signal.SIGKILL for o in ended)
    tally(ROW, len(ended))
