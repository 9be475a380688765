"""The experts of an MoE layer with both products in float8: ``fused_experts`` of that precision.

T tokens, K experts a token, R = T * K rows, H hidden size, I intermediate size, E experts,
W = 2 * I columns for gated activations, else I; scales of 1 x 128 for rows, 128 x 128 for weights.

Schemas are those of ``fused_experts`` and its backward, with the scales of float8 weights at the
end. The public function is :func:`moe_kernels.fused_experts` with ``precision="fp8_block"``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.flop_counter import register_flop_formula

from moe_kernels.ops._fused_experts_flops import backward_flops, flops, overwriting_flops
from moe_kernels.ops._library import define, refuse_double_backward, register_autograd
from moe_kernels.ops.fused_experts import (
    backward_fake,
    backward_through,
    experts_fake,
    overwriting_fake,
    setup_context,
)
from moe_kernels.reference.fused_experts import overwriting
from moe_kernels.reference.fused_experts_fp8 import (
    fused_experts_fp8_backward as fused_experts_fp8_backward_reference,
)
from moe_kernels.reference.fused_experts_fp8 import fused_experts_fp8_forward

_op = define(
    "fused_experts_fp8(Tensor x, Tensor gate_up, Tensor down, Tensor topk_ids, Tensor topk_weights,"
    " Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha,"
    " float limit, SymInt num_rows, bool save_for_backward, Tensor? gate_up_main_grad,"
    " Tensor? down_main_grad, Tensor? gate_up_scales, Tensor? down_scales, bool owns_h=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=fused_experts_fp8_forward,
    fake=lambda *args: experts_fake(*args[:15]),
    cpu=partial(fused_experts_fp8_forward, parts=torch.ops.moe_kernels),
)
_backward_op = define(
    "fused_experts_fp8_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down,"
    " Tensor topk_weights, Tensor h, Tensor row_to_slot, Tensor slot_to_row, Tensor offsets,"
    " Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha,"
    " float limit, bool[6] needs, Tensor? known_grad_h=None, bool keep_grad_h=False,"
    " bool keep_weighted_a=False, Tensor? gate_up_scales=None, Tensor? down_scales=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=fused_experts_fp8_backward_reference,
    fake=lambda *args: backward_fake(*args[:19]),
    cpu=partial(fused_experts_fp8_backward_reference, parts=torch.ops.moe_kernels),
)
_overwriting_op = define(
    "fused_experts_fp8_backward_(Tensor grad, Tensor x, Tensor gate_up, Tensor down,"
    " Tensor topk_weights, Tensor(a!) h, Tensor row_to_slot, Tensor slot_to_row, Tensor offsets,"
    " Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha,"
    " float limit, bool[6] needs, bool keep_weighted_a=False, Tensor? gate_up_scales=None,"
    " Tensor? down_scales=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=overwriting(fused_experts_fp8_backward_reference),
    fake=overwriting_fake,
    cpu=overwriting(partial(fused_experts_fp8_backward_reference, parts=torch.ops.moe_kernels)),
)
register_autograd(
    "fused_experts_fp8",
    backward_through(_backward_op, _overwriting_op, x_takes_h=False),
    setup_context,
)
refuse_double_backward("fused_experts_fp8_backward")
register_flop_formula(torch.ops.moe_kernels.fused_experts_fp8)(flops)
register_flop_formula(torch.ops.moe_kernels.fused_experts_fp8_backward)(backward_flops)
register_flop_formula(torch.ops.moe_kernels.fused_experts_fp8_backward_)(overwriting_flops)
