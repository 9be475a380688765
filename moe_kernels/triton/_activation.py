"""Activations and their derivatives on float32 tiles, shared by every kernel that needs one.

KIND is an activation's name; CLAMP says whether ``limit`` applies; PRECISE asks for the last bits,
which float32 results show and 16-bit results do not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._math import fast_sigmoid, sigmoid

GATED = ("swiglu", "geglu", "reglu", "swigluoai")
CLAMPED = ("swiglu", "swigluoai")


@dataclass(frozen=True)
class Activation:
    """An activation and its options, as the ops' schemas give them."""

    kind: str
    interleaved: bool
    alpha: float
    limit: float

    @property
    def gated(self) -> bool:
        return self.kind in GATED

    def constants(self, tensor: Tensor) -> dict[str, Any]:
        """What kernels specialise on, for results in the tensor's dtype."""
        return {
            "KIND": self.kind,
            "GATED": self.gated,
            "INTERLEAVED": self.interleaved,
            # exported graphs have the largest double for no clamp
            "CLAMP": self.kind in CLAMPED and self.limit < sys.float_info.max,
            "PRECISE": tensor.element_size() >= 4,
        }


@triton.jit
def _sigmoid(x, PRECISE: tl.constexpr):
    return sigmoid(x) if PRECISE else fast_sigmoid(x)


@triton.jit
def _value_and_slope(z, alpha, KIND: tl.constexpr, PRECISE: tl.constexpr):
    """``f(z)`` and ``f'(z)`` of the function that the gate (or the whole input) goes through."""
    if KIND == "swiglu" or KIND == "silu":
        s = _sigmoid(z, PRECISE)
        value = z * s
        slope = s + value * (1.0 - s)
    elif KIND == "swigluoai":
        s = _sigmoid(alpha * z, PRECISE)
        value = z * s
        slope = s + alpha * value * (1.0 - s)
    elif KIND == "geglu":
        # 0.5 * (1 + tanh(y)) is sigmoid(2 * y)
        c: tl.constexpr = 1.5957691216057308  # 2 * sqrt(2 / pi)
        s = _sigmoid(c * z * (1.0 + 0.044715 * z * z), PRECISE)
        value = z * s
        slope = s + value * (1.0 - s) * c * (1.0 + 0.134145 * z * z)
    elif KIND == "reglu":
        value = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif KIND == "relu2":
        p = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = p * p
        slope = 2.0 * p
    else:
        tl.static_assert(KIND == "gelu")
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * cdf
        slope = cdf + z * tl.exp2(z * z * -0.7213475204444817) * 0.3989422804014327
    return value, slope


@triton.jit
def activate_gated(
    gate, up, alpha, limit, KIND: tl.constexpr, CLAMP: tl.constexpr, PRECISE: tl.constexpr
):
    if CLAMP:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    value, _ = _value_and_slope(gate, alpha, KIND, PRECISE)
    return value * (up + 1.0 if KIND == "swigluoai" else up)


@triton.jit
def activate_gated_backward(
    grad, gate, up, alpha, limit, KIND: tl.constexpr, CLAMP: tl.constexpr, PRECISE: tl.constexpr
):
    """The activation, and the gradients to gate and up of ``grad`` to it."""
    g, u = gate, up
    if CLAMP:
        g = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    value, slope = _value_and_slope(g, alpha, KIND, PRECISE)
    shifted = u + 1.0 if KIND == "swigluoai" else u
    grad_gate, grad_up = grad * slope * shifted, grad * value
    if CLAMP:
        grad_gate = tl.where(gate <= limit, grad_gate, 0.0)
        grad_up = tl.where(tl.abs(up) <= limit, grad_up, 0.0)
    return value * shifted, grad_gate, grad_up


@triton.jit
def activate(x, KIND: tl.constexpr, PRECISE: tl.constexpr):
    value, _ = _value_and_slope(x, 1.0, KIND, PRECISE)
    return value


@triton.jit
def activate_backward(grad, x, KIND: tl.constexpr, PRECISE: tl.constexpr):
    """The activation, and the gradient to x of ``grad`` to it."""
    value, slope = _value_and_slope(x, 1.0, KIND, PRECISE)
    return value, grad * slope
