"""Token permutation undone: each token's rows weighted and summed.

T tokens, K experts a token, R = T * K rows, H hidden size, E experts.
"""

import torch
from torch import Tensor

from moe_kernels.reference._accumulate import accumulate_dtype
from moe_kernels.reference.permute import permute


def _gather(rows: Tensor, slot_to_row: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by slot ``[T, K, H]``, zero for dropped slots and for rows that are missing at the end;
    and which slots are used ``[T, K]``."""
    used = slot_to_row < offsets[-1].clamp(max=rows.shape[0])
    with_zero = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return with_zero[torch.where(used, slot_to_row, rows.shape[0]).to(torch.int64)], used


def unpermute(
    rows: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """``[T, H]``: ``sum_k weights[t, k] * rows[slot_to_row[t, k]]`` over slots not dropped."""
    accumulate = accumulate_dtype(rows.dtype)
    gathered, used = _gather(rows, slot_to_row, offsets)
    gathered = gathered.to(accumulate)
    if weights is not None:
        clean = torch.where(used, weights, weights.new_zeros(()))
        gathered = gathered * clean.to(accumulate)[..., None]
    return gathered.sum(1).to(rows.dtype)


def unpermute_backward(
    grad: Tensor,
    rows: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    offsets: Tensor,
    weights: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients to rows (``weights * grad``, gathered) and to weights (``<grad, rows>``)."""
    accumulate = accumulate_dtype(rows.dtype)
    grad_rows, grad_weights = grad.new_empty(0), grad.new_empty(0)
    if needs[0]:
        num_rows = rows.shape[0]
        by_row = permute(grad, row_to_slot, slot_to_row, offsets, num_rows)
        slots = row_to_slot[:num_rows].to(torch.int64)
        scale = grad.new_zeros(num_rows, dtype=accumulate)
        scale[: slots.numel()] = weights.reshape(-1)[slots].to(accumulate)
        used = torch.arange(num_rows, device=grad.device) < offsets[-1]
        scale = torch.where(used, scale, scale.new_zeros(()))
        grad_rows = (by_row.to(accumulate) * scale[:, None]).to(rows.dtype)
    if needs[1]:
        gathered, _ = _gather(rows, slot_to_row, offsets)
        products = gathered.to(accumulate) * grad.to(accumulate)[:, None]
        grad_weights = products.sum(-1).to(weights.dtype)
    return grad_rows, grad_weights
