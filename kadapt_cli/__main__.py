"""The program: `kadapt`, and `python -m kadapt_cli`."""

import gc
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

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
    finally:
        gc.freeze()  # else Python looks for garbage in all that was imported before it ends, for half a second


class _Output(io.FileIO):
    """stdout or stderr, whose reader may leave, as `head` does: what is still to be said goes nowhere.

    That is no failure, and neither is anything that keeps a message from stderr: work is not lost for that. A result
    that stdout cannot take is one.
    """

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def _open_streams() -> None:
    """Point streams that were closed at nothing, or the next file opened would take their place; wrap the outputs."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for as long as the process
    sys.stdout = _output(1, sys.stdout, line_buffering=sys.stdout.isatty())
    sys.stderr = _output(2, sys.stderr, line_buffering=True)


def _output(number: int, stream: TextIO, *, line_buffering: bool) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Output(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=line_buffering)


if __name__ == "__main__":
    main()
