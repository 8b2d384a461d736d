"""Random maps P of a short vector z (d,) to a long one (D,), with columns of unit length on average.

`Fastfood` stacks ⌈D/L⌉ blocks of L = 2^⌈log₂ d⌉ rows,

    block b of P z = c · H G_b Π H B z        H Walsh-Hadamard, B random signs, Π a permutation, G_b normal numbers

with z padded by zeros to L. B and Π are shared by the blocks, so that Π H B z is computed once; without Π two columns
would be permutations of each other. Every entry of a column is then a normal number of its own. It costs D·log₂ L
additions and stores D + 3·L numbers, where a dense P needs D·d of both. Training takes about 2.1·D + 11·L numbers
beside the frozen model, Adam's among them: G, and either the moved weight of one layer or its gradient (`MovedLinear`).
Of several weights each has its G, sign and permutation, and one of them at a time is moved.

`Dense` and `Sparse` are the plain alternatives, `Identity` trains the weights directly.

Sources: Le, Sarlós and Smola, "Fastfood", ICML 2013; Li et al., "Measuring the Intrinsic Dimension of Objective
Landscapes", ICLR 2018; Li, Hastie and Church, "Very Sparse Random Projections", KDD 2006 (the density of `Sparse`).
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_kernels import hadamard_

CHUNK = 1 << 17  # numbers that a transform works on at a time: they stay in the cache and are few beside D


class Projection(nn.Module, ABC):
    """A fixed linear map from `dims` to `size` numbers; moved and converted like any module, and never trained."""

    def __init__(self, size: int, dims: int) -> None:
        super().__init__()
        self.size = size
        self.dims = dims

    @staticmethod
    @abstractmethod
    def stored_bytes(size: int, dims: int) -> int:
        """What a map of so many numbers keeps in fp32, about."""

    @abstractmethod
    def multiply(self, z: Tensor) -> Tensor:
        """P z (size,), in fresh memory."""

    @abstractmethod
    def adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g (dims,); what g holds is lost."""


class Fastfood(Projection):
    """See the module's docstring; takes z of fewer entries than `length` as padded with zeros."""

    sign: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, size: int, dims: int, generator: torch.Generator) -> None:
        super().__init__(size, dims)
        blocks, self.length = _blocks(size, dims)
        sign = 2 * torch.randint(0, 2, (self.length,), generator=generator, dtype=torch.float32) - 1
        self.register_buffer("sign", sign, persistent=False)
        self.register_buffer("order", torch.randperm(self.length, generator=generator), persistent=False)
        gauss = torch.randn(blocks, self.length, generator=generator)
        gauss *= (size * self.length * gauss.square().mean()).rsqrt()  # a block's columns have length √L · |G_b|
        self.register_buffer("gauss", gauss, persistent=False)

    @staticmethod
    def stored_bytes(size: int, dims: int) -> int:
        """See `Projection`."""
        blocks, length = _blocks(size, dims)
        return 4 * (blocks + 3) * length

    def multiply(self, z: Tensor) -> Tensor:
        """P z (size,), in fresh memory of up to L numbers more."""
        mixed = self._mixed(z * self.sign[: self.dims])[self.order]
        return hadamard_(self.gauss * mixed).view(-1)[: self.size]

    def adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g (dims,); g is used as working memory."""
        total = g.new_zeros(self.length)
        rows = max(1, CHUNK // self.length)
        for gauss, part in zip(self.gauss.split(rows), g.split(rows * self.length), strict=True):
            part = F.pad(part, (0, gauss.numel() - len(part))) if len(part) < gauss.numel() else part
            total += hadamard_(part.view(gauss.shape)).mul_(gauss).sum(0)
        unordered = torch.empty_like(total)
        unordered[self.order] = total
        return hadamard_(unordered)[: self.dims] * self.sign[: self.dims]

    def _mixed(self, z: Tensor) -> Tensor:
        padded = z.new_zeros(self.length)
        padded[: self.dims] = z
        return hadamard_(padded)


def _blocks(size: int, dims: int) -> tuple[int, int]:
    """How many blocks Fastfood stacks, and their rows L."""
    length = 1 << (dims - 1).bit_length()
    return -(-size // length), length


class Dense(Projection):
    """Normal numbers; D·d of them are stored."""

    matrix: Tensor

    def __init__(self, size: int, dims: int, generator: torch.Generator) -> None:
        super().__init__(size, dims)
        matrix = torch.randn(size, dims, generator=generator)
        self.register_buffer("matrix", matrix / matrix.norm(dim=0), persistent=False)

    @staticmethod
    def stored_bytes(size: int, dims: int) -> int:
        """See `Projection`."""
        return 4 * size * dims

    def multiply(self, z: Tensor) -> Tensor:
        """P z (size,), in fresh memory."""
        return self.matrix @ z

    def adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g (dims,)."""
        return self.matrix.T @ g


class Sparse(Projection):
    """d·√D entries ±1 at random places, others zero, columns then scaled to length one."""

    row: Tensor
    column: Tensor
    value: Tensor

    def __init__(self, size: int, dims: int, generator: torch.Generator) -> None:
        super().__init__(size, dims)
        each = self._each(size)
        row = torch.randint(0, size, (dims, each), generator=generator)
        value = 2.0 * torch.randint(0, 2, (dims, each), generator=generator) - 1
        self.register_buffer("row", row.view(-1), persistent=False)
        self.register_buffer("column", torch.arange(dims).repeat_interleave(each), persistent=False)
        self.register_buffer("value", value.view(-1) / each**0.5, persistent=False)

    @staticmethod
    def _each(size: int) -> int:
        """Entries of a column."""
        return max(1, math.isqrt(size))

    @staticmethod
    def stored_bytes(size: int, dims: int) -> int:
        """See `Projection`."""
        return 20 * dims * Sparse._each(size)

    def multiply(self, z: Tensor) -> Tensor:
        """P z (size,), in fresh memory."""
        return z.new_zeros(self.size).index_add_(0, self.row, self.value * z[self.column])

    def adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g (dims,)."""
        return g.new_zeros(self.dims).index_add_(0, self.column, self.value * g[self.row])


class Identity(Projection):
    """P = 1: z is what is added to the weights."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)

    @staticmethod
    def stored_bytes(size: int, dims: int) -> int:
        """See `Projection`."""
        return 0

    def multiply(self, z: Tensor) -> Tensor:
        """P z (size,), in fresh memory."""
        return z.clone()

    def adjoint(self, g: Tensor) -> Tensor:
        """Pᵀ g (dims,)."""
        return g


class MovedLinear(torch.autograd.Function):
    """y = x (θ0 + s·P z)ᵀ + b for a weight θ0 (N, K) that stays frozen.

    The moved weight is composed once for y and once more for the gradient of x, and dropped each time before the
    gradient of the weight is made: at any moment one tensor of the size of θ0 is there, beside what P stores.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection
    ) -> Tensor:
        """(..., K) to (..., N), in the dtype that autocast gives; scale is a number in a tensor, trained or not."""
        y = F.linear(x, _moved(z, scale, weight, projection), bias)
        ctx.projection = projection
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(x.to(y.dtype), z, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, of z and of the scale."""
        x, z, scale, weight = ctx.saved_tensors
        dy = gradients[0]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ _moved(z, scale, weight, ctx.projection).to(dy.dtype)).to(ctx.x_dtype)
        gradient = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        back = ctx.projection.adjoint(gradient.view(-1).to(z.dtype))
        dscale = (back @ z).view(scale.shape) if ctx.needs_input_grad[2] else None
        return dx, back.mul_(scale), dscale, None, None, None


def _moved(z: Tensor, scale: Tensor, weight: Tensor, projection: Projection) -> Tensor:
    """θ0 + s·P z, in the dtype of z under autocast too: of the size of θ0 only the result is made."""
    with torch.autocast(z.device.type, enabled=False):
        return projection.multiply(z).mul_(scale).view(weight.shape).add_(weight)
