"""Subspace training: θ = θ0 + s·P z, the targets' weights move in a random d-dimensional subspace, z starts at zero.

P is fixed and random (`projections`), a piece of it for every segment, and all segments share z. Its columns have
length one over all D weights that may move, and s = c·√(D/d): every entry of s·P then has the variance c²/d, so that a
step of Adam, which moves each entry of z by the learning rate, moves a weight c times as far as if it were trained
directly. c = min(16, √(D/d)): of a gradient, a subspace holds the part √(d/D), so that the way to the same loss is
√(D/d) times as long; 16 is the most that was tried. One learning rate then serves all d, and d = D is direct
training. How c was found stands in benchmarks/README.md. d = 0 trains the head alone.

With --said every segment's part is multiplied by a trained number that starts at one; z then has so many entries fewer.
With --projection identity the weights are trained directly, by a z of its own for each segment.

This is what `kadapt probe-id` measures intrinsic dimension with, and a way to adapt a model by itself.

Sources: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018; Aghajanyan et al.,
"Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", ACL 2021 (SAID).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_cli.config import TrainConfig
from kadapt_cli.errors import UsageError
from kadapt_cli.projections import Dense, Fastfood, Identity, MovedLinear, Projection, Sparse
from kadapt_cli.surgery import Segment, replace_linear

SUMMARY = "a random d-dimensional subspace of the targets' weights"
FORMULA = "dims"
LR = 1e-3
OPTIONS = ("dims", "projection", "said", "scale")
UNMERGED = ""

DIMS = 1000
LONGEST = 16.0  # c at most
MAX_BYTES = 2 << 30  # of what the projections store
RANDOM: dict[str, type[Fastfood] | type[Dense] | type[Sparse]]
RANDOM = {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}


class Part(NamedTuple):
    """Rows of a layer that move: by `scale` times the factor times P z."""

    start: int
    stop: int
    z: nn.Parameter
    scale: float
    factor: nn.Parameter | None
    projection: Projection


class SubspaceLinear(nn.Module):
    """A linear layer of which some row segments move in a subspace; x (..., K) gives (..., N).

    Segments that move and rows that do not are multiplied apart, so that gradients are made of the former alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.parts: list[Part] = []
        self.held = nn.ModuleList()  # the parts' projections, and below their parameters, so that they move with this

    def add(self, part: Part, name: str) -> None:
        """Let some rows behind those added so far move; the name is of the segment."""
        self.parts.append(part)
        self.held.append(part.projection)
        self.register_parameter(f"{name}_z", part.z)
        if part.factor is not None:
            self.register_parameter(f"{name}_factor", part.factor)

    def forward(self, x: Tensor) -> Tensor:
        outputs, done = [], 0
        for start, stop, z, scale, factor, projection in self.parts:
            if start > done:
                outputs.append(F.linear(x, *self._frozen(done, start)))
            by = z.new_tensor(scale) if factor is None else scale * factor
            outputs.append(MovedLinear.apply(x, z, by, *self._frozen(start, stop), projection))
            done = stop
        if done < len(self.weight):
            outputs.append(F.linear(x, *self._frozen(done, len(self.weight))))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _frozen(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The frozen weight (stop - start, K) and bias of some rows."""
        return self.weight[start:stop], None if self.bias is None else self.bias[start:stop]


def size(segment: Segment) -> int:
    """How many weights a segment has."""
    return (segment.stop - segment.start) * segment.in_features


def resolve(config: TrainConfig, segments: Sequence[Segment]) -> TrainConfig:
    """The configuration with d and the scale filled in where they were not given.

    Raises:
        UsageError: d is larger than D, or leaves no entry of z beside SAID's factors; a P that is too large.
    """
    total = sum(map(size, segments))
    identity = config.projection == "identity"
    dims = (total if identity else min(DIMS, total)) if config.dims is None else config.dims
    if dims == 0 and not identity and not config.said:
        return config
    if dims > total or (identity and dims != total):
        raise UsageError(
            f"--dims: {dims} was given, but the targets have D = {total:,} weights; "
            + ("leave it out, as --projection identity trains all of them" if identity else "give at most as many")
        )
    if config.said and identity:
        raise UsageError("--said: is for a random projection, but --projection identity was given; leave one out")
    if config.said and dims <= len(segments):
        raise UsageError(f"--dims: --said takes one of them for each of {len(segments)} tensors; give more than {dims}")
    if not identity and (need := stored_bytes(segments, config.projection, dims)) > MAX_BYTES:
        raise UsageError(
            f"--projection {config.projection}: {dims:,} columns of {total:,} numbers need {1e-9 * need:.0f} GB; "
            "give fewer --dims, or use fastfood"
        )
    root = (total / dims) ** 0.5
    scale = config.scale or (1.0 if identity else min(LONGEST, root) * root)
    return config.model_copy(update={"dims": dims, "scale": scale})


def stored_bytes(segments: Sequence[Segment], projection: str, dims: int) -> int:
    """What the segments' parts of a random P of d columns keep, about."""
    return sum(RANDOM[projection].stored_bytes(size(segment), dims) for segment in segments)


def training_numbers(segments: Sequence[Segment], dims: int) -> int:
    """At most so many numbers training by Fastfood takes beside the frozen model: P's, of the largest weight another
    and an eighth, and eight vectors like z, Adam's among them."""
    length = 1 << (dims - 1).bit_length()
    largest = max(map(size, segments))
    return stored_bytes(segments, "fastfood", dims) // 4 + largest + largest // 8 + 8 * length


def pieces(segments: Sequence[Segment], config: TrainConfig) -> list[tuple[Segment, str, Projection, float]]:
    """Each segment's part of P, drawn by the seed, the name of its z, and its scale, with which columns are s·P's."""
    dims, scale = config.dims, config.scale
    if dims == 0:
        return []
    assert dims is not None
    assert scale is not None
    if config.projection == "identity":
        return [(segment, f"{segment.full_name}.z", Identity(size(segment)), scale) for segment in segments]
    generator = torch.Generator().manual_seed(config.seed)
    total = sum(map(size, segments))
    draw, width = RANDOM[config.projection], dims - len(segments) * config.said
    return [
        (segment, "z", draw(size(segment), width, generator), scale * (size(segment) / total) ** 0.5)
        for segment in segments
    ]


def inject(model: nn.Module, segments: Sequence[Segment], config: TrainConfig) -> dict[str, nn.Parameter]:
    """Replace the linears that hold the segments by ones that move; the output stays the same at first.

    Returns:
        z, or with the identity one for each segment, and with SAID a factor for each segment, by their names.
    """
    parameters: dict[str, nn.Parameter] = {}
    for segment, name, projection, scale in sorted(pieces(segments, config), key=lambda piece: piece[0].start):
        layer = model.get_submodule(segment.module)
        if not isinstance(layer, SubspaceLinear):
            layer = replace_linear(model, segment.module, SubspaceLinear)
        assert isinstance(layer, SubspaceLinear)
        z = parameters.setdefault(name, nn.Parameter(torch.zeros(projection.dims)))
        factor = None
        if config.said:
            factor = parameters[f"{segment.full_name}.factor"] = nn.Parameter(torch.ones(()))
        layer.add(Part(segment.start, segment.stop, z, scale, factor, projection), segment.name)
    return parameters


def merge(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], segments: Sequence[Segment], config: TrainConfig
) -> None:
    """Add s·P z to the backbone's float64 state dict, in place."""
    for segment, name, projection, scale in pieces(segments, config):
        delta = scale * projection.double().multiply(tensors[name].double())
        if config.said:
            delta *= tensors[f"{segment.full_name}.factor"].double()
        rows = state[f"{segment.module}.weight"][segment.start : segment.stop]
        rows += delta.view(rows.shape)
