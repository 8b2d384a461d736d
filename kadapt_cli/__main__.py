"""The program: `kadapt`, and `python -m kadapt_cli`."""

import io
import os
import sys
from typing import TYPE_CHECKING

from kadapt_cli import signals

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def main() -> None:
    """Run the command line, with handlers for signals from before the first slow import."""
    signals.install(signals.stop)
    try:
        _open_streams()
        from kadapt_cli.cli import main as run

        run()
    except signals.Stopped as stopped:
        signals.say("kadapt: interrupted")
        sys.exit(stopped.exit_code)


class _Stdout(io.FileIO):
    """stdout; when its reader has left, as `head` does, what is still to be said goes nowhere and is no failure."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def _open_streams() -> None:
    """Point streams that were closed at nothing, or the next file opened would take their place; replace stdout."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for as long as the process
    buffer = io.BufferedWriter(_Stdout(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(buffer, encoding=sys.stdout.encoding, line_buffering=sys.stdout.isatty())


if __name__ == "__main__":
    main()
