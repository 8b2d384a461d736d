"""Errors that a user can mend, each with a documented exit code.

A `KadaptError` is printed as one line and ends the command with its code. Anything else that escapes a command is our
bug: it shows its traceback and ends with exit code 1.
"""

import errno
from collections.abc import Sequence

USAGE = 2
DATA = 3
MODEL = 4
ENVIRONMENT = 5
DIVERGED = 6
CHECK_FAILED = 7
PREEMPTED = 75
TERMINATED = 143
INTERRUPTED = 130
EXIT_CODES = (USAGE, DATA, MODEL, ENVIRONMENT, DIVERGED, CHECK_FAILED)  # of errors; the others are of signals

MACHINE_ERRORS = {  # of an OSError that is the machine's, whatever the program was doing
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}


FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


class KadaptError(Exception):
    """Something the user can mend: where, what was expected, what was given, what to do."""

    exit_code = 1


class UsageError(KadaptError):
    """A wrong option or configuration value, or an output folder that is not free."""

    exit_code = USAGE


class DataError(KadaptError):
    """Images, folders or labels that cannot be used as they are."""

    exit_code = DATA


class ModelError(KadaptError):
    """An unknown or unreachable model, or an adapter or checkpoint that does not fit or is damaged."""

    exit_code = MODEL


class MachineError(KadaptError):
    """The machine cannot do it: no CUDA, out of memory at batch 1, disk full, no permission."""

    exit_code = ENVIRONMENT


class DivergedError(KadaptError):
    """The loss is no longer finite."""

    exit_code = DIVERGED


class CheckFailedError(KadaptError):
    """A result was produced but did not pass its own verification."""

    exit_code = CHECK_FAILED


class InterruptedRunError(KadaptError):
    """The user or the system asked the run to stop; its state is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, or torch's on a GPU or not."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_torchs


def harmless(value: object) -> object:
    """A value for a CSV: a text that a spreadsheet would run as a formula gets one ' in front."""
    return f"'{value}" if isinstance(value, str) and value.lstrip("'").startswith(FORMULA_STARTS) else value


def as_given(value: str) -> str:
    """The text of which `harmless` made a value."""
    return value[1:] if value.startswith("'") and value.lstrip("'").startswith(FORMULA_STARTS) else value


def shown(text: str) -> str:
    """A name as it can stand in one line: itself, or its Python form when it has newlines or control characters."""
    return text if text.isprintable() else repr(text)


def visible(text: str) -> str:
    """Text for a terminal: what is not printable, such as an escape sequence in a file's name, as \\x1b."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listed(items: Sequence[str]) -> str:
    """At most five of the items, and a count of the others."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
