"""Signals from anywhere: exit codes, and a handler that may interrupt a write."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import faults
import pytest

from kadapt_cli import signals

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_outside_of_training_ends_the_command_with_its_code(number):
    def action():
        signals.install(signals.stop)
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except signals.Stopped as stopped:
            sys.exit(stopped.exit_code)

    found = faults.forked(action)
    assert found.code == CODES[number]
    assert found.time_s < 5


@pytest.mark.parametrize("number", CODES)
def test_the_second_signal_ends_the_process_at_once(number):
    def action():
        signals.install(lambda number: None)
        for _ in range(2):
            os.kill(os.getpid(), number)
        time.sleep(10)

    assert faults.forked(action).code == CODES[number]


def test_a_library_that_catches_exceptions_does_not_catch_a_signal():
    def catching():
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)

    with signals.handled(signals.stop), pytest.raises(signals.Stopped):
        catching()


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in CODES]
    with signals.handled(signals.stop):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in CODES] == before


def test_a_handler_can_speak_in_the_middle_of_a_write():
    """stderr's buffer raises RuntimeError when it is entered twice: a handler that printed ended a run with it."""

    class Interrupted(io.FileIO):
        def write(self, data):
            count = super().write(data)
            if bytes(data) == b"epoch 1\n":
                os.kill(os.getpid(), signal.SIGINT)
            return count

    def action():
        buffer = io.BufferedWriter(Interrupted(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(buffer, line_buffering=True)
        with signals.handled(lambda number: signals.say("saving")):
            print("epoch 1", file=sys.stderr)
            print("epoch 2", file=sys.stderr)

    found = faults.forked(action)
    assert (found.code, found.err) == (0, "epoch 1\nsaving\nepoch 2\n")


def test_a_signal_in_the_middle_of_an_import_ends_the_process(tmp_path):
    """A library whose C++ runs while it is imported would abort at an exception: this one takes it for a bug."""
    (tmp_path / "slow.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    os.abort()\n"
    )
    code = "from kadapt_cli import signals; signals.install(signals.stop); import slow"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "kadapt: interrupted\n")
