"""Routings that a layer meets: balanced, skewed, partly dropped, empty."""

from __future__ import annotations

import torch
from torch import Tensor

# name: (T, K, E)
SHAPES = {
    "plain": (37, 3, 8),
    "one_token": (1, 2, 4),
    "one_expert": (19, 1, 1),
    "many_experts": (9, 2, 67),
    "no_tokens": (0, 2, 4),
    "all_to_one": (33, 1, 5),
    "dropped": (29, 4, 6),
    "all_dropped": (7, 2, 3),
}


def make_ids(name: str, dtype: torch.dtype = torch.int32) -> tuple[Tensor, int]:
    """``topk_ids [T, K]`` with distinct experts a token, and E."""
    tokens, top_k, experts = SHAPES[name]
    ids = torch.rand(tokens, experts).topk(top_k, dim=1).indices.to(dtype)
    if name == "all_to_one":
        ids.fill_(3)
    elif name == "dropped":
        marker = torch.where(torch.rand(ids.shape) < 0.5, -1, experts).to(dtype)
        ids = torch.where(torch.rand(ids.shape) < 0.6, marker, ids)
    elif name == "all_dropped":
        ids.fill_(-1)
    return ids, experts
