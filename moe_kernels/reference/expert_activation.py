"""Activations of expert layers and their derivatives.

R rows, I intermediate size, W = 2 * I columns for gated kinds, else I.
"""

import math
import sys

import torch
from torch import Tensor
from torch.nn import functional

from moe_kernels.reference._accumulate import accumulate_dtype

GATED = ("swiglu", "geglu", "reglu", "swigluoai")
UNGATED = ("relu2", "silu", "gelu")
ACTIVATIONS = GATED + UNGATED


def is_gated(kind: str) -> bool:
    """Whether ``kind`` takes a gate and an up half."""
    return kind in GATED


def default_limit(kind: str) -> float:
    """The clamp of ``kind`` where none is asked for: gpt-oss' 7 for swigluoai, else none."""
    return 7.0 if kind == "swigluoai" else math.inf


def is_clamped(kind: str, limit: float) -> bool:
    """Whether ``limit`` does anything: exported graphs have the largest double for no clamp."""
    return kind in ("swiglu", "swigluoai") and limit < sys.float_info.max


def clamp_gate_up(gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The gate up to ``limit``, up within +-limit. At the bound the slope is 1, where that of
    torch.clamp was 1 and is 0 from 2.14.
    """
    up = torch.where(up < -limit, -limit, up)
    return torch.where(gate > limit, limit, gate), torch.where(up > limit, limit, up)


def split_gate_up(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The gate and the up half of ``h [..., 2I]``, concatenated or in alternating columns."""
    if interleaved:
        return h[..., 0::2], h[..., 1::2]
    gate, up = h.chunk(2, dim=-1)
    return gate, up


def expert_activation(
    h: Tensor,
    kind: str,
    row_weights: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """``[R, I]``: the activation of ``h [R, W]``, times ``row_weights [R]`` where given.

    swiglu ``silu(g) * u`` (Shazeer 2020, arXiv:2002.05202), geglu with the tanh form of GELU,
    reglu; swigluoai ``g * sigmoid(alpha * g) * (u + 1)``. ``limit`` clamps g above and u to +-limit
    in swiglu and swigluoai (:func:`default_limit`). Not gated: relu2 ``relu(h)**2`` (So et al.
    2021, arXiv:2109.08668), silu, gelu (erf).
    """
    wide = h.to(accumulate_dtype(h.dtype))
    limit = default_limit(kind) if limit is None else limit
    if kind in GATED:
        gate, up = split_gate_up(wide, interleaved)
        if is_clamped(kind, limit):
            gate, up = clamp_gate_up(gate, up, limit)
        if kind == "swiglu":
            out = functional.silu(gate) * up
        elif kind == "geglu":
            out = functional.gelu(gate, approximate="tanh") * up
        elif kind == "reglu":
            out = functional.relu(gate) * up
        else:
            out = gate * torch.sigmoid(alpha * gate) * (up + 1)
    elif kind == "relu2":
        out = functional.relu(wide).square()
    elif kind == "silu":
        out = functional.silu(wide)
    else:
        out = functional.gelu(wide)
    if row_weights is not None:
        out = out * row_weights.to(wide.dtype)[:, None]
    return out.to(h.dtype)


def _derivative(kind: str, z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``f(z)`` and ``f'(z)`` of the function that the gate (or the whole input) goes through."""
    if kind in ("swiglu", "silu", "swigluoai"):
        a = alpha if kind == "swigluoai" else 1.0
        s = torch.sigmoid(a * z)
        return z * s, s * (1 + a * z * (1 - s))
    if kind == "geglu":
        c, k = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(c * (z + k * z**3))
        return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * k * z * z)
    if kind == "reglu":
        return functional.relu(z), (z > 0).to(z.dtype)
    if kind == "relu2":
        return functional.relu(z).square(), 2 * functional.relu(z)
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return z * cdf, cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def expert_activation_backward(
    grad: Tensor,
    h: Tensor,
    kind: str,
    row_weights: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """Gradients to ``h`` and to ``row_weights`` (empty where none were given)."""
    accumulate = accumulate_dtype(h.dtype)
    wide, grad = h.to(accumulate), grad.to(accumulate)
    scaled = grad if row_weights is None else grad * row_weights.to(accumulate)[:, None]
    if kind in GATED:
        raw_gate, raw_up = split_gate_up(wide, interleaved)
        gate, up = raw_gate, raw_up
        clamped = is_clamped(kind, limit)
        if clamped:
            gate, up = clamp_gate_up(gate, up, limit)
        value, slope = _derivative(kind, gate, alpha)
        shifted = up + 1 if kind == "swigluoai" else up
        out = value * shifted
        grad_gate, grad_up = scaled * slope * shifted, scaled * value
        if clamped:
            grad_gate = torch.where(raw_gate <= limit, grad_gate, grad_gate.new_zeros(()))
            grad_up = torch.where(raw_up.abs() <= limit, grad_up, grad_up.new_zeros(()))
        if interleaved:
            grad_h = torch.stack([grad_gate, grad_up], dim=-1).flatten(-2)
        else:
            grad_h = torch.cat([grad_gate, grad_up], dim=-1)
    else:
        out, slope = _derivative(kind, wide, alpha)
        grad_h = scaled * slope
    if row_weights is None:
        return grad_h.to(h.dtype), h.new_empty(0)
    return grad_h.to(h.dtype), (grad * out).sum(-1).to(row_weights.dtype)
