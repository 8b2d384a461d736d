"""Hostile files, with digests that are right: refused in one line, within 2 s and 200 MB of what a good file takes.

What a stranger may have written is an adapter, a state, a manifest, a probe, a study, a model folder, weights.
"""

import copy
import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from kadapt_cli import evaluate, predict, probe, runs, train  # noqa: F401 - imported once for all forks
from kadapt_cli.models import BUNDLED

pytestmark = pytest.mark.faults

ROW = "hostile files"
SECONDS, BYTES = 2.0, 200 << 20
LONG = "x" * (1 << 20)
ANSI = "\x1b[31m[red]a[/red]\x9b2J"
Tensors, Info = dict[str, Tensor], dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and a finished run."""
    root = tmp_path_factory.mktemp("good")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        folder = root / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    done = faults.kadapt("train", "--data", root / "photos", "--out", root / "run", "--epochs", 1)
    assert done.code == 0, done.err
    (root / "run" / runs.PREVIOUS_STATE).unlink(missing_ok=True)
    return root


class Attack:
    """Runs commands on hostile files and gathers what went wrong."""

    def __init__(self, good: Path, tally: Callable[[str, int], None]) -> None:
        self.good = good
        self.tally = tally
        self.count = 0
        self.failures: list[str] = []
        base = faults.kadapt("eval", good / "run")
        assert base.code == 0, base.err
        self.seconds, self.bytes = base.time_s + SECONDS, base.peak_bytes + BYTES

    def run(self, name: str, arguments: tuple[object, ...], codes: tuple[int, ...] = (4,)) -> None:
        """One trial: an exit code among `codes`, one line and no traceback, no escapes, little time and memory."""
        self.count += 1
        try:
            done = faults.kadapt(*arguments, limit_s=20)
        except TimeoutError as error:
            self.failures.append(f"{name}: {arguments[0]}: {error}")
            return
        errors = [line for line in done.err.splitlines() if line.startswith("kadapt: ")]
        trials = {
            f"code {done.code}": done.code in codes,
            "no single line": len(errors) == (done.code != 0),
            "traceback": "Traceback" not in done.err,
            "escapes": not any(c in done.out + done.err for c in "\x1b\x9b"),
            "long": len(done.out + done.err) < 10_000,
            f"{done.time_s:.1f} s": done.time_s < self.seconds,
            f"{done.peak_bytes >> 20} MiB": done.peak_bytes < self.bytes,
        }
        self.failures += [
            f"{name}: {arguments[0]}: {what}: {done.err[-300:]}" for what, fine in trials.items() if not fine
        ]

    def finish(self) -> None:
        """Fail when a trial did, and count them."""
        assert not self.failures, "\n".join(self.failures)
        self.tally(ROW, self.count)

    def run_folder(self, place: Path) -> Path:
        """A fresh copy of the good run."""
        if place.exists():
            shutil.rmtree(place)
        shutil.copytree(self.good / "run", place)
        return place

    def readers(self, name: str, run: Path, codes: tuple[int, ...], shown: tuple[int, ...], quick: bool) -> None:
        """All that read an adapter; prediction, which needs no images of the run, may end with other codes."""
        photo = self.good / "photos" / "a" / "0.png"
        self.run(name, ("predict", run, photo), shown)
        if not quick:
            self.run(name, ("eval", run, "--json"), codes)
            if codes == (4,) and self.count % 4 == 0:  # all three open a run alike
                self.run(name, ("merge-weights", run, "--out", run.parent / "merged"), codes)


@pytest.fixture
def attack(good: Path, tally: Callable[[str, int], None]) -> Attack:
    return Attack(good, tally)


def at(info: Info, path: str, value: Any) -> Info:
    """A description with one value replaced, or without it where the value is `del`."""
    changed = copy.deepcopy(info)
    *parents, last = path.split(".")
    place = changed
    for key in parents:
        place = place[key]
    if value == "del":
        del place[last]
    else:
        place[last] = value
    return changed


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def sparse(size: int) -> Callable[[Path], object]:
    """A header that claims a size, in a file of that size that takes no room on the disk."""

    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", size) + b'{"a":')
        os.truncate(path, size + 8)

    return write


class Evil:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/kadapt-was-unpickled",)


DEEP = "[" * 200_000
FILES: dict[str, bytes | Callable[[Path], object]] = {
    "pickle": pickle.dumps(Evil()),
    "zip": b"PK\3\4" + bytes(1000),
    "empty": b"",
    "seven bytes": bytes(7),
    "zeros": bytes(1 << 20),
    "header of 100 MB": sparse(99_999_000),
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of blanks": struct.pack("<Q", 15 << 20) + b"{" + b" " * ((15 << 20) - 2) + b"}",
    "deep header": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    "overlap": header({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "hole": header({"a": entry(4, 8)}, bytes(8)),
    "backwards": header({"a": entry(4, 0)}, bytes(4)),
    "past the end": header({"a": entry(0, 1 << 40, (1 << 38,))}, bytes(4)),
    "overflow": header({"a": entry(0, 4, (2**62, 2**62))}, bytes(4)),
    "no type": header({"a": entry(0, 4, dtype="F99")}, bytes(4)),
    "names": header({ANSI + LONG: entry(0, 4)}, bytes(4)),
    "100,000 tensors": header({f"t{n}": entry(n, n + 1, (1,), "U8") for n in range(100_000)}, bytes(100_000)),
    "long valid header": header({"__metadata__": {f"k{n}": "" for n in range(2_000_000)}, "a": entry(0, 4)}, bytes(4)),
    "long metadata": header({"__metadata__": {"kadapt": LONG * 8}, "a": entry(0, 4)}, bytes(4)),
    "deep metadata": header({"__metadata__": {"kadapt": DEEP}, "a": entry(0, 4)}, bytes(4)),
    "list as metadata": header({"__metadata__": {"kadapt": "[1]"}, "a": entry(0, 4)}, bytes(4)),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to("/nowhere"),
}


def put(path: Path, content: bytes | Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)


def test_files_that_are_no_tensors(attack: Attack, tmp_path: Path, quick: bool) -> None:
    """Wherever tensors are read: adapter, state, a model folder, --weights. Nothing is unpickled."""
    marker = Path("/tmp/kadapt-was-unpickled")
    marker.unlink(missing_ok=True)
    model = tmp_path / "model"
    base = ("train", "--data", attack.good / "photos", "--out", tmp_path / "none", "--dry-run")
    for name, content in FILES.items():
        if quick and name not in ("pickle", "overlap", "100,000 tensors", "long valid header"):
            continue
        run = attack.run_folder(tmp_path / "run")
        put(run / runs.ADAPTER, content)
        attack.readers(name, run, (4,), (4,), quick)
        run = attack.run_folder(tmp_path / "run")
        put(run / runs.STATE, content)
        attack.run(name, ("train", "--out", run, "--resume"), (2, 4) if name == "nowhere" else (4,))
        put(tmp_path / "w.safetensors", content)
        attack.run(name, (*base, "--weights", tmp_path / "w.safetensors"))
        if (tmp_path / "w.safetensors").is_dir():
            (tmp_path / "w.safetensors").rmdir()
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(BUNDLED, model)
        put(model / "model.safetensors", content)
        attack.run(name, (*base, "--model", f"local-dir:{model}"))
    (model / "model.safetensors").unlink()
    put(model / "pytorch_model.bin", FILES["pickle"])
    attack.run("pickle under its own name", (*base, "--model", f"local-dir:{model}"))
    assert not marker.exists()
    attack.finish()


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: change(t) if n == name else t for n, t in tensors.items()}


TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "float64": changed("head.weight", Tensor.double),
    "half": changed("head.weight", Tensor.half),
    "integers": changed("head.weight", Tensor.int),
    "truths": changed("head.weight", Tensor.bool),
    "transposed": changed("head.weight", lambda t: t.T),
    "a row more": changed("head.weight", lambda t: torch.cat([t, t[:1]])),
    "scalar": changed("head.bias", lambda t: t[0]),
    "none": lambda tensors: {},
    "one missing": lambda tensors: {n: t for n, t in tensors.items() if n != "head.bias"},
    "one more": lambda tensors: tensors | {"../../x": torch.zeros(1)},
    "strange name": lambda tensors: tensors | {ANSI + LONG: torch.zeros(1)},
    "nan": changed("head.weight", lambda t: t * torch.nan),
    "inf": changed("head.bias", lambda t: t + torch.inf),
    "too large": changed("head.weight", lambda t: torch.full_like(t, 3e38)),
    "no spread": changed("head.std", torch.zeros_like),
    "negative spread": changed("head.std", lambda t: -t),
}
# What is put where in the description of an adapter, and the codes of eval and of predict.
REFUSED, UNREAD, ELSEWHERE = ((4,), (4,)), ((0,), (0,)), ((3, 4), (0,))
ADAPTERS: list[tuple[str, Any, tuple[tuple[int, ...], tuple[int, ...]]]] = [
    *((key, "del", REFUSED) for key in ("config", "classes", "model", "metric", "squash", "manifest", "epoch")),
    ("model.digest", "del", REFUSED),
    ("model.license", ["MIT"], REFUSED),
    ("epoch", "x", REFUSED),
    ("epoch", 1e300, REFUSED),
    ("epoch", -1, REFUSED),
    ("classes", {}, REFUSED),
    ("classes", "ab", REFUSED),
    ("classes", [], REFUSED),
    ("classes", [1, 2], REFUSED),
    ("classes", ["a", "a"], REFUSED),
    ("classes", ["a", LONG], REFUSED),
    ("classes", ["../../a", "/etc/passwd"], ELSEWHERE),
    ("classes", [ANSI, "<script>alert(1)</script>"], ELSEWHERE),
    ("metric", "<b>", REFUSED),
    ("squash", "yes", REFUSED),
    ("manifest", "", REFUSED),
    ("manifest", "0" * 64, ELSEWHERE),
    ("model", "vit32", REFUSED),
    ("model.digest", LONG, REFUSED),
    ("model.digest", "0" * 64, REFUSED),
    ("data_config", {"input_size": [3, 10**9, 10**9], "mean": LONG}, UNREAD),
    ("tensors", DEEP[:500], UNREAD),
    ("config", [], REFUSED),
    ("config", LONG, REFUSED),
    ("config", {"zzz": 1}, REFUSED),
    ("config.model", LONG, REFUSED),
    ("config.model", "../../etc/passwd", REFUSED),
    ("config.model", "local-dir:/nonexistent", REFUSED),
    ("config.model", "local-dir:/dev", REFUSED),
    ("config.model", ANSI, REFUSED),
    ("config.data", "../../etc", ELSEWHERE),
    ("config.data", LONG, REFUSED),
    ("config.weights", "/dev/zero", REFUSED),
    ("config.weights", "/etc/passwd", REFUSED),
    ("config.weights", "../../nowhere", REFUSED),
    ("config.method", ANSI, REFUSED),
    ("config.method", "lora", REFUSED),
    ("config.targets", ["^(([a-z.0-9])+)+$"], REFUSED),
    ("config.targets", ["*" * 5000], REFUSED),
    ("config.targets", ["*a" * 90 + "b"], REFUSED),
    ("config.targets", ["[" * 190], REFUSED),
    ("config.targets", ["q"] * 100_000, REFUSED),
    ("config.targets", ["../../q"], REFUSED),
    ("config.targets", [], REFUSED),
    ("config.terms", 10**9, REFUSED),
    ("config.terms", 10**300, REFUSED),
    ("config.terms", 4096, REFUSED),
    ("config.rank", 4096, REFUSED),
    ("config.img_size", 4096, REFUSED),
    ("config.img_size", "x", REFUSED),
    ("config.seed", -1, REFUSED),
    ("config.scale", float("nan"), REFUSED),
]


def test_adapters(attack: Attack, tmp_path: Path, quick: bool) -> None:
    """Tensors and descriptions that no run writes."""
    tensors, info = runs.load_tensors(attack.good / "run" / runs.ADAPTER, "adapter")
    run = attack.run_folder(tmp_path / "run")
    for name, change in list(TENSORS.items())[:: 6 if quick else 1]:
        runs.save_tensors(run / runs.ADAPTER, "adapter", change(tensors), info)
        attack.readers(name, run, (4,), (4,), quick)
    for path, value, (codes, shown) in ADAPTERS[:: 6 if quick else 1]:
        runs.save_tensors(run / runs.ADAPTER, "adapter", tensors, at(info, path, value))
        attack.readers(f"{path} = {str(value)[:30]}", run, codes, shown, quick)
    wide = info | {"config": info["config"] | {"method": "adapter", "width": 65536}}
    runs.save_tensors(run / runs.ADAPTER, "adapter", tensors, wide)
    attack.readers("width", run, (4,), (4,), quick)
    large = info | {"config": info["config"] | {"method": "subspace", "dims": 2**39}}
    runs.save_tensors(run / runs.ADAPTER, "adapter", tensors, large)
    attack.readers("dims", run, (4,), (4,), quick)
    for name in ("format", "format_version", "tensor_digest", "sha256"):
        whole = {n: t.contiguous() for n, t in tensors.items()}
        (run / runs.ADAPTER).write_bytes(save(whole, {"kadapt": json.dumps(info | {name: ANSI + LONG})}))
        attack.readers(name, run, (4,), (4,), quick)
    attack.finish()


STATES: list[tuple[str, Any]] = [
    *((key, "del") for key in ("config", "classes", "manifest", "base_digest", "epoch", "step", "history", "best")),
    *((key, "del") for key in ("kept_epoch", "micro", "epoch_time_s", "scaler")),
    ("epoch", "x"),
    ("epoch", -1),
    ("epoch", 10**9),
    ("step", 10**9),
    ("step", 0.5),
    ("history", {}),
    ("history", [1]),
    ("history", []),
    ("history", [{}] * 3),
    ("best", float("nan")),
    ("best", "1"),
    ("kept_epoch", 10**6),
    ("micro", 0),
    ("micro", 10**12),
    ("epoch_time_s", float("inf")),
    ("scaler", "x"),
    ("base_digest", "0" * 64),
    ("classes", {}),
    ("classes", [ANSI, "b"]),
    ("manifest", ""),
    ("manifest", "0" * 64),
    ("config", LONG),
    ("config", {"model": LONG}),
    ("config.seed", 5),
    ("config.targets", ["*" * 5000]),
]
STATE_TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "no rng": lambda tensors: {n: t for n, t in tensors.items() if n != "rng"},
    "short rng": changed("rng", lambda t: t[:100]),
    "false rng": changed("rng", lambda t: torch.full_like(t, 255)),
    "rng of floats": changed("rng", Tensor.float),
    "no sums": lambda tensors: {n: t for n, t in tensors.items() if n != "sums"},
    "long sums": changed("sums", lambda t: t.repeat(2)),
    "nan sums": changed("sums", lambda t: t * torch.nan),
    "live of floats": changed("live.head.bias", Tensor.float),
    "one live": changed("live.head.bias", lambda t: t[:1]),
    "no moment": lambda tensors: {n: t for n, t in tensors.items() if n != "optimizer.exp_avg.head.bias"},
    "nan moment": changed("optimizer.exp_avg.head.bias", lambda t: t * torch.nan),
    "negative moment": changed("optimizer.exp_avg_sq.head.bias", lambda t: t - 1),
    "negative step": changed("optimizer.step.head.bias", lambda t: t - 10),
    "vector step": changed("optimizer.step.head.bias", lambda t: t.repeat(5)),
    "model nan": changed("model.head.weight", lambda t: t * torch.nan),
    "one more": lambda tensors: tensors | {f"optimizer.{ANSI}": torch.zeros(1)},
}


def test_states(attack: Attack, tmp_path: Path, quick: bool) -> None:
    """What --resume would go on from."""
    tensors, info = runs.load_tensors(attack.good / "run" / runs.STATE, "state")
    run = attack.run_folder(tmp_path / "run")
    resume = ("train", "--out", run, "--resume")
    for path, value in STATES[:: 5 if quick else 1]:
        runs.save_tensors(run / runs.STATE, "state", tensors, at(info, path, value))
        attack.run(f"{path} = {str(value)[:30]}", resume, (3, 4) if path == "classes" else (4,))
    for name, change in list(STATE_TENSORS.items())[:: 5 if quick else 1]:
        assert runs.digest(change(tensors)) != runs.digest(tensors), name
        runs.save_tensors(run / runs.STATE, "state", change(tensors), info)
        attack.run(name, resume)
    attack.finish()


ROWS = ",".join(("path", "label", "split", "bytes", "sha256")) + "\n"
MANIFESTS: dict[str, bytes] = {
    "parent": (ROWS + "../../etc/passwd,a,test,1,00\n").encode(),
    "hidden parent": (ROWS + "a/../../x,a,test,1,00\n").encode(),
    "absolute": (ROWS + "/etc/passwd,a,test,1,00\n").encode(),
    "device": (ROWS + "dev/zero,a,test,1,00\n").encode(),
    "long line": (ROWS + f"{LONG},a,test,1,00\n").encode(),
    "long path": (ROWS + f"{LONG[:100_000]},a,test,1,00\n").encode(),
    "nul": (ROWS + "a/\0.png,a,test,1,00\n").encode(),
    "escapes": (ROWS + f"a/{ANSI}.png,a,test,1,00\n").encode(),
    "columns": b"path,label\n",
    "nothing": b"",
    "a row too short": (ROWS + "a/0.png,a\n").encode(),
    "unknown class": (ROWS + f"a/0.png,{ANSI},test,1,00\n").encode(),
    "unknown split": (ROWS + f"a/0.png,a,{LONG[:100_000]},1,00\n").encode(),
    "long number": (ROWS + "a/0.png,a,test," + "9" * 100_000 + ",00\n").encode(),
    "two labels": (ROWS + "a/0.png,a|b,test,1,00\n").encode(),
    "not UTF-8": ROWS.encode() + b"a/\xff.png,a,test,1,00\n",
    "quotes": ROWS.encode() + b'"' * (1 << 20),
}


def test_manifests_and_configurations(attack: Attack, tmp_path: Path, quick: bool) -> None:
    """The manifest of a run whose adapter names its digest, its config.toml, and a stranger's --config."""
    tensors, info = runs.load_tensors(attack.good / "run" / runs.ADAPTER, "adapter")
    run = attack.run_folder(tmp_path / "run")
    for name, content in list(MANIFESTS.items())[:: 5 if quick else 1]:
        (run / runs.MANIFEST).write_bytes(content)
        own = info | {"manifest": hashlib.sha256(content).hexdigest()}
        runs.save_tensors(run / runs.ADAPTER, "adapter", tensors, own)
        attack.run(name, ("eval", run), (4,) if name == "not UTF-8" else (3,))
    run = attack.run_folder(tmp_path / "run")
    texts = {"data": 'data = "../../etc"\n', "long": f'data = "{LONG}"\n', "deep": f"data = {DEEP}\n", "nothing": ""}
    for name, text in texts.items():
        (run / runs.CONFIG).write_text(text)
        attack.run(name, ("train", "--out", run, "--resume"))
        (tmp_path / "given.toml").write_text(text + 'model = "local-dir:../../nowhere"\n' * (name == "nothing"))
        codes = (4,) if name == "nothing" else (2, 3)
        attack.run(name, ("train", "--config", tmp_path / "given.toml", "--out", tmp_path / "none", "--dry-run"), codes)
    attack.finish()


PROBES: dict[str, Any] = {
    "text": {"selected": "qv"},
    "object": {"selected": {"q": 1}},
    "numbers": {"selected": [1]},
    "nested": {"selected": [["q"]]},
    "null": {"selected": None},
    "absent": {},
    "long name": {"selected": [LONG]},
    "many": {"selected": ["q"] * 100_000},
    "stars": {"selected": ["*" * 5000]},
    "regular expression": {"selected": ["^(([a-z.0-9])+)+$"]},
    "escapes": {"selected": [ANSI]},
    "path": {"selected": ["../../q"]},
    "auto": {"selected": ["auto"]},
}


def test_probes(attack: Attack, tmp_path: Path, quick: bool) -> None:
    """What --targets reads."""
    file = tmp_path / "probe.json"
    base = ("train", "--data", attack.good / "photos", "--out", tmp_path / "none", "--dry-run", "--targets", file)
    for name, document in list(PROBES.items())[:: 4 if quick else 1]:
        file.write_text(json.dumps(runs.sealed(document)))
        attack.run(name, base, (2, 4))
    for name, text in (("deep", DEEP), ("list", "[1]"), ("unsealed", '{"selected": ["q"]}'), ("long", LONG)):
        file.write_text(text)
        attack.run(name, base)
    for name in ("pipe", "zero", "folder"):
        put(file, FILES[name])
        attack.run(name, base, (2, 4))
    attack.finish()


def test_studies(attack: Attack, tmp_path: Path, quick: bool) -> None:
    """The file in which compare and probe-id keep what is finished: a false first line is refused, others are not."""
    compare = ("compare", "--data", attack.good / "photos", "--method", "linear", "--shots", 3, "--seeds", 0)
    compare = (*compare, "--model", "vit32", "--out", tmp_path / "out")
    done = faults.kadapt(*compare, "--json")
    assert done.code == 0, done.err
    study = (tmp_path / "out" / "study.jsonl").read_bytes()
    lines = {"garbage": b"\xff\x00\x1b[31m", "deep": DEEP.encode(), "long": LONG.encode(), "list": b"[1]"}
    lines |= {"sealed": json.dumps(runs.sealed({"x": 1})).encode(), "number": b"9" * 100_000}
    lines |= {"sealed kind": json.dumps(runs.sealed({"kind": ["final"]})).encode()}
    for name, line in list(lines.items())[:: 3 if quick else 1]:
        (tmp_path / "out" / "study.jsonl").write_bytes(line + b"\n" + study)
        attack.run(f"{name} first", compare)
        attack.run(f"{name} first", ("probe-id", "--data", attack.good / "photos", "--out", tmp_path / "out"))
        (tmp_path / "out" / "study.jsonl").write_bytes(study + line + b"\n")
        again = faults.kadapt(*compare, "--json")
        assert again.code == 0, again.err
        assert json.loads(again.out) == json.loads(done.out), name
    attack.finish()


# What timm sets aside, such as the image size of a model with one of its own, does no harm.
HARMLESS = ("pretrained_cfg.input_size", "num_classes")
CONFIGS: list[tuple[str, Any]] = [
    ("architecture", "../../x"),
    ("architecture", ["vit"]),
    ("architecture", LONG),
    ("architecture", ANSI),
    ("architecture", "del"),
    ("architecture", "resnet18"),
    ("model_args", []),
    ("model_args", {"depth": 10**9}),
    ("model_args", {"depth": 900}),
    ("model_args", {"embed_dim": 60_000}),
    ("model_args", {"embed_dim": 10**9}),
    ("model_args", {"num_heads": 0}),
    ("model_args", {"img_size": 10**9}),
    ("model_args", {"img_size": "x"}),
    ("model_args", {"norm_layer": "os.system"}),
    ("model_args", {ANSI: LONG}),
    ("pretrained_cfg", "x"),
    ("pretrained_cfg.input_size", [3, 10**9, 10**9]),
    ("pretrained_cfg.input_size", "x"),
    ("pretrained_cfg.input_size", [3, 0, 0]),
    ("pretrained_cfg.mean", LONG),
    ("pretrained_cfg.std", [0, 0, 0]),
    ("pretrained_cfg.crop_pct", 1e9),
    ("pretrained_cfg.crop_pct", "x"),
    ("pretrained_cfg.interpolation", ANSI),
    ("pretrained_cfg.crop_mode", {}),
    ("num_classes", "x"),
    ("num_classes", 10**12),
]


def test_model_folders(attack: Attack, tmp_path: Path, quick: bool) -> None:
    """The config.json of a folder that --model names."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    good = json.loads((model / "config.json").read_text())
    good.setdefault("pretrained_cfg", {})
    base = ("train", "--data", attack.good / "photos", "--out", tmp_path / "none", "--dry-run")
    attack.run("as it is", (*base, "--model", f"local-dir:{model}"), (0,))
    for path, value in CONFIGS[:: 4 if quick else 1]:
        (model / "config.json").write_text(json.dumps(at(good, path, value)))
        codes = (0, 4) if path in HARMLESS else (4,)
        attack.run(f"{path} = {str(value)[:40]}", (*base, "--model", f"local-dir:{model}"), codes)
    for name, text in (("deep", DEEP), ("list", "[1]"), ("null", "null"), ("long", json.dumps(good | {"x": 5 * LONG}))):
        (model / "config.json").write_text(text)
        attack.run(name, (*base, "--model", f"local-dir:{model}"))
    attack.finish()
