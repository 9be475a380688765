"""Activations of expert layers.

R rows, I intermediate size, W = 2 * I columns for gated kinds, else I.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._activation import (
    Activation,
    activate,
    activate_backward,
    activate_gated,
    activate_gated_backward,
)
from moe_kernels.triton._launch import (
    ceil_div,
    float_type,
    next_power_of_2,
    on_device_of,
)
from moe_kernels.triton._replay import launch

TILE = 2048  # results of a program at a time


@triton.jit
def _halves(
    h, row, column, stride_r, stride_c, I, mask, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr
):
    """The gate and the up values of ``column``; interleaved ones sit side by side."""
    first = h + row[:, None] * stride_r
    if INTERLEAVED:
        gate = first + 2 * column[None, :] * stride_c
        up = gate + stride_c
    else:
        gate = first + column[None, :] * stride_c
        up = gate + I * stride_c
    return (
        tl.load(gate, mask=mask, other=0.0).to(WIDE),
        tl.load(up, mask=mask, other=0.0).to(WIDE),
    )


@triton.jit(do_not_specialize=["R"])
def _expert_activation_kernel(
    h, row_weights, out, R, I, alpha, limit, stride_r, stride_c, stride_w,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (row < R)[:, None] & (column < I)[None, :]
    if GATED:
        gate, up = _halves(h, row, column, stride_r, stride_c, I, mask, INTERLEAVED, WIDE)
        value = activate_gated(gate, up, alpha, limit, KIND, CLAMP, PRECISE)
    else:
        x = h + row[:, None] * stride_r + column[None, :] * stride_c
        value = activate(tl.load(x, mask=mask, other=0.0).to(WIDE), KIND, PRECISE)
    if WEIGHTED:
        weight = tl.load(row_weights + row * stride_w, mask=row < R, other=0.0)
        value *= weight.to(WIDE)[:, None]
    tl.store(out + row[:, None] * I + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _expert_activation_backward_kernel(
    grad, h, row_weights, grad_h, grad_weights, R, I, alpha, limit,
    stride_gr, stride_gc, stride_r, stride_c, stride_w,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    weight = tl.full((BLOCK_R,), 1.0, WIDE)
    if WEIGHTED:
        weight = tl.load(row_weights + row * stride_w, mask=row < R, other=0.0).to(WIDE)
    dot = tl.zeros((BLOCK_R,), WIDE)
    for start in range(0, I, BLOCK_I):
        column = start + tl.arange(0, BLOCK_I).to(tl.int64)
        mask = (row < R)[:, None] & (column < I)[None, :]
        g = tl.load(
            grad + row[:, None] * stride_gr + column[None, :] * stride_gc, mask=mask, other=0.0
        ).to(WIDE)
        scaled = g * weight[:, None]
        if GATED:
            gate, up = _halves(h, row, column, stride_r, stride_c, I, mask, INTERLEAVED, WIDE)
            value, grad_gate, grad_up = activate_gated_backward(
                scaled, gate, up, alpha, limit, KIND, CLAMP, PRECISE
            )
            first = grad_h + row[:, None] * (2 * I)
            if INTERLEAVED:
                to_gate = first + 2 * column[None, :]
                to_up = to_gate + 1
            else:
                to_gate = first + column[None, :]
                to_up = to_gate + I
            tl.store(to_gate, grad_gate.to(grad_h.dtype.element_ty), mask=mask)
            tl.store(to_up, grad_up.to(grad_h.dtype.element_ty), mask=mask)
        else:
            x = tl.load(
                h + row[:, None] * stride_r + column[None, :] * stride_c, mask=mask, other=0.0
            ).to(WIDE)
            value, grad_x = activate_backward(scaled, x, KIND, PRECISE)
            tl.store(
                grad_h + row[:, None] * I + column[None, :],
                grad_x.to(grad_h.dtype.element_ty),
                mask=mask,
            )
        if WEIGHTED:
            dot += tl.sum(g * value, 1)
    if WEIGHTED:
        tl.store(grad_weights + row, dot.to(grad_weights.dtype.element_ty), mask=row < R)


def expert_activation(
    h: Tensor,
    kind: str,
    row_weights: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    act = Activation(kind, interleaved, alpha, limit)
    R, I = h.shape[0], h.shape[1] // 2 if act.gated else h.shape[1]
    out = h.new_empty(R, I)
    if out.numel() == 0:
        return out
    block_i = min(next_power_of_2(I), 512)
    block_r = TILE // max(block_i, 32)
    with on_device_of(h):
        launch(
            _expert_activation_kernel, (ceil_div(R, block_r), ceil_div(I, block_i)),
            h, row_weights, out, R, I, alpha, limit, *h.stride(),
            0 if row_weights is None else row_weights.stride(0),
            **act.constants(h), WEIGHTED=row_weights is not None, WIDE=float_type(h),
            BLOCK_R=block_r, BLOCK_I=block_i,
        )  # fmt: skip
    return out


def expert_activation_backward(
    grad: Tensor,
    h: Tensor,
    kind: str,
    row_weights: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    act = Activation(kind, interleaved, alpha, limit)
    R, I = h.shape[0], h.shape[1] // 2 if act.gated else h.shape[1]
    grad_h = h.new_empty(h.shape)
    grad_weights = h.new_empty(0) if row_weights is None else row_weights.new_empty(R)
    if R == 0 or I == 0:
        return grad_h, grad_weights.zero_()
    block_i = min(next_power_of_2(I), 512)
    block_r = TILE // max(block_i, 32)
    with on_device_of(h):
        launch(
            _expert_activation_backward_kernel, (ceil_div(R, block_r),),
            grad, h, row_weights, grad_h, grad_weights, R, I, alpha, limit,
            *grad.stride(), *h.stride(), 0 if row_weights is None else row_weights.stride(0),
            **act.constants(h), WEIGHTED=row_weights is not None, WIDE=float_type(h),
            BLOCK_R=block_r, BLOCK_I=block_i,
        )  # fmt: skip
    return grad_h, grad_weights
