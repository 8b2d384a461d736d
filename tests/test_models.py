"""Backbones: weights are what they are said to be, and every error says what to do."""

import copy
import json
import pickle
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from checks import randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kadapt_cli import models, runs
from kadapt_cli.errors import ModelError

SHARED = Path(__file__).parents[2] / "shared"
ORIGINAL = SHARED / "data" / "backbone" / "vit32.safetensors"
TASKS = SHARED / "data" / "tasks"


@pytest.mark.parametrize(
    ("name", "mean", "std", "size", "crop"),
    [
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224, 0.9),
        (
            "vit_xsmall_patch16_clip_224",
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
            224,
            0.9,
        ),
        ("vit_small_patch14_dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 518, 1.0),
        ("vit32", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 32, 1.0),
    ],
)
def test_the_data_config_is_the_models_own(name: str, mean: object, std: object, size: int, crop: float) -> None:
    config = models.load(name, pretrained=False).data_config
    assert (config["mean"], config["std"], config["input_size"]) == (mean, std, (3, size, size))
    assert (config["crop_pct"], config["interpolation"]) == (crop, "bicubic")


def test_another_image_size_reaches_the_model_and_the_data_config() -> None:
    backbone = models.load("vit_small_patch14_dinov2", pretrained=False, img_size=56)
    assert backbone.data_config["input_size"] == (3, 56, 56)
    assert backbone.model_args == {"img_size": 56}
    assert backbone.module(torch.zeros(1, 3, 56, 56)).shape == (1, 384)
    larger = models.load("vit32", img_size=64)
    assert larger.model_args == models.load("vit32").model_args | {"img_size": 64}
    assert larger.module(torch.zeros(1, 3, 64, 64)).shape == (1, 192)


def test_clip_keeps_its_projection_unless_it_was_fine_tuned_into_a_classifier(tmp_path: Path) -> None:
    tower = models.load("vit_xsmall_patch16_clip_224", pretrained=False)
    assert tower.projection
    assert (tower.tag, tower.feature_dim) == ("tinyclip_yfcc15m", tower.module.head.out_features)
    weight, bias = models.classifier_keys(tower)
    full = models.full_model(tower, 3)
    assert full.state_dict()[weight].shape == (3, tower.module.head.in_features)
    assert full.state_dict()[bias].shape == (3,)

    tuned = models.load("vit_base_patch32_clip_224.openai_ft_in1k", pretrained=False)
    assert (tuned.projection, tuned.feature_dim) == (False, 768)

    # A merged classifier with as many classes as the projection was wide is still a classifier.
    config = {"architecture": tower.architecture, "num_classes": 512, "label_names": [str(i) for i in range(512)]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"num_classes": 512}}))
    assert not models.load(f"local-dir:{tmp_path}", pretrained=False).projection


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = models.load("vit32", pretrained=False, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert models.load("vit32", pretrained=False, seed=1).digest == first.digest
    assert models.load("vit32", pretrained=False, seed=2).digest != first.digest


def test_the_digest_changes_with_one_value_and_not_with_a_reload(tmp_path: Path) -> None:
    backbone = models.load("vit32")
    assert models.load("vit32").digest == backbone.digest == runs.digest(backbone.module.state_dict())
    file = tmp_path / "weights.safetensors"
    state = backbone.module.state_dict()
    save_file(state, file)
    assert models.load("vit32", weights=file).digest == backbone.digest
    state["blocks.3.attn.proj.weight"][7, 5] += 1e-4
    save_file(state, file)
    assert models.load("vit32", weights=file).digest != backbone.digest


@pytest.mark.parametrize(("name", "size"), [("eva02_tiny_patch14_224", 28), ("vit_tiny_patch16_224", None)])
def test_weights_come_from_a_file_without_its_classifier(name: str, size: int | None, tmp_path: Path) -> None:
    complete = timm.create_model(name, num_classes=5, img_size=size or 224).eval()
    randomise(complete)
    save_file(complete.state_dict(), tmp_path / "weights.safetensors")
    loaded = models.load(name, weights=tmp_path / "weights.safetensors", img_size=size).module
    images = torch.randn(1, 3, size or 224, size or 224)
    expected = complete.forward_head(complete.forward_features(images), pre_logits=True)
    assert torch.equal(loaded(images), expected)


def test_position_tables_are_resized_only_when_a_size_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(models.load("vit32", img_size=40).module.state_dict(), file)
    assert models.load("vit32", weights=file, img_size=48).module.pos_embed.shape == (1, 145, 192)
    with pytest.raises(ModelError, match=r"pos_embed \(shape \(1, 101, 192\), expected \(1, 65, 192\)\)"):
        models.load("vit32", weights=file)


def test_a_complete_model_in_a_folder_loads_in_timm_and_in_kadapt(tmp_path: Path) -> None:
    backbone = models.load("vit32", img_size=48)
    complete = models.full_model(backbone, 7).eval()
    weight, bias = models.classifier_keys(backbone)
    assert (complete.state_dict()[weight].shape, complete.state_dict()[bias].shape) == ((7, 192), (7,))
    assert complete.pretrained_cfg["num_classes"] == 7
    save_file(complete.state_dict(), tmp_path / "model.safetensors")
    config = json.loads((models.BUNDLED / "config.json").read_text()) | {
        "num_classes": 7,
        "label_names": list("abcdefg"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": backbone.model_args}))
    images = torch.randn(2, 3, 48, 48)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), complete(images))
    loaded = models.load(f"local-dir:{tmp_path}")
    assert loaded.data_config["input_size"] == (3, 48, 48)
    assert (loaded.tag, loaded.license, loaded.architecture) == ("cifar10", "apache-2.0", "vit_tiny_patch16_224")
    assert torch.equal(complete.get_classifier()(loaded.module(images)), complete(images))


def real_images(count: int) -> Tensor:
    files = sorted(path for path in TASKS.rglob("*") if path.suffix in {".jpg", ".png", ".webp"})
    if not files:
        pytest.skip(f"needs the task images in {TASKS}")
    chosen = files[:: max(1, len(files) // count)][:count]
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in chosen]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(np.stack(pixels)).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def test_the_bundled_backbone_is_the_original_up_to_float16_rounding() -> None:
    if not ORIGINAL.is_file():
        pytest.skip(f"needs the float32 original {ORIGINAL}")
    original = load_file(ORIGINAL)
    bundled = timm.create_model(f"local-dir:{models.BUNDLED}", pretrained=True).eval()
    for key, tensor in bundled.state_dict().items():
        # Half a unit in the last of 11 significant bits; 2^-25 below the smallest normal float16.
        assert bool(((tensor - original[key]).abs() <= 2**-11 * original[key].abs() + 2**-25).all()), key
    exact = copy.deepcopy(bundled)
    exact.load_state_dict(original)
    images = real_images(64)
    with torch.inference_mode():
        difference = (bundled(images) - exact(images)).abs().max()
        features = models.load("vit32").module(images)
        assert torch.equal(bundled.head(features), bundled(images))
    assert 0 < difference < 0.01


class Unpickled:
    """A pickle of this leaves a file behind wherever it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_no_pickle_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    trace = tmp_path / "was-read"
    shutil.copy(models.BUNDLED / "config.json", tmp_path)
    for name in ("pytorch_model.bin", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Unpickled(trace)))
    with pytest.raises(ModelError, match="found 0 safetensors files; pickled weights"):
        models.load(f"local-dir:{tmp_path}")
    with pytest.raises(ModelError, match="no whole safetensors file"):
        models.load("vit32", weights=tmp_path / "pytorch_model.bin")
    shutil.copy(tmp_path / "model.pth", tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no whole safetensors file"):
        models.load(f"local-dir:{tmp_path}")
    assert not trace.exists()
    pickle.loads((tmp_path / "model.pth").read_bytes())
    assert trace.exists()  # the trap works


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "unknown model; did you mean vit_tiny_patch16_224, "),
        ({"name": "vit_tiny_patch16_224.openai"}, r"unknown model; did you mean vit_tiny_patch16_224\.augreg"),
        ({"name": "timm/vit_tiny_patch16_224"}, "give a folder as local-dir:DIR, a hub repository as hf-hub:REPO"),
        ({"name": "./"}, r"\./: a folder is given as local-dir:\./"),
        ({"name": "hub:vit"}, "unknown model; give a folder as local-dir:DIR"),
        ({"name": "local-dir:nowhere"}, "no config.json in nowhere; give a model folder as timm writes it"),
        ({"name": "hf-hub:a//b"}, "a//b: no valid name of a hub repository"),
        ({"name": "gcvit_base"}, "no safetensors weights for it; pass --weights FILE or --no-pretrained"),
        ({"name": "vit32", "img_size": 33}, "img_size = 33 is not a multiple of the patch, 4 pixels; give 32"),
        ({"name": "vit32", "img_size": 1}, "img_size = 1 is not a multiple of the patch, 4 pixels; give 4"),
        ({"name": "resnet18", "pretrained": False, "img_size": 64}, "timm cannot build it .*img_size"),
        ({"name": "vit32", "weights": Path("none.safetensors")}, "none.safetensors: cannot be read"),
        ({"name": "vit32", "weights": Path(".")}, "cannot be read .*give a safetensors file"),
    ],
)
def test_a_name_or_file_that_cannot_be_used_is_one_line_with_exit_code_4(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        models.load(**arguments)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def changed(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    if kind == "missing":
        return {key: value for key, value in state.items() if "norm1" not in key}
    if kind == "unexpected":
        return state | {"blocks.9.attn.qkv.weight": torch.zeros(3)}
    if kind == "shape":
        return state | {"patch_embed.proj.weight": torch.zeros(192, 3, 8, 8)}
    if kind == "nan":
        state["norm.weight"][3] = float("nan")
    if kind == "inf":
        state["norm.bias"][3] = float("-inf")
    return {} if kind == "empty" else state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"blocks.0.norm1.bias \(missing\), .*blocks.2.norm1.bias \(missing\) and 7 more; give"),
        ("unexpected", r"does not fit the model: blocks.9.attn.qkv.weight \(unexpected\); give"),
        ("shape", r"patch_embed.proj.weight \(shape \(192, 3, 8, 8\), expected \(192, 3, 4, 4\)\)"),
        ("nan", "not every weight is finite in norm.weight;"),
        ("inf", "not every weight is finite in norm.bias;"),
        ("empty", "holds no tensors"),
    ],
)
def test_weights_that_do_not_fit_are_named(kind: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(changed(models.load("vit32").module.state_dict(), kind), file)
    with pytest.raises(ModelError, match=message) as caught:
        models.load("vit32", weights=file)
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_cut_file_is_refused(size: int, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes((models.BUNDLED / "model.safetensors").read_bytes()[:size])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        models.load("vit32", weights=file)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"architecture": "no_such_model", "pretrained_cfg": {}}', "timm has no architecture 'no_such_model'"),
        ('{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"odd": 1}}', "odd"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"odd": 1}, "pretrained_cfg": {}}', "odd"),
        (
            '{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 3}, "pretrained_cfg": {}}',
            "timm cannot build",
        ),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    shutil.copy(models.BUNDLED / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        models.load(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_two_weight_files_need_a_name(tmp_path: Path) -> None:
    shutil.copy(models.BUNDLED / "config.json", tmp_path)
    for name in ("a", "b"):
        shutil.copy(models.BUNDLED / "model.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"expected model.safetensors in .*, found 2 safetensors files"):
        models.load(f"local-dir:{tmp_path}")
    (tmp_path / "a.safetensors").rename(tmp_path / "model.safetensors")
    assert models.load(f"local-dir:{tmp_path}").digest == models.load("vit32").digest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, with offline mode on."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_offline_names_the_repository_and_how_to_fetch_it(cache: Path) -> None:
    repo = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        models.load("vit_tiny_patch16_224")
    assert time.monotonic() - started < 5
    text = str(caught.value)
    assert text.startswith(f"{repo}: model.safetensors cannot be fetched (")
    assert text.endswith(
        f"on a connected machine run 'hf download {repo} config.json model.safetensors --local-dir DIR', then give"
        " --model local-dir:DIR or --weights DIR/model.safetensors"
    )
    assert "\n" not in text


def test_a_cached_repository_loads_offline(cache: Path) -> None:
    for repo in ("kadapt--vit32", "timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"):
        snapshot = cache / f"models--{repo}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        shutil.copy(models.BUNDLED / "config.json", snapshot)
        shutil.copy(models.BUNDLED / "model.safetensors", snapshot)
    assert models.load("hf-hub:kadapt/vit32").digest == models.load("vit32").digest
    assert models.load("hf-hub:kadapt/vit32@main").digest == models.load("vit32").digest

    random = models.load("vit_tiny_patch16_224", pretrained=False)
    state = random.module.state_dict() | {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    save_file(state, snapshot / "model.safetensors")
    assert models.load("vit_tiny_patch16_224").digest == random.digest
    save_file({key: value for key, value in state.items() if key != "norm.bias"}, snapshot / "model.safetensors")
    with pytest.raises(ModelError, match=r'timm cannot build it .*Missing key\(s\) in state_dict: "norm.bias"'):
        models.load("vit_tiny_patch16_224")


class NotFound(BaseHTTPRequestHandler):
    """Answers every question as the hub does for a file or a repository it does not have."""

    code = "EntryNotFound"

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", self.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing on stderr."""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("EntryNotFound", "has no model.safetensors, and pickled weights are never read; pass --weights FILE"),
        ("RepoNotFound", "not on the hub, or closed to you; check the name or run 'hf auth login'"),
        (None, "cannot be fetched .* on a connected machine run 'hf download timm/vit_tiny"),
    ],
)
def test_what_the_hub_answers_is_said_at_once(
    code: str | None, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HTTPServer(("127.0.0.1", 0), NotFound)
    url = f"http://127.0.0.1:{server.server_port}/file"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models.huggingface_hub, "hf_hub_url", lambda repo, filename, revision: url)
    if code is None:
        server.server_close()  # nobody listens: the connection is refused
    else:
        monkeypatch.setattr(NotFound, "code", code)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(ModelError, match=message) as caught:
        models.load("vit_tiny_patch16_224")
    assert time.monotonic() - started < 5
    assert str(caught.value).startswith("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k: ")
    if code is not None:
        server.shutdown()
        server.server_close()


def test_a_model_with_two_classifiers_has_no_classifier_keys() -> None:
    distilled = models.load("deit_tiny_distilled_patch16_224", pretrained=False)
    assert distilled.module(torch.zeros(1, 3, 224, 224)).shape == (1, distilled.feature_dim)
    with pytest.raises(ModelError, match="expected one classifier, it has head, head_dist"):
        models.classifier_keys(distilled)
