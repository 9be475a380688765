"""Token permutation: rows grouped by expert.

T tokens, K experts a token, R = T * K rows, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_num_rows,
    check_tensor,
)
from moe_kernels.ops._library import call_op, define, register_autograd
from moe_kernels.ops.sort_by_expert import ExpertOrder
from moe_kernels.reference.permute import (
    permute as permute_reference,
)


def _fake(
    x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, offsets: Tensor, num_rows: int
) -> Tensor:
    return x.new_empty(num_rows, x.shape[1])


_op = define(
    "permute(Tensor x, Tensor row_to_slot, Tensor slot_to_row, Tensor offsets, SymInt num_rows)"
    " -> Tensor",
    reference=permute_reference,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *order, _ = inputs
    ctx.save_for_backward(*order)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # the op, not the public function: it is differentiable itself
    dx = torch.ops.moe_kernels.unpermute(grad, *ctx.saved_tensors, None)
    return dx, None, None, None, None


register_autograd("permute", _backward, _setup_context)


def check_order(op: str, order: Any, x: Tensor | None = None) -> None:
    """Raise unless ``order`` is one, of as many tokens as ``x [T, H]`` has if it is given."""
    if not isinstance(order, ExpertOrder):
        raise TypeError(
            f"{op}: order must be the ExpertOrder of sort_by_expert; got {type(order).__name__}"
        )
    row_to_slot, slot_to_row, offsets = order
    check_tensor(op, "order.slot_to_row", slot_to_row, 2, "[T, K]")
    check_tensor(op, "order.row_to_slot", row_to_slot, 1, "[T * K]")
    check_tensor(op, "order.offsets", offsets, 1, "[E + 1]")
    for name, value in zip(order._fields, order, strict=True):
        check_dtype(op, f"order.{name}", value, (torch.int32,))
        if not value.is_contiguous():
            raise ValueError(
                f"{op}: order.{name} must be contiguous, as sort_by_expert returns it; got strides "
                f"{list(value.stride())}"
            )
        check_device(op, "order.row_to_slot", row_to_slot, f"order.{name}", value)
    if offsets.shape[0] == 0:
        raise ValueError(f"{op}: order.offsets must be [E + 1], at least one entry; got [0]")
    if x is not None and slot_to_row.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: order.slot_to_row must be [T, K] with T = {x.shape[0]} (x.shape[0]); "
            f"got {list(slot_to_row.shape)}"
        )
    if row_to_slot.shape[0] != slot_to_row.shape[0] * slot_to_row.shape[1]:
        raise ValueError(
            f"{op}: order.row_to_slot must have T * K = {slot_to_row.numel()} rows; "
            f"got {row_to_slot.shape[0]}"
        )


@overload
def permute(
    x: Tensor, order: ExpertOrder, *, num_rows: int | None = None, scales: None = None
) -> Tensor: ...


@overload
def permute(
    x: Tensor, order: ExpertOrder, *, num_rows: int | None = None, scales: Tensor
) -> tuple[Tensor, Tensor]: ...


def permute(
    x: Tensor,
    order: ExpertOrder,
    *,
    num_rows: int | None = None,
    scales: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Copy each token's row to the rows of its experts.

    Args:
        x: [T, H], any float dtype or float8_e4m3fn, any strides.
        order: from :func:`sort_by_expert`.
        num_rows: how many rows to return, at least ``offsets[E]`` (a bound the caller knows; with
            fewer, rows are lost). Default R = T * K.
        scales: [T, ceil(H / block)], of float8 rows (:func:`quantize_rows`), to be copied alike.
            To quantise on the way, see :func:`permute_quantize`.

    Returns:
        [num_rows, H]: rows of expert e at ``offsets[e]:offsets[e + 1]``; rows of dropped slots, at
        the tail, are zero. Backward sums a token's row gradients in slot order in float32. With
        scales also theirs, [num_rows, ceil(H / block)].

    Raises:
        ValueError: x is not [T, H] with the T of the order, or lies on another device; scales have
            another T.
        TypeError: x is neither floating point nor float8_e4m3fn; scales come with what is not
            float8, or are not float32.
        RuntimeError: x is float8 and requires a gradient, which float8 cannot hold.
    """
    check_tensor("permute", "x", x, 2, "[T, H]")
    check_dtype("permute", "x", x, (*FLOAT_DTYPES, torch.float8_e4m3fn))
    check_order("permute", order, x)
    check_device("permute", "x", x, "order", order.row_to_slot)
    rows = order.row_to_slot.shape[0] if num_rows is None else num_rows
    check_num_rows("permute", rows)
    if x.dtype == torch.float8_e4m3fn and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "permute: x is float8_e4m3fn and requires a gradient, which float8 cannot hold. "
            "Permute unquantised rows and train with fp8_grouped_gemm, or use torch.no_grad()."
        )
    if scales is not None:
        check_tensor("permute", "scales", scales, 2, "[T, ceil(H / block)]")
        check_dtype("permute", "scales", scales, (torch.float32,))
        check_device("permute", "x", x, "scales", scales)
        check_dtype("permute", "x, with scales,", x, (torch.float8_e4m3fn,))
        if scales.shape[0] != x.shape[0]:
            raise ValueError(
                f"permute: scales must be [T, ceil(H / block)] with T = {x.shape[0]} "
                f"(x.shape[0]); got {list(scales.shape)}"
            )
    out: Tensor = call_op(_op, x, *order, rows)
    return out if scales is None else (out, _op(scales, *order, rows))
