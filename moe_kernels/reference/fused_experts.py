"""The experts of an MoE layer.

T tokens, K experts a token, R = T * K rows, H hidden size, I intermediate size, E experts,
W = 2 * I columns for gated activations, else I.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.reference._accumulate import accumulate_dtype
from moe_kernels.reference.expert_activation import (
    expert_activation,
    expert_activation_backward,
)
from moe_kernels.reference.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_dbias,
    grouped_gemm_wgrad,
    grouped_gemm_wgrad_,
    is_transposed,
)
from moe_kernels.reference.permute import permute
from moe_kernels.reference.sort_by_expert import sort_within
from moe_kernels.reference.unpermute import unpermute, unpermute_backward


def fused_experts(
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
) -> Tensor:
    """``y[t] = sum_k w[t, k] * (act(x[t] @ gate_up[e] + b1[e]) @ down[e] + b2[e])``.

    Expert e is ``ids[t, k]``. Ids -1 and E add nothing. Sums are in float64 for float64 inputs,
    else float32.
    """
    accumulate = accumulate_dtype(x.dtype)
    y = x.new_zeros(x.shape, dtype=accumulate)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == e)
        h = x[token].to(accumulate) @ gate_up[e].to(accumulate)
        if gate_up_bias is not None:
            h = h + gate_up_bias[e].to(accumulate)
        a = expert_activation(h, activation, None, interleaved, alpha, limit)
        out = a @ down[e].to(accumulate)
        if down_bias is not None:
            out = out + down_bias[e].to(accumulate)
        y = y.index_add(0, token, out * topk_weights[token, slot].to(accumulate)[:, None])
    return y.to(x.dtype)


def check_bound(offsets: Tensor, num_rows: int) -> None:
    valid = int(offsets[-1])
    if valid > num_rows:
        raise ValueError(
            f"fused_experts: num_rows must be at least the number of ids in [0, E) = {valid}; "
            f"got {num_rows}"
        )


def forward_outputs(
    y: Tensor, h: Tensor, order: tuple[Tensor, Tensor, Tensor], save_for_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op returns: h and the order have no rows without a backward."""
    if save_for_backward:
        return y, h, *order
    row_to_slot, slot_to_row, offsets = order
    return (
        y,
        h.new_empty(0, h.shape[1]),
        row_to_slot.new_empty(0),
        slot_to_row.new_empty(0, slot_to_row.shape[1]),
        offsets.new_empty(0),
    )


def fused_experts_forward(
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
    gate_up_main_grad: Tensor | None,
    down_main_grad: Tensor | None,
    owns_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``y [T, H]``; with ``save_for_backward`` also ``h [num_rows, W]`` and the order."""
    order = sort_within("fused_experts", topk_ids, gate_up.shape[0])
    check_bound(order[2], num_rows)
    rows = permute(x, *order, num_rows)
    h = grouped_gemm(rows, gate_up, order[2], gate_up_bias)
    a = expert_activation(h, activation, None, interleaved, alpha, limit)
    out = grouped_gemm(a, down, order[2], down_bias, accumulate_dtype(x.dtype))
    y = unpermute(out, *order, topk_weights).to(x.dtype)
    return forward_outputs(y, h, order, save_for_backward)


def row_weights(
    topk_weights: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, offsets: Tensor, num_rows: int
) -> Tensor:
    """The weight of each row's slot [num_rows]; zero for rows of no expert."""
    rows = torch.arange(num_rows, device=offsets.device)
    slot = row_to_slot[:num_rows].long()
    weights = topk_weights.flatten().new_zeros(num_rows)
    weights[: len(slot)] = topk_weights.flatten()[slot]
    return torch.where(rows < offsets[-1], weights, 0)


def fused_experts_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, gate_up, down, topk_weights and the biases; empty where not in ``needs``.

    The last results are the gradient of ``h``, of the slots' weighted results, if ``keep_grad_h``,
    which a later call for other gradients may be given, and the activations times the slots'
    weights, if ``keep_weighted_a``.
    """
    accumulate = accumulate_dtype(x.dtype)
    order = (row_to_slot, slot_to_row, offsets)
    num_rows = h.shape[0]
    grads = [x.new_empty(0) for _ in range(8)]
    a = expert_activation(h, activation, None, interleaved, alpha, limit).to(accumulate)
    out = grouped_gemm(a, down, offsets, down_bias, accumulate)
    grad_out, grad_weights = unpermute_backward(
        grad.to(accumulate), out, *order, topk_weights, [True, needs[3]]
    )
    if needs[3]:
        grads[3] = grad_weights
    if needs[2]:
        grads[2] = grouped_gemm_wgrad(a, grad_out, offsets, down.dtype, is_transposed(down))
    if needs[5] and down_bias is not None:
        grads[5] = grouped_gemm_dbias(grad_out, offsets, down_bias.dtype)
    if keep_weighted_a:
        grads[7] = (a * row_weights(topk_weights, *order, num_rows)[:, None]).to(h.dtype)
    if needs[0] or needs[1] or needs[4] or keep_grad_h:
        if known_grad_h is None:
            grad_a = grouped_gemm(grad_out, down.mT, offsets)
            grad_h, _ = expert_activation_backward(
                grad_a, h.to(accumulate), activation, None, interleaved, alpha, limit
            )
        else:
            grad_h = known_grad_h.to(accumulate)
        if keep_grad_h:
            grads[6] = grad_h.to(h.dtype)
        if needs[1]:
            rows = permute(x, *order, num_rows).to(accumulate)
            transposed = is_transposed(gate_up)
            grads[1] = grouped_gemm_wgrad(rows, grad_h, offsets, gate_up.dtype, transposed)
        if needs[4] and gate_up_bias is not None:
            grads[4] = grouped_gemm_dbias(grad_h, offsets, gate_up_bias.dtype)
        if needs[0]:
            grad_rows = grouped_gemm(grad_h, gate_up.mT, offsets)
            grads[0] = unpermute(grad_rows, *order, None).to(x.dtype)
    return tuple(grads)  # type: ignore[return-value]


def overwriting(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The backward that leaves the gradient of h in h, by one that yields it.

    Its arguments are the other's but known_grad_h and keep_grad_h.
    """

    def run(*args: Any) -> tuple[Tensor, ...]:
        *grads, grad_h, weighted_a = backward(*args[:16], None, True, *args[16:])
        args[5].copy_(grad_h)
        return (*grads, weighted_a)

    return run


def fused_experts_wgrad_(
    out: Tensor,
    a: Tensor,
    grad: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    gather_a: bool,
) -> None:
    """``out[e] += a[rows of e].T @ grad[rows of e]`` in place.

    Of a, if ``gather_a``, else of grad, row r is that of the slot's token.
    """
    count = int(offsets[-1])
    token = row_to_slot[:count].long() // slot_to_row.shape[1]
    a, grad = (a[token], grad[:count]) if gather_a else (a[:count], grad[token])
    grouped_gemm_wgrad_(out, a, grad, offsets)
