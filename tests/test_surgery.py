"""Inside a transformer: segments are where they are said to be, and replaced layers are called."""

from dataclasses import dataclass

import pytest
import timm
import torch
from checks import randomise
from torch import Tensor, nn
from torch.nn import functional

from kadapt_cli import models, surgery
from kadapt_cli.errors import ModelError

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
