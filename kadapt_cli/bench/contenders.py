"""Every way to compute a packed qkv layer with adapters on q and v: alone, and in each block of a vision transformer.

The weight is (3d, d), T = S is the largest divisor of d up to 32, r = 1. A contender takes a `Problem` and returns y;
PyTorch's autograd, or the contender's own backward, does the rest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kadapt_kernels import KronFactors, divisors, kron_linear, reference, tall
from kadapt_kernels.factors import Rows
from kadapt_kernels.testing import Case, Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
MAX_SIDE = 32
LORA_RANK = 32
# What others compute sums in another order, and bypass in more steps than the yardstick: eight times its error is
# still rounding, and far from what a wrong term or scale would do. Our own paths keep the rule's factor of 2.
OTHERS_FACTOR = 8.0

Function = Callable[[Problem], Tensor]


class Shape(NamedTuple):
    """in_features d of a packed qkv layer (3d, d), and M rows of x."""

    d: int
    M: int

    @property
    def side(self) -> int:
        """T = S: the largest divisor of d up to 32."""
        return max(s for s in divisors(self.d) if s <= MAX_SIDE)

    @property
    def case(self) -> Case:
        """The layer with adapters on q and v."""
        d, side = self.d, self.side
        return Case(self.M, d, 3 * d, tuple((start, side, d // side, d // side, side, 1) for start in (0, 2 * d)))

    def flops(self, mode: str) -> int:
        """Of the frozen layer: 2·M·d·3d forward and as many for the gradient of x."""
        return 6 * self.M * self.d**2 * (2 if mode == "fwd+bwd" else 1)

    def bytes(self, mode: str, element: int) -> int:
        """Of the frozen layer when every matrix moves once: x, W, y forward; dy, W, dx backward."""
        return element * (4 * self.M * self.d + 3 * self.d**2) * (2 if mode == "fwd+bwd" else 1)


class Layer(NamedTuple):
    """A contender on one set of inputs: its forward pass, and the tensors beside x that get gradients."""

    problem: Problem
    forward: Callable[[], Tensor]
    trained: Sequence[Tensor]

    def backward(self, y: Tensor, keep: bool = False) -> None:
        """Gradients of x and the trained tensors for the problem's dy; `keep` allows another backward from y."""
        torch.autograd.grad(y, [self.problem.x, *self.trained], self.problem.dy, retain_graph=keep)


class Contender(NamedTuple):
    """One way to compute the layer.

    Attributes:
        computes: "adapted" and "frozen" layers are held against float64, "other" functions are not.
        build: The contender on a problem; None for what only a whole model has.
        fit: Puts it into a frozen vision transformer for a training step.
        needs: What must be there: "a GPU", a package's name, or nothing.
        factor: How many times the yardstick's error the accuracy gate allows.
    """

    computes: str
    build: Callable[[Problem], Layer] | None
    fit: Callable[[Any], object]
    needs: str = ""
    factor: float = 2.0


def adapted(function: Function, needs: str = "", factor: float = 2.0) -> Contender:
    """A contender that computes the adapted layer."""

    def build(problem: Problem) -> Layer:
        return Layer(problem, lambda: function(problem), flat(problem))

    return Contender("adapted", build, lambda model: replace_qkv(model, function, "qv"), needs, factor)


def frozen(function: Function, needs: str = "") -> Contender:
    """A contender that leaves the adapters out; in a model the gradient begins where that of an adapter would."""

    def fit(model: Any) -> None:
        replace_qkv(model, function, "")
        model.blocks[0].attn.qkv.register_forward_hook(lambda _, __, y: y.requires_grad_())

    return Contender("frozen", lambda problem: Layer(problem, lambda: function(problem), []), fit, needs)


def peft_adapter(config: str, **options: int) -> Contender:
    """One of peft's adapters on the whole packed layer, in the dtype of the layer; none reaches q and v alone."""

    def inject(model: nn.Module) -> None:
        import peft

        peft.inject_adapter_in_model(getattr(peft, config)(target_modules=["qkv"], **options), model)

    def build(problem: Problem) -> Layer:
        rows, columns = problem.weight.shape
        linear = nn.Linear(columns, rows, device="meta").requires_grad_(False)
        linear.load_state_dict({"weight": problem.weight, "bias": problem.bias}, assign=True)
        holder = nn.ModuleDict({"qkv": linear})
        inject(holder)
        return Layer(problem, lambda: holder["qkv"](problem.x), [p for p in holder.parameters() if p.requires_grad])

    return Contender("other", build, inject, "peft")


def train_weight(problem: Problem) -> Layer:
    """No adapter: the weight itself is trained."""
    weight = problem.weight.detach().requires_grad_()
    return Layer(problem, lambda: F.linear(problem.x, weight, problem.bias), [weight])


def flat(p: Problem) -> list[Tensor]:
    """The factors one after another."""
    return [t for group in p.factors for t in group if t is not None]


def bias_of(p: Problem) -> Tensor | None:
    """The bias with the trained shifts added, for contenders that know only the one."""
    return reference.total_bias(p.weight, p.bias, p.shifts, p.segments)


def cublas(p: Problem) -> Tensor:
    """The frozen layer by the vendor's library."""
    return F.linear(p.x, p.weight, bias_of(p))


class _OwnGemm(torch.autograd.Function):
    """The frozen layer by the fused kernels with nothing to fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from kadapt_kernels.forward import fused_forward

        y, kept = fused_forward(x, weight, bias, [], [], 1.0)
        ctx.save_for_backward(weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        from kadapt_kernels.backward import fused_backward
        from kadapt_kernels.forward import Kept

        (dy,) = grads
        weight, *kept = ctx.saved_tensors
        x = dy.new_empty(()).expand(len(dy), weight.shape[1])  # without adapters only its shape is looked at
        return fused_backward(dy, x, weight, Kept(*kept), [], [], 1.0)[0], None, None


def own_gemm(p: Problem) -> Tensor:
    """The frozen layer by our own kernels."""
    y: Tensor = _OwnGemm.apply(p.x, p.weight, p.bias)
    return y


def kron(p: Problem, backend: str) -> Tensor:
    """The adapted layer by kadapt, by the backend of that name."""
    return kron_linear(
        p.x, p.weight, p.bias, p.factors, segments=p.segments, scale=p.scale, shifts=p.shifts, backend=backend
    )


class _Merged(torch.autograd.Function):
    """y = x (W + ΔW)ᵀ + bias, with the factors' gradients from dΔW or from the thin products, as is asked for."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, dense: bool, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.problem, ctx.dense = problem, dense
        ctx.save_for_backward(x, *factors)
        return F.linear(x, _merged_weight(problem), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (dy,) = grads
        p, x, need = ctx.problem, ctx.saved_tensors[0], ctx.needs_input_grad
        gradients = _dense_gradients(dy, x, p) if ctx.dense else _thin_gradients(dy, x, p)
        return None, None, dy @ _merged_weight(p) if need[2] else None, dy.sum(0) if need[3] else None, *gradients


def _merged_weight(p: Problem) -> Tensor:
    if p.weight.is_cuda:
        from kadapt_kernels.merge import merge_weight

        return merge_weight(p.weight, p.factors, p.segments, p.scale)
    return reference.merged_weight(p.weight, p.factors, p.segments, p.scale, 0.0, 0)


def _dense_gradients(dy: Tensor, x: Tensor, p: Problem) -> list[Tensor]:
    dw = [reference.wide_mm(dy[:, start:stop].t(), x, p.factors[0].a.dtype) for start, stop in p.segments]
    if dy.is_cuda:
        from kadapt_kernels.merge import dense_gradients

        return dense_gradients(dw, p.factors, p.segments, p.scale)
    pairs = zip(dw, p.factors, strict=True)
    return [t for one, group in pairs for t in reference.dense_gradients(one, group, p.scale)]


def _thin_gradients(dy: Tensor, x: Tensor, p: Problem) -> list[Tensor]:
    right, left = reference.sides(p.factors, p.scale, x.dtype)
    g = torch.cat([dy[:, start:stop] @ side for (start, stop), side in zip(p.segments, left, strict=True)], 1)
    return reference.low_rank_gradients(dy, x, x @ right, g, p.factors, p.segments, p.scale)


def merged(p: Problem, dense: bool) -> Tensor:
    """The adapted layer with a merged weight."""
    y: Tensor = _Merged.apply(p, dense, p.x, bias_of(p), *flat(p))
    return y


def add_updates(y: Tensor, p: Problem, update: Callable[[KronFactors], Tensor]) -> Tensor:
    """y with what `update` makes of its factors added to each segment, in place."""
    for (start, stop), factors in zip(p.segments, p.factors, strict=True):
        y[:, start:stop] += update(factors)
    return y


def factored(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[KronFactors], segments: list[Rows], scale: float
) -> Tensor:
    """The factored form as a few lines of PyTorch, its backward by autograd."""
    y = F.linear(x, weight, bias)
    for (start, stop), (a, b, u, v) in zip(segments, factors, strict=True):
        assert b is not None
        y[:, start:stop] += x @ tall(b, v).to(x.dtype) @ tall(a * scale, u).to(x.dtype).t()
    return y


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(factored)


def compiled_factored(p: Problem) -> Tensor:
    """`factored` under torch.compile, with M left open so that one compilation serves all rows of a width."""
    torch._dynamo.maybe_mark_dynamic(p.x, 0)
    return _compiled()(p.x, p.weight, bias_of(p), p.factors, p.segments, p.scale)


def materialized(p: Problem) -> Tensor:
    """The paper's formula as its authors compute it: ΔW = Σ_t A_t ⊗ B_t written out term by term, then multiplied."""

    def update(f: KronFactors) -> Tensor:
        assert f.b is not None
        rule = torch.einsum("ti,tj->tij", f.b, f.a)
        block = torch.einsum("tqr,tpr->tqp", f.v, f.u)
        terms = torch.einsum("tij,tqp->tiqjp", rule, block)
        return p.x @ (p.scale * terms.reshape(len(rule), f.in_features, f.out_features).sum(0)).to(p.x.dtype)

    return add_updates(cublas(p), p, update)


def bypass(p: Problem) -> Tensor:
    """Σ_t (A_t ⊗ B_t) x without the products: x as (M, S, Q) times v, then b, a and u. As LyCORIS's bypass mode."""

    def update(f: KronFactors) -> Tensor:
        assert f.b is not None
        terms, side, rank = len(f.a), f.a.shape[1], f.u.shape[2]
        thin_u, thin_v = (t.permute(1, 0, 2).flatten(1).to(p.x.dtype) for t in (f.u, f.v))
        z = (p.x.reshape(-1, side, f.v.shape[1]) @ thin_v).view(-1, side, terms, rank)
        h = torch.einsum("mjtr,tj->mtr", z, f.b.to(p.x.dtype))
        wide = torch.einsum("mtr,ti->mitr", h, (p.scale * f.a).to(p.x.dtype))
        return (wide.flatten(2) @ thin_u.t()).flatten(1)

    return add_updates(cublas(p), p, update)


class InModel(nn.Module):
    """A packed qkv layer of a vision transformer, computed by a contender; x (..., K) gives (..., N).

    As kadapt adapts it: the rules a, b are shared by all blocks; u, v and one shift for q and v belong to the block.
    """

    def __init__(self, linear: nn.Linear, function: Function, rules: Sequence[Sequence[nn.Parameter]]) -> None:
        super().__init__()
        self.weight, self.bias, self.function = linear.weight, linear.bias, function
        d, side = linear.in_features, Shape(linear.in_features, 1).side

        def thin() -> nn.Parameter:
            return nn.Parameter(torch.randn(side, d // side, 1) / side)

        self.factors = [KronFactors(a, b, thin(), thin()) for a, b in rules]
        self.segments = [(0, d), (2 * d, 3 * d)][: len(rules)]
        self.shifts: list[Tensor] = [nn.Parameter(torch.zeros(d))] * len(rules)
        self.trained = nn.ParameterList([*(t for group in self.factors for t in group), *self.shifts])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        bias = self.bias.to(rows.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = self.function(Problem(rows, self.weight, bias, self.factors, self.segments, 1.0, rows, self.shifts))
        return y.view(*x.shape[:-1], -1)


def replace_qkv(model: Any, function: Function, adapters: str) -> None:
    """Put a contender in the place of every block's qkv layer, with an adapter for each of the letters."""
    side = Shape(model.embed_dim, 1).side
    rules = [[nn.Parameter(torch.randn(side, side) / side**0.5) for _ in "ab"] for _ in adapters]
    for block in model.blocks:
        block.attn.qkv = InModel(block.attn.qkv, function, rules)


CONTENDERS: dict[str, Contender] = {
    "frozen": frozen(cublas),
    "frozen-own-gemm": frozen(own_gemm, "a GPU"),
    "fused": adapted(lambda p: kron(p, "triton"), "a GPU"),
    "kadapt": adapted(lambda p: kron(p, "auto")),
    "merge-lowrank": adapted(lambda p: merged(p, dense=False)),
    "merge-dense": adapted(lambda p: merged(p, dense=True)),
    "compiled-eager": adapted(compiled_factored, factor=OTHERS_FACTOR),
    "reference-einsum": adapted(materialized, factor=OTHERS_FACTOR),
    "lycoris-bypass": adapted(bypass, factor=OTHERS_FACTOR),
    "peft-lora": peft_adapter("LoraConfig", r=LORA_RANK, lora_alpha=LORA_RANK),
    "peft-lokr": peft_adapter("LoKrConfig", r=LORA_RANK, alpha=LORA_RANK),
    "full": Contender("other", train_weight, nn.Module.requires_grad_),
    "linear-probe": Contender("other", None, lambda model: model),
}
