"""Inside a vision transformer: the rows an adapter can sit on, a layer in place of another, a pass in two halves."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kadapt_cli.errors import ModelError

_ATTENTION = ("q", "k", "v", "proj")


@dataclass(frozen=True)
class Segment:
    """A row block of one frozen linear layer that can carry an adapter.

    ``start`` and ``stop`` are rows of ``module.weight`` (out_features, in_features); element ``bias_start`` of the
    tensor ``bias`` (a key of the untouched state dict, None when nothing trainable is added) feeds row ``start``.
    """

    block: int
    name: str
    module: str
    start: int
    stop: int
    in_features: int
    bias: str | None
    bias_start: int

    @property
    def full_name(self) -> str:
        """Its name in the model, as --targets takes it."""
        return f"blocks.{self.block}.{self.name}"

    @property
    def group(self) -> str:
        """What it belongs to: "attn" for q, k, v and proj, "mlp" for the rest."""
        return "attn" if self.name in _ATTENTION else "mlp"


def segments(model: nn.Module) -> list[Segment]:
    """Name what can be adapted in every transformer block, by block, then q, k, v, proj and the MLP's linears.

    q, k and v are row blocks of one layer or layers of their own. ``proj`` is the attention's output; a linear directly
    in the MLP goes by its own name there (fc1 and fc2; fc1_g, fc1_x and fc2 with SwiGLU). Of these, what is missing or
    no plain ``nn.Linear`` is left out.

    Raises:
        ModelError: The model has no list ``blocks``, or a block has no attention whose projections are understood.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise ModelError(
            f"{_architecture(model)}: has no list of transformer blocks; choose a plain vision transformer"
        )
    found = []
    for index, block in enumerate(blocks):
        parts = _attention_segments(index, getattr(block, "attn", None))
        if not parts:
            raise ModelError(
                f"{_architecture(model)}: block {index} has no attention with a linear qkv, or q_proj, k_proj and"
                " v_proj; choose a plain vision transformer"
            )
        found += parts + _output_segments(index, block)
    return found


def block_widths(model: nn.Module) -> dict[int, int]:
    """Numbers a token has where it enters each block, by block; for a model not yet adapted. Errors as `segments`."""
    return {segment.block: segment.in_features for segment in segments(model) if segment.name == "q"}


def replace_linear(model: nn.Module, path: str, make: Callable[[Tensor, Tensor | None], nn.Module]) -> nn.Module:
    """Put ``make(weight, bias)`` in place of the linear layer at a dotted path, and return it.

    EVA and BEiT attention keeps the biases of q, k and v beside a bias-free ``qkv`` and, as long as it has them,
    multiplies by ``qkv.weight`` without calling ``qkv``: a wrapper there would do nothing. They are joined into
    ``bias`` and taken from the attention, which from then on calls the new layer.

    Args:
        model: The model, changed in place.
        path: For example ``blocks.0.attn.qkv``.
        make: Gets the weight (out_features, in_features) and the bias (out_features,) or None.

    Raises:
        ModelError: There is no plain ``nn.Linear`` at the path, or its parent may apply it by itself.
    """
    parent_path, _, leaf = path.rpartition(".")
    try:
        parent, linear = model.get_submodule(parent_path), model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{_architecture(model)}: has no module '{path}'; name one of its linear layers") from None
    if type(linear) is not nn.Linear:
        kind = type(linear).__name__
        raise ModelError(f"{_architecture(model)}: '{path}' is a {kind}, not a plain Linear; name another layer")
    bias: Tensor | None = linear.bias
    own = _own_biases(parent)
    if bias is None and own:
        if leaf != "qkv" or own.keys() != {"q_bias", "k_bias", "v_bias"}:
            raise ModelError(
                f"{_architecture(model)}: '{path}' may get its bias from {', '.join(own)}; name another layer"
            )
        bias = torch.cat([own["q_bias"], own["k_bias"], own["v_bias"]]).detach()
    new = make(linear.weight, bias)
    setattr(parent, leaf, new)
    if linear.bias is None:
        for name in own:
            setattr(parent, name, None)
    return new


Extra = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments of a block beside the activations


class Tail(nn.Module):
    """What a vision transformer does from block `first` on: activations (B, tokens, d) to features (B, feature_dim).

    The blocks are those of `module`, not copies. `extra` are the arguments that its blocks are called with beside the
    activations, such as rotary embeddings; they do not depend on the images.

    Where the classifier sees the class token alone, the last block's MLP, two thirds of its work, runs on that token
    alone: its sum with the other tokens is broadcast to them and read by nobody.
    """

    def __init__(self, module: nn.Module, first: int, extra: Extra) -> None:
        super().__init__()
        self.module = module
        self.first = first
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        args, kwargs = self.extra
        module: Any = self.module
        blocks = list(module.blocks)[self.first :]
        before_mlp = getattr(blocks[-1], "norm2", None) if getattr(module, "global_pool", "") == "token" else None
        with ExitStack() as stack:
            if before_mlp is not None:
                stack.callback(before_mlp.register_forward_pre_hook(_class_token).remove)
            for block in blocks:
                x = block(x, *args, **kwargs)
        features: Tensor = module.forward_head(module.norm(x))
        return features


def _class_token(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (args[0][:, :1],)


def before_block(module: nn.Module, first: int, images: Tensor) -> tuple[Tensor, Extra]:
    """The activations that block `first` is called with for images (B, 3, H, W), and its further arguments."""
    caught: list[tuple[Tensor, Extra]] = []

    def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], (args[1:], kwargs)))
        raise _CaughtError

    blocks: Any = module.blocks
    handle = blocks[first].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        module(images)
    except _CaughtError:
        pass
    finally:
        handle.remove()
    return caught[0]


class _CaughtError(Exception):
    """Ends a forward pass whose rest is not needed."""


def first_trained_block(module: nn.Module) -> int:
    """The index of the first block with a trainable parameter; 0 when something before the blocks has one.

    When nothing in the blocks is trained it is the last.
    """
    blocks: Any = module.blocks
    after = ("blocks.", "norm.", "fc_norm.", "attn_pool.", "head.")
    if any(p.requires_grad and not name.startswith(after) for name, p in module.named_parameters()):
        return 0
    trained = [index for index, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
    return trained[0] if trained else len(blocks) - 1


def _attention_segments(block: int, attention: nn.Module | None) -> list[Segment]:
    """The segments of one attention, or none when it is not understood."""
    qkv = getattr(attention, "qkv", None)
    if type(qkv) is nn.Linear and qkv.out_features % 3 == 0:
        rows = qkv.out_features // 3
        places = [(name, "qkv", qkv, index * rows, rows) for index, name in enumerate("qkv")]
    else:
        layers = [(name, f"{name}_proj", getattr(attention, f"{name}_proj", None)) for name in "qkv"]
        places = [
            (name, leaf, layer, 0, layer.out_features) for name, leaf, layer in layers if type(layer) is nn.Linear
        ]
    if attention is None or len(places) != 3:
        return []
    path, own, found = f"blocks.{block}.attn", _own_biases(attention), []
    for name, leaf, layer, start, rows in places:
        bias, bias_start = (f"{path}.{leaf}.bias", start) if layer.bias is not None else (None, 0)
        if isinstance(own.get(f"{name}_bias"), nn.Parameter):
            bias = f"{path}.{name}_bias"
        found.append(Segment(block, name, f"{path}.{leaf}", start, start + rows, layer.in_features, bias, bias_start))
    return found


def _output_segments(block: int, module: nn.Module) -> list[Segment]:
    """The attention's output layer and the layers of the MLP, all their rows each."""
    layers = {"attn.proj": getattr(module.attn, "proj", None)}
    mlp = getattr(module, "mlp", None)
    if isinstance(mlp, nn.Module):
        layers |= {f"mlp.{name}": child for name, child in mlp.named_children()}
    found = []
    for leaf, layer in layers.items():
        if type(layer) is nn.Linear:
            path, name = f"blocks.{block}.{leaf}", leaf.partition(".")[2]
            bias = None if layer.bias is None else f"{path}.bias"
            found.append(Segment(block, name, path, 0, layer.out_features, layer.in_features, bias, 0))
    return found


def _own_biases(module: nn.Module) -> dict[str, Tensor]:
    """Bias tensors a module keeps beside its layers, by name: a layer without a bias may get its own from here."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor for name, tensor in tensors if name.endswith("_bias")}


def _architecture(model: nn.Module) -> str:
    return str(getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__))
