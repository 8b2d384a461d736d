"""The commands as a user types them: results on stdout, words on stderr, exit codes, one-line errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
import typer
import yaml
from PIL import Image

from kadapt_cli import cli
from kadapt_kernels import blocks

FAST = ["--epochs", "2", "--batch-size", "16"]


@pytest.fixture(scope="module")
def trained(tasks, tmp_path_factory) -> Path:
    """A run on real flowers, made by the console script's module in a process of its own."""
    out = tmp_path_factory.mktemp("cli") / "r1"
    command = [sys.executable, "-m", "kadapt_cli", "train", "--data", str(tasks / "flowers5"), "--shots", "5", *FAST]
    done = subprocess.run([*command, "--out", str(out), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["data"] == {"name": "flowers5", "classes": 5, "train": 20, "val": 5, "test": 775}
    assert "epoch   1/2" in done.stderr
    return out


def refuse(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The command failed with this code and exactly one line, which holds the words, and printed no result."""
    got, out, err = result
    assert got == code, err
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("kadapt:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_quick_and_import_no_torch(option):
    script = (
        "import sys; sys.argv = ['kadapt', sys.argv[1]]\n"
        "from kadapt_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert not {'torch', 'timm', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    times = []
    for _ in range(3):
        before = os.times().children_user + os.times().children_system
        done = subprocess.run([sys.executable, "-c", script, option], capture_output=True, text=True, check=False)
        times.append(os.times().children_user + os.times().children_system - before)
        assert done.returncode == 0, done.stderr
    assert min(times) < 0.5
    assert ("merge-weights" if option == "--help" else "kadapt 0.") in done.stdout


def test_every_option_has_a_help_text(run_cli):
    for command in ("train", "eval", "predict", "merge-weights"):
        code, out, _ = run_cli(command, "--help")
        assert code == 0
        assert command in out
    for command in cli.app.registered_commands:
        signature = command.callback.__annotations__
        options = [a for name, a in signature.items() if name != "return" and a is not typer.Context]
        assert all(a.__metadata__[0].help for a in options)


def test_eval(run_cli, trained):
    code, out, _ = run_cli("eval", trained, "--json")
    found = json.loads(out)
    assert code == 0
    assert sum(row["n"] for row in found["per_class"]) == 775
    assert found["accuracy"]["low"] < found["accuracy"]["value"] < found["accuracy"]["high"]
    stored = json.loads((trained / "result.json").read_text())["metrics"]["test"]
    assert found["accuracy"]["value"] == pytest.approx(stored["accuracy"])
    assert found["balanced_accuracy"]["value"] == pytest.approx(stored["balanced_accuracy"])
    _, table, _ = run_cli("eval", trained, "--split", "val")
    assert "calibration" in table
    assert "sunflower" in table


def test_eval_of_a_split_that_is_empty(run_cli, photos, tmp_path):
    assert run_cli("train", "--data", photos, "--val", "none", "--out", tmp_path / "run", *FAST)[0] == 0
    refuse(run_cli("eval", tmp_path / "run", "--split", "val"), 3, "--split val", "train 24, test 6")


def test_eval_on_another_folder_uses_the_runs_classes(run_cli, trained, tasks, tmp_path):
    for name in ("tulip", "rose"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for photo in sorted((tasks / "flowers5" / name).iterdir())[:4]:
            shutil.copy(photo, tmp_path / "other" / name)
    code, out, _ = run_cli("eval", trained, "--data", tmp_path / "other", "--json")
    assert code == 0
    assert {row["name"]: row["n"] for row in json.loads(out)["per_class"]} == {
        "daisy": 0, "dandelion": 0, "rose": 4, "sunflower": 0, "tulip": 4,
    }  # fmt: skip
    (tmp_path / "other" / "orchid").mkdir()
    shutil.copy(photo, tmp_path / "other" / "orchid")
    refuse(run_cli("eval", trained, "--data", tmp_path / "other"), 3, "orchid")


def test_predict_keeps_the_order_given(run_cli, trained, tasks):
    photos = [*sorted((tasks / "flowers5" / "tulip").iterdir())[2:0:-1], tasks / "flowers5" / "rose"]
    code, out, _ = run_cli("predict", trained, *photos, "--top", 2, "--json")
    assert code == 0
    predictions = json.loads(out)["predictions"]
    assert [p["path"] for p in predictions[:2]] == [str(p) for p in photos[:2]]
    assert [p["path"] for p in predictions[2:]] == [str(p) for p in sorted(photos[2].iterdir())]
    for prediction in predictions:
        first, second = prediction["classes"]
        assert 1 >= first["probability"] >= second["probability"] >= 0
    _, words, _ = run_cli("predict", trained, photos[0], "--top", 99)
    assert words.count("%") == 5


def test_predict_agrees_with_eval(run_cli, trained, tasks):
    """The accuracy of predict's first class on the test images is the accuracy that eval prints."""
    _, out, _ = run_cli("predict", trained, tasks / "flowers5", "--top", 1, "--json")
    rows = (trained / "manifest.csv").read_text().splitlines()[1:]
    test = {
        str(tasks / "flowers5" / row.split(",")[0].strip('"')) for row in rows if '"test"' in row or ",test," in row
    }
    hits = [
        p["classes"][0]["name"] == Path(p["path"]).parent.name
        for p in json.loads(out)["predictions"]
        if p["path"] in test
    ]
    assert len(hits) == 775
    _, evaluated, _ = run_cli("eval", trained, "--json")
    assert np.mean(hits) == pytest.approx(json.loads(evaluated)["accuracy"]["value"], abs=2 / 775)


def test_merge_weights_loads_in_timm_and_transformers_and_agrees(run_cli, trained, tasks, tmp_path):
    import timm
    from transformers import AutoModelForImageClassification

    from kadapt_cli.evaluate import open_run
    from kadapt_cli.images import read_image
    from kadapt_cli.tensors import make_transform

    code, out, _ = run_cli("merge-weights", trained, "--out", tmp_path / "merged", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["max_difference"] < 1e-4
    assert result["images"] == 32
    run = open_run(trained)
    transform = make_transform(run.adapted.backbone.data_config, augment="none")
    photos = [p for name in run.classes for p in sorted((tasks / "flowers5" / name).iterdir())[:4]]
    images = torch.stack([transform(read_image(photo)) for photo in photos])
    merged = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    hf = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        wanted = run.adapted.module()(images)
        assert (merged(images) - wanted).abs().max() < 1e-4
        assert (hf(images).logits - wanted).abs().max() < 1e-4
    assert hf.config.id2label == dict(enumerate(run.classes))
    kept = timm.data.resolve_model_data_config(merged)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()} == run.adapted.backbone.data_config
    assert not list((tmp_path / "merged").glob("*.bin"))
    refuse(run_cli("merge-weights", trained, "--out", tmp_path / "merged"), 2, "--out", "already exists")


def test_a_run_can_start_from_a_merged_folder(run_cli, trained, tmp_path):
    """merge-weights writes what --model local-dir: takes."""
    assert run_cli("merge-weights", trained, "--out", tmp_path / "merged")[0] == 0
    code, out, _ = run_cli("train", "--model", f"local-dir:{tmp_path / 'merged'}", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["parameters"]["adapter"] == 9_856


def test_merge_into_bf16_prints_what_rounding_destroyed(run_cli, trained, tmp_path):
    code, out, _ = run_cli("merge-weights", trained, "--out", tmp_path / "merged", "--dtype", "bf16")
    assert code == 0
    assert "rounding to bf16 destroyed" in out
    assert "." in out.split("destroyed ")[1]


def test_merge_refuses_success_when_logits_differ(run_cli, trained, tmp_path, monkeypatch):
    from kadapt_cli import merge

    real = merge.merged_state

    def wrong(*arguments):
        state, loss = real(*arguments)
        return state | {"head.bias": state["head.bias"] + 2e-4}, loss

    monkeypatch.setattr(merge, "merged_state", wrong)
    refuse(
        run_cli("merge-weights", trained, "--out", tmp_path / "merged"),
        7,
        "differ by up to 2.0e-04",
        "nothing was written",
    )
    assert not (tmp_path / "merged").exists()


def test_of_two_merges_into_one_folder_the_first_to_end_has_it(run_cli, tiny, tmp_path, monkeypatch):
    from kadapt_cli import merge

    verify, out = merge._verify, tmp_path / "merged"

    def overtaken(*arguments):
        out.mkdir()
        (out / "config.json").write_text("the other's")
        return verify(*arguments)

    assert run_cli(*tiny.train, "--epochs", 1, "--out", tmp_path / "run")[0] == 0
    monkeypatch.setattr(merge, "_verify", overtaken)
    refuse(run_cli("merge-weights", tmp_path / "run", "--out", out), 2, f"--out: {out} was made by another process")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("config.json", "the other's")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


def test_the_card_of_a_merged_model_says_of_its_base_what_stands_there_and_no_more(run_cli, tiny, tmp_path):
    config = json.loads((tiny.folder / "model/config.json").read_text())
    shutil.copytree(tiny.folder / "model", tmp_path / "a\n# evil")
    config["pretrained_cfg"]["license"] = "mit\n---\n# evil"
    (tmp_path / "a\n# evil/config.json").write_text(json.dumps(config))
    model = f"local-dir:{tmp_path / 'a'}\n# evil"
    code, _, err = run_cli(*tiny.train, "--model", model, "--epochs", 1, "--out", tmp_path / "run")
    assert code == 0, err
    assert run_cli("merge-weights", tmp_path / "run", "--out", tmp_path / "merged")[0] == 0
    _, front, text = (tmp_path / "merged/README.md").read_text().split("---\n")
    expected = {"library_name": "timm", "pipeline_tag": "image-classification", "license": "mit\n---\n# evil"}
    assert yaml.safe_load(front) == expected
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# vit_tiny_patch16_224 adapted to 2 classes"]


def test_merge_is_also_called_merge(run_cli, trained, tmp_path):
    code, out, _ = run_cli("merge", trained, "--out", tmp_path / "m")
    assert code == 0
    assert "largest difference" in out


@pytest.mark.parametrize(("method", "merged"), [("kadaptation", True), ("adapter", False)])
def test_what_to_type_next(run_cli, tiny, tmp_path, method, merged):
    """Of a method that cannot be merged, nothing is said of merging."""
    code, out, _ = run_cli(*tiny.train, "--method", method, "--epochs", 1, "--out", tmp_path / "run")
    commands = [line.split() for line in out.partition("next:\n")[2].splitlines()]
    assert code == 0
    assert [words[1] for words in commands] == ["eval", "predict", *["merge-weights"] * merged]


def test_demo_dry_run(run_cli, tmp_path):
    code, out, _ = run_cli("train", "--dry-run", "--json", "--out", tmp_path / "run")
    result = json.loads(out)
    assert code == 0
    assert result["data"] == {"name": "demo", "classes": 10, "train": 80, "val": 20, "test": 1697}
    assert "metrics" not in result
    assert not (tmp_path / "run").exists()
    _, words, _ = run_cli("train", "--dry-run", "--out", tmp_path / "run")
    for part in ("nothing was written", "0, 1, 2, 3, 4 and 5 more", "9,856", "1,930", "MiB", str(tmp_path / "run")):
        assert part in words


def test_no_pretrained_says_so_loudly(run_cli, tmp_path):
    _, out, err = run_cli(
        "train", "--model", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", 32, "--dry-run", "--json"
    )
    assert "RANDOM weights" in err
    assert json.loads(out)["parameters"]["adapter"] == 15_616


WRONG = [
    (["--shots", "0"], 2, ["--shots", "greater than or equal to 1", "0"]),
    (["--lr", "-1"], 2, ["--lr", "greater than 0"]),
    (["--lr", "nan"], 2, ["--lr", "finite"]),
    (["--method", "lorra"], 2, ["--method", "lora"]),
    (["--targets", "fc3"], 2, ["--targets", "'fc3' matches nothing", "q, k, v, proj, fc1, fc2", "attn, mlp"]),
    (["--targets", ""], 2, ["--targets"]),
    (["--terms", "5"], 2, ["--terms", "192", "[1, 2, 3, 4, 6, 8"]),
    (["--model", "vit_tinny_patch16_224"], 4, ["vit_tinny_patch16_224", "vit_tiny_patch16_224"]),
    (["--model", "vit_tiny_patch16_224"], 4, ["vit_tiny_patch16_224", "hf download", "--weights"]),
    (["--weights", "/nonexistent.safetensors"], 4, ["/nonexistent.safetensors"]),
    (["--data", "/nonexistent"], 3, ["/nonexistent"]),
    (["--config", "/nonexistent.toml"], 2, ["/nonexistent.toml", "cannot be read"]),
    (["--resume"], 2, ["--resume", "--out"]),
    (["--device", "cuda"], 5, ["--device cuda", "no usable CUDA GPU"]),
    (["--backend", "triton"], 5, ["--backend triton cannot run", "a GPU, but the device is cpu", "--backend auto"]),
]


@pytest.mark.parametrize(
    ("options", "code", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_wrong_options(run_cli, tmp_path, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(blocks, "INTERPRETED", tl.constexpr(False))
    refuse(run_cli("train", *options), code, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3\n", ["unknown key 'epoch'", "did you mean 'epochs'"]),
        ("epochs = 'many'\n", ["epochs", "integer", "'many'"]),
        ("epochs = \n", ["not valid TOML"]),
    ],
)
def test_wrong_config_files(run_cli, tmp_path, text, words):
    (tmp_path / "run.toml").write_text(text)
    refuse(run_cli("train", "--config", tmp_path / "run.toml", "--out", tmp_path / "run"), 2, "run.toml", *words)
    assert not (tmp_path / "run").exists()


def test_an_option_beats_the_config_file(run_cli, tmp_path):
    (tmp_path / "run.toml").write_text("seed = 7\nshots = 3\n")
    _, out, _ = run_cli("train", "--config", tmp_path / "run.toml", "--shots", 6, "--dry-run", "--json")
    assert json.loads(out)["data"]["train"] == 50


def test_typer_usage_errors_exit_2(run_cli):
    assert run_cli("train", "--epochs", "x")[0] == 2
    assert run_cli("nonsense")[0] == 2


def test_bad_data_folders(run_cli, photos, tmp_path):
    (photos / "daisy" / "broken.jpg").write_bytes(b"")
    refuse(run_cli("train", "--data", photos, "--out", tmp_path / "run"), 3, "broken.jpg", "--skip-bad")
    code, _, err = run_cli("train", "--data", photos, "--skip-bad", "--dry-run", "--json")
    assert code == 0
    assert "broken.jpg" in err
    refuse(run_cli("train", "--data", photos, "--skip-bad", "--shots", 11), 3, "11", "rose")
    assert not (tmp_path / "run").exists()


def test_predict_bad_images(run_cli, trained, tasks, tmp_path):
    good = next((tasks / "flowers5" / "rose").iterdir())
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:500])
    Image.new("RGB", (4, 4)).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]
    )
    refuse(run_cli("predict", trained, good, tmp_path), 3, "2 of 3", "cut.jpg", "moving.gif", "--skip-bad")
    code, out, err = run_cli("predict", trained, good, tmp_path, "--skip-bad", "--json")
    assert code == 0
    assert [p["path"] for p in json.loads(out)["predictions"]] == [str(good)]
    assert "cut.jpg" in err
    refuse(run_cli("predict", trained, tmp_path / "nowhere.jpg"), 3, "nowhere.jpg")
    refuse(run_cli("predict", trained, good, "--top", 0), 2, "--top")


def test_commands_that_read_a_run_say_when_there_is_none(run_cli, tmp_path, tasks):
    for command in (["eval"], ["predict", tasks], ["merge-weights", "--out", tmp_path / "m"]):
        refuse(run_cli(command[0], tmp_path / "nothing", *command[1:]), 4, "nothing", "kadapt train")


def test_class_names_are_data_not_markup(run_cli, copy_photos, tmp_path):
    """Folders named like markup, an escape sequence or a formula train, evaluate and predict under their own names."""
    root = copy_photos(tmp_path / "photos", {"daisy": 8, "rose": 8})
    names = {"daisy": "[bold]=1+1", "rose": "ro\x1b[31mse"}
    for old, new in names.items():
        (root / old).rename(root / new)
    code, _, _ = run_cli("train", "--data", root, "--out", tmp_path / "run", *FAST)
    assert code == 0
    _, out, _ = run_cli("predict", tmp_path / "run", root / names["daisy"], "--top", 2)
    assert "[bold]=1+1" in out
    assert "\x1b" not in out
    _, out, _ = run_cli("eval", tmp_path / "run", "--json")
    assert [row["name"] for row in json.loads(out)["per_class"]] == sorted(names.values())
