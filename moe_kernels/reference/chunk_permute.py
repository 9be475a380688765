"""Reorder contiguous chunks of rows, as after an exchange: [source][expert] to [expert][source].

C chunks, R rows, H hidden size.
"""

import torch
from torch import Tensor


def chunk_permute(rows: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    """``[R, H]``: chunk ``order[0]`` of ``rows``, then chunk ``order[1]``, ...; then zeros."""
    sizes = sizes.to(torch.int64)
    order = order.to(torch.int64)
    ends = sizes.cumsum(0)
    if bool((sizes < 0).any()) or (sizes.numel() and int(ends[-1]) > rows.shape[0]):
        raise ValueError(
            f"chunk_permute: sizes must be non-negative and sum to at most rows.shape[0] = "
            f"{rows.shape[0]}; got {sizes.tolist()}"
        )
    if not torch.equal(order.sort().values, torch.arange(sizes.numel(), device=order.device)):
        raise ValueError(
            f"chunk_permute: order must be a permutation of 0..{sizes.numel() - 1}; "
            f"got {order.tolist()}"
        )
    starts = (ends - sizes).tolist()
    pieces = [rows[starts[c] : starts[c] + int(sizes[c])] for c in order.tolist()]
    used = sum(piece.shape[0] for piece in pieces)
    return torch.cat([*pieces, rows.new_zeros(rows.shape[0] - used, *rows.shape[1:])])
