"""Two processes that train together: what happens to one when the other is killed or asked to stop, and to the run.

The processes are forks with the environment that torchrun gives, and a store that another process keeps, as torchrun's
agent does.
"""

import csv
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from types import ModuleType

import faults
import pytest
import torch
import torch.distributed as dist

from kadapt_cli import cli, runs, train  # noqa: F401 - imported once for all forks

pytestmark = pytest.mark.faults

ROW = "processes that train together: kills, signals, uneven batches, 2 -> 1 -> 2"
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGINT: 130}
LOST = "a process that trains together with this one has ended; "
Hook = Callable[[], object]


@pytest.fixture
def port() -> Iterator[Callable[[], int]]:
    """port() starts a store, which another process keeps as torchrun's agent would, and returns its port."""
    agents = []

    def begin() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number: int = free.getsockname()[1]

        def keep() -> None:
            store = dist.TCPStore("127.0.0.1", number, is_master=True, wait_for_workers=False)
            print("ready", file=sys.stderr)
            time.sleep(100)
            del store

        agents.append(faults.Trial(keep, limit_s=600))
        while agents[-1].printed() != "ready\n":
            time.sleep(0.01)
        return number

    yield begin
    for agent in agents:
        agent.send(signal.SIGKILL)
        agent.wait()


@pytest.fixture(scope="module")
def images(tasks, tmp_path_factory) -> Path:
    """Five training images: of two batches of at most 4, the last has one, and nothing for the second process."""
    root = tmp_path_factory.mktemp("images")
    for split, counts, start in (("train", (3, 2), 0), ("val", (2, 2), 20), ("test", (1, 1), 40)):
        for name, number in zip(("daisy", "rose"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for photo in sorted((tasks / "flowers5" / name).iterdir())[start : start + number]:
                shutil.copy(photo, root / split / name)
    return root


def start(images: Path, out: Path) -> list[object]:
    """A run of four steps. Adam makes a step of up to --lr from a gradient that is all rounding: 40 times 1e-5."""
    options = ["--batch-size", 4, "--epochs", 2, "--lr", 4e-4, "--save-every", 0]
    return ["train", "--data", images, *options, "--out", out]


def resume(out: Path) -> list[object]:
    return ["train", "--out", out, "--resume"]


def together(
    port: Callable[[], int], arguments: list[object], hooks: dict[int, Hook] | None = None
) -> list[faults.Trial]:
    """Two processes under way; each runs its hook first."""
    number = str(port())

    def member(rank: int) -> Callable[[], None]:
        def action() -> None:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=number,
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
            if hooks and rank in hooks:
                hooks[rank]()
            faults.command(*arguments)()

        return action

    return [faults.Trial(member(rank), limit_s=30) for rank in (0, 1)]


def at(module: ModuleType, name: str, number: int, then: Hook) -> Hook:
    """A hook: the n-th call of a function does something else first."""

    def hook() -> None:
        original, calls = getattr(module, name), count(1)

        def wrapped(*arguments: object, **options: object) -> object:
            if next(calls) == number:
                then()
            return original(*arguments, **options)

        setattr(module, name, wrapped)

    return hook


def me(number: signal.Signals) -> Hook:
    return lambda: os.kill(os.getpid(), number)


KILLED = me(signal.SIGKILL)


def half_a_state() -> None:
    """A hook: killed when half of the third state is written."""
    original, calls = runs.commit, count(1)

    def commit(path: Path, *data: bytes, **options: object) -> None:
        if path.name == runs.STATE and next(calls) == 3:
            whole = b"".join(data)
            (path.parent / f"{runs.TEMPORARY}{os.getpid()}-{path.name}").write_bytes(whole[: len(whole) // 2])
            KILLED()
        original(path, *data, **options)  # type: ignore[arg-type]

    runs.commit = commit


POINTS: dict[str, tuple[Hook, Hook]] = {  # what kills the first process, what kills the second
    "before they meet": (at(train, "rendezvous", 1, KILLED),) * 2,
    "in a step": (at(train, "_gradients", 3, KILLED),) * 2,
    "in a save of the first": (half_a_state, at(train, "_leave_if", 2, KILLED)),
    "in validation": (at(train, "logits", 2, KILLED),) * 2,
    "in the last measurement": (at(train, "_measure", 1, KILLED), at(train, "_summary", 1, KILLED)),
}


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    """The run by one process, unbroken."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert faults.kadapt(*start(images, out)).code == 0
    return out


def differs(out: Path, alone: Path) -> list[str]:
    """Tensors more than 1e-5 away from those of the unbroken run, and a result or history that is another."""
    left, right = (runs.load_tensors(folder / runs.ADAPTER, "adapter")[0] for folder in (out, alone))
    wrong = list(left.keys() ^ right.keys())
    wrong += [n for n in left.keys() & right.keys() if not torch.allclose(left[n], right[n], rtol=1e-5, atol=1e-5)]
    results = [json.loads((folder / runs.RESULT).read_text()) for folder in (out, alone)]
    wrong += [] if results[0]["metrics"] == results[1]["metrics"] else ["metrics"]
    histories = [list(csv.DictReader((folder / runs.METRICS).read_text().splitlines())) for folder in (out, alone)]
    same = [[(row["epoch"], row["step"], row["train_accuracy"]) for row in rows] for rows in histories]
    wrong += [] if same[0] == same[1] else [f"metrics.csv: {same[0]} instead of {same[1]}"]
    losses = [[float(row["train_loss"]) for row in rows] for rows in histories]
    wrong += [] if losses[0] == pytest.approx(losses[1], rel=1e-4) else [f"{losses[0]} instead of {losses[1]}"]
    return wrong + [path.name for path in out.iterdir() if path.name.startswith(runs.TEMPORARY)]


def go_on(port: Callable[[], int], out: Path, images: Path, processes: int) -> list[faults.Outcome]:
    """Take a run up, or start it where nothing was saved."""
    arguments = resume(out) if (out / runs.STATE).exists() else start(images, out)
    if processes == 1:
        return [faults.kadapt(*arguments)]
    return [trial.wait() for trial in together(port, arguments)]


def test_it_is_the_run_of_one_process(port, images, alone, tmp_path, tally):
    found = [trial.wait() for trial in together(port, start(images, tmp_path / "run"))]
    assert [outcome.code for outcome in found] == [0, 0], found
    assert (found[1].out, found[1].err) == ("", "")
    assert not differs(tmp_path / "run", alone)
    tally(ROW, 1)


def test_either_process_is_killed(port, images, alone, tmp_path, tally, quick):
    """The other ends by itself with one line, or by torchrun's SIGTERM where they have not met; the run goes on."""
    wrong = []
    cases = list(product(POINTS.items(), (0, 1)))
    for number, ((name, hooks), victim) in enumerate(cases[4:6] if quick else cases):
        out = tmp_path / f"{name} {victim}"
        trials = together(port, start(images, out), {victim: hooks[victim]})
        killed = trials[victim].wait()
        since = time.monotonic()
        if name == "before they meet":
            trials[1 - victim].send(signal.SIGTERM)  # what torchrun does when a process of its has ended
        found = trials[1 - victim].wait()
        ended_s = time.monotonic() - since
        expected, words = {"before they meet": (143, ""), "in the last measurement": (0, "")}.get(name, (5, LOST))
        if killed.code != -signal.SIGKILL or found.code != expected or words not in found.said or ended_s > 10:
            wrong.append((name, victim, killed.code, found.code, ended_s, found.err))
        wrong += [(name, victim, "traceback")] if "Traceback" in found.err else []
        if words and ("go on with --resume" in found.said) != (out / runs.STATE).exists():
            wrong.append((name, victim, found.said))
        after = go_on(port, out, images, 1 + (number // 2 + victim) % 2)
        if any(outcome.code for outcome in after):
            wrong.append((name, victim, [outcome.err for outcome in after]))
        else:
            wrong += [(name, victim, what) for what in differs(out, alone)]
    assert not wrong
    tally(ROW, 2 if quick else len(cases))


def little_memory(most: int) -> Hook:
    """A hook: no forward pass of so many images, no backward pass of as many as that, ever works."""

    def hook() -> None:
        real_loss, real_step = train.loss_sum, train._gradients

        def gradients(session, images, labels, batch):  # type: ignore[no-untyped-def]
            def narrow(module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
                if len(given[0]) > most + 1 and torch.is_grad_enabled():
                    raise torch.OutOfMemoryError("CUDA out of memory")

            handle = session.net.register_forward_pre_hook(narrow)
            try:
                return real_step(session, images, labels, batch)
            finally:
                handle.remove()

        def loss_sum(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            if values.requires_grad and len(values) == most + 1:
                values.register_hook(exhausted)
            return real_loss(values, labels)

        train.loss_sum, train._gradients = loss_sum, gradients  # type: ignore[assignment]

    return hook


def exhausted(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_in_one_halves_its_micro_batch(rank, images, port, alone, tmp_path, tally):
    """In the forward or the backward pass; the other waits, the effective batch stays, the run folder says so."""
    out = tmp_path / "run"
    found = [trial.wait() for trial in together(port, start(images, out), {rank: little_memory(1)})]
    assert [outcome.code for outcome in found] == [0, 0], found
    assert not differs(out, alone)
    assert json.loads((out / runs.RESULT).read_text())["micro_batch"] == 1
    assert ("out of memory: now 1 images at a time" in found[0].err) == (rank == 0)
    tally(ROW, 1)


def test_the_second_process_writes_nothing(port, images, tmp_path, tally):
    said = at(runs, "commit", 1, lambda: os.write(2, b"committed"))
    found = [trial.wait() for trial in together(port, start(images, tmp_path / "run"), {0: said, 1: said})]
    assert [outcome.code for outcome in found] == [0, 0]
    assert ["committed" in outcome.err for outcome in found] == [True, False]
    tally(ROW, 1)


def test_a_signal_to_one_stops_both(port, images, alone, tmp_path, tally, quick):
    """After the same step, with its exit code, saved; wherever it comes: in a step, in a save, in validation."""
    wrong = []
    places = [(train, "_step", 2), (train, "save_state", 2), (train, "logits", 1)]
    cases = [(number, rank, place) for number, rank, place in product(CODES, (0, 1), places)]
    cases = [case for case in cases if case[2][1] != "save_state" or case[1] == 0]  # the first alone saves
    for index, (number, rank, place) in enumerate(cases[1::8] if quick else cases):
        out = tmp_path / str(index)
        found = [trial.wait() for trial in together(port, start(images, out), {rank: at(*place, me(number))})]
        good = [outcome.code == CODES[number] and "saved after" in outcome.said for outcome in found]
        if not all(good) or max(outcome.time_s for outcome in found) > 20:
            wrong.append((number, rank, place[1], [(outcome.code, outcome.err) for outcome in found]))
            continue
        after = go_on(port, out, images, 1 + index % 2)
        wrong += [(number, rank, place[1], outcome.err) for outcome in after if outcome.code]
        wrong += [(number, rank, place[1], what) for what in differs(out, alone)]
    assert not wrong
    tally(ROW, len(cases[1::8] if quick else cases))


@pytest.mark.parametrize("place", ["_gradients", "logits"], ids=["step", "validation"])
def test_a_signal_to_both_ends_what_takes_long(place, port, images, alone, tmp_path, tally):
    """At once, where a whole step or validation would take a minute; it is done again by the run that goes on."""

    def stuck() -> None:
        me(signal.SIGTERM)()
        time.sleep(60)

    out, hook = tmp_path / "run", at(train, place, 2, stuck)
    found = [trial.wait() for trial in together(port, start(images, out), {0: hook, 1: hook})]
    assert [outcome.code for outcome in found] == [143, 143], found
    assert max(outcome.time_s for outcome in found) < 20
    assert runs.load_state(out)[1]["step"] == {"_gradients": 1, "logits": 4}[place]
    assert [outcome.code for outcome in go_on(port, out, images, 2)] == [0, 0]
    assert not differs(out, alone)
    tally(ROW, 1)


def test_one_that_leaves_a_step_takes_the_other_along(port, images, alone, tmp_path, tally):
    """The other has ended the step, which counts for neither of them."""

    def stuck() -> None:
        me(signal.SIGUSR1)()
        time.sleep(60)

    out = tmp_path / "run"
    found = [trial.wait() for trial in together(port, start(images, out), {1: at(train, "_gradients", 3, stuck)})]
    assert [outcome.code for outcome in found] == [75, 75], found
    assert max(outcome.time_s for outcome in found) < 20
    assert runs.load_state(out)[1]["step"] == 2
    assert [outcome.code for outcome in go_on(port, out, images, 1)] == [0]
    assert not differs(out, alone)
    tally(ROW, 1)


def test_two_one_two(port, images, alone, tmp_path, tally, quick):
    """Stopped after steps 1 and 3, by two processes, one, and two again."""
    out = tmp_path / "run"
    stop = at(train, "_step", 1, me(signal.SIGTERM))
    found = [trial.wait() for trial in together(port, start(images, out), {1: stop})]
    assert [outcome.code for outcome in found] == [143, 143], found
    assert runs.load_state(out)[1]["step"] == 1

    def once() -> None:
        at(train, "_step", 2, me(signal.SIGTERM))()
        faults.command(*resume(out))()

    assert faults.forked(once).code == 143
    assert runs.load_state(out)[1]["step"] == 3
    found = [trial.wait() for trial in together(port, resume(out))]
    assert [outcome.code for outcome in found] == [0, 0], found
    assert not differs(out, alone)
    tally(ROW, 1)


def test_a_folder_that_is_held(port, images, tmp_path, tally):
    """The first says who holds it; the second, which waits for the first, ends when torchrun says so."""
    out = tmp_path / "run"
    with runs.held(out):
        trials = together(port, start(images, out))
        first = trials[0].wait()
        trials[1].send(signal.SIGTERM)
        second = trials[1].wait()
    assert (first.code, second.code) == (2, 143), (first.err, second.err)
    assert f"is being written by process {os.getpid()} on" in first.said
    tally(ROW, 1)
