"""The experts of an MoE layer with both products in float8, scaled by blocks.

T tokens, K experts a token, R = T * K rows, H hidden size, I intermediate size, E experts,
W = 2 * I columns for gated activations, else I; scales of 1 x 128 for rows, 128 x 128 for weights.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_kernels.reference._accumulate import accumulate_dtype
from moe_kernels.reference.expert_activation import (
    default_limit,
    expert_activation,
    expert_activation_backward,
)
from moe_kernels.reference.fused_experts import check_bound, forward_outputs, row_weights
from moe_kernels.reference.grouped_gemm import (
    grouped_gemm_dbias,
    grouped_gemm_wgrad,
    is_transposed,
)
from moe_kernels.reference.permute import permute
from moe_kernels.reference.quantize import permute_quantize, quantize_rows, quantize_weights
from moe_kernels.reference.scaled_grouped_gemm import scaled_grouped_gemm
from moe_kernels.reference.sort_by_expert import sort_by_expert, sort_within
from moe_kernels.reference.unpermute import unpermute

FLOAT8, BLOCK = torch.float8_e4m3fn, 128
# the definition's parts, by the names of their ops, which take the same arguments
PARTS = SimpleNamespace(
    sort_by_expert=sort_by_expert,
    permute=permute,
    permute_quantize=permute_quantize,
    quantize_rows=quantize_rows,
    quantize_weights=quantize_weights,
    scaled_grouped_gemm=scaled_grouped_gemm,
    expert_activation=expert_activation,
    expert_activation_backward=expert_activation_backward,
    grouped_gemm_wgrad=grouped_gemm_wgrad,
    grouped_gemm_dbias=grouped_gemm_dbias,
    unpermute=unpermute,
)


def fused_experts_fp8(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float | None = None,
    weight_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``y[t] = sum_k w[t, k] * (q(act(q(x[t]) @ q(gate_up[e]) + b1[e])) @ q(down[e]) + b2[e])``.

    q rounds to float8 by blocks and back, and act is rounded to x's dtype before. With
    ``weight_scales`` the weights are float8 already. Sums are in float64 for float64 inputs, else
    float32. No gradient: rounding has none.
    """
    return fused_experts_fp8_forward(
        x,
        gate_up,
        down,
        topk_ids,
        topk_weights,
        gate_up_bias,
        down_bias,
        activation,
        interleaved,
        alpha,
        default_limit(activation) if limit is None else limit,
        topk_ids.numel(),
        False,
        None,
        None,
        *((None, None) if weight_scales is None else weight_scales),
    )[0]


def _float8(parts: Any, weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    if scales is not None:
        return weight, scales
    values: Tensor
    values, scales = parts.quantize_weights(weight, FLOAT8, BLOCK, False, True)
    return values, scales


def fused_experts_fp8_forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    num_rows: int,
    save_for_backward: bool,
    gate_up_main_grad: Tensor | None = None,
    down_main_grad: Tensor | None = None,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    owns_h: bool = False,
    parts: Any = PARTS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``y [T, H]``; with ``save_for_backward`` also ``h [num_rows, W]`` and the order."""
    order = sort_within("fused_experts", topk_ids, gate_up.shape[0], parts.sort_by_expert)
    offsets = order[2]
    check_bound(offsets, num_rows)
    rows, row_scales = parts.permute_quantize(x, *order, num_rows, FLOAT8, BLOCK, False)
    w, w_scales = _float8(parts, gate_up, gate_up_scales)
    h = parts.scaled_grouped_gemm(rows, w, row_scales, w_scales, offsets, gate_up_bias, x.dtype)
    a = parts.expert_activation(h, activation, None, interleaved, alpha, limit)
    rows, row_scales = parts.quantize_rows(a, FLOAT8, BLOCK, False)
    w, w_scales = _float8(parts, down, down_scales)
    wide = accumulate_dtype(x.dtype)
    out = parts.scaled_grouped_gemm(rows, w, row_scales, w_scales, offsets, down_bias, wide)
    y = parts.unpermute(out, *order, topk_weights).to(x.dtype)
    return forward_outputs(y, h, order, save_for_backward)


def fused_experts_fp8_backward(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    h: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: list[bool],
    known_grad_h: Tensor | None = None,
    keep_grad_h: bool = False,
    keep_weighted_a: bool = False,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    parts: Any = PARTS,
) -> tuple[Tensor, ...]:
    """Gradients as of ``fused_experts_backward``, with the products of dA and dX in float8.

    Gradients go straight through every rounding. The rows of ``grad`` and of the gradient of h are
    quantised; the gradients of the weights are products in x's dtype of unquantised rows.
    """
    order, num_rows = (row_to_slot, slot_to_row, offsets), h.shape[0]
    options, wide = (interleaved, alpha, limit), accumulate_dtype(x.dtype)
    grads = [x.new_empty(0) for _ in range(8)]
    used = int(offsets[-1])
    slot = row_to_slot[:used].long()
    weights = row_weights(topk_weights, *order, num_rows).to(wide)
    grad_h = known_grad_h
    if needs[3] or (grad_h is None and (needs[0] or needs[1] or needs[4] or keep_grad_h)):
        rows, scales = parts.permute_quantize(grad, *order, num_rows, FLOAT8, BLOCK, False)
        back = None if down_scales is None else down_scales.mT
        w, w_scales = _float8(parts, down.mT, back)
        grad_a = parts.scaled_grouped_gemm(rows, w, scales, w_scales, offsets, None, x.dtype)
        found, dots = parts.expert_activation_backward(grad_a, h, activation, weights, *options)
        grad_h = found if grad_h is None else grad_h
        if needs[3]:
            of_slots = topk_weights.new_zeros(row_to_slot.numel(), dtype=wide)
            of_slots[slot] = dots[:used]
            if down_bias is not None:
                counts = offsets.diff().long()
                expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
                of_rows = grad[slot // slot_to_row.shape[1]].to(wide) * down_bias[expert].to(wide)
                of_slots[slot] += of_rows.sum(1)
            grads[3] = of_slots.view(topk_weights.shape).to(topk_weights.dtype)
    if needs[2] or keep_weighted_a:
        weighted_a = parts.expert_activation(h, activation, weights, *options)
        if keep_weighted_a:
            grads[7] = weighted_a
        if needs[2]:
            rows, layout = parts.permute(grad, *order, num_rows), is_transposed(down)
            grads[2] = parts.grouped_gemm_wgrad(weighted_a, rows, offsets, down.dtype, layout)
    if needs[5] and down_bias is not None:
        rows = parts.permute(grad, *order, num_rows).to(wide) * weights[:, None]
        grads[5] = parts.grouped_gemm_dbias(rows, offsets, down_bias.dtype)
    if grad_h is None:
        return tuple(grads)
    if keep_grad_h:
        grads[6] = grad_h if known_grad_h is None else grad_h.clone()
    if needs[1]:
        rows, layout = parts.permute(x, *order, num_rows), is_transposed(gate_up)
        grads[1] = parts.grouped_gemm_wgrad(rows, grad_h, offsets, gate_up.dtype, layout)
    if needs[4] and gate_up_bias is not None:
        grads[4] = parts.grouped_gemm_dbias(grad_h, offsets, gate_up_bias.dtype)
    if needs[0]:
        rows, scales = parts.quantize_rows(grad_h, FLOAT8, BLOCK, False)
        back = None if gate_up_scales is None else gate_up_scales.mT
        w, w_scales = _float8(parts, gate_up.mT, back)
        out = parts.scaled_grouped_gemm(rows, w, scales, w_scales, offsets, None, wide)
        grads[0] = parts.unpermute(out, *order, None).to(x.dtype)
    return tuple(grads)
