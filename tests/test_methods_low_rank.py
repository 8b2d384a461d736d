"""lora, lokr, adapter and compacter: counts, equal at the start, alive, batch-invariant, in the right place, merged."""

import copy
import dataclasses
import functools
import re

import pytest
import torch
from torch.nn import functional as F

from kadapt_cli.adapters import METHODS, adapt, compacter, lokr, lora
from kadapt_cli.adapters.adapter import Bottleneck
from kadapt_cli.adapters.compacter import KronBottleneck
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.merge import merged_state
from kadapt_cli.models import Backbone, full_model, load
from kadapt_cli.surgery import segments

METHODS_HERE = ("lora", "lokr", "adapter", "compacter")
CLIP = "vit_base_patch32_clip_quickgelu_224"
BEIT = "beitv2_base_patch16_224"
# fused qkv; separate projections; biases beside a fused qkv; a CLIP tower with its projection
SIZES = {"vit32": 32, "eva02_tiny_patch14_224": 56, BEIT: 64, CLIP: 64}
MODELS = [pytest.param(name, marks=pytest.mark.slow) if name in (BEIT, CLIP) else name for name in SIZES]
AVERAGE_HEAD = 513 * 1151 / 20  # parameters; mean over the 20 few-shot sets of ELEVATER


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def untouched(name: str) -> Backbone:
    """The backbone, built once."""
    backbone = load(name, pretrained=name == "vit32", img_size=None if name == "vit32" else SIZES[name], seed=3)
    for key, parameter in backbone.module.named_parameters():
        if "gamma" in key:  # layer scales start at 1e-6 to 0.1, which would hide what the layers do
            parameter.data.fill_(0.5)
    return backbone


class Case:
    """A backbone before and after it was adapted, and images for it."""

    def __init__(self, method: str, name: str = "vit32", **options) -> None:
        self.plain = untouched(name).module
        self.images = random(3, 3, SIZES[name], SIZES[name])
        self.module = copy.deepcopy(self.plain)
        backbone = dataclasses.replace(untouched(name), module=self.module)
        self.adapted = adapt(backbone, TrainConfig(model=name, method=method, seed=1, **options), 3)

    def move(self) -> "Case":
        """Give every trainable tensor some other value, as training does."""
        with torch.no_grad():
            for i, parameter in enumerate(self.adapted.adapter.values()):
                parameter += 0.1 * random(*parameter.shape, seed=10 + i)
        return self


COUNTS = {"lora": (147_456, 176_979), "lokr": (19_968, 49_491)}
COUNTS |= {"adapter": (1_208_064, 1_237_587), "compacter": (48_448, 77_971)}


@pytest.mark.parametrize("method", METHODS_HERE)
def test_parameters_on_vit_b(method):
    adapted = Case(method, CLIP).adapted
    count = sum(p.numel() for p in adapted.adapter.values())
    assert (count, int(count + AVERAGE_HEAD)) == COUNTS[method]
    assert sum(p.numel() for p in adapted.parameters().values()) == count + 513 * 3
    trained = {id(p) for p in adapted.module().parameters() if p.requires_grad}  # compacter's rule once
    assert trained == {id(p) for p in adapted.parameters().values()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS_HERE)
def test_starts_equal_is_alive_and_batch_invariant(method, model):
    case = Case(method, model)
    with torch.no_grad():
        features = case.plain(case.images)
        assert torch.equal(case.module(case.images), features)
    case.adapted.head.start(features, torch.arange(3))
    parameters = case.adapted.parameters()
    live = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(case.adapted.module()(case.images), torch.tensor([0, 1, 2])).backward()
        for name, parameter in parameters.items():
            live[name] |= parameter.grad != 0
        optimizer.step()
    share = 0.5 if method == "adapter" else 1  # a ReLU may be off for all three images
    assert [name for name, mask in live.items() if mask.double().mean() < share] == []
    with torch.no_grad():
        together = case.module(case.images)
        alone = torch.cat([case.module(image[None]) for image in case.images])
    assert (together - features).abs().max() > 1e-3 * features.abs().max(), "training changes nothing"
    assert (together - alone).abs().max() < 1e-4 * together.abs().max()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["lora", "lokr"])
def test_merged_equals_adapted(method, model):
    case = Case(method, model).move()
    with torch.no_grad():
        case.adapted.head.weight += random(*case.adapted.head.weight.shape)
        state, _ = merged_state(case.adapted, case.plain.state_dict(), torch.float32)
        merged = full_model(case.adapted.backbone, 3).eval()
        merged.load_state_dict(state, strict=True)
        wanted, before = case.adapted.module()(case.images), case.adapted.head(case.plain(case.images))
        got = merged(case.images)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (got - before).abs().max() > 1e-2 * wanted.abs().max(), "the adapter changes nothing"


@pytest.mark.parametrize("method", ["lora", "lokr"])
@pytest.mark.parametrize("name", "qv")
def test_a_segment_changes_its_own_rows_only(method, name):
    case = Case(method)
    with torch.no_grad():
        case.adapted.adapter[f"blocks.0.{name}.{'b' if method == 'lora' else 'u'}"].fill_(0.1)
        frozen, layer = case.plain.blocks[0].attn.qkv, case.module.blocks[0].attn.qkv
        x = random(2, 5, 192)
        moved = (layer(x) - frozen(x)).abs().amax((0, 1)).split(192)
        assert (case.module(case.images) - case.plain(case.images)).abs().max() > 1e-3
    for part, change in zip("qkv", moved, strict=True):
        assert bool((change > 0).all()) if part == name else bool((change == 0).all())


@pytest.mark.parametrize("method", METHODS_HERE)
def test_autocast_keeps_gradients_in_fp32(method):
    case = Case(method).move()
    exact = case.module(case.images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = case.module(case.images)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in case.adapted.adapter.values())
    assert 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()


def test_lora_is_the_formula_in_float64():
    layer = lora.LoraLinear(random(7, 6).double(), random(7, seed=1).double(), 0.7)
    layer.rows = [(4, 6), (0, 3)]
    layer.a.extend([random(2, 6, seed=2).double(), random(2, 6, seed=3).double()])
    layer.b.extend([random(2, 2, seed=4).double(), random(3, 2, seed=5).double()])
    x = random(2, 3, 6, seed=6).double().requires_grad_()
    weight = layer.weight.detach().clone()
    for (start, stop), a, b in zip(layer.rows, layer.a, layer.b, strict=True):
        weight[start:stop] += 0.7 * b.detach() @ a.detach()
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: layer(t[0]), (x, *layer.a, *layer.b))


def kron_sum(layer: compacter.KronSum) -> torch.Tensor:
    return sum(torch.kron(layer.rule[t], torch.outer(layer.u[t], layer.v[t])) for t in range(4))


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_bottleneck_is_the_formula_in_float64(method):
    rule = torch.nn.Parameter(random(4, 4, 4))
    sizes = (12, 8, torch.Generator())
    module = (Bottleneck(*sizes) if method == "adapter" else KronBottleneck(rule, *sizes)).double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i))
        down, up = (kron_sum(m) if method == "compacter" else m.weight for m in (module.down, module.up))
        assert (down.shape, up.shape) == ((8, 12), (12, 8))
        h = random(2, 3, 12, seed=9).double()
        centred = h - h.mean(-1, keepdim=True)
        z = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight + module.norm.bias
        z = z @ down.T + module.down.bias
        z = z.clamp(min=0) if method == "adapter" else 0.5 * z * (1 + torch.erf(z / 2**0.5))
        torch.testing.assert_close(module(h), h + z @ up.T + module.up.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_bottleneck_sits_between_the_mlp_and_layer_scale(method):
    """A constant added to the MLP's output reaches the block's output through layer scale and nothing else."""
    case = Case(method, BEIT, targets=("blocks.3.q", "blocks.5.v"))
    assert {name.split(".")[1] for name in case.adapted.adapter if name != "rule"} == {"3", "5"}
    x, constant = random(2, 17, 768), random(768, seed=1)
    with torch.no_grad():
        case.adapted.adapter[f"blocks.3.{method}.up.bias"].copy_(constant)
        change = case.module.blocks[3](x) - case.plain.blocks[3](x)
    torch.testing.assert_close(change, (0.5 * constant).expand_as(change), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_what_cannot_be_merged_says_so(method):
    assert re.match("its layers have a (ReLU|GELU) between them", METHODS[method].UNMERGED)
    assert not hasattr(METHODS[method], "merge")


def test_options_are_filled_in_and_checked():
    available = segments(load("vit32").module)
    assert lora.resolve(TrainConfig(), available) == TrainConfig(rank=4, scale=4.0)
    assert lokr.resolve(TrainConfig(rank=2, scale=0.5), available) == TrainConfig(rank=2, scale=0.5)
    assert compacter.resolve(TrainConfig(width=8), available).width == 8
    with pytest.raises(UsageError, match="--width: compacter takes a multiple of 4, but 6 was given"):
        compacter.resolve(TrainConfig(width=6), available)
    with pytest.raises(UsageError, match="--backend eager takes factored rules, but lokr's W1 is full"):
        lokr.resolve(TrainConfig(backend="eager"), available)
