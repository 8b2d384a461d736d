"""The harness of the fault tests: one process imports, every trial is a fork of it, and counts are summed in a table.

A trial has the command line's own signal handlers and exit codes, its own stdout and stderr, and a time limit. What it
leaves on disk is judged by the test that started it.
"""

import builtins
import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from kadapt_cli import __main__ as program
from kadapt_cli import runs

LIMIT_S = 60.0
PROBE = ("--shots", "3", "--per", "model", "--dims", "8", "--groups", "attn", "--epochs", "1", "--folds", "1")
STUDIES = {  # the options of a small study, and what it found
    "compare": (
        ("--method", "linear", "--seeds", "0", "--shots", "3"),
        lambda out: [row["accuracy"] for row in json.loads((out / "comparison.json").read_text())["rows"]],
    ),
    "probe-id": (PROBE, lambda out: json.loads((out / "probe.json").read_text())["modules"]),
}


@dataclass
class Outcome:
    """How a trial ended: exit code (minus the number of the signal that killed it), what it printed, what it took."""

    code: int
    out: str
    err: str
    time_s: float
    peak_bytes: int  # resident memory of the trial above that of the process it was forked from

    @property
    def said(self) -> str:
        """The error line, without the program's name."""
        lines = [line for line in self.err.splitlines() if line.startswith("kadapt: ")]
        return lines[-1].removeprefix("kadapt: ") if lines else ""


class Trial:
    """A running fork. `wait` ends it; a trial that takes longer than its limit is killed and raises `TimeoutError`."""

    def __init__(self, action: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self.streams = [TemporaryFile("w+b"), TemporaryFile("w+b")]  # noqa: SIM115 - closed by wait
        self.started = time.perf_counter()
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(action)

    def _run(self, action: Callable[[], Any]) -> None:
        """The child: never returns."""
        code = 1
        try:
            os.setpgid(0, 0)  # so that what it starts can be found and ended with it
            for number, stream in enumerate(self.streams, 1):
                os.dup2(stream.fileno(), number)
            sys.stdin = open(os.devnull)  # noqa: SIM115 - for as long as the process
            for number, name in ((1, "stdout"), (2, "stderr")):
                setattr(sys, name, open(number, "w", buffering=1, errors="replace", closefd=False))  # noqa: SIM115
            action()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:  # noqa: BLE001 - the child must not return into the test session
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def printed(self) -> str:
        """What is on its stderr so far."""
        return os.pread(self.streams[1].fileno(), 1 << 20, 0).decode(errors="replace")

    def wait(self) -> Outcome:
        """Until it ends."""
        until = self.started + self.limit_s
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() > until:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"the trial ran longer than {self.limit_s} s:\n{self.printed()[-2000:]}")
            time.sleep(0.001)
        taken = time.perf_counter() - self.started
        texts = []
        for stream in self.streams:
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
            stream.close()
        peak = 1024 * max(0, usage.ru_maxrss - self.before)
        return Outcome(os.waitstatus_to_exitcode(status), *texts, taken, peak)

    def children(self) -> list[int]:
        """Processes of its group that are still alive, once it has ended."""
        return group(self.pid)


def group(number: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == number and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def forked(action: Callable[[], Any], limit_s: float = LIMIT_S) -> Outcome:
    """Run an action in a fork and wait for it."""
    return Trial(action, limit_s).wait()


def command(*arguments: object) -> Callable[[], None]:
    """An action that runs the command line, as the console script does."""

    def run() -> None:
        sys.argv = ["kadapt", *map(str, arguments)]
        program.main()

    return run


def kadapt(*arguments: object, limit_s: float = LIMIT_S) -> Outcome:
    """Run the command line in a fork: `kadapt("eval", run)`."""
    return forked(command(*arguments), limit_s)


def unprivileged(*arguments: object) -> Outcome:
    """The command line where file modes count. They do not for root, whose capabilities are given up (capset(2))."""

    def run() -> None:
        version_3, this_process = 0x20080522, 0
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.capset(struct.pack("Ii", version_3, this_process), bytes(24)):
            raise OSError(ctypes.get_errno(), "capset")
        command(*arguments)()

    return forked(run)


class Operations:
    """Sees what the process does to the files below a folder, and calls `act` before each operation.

    Operations are numbered from 1: open (for writing, or of a folder), write, fsync, link, rename; other functions are
    added by `also`. `act(number, name)` may end the process or raise; what it raises is what the operation raises.
    """

    def __init__(self, root: Path, act: Callable[[int, str], None]) -> None:
        self.root = os.path.realpath(root)
        self.act = act
        self.count = 0
        self._wrap(io, "open", self._opens)
        builtins.open = io.open
        self._wrap(os, "open", lambda path, flags, *_, **__: self._below(path) and ("open", None))
        self._wrap(os, "fsync", lambda number: self._below(f"/proc/self/fd/{number}") and ("fsync", None))
        for name in ("link", "rename", "replace"):
            self._wrap(os, name, lambda source, target, **_: self._below(target) and ("rename", None))

    def also(self, module: Any, name: str) -> None:
        """Number the calls of a function too."""
        self._wrap(module, name, lambda *_, **__: (name, None))

    def _below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.realpath(path).startswith(self.root)

    def _opens(self, path: Any, mode: str = "r", *_: Any, **__: Any) -> Any:
        return set(mode) & set("wax+") and self._below(path) and ("open", self._watched)

    def _watched(self, file: Any) -> Any:
        write = file.write

        def watched(data: Any) -> Any:
            try:
                self._happens("write")
            except ShortWriteError as short:
                write(data[: len(data) // 2])
                file.flush()
                raise OSError(short.errno, os.strerror(short.errno)) from None
            return write(data)

        return _File(file, watched)

    def _happens(self, name: str) -> None:
        self.count += 1
        self.act(self.count, name)

    def _wrap(self, module: Any, name: str, concerns: Callable[..., Any]) -> None:
        real = getattr(module, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            found = concerns(*arguments, **options)
            if not found:
                return real(*arguments, **options)
            self._happens(found[0])
            result = real(*arguments, **options)
            return found[1](result) if found[1] else result

        setattr(module, name, wrapped)


class ShortWriteError(OSError):
    """Half of the data is written before the disk is full."""


class _File:
    """A file whose writes are seen."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self.file = file
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def writelines(self, parts: Any) -> None:
        """One operation, of which half is written where a write is short."""
        self.write(b"".join(parts))

    def __iter__(self) -> Any:
        return iter(self.file)


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ: bits of the adapter or of the last state, rows of metrics.csv, the result."""
    found = []
    for name, kind in ((runs.ADAPTER, "adapter"), (runs.STATE, "state")):
        left, right = (runs.load_tensors(run / name, kind)[0] for run in (one, other))
        if left.keys() != right.keys() or any(not torch.equal(left[key], right[key]) for key in left):
            found.append(name)
    left, right = (
        [line.split(",")[:-2] for line in (run / runs.METRICS).read_text().splitlines()] for run in (one, other)
    )
    if left != right:
        found.append(runs.METRICS)
    left, right = (json.loads((run / runs.RESULT).read_text())["metrics"] for run in (one, other))
    if left != right:
        found.append(runs.RESULT)
    return found
