"""Wrong options and configurations: exit 2, one error that names the option and where it came from, nothing written."""

import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import typer
from PIL import Image

# What the commands import, so that no trial has to.
import kadapt_cli.bench.options
import kadapt_cli.bench.sweep
import kadapt_cli.compare
import kadapt_cli.evaluate
import kadapt_cli.merge
import kadapt_cli.predict
import kadapt_cli.probe.show
import kadapt_cli.train  # noqa: F401
from kadapt_cli import cli
from kadapt_cli.config import MAX_CONFIG_BYTES, TrainConfig

pytestmark = pytest.mark.faults
ROW = "options and config"
LIMIT_S = 20.0
LONG = "x" * 100_000  # an argument has at most 128 KiB on Linux

Case = tuple[list[object], tuple[str, ...]]  # arguments, and words that the error must have


@pytest.fixture
def refused(tmp_path, monkeypatch, quick, tally) -> Callable[..., None]:
    """refused(cases, files={name: text}) runs each and asserts that all were refused as they must be."""

    def check(cases: list[Case], keep: int = 1, files: dict[str, str | bytes] | None = None) -> None:
        folder = tmp_path / "empty"
        for number in range(21):
            path = folder / "photos" / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 40 + number).save(path)
        (folder / "full").mkdir()
        (folder / "full" / "thesis.txt").write_text("mine")
        monkeypatch.chdir(folder)
        for name, text in (files or {}).items():
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        chosen = cases[::keep] if quick else cases
        before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}
        failures = []
        for arguments, words in chosen:
            try:
                done = faults.kadapt(*arguments, limit_s=LIMIT_S)
            except TimeoutError as error:
                failures.append((arguments, str(error)))
                before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}
                continue
            wrong = _wrong(done, words)
            after = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}
            if after != before:
                wrong.append(f"left {sorted(after.keys() - before.keys()) or 'a changed file'}")
                before = after
            if wrong:
                failures.append((" ".join(str(a)[:80] for a in arguments), *wrong, done.err[-600:]))
        assert not failures, f"{len(failures)} of {len(chosen)}:\n" + "\n".join(map(str, failures[:40]))
        tally(ROW, len(chosen))

    return check


def _wrong(done: faults.Outcome, words: tuple[str, ...]) -> list[str]:
    """What an outcome lacks to be a refusal."""
    lines = [line for line in done.err.splitlines() if line.startswith("kadapt: ")]
    boxed = "─ Error ─" in done.err
    text = lines[0] if lines else "".join(line.strip("│ ") + " " for line in done.err.splitlines())
    checks = {
        f"exit code {done.code}": done.code == 2,
        "something on stdout": done.out == "",
        "a traceback": "Traceback" not in done.err,
        f"{len(lines)} error lines, {boxed=}": len(lines) + boxed == 1,
        f"{len(done.err)} characters": len(done.err) < 8_000,
        "escape codes": "\x1b" not in done.err,
    }
    missing = [word for word in words if "".join(word.split()) not in "".join(text.split())]  # boxes break lines
    return [name for name, holds in checks.items() if not holds] + ([f"does not say {missing}"] if missing else [])


# --- the configuration file ---

WRONG_TYPE = {
    int: ["'3'", "1.5", "true", "[]", "''", "nan", "{}", "1979-05-27", "3.0"],
    float: ["'0.1'", "true", "[]", "''", "nan", "inf", "-inf", "{a = 1}"],
    bool: ["'true'", "1", "''", "[]", "0.0"],
    str: ["1", "true", "['x']", "{}", r'"a\u0000b"', f"'{LONG[:5000]}'"],
    tuple: ["'q'", "[]", "[1]", "['q', '']", "[['q']]", "1", r'["q\u0000"]', f"['{LONG[:5000]}']", "{q = 1}"],
}


def _kind(annotation: Any) -> Any:
    """The type of an option or field without None; its choices when it is a Literal."""
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) in (tuple, list):
        return typing.get_origin(annotation)
    return _kind(parts[0]) if parts else annotation


def _out_of_range(field: Any) -> Iterator[str]:
    """Values just outside of a field's bounds, and far outside."""
    for bound in field.metadata:
        for name, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
            limit = getattr(bound, name, None)
            if limit is not None:
                yield str(limit + step)
                yield str(-(10**15) if name in ("ge", "gt") else 10**15)


def _toml_values() -> list[tuple[str, str]]:
    """Fields with a wrong value, as TOML."""
    found = []
    for name, field in TrainConfig.model_fields.items():
        kind = _kind(field.annotation)
        values = (
            ["'nonsense'", "''", "1", "true", "[]", f"'{LONG[:5000]}'"] if isinstance(kind, tuple) else WRONG_TYPE[kind]
        )
        values = [*values, *_out_of_range(field)]
        values += ["''"] if kind is str else []
        values += ["9" * 30] if kind is int else []
        found += [(name, value) for value in values]
    return found


def test_wrong_values_in_a_config_file(refused):
    """Every field × wrong types, empty, out of range: the error names the file and the key."""
    rows = _toml_values()
    files = {f"{number}.toml": f"{name} = {value}\n" for number, (name, value) in enumerate(rows)}
    cases: list[Case] = [
        (["train", "--config", f"{number}.toml"], (f"{number}.toml: {name}",)) for number, (name, _) in enumerate(rows)
    ]
    refused(cases, keep=26, files=files)


def test_keys_that_are_unknown(refused):
    """A misspelt key gets the right one suggested; a key of another program the list of those known."""
    names = {f"{name[:-1]}": name for name in TrainConfig.model_fields if name[:-1] not in TrainConfig.model_fields}
    names |= {name.replace("_", "-"): name for name in TrainConfig.model_fields if "_" in name}
    files: dict[str, str | bytes] = {f"{wrong}.toml": f"'{wrong}' = 1\n" for wrong in names}
    cases: list[Case] = [
        (["train", "--config", f"{wrong}.toml"], (f"{wrong}.toml: unknown key '{wrong}'", "did you mean"))
        for wrong in names
    ]
    for number, text in enumerate(
        ("zzz = 1", "[train]\nlr = 1", "[[x]]", f"{LONG[:5000]} = 1", '"" = 1', '"a\\u001b[31m" = 1')
    ):
        files[f"u{number}.toml"] = text
        cases.append((["train", "--config", f"u{number}.toml"], (f"u{number}.toml: unknown key",)))
    refused(cases, keep=9, files=files)


def test_config_files_that_are_none(refused, tmp_path):
    """Too large, too deep, malformed, not text, no file."""
    deep = 30_000
    texts: dict[str, str | bytes] = {
        "large.toml": b"seed = 1\n" + b"#" * MAX_CONFIG_BYTES,
        "lists.toml": "a = " + "[" * deep + "]" * deep,
        "tables.toml": "a = " + "{a=" * (deep // 2) + "1" + "}" * (deep // 2),
        "header.toml": "[" + ".".join("a" * deep) + "]",
        "dots.toml": ".".join("a" * deep) + " = 1",
        "utf16.toml": "seed = 1".encode("utf-16"),
        "latin1.toml": b"data = '\xe9'",
        "nul.toml": b"seed = 1\x00",
        "bom.toml": b"\xef\xbb\xbfseed = x",
        "twice.toml": "seed = 1\nseed = 2",
        "table_twice.toml": "[a]\n[a]",
        "digits.toml": "seed = " + "9" * 5_000,
        "float.toml": "lr = 1e",
        "bare.toml": "data = photos",
        "open.toml": "data = 'photos",
        "json.toml": '{"data": "photos"}',
        "yaml.toml": "data: photos",
        "surrogate.toml": r'data = "\ud800"',
        "newline.toml": 'data = "a\nb"',
        "pickle.toml": b"\x80\x04\x95",
        "gzip.toml": b"\x1f\x8b\x08",
        "control.toml": b"data = '\x1b[31m'",
    }
    cases: list[Case] = [(["train", "--config", name], (name,)) for name in texts]
    cases += [(["train", "--config", name], ("--config", name)) for name in ("missing.toml", "..", "/dev", "/dev/zero")]
    cases += [(["train", "--config", f"{'x' * 5_000}.toml"], ("--config",))]
    cases += [(["train", "--config", "twice.toml/x"], ("--config", "twice.toml/x"))]
    cases += [(["train", "--config", name], (name, "line 1")) for name in ("bare.toml", "float.toml")]
    refused(cases, keep=3, files=texts)


def test_where_a_wrong_value_came_from(refused):
    """An option beats the file and is blamed alone; what the file brings is blamed on the file, later checks too."""
    files = {"low.toml": "shots = 0\n", "good.toml": "shots = 3\n", "data.toml": "targets = ['nothing']\n"}
    files |= {"terms.toml": "terms = 5\n", "method.toml": "method = 'lorra'\n", "one.toml": "shots = 1\n"}
    files |= {"lr.toml": "method = 'linear'\nlr = 0.1\n", "rank.toml": "method = 'bitfit'\nrank = 2\n"}
    files |= {"metric.toml": "metric = 'roc_auc'\n"}
    cases: list[Case] = [
        (["train", "--config", "low.toml"], ("low.toml: shots", "0")),
        (["train", "--config", "good.toml", "--seed", "-1"], ("--seed", "-1")),
        (["train", "--config", "good.toml", "--shots", "0"], ("--shots", "0")),
        (["train", "--config", "low.toml", "--epochs", "0"], ("0",)),
        (["train", "--config", "data.toml"], ("data.toml: targets", "nothing")),
        (["train", "--config", "terms.toml"], ("terms.toml: terms", "5")),
        (["train", "--config", "method.toml"], ("method.toml: method", "lorra")),
        (["train", "--config", "one.toml"], ("one.toml: shots",)),
        (["train", "--config", "lr.toml"], ("lr.toml: lr",)),
        (["train", "--config", "rank.toml"], ("rank.toml: rank",)),
        (["train", "--config", "metric.toml"], ("metric.toml: metric",)),
        (["train", "--config", "rank.toml", "--method", "lorra"], ("--method", "lorra")),
        (["train", "--config", "rank.toml", "--method", "layernorm"], ("rank.toml: rank",)),
    ]
    refused([([*arguments, "--data", "photos"], words) for arguments, words in cases], files=files)


# --- the command line ---

WRONG_TEXT = {
    int: ["x", "1.5", "", "9" * 5_000],
    float: ["x", "", "1,5"],
    bool: [],
    str: [""],
    Path: [""],
    list: [""],
}


def _options() -> Iterator[tuple[list[str], str, Any, Any]]:
    """Every option of every command: the command's name, the flag, its type, what Typer knows of it."""
    groups = [([], cli.app), (["data"], cli.data_app)]
    for prefix, app in groups:
        for command in app.registered_commands:
            name = command.name or command.callback.__name__.replace("_", "-")
            for key, annotation in command.callback.__annotations__.items():
                info = None if key == "return" or annotation is typer.Context else annotation.__metadata__[0]
                if isinstance(info, typer.models.OptionInfo):
                    named = isinstance(info.default, str) and info.default.startswith("--")
                    flag = info.default if named else f"--{key.replace('_', '-')}"
                    yield [*prefix, name], flag, _kind(annotation.__origin__), info


REQUIRED: dict[str, list[str]] = {
    "eval": ["run"], "predict": ["run", "photo.jpg"], "merge-weights": ["run"], "merge": ["run"], "check": ["demo"],
    "compare": ["--data", "photos"],
}  # fmt: skip


def test_every_option_of_every_command(refused):
    """Wrong types, empty, out of range, without a value, misspelt."""
    cases: list[Case] = []
    for command, flag, kind, info in _options():
        start = [*command, *REQUIRED.get(command[-1], [])]
        cases.append(([*start, f"{flag}z"], (f"No such option: {flag}z",)))
        if kind is bool:
            cases.append(([*start, f"{flag}=3"], (flag, "does not take a value")))
            continue
        cases.append(([*start, flag], (flag, "requires an argument")))
        texts = ["nonsense", ""] if isinstance(kind, tuple) else list(WRONG_TEXT[kind])
        field = TrainConfig.model_fields.get(flag.removeprefix("--").replace("-", "_"))
        if kind in (int, float) and field is not None:
            texts += list(_out_of_range(field))[::2]
        if info.min is not None:
            texts += [str(info.min - 1)]
        if info.max is not None:
            texts += [str(info.max + 1)]
        if kind is float:
            texts += ["nan", "inf", "-inf"]
        cases += [([*start, flag, text], (flag,)) for text in texts]
    refused(cases, keep=40)


CONFLICTS: list[tuple[str, tuple[str, ...]]] = [
    ("train --resume", ("--resume", "--out")),
    ("train --resume --out nowhere", ("--resume", "nowhere")),
    ("train --resume --dry-run --out nowhere", ("--resume", "--dry-run")),
    ("train --targets probe.json,q", ("--targets", "alone")),
    ("train --targets probe.json,other.json", ("--targets", "alone")),
    ("train --targets auto,q", ("--targets", "'auto'")),
    ("train --targets q,probe.json", ("--targets", "probe.json")),
    ("train --targets auto --dry-run", ("--targets", "--dry-run")),
    ("train --targets auto --resume --out nowhere", ("--resume",)),
    ("train --targets probe.json", ("--targets", "probe.json")),
    ("train --targets ../..", ("--targets", "'../..'")),
    ("train --targets blocks.99.q", ("--targets", "blocks.99.q")),
    ("train --targets q,,v", ("--targets",)),
    ("train --targets (a+)+$", ("--targets", "(a+)+$")),
    ("train --targets [[[[", ("--targets",)),
    ("train --no-pretrained --weights w.safetensors", ("--no-pretrained", "--weights")),
    ("train --method linear --lr 0.1", ("--lr", "linear")),
    ("train --method bitfit --rank 3", ("--rank", "bitfit")),
    ("train --method lora --width 3", ("--width", "lora")),
    ("train --method full --said", ("--said", "full")),
    ("train --method subspace --dims 999999999", ("--dims", "999999999")),
    ("train --method subspace --dims 1 --said", ("--dims",)),
    ("train --method lora --rank 1000000000", ("--rank", "1000000000")),
    ("train --method adapter --width 1000000000", ("--width", "1000000000")),
    ("train --method vpt --width 1000000000", ("--width", "1000000000")),
    ("train --terms 7", ("--terms", "7")),
    ("train --terms 1000000000", ("--terms", "1000000000")),
    ("train --rank 1000000000", ("--rank", "1000000000")),
    ("train --method lorra", ("--method", "lora")),
    ("train --method ../../etc", ("--method", "../../etc")),
    ("train --metric roc_auc", ("--metric", "roc_auc")),
    ("train --metric 11point_mAP", ("--metric", "11point_mAP")),
    ("train --metric f1", ("--metric", "accuracy")),
    ("train --shots 1", ("--shots", "--val none")),
    ("train photos", ("unexpected extra argument",)),
    ("eval", ("Missing argument 'RUN'",)),
    ("eval a b", ("unexpected extra argument",)),
    ("eval run --split all", ("--split", "train")),
    ("predict", ("Missing argument",)),
    ("predict run", ("Missing argument", "IMAGE")),
    ("predict run a.jpg --top 0", ("--top", "0")),
    ("predict run a.jpg --top -3", ("--top", "-3")),
    ("merge-weights", ("Missing argument 'RUN'",)),
    ("merge-weights run", ("Missing option '--out'",)),
    ("merge-weights run --out full", ("--out", "full")),
    ("merge-weights run --out a.toml", ("--out", "a.toml")),
    ("train --out a.toml", ("--out", "a.toml")),
    ("train --out full", ("--out", "full")),
    ("train --out a.toml/x", ("--out", "a.toml")),
    ("merge-weights run --out a.toml/x", ("--out", "a.toml")),
    ("probe-id --out a.toml/x", ("--out", "a.toml")),
    ("train --targets auto --out full", ("--out", "full")),
    ("compare", ("Missing option '--data'",)),
    ("compare --data photos --shots 5 --full-shot", ("--shots", "--full-shot")),
    ("compare --data photos --data photos", ("--data", "twice")),
    ("compare --data photos --method lora --method lora", ("--method", "twice")),
    ("compare --data photos --method lorra", ("--method", "lora")),
    ("compare --data photos --method lora@nothing", ("nothing",)),
    ("compare --data photos --method lora@", ("--method", "lora@")),
    ("compare --data photos --method @q", ("--method",)),
    ("compare --data photos --seeds 0,0", ("--seeds", "twice")),
    ("compare --data photos --seeds 0,x", ("--seeds", "x")),
    ("compare --data photos --seeds 0,,1", ("--seeds",)),
    ("compare --data photos --seeds -1", ("--seeds", "-1")),
    ("compare --data photos --seeds 1.5", ("--seeds", "1.5")),
    ("compare --data photos --seeds 4294967296", ("--seeds", "4294967296")),
    ("compare --data photos --seeds 99999999999999999999", ("--seeds",)),
    (f"compare --data photos --seeds {'9' * 5000}", ("--seeds",)),
    ("compare --data photos --trials 3", ("--trials", "--search optuna")),
    ("compare --data photos --trials 3 --search coarse", ("--trials", "--search optuna")),
    ("compare --data photos --shots 1 --search coarse", ("shots",)),
    ("compare --data photos --metric roc_auc", ("--metric", "roc_auc")),
    ("compare --data photos --targets nothing", ("--targets", "nothing")),
    ("compare --data photos --m0 nan", ("--m0",)),
    ("compare --data photos --m0 inf", ("--m0",)),
    ("compare --data photos --jobs 100000", ("--jobs",)),
    ("compare --data photos --out a.toml", ("--out", "a.toml")),
    ("probe-id --shots 5 --full-shot", ("--shots", "--full-shot")),
    ("probe-id --keep 3 --budget 9", ("--keep", "--budget")),
    ("probe-id --threshold 1", ("--threshold", "1")),
    ("probe-id --threshold 0", ("--threshold", "0")),
    ("probe-id --threshold nan", ("--threshold", "nan")),
    ("probe-id --groups nothing", ("--groups", "nothing", "attn")),
    ("probe-id --groups attn,,mlp", ("--groups",)),
    ("probe-id --dims 0", ("--dims", "0")),
    ("probe-id --dims auto,8", ("--dims", "auto,8")),
    ("probe-id --dims 8,,9", ("--dims",)),
    ("probe-id --dims 999999999", ("--dims", "999999999")),
    ("probe-id --dims 1 --said", ("--dims", "--said")),
    ("probe-id --folds 6 --shots 5", ("--folds", "6")),
    ("probe-id --folds 100000 --full-shot --data photos", ("--folds",)),
    ("probe-id --seeds 1000000000", ("--seeds",)),
    ("probe-id --metric roc_auc", ("--metric", "roc_auc")),
    ("probe-id --no-pretrained --weights w.safetensors", ("--no-pretrained", "--weights")),
    ("probe-id --out a.toml", ("--out", "a.toml")),
    ("bench-kernels --shapes missing.csv", ("--shapes", "missing.csv")),
    ("bench-kernels --shapes a.toml", ("--shapes", "d,M")),
    ("bench-kernels --shapes bad.csv", ("--shapes", "line 2", "M")),
    ("bench-kernels --dtype fp8", ("--dtype", "fp8", "bf16")),
    ("bench-kernels --dtype ,", ("--dtype",)),
    ("bench-kernels --contenders nobody", ("--contenders", "nobody")),
    ("bench-kernels --modes sideways", ("--modes", "sideways")),
    ("bench-kernels --aot sm_12345", ("--aot", "sm_12345", "sm_80")),
    ("bench-kernels --aot sm_80 --dtype fp8", ("--dtype", "fp8")),
    ("bench-kernels --aot sm_80 --sweep", ("--aot", "--sweep")),
    ("bench-kernels --aot sm_80 --csv rows.csv", ("--aot", "--csv")),
    ("bench-kernels --sweep --json", ("--sweep", "--json")),
    ("data chek demo", ("No such command 'chek'", "check")),
    ("data check", ("Missing argument",)),
    ("data check photos --shots 0", ("--shots",)),
    ("data check photos --shots 1", ("shots",)),
    ("data check photos --seed -1", ("--seed",)),
    ("data check photos --seed 4294967296", ("--seed",)),
    ("data list demo", ("unexpected extra argument",)),
    ("methods lora", ("unexpected extra argument",)),
    ("trian", ("No such command 'trian'", "train")),
    ("--verbose", ("No such option: --verbose",)),
]


def test_conflicts_and_values_that_do_not_fit(refused):
    """What each value allows alone and the command does not: pairs, ranges that depend on the model, missing parts."""
    files: dict[str, str | bytes] = {"a.toml": "seed = 1\n", "bad.csv": "d,M\n64,x\n"}
    cases: list[Case] = []
    for text, words in CONFLICTS:
        own_data = text.startswith(("train --", "probe-id")) and "--data" not in text
        cases.append(([*text.split(" "), *(["--data", "photos"] if own_data else [])], words))
    refused(cases, keep=9, files=files)


def test_values_without_end(refused):
    """100,000 characters where a name, a list or a path is expected: refused in a line of readable length."""
    lists = ("compare --data photos --seeds", "probe-id --dims", "probe-id --groups", "bench-kernels --contenders")
    lists += ("bench-kernels --dtype", "bench-kernels --aot", "bench-kernels --shapes")
    names = ("data", "model", "method", "metric", "targets", "weights", "out", "config", "augment", "epochs", "lr")
    starts = [*lists, *(f"train --{name}" for name in names), "eval run --data", "predict run", "data check", "eval"]
    cases: list[Case] = [([*start.split(" "), LONG], ()) for start in starts]
    cases += [([*start.split(" "), "a," * 50_000], ()) for start in starts]
    cases += [([*start.split(" "), "x" * 5_000], ()) for start in starts if " run" not in start]
    refused(cases, keep=7)


def test_the_bounds_of_numbers_are_numbers():
    """The cases above come from the bounds that fields state: fields of whole numbers state both."""
    for name, field in TrainConfig.model_fields.items():
        if _kind(field.annotation) is int:
            values = [int(value) for value in _out_of_range(field)]
            assert min(values) < 1, name
            assert max(values) > 1, name
            assert all(math.isfinite(value) for value in values)
