"""Backbones: segments are where they are said to be, replaced layers are called, and every error says what to do."""

import copy
import json
import pickle
import shutil
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from kadapt_cli import models, runs, surgery
from kadapt_cli.errors import ModelError

SHARED = Path(__file__).parents[2] / "shared"
ORIGINAL = SHARED / "data" / "backbone" / "vit32.safetensors"
TASKS = SHARED / "data" / "tasks"

# name, image size, feature width, attention width, blocks; base models see small images, to be quick
ZOO = [
    ("vit_tiny_patch16_224", 224, 192, 192, 12),
    ("vit_base_patch32_clip_quickgelu_224", 224, 512, 768, 12),
    ("vit_base_patch16_224.augreg_in21k", 64, 768, 768, 12),
    ("deit3_small_patch16_224", 224, 384, 384, 12),
    ("vit_small_patch14_dinov2", 224, 384, 384, 12),
    ("vit_base_patch16_siglip_224", 64, 768, 768, 12),
    ("eva02_tiny_patch14_224", 224, 192, 192, 12),
    ("beitv2_base_patch16_224", 64, 768, 768, 12),
    ("vit32", 32, 192, 192, 6),
]


class Shifted(nn.Module):
    """A frozen linear layer plus ``x @ shift.T`` on the rows from ``start``; as it was while ``shift`` is None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.shift: Tensor | None = None
        self.start = 0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = functional.linear(x, self.weight, self.bias)
        if self.shift is not None:
            y[..., self.start : self.start + len(self.shift)] += x @ self.shift.T
        return y


@dataclass
class Case:
    backbone: models.Backbone
    images: Tensor
    before: Tensor  # features before anything was replaced
    state: dict[str, Tensor]  # the state dict before anything was replaced
    segments: list[surgery.Segment]
    layers: dict[str, Shifted]  # by module path, in place of every layer that has a segment
    expected: tuple[int, int, int]  # feature width, attention width, blocks


def randomise(model: nn.Module) -> None:
    """Give biases and layer scales values that count: timm starts them at 0 and 1e-6, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            parameter.data.fill_(1.0)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.3, generator=generator)


@pytest.fixture(scope="module", params=ZOO, ids=lambda row: row[0])
def case(request: pytest.FixtureRequest) -> Case:
    name, size, *expected = request.param
    backbone = models.load(name, pretrained=False, img_size=size)
    randomise(backbone.module)
    for key, buffer in backbone.module.named_buffers():
        if key.endswith("k_bias"):
            buffer.normal_(0, 0.3)  # always zero in timm; a value shows that it is not mixed up with the others
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = backbone.module(images)
    state = backbone.module.state_dict()
    found = surgery.segments(backbone.module)
    paths = {segment.module for segment in found}
    layers = {path: surgery.replace_linear(backbone.module, path, Shifted) for path in paths}
    return Case(backbone, images, before, state, found, layers, tuple(expected))


def test_every_block_has_its_segments_in_order(case: Case) -> None:
    _, width, blocks = case.expected
    names = ("q", "k", "v", "proj", "fc1", "fc2")
    assert [(s.block, s.name) for s in case.segments] == [(b, n) for b in range(blocks) for n in names]
    for segment in case.segments:
        if segment.name in "qkv":
            start = {"q": 0, "k": width, "v": 2 * width}[segment.name]
            assert (segment.start, segment.stop, segment.in_features) == (start, start + width, width)
            assert segment.module == f"blocks.{segment.block}.attn.qkv"
            assert case.layers[segment.module].weight.shape == (3 * width, width)
        else:
            assert segment.module == f"blocks.{segment.block}.{segment.group}.{segment.name}"
            assert segment.start == 0
            assert case.layers[segment.module].weight.shape == (segment.stop, segment.in_features)
        assert segment.group == ("mlp" if segment.name.startswith("fc") else "attn")
    shapes = {s.name: (s.stop, s.in_features) for s in case.segments}
    hidden = shapes["fc2"][1]
    assert shapes["proj"] == (width, width)
    assert hidden > 2 * width
    assert shapes["fc1"] == (2 * hidden if "eva" in case.backbone.name else hidden, width)  # EVA: gate and value
    assert shapes["fc2"] == (width, hidden)


def test_the_bias_of_a_segment_is_the_one_its_rows_get(case: Case) -> None:
    for segment in case.segments[:6]:
        rows = case.layers[segment.module].bias[segment.start : segment.stop]
        if segment.bias is None:
            assert segment.name == "k"  # only EVA and BEiT, whose k bias is a constant
            assert "eva" in case.backbone.name or "beit" in case.backbone.name
        else:
            count = segment.stop - segment.start
            assert torch.equal(case.state[segment.bias][segment.bias_start : segment.bias_start + count], rows)


def test_an_identical_layer_leaves_the_features_equal(case: Case) -> None:
    with torch.inference_mode():
        after = case.backbone.module(case.images)
    assert case.before.shape == (2, case.expected[0]) == (2, case.backbone.feature_dim)
    torch.testing.assert_close(after, case.before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["q", "v", "proj", "fc1", "fc2"])
@pytest.mark.parametrize("block", [0, -1], ids=["first", "last"])
def test_a_changed_row_block_changes_the_features(case: Case, name: str, block: int) -> None:
    block %= case.expected[2]
    segment = next(s for s in case.segments if (s.block, s.name) == (block, name))
    layer = case.layers[segment.module]
    shape = (segment.stop - segment.start, segment.in_features)
    layer.shift, layer.start = torch.randn(shape, generator=torch.Generator().manual_seed(2)), segment.start
    with torch.inference_mode():
        changed = case.backbone.module(case.images)
    layer.shift = None
    assert (changed - case.before).norm() > 1e-4 * case.before.norm()  # an equal layer changes nothing


def test_a_backbone_is_frozen_float32_and_in_eval_mode(case: Case) -> None:
    module = case.backbone.module
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert not module.blocks[0].training


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beitv2_base_patch16_224"])
def test_plain_setattr_would_be_a_silent_no_op_in_eva_and_beit(name: str) -> None:
    """Why replace_linear takes the biases from the attention: with them it never calls its qkv module."""
    model = timm.create_model(name, depth=1, num_classes=0).eval()
    images = torch.randn(1, 3, 224, 224)
    before = model(images)
    attention = model.blocks[0].attn
    linear = attention.qkv
    attention.qkv = Shifted(linear.weight, None)
    attention.qkv.shift = torch.ones_like(linear.weight)
    assert torch.equal(model(images), before)
    assert attention.qkv.calls == 0
    attention.qkv = linear
    surgery.replace_linear(model, "blocks.0.attn.qkv", Shifted)
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert attention.qkv.calls == 1
    assert not {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} & model.state_dict().keys()


def test_separate_and_grouped_projections_are_segments_of_their_own() -> None:
    separate = timm.create_model("eva02_tiny_patch14_224", qkv_fused=False, depth=1, num_classes=0).eval()
    found = {s.name: s for s in surgery.segments(separate)[:3]}
    assert [s.module for s in found.values()] == [f"blocks.0.attn.{n}_proj" for n in "qkv"]
    assert [s.bias for s in found.values()] == ["blocks.0.attn.q_proj.bias", None, "blocks.0.attn.v_proj.bias"]
    assert {(s.start, s.stop, s.in_features) for s in found.values()} == {(0, 192, 192)}

    grouped = timm.create_model(
        "vit_small_patch16_dinov3",
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=2,
        depth=1,
        num_classes=0,
        qkv_bias=True,
    ).eval()
    found = {s.name: s for s in surgery.segments(grouped)[:3]}
    assert {name: (s.stop, s.in_features, s.bias) for name, s in found.items()} == {
        "q": (384, 384, "blocks.0.attn.q_proj.bias"),
        "k": (128, 384, "blocks.0.attn.k_proj.bias"),
        "v": (128, 384, "blocks.0.attn.v_proj.bias"),
    }
    randomise(grouped)
    images = torch.randn(1, 3, 64, 64)
    before = grouped(images)
    layer = surgery.replace_linear(grouped, found["v"].module, Shifted)
    torch.testing.assert_close(grouped(images), before, rtol=1e-5, atol=1e-5)
    layer.shift = 0.1 * torch.ones(128, 384)
    assert not torch.allclose(grouped(images), before, rtol=1e-3)


def test_a_swiglu_mlp_has_three_segments() -> None:
    model = timm.create_model("eva02_base_patch14_224", depth=1, num_classes=0)
    assert [
        (s.name, s.group, s.module, s.start, s.stop, s.in_features, s.bias) for s in surgery.segments(model)[3:]
    ] == [
        ("proj", "attn", "blocks.0.attn.proj", 0, 768, 768, "blocks.0.attn.proj.bias"),
        ("fc1_g", "mlp", "blocks.0.mlp.fc1_g", 0, 2048, 768, "blocks.0.mlp.fc1_g.bias"),
        ("fc1_x", "mlp", "blocks.0.mlp.fc1_x", 0, 2048, 768, "blocks.0.mlp.fc1_x.bias"),
        ("fc2", "mlp", "blocks.0.mlp.fc2", 0, 768, 2048, "blocks.0.mlp.fc2.bias"),
    ]


def test_what_is_no_plain_linear_is_left_out() -> None:
    class Quantized(nn.Linear):
        """A layer whose weight means something else."""

    module = timm.create_model("vit_tiny_patch16_224", depth=3)
    module.blocks[0].attn.proj = nn.Identity()
    module.blocks[0].mlp.fc2 = nn.Linear(768, 192, bias=False)
    module.blocks[1].mlp.fc1 = Quantized(192, 768)
    module.blocks[1].mlp.inner = nn.Sequential(nn.Linear(768, 768))
    del module.blocks[2].mlp
    found = [s for s in surgery.segments(module) if s.name not in "qkv"]
    assert [(s.block, s.name) for s in found] == [(0, "fc1"), (0, "fc2"), (1, "proj"), (1, "fc2"), (2, "proj")]
    assert [s.bias for s in found[:3]] == ["blocks.0.mlp.fc1.bias", None, "blocks.1.attn.proj.bias"]
    assert surgery.block_widths(module) == {0: 192, 1: 192, 2: 192}


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


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("blocks.0.attn.kv", "has no module 'blocks.0.attn.kv'"),
        ("blocks.0.attn", "'blocks.0.attn' is a Attention, not a plain Linear"),
        ("blocks.0.norm1", "is a LayerNorm"),
    ],
)
def test_replace_linear_refuses_what_is_no_linear_layer(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"^vit_tiny_patch16_224: .*{message}"):
        surgery.replace_linear(models.load("vit32").module, path, Shifted)


def test_replace_linear_refuses_a_bias_it_does_not_understand() -> None:
    parent = nn.Module()
    parent.qkv = nn.Linear(4, 12, bias=False)
    parent.qkv_bias = nn.Parameter(torch.zeros(12))
    with pytest.raises(ModelError, match="'qkv' may get its bias from qkv_bias"):
        surgery.replace_linear(parent, "qkv", Shifted)
    assert type(parent.qkv) is nn.Linear


def test_replace_linear_takes_other_layers_and_refuses_a_second_time() -> None:
    module = models.load("vit32").module
    images = torch.randn(1, 3, 32, 32)
    before = module(images)
    for path in ("blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"):
        layer = surgery.replace_linear(module, path, Shifted)
        assert module.get_submodule(path) is layer
    torch.testing.assert_close(module(images), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="is a Shifted, not a plain Linear"):
        surgery.replace_linear(module, "blocks.0.attn.proj", Shifted)


def test_segments_refuses_what_has_no_attention_it_knows() -> None:
    with pytest.raises(ModelError, match=r"^resnet18: has no list of transformer blocks") as caught:
        surgery.segments(models.load("resnet18", pretrained=False).module)
    assert caught.value.exit_code == 4
    mixer = timm.create_model("mixer_s32_224")
    with pytest.raises(ModelError, match=r"^mixer_s32_224: block 0 has no attention with a linear qkv"):
        surgery.segments(mixer)
    odd = nn.Module()
    odd.blocks = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"^Module: has no list of transformer blocks"):
        surgery.segments(odd)
    odd.blocks = nn.ModuleList([nn.Module()])
    odd.blocks[0].attn = nn.Module()
    odd.blocks[0].attn.qkv = nn.Linear(6, 20)  # grouped keys and values: not three equal parts
    with pytest.raises(ModelError, match=r"^Module: block 0 has no attention"):
        surgery.segments(odd)
    half = timm.create_model("eva02_tiny_patch14_224", qkv_fused=False, depth=1)
    half.blocks[0].attn.k_proj = nn.Identity()
    with pytest.raises(ModelError, match="block 0 has no attention"):
        surgery.segments(half)


def test_a_model_with_two_classifiers_has_no_classifier_keys() -> None:
    distilled = models.load("deit_tiny_distilled_patch16_224", pretrained=False)
    assert distilled.module(torch.zeros(1, 3, 224, 224)).shape == (1, distilled.feature_dim)
    with pytest.raises(ModelError, match="expected one classifier, it has head, head_dist"):
        models.classifier_keys(distilled)
