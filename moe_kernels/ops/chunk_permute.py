"""Reorder contiguous chunks of rows, as after an exchange: [source][expert] to [expert][source].

C chunks, R rows, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_device,
    check_dtype,
    check_tensor,
    shape,
)
from moe_kernels.ops._library import call_op, define, register_autograd
from moe_kernels.reference.chunk_permute import (
    chunk_permute as chunk_permute_reference,
)


def _fake(rows: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


_op = define(
    "chunk_permute(Tensor rows, Tensor sizes, Tensor order) -> Tensor",
    reference=chunk_permute_reference,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sizes, order = ctx.saved_tensors
    order = order.to(torch.int64)
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    return torch.ops.moe_kernels.chunk_permute(grad, sizes[order], inverse), None, None


register_autograd("chunk_permute", _backward, _setup_context)


def chunk_permute(rows: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    """Concatenate chunks of rows in another order.

    Args:
        rows: [R, H], any float dtype: C contiguous chunks, then rows that belong to none.
        sizes: [C], int32 or int64, rows of each chunk, in the present order.
        order: [C], int32 or int64, a permutation: which chunk comes first, second, ...

    Returns:
        [R, H], contiguous; rows past the chunks are zero.

    Raises:
        ValueError: sizes and order are not both [C], order is not a permutation, or sizes are
            negative or sum to more than R (the last two always on CPU; on CUDA with
            ``MOE_KERNELS_CHECK=1``).
        TypeError: wrong dtypes.
    """
    check_tensor("chunk_permute", "rows", rows, 2, "[R, H]")
    check_dtype("chunk_permute", "rows", rows, FLOAT_DTYPES)
    check_tensor("chunk_permute", "sizes", sizes, 1, "[C]")
    check_tensor("chunk_permute", "order", order, 1, "[C]")
    for name, value in (("sizes", sizes), ("order", order)):
        check_dtype("chunk_permute", name, value, INDEX_DTYPES)
        check_device("chunk_permute", "rows", rows, name, value)
    if sizes.shape != order.shape:
        raise ValueError(
            f"chunk_permute: order must be {shape(sizes)} as sizes; got {shape(order)}"
        )
    out: Tensor = call_op(_op, rows, sizes, order)
    return out
