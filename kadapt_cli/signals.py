"""Ctrl-C, SIGTERM and SIGUSR1: how each ends a command, and with which exit code.

Outside of training a signal raises `Stopped` where the program is, so that what is open is closed. Training puts a
handler of its own before that: it ends the step, unless that takes long, and saves. A second signal ends the process at
once, whatever it does.

A handler may run in the middle of a write to stderr, whose buffer cannot be entered twice: what a handler says goes
straight to the file descriptor.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from kadapt_cli.errors import INTERRUPTED, PREEMPTED, TERMINATED

LATE_S = 0.5  # that what a signal waits for may take
EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: PREEMPTED}


class Stopped(BaseException):
    """A signal asked the process to stop; no `Exception`, so that no library takes it for a failure of its own."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = EXIT_CODES[number]


Handler = Callable[[signal.Signals], object]


def install(first: Handler, late: Handler | None = None) -> Callable[[], None]:
    """Call `first` at the first signal from now on, and `late` every `LATE_S` after that while this is in force.

    The second signal ends the process. Returns what takes this back.
    """
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            os._exit(EXIT_CODES[signal.Signals(number)])
        asked.append(number)
        first(signal.Signals(number))
        if late is not None:
            signal.setitimer(signal.ITIMER_REAL, LATE_S, LATE_S)

    def ring(number: int, frame: FrameType | None) -> None:
        if late is not None:
            late(signal.Signals(asked[0]))

    old = {number: signal.signal(number, handle) for number in EXIT_CODES}
    if late is not None:
        old[signal.SIGALRM] = signal.signal(signal.SIGALRM, ring)

    def restore() -> None:
        if late is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)

    return restore


@contextmanager
def handled(first: Handler, late: Handler | None = None) -> Iterator[None]:
    """`install` for the duration."""
    restore = install(first, late)
    try:
        yield
    finally:
        restore()


@contextmanager
def blocked() -> Iterator[None]:
    """Let Ctrl-C and SIGUSR1 wait for the end of this; a process started in it never gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop(number: signal.Signals) -> NoReturn:
    """Raise `Stopped`; end the process in the middle of an import, or where pydantic builds a schema.

    Libraries of C++ abort when they meet that exception, and one of Rust takes it for an error of its own.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if frame.f_code.co_filename.startswith("<frozen importlib") or package == "pydantic":
            say("kadapt: interrupted")
            os._exit(EXIT_CODES[number])
        frame = frame.f_back
    raise Stopped(number)


def say(line: str) -> None:
    """Write a line to stderr from a handler; on a terminal it takes the place of the line the cursor is on."""
    start = "\r\x1b[2K" if os.isatty(2) and os.environ.get("TERM") != "dumb" else ""
    with suppress(OSError):
        os.write(2, f"{start}{line}\n".encode())
