"""Activations and their derivatives on float32 tiles, shared by every kernel that needs one.

KIND is an activation's name; CLAMP says whether ``limit`` applies; PRECISE asks for the last bits,
which float32 results show and 16-bit results do not.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton.language import PropagateNan

GATED = ("swiglu", "geglu", "reglu", "swigluoai")
CLAMPED = ("swiglu", "swigluoai")


def clamps(kind: str, limit: float) -> bool:
    return kind in CLAMPED and limit < math.inf


@triton.jit
def _sigmoid(x, PRECISE: tl.constexpr):
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-x))
    log2e: tl.constexpr = 1.4426950408889634
    if PRECISE:
        # what x * log2e loses in rounding comes back as a factor near 1
        y = x * -log2e
        lost = tl.fma(x, -log2e, -y) + x * -1.925963033500e-8
        lost = tl.minimum(tl.maximum(lost, -1.0), 1.0)
        return tl.div_rn(1.0, 1.0 + tl.exp2(y) * (1.0 + 0.6931471805599453 * lost))
    # rsqrt(1 + e)**2 is 1 / (1 + e) in three instructions, where a division takes about ten and a
    # quotient of two tiles makes kernels spill
    r = tl.rsqrt(1.0 + tl.exp2(x * -log2e))
    return r * r


@triton.jit
def _value_and_slope(z, alpha, KIND: tl.constexpr, PRECISE: tl.constexpr):
    """``f(z)`` and ``f'(z)`` of the function that the gate (or the whole input) goes through."""
    if KIND == "swiglu" or KIND == "silu":
        s = _sigmoid(z, PRECISE)
        return z * s, s + z * s * (1.0 - s)
    if KIND == "swigluoai":
        s = _sigmoid(alpha * z, PRECISE)
        return z * s, s + alpha * z * s * (1.0 - s)
    if KIND == "geglu":
        # 0.5 * (1 + tanh(y)) is sigmoid(2 * y)
        c: tl.constexpr = 1.5957691216057308  # 2 * sqrt(2 / pi)
        s = _sigmoid(c * z * (1.0 + 0.044715 * z * z), PRECISE)
        return z * s, s + z * s * (1.0 - s) * c * (1.0 + 0.134145 * z * z)
    if KIND == "reglu":
        return tl.maximum(z, 0.0, propagate_nan=PropagateNan.ALL), tl.where(z > 0.0, 1.0, 0.0)
    if KIND == "relu2":
        p = tl.maximum(z, 0.0, propagate_nan=PropagateNan.ALL)
        return p * p, 2.0 * p
    tl.static_assert(KIND == "gelu")
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    return z * cdf, cdf + z * tl.exp2(z * z * -0.7213475204444817) * 0.3989422804014327


@triton.jit
def activate_gated(
    gate, up, alpha, limit, KIND: tl.constexpr, CLAMP: tl.constexpr, PRECISE: tl.constexpr
):
    if CLAMP:
        gate = tl.minimum(gate, limit, propagate_nan=PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=PropagateNan.ALL)
    value, _ = _value_and_slope(gate, alpha, KIND, PRECISE)
    return value * (up + 1.0 if KIND == "swigluoai" else up)


@triton.jit
def activate_gated_backward(
    grad, gate, up, alpha, limit, KIND: tl.constexpr, CLAMP: tl.constexpr, PRECISE: tl.constexpr
):
    """The activation, and the gradients to gate and up of ``grad`` to it."""
    g, u = gate, up
    if CLAMP:
        g = tl.minimum(gate, limit, propagate_nan=PropagateNan.ALL)
        u = tl.clamp(up, -limit, limit, propagate_nan=PropagateNan.ALL)
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
