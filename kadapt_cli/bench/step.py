"""A training step of a vision transformer: random weights, random images, and a contender in every block."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kadapt_cli.bench.contenders import DTYPES, Contender, Shape
from kadapt_cli.errors import UsageError, shown

BUNDLED = "vit32"
CLASSES = 10


class Step(NamedTuple):
    """A contender's training step, and how many numbers it trains."""

    call: Callable[[], None]
    trained: int


def training_step(contender: Contender, name: str, batch_size: int, dtype: str, device: torch.device) -> Step:
    """Forward, cross entropy, backward and AdamW on one batch for the model of that name.

    16 bits by autocast, with frozen matrices kept in them and gradients unscaled.
    """
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    model = vit(name).requires_grad_(False)
    contender.fit(model)
    model.head.requires_grad_()
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dim() >= 2:
            parameter.data = parameter.data.to(kind)
    model.to(device).train()
    images = torch.randn(batch_size, 3, *model.patch_embed.img_size, device=device)
    labels = torch.randint(CLASSES, (batch_size,), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return Step(call, sum(p.numel() for p in trained))


def qkv_shape(name: str, batch_size: int) -> Shape:
    """What the model's packed qkv layers are given. Raises as `vit`."""
    with torch.device("meta"):
        model = vit(name)
    return Shape(model.embed_dim, batch_size * (model.patch_embed.num_patches + model.num_prefix_tokens))


def vit(name: str) -> Any:
    """A timm vision transformer with random weights and a head of 10 classes; vit32 is the bundled architecture.

    Raises:
        UsageError: timm has no such model, or it has no packed qkv layers in `blocks`.
    """
    import timm

    architecture, options = name, {}
    if name == BUNDLED:
        config = json.loads((Path(__file__).parents[1] / "assets" / BUNDLED / "config.json").read_text("utf-8"))
        architecture, options = config["architecture"], config["model_args"]
    example = "a plain vision transformer such as vit_base_patch16_224"
    if not timm.is_model(architecture):
        raise UsageError(f"--model: expected {BUNDLED} or {example}, but {shown(name)!r} was given")
    model = timm.create_model(architecture, pretrained=False, num_classes=CLASSES, **options)
    layers = [getattr(getattr(block, "attn", None), "qkv", None) for block in getattr(model, "blocks", ())]
    plain = [isinstance(q, nn.Linear) and q.out_features == 3 * q.in_features and q.bias is not None for q in layers]
    if not plain or not all(plain) or not hasattr(model, "patch_embed"):
        raise UsageError(f"--model: {name} has no linear layers blocks.N.attn.qkv with a bias; expected {example}")
    return model
