"""What fused_experts asks of its arguments.

H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    check_accumulator,
    check_choice,
    check_device,
    check_dtype,
    check_routing,
    check_same,
    check_tensor,
    shape,
)
from moe_kernels.ops.quantize import check_weight_scales
from moe_kernels.reference.expert_activation import is_gated

PRECISIONS = ("fp8_block",)


def check_layer(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    weight_scales: tuple[Tensor, Tensor] | None,
) -> None:
    op = "fused_experts"
    check_routing(op, x, topk_ids, topk_weights)
    hidden = x.shape[1]
    columns = "2*I" if is_gated(activation) else "I"
    layout = f"[E, H, {columns}] with H = {hidden} (x.shape[1])"
    check_tensor(op, "gate_up", gate_up, 3, layout)
    if gate_up.shape[1] != hidden or (is_gated(activation) and gate_up.shape[2] % 2):
        raise ValueError(f"{op}: gate_up must be {layout}; got {shape(gate_up)}")
    experts, width = gate_up.shape[0], gate_up.shape[2]
    inner = width // 2 if is_gated(activation) else width
    check_tensor(op, "down", down, 3, "[E, I, H]")
    if shape(down) != [experts, inner, hidden]:
        raise ValueError(
            f"{op}: down must be [E, I, H] = {[experts, inner, hidden]} for gate_up "
            f"{shape(gate_up)} and activation {activation}; got {shape(down)}"
        )
    if weight_scales is None:
        check_same(op, "x", x, "gate_up", gate_up)
        check_same(op, "x", x, "down", down)
    else:
        check_weight_scales(op, weight_scales, x, gate_up, down)
    for name, bias, size in (
        ("gate_up_bias", gate_up_bias, width),
        ("down_bias", down_bias, hidden),
    ):
        if bias is None:
            continue
        check_tensor(op, name, bias, 2, f"[E, {size}]")
        check_same(op, "x", x, name, bias)
        if shape(bias) != [experts, size]:
            raise ValueError(f"{op}: {name} must be {[experts, size]}; got {shape(bias)}")
    check_device(op, "x", x, "topk_ids", topk_ids)
    check_device(op, "x", x, "topk_weights", topk_weights)


def check_precision(
    op: str,
    precision: str | None,
    weight_scales: tuple[Tensor, Tensor] | None,
    main_grads: tuple[Tensor | None, Tensor | None],
) -> None:
    if precision is not None:
        check_choice(op, "precision", precision, PRECISIONS)
    if weight_scales is None:
        return
    if precision is None:
        raise ValueError(f"{op}: weight_scales need precision='fp8_block'; got None")
    if any(main is not None for main in main_grads):
        raise ValueError(
            f"{op}: main_grads must be None with weight_scales, whose weights have no gradient"
        )


def check_main_grad(op: str, name: str, main: Tensor, weight: Tensor, x: Tensor) -> None:
    name = f"main_grads: that of {name}"
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_tensor(op, name, main, 3, f"{shape(weight)}")
    check_dtype(op, name, main, (wide,))
    check_device(op, "x", x, name, main)
    if main.shape != weight.shape:
        raise ValueError(f"{op}: {name} must be {shape(weight)} as the weight; got {shape(main)}")
    check_accumulator(op, name, main)
    if main.requires_grad:
        raise ValueError(
            f"{op}: {name} must be a buffer that is added to, without requires_grad; got one that "
            "requires a gradient"
        )
