"""Token permutation undone: each token's rows weighted and summed.

T tokens, K experts a token, R = T * K rows, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_tensor,
    shape,
)
from moe_kernels.ops._library import (
    call_op,
    define,
    owed_gradients,
    refuse_double_backward,
    register_autograd,
    remember_inputs,
)
from moe_kernels.ops.permute import check_order
from moe_kernels.ops.sort_by_expert import ExpertOrder
from moe_kernels.reference.unpermute import (
    unpermute as unpermute_reference,
)
from moe_kernels.reference.unpermute import (
    unpermute_backward as unpermute_backward_reference,
)


def _fake(
    rows: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
) -> Tensor:
    return rows.new_empty(slot_to_row.shape[0], rows.shape[1])


def _backward_fake(
    grad: Tensor,
    rows: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    weights: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape if needs[0] else (0,)),
        weights.new_empty(weights.shape) if needs[1] else grad.new_empty(0),
    )


_op = define(
    "unpermute(Tensor rows, Tensor row_to_slot, Tensor slot_to_row, Tensor offsets,"
    " Tensor? weights) -> Tensor",
    reference=unpermute_reference,
    fake=_fake,
)
_backward_op = define(
    "unpermute_backward(Tensor grad, Tensor rows, Tensor row_to_slot, Tensor slot_to_row,"
    " Tensor offsets, Tensor weights, bool[2] needs) -> (Tensor, Tensor)",
    reference=unpermute_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, *order, weights = inputs
    remember_inputs(ctx, inputs)
    ctx.num_rows = rows.shape[0]
    # without weights the gradient is a permutation: the rows themselves are not needed
    ctx.save_for_backward(*order, *([] if weights is None else [rows, weights]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order = ctx.saved_tensors[:3]
    if len(ctx.saved_tensors) == 3:
        return torch.ops.moe_kernels.permute(grad, *order, ctx.num_rows), None, None, None, None
    rows, weights = ctx.saved_tensors[3:]
    owed = owed_gradients(ctx)
    needs = [owed[0], owed[4]]
    grad_rows, grad_weights = _backward_op(grad, rows, *order, weights, needs)
    return (
        grad_rows if needs[0] else None,
        None,
        None,
        None,
        grad_weights if needs[1] else None,
    )


register_autograd("unpermute", _backward, _setup_context)
refuse_double_backward("unpermute_backward")


def unpermute(rows: Tensor, order: ExpertOrder, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows, weighted: the inverse of :func:`permute` and the end of a layer.

    Args:
        rows: [num_rows, H], any float dtype; rows from ``offsets[E]`` on are never read. With fewer
            than ``offsets[E]``, as :func:`permute` returns for a ``num_rows`` that is too small,
            those that are missing count as zero.
        order: from :func:`sort_by_expert`.
        weights: [T, K], any float dtype, or None for ones.

    Returns:
        [T, H] in rows.dtype: ``sum_k weights[t, k] * rows[slot_to_row[t, k]]`` over slots that are
        not dropped, in slot order in float32 without atomics: bitwise repeatable.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: rows or weights are not floating point.
    """
    check_tensor("unpermute", "rows", rows, 2, "[num_rows, H]")
    check_dtype("unpermute", "rows", rows, FLOAT_DTYPES)
    check_order("unpermute", order)
    check_device("unpermute", "rows", rows, "order", order.row_to_slot)
    if weights is not None:
        check_tensor("unpermute", "weights", weights, 2, "[T, K]")
        check_dtype("unpermute", "weights", weights, FLOAT_DTYPES)
        check_device("unpermute", "rows", rows, "weights", weights)
        if weights.shape != order.slot_to_row.shape:
            raise ValueError(
                f"unpermute: weights must be {shape(order.slot_to_row)} as order.slot_to_row; "
                f"got {shape(weights)}"
            )
    out: Tensor = call_op(_op, rows, *order, weights)
    return out
