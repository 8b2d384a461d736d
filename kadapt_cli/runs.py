"""The run folder: what a training run leaves on disk, written so that a reader never sees half a file.

    config.toml           the resolved configuration; `kadapt train --config` repeats the run
    manifest.csv          every image used: path, class, split, size, digest
    adapter.safetensors   the adapter and head of the kept epoch, with all that is needed to rebuild the model
    adapter.json          a readable copy of what adapter.safetensors says of itself
    state.safetensors     where training stands: adapter, head, optimizer, RNG, history; `--resume` goes on from it
    metrics.csv           a row per epoch
    result.json           the result, as `kadapt train --json` prints it; present once the run is finished
    confusion.csv         rows are the true classes of the test images, columns the predicted ones
    curves.svg            loss and accuracy over the epochs

Every file is written to a temporary name in the folder, flushed to disk and renamed. A safetensors file carries one
metadata entry, "kadapt": JSON with a format name, a version and the SHA-256 of the tensors, verified on every read.
No pickle is read or written.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import MachineError, ModelError, UsageError

CONFIG = "config.toml"
MANIFEST = "manifest.csv"
ADAPTER = "adapter.safetensors"
ADAPTER_INFO = "adapter.json"
STATE = "state.safetensors"
METRICS = "metrics.csv"
RESULT = "result.json"
CONFUSION = "confusion.csv"
CURVES = "curves.svg"
LOCK = ".kadapt.lock"
TEMPORARY = ".kadapt-tmp-"
FORMAT_VERSION = 1


def claim(out: Path, *, resume: bool) -> None:
    """Check that a run may write to `out`: absent or empty, or with `resume` an unfinished run.

    Raises:
        UsageError: It holds something else, or a run while `resume` is off, or no run while it is on. Nothing changes.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file; give a folder that is new, empty or an earlier run's")
    holds = sorted(p.name for p in out.iterdir() if p.name != LOCK) if out.exists() else []
    is_run = STATE in holds
    if resume and not is_run:
        raise UsageError(f"--resume: {out} holds no run ({STATE} is missing); start it without --resume")
    unstarted = set(holds) <= {CONFIG, MANIFEST} or all(name.startswith(TEMPORARY) for name in holds)
    if holds and not is_run and not unstarted:
        raise UsageError(f"--out: {out} already holds something else ({holds[0]}, …); give a new or empty folder")
    if is_run and not resume:
        raise UsageError(f"--out: {out} already holds a run; pass --resume to go on with it, or another --out")


def next_free(parent: Path, name: str) -> Path:
    """`parent/name-N` with the smallest N from 1 that does not exist."""
    n = 1
    while (parent / f"{name}-{n}").exists():
        n += 1
    return parent / f"{name}-{n}"


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Create `out` if needed and hold its lock; stale temporaries are removed. One writer at a time.

    Raises:
        UsageError: Another process is writing there.
        MachineError: The folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"--out: {out} is being written by another process; wait for it or give another --out"
        ) from None
    except OSError as error:
        raise MachineError(f"--out: {out} cannot be written ({error.strerror}); give a folder that can be") from None
    try:
        for stale in out.glob(f"{TEMPORARY}*"):
            stale.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def commit(path: Path, data: bytes | str) -> None:
    """Write a file so that after a crash it is there whole or as it was: temporary, fsync, rename, fsync the folder.

    Raises:
        MachineError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be saved ({error.strerror}); the earlier file is untouched") from None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of the tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Any]:
    """Commit tensors with their description; the same tensors and info give the same bytes.

    Returns:
        The description as written: `info` with the format's name, version and the tensors' digest.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head = {"format": f"kadapt-{kind}", "format_version": FORMAT_VERSION, "tensor_digest": digest(whole)}
    full_info = head | dict(info)
    commit(path, save(whole, metadata={"kadapt": json.dumps(full_info)}))
    return full_info


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote, verified.

    Raises:
        ModelError: Missing, not safetensors, of another kind or version, or its tensors are not what was written.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the folder of a run made by `kadapt train`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}); restore it or train again") from None
    try:
        info = json.loads(metadata.get("kadapt", ""))
        found = (info["format"], info["format_version"])
        expected_digest = info["tensor_digest"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path}: not written by kadapt; give the folder of a run made by `kadapt train`") from None
    if found != (f"kadapt-{kind}", FORMAT_VERSION):
        raise ModelError(f"{path}: expected format kadapt-{kind} version {FORMAT_VERSION}, found {found[0]} {found[1]}")
    if digest(tensors) != expected_digest:
        raise ModelError(f"{path}: damaged: its tensors are not those that were saved (SHA-256 differs); restore it")
    return tensors, info


def default_out(config: TrainConfig, resume: bool) -> Path:
    """runs/NAME-N for data called NAME, with the first N that is free; `UsageError` when a run is to be resumed."""
    if resume:
        raise UsageError("--resume: give the folder of the run with --out")
    name = re.sub(r"[^\w.-]+", "_", config.data.rstrip("/").rsplit("/", 1)[-1])[:40].strip(".") or "data"
    return next_free(Path("runs"), name)
