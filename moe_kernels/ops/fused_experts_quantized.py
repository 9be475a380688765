"""The experts of an MoE layer in one op, with weights of 8 or 4 bits; for inference.

T tokens, K experts a token, H hidden size, I intermediate size, E experts, W = 2 * I columns for
gated activations, else I.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kernels.ops._autocast import autocast
from moe_kernels.ops._checks import (
    check_device,
    check_routing,
    check_rows,
    check_same,
    check_tensor,
    shape,
)
from moe_kernels.ops._library import call_op, define, direct_call, register_autograd
from moe_kernels.ops.expert_activation import resolve_activation
from moe_kernels.ops.quantized_experts import QuantizedExperts, check_quantized, has_sizes
from moe_kernels.reference.expert_activation import is_gated
from moe_kernels.reference.fused_experts_quantized import (
    fused_experts_quantized as fused_experts_quantized_reference,
)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


_op = define(
    "fused_experts_quantized(Tensor x, Tensor gate_up, Tensor gate_up_scales, Tensor down,"
    " Tensor down_scales, Tensor topk_ids, Tensor topk_weights, Tensor? gate_up_bias,"
    " Tensor? down_bias, str gate_up_format, str down_format, SymInt inner, str activation,"
    " bool interleaved, float alpha, float limit) -> Tensor",
    reference=fused_experts_quantized_reference,
    fake=_fake,
    triton=False,
)
_direct = direct_call("fused_experts_quantized")


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "fused_experts_quantized: there is no backward; quantised weights are for inference. Run "
        "it under torch.inference_mode() or torch.no_grad(), or train with fused_experts on "
        "gate_up.dequantize() and down.dequantize()."
    )


register_autograd("fused_experts_quantized", _refuse, _no_setup)


@register_flop_formula(torch.ops.moe_kernels.fused_experts_quantized)
def _flops(
    x: Any,
    gate_up: Any,
    gate_up_scales: Any,
    down: Any,
    down_scales: Any,
    topk_ids: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Two products over every slot, as in ``fused_experts``: ``2 * R * (H * W + I * H)``."""
    inner, activation = args[5], args[6]
    width = 2 * inner if is_gated(activation) else inner
    return int(2 * topk_ids[0] * topk_ids[1] * x[1] * (width + inner))


def _check(
    x: Tensor,
    gate_up: QuantizedExperts,
    down: QuantizedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    op = "fused_experts_quantized"
    check_routing(op, x, topk_ids, topk_weights)
    hidden = x.shape[1]
    gated = is_gated(activation)
    layout = f"[E, H, {'2*I' if gated else 'I'}] with H = {hidden} (x.shape[1])"
    check_quantized(op, "gate_up", gate_up, layout)
    check_quantized(op, "down", down, "[E, I, H]")
    experts, of_x, width = gate_up.shape
    if of_x != hidden or (gated and width % 2):
        raise ValueError(f"{op}: gate_up must be {layout}; got {list(gate_up.shape)}")
    inner = width // 2 if gated else width
    if tuple(down.shape) != (experts, inner, hidden):  # which may have come as a list
        raise ValueError(
            f"{op}: down must be [E, I, H] = {[experts, inner, hidden]} for gate_up "
            f"{list(gate_up.shape)} and activation {activation}; got {list(down.shape)}"
        )
    for name, bias, size, columns in (
        ("gate_up_bias", gate_up_bias, width, "W"),
        ("down_bias", down_bias, hidden, "H"),
    ):
        if bias is None:
            continue
        check_tensor(op, name, bias, 2, f"[E, {columns}]")
        check_same(op, "x", x, name, bias)
        if shape(bias) != [experts, size]:
            raise ValueError(f"{op}: {name} must be {[experts, size]}; got {shape(bias)}")
    for name, tensor in (
        ("gate_up", gate_up.codes),
        ("down", down.codes),
        ("topk_ids", topk_ids),
        ("topk_weights", topk_weights),
    ):
        check_device(op, "x", x, name, tensor)


def fused_experts_quantized(
    x: Tensor,
    gate_up: QuantizedExperts,
    down: QuantizedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
) -> Tensor:
    """:func:`fused_experts` with weights of 8 or 4 bits, for inference.

    Computes what ``fused_experts`` computes with ``gate_up.dequantize()`` and
    ``down.dequantize()``.

    On CPU codes are multiplied as they lie in memory, and where experts have few tokens (decode)
    each needed expert is read once. x and the activations are rounded to integers of 16 bits, of 24
    for float32, with a scale for each 32 of them, and the sums of a group are exact. That is wrong
    by at most 1e-4 of the norm of these 32, or 4e-7 for float32; 32 values of which none is above
    1e-30 count as zeros. With fp8 codes they stay in bf16 (float32 where x
    is not bf16, or the processor has no bf16 products). For float64 all weights are written out
    first. On CUDA and elsewhere it is the plain PyTorch definition, which writes them out too and
    waits for the device.

    Args:
        x: [T, H], bf16, fp16, fp32, fp64.
        gate_up: [E, H, 2*I] for gated activations, else [E, H, I], from :func:`quantize_experts`.
        down: [E, I, H], from :func:`quantize_experts`; its format may be another.
        topk_ids: [T, K], int32 or int64, in [0, E). -1 and E mean "no expert here" and add nothing.
        topk_weights: [T, K], any float dtype.
        activation, gate_up_bias, down_bias, interleaved, alpha, limit: as in ``fused_experts``.

    Returns:
        [T, H] in x.dtype.

    Raises:
        ValueError: shapes, devices or options that do not fit, T * K >= 2**31.
        IndexError: an id outside [-1, E].
        TypeError: dtypes that do not fit. Under autocast x and biases are converted first.
        RuntimeError: on differentiating it.
    """
    op = "fused_experts_quantized"
    alpha_value, limit_value = resolve_activation(op, activation, interleaved, alpha, limit)
    if has_sizes(gate_up) and has_sizes(down) and not torch.compiler.is_compiling():
        found: Tensor | None = _direct(
            x,
            gate_up.codes,
            gate_up.scales,
            gate_up.format,
            *gate_up.shape,
            down.codes,
            down.scales,
            down.format,
            *down.shape,
            topk_ids,
            topk_weights,
            gate_up_bias,
            down_bias,
            activation,
            interleaved,
            alpha_value,
            limit_value,
        )
        if found is not None:
            return found
    x, gate_up_bias, down_bias = autocast(x, gate_up_bias, down_bias)
    _check(x, gate_up, down, topk_ids, topk_weights, activation, gate_up_bias, down_bias)
    check_rows(op, topk_ids.shape[0] * topk_ids.shape[1])
    y: Tensor = call_op(
        _op,
        x,
        gate_up.codes,
        gate_up.scales,
        down.codes,
        down.scales,
        topk_ids,
        topk_weights,
        gate_up_bias,
        down_bias,
        gate_up.format,
        down.format,
        down.shape[1],
        activation,
        interleaved,
        alpha_value,
        limit_value,
    )
    return y
