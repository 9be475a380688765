"""Ring attention: keys and values travel from rank to rank, each rank keeps its queries.

Forward sends keys and values around once. Backward sends them around again, and after them their
gradients, to which every rank adds its part: no rank keeps keys and values of another.

B sequences, N heads, G key and value heads, L tokens of a rank, D size of a head, P ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_parallel.context_parallel.blocks import Total, attend, attend_backward, wide_dtype
from moe_parallel.context_parallel.exchange import Ranks, pack, unpack
from moe_parallel.context_parallel.layout import visible

_KEYS, _GRADS = 0, 1  # tags


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, balanced: bool, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """``(out [B, N, L, D of values], lse [B, N, L])`` of this rank's queries and all keys."""
    total, shapes = Total(q, v), (k.shape, v.shape)
    message = pack(k, v)
    spare = [torch.empty_like(message) for _ in range(min(2, ranks.size - 1))]
    for step in range(ranks.size):
        source = (ranks.rank - step) % ranks.size
        arriving = spare[step % 2] if step < ranks.size - 1 else message
        transfer = ranks.shift(message, arriving, _KEYS) if arriving is not message else None
        block = visible(ranks.rank, source, ranks.size, q.shape[2], causal, balanced)
        if block is not None:
            keys, values = (t[:, :, block.keys] for t in unpack(message, shapes))
            queries = q[:, :, block.queries]
            total.add(block.queries, *attend(queries, keys, values, scale, block.causal))
        if transfer is not None:
            transfer.wait()
            message = arriving
    return total.rounded(q.dtype), total.lse


def ring_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    balanced: bool,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's q, k and v."""
    wide, shapes = wide_dtype(q.dtype), (k.shape, v.shape)
    dq = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
    message = pack(k, v)
    spare = [torch.empty_like(message) for _ in range(min(2, ranks.size - 1))]
    # Gradients of the keys at hand: two buffers take turns as what is added to and what arrives.
    sums, arriving_sums = (torch.zeros_like(message, dtype=wide) for _ in range(2))
    transfer_of_sums = None
    for step in range(ranks.size):
        source = (ranks.rank - step) % ranks.size
        arriving = spare[step % 2] if step < ranks.size - 1 else message
        transfer = ranks.shift(message, arriving, _KEYS) if arriving is not message else None
        block = visible(ranks.rank, source, ranks.size, q.shape[2], causal, balanced)
        grads = None
        if block is not None:
            rows = block.queries
            keys, values = (t[:, :, block.keys] for t in unpack(message, shapes))
            inputs = (grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows])
            grads = attend_backward(*inputs, lse[:, :, rows], scale, block.causal)
            dq[:, :, rows] += grads[0]
        if transfer_of_sums is not None:
            transfer_of_sums.wait()
            sums, arriving_sums = arriving_sums, sums
        if block is not None and grads is not None:
            for total, part in zip(unpack(sums, shapes), grads[1:], strict=True):
                total[:, :, block.keys] += part
        if ranks.size > 1:
            transfer_of_sums = ranks.shift(sums, arriving_sums, _GRADS)
        if transfer is not None:
            transfer.wait()
            message = arriving
    if transfer_of_sums is not None:
        transfer_of_sums.wait()
        sums = arriving_sums
    dk, dv = (total.to(q.dtype, copy=True) for total in unpack(sums, shapes))
    return dq.to(q.dtype), dk, dv
