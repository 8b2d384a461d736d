"""Files of a run: committed whole, read whole, and what is written of a configuration comes back."""

import json
import os
import resource
import threading
import time
import tomllib

import faults
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save

from kadapt_cli import runs
from kadapt_cli.config import TrainConfig, to_toml
from kadapt_cli.errors import MachineError, ModelError, UsageError


def test_a_commit_flushes_the_file_then_names_it_then_flushes_the_folder(tmp_path, monkeypatch):
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (seen.append(("flush", os.fstat(n).st_ino)), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(("name", os.stat(a).st_ino)), replace(a, b)))
    file = tmp_path / "file"
    runs.commit(file, "x")
    inode, folder = file.stat().st_ino, tmp_path.stat().st_ino
    assert seen == [("flush", inode), ("name", inode), ("flush", folder)]
    seen.clear()
    with runs.held(tmp_path / "new" / "run"):
        assert seen[:2] == [("flush", (tmp_path / "new").stat().st_ino), ("flush", folder)]


def library_bytes(tensors, metadata):
    """What safetensors makes of them; it refuses tensors that share memory or have gaps."""
    return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, metadata)


def is_taken(dtype):
    """Whether safetensors takes a dtype, and whole bytes of it."""
    try:
        return bool(save({"x": torch.empty(1, dtype=dtype)})) and dtype is not torch.float4_e2m1fn_x2
    except KeyError:
        return False


@pytest.mark.filterwarnings("ignore")  # of dtypes that torch has as an experiment
def test_a_file_of_tensors_is_the_one_that_the_library_makes(tmp_path):
    pattern = torch.arange(48, dtype=torch.uint8)
    dtypes = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and is_taken(dtype)}
    assert len(dtypes) > 12
    tensors = {f"of {dtype}": pattern.view(dtype) for dtype in dtypes - {torch.bool}} | {"bool": pattern > 20}
    tensors |= {f"two of {dtype}": pattern.view(dtype).reshape(2, -1) for dtype in dtypes - {torch.bool}}
    tensors |= {"scalar": torch.tensor(3.5), "true": torch.tensor(True), "none": torch.empty(0, 3, dtype=torch.int16)}
    tensors |= {"turned": torch.rand(3, 5, 7).permute(2, 0, 1), "every other": torch.rand(9)[::2]}
    tensors |= {"expanded": torch.tensor([1.0]).expand(4), "trained": torch.rand(3, requires_grad=True)}
    names = ('"', "\\", "/", "\n\t\b\f\r", "\x00\x1f\x7f", "näme", "ﬁ\u2028", "𝒲", "", "Z", "a" * 100)
    tensors |= {name: torch.tensor([number]) for number, name in enumerate(names)}
    for count in range(9):  # headers of every length
        tensors[f"one more{'.' * count}"] = torch.rand(count)
        info = runs.save_tensors(tmp_path / "file", "state", tensors, {"ä": '"\n'})
        assert (tmp_path / "file").read_bytes() == library_bytes(tensors, {"kadapt": json.dumps(info)})


def test_a_file_of_which_the_system_takes_a_part_is_not_taken_for_whole(tmp_path):
    """It writes as far as it can, says how far, and fails when asked for the rest."""
    path = tmp_path / "file"

    def action():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        for tensors in ({"a": torch.ones(1 << 18)}, {str(number): torch.ones(1 << 10) for number in range(1 << 8)}):
            with pytest.raises(MachineError, match="File too large"):
                runs.save_tensors(path, "state", tensors, {})

    runs.save_tensors(path, "state", {"a": torch.zeros(1)}, {})
    found = faults.forked(action)
    assert found.code == 0, found.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert runs.load_tensors(path, "state")[0]["a"].tolist() == [0]


def test_commit_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    runs.commit(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"No space left on device.*earlier file is untouched") as caught:
        runs.commit(path, "new")
    assert caught.value.exit_code == 5
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_lock_that_is_let_go_while_no_holder_is_named_is_taken(tmp_path):
    """A process that ends takes its name away first; one that is told "does not name" then could have gone on."""
    lock = FileLock(tmp_path / runs.LOCK, thread_local=False)
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    with runs.held(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / runs.HOLDER).read_text()


def test_a_named_holder_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    with runs.held(tmp_path), pytest.raises(UsageError, match=f"by process {os.getpid()} on"), runs.held(tmp_path):
        pass


@pytest.mark.parametrize("seen", ["the old one", "half of each"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, seen):
    path, real, calls = tmp_path / runs.STATE, runs._read_tensors, []
    runs.save_tensors(path, "state", {"a": torch.zeros(3)}, {"number": 1})

    def overtaken(path, kind):
        calls.append(path)
        if len(calls) > 1:
            return real(path, kind)
        old = real(path, kind)
        runs.save_tensors(path, "state", {"a": torch.ones(3)}, {"number": 2})
        if seen == "half of each":
            raise ModelError(f"{path}: damaged")
        return old

    monkeypatch.setattr(runs, "_read_tensors", overtaken)
    tensors, info = runs.load_tensors(path, "state")
    assert (tensors["a"].tolist(), info["number"], len(calls)) == ([1, 1, 1], 2, 2)


def test_a_description_that_was_read_brings_no_digest_of_its_own(tmp_path):
    runs.save_tensors(tmp_path / "x", "adapter", {"a": torch.ones(2)}, {})
    runs.save_tensors(tmp_path / "x", "adapter", {"a": torch.zeros(2)}, runs.load_tensors(tmp_path / "x", "adapter")[1])
    assert not runs.load_tensors(tmp_path / "x", "adapter")[0]["a"].any()


def test_files_have_the_modes_of_the_umask(tiny, tmp_path):
    def action():
        os.umask(0o027)
        faults.command(*tiny.train, "--out", tmp_path / "run")()

    assert faults.forked(action).code == 0
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "run").iterdir()}
    assert {mode for name, mode in modes.items() if name != runs.LOCK} == {"0o640"}


def test_toml_round_trip():
    config = TrainConfig(data='we"ird\\ näme\n\x07', shots=3, targets=("q", "blocks.1.*"), pretrained=False, lr=1e-5)
    assert TrainConfig.model_validate(tomllib.loads(to_toml(config))) == config
