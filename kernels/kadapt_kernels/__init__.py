"""Kronecker-adapted linear layers: the definition, the factored path, and (to come) the fused Triton kernels.

Tensors and numbers only; imports torch and nothing of kadapt.
"""

from kadapt_kernels.factors import KronFactors, divisors, kron_delta, tall
from kadapt_kernels.ops import kron_linear, kron_merge

__all__ = ["KronFactors", "divisors", "kron_delta", "kron_linear", "kron_merge", "tall"]
