"""Token permutation: rows grouped by expert.

T tokens, K experts a token, R = T * K rows, H hidden size, E experts.
"""

import torch
from torch import Tensor


def permute(
    x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, offsets: Tensor, num_rows: int
) -> Tensor:
    """``[num_rows, H]``: row r is ``x[row_to_slot[r] // K]``; rows past ``offsets[E]`` are zero."""
    top_k = slot_to_row.shape[1]
    slots = row_to_slot[:num_rows].to(torch.int64)
    rows = x[slots // max(top_k, 1)]
    used = torch.arange(slots.numel(), device=x.device) < offsets[-1]
    rows = torch.where(used[:, None], rows, rows.new_zeros(()))
    missing = num_rows - slots.numel()
    return torch.cat([rows, rows.new_zeros(missing, x.shape[1])]) if missing > 0 else rows
