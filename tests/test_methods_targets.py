"""Targets beyond q and v: the attention's output and the MLP's layers, in every method, on models of different make."""

import copy
import re
from dataclasses import replace
from math import isqrt

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from kadapt_cli import train as training
from kadapt_cli.adapters import METHODS, adapt
from kadapt_cli.config import TrainConfig, resolve, to_toml
from kadapt_cli.evaluate import logits, open_run
from kadapt_cli.merge import merged_state
from kadapt_cli.models import full_model, load
from kadapt_cli.progress import Display
from kadapt_kernels import kron_linear
from kadapt_kernels.testing import Case, exact, failures, make, run

# fused qkv; layer scale; a projection; attention pooling; SwiGLU of one and of two first layers; biases beside qkv
MODELS = {"vit_tiny_patch16_224": 64, "deit3_small_patch16_224": 64, "vit_base_patch32_clip_quickgelu_224": 64}
MODELS |= {"vit_base_patch16_siglip_224": 64, "eva02_tiny_patch14_224": 56, "eva02_base_patch14_224": 56}
MODELS |= {"beitv2_base_patch16_224": 64}
NAMES = {"eva02_base_patch14_224": ("q", "k", "v", "proj", "fc1_g", "fc1_x", "fc2")}
USUAL = ("q", "k", "v", "proj", "fc1", "fc2")
ON_SEGMENTS = ("kadaptation", "kadaptation-full", "lora", "lokr")
ON_BLOCKS = ("adapter", "compacter", "bitfit", "layernorm", "attention", "vpt", "ssf", "full")
LABELS = torch.arange(3)


@pytest.fixture(scope="module", params=MODELS)
def plain(request):
    """A backbone of two blocks with random weights, images, and what it makes of them."""
    name = request.param
    backbone = load(name, pretrained=False, img_size=MODELS[name], seed=3)
    backbone = replace(backbone, model_args=backbone.model_args | {"depth": 2})
    backbone.module.blocks = backbone.module.blocks[:2]
    generator = torch.Generator().manual_seed(0)
    for key, parameter in backbone.module.named_parameters():
        if "gamma" in key:  # layer scales start at 1e-6 to 0.1, which would hide what the layers do
            parameter.data.fill_(0.5)
        elif "bias" in key:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    images = torch.randn(3, 3, MODELS[name], MODELS[name], generator=generator)
    with torch.no_grad():
        return backbone, images, backbone.module(images)


def fresh(plain, method, targets=("attn", "mlp"), **options):
    """The backbone adapted anew, with a head that passes gradients."""
    backbone, _, before = plain
    config = TrainConfig(model=backbone.name, method=method, targets=targets, seed=1, **options)
    adapted = adapt(replace(backbone, module=copy.deepcopy(backbone.module)), config, 3)
    adapted.head.start(before, LABELS)
    with torch.no_grad():
        noise = torch.randn(adapted.head.weight.shape, generator=torch.Generator().manual_seed(2))
        adapted.head.weight.add_(0.01 * noise)
    return adapted


def expected(state, method):
    """Trained numbers, told from the shapes of a state dict of two blocks."""
    found = [
        (key.split(".")[-2].removesuffix("_proj"), *tensor.shape)
        for key, tensor in state.items()
        if re.fullmatch(r"blocks\.\d\.(attn|mlp)\.\w+\.weight", key) and tensor.dim() == 2
    ]
    shapes = []
    for name, rows, columns in found:
        parts = [(part, rows // 3, columns) for part in "qkv"] if name == "qkv" else [(name, rows, columns)]
        shapes += parts
    if method == "lora":
        return sum(4 * (rows + columns) for _, rows, columns in shapes)
    if method == "lokr":
        total = 0
        for _, rows, columns in shapes:
            fitting = range(1, isqrt(min(rows, columns)) + 1)
            side = max(s for s in fitting if rows % s == 0 and columns % s == 0)
            total += side**2 + 4 * (rows // side + columns // side)
        return total
    rule = 32**3 if method == "kadaptation-full" else 2 * 32**2
    width = next(columns for name, _, columns in shapes if name == "q")
    rules = rule * len({name for name, _, _ in shapes})
    return rules + sum(rows + columns for _, rows, columns in shapes) + 2 * width


@pytest.mark.parametrize("method", ON_SEGMENTS)
def test_starts_equal_counts_is_alive_and_merges(plain, method):
    backbone, images, before = plain
    adapted = fresh(plain, method)
    names = NAMES.get(backbone.name, USUAL)
    assert [(s.block, s.name) for s in adapted.segments] == [(block, name) for block in (0, 1) for name in names]
    with torch.no_grad():
        assert torch.equal(adapted.backbone.module(images), before)
    base = backbone.module.state_dict()
    assert sum(p.numel() for p in adapted.adapter.values()) == expected(base, method)
    parameters = adapted.parameters()
    assert {id(p) for p in adapted.module().parameters() if p.requires_grad} == {id(p) for p in parameters.values()}

    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3)
    live = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(adapted.module()(images), LABELS).backward()
        for name, parameter in parameters.items():
            live[name] |= parameter.grad != 0
        optimizer.step()
    assert [name for name, mask in live.items() if not bool(mask.all())] == []

    plain_model = full_model(backbone, 3).eval()
    plain_model.load_state_dict(merged_state(adapted, base, torch.float32)[0], strict=True)
    with torch.no_grad():
        wanted, features = adapted.module()(images), adapted.backbone.module(images)
        assert (features - before).abs().max() > 1e-3 * before.abs().max(), "the adapter changes nothing"
        assert (plain_model(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("method", ON_SEGMENTS)
def test_a_segment_changes_its_own_weight_only(plain, method):
    """Each name alone, in the last block: merging moves the rows of that segment and nothing else."""
    backbone, images, before = plain
    base, generator = backbone.module.state_dict(), torch.Generator().manual_seed(5)
    for name in NAMES.get(backbone.name, USUAL)[3:]:
        adapted = fresh(plain, method, targets=(f"blocks.1.{name}",))
        assert {key for key in adapted.adapter if "bias" in key} == set()
        with torch.no_grad():  # rows unlike each other: a norm takes away what all have in common
            adapted.adapter[f"blocks.1.{name}.{'b' if method == 'lora' else 'u'}"].normal_(generator=generator)
            assert (adapted.backbone.module(images) - before).abs().max() > 1e-3 * before.abs().max()
        state, _ = merged_state(adapted, base, torch.float32)
        (segment,) = adapted.segments
        moved = {key for key in base if not torch.equal(state[key], base[key]) and not key.startswith("head.")}
        assert moved == {f"{segment.module}.weight"}
        assert bool((state[f"{segment.module}.weight"] != base[f"{segment.module}.weight"]).any(1).all())


@pytest.mark.parametrize("method", ON_BLOCKS)
def test_a_method_on_blocks_takes_the_blocks_of_any_target(plain, method):
    """The MLP's layers name a block as q does: the same tensors, with the same start."""
    for targets, same in ((("mlp",), ("q",)), (("blocks.1.fc2", "blocks.1.proj"), ("blocks.1.q",))):
        found, wanted = (fresh(plain, method, targets=t).adapter for t in (targets, same))
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_counts_on_vit_b_are_those_of_the_docstring():
    backbone = load("vit_base_patch32_clip_quickgelu_224", pretrained=False)
    adapted = adapt(backbone, TrainConfig(targets=("attn", "mlp")), 3)
    assert sum(p.numel() for p in adapted.adapter.values()) == 187_392
    assert "= 187,392 parameters" in METHODS["kadaptation"].__doc__


@pytest.mark.parametrize("backend", ["eager", "merge", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(Case(33, 48, 192, ((0, 16, 12, 3, 16, 1),)), id="fc1"),
        pytest.param(Case(33, 192, 48, ((0, 16, 3, 12, 16, 1),)), id="fc2"),
        pytest.param(Case(9, 32, 86, ((0, 2, 43, 16, 2, 2),)), id="fc1 of an odd width"),
        pytest.param(Case(9, 86, 32, ((0, 2, 16, 43, 2, 2),)), id="fc2 of an odd width"),
    ],
)
def test_every_backend_takes_a_whole_rectangular_layer(layer, dtype, backend):
    problem = make(layer, dtype)

    def apply(p):
        return kron_linear(
            p.x, p.weight, p.bias, p.factors, segments=p.segments, scale=p.scale, shifts=p.shifts, backend=backend
        )

    assert exact(problem).keys() == {"y", "dx", "dbias", "da0", "db0", "du0", "dv0"}
    assert failures(run(problem, apply), problem) == []


@pytest.mark.parametrize("method", ["kadaptation", "lora"])
def test_a_run_with_these_targets_is_read_again(method, tiny, tmp_path):
    targets, data = ("attn", "blocks.[45].mlp"), str(tiny.folder / "photos")
    config = TrainConfig(data=data, method=method, targets=targets, shots=3, epochs=1, batch_size=2, augment="none")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert resolve({}, tmp_path / "config.toml") == config
    training.train(config, tmp_path / "run", resume=False, display=Display(Console(stderr=True), quiet=True))
    first, second = (open_run(tmp_path / "run").adapted for _ in range(2))
    assert first.config.targets == config.targets
    assert len(first.segments) == 6 * 4 + 2 * 2
    assert resolve({}, tmp_path / "run" / "config.toml") == first.config
    assert all(bool((first.adapter[n] != 0).any()) for n in first.adapter), "saved before anything was trained"
    images = torch.utils.data.TensorDataset(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    answers = [logits(adapted.module(), images, torch.device("cpu"))[0] for adapted in (first, second)]
    assert torch.equal(*answers)
