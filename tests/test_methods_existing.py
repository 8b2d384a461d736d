"""Methods that train what the backbone has or stand beside its layers, each on six models of different make."""

import copy
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from timm.models import beit
from torch.nn import functional as F

from kadapt_cli.adapters import METHODS, adapt, linear
from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.merge import merged_state
from kadapt_cli.models import full_model, load

NAMES = ("full", "linear", "bitfit", "layernorm", "attention", "ssf", "vpt")
CLIP = "vit_base_patch32_clip_quickgelu_224"
MODELS = {"vit32": 32, "eva02_tiny_patch14_224": 56, "beitv2_base_patch16_224": 64, "deit3_small_patch16_224": 64}
MODELS |= {"vit_base_patch16_siglip_224": 64, CLIP: 64}
LABELS = torch.arange(3)


@pytest.fixture(scope="module", params=MODELS)
def plain(request):
    """A backbone of two blocks, where every bias and layer scale matters, images, and what it makes of them."""
    name = request.param
    backbone = load(name, pretrained=name == "vit32", img_size=MODELS[name], seed=3)
    backbone = replace(backbone, model_args=backbone.model_args | {"depth": 2})
    backbone.module.blocks = backbone.module.blocks[:2]
    generator = torch.Generator().manual_seed(0)
    for key, parameter in backbone.module.named_parameters():
        if "gamma" in key:
            parameter.data.fill_(0.5)
        elif "bias" in key:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    images = torch.randn(3, 3, MODELS[name], MODELS[name], generator=generator)
    with torch.no_grad():
        return backbone, images, backbone.module(images)


def fresh(plain, method, moved=False, targets=("q", "v")):
    """The backbone adapted anew; with ``moved`` every trained tensor has left its start."""
    backbone, _, before = plain
    config = TrainConfig(model=backbone.name, method=method, targets=targets, seed=1)
    adapted = adapt(replace(backbone, module=copy.deepcopy(backbone.module)), config, 3)
    adapted.head.start(before, LABELS)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        adapted.head.weight.add_(0.01 * torch.randn(adapted.head.weight.shape, generator=generator))
        for parameter in adapted.adapter.values() if moved else ():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return adapted


def expected(state, method):
    """Trained numbers of a backbone of two blocks, told from the names and shapes of its state dict."""
    own = {key: tensor for key, tensor in state.items() if key != "head.bias"}
    bias = {key for key in own if key.endswith("bias")}
    if method == "ssf":
        return sum(len(own[key]) for key in bias | {key for key in own if key.endswith(".weight")})
    if method == "vpt":
        return 2 * 10 * len(own["patch_embed.proj.weight"])
    norms = {key for key in own if "norm" in key.rpartition(".")[0].rpartition(".")[2]}
    attention = {key for key in own if ".attn." in key}
    chosen = {"full": own, "linear": {}, "bitfit": bias, "layernorm": norms, "attention": attention}[method]
    return sum(own[key].numel() for key in chosen)


@pytest.mark.parametrize("method", NAMES)
def test_starts_equal_and_counts(plain, method):
    backbone, images, before = plain
    adapted = fresh(plain, method)
    with torch.no_grad():
        same = torch.equal(adapted.backbone.module(images), before)
    assert same == (method != "vpt")
    assert sum(p.numel() for p in adapted.adapter.values()) == expected(backbone.module.state_dict(), method)
    trainable = {id(p) for p in adapted.module().parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapted.parameters().values()}


@pytest.mark.parametrize("method", NAMES)
def test_every_tensor_is_alive_by_the_third_step(plain, method):
    """Most of each: k biases get rounding noise, relative positions of the class token in BEiT's last block nothing."""
    adapted = fresh(plain, method)
    optimizer = torch.optim.SGD(adapted.parameters().values(), lr=1e-3)
    live = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in adapted.parameters().items()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(adapted.module()(plain[1]), LABELS).backward()
        for name, parameter in adapted.parameters().items():
            live[name] |= parameter.grad.abs() > 1e-5 * parameter.grad.abs().max()
        optimizer.step()
    assert not [name for name, mask in live.items() if mask.double().mean() <= (0.4 if ".kv." in name else 0.6)]


@pytest.mark.parametrize("method", [name for name in NAMES if name != "linear"])
def test_moves_alone_as_in_a_batch_and_merges(plain, method):
    backbone, images, before = plain
    adapted = fresh(plain, method, moved=True)
    module = adapted.module()
    with torch.no_grad():
        whole, changed = module(images), adapted.backbone.module(images)
        alone = torch.cat([module(image[None]) for image in images])
        assert (changed - before).abs().max() > 1e-2 * before.abs().max()
        assert (whole - alone).abs().max() < 1e-4 * whole.abs().max()
        if METHODS[method].UNMERGED:
            with pytest.raises(UsageError, match="vpt cannot be merged: its prompts are further tokens"):
                merged_state(adapted, backbone.module.state_dict(), torch.float32)
            return
        again = full_model(backbone, 3).eval()
        again.load_state_dict(merged_state(adapted, backbone.module.state_dict(), torch.float32)[0], strict=True)
        assert (again(images) - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("method", [name for name in NAMES if name != "linear"])
def test_targets_choose_the_blocks_and_what_is_next_to_them(plain, method):
    before = {"cls_token", "pos_embed", "patch_embed", "norm_pre"}
    for block, beside in ((0, before), (1, {"norm", "fc_norm", "attn_pool", "head"})):
        names = fresh(plain, method, targets=(f"blocks.{block}.*",)).adapter
        assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {str(block)}
        outside = {name.split(".")[0] for name in names} - {"blocks"}
        assert outside <= beside
        bare = method in ("vpt", "attention") or (method == "layernorm" and block == 0 and plain[0].name != CLIP)
        assert bool(outside) != bare


def test_prompts_stand_outside_the_image(plain):
    """A prompted block is the plain block with the prompts behind its tokens, where no position reaches them."""
    backbone, images, _ = plain
    adapted = fresh(plain, "vpt", moved=True)
    caught = []
    hook = adapted.backbone.module.blocks[0].register_forward_hook(
        lambda module, args, kwargs, out: caught.append((args[0], kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        adapted.backbone.module(images)
        hook.remove()
        (x, kwargs, out), block = caught[0], copy.deepcopy(backbone.module.blocks[0])
        if kwargs.get("rope") is not None:
            sin, cos = kwargs["rope"][:10].chunk(2, -1)
            still = torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], -1)
            kwargs["rope"] = torch.cat([kwargs["rope"], still])
        if "shared_rel_pos_bias" in kwargs:
            kwargs["shared_rel_pos_bias"] = F.pad(block.attn._get_rel_pos_bias(), (0, 10, 0, 10))
            block.attn.relative_position_bias_table = None
        prompts = adapted.adapter["blocks.0.prompts"].expand(3, -1, -1)
        torch.testing.assert_close(block(torch.cat([x, prompts], 1), **kwargs)[:, :-10], out, rtol=1e-4, atol=1e-5)


def test_prompts_shift_a_shared_position_bias_too():
    """BEiT models that share one relative position bias hand it to every block."""
    block = beit.Block(64, 4).eval()
    prompts, x, bias = torch.randn(10, 64), torch.randn(2, 17, 64), torch.randn(1, 4, 17, 17)
    with torch.no_grad():
        wanted = block(torch.cat([x, prompts.expand(2, -1, -1)], 1), F.pad(bias, (0, 10, 0, 10)))[:, :17]
        prompted = METHODS["vpt"].Prompted(block, torch.nn.Parameter(prompts))
        torch.testing.assert_close(prompted(x, shared_rel_pos_bias=bias), wanted, rtol=1e-4, atol=1e-5)


def test_scaled_layers_keep_their_dtype():
    layer = METHODS["ssf"].ScaleShift(torch.nn.Linear(4, 4).bfloat16(), 4, 4)
    assert layer(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_counts_on_vit_b_32_clip():
    d, blocks, projection = 768, 12, 512
    convolution, tokens, block = 3 * 32 * 32 * d, 51 * d, 12 * d * d + 13 * d
    counts = {
        "full": convolution + tokens + 4 * d + blocks * block + d * projection,
        "linear": 0,
        "bitfit": blocks * 11 * d + 2 * d,
        "layernorm": blocks * 4 * d + 4 * d,
        "attention": blocks * (4 * d * d + 4 * d),
        "ssf": blocks * 22 * d + 4 * d + d + projection,
        "vpt": blocks * 10 * d,
    }
    assert counts["full"] == 87_849_216
    backbone = load(CLIP, pretrained=False)
    for method, count in counts.items():
        adapted = adapt(replace(backbone, module=copy.deepcopy(backbone.module)), TrainConfig(method=method), 3)
        assert (method, sum(p.numel() for p in adapted.adapter.values())) == (method, count)
        assert f"{count:,}" in METHODS[method].__doc__ or method in ("full", "linear")


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-3])
@pytest.mark.parametrize("multi_label", [False, True])
def test_linear_finds_the_optimum(weight_decay, multi_label):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 8, generator=generator)
    scores = x[:, :3] + torch.randn(90, 3, generator=generator)
    labels = (scores > 0.5).float() if multi_label else scores.argmax(1)
    weight, bias = linear.solve(x, labels, 3, weight_decay)
    reference = LogisticRegression(C=1 / (len(x) * weight_decay), tol=1e-10, max_iter=10_000)
    answers = labels.T if multi_label else [labels]  # one against the rest, or all classes together
    fits = [copy.deepcopy(reference).fit(x.double().numpy(), answer.numpy()) for answer in answers]
    for own, name in ((weight, "coef_"), (bias, "intercept_")):
        wanted = torch.cat([torch.from_numpy(getattr(fit, name)) for fit in fits])
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)
