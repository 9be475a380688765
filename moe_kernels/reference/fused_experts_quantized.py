"""The experts of an MoE layer with quantised weights.

T tokens, K experts a token, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moe_kernels.reference._accumulate import accumulate_dtype
from moe_kernels.reference.expert_activation import is_gated
from moe_kernels.reference.fused_experts import fused_experts
from moe_kernels.reference.quantized_experts import dequantize
from moe_kernels.reference.sort_by_expert import check_ids


def fused_experts_quantized(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_format: str,
    down_format: str,
    inner: int,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    """:func:`fused_experts` with the weights that the codes stand for."""
    check_ids("fused_experts_quantized", topk_ids, gate_up.shape[0])
    hidden, accumulate = x.shape[1], accumulate_dtype(x.dtype)
    width = 2 * inner if is_gated(activation) else inner
    y = fused_experts(
        x.to(accumulate),
        dequantize(gate_up, gate_up_scales, gate_up_format, hidden, width, accumulate),
        dequantize(down, down_scales, down_format, inner, hidden, accumulate),
        topk_ids,
        topk_weights,
        activation=activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
    )
    return y.to(x.dtype)
