"""The run folder: what a training run leaves on disk, written so that a reader never sees half a file.

    config.toml           the resolved configuration; `kadapt train --config` repeats the run
    manifest.csv          every image used: path, class, split, size, digest
    adapter.safetensors   the adapter and head of the kept epoch, with all that is needed to rebuild the model
    adapter.json          a readable copy of what adapter.safetensors says of itself
    state.safetensors     where training stands: adapter, head, optimizer, RNG, history; `--resume` goes on from it
    state-previous.safetensors   the state before that, for when the last one is damaged
    metrics.csv           a row per epoch
    result.json           the result, as `kadapt train --json` prints it; present once the run is finished
    confusion.csv         rows are the true classes of the test images, columns the predicted ones
    curves.svg            loss and accuracy over the epochs
    .kadapt.lock          held by the process that writes; .kadapt.holder says which process that is

Every file is written to a temporary name in the folder, flushed to disk and renamed. A safetensors file carries one
metadata entry, "kadapt": JSON with a format name, a version, the SHA-256 of the tensors, the digest of manifest.csv and
a SHA-256 of this description itself, all verified on every read. No pickle is read or written.
"""

import errno
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import MachineError, ModelError, UsageError, visible

CONFIG = "config.toml"
MANIFEST = "manifest.csv"
ADAPTER = "adapter.safetensors"
ADAPTER_INFO = "adapter.json"
STATE = "state.safetensors"
PREVIOUS_STATE = "state-previous.safetensors"
METRICS = "metrics.csv"
RESULT = "result.json"
CONFUSION = "confusion.csv"
CURVES = "curves.svg"
LOCK = ".kadapt.lock"
HOLDER = ".kadapt.holder"
TEMPORARY = ".kadapt-tmp-"
OUR_TEMPORARY = re.compile(re.escape(TEMPORARY) + r"(\d+)-.+", re.DOTALL)  # the number of the process
HOLDER_S = 1.0  # that a holder is given to say who it is, or to let go
FORMAT_VERSION = 2
DTYPES = {  # what safetensors calls them, in the order in which it writes tensors
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MAX_TENSORS = 20_000
MAX_HEADER_BYTES = 16 << 20  # safetensors takes 100 MB, which it parses in seconds and gigabytes


def claim(out: Path, *, resume: bool) -> None:
    """Check that a run may write to `out`: absent or empty, or with `resume` an unfinished run.

    Raises:
        UsageError: It holds something else, or a run while `resume` is off, or no run while it is on. Nothing changes.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file; give a folder that is new, empty or an earlier run's")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    holds = [name for name in names if name not in (LOCK, HOLDER) and not OUR_TEMPORARY.fullmatch(name)]
    is_run = STATE in holds or PREVIOUS_STATE in holds
    if resume and not is_run:
        raise UsageError(f"--resume: {out} holds no run ({STATE} is missing); start it without --resume")
    if not is_run and not set(holds) <= {CONFIG, MANIFEST}:
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
def writing(out: Path, *, resume: bool = False) -> Iterator[None]:
    """Claim a run folder and hold its lock.

    Raises:
        UsageError: Another process is writing there (which), or `claim` refuses.
        MachineError: The folder cannot be made, written or locked.
    """
    if not (out / LOCK).exists():
        claim(out, resume=resume)  # before anything is made: what is there may be somebody else's
    with held(out):
        claim(out, resume=resume)  # again: another process may have written since, and ended
        yield


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Create `out` if needed and hold its lock; stale temporaries are removed. One writer at a time.

    The lock of a process that ended, however it did, is free. A folder that was made here and in which nothing was
    written is removed again.

    Raises:
        UsageError: Another process is writing there (which).
        MachineError: The folder cannot be made, written or locked.
    """
    lock, made = _locked(out)
    try:
        for folder in made:
            sync_folder(folder.parent)
        for path in out.iterdir():
            if OUR_TEMPORARY.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        commit(out / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        yield
    finally:
        with suppress(OSError):  # that it cannot be removed takes nothing from the run
            (out / HOLDER).unlink(missing_ok=True)
            if made and os.listdir(out) == [LOCK]:
                (out / LOCK).unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


def _locked(out: Path) -> tuple[FileLock, list[Path]]:
    """The lock of `out`, held, and the folders that were made for it.

    While no process says that it holds the lock, which one that is starting or ending does not, it is tried again.
    """
    lock = FileLock(out / LOCK, timeout=0)
    until = time.monotonic() + HOLDER_S
    while True:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            return lock, made
        except Timeout:
            holder = _holder(out)
            if not holder and time.monotonic() > until:
                holder = f"another process, which {out / HOLDER} does not name; wait for it"
            if holder:
                raise UsageError(f"--out: {out} is being written by {holder}, or give another --out") from None
        except NotImplementedError:
            raise MachineError(f"--out: the file system of {out} has no locks; give a folder on another one") from None
        except OSError as error:
            advice = "its file system has no locks: " if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP) else ""
            raise MachineError(
                f"--out: {out} cannot be written ({error.strerror}); {advice}give a folder that can be"
            ) from None
        time.sleep(0.05)


def _holder(out: Path) -> str:
    """Who says that it holds the lock of `out` and what to do about it, as the end of a sentence; "" for nobody.

    What a process that has ended said may still be there.
    """
    try:
        said = json.loads((out / HOLDER).read_text(encoding="utf-8"))
        pid, host, since = int(said["pid"]), str(said["host"])[:80], str(said["since"])[:40]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return ""
    if host and host != socket.gethostname():
        gone = f"if that machine is gone, delete {out / LOCK}"
        return visible(f"process {pid} on {host} since {since}; wait for it, {gone}")
    if pid > 0 and is_alive(pid):
        return visible(f"process {pid} on {host} since {since}; wait for it, end it")
    return ""


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def commit(
    path: Path,
    data: bytes | str,
    *more: memoryview,
    start: Callable[[], bytes] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a file so that after a crash it is there whole or as it was: temporary, fsync, rename, fsync the folder.

    Args:
        path: The file.
        data: What it will hold; text as UTF-8.
        more: What follows; its memory is not copied.
        start: Called when all of that is written: what to put in the place of `data`, as many bytes.
        previous: Where to keep what the file held before, in the same folder.

    Raises:
        MachineError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        if previous is not None and path.exists():
            os.link(path, temporary)  # a second name, so that the file itself is there at every moment
            temporary.replace(previous)
            temporary.unlink(missing_ok=True)  # replacing a name of the same file leaves both: killed here last time
        with temporary.open("xb") as file:
            file.writelines([data.encode() if isinstance(data, str) else data, *more])
            if start is not None:
                file.seek(0)
                file.write(start())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be saved ({error.strerror}); the earlier file is untouched") from None


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of the tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(_memory(tensor))
    return total.hexdigest()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they are."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON document with the SHA-256 of all else in it as "sha256"."""
    whole: dict[str, Any] = json.loads(json.dumps(document))
    return whole | {"sha256": _seal(whole)}


def is_sealed(document: Any) -> bool:
    """Whether a document is what `sealed` returned, to the last character."""
    return isinstance(document, dict) and document.get("sha256") == _seal(document)


def _seal(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What `safetensors.torch.save` writes before the bytes of tensors in this order, which has to be its own.

    The library itself makes a whole file in memory first: as much again as the tensors, and seconds for large ones.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_tensors(
    path: Path, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any], *, previous: Path | None = None
) -> dict[str, Any]:
    """Commit tensors with their description; the same tensors and info give the same bytes.

    Returns:
        The description as written: `info` with the format's name, version and the digests.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    whole = {name: tensors[name].detach().cpu().contiguous() for name in names}

    def described(tensor_digest: str) -> dict[str, Any]:
        head = {"format": f"kadapt-{kind}", "format_version": FORMAT_VERSION, "tensor_digest": tensor_digest}
        return sealed(dict(info) | head)

    def header(tensor_digest: str) -> bytes:
        return safetensors_header(whole, {"kadapt": json.dumps(described(tensor_digest))})

    with ThreadPoolExecutor(1) as beside:  # a large state is saved a quarter faster
        found = beside.submit(digest, whole)
        memory = map(_memory, whole.values())
        commit(path, header("0" * 64), *memory, start=lambda: header(found.result()), previous=previous)
    return described(found.result())


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote, verified; while a run goes on saving, one state of it.

    Raises:
        ModelError: Missing, not safetensors, of another kind or version, or its tensors are not what was written.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the folder of a run made by `kadapt train`")
    while True:  # safetensors opens a file twice, first for its header: it may be replaced between the two
        before = path.stat()
        try:
            found = _read_tensors(path, kind)
        except (ModelError, RuntimeError):
            if _is_same(path.stat(), before):
                raise
            continue
        if _is_same(path.stat(), before):
            return found


def _is_same(now: os.stat_result, before: os.stat_result) -> bool:
    return (now.st_ino, now.st_mtime_ns, now.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def check_header(path: Path) -> None:
    """Raise `ModelError` for a safetensors file whose header would take long, or much memory, to parse."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        count = file.read(size).count(b'"data_offsets"') if size <= MAX_HEADER_BYTES else 0
    if size > MAX_HEADER_BYTES or count > MAX_TENSORS:
        raise ModelError(
            f"{path}: no whole safetensors file ({size:,} bytes of header, {count:,} tensors); no other format is read"
        )


def _read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    check_header(path)
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
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{path}: not written by kadapt; give the folder of a run made by `kadapt train`") from None
    if found != (f"kadapt-{kind}", FORMAT_VERSION):
        raise ModelError(f"{path}: expected format kadapt-{kind} version {FORMAT_VERSION}, found {found[0]} {found[1]}")
    if not is_sealed(info) or digest(tensors) != expected_digest:
        raise ModelError(f"{path}: damaged: it does not hold what was saved (SHA-256 differs); restore it")
    return tensors, info


def load_state(out: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The last state of a run that is whole.

    Returns:
        Tensors, description, and why it is the previous state, or "".

    Raises:
        ModelError: Neither the last state nor the one before can be used.
    """
    try:
        return *load_tensors(out / STATE, "state"), ""
    except ModelError as error:
        if not (out / PREVIOUS_STATE).is_file():
            raise
        return *load_tensors(out / PREVIOUS_STATE, "state"), str(error)


def default_out(config: TrainConfig, resume: bool) -> Path:
    """runs/NAME-N for data called NAME, with the first N that is free; `UsageError` when a run is to be resumed."""
    if resume:
        raise UsageError("--resume: give the folder of the run with --out")
    name = re.sub(r"[^\w.-]+", "_", config.data.rstrip("/").rsplit("/", 1)[-1])[:40].strip(".") or "data"
    return next_free(Path("runs"), name)
