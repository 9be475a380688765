"""Ulysses: ranks exchange parts of the sequence for parts of the heads, and back.

B sequences, N heads, L tokens of a rank, D size of a head, P ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_parallel.context_parallel.exchange import Ranks, pack, unpack
from moe_parallel.context_parallel.layout import part_of_sequence, to_sequence_order


def to_heads(tensors: list[Tensor], balanced: bool, ranks: Ranks) -> list[Tensor]:
    """Each [B, N, L, D], all heads of this rank's tokens, to [B, N / P, L P, D]."""
    parts = [tensor.chunk(ranks.size, 1) for tensor in tensors]
    received = _swap(parts, ranks)
    return [to_sequence_order(found, 2, balanced) for found in received]


def to_tokens(tensors: list[Tensor], balanced: bool, ranks: Ranks) -> list[Tensor]:
    """Each [B, N / P, L P, D], this rank's heads of all tokens, to [B, N, L, D]."""
    parts = [
        [part_of_sequence(tensor, rank, ranks.size, 2, balanced) for rank in range(ranks.size)]
        for tensor in tensors
    ]
    return [torch.cat(found, 1) for found in _swap(parts, ranks)]


def _swap(parts: list[Any], ranks: Ranks) -> list[Any]:
    """``parts[t][p]`` of tensor t goes to rank p; what came from rank p is there in the result."""
    shapes = [own[0].shape for own in parts]
    send = torch.stack([pack(*to_rank) for to_rank in zip(*parts, strict=True)])
    receive = torch.empty_like(send)
    ranks.swap(send, receive).wait()
    by_rank = [unpack(message, shapes) for message in receive]
    return list(zip(*by_rank, strict=True))
