"""KAdaptation on every supported model: equal at the start, alive, batch-invariant, and the same after merging."""

import copy
import re

import pytest
import timm
import torch
from torch.nn import functional as F

from kadapt_cli.adapters import Head, adapt, kadaptation, select
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.merge import merged_state
from kadapt_cli.models import full_model, load
from kadapt_cli.surgery import segments
from kadapt_kernels import ops

# name, image size (small where the model is large), adapter parameters
ZOO = [
    ("vit32", 32, 9_856),
    ("vit_tiny_patch16_224", 224, 15_616),
    ("vit_base_patch32_clip_quickgelu_224", 224, 50_176),
    ("vit_base_patch16_224.augreg_in21k", 64, 50_176),
    ("deit3_small_patch16_224", 224, 27_136),
    ("vit_small_patch14_dinov2", 224, 27_136),
    ("vit_base_patch16_siglip_224", 64, 50_176),
    ("eva02_tiny_patch14_224", 224, 15_616),
    ("beitv2_base_patch16_224", 64, 50_176),
]
CLASSES = 3


class Case:
    """A backbone with random weights, what it computed before it was adapted, and the adapted model."""

    def __init__(self, name: str, size: int, rule: str = "factored") -> None:
        self.config = TrainConfig(model=name, pretrained=name == "vit32", rule=rule, seed=1, scale=0.02)
        self.backbone = load(name, pretrained=name == "vit32", img_size=None if name == "vit32" else size, seed=3)
        for key, parameter in self.backbone.module.named_parameters():
            if "gamma" in key:  # layer scales start at 1e-6 to 0.1, which would hide what the layers do
                parameter.data.fill_(0.5)
            if key == "head.bias":  # a CLIP tower's frozen projection, which would start at zero
                parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
        self.images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.before = self.backbone.module(self.images)
        self.base = {key: tensor.clone() for key, tensor in self.backbone.module.state_dict().items()}
        self.adapted = adapt(self.backbone, self.config, CLASSES)
        self.adapted.head.start(self.before, torch.arange(3))
        with torch.no_grad():
            self.adapted.head.weight += 0.01 * torch.randn(self.adapted.head.weight.shape)
        self.start = {name: p.detach().clone() for name, p in self.adapted.parameters().items()}

    def reset(self) -> None:
        """Back to the start: the adapter as it was made."""
        with torch.no_grad():
            for name, tensor in self.start.items():
                self.adapted.parameters()[name].copy_(tensor)

    def move(self, std: float = 0.3) -> None:
        """Give every trainable tensor of the adapter some non-zero value, as training does."""
        self.reset()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.adapted.adapter.values():
                parameter += std * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module", params=ZOO, ids=[row[0] for row in ZOO])
def zoo(request):
    """One model at a time, shared by the tests; each calls `reset` or `move` first."""
    name, size, count = request.param
    return Case(name, size), count


def test_starts_equal_to_the_backbone_and_counts(zoo):
    case, count = zoo
    case.reset()
    with torch.no_grad():
        assert torch.equal(case.backbone.module(case.images), case.before)
    assert sum(p.numel() for p in case.adapted.adapter.values()) == count
    trainable = {id(p) for p in case.adapted.module().parameters() if p.requires_grad}
    assert trainable == {id(p) for p in case.adapted.parameters().values()}


def test_every_tensor_gets_gradient_by_the_second_step(zoo):
    case, _ = zoo
    case.reset()
    parameters = case.adapted.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-3)
    live = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(case.adapted.module()(case.images), torch.tensor([0, 1, 2])).backward()
        for name, parameter in parameters.items():
            live[name] |= parameter.grad != 0
        optimizer.step()
    assert {name: int(mask.sum()) for name, mask in live.items()} == {n: p.numel() for n, p in parameters.items()}


def test_does_not_depend_on_the_rest_of_the_batch(zoo):
    case, _ = zoo
    case.move()
    module = case.adapted.module()
    with torch.no_grad():
        whole = module(case.images)
        alone = torch.cat([module(image[None]) for image in case.images])
        reordered = module(case.images.flip(0)).flip(0)
        changed = case.backbone.module(case.images)
    scale = whole.abs().max()
    assert (whole - alone).abs().max() < 1e-4 * scale
    assert (whole - reordered).abs().max() < 1e-4 * scale
    assert (changed - case.before).abs().max() > 1e-3 * case.before.abs().max(), "the adapter changes nothing"


def test_merged_equals_adapted(zoo):
    case, _ = zoo
    case.move()
    state, loss = merged_state(case.adapted, case.base, torch.float32)
    plain = full_model(case.backbone, CLASSES).eval()
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        wanted, got = case.adapted.module()(case.images), plain(case.images)
    assert (wanted - got).abs().max() < 1e-4
    assert loss < 1e-5


def test_each_segment_alone_changes_the_output(zoo):
    """q and v of the first block, one at a time: no segment is a silent no-op, none lands on another's rows."""
    case, _ = zoo
    case.move()
    adapter = case.adapted.adapter
    saved = {name: parameter.detach().clone() for name, parameter in adapter.items()}
    with torch.device("meta"):
        found = segments(full_model(case.backbone, CLASSES))
    with torch.no_grad():
        for segment in ("q", "v"):
            for name, parameter in adapter.items():
                if name.endswith(".u") or ".bias" in name:
                    parameter.zero_()
            adapter[f"blocks.0.{segment}.u"].copy_(10 * saved[f"blocks.0.{segment}.u"])
            assert (case.backbone.module(case.images) - case.before).abs().max() > 1e-6
            state, _ = merged_state(case.adapted, case.base, torch.float32)
            moved = [s for s in found if not torch.equal(*rows(s, case.base, state))]
            assert [(s.block, s.name) for s in moved] == [(0, segment)]


def rows(segment, base, state):
    key = f"{segment.module}.weight"
    return base[key][segment.start : segment.stop], state[key][segment.start : segment.stop]


def test_vit_b_with_a_clip_head_has_55_306_parameters():
    backbone = load("vit_base_patch32_clip_quickgelu_224", pretrained=False)
    adapted = adapt(backbone, TrainConfig(), 10)
    assert sum(p.numel() for p in adapted.adapter.values()) == 50_176
    assert sum(p.numel() for p in adapted.parameters().values()) == 55_306


def test_full_rule_starts_equal_is_alive_and_merges():
    case = Case("vit32", 32, rule="full")
    with torch.no_grad():
        assert torch.equal(case.backbone.module(case.images), case.before)
    case.move(0.05)
    F.cross_entropy(case.adapted.module()(case.images), torch.tensor([0, 1, 2])).backward()
    assert all((p.grad != 0).any() for p in case.adapted.parameters().values())
    state, _ = merged_state(case.adapted, case.base, torch.float32)
    plain = full_model(case.backbone, CLASSES).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        assert (case.adapted.module()(case.images) - plain(case.images)).abs().max() < 1e-4


def test_rules_are_one_parameter_shared_by_all_blocks():
    case = Case("vit32", 32)
    shared = [n for n in case.adapted.adapter if n.startswith("rule.")]
    assert shared == ["rule.q.a", "rule.q.b", "rule.v.a", "rule.v.b"]
    used = [block.attn.qkv.factors[0].a for block in case.backbone.module.blocks]
    assert all(a is case.adapted.adapter["rule.q.a"] for a in used)


def test_both_factors_at_zero_would_never_learn():
    """The released reference code's start, for which the liveness check exists: no gradient, ever."""
    case = Case("vit32", 32)
    with torch.no_grad():
        for name, parameter in case.adapted.adapter.items():
            if name.endswith((".u", ".v")):
                parameter.zero_()
    F.cross_entropy(case.adapted.module()(case.images), torch.tensor([0, 1, 2])).backward()
    dead = [name for name, p in case.adapted.adapter.items() if not (p.grad != 0).any()]
    assert len(dead) == 4 + 6 * 4


def test_merging_into_bf16_says_how_much_it_destroys():
    case = Case("vit32", 32)
    case.move(0.01)
    _, exact = merged_state(case.adapted, case.base, torch.float32)
    _, rounded = merged_state(case.adapted, case.base, torch.bfloat16)
    assert exact < 1e-4 < 1e-2 < rounded


def test_autocast_keeps_factor_gradients_in_fp32():
    case = Case("vit32", 32)
    case.move(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.adapted.module()(case.images)
    F.cross_entropy(out, torch.tensor([0, 1, 2])).backward()
    with torch.no_grad():
        exact = case.adapted.module()(case.images)
    assert all(p.grad.dtype == torch.float32 for p in case.adapted.parameters().values())
    assert 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()


def test_key_segments_get_no_bias():
    backbone = load("vit32")
    adapted = adapt(backbone, TrainConfig(targets=("k",)), 3)
    assert not [name for name in adapted.adapter if "bias" in name]


def test_terms_and_scale_are_filled_in():
    available = segments(load("vit32").module)
    resolved = kadaptation.resolve(TrainConfig(), available)
    assert (resolved.terms, resolved.scale) == (32, pytest.approx(14 / 192**0.5))
    given = TrainConfig(terms=16, rank=1, scale=0.5, lr=2e-3)
    assert kadaptation.resolve(given, available) == given
    for targets, widths in ((["q", "v"], "width 192"), (["q", "fc2"], "widths 192, 768")):
        message = f"--terms: T must divide the {widths}, but 5 was given; choose from [1, 2"
        with pytest.raises(UsageError, match=re.escape(message)):
            kadaptation.resolve(TrainConfig(terms=5), select(available, targets))
    for targets, columns in ((["fc2"], 768), (["blocks.0.fc2", "blocks.1.q"], 192)):
        scale = kadaptation.resolve(TrainConfig(), select(available, targets)).scale
        assert scale == pytest.approx(14 / columns**0.5)


def test_backend_reaches_every_adapted_layer(monkeypatch):
    asked = []
    choose = ops.choose
    monkeypatch.setattr(ops, "choose", lambda *args: asked.append(args[3]) or choose(*args))
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for backend in ("eager", "merge"):
        adapted = adapt(load("vit32"), TrainConfig(backend=backend), 3)
        with torch.no_grad():
            for name, parameter in adapted.adapter.items():
                if name.endswith(".u"):
                    parameter.fill_(0.1)
            outputs.append(adapted.backbone.module(images))
    assert asked == ["eager"] * 6 + ["merge"] * 6
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton", "rank": 3}, "T·r up to 64, but --terms 32 and --rank 3 make 96; use --backend auto"),
        ({"backend": "triton", "rule": "full"}, "--backend triton takes --rule factored; use --backend merge or auto"),
        ({"backend": "eager", "rule": "full"}, "--backend eager takes --rule factored"),
    ],
)
def test_a_backend_that_does_not_take_the_shape_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        kadaptation.resolve(TrainConfig(**options), segments(load("vit32").module))


def test_select():
    available = segments(load("vit32").module)
    assert {(s.block, s.name) for s in select(available, ["blocks.0.*", "v"])} == {
        *((0, name) for name in ("q", "k", "v", "proj", "fc1", "fc2")),
        *((block, "v") for block in range(6)),
    }
    assert [s.name for s in select(available, ["blocks.2.fc1", "blocks.2.v"])] == ["v", "fc1"]  # in the model's order
    message = (
        "--targets: 'fc3' matches nothing; this model has q, k, v, proj, fc1, fc2 and the groups attn, mlp in blocks "
        "0 to 5 (blocks.0.q, blocks.0.attn, …)"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        select(available, ["q", "fc3"])
    for pattern in ("blocks.6", "blocks", "blocks.0.", "Q", "blocks.0.attn.q", ""):
        with pytest.raises(UsageError, match=f"'{re.escape(pattern)}' matches nothing"):
            select(available, [pattern])


ATTN, MLP = ("q", "k", "v", "proj"), ("fc1", "fc2")


@pytest.mark.parametrize(
    ("pattern", "blocks", "names"),
    [
        ("attn", range(12), ATTN),
        ("mlp", range(12), MLP),
        ("fc*", range(12), MLP),
        ("proj", range(12), ("proj",)),
        ("*", range(12), ATTN + MLP),
        ("blocks.1", [1], ATTN + MLP),  # and not blocks 10 and 11
        ("blocks.1.*", [1], ATTN + MLP),
        ("blocks.1*", [1, 10, 11], ATTN + MLP),
        ("blocks.1?", [10, 11], ATTN + MLP),
        ("blocks.1.mlp", [1], MLP),
        ("blocks.[0-2].attn", [0, 1, 2], ATTN),
        ("blocks.[0-2]", [0, 1, 2], ATTN + MLP),
        ("*.attn", range(12), ATTN),
        ("blocks.1.[!qk]*", [1], ("v", "proj", "fc1", "fc2")),  # q is in attn, but a name fits before a group does
    ],
)
def test_what_a_glob_takes_of_twelve_blocks(pattern, blocks, names):
    available = segments(timm.create_model("vit_tiny_patch16_224"))
    assert [(s.block, s.name) for s in select(available, [pattern])] == [(b, n) for b in blocks for n in names]


def test_head_constants_fold_into_the_weight():
    features = 5 + 3 * torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    head = Head(7, 4)
    head.start(features, torch.arange(40) % 4)
    weight, bias = head.folded()
    with torch.no_grad():
        torch.testing.assert_close(
            head(features).double(), F.linear(features.double(), weight, bias), rtol=0, atol=1e-5
        )
        assert (head(features).argmax(1) == torch.arange(40) % 4).double().mean() > 0.5


def test_trained_parameters_are_those_of_the_published_table():
    """On CLIP ViT-B/32 with the average head of the 20 sets, 513 · 1151/20; compacter's rule of 64 is trained here."""
    backbone = load("vit_base_patch32_clip_quickgelu_224", pretrained=False)
    head = (backbone.feature_dim + 1) * 1151 / 20
    found = {}
    for method in ("kadaptation", "kadaptation-full", "lora", "adapter", "compacter", "full", "linear"):
        adapted = adapt(copy.deepcopy(backbone), TrainConfig(method=method), 2)
        found[method] = int(head + sum(p.numel() for p in adapted.adapter.values()))
    assert found == {
        "kadaptation": 79_699,
        "kadaptation-full": 141_139,
        "lora": 176_979,
        "adapter": 1_237_587,
        "compacter": 77_907 + 64,
        "full": 87_878_739,
        "linear": 29_523,
    }


@pytest.mark.parametrize(
    ("targets", "lr"),
    [(("q", "v"), 4e-3), (("q",), 4e-3), (("attn",), 1e-3), (("attn", "mlp"), 1e-3), (("blocks.[01].mlp",), 4e-3)],
)
def test_the_rate_is_lower_with_many_segments_a_block(targets, lr):
    assert adapt(load("vit32"), TrainConfig(targets=targets), 3).config.lr == pytest.approx(lr)
    assert adapt(load("vit32"), TrainConfig(targets=targets, lr=0.1), 3).config.lr == 0.1
