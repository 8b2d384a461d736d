"""Where a comparison or a probe keeps what is finished: a file in its folder, or an Optuna storage that machines share.

A study is a list of records, each a dict that is complete in itself, and claims: a worker claims a cell before it works
on it, so that no two do the same. The claim of a process that was killed ends by itself.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from kadapt_cli.errors import MachineError, ModelError, UsageError
from kadapt_cli.runs import is_sealed, sealed, sync_folder

Record = dict[str, Any]
RECORDS = "study.jsonl"
CLAIMS = ".claims"
FORMAT_VERSION = 2  # of the records
BEAT_S = 30.0
STALE_S = 300.0
SETTLE_S = 5.0


class Study(Protocol):
    """Records and claims of one comparison."""

    def records(self) -> list[Record]:
        """All that is finished, in the order it was added."""

    def add(self, record: Record) -> None:
        """Keep a record; it survives the process."""

    def claim(self, key: str) -> Any:
        """A context manager that says whether this process may work on the key; others may not while it is open."""


def open_study(out: Path, storage: str | None, grid: Record) -> Study:
    """The study in a folder, or in a storage; made when it is not there.

    Args:
        out: The comparison's folder.
        storage: None for a file in the folder; the path of an Optuna journal file (`journal:PATH`), or a database URL.
        grid: What decides the results of a cell. A study of another grid is refused.

    Raises:
        UsageError: The study was made with other settings (which), or the extra is missing.
        ModelError: The file's first line, which holds the settings, is damaged.
        MachineError: The folder or the storage cannot be reached.
    """
    grid = {"format_version": FORMAT_VERSION} | grid
    return FileStudy(out, grid) if storage is None else OptunaStudy(storage, grid)


def check_grid(where: str, stored: Record, grid: Record) -> None:
    """Raise unless two grids are the same; says what differs."""
    differing = [key for key in stored.keys() | grid.keys() if stored.get(key) != grid.get(key)]
    if differing:
        texts = [f"{key} {stored.get(key)!r}, not {grid.get(key)!r}" for key in sorted(differing)]
        raise UsageError(f"{where}: holds a study made with {'; '.join(texts)}; use these settings, or another place")


def import_optuna() -> Any:
    """Optuna, quiet; `UsageError` with the line that installs it when it is not there."""
    try:
        import optuna
    except ImportError:
        raise UsageError("Optuna is not installed; run: pip install 'optuna>=4'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _parsed(text: bytes | str) -> Record | None:
    """A record as it was sealed; None for anything else."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_record = is_sealed(record) and isinstance(record.get("kind"), str)
    return {k: v for k, v in record.items() if k != "sha256"} if is_record else None


class FileStudy:
    """A JSON line a record, and a lock file a claim; several processes of one machine may share it."""

    def __init__(self, out: Path, grid: Record) -> None:
        self.path = out / RECORDS
        self.lock = FileLock(out / CLAIMS / "append.lock")
        self.seen = 0
        self.known: list[Record] = []
        try:
            (out / CLAIMS).mkdir(parents=True, exist_ok=True)
            with self.lock:
                foreign = [name for name in sorted(os.listdir(out)) if not name.startswith(".")]
                if foreign and not self.path.exists():
                    raise UsageError(
                        f"--out: {out} already holds something else ({foreign[0]}, …); give a new or empty folder"
                    )
                if not self.path.exists() or b"\n" not in self.path.read_bytes():  # killed in its first line
                    self.path.unlink(missing_ok=True)
                    self._append({"kind": "grid"} | grid)
                    sync_folder(out)
        except OSError as error:
            raise MachineError(f"--out: {out} cannot be written ({error.strerror}); give another folder") from None
        with self.path.open("rb") as file:
            stored = _parsed(file.readline())
        if stored is None or stored["kind"] != "grid":
            raise ModelError(f"{self.path}: its first line is damaged; restore the file, or use another --out")
        check_grid(f"--out: {out}", {k: v for k, v in stored.items() if k != "kind"}, json.loads(json.dumps(grid)))

    def records(self) -> list[Record]:
        """All that is finished. A line that is not as it was written is passed over, so that its work is done again."""
        with self.path.open("rb") as file:
            file.seek(self.seen)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.seen += len(line)
                record = _parsed(line)
                if record and record["kind"] != "grid":
                    self.known.append(record)
        return self.known

    def add(self, record: Record) -> None:
        """Append a line and flush it to disk.

        Raises:
            MachineError: The disk is full or cannot be written; what was there before is whole.
        """
        try:
            with self.lock:
                self._append(record)
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be written ({error.strerror}); the same command goes on") from None

    def _append(self, record: Record) -> None:
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            else:
                torn = False
            line = json.dumps(sealed(record), ensure_ascii=False).encode()
            file.write((b"\n" if torn else b"") + line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """A lock on a file, which the system gives up when the process ends."""
        lock = FileLock(self.path.parent / CLAIMS / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


class OptunaStudy:
    """One Optuna study: a finished trial a record, a running trial a claim, which beats as long as its process lives.

    Clocks of the machines may differ by a minute or two: a claim ends when it has not beaten for five.
    """

    def __init__(self, storage: str, grid: Record) -> None:
        self.optuna = optuna = import_optuna()
        from sqlalchemy.exc import SQLAlchemyError  # Optuna brings it

        self.where = where = "--storage: " + re.sub(r"//.*@", "//", storage)  # without user and password
        self.parsed: dict[int, Record] = {}
        path = storage.removeprefix("journal:") if storage.startswith("journal:") else None
        if path is None and "://" not in storage:
            raise UsageError(f"{where}: journal:PATH or the URL of a database was expected")
        self.errors = (OSError, SQLAlchemyError, optuna.exceptions.OptunaError)
        try:
            self.study = self._opened(storage, path)
        except ImportError as error:
            name = getattr(error.__cause__ or error, "name", None) or "the package that the URL names"
            raise UsageError(f"{where}: its driver is missing; run: pip install {name}") from None
        except ValueError:
            raise ModelError(f"{where}: is damaged, or no journal of Optuna; restore it, or give another") from None
        except self.errors as error:
            reason = " ".join(str(error).split())[:200]
            raise MachineError(f"{where} cannot be opened ({reason}); check the path or URL") from None
        if "grid" not in self.study.user_attrs:
            self.study.set_user_attr("grid", grid)
        check_grid(where, dict(self.study.user_attrs["grid"]), json.loads(json.dumps(grid)))

    def _opened(self, storage: str, path: str | None, left: int = 5) -> Any:
        """Optuna's study. Of processes that open an empty database at once one makes the tables; the others fail, wait,
        and find them."""
        try:
            if path is not None:
                from optuna.storages import JournalStorage
                from optuna.storages.journal import JournalFileBackend

                backend: Any = JournalStorage(JournalFileBackend(path))
            else:
                backend = self.optuna.storages.RDBStorage(storage)
            return self.optuna.create_study(
                storage=backend, study_name="kadapt-compare", load_if_exists=True, direction="maximize"
            )
        except self.errors as error:
            if left and "already exists" in str(error):
                time.sleep(1)
                return self._opened(storage, path, left - 1)
            raise

    def records(self) -> list[Record]:
        """The records of all finished trials; one that is not as it was written is passed over and done again."""
        with self._reached():
            trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.number not in self.parsed and "record" in trial.user_attrs:
                record = _parsed(trial.user_attrs["record"])
                if record is not None:
                    self.parsed[trial.number] = record
        return [self.parsed[number] for number in sorted(self.parsed)]

    def add(self, record: Record) -> None:
        """Add a finished trial; its value is the record's score, where it has one."""
        score = record.get("score", record.get("accuracy"))
        state = self.optuna.trial.TrialState
        with self._reached():
            self.study.add_trial(
                self.optuna.trial.create_trial(
                    state=state.COMPLETE if score is not None else state.FAIL,
                    value=score,
                    user_attrs={"record": json.dumps(sealed(record), ensure_ascii=False)},
                )
            )

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Errors of the storage as one line."""
        try:
            yield
        except self.errors as error:
            reason = " ".join(str(error).split())[:200]
            raise MachineError(f"{self.where} cannot be reached ({reason}); the same command goes on") from None

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """A running trial; of several for one key the first that still beats has the claim."""
        if self._claims(key):
            yield False
            return
        with self._reached():
            trial = self.study.ask()
            trial.set_user_attr("claim", key)
            trial.set_user_attr("beat", time.time())
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_S):
                with suppress(*self.errors):  # the next one may get through
                    trial.set_user_attr("beat", time.time())

        try:
            if min(self._claims(key), default=trial.number) != trial.number:
                yield False
                return
            threading.Thread(target=beat, daemon=True).start()
            yield True
        finally:
            done.set()
            with suppress(*self.errors):  # a claim that nobody ends ends by itself
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)

    def _claims(self, key: str) -> list[int]:
        """The numbers of the running trials that claim a key and still beat.

        A trial is made before it says what it claims: those that have not said it are waited for, for a while.
        """
        state = self.optuna.trial.TrialState.RUNNING
        until = time.time() + SETTLE_S
        while True:
            with self._reached():
                running = self.study.get_trials(deepcopy=False, states=(state,))
            silent = [t for t in running if "beat" not in t.user_attrs]
            fresh = [t for t in silent if time.time() - t.datetime_start.timestamp() < SETTLE_S]
            if time.time() > until or not fresh:
                break
            time.sleep(0.05)
        alive = [t for t in running if time.time() - t.user_attrs.get("beat", 0) < STALE_S]
        return [t.number for t in alive if t.user_attrs["claim"] == key]
