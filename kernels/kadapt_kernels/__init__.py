"""Kronecker-adapted linear layers: the definition, PyTorch and fused Triton kernels behind one function.

Tensors and numbers only; imports torch and, where a kernel is launched, triton, and nothing of kadapt.
"""

from kadapt_kernels.factors import KronFactors, divisors, kron_delta, tall
from kadapt_kernels.hadamard import HADAMARD_BACKENDS, hadamard, hadamard_
from kadapt_kernels.ops import BACKENDS, FUSED_RANK, kron_linear, kron_merge, why_no_triton

__all__ = [
    "BACKENDS",
    "FUSED_RANK",
    "HADAMARD_BACKENDS",
    "KronFactors",
    "divisors",
    "hadamard",
    "hadamard_",
    "kron_delta",
    "kron_linear",
    "kron_merge",
    "tall",
    "why_no_triton",
]
