"""The contract of every command: stdout holds the result alone, wherever it goes and whatever the environment lacks."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
from PIL import Image

# What the commands import, so that no trial has to.
import kadapt_cli.bench.tables
import kadapt_cli.compare
import kadapt_cli.merge
import kadapt_cli.predict
import kadapt_cli.probe.show
import kadapt_cli.train
from kadapt_cli import __main__ as program

pytestmark = pytest.mark.faults
ROW = "command line contract"
TOKEN = "hf_" + "SeCrEt0123456789" * 2
CLASSES = ("[red]x", "ro\x1b[31mse", "Blüte 日本")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = {  # OUT is a folder that is not there yet
    "train": "train --data photos --epochs 1 --batch-size 4 --out OUT",
    "eval": "eval run --split train",
    "predict": "predict run photos",
    "merge-weights": "merge-weights run --out OUT",
    "methods": "methods",
    "compare": "compare --data photos --method linear --method bitfit --seeds 0 --shots 3 --epochs 1 --out OUT",
    "probe-id": "probe-id --data photos --groups attn --per model --shots 2 --folds 2 --dims 8 --refine 0 --epochs 1 "
    "--out OUT",
    "bench-kernels": "bench-kernels --aot sm_90 --quick",
    "data list": "data list",
    "data check": "data check photos",
}
SLOW = {  # commands of a second or more a trial, and the conditions that they meet
    "merge-weights": ("not a terminal", "stdout full", "ASCII", "no HOME"),
    "compare": ("not a terminal", "stdout full", "ASCII", "no HOME"),
    "probe-id": ("not a terminal", "stdout full", "ASCII", "no HOME"),
    "bench-kernels": ("stdout full",),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photos of three awkwardly named classes and a run on them."""
    root = tmp_path_factory.mktemp("contract")
    for number in range(12):
        path = root / "photos" / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 40 + number).save(path)
    done = faults.kadapt("train", "--data", root / "photos", "--epochs", 1, "--out", root / "run")
    assert done.code == 0, done.err
    return root


def _arguments(name: str, place: Path, out: Path) -> list[str]:
    paths = {"OUT": str(out), "run": str(place / "run"), "photos": str(place / "photos")}
    return [paths.get(word, word) for word in COMMANDS[name].split()]


# --- conditions: what is done in the child before the program starts ---


def _environment(**values: str | None) -> Callable[[], None]:
    def change() -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    return change


def _closed() -> None:
    os.close(1)
    sys.stdout = None  # as Python starts without a descriptor 1


def _full(number: int) -> Callable[[], None]:
    return lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def _reader_left(number: int) -> Callable[[], None]:
    def change() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(reader)

    return change


def _ascii() -> None:
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115 - for as long as the process
    sys.stderr = open(2, "w", encoding="ascii", closefd=False)  # noqa: SIM115 - for as long as the process


def _deleted_folder() -> None:
    folder = Path(f"/tmp/kadapt-gone-{os.getpid()}")
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()


CONDITIONS: dict[str, tuple[Callable[[], None], int, bool]] = {  # what is done, exit code, whether stdout is readable
    "not a terminal": (_environment(), 0, True),
    "NO_COLOR": (_environment(NO_COLOR="1", FORCE_COLOR=None), 0, True),
    "TERM=dumb": (_environment(TERM="dumb"), 0, True),
    "stdout closed": (_closed, 0, False),
    "stdout full": (_full(1), 5, False),
    "stderr full": (_full(2), 0, True),
    "the reader left": (_reader_left(1), 0, False),
    "the reader of stderr left": (_reader_left(2), 0, True),
    "COLUMNS=40": (_environment(COLUMNS="40"), 0, True),
    "ASCII": (_ascii, 0, True),
    "no HOME": (_environment(HOME=None), 0, True),
    "HF_HUB_OFFLINE": (_environment(HF_HUB_OFFLINE="1"), 0, True),
    "folder deleted": (_deleted_folder, 5, False),
}


def _run(arguments: list[str], change: Callable[[], None]) -> faults.Outcome:
    def action() -> None:
        os.environ["HF_TOKEN"] = TOKEN
        change()
        faults.command(*arguments)()

    return faults.forked(action)


def test_every_command_in_every_condition(place, tmp_path, quick, tally):
    """Exit code, no traceback, no escape codes, no secret; --json gives exactly one document."""
    failures, trials = [], 0
    for number, (condition, (change, code, readable)) in enumerate(CONDITIONS.items()):
        for turn, name in enumerate(COMMANDS):
            if condition not in SLOW.get(name, (condition,)) or (quick and (name in SLOW or (number + turn) % 4)):
                continue
            for form in ([], ["--json"]) if name not in SLOW and not quick else ([["--json"], []][number % 2],):
                out = tmp_path / f"out-{trials}"
                done = _run([*_arguments(name, place, out), *form], change)
                trials += 1
                wrong = [] if done.code == code else [f"exit code {done.code}"]
                wrong += ["traceback"] if "Traceback" in done.err else []
                wrong += ["escape codes"] if "\x1b" in done.out + done.err else []
                wrong += ["the token"] if TOKEN in done.out + done.err else []
                if readable and form:
                    wrong += _not_json(done.out, name)
                elif readable and not done.out.strip():
                    wrong.append("no result")
                if wrong:
                    failures.append((condition, name, *form, wrong, done.out[:300], done.err[-900:]))
                if out.exists():
                    held = [
                        file.name for file in out.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()
                    ]
                    assert not held, f"{name} wrote the token into {held}"
                    shutil.rmtree(out)
    assert not failures, f"{len(failures)} of {trials}:\n" + "\n\n".join(map(str, failures))
    tally(ROW, trials)


def test_a_bug_shows_no_values(tally):
    """The traceback of a true process, as its own excepthook prints it, holds no local variable."""
    code = (
        "import os, sys\nfrom kadapt_cli import __main__ as program, evaluate\n"
        "def broken(*_, **__):\n    secret = os.environ['HF_TOKEN']\n    raise ValueError('a bug')\n"
        "evaluate.evaluate = broken\nsys.argv = ['kadapt', 'eval', 'run']\nprogram.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "ValueError: a bug" in done.stderr) == (1, True)
    assert TOKEN not in done.stdout + done.stderr
    tally(ROW, 1)


def _not_json(text: str, name: str) -> list[str]:
    """What keeps a text from being one document, with the class names as they are."""
    try:
        document = json.loads(text)
    except ValueError as error:
        return [f"no JSON: {error}"]
    known = {"eval": "per_class", "predict": "predictions", "data check": "classes", "train": "class_names"}
    if name in known and CLASSES[2] not in json.dumps(document[known[name]], ensure_ascii=False):
        return ["the class names have changed"]
    return [] if document["schema_version"] == 1 else ["no schema_version"]


def test_help_everywhere(place, tally):
    """--help of every command: on stdout, exit 0, at most 40 columns wide where there are 40."""
    trials = 0
    for name in ("", *COMMANDS):
        for change in (_environment(COLUMNS="40"), _ascii, _environment(TERM="dumb", HOME=None)):
            done = _run([*name.split(), "--help"], change)
            trials += 1
            assert done.code == 0, (name, done.err)
            assert "Usage: kadapt" in done.out
            assert done.err == ""
            assert "\x1b" not in done.out
        done = _run([*name.split(), "--help"], _environment(COLUMNS="40"))
        assert max(map(len, done.out.splitlines())) <= 40, name
        trials += 1
    tally(ROW, trials)


def _on_terminal(arguments: list[str], change: Callable[[], None]) -> tuple[int, str]:
    """Run with stdout and stderr on a terminal: exit code, and all that it got."""
    master, slave = os.openpty()
    got: list[bytes] = []

    def action() -> None:
        for number, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(slave, number)
            setattr(sys, stream, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115 - for the process
        change()
        faults.command(*arguments)()

    def read() -> None:
        try:
            while data := os.read(master, 1 << 16):
                got.append(data)
        except OSError:
            pass  # the last writer has closed it

    trial = faults.Trial(action)
    os.close(slave)
    reader = threading.Thread(target=read)
    reader.start()
    code = trial.wait().code
    reader.join()
    os.close(master)
    return code, b"".join(got).decode(errors="replace")


def test_no_colour_on_a_terminal(place, tmp_path, quick, tally):
    """NO_COLOR leaves no colours, bold or dim; TERM=dumb no escape codes at all; without them there are colours."""
    plain, dumb = _environment(NO_COLOR="1", FORCE_COLOR=None, TERM="xterm"), _environment(TERM="dumb", NO_COLOR=None)
    usage = [["train", "--help"], ["train", "--epochs", "x"], ["train", "--lr", "0"], ["nonsense"]]
    rows = [
        _arguments(name, place, tmp_path / name) for name in ("eval", "methods", "data list", "data check", "predict")
    ]
    rows += usage if quick else [*usage, _arguments("train", place, tmp_path / "r")]
    for arguments in rows:
        code, text = _on_terminal(arguments, plain)
        assert code in (0, 2), (arguments, text[-900:])
        assert not COLOUR.search(text), (arguments, text[:500])
        if "--out" not in arguments:
            _, text = _on_terminal(arguments, dumb)
            assert "\x1b" not in text, (arguments, text[:500])
    coloured = _environment(TERM="xterm-256color", NO_COLOR=None)
    for arguments in (["train", "--help"], ["train", "--epochs", "x"], rows[0]):
        assert COLOUR.search(_on_terminal(arguments, coloured)[1]), arguments
    tally(ROW, 2 * len(rows) + 3)


def test_a_bug_shows_no_locals_and_no_secret(place, monkeypatch, tally):
    """Exit 1 and a traceback, in which neither the values of variables nor what the environment holds stand."""

    def broken(*arguments: object, **options: object) -> None:
        secret = os.environ["HF_TOKEN"]
        raise RuntimeError(f"a bug, with {len(secret)} characters in reach")

    workers = {"train": (kadapt_cli.train, "train"), "eval": (kadapt_cli.evaluate, "evaluate")}
    workers |= {"predict": (kadapt_cli.predict, "predict"), "merge-weights": (kadapt_cli.merge, "merge")}
    workers |= {"compare": (kadapt_cli.compare, "compare"), "probe-id": (kadapt_cli.probe, "probe")}
    for name, (module, function) in workers.items():
        monkeypatch.setattr(module, function, broken)
        done = _run(_arguments(name, place, place / "unused"), _environment())
        assert done.code == 1, done.err
        assert "RuntimeError: a bug, with 35 characters" in done.err
        assert TOKEN not in done.err + done.out
        assert "locals" not in done.err
        assert done.out == ""
    tally(ROW, len(workers))


def test_failures_on_purpose_keep_the_secret(place, tmp_path, monkeypatch, tally):
    """Every command that fails, with the code of the README and without the token."""
    monkeypatch.chdir(tmp_path)
    rows = [
        ("train --model vit_tiny_patch16_224 --out r", 4), ("train --model hf-hub:some/thing --out r", 4),
        ("train --data /nowhere --out r", 3), ("train --data torch/nothing --out r", 3), ("eval /nowhere", 4),
        ("predict /nowhere x.png", 4), ("merge-weights /nowhere --out m", 4), ("data check /nowhere", 3),
        ("compare --data /nowhere --out c", 3), ("probe-id --data /nowhere --out p", 3), ("train --lr x", 2),
        ("bench-kernels --aot nothing", 2),
    ]  # fmt: skip
    for text, code in rows:
        done = _run(text.split(), _environment(HF_HUB_OFFLINE="1"))
        assert (done.code, done.out) == (code, ""), (text, done.err)
        assert TOKEN not in done.err
        assert "Traceback" not in done.err
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]
    tally(ROW, len(rows))


def test_true_processes(place, tmp_path, quick, tally):
    """An interpreter of its own with next to no environment, in a folder that is gone, without a locale."""
    import subprocess

    gone = tmp_path / "gone"
    program_line = f"{sys.executable} -m kadapt_cli "
    bare = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LC_ALL": "C", "LANG": "C"}
    forms = (
        ["predict RUN PHOTOS --json"] if quick else ["predict RUN PHOTOS --json", "eval RUN --split train", "methods"]
    )
    for text in forms:
        words = text.replace("RUN", f"'{place / 'run'}'").replace("PHOTOS", f"'{place / 'photos'}'")
        done = subprocess.run(
            ["bash", "-c", program_line + words], capture_output=True, env=bare, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()
        assert b"\x1b" not in done.stdout
        if "--json" in text:
            assert CLASSES[2] in json.dumps(json.loads(done.stdout), ensure_ascii=False)
    line = f'mkdir "{gone}"; cd "{gone}"; rmdir "{gone}"; {program_line} methods'
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=bare, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (5, b"")
    assert b"kadapt: the current folder was removed" in done.stderr
    for redirect, code in ((">&-", 0), (">/dev/full", 5), ("| head -1; exit ${PIPESTATUS[0]}", 0)):
        line = f"{sys.executable} -m kadapt_cli data list {redirect}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, env=bare, check=False, timeout=120)
        assert done.returncode == code, (redirect, done.stderr.decode())
        assert b"Traceback" not in done.stderr
    tally(ROW, len(forms) + 4)


def test_the_program_is_what_the_trials_run():
    """The console script and `python -m kadapt_cli` start what the harness starts."""
    assert faults.program is program
