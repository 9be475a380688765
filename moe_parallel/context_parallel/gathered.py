"""Attention of a rank's queries to the gathered keys and values of all ranks.

While they are gathered, the rank's queries attend to its own keys. Backward gathers them again,
rather than keep them, and each rank gets the sum of its keys' gradients.

B sequences, N heads, G key and value heads, L tokens of a rank, D size of a head, P ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_parallel.context_parallel.blocks import Total, attend, attend_backward, wide_dtype
from moe_parallel.context_parallel.exchange import Ranks, pack, unpack
from moe_parallel.context_parallel.layout import Piece, pieces


class _Gathered:
    """Keys and values of all ranks; those of this one before the others have arrived."""

    def __init__(self, k: Tensor, v: Tensor, ranks: Ranks) -> None:
        self._shapes, self._own = (k.shape, v.shape), {ranks.rank: [k, v]}
        message = pack(k, v)
        self._messages = message.new_empty(ranks.size, message.numel())
        self._transfer = ranks.gather(message, self._messages)
        self._message = message  # lives until it has been sent
        self._all: dict[int, list[Tensor]] | None = None

    def wait(self) -> None:
        if self._all is None:
            self._transfer.wait()
            self._all = {
                rank: unpack(message, self._shapes) for rank, message in enumerate(self._messages)
            }

    def of(self, piece: Piece) -> list[Tensor]:
        """``[keys, values]`` of a piece, [B, G, S, D]."""
        if any(source not in self._own for source, _ in piece.keys):
            self.wait()
        known = self._own if self._all is None else self._all
        return [
            torch.cat([known[source][which][:, :, keys] for source, keys in piece.keys], 2)
            for which in (0, 1)
        ]


def _mask(piece: Piece, device: torch.device) -> Tensor | None:
    return None if piece.mask is None else piece.mask.to(device)


def gathered_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    balanced: bool,
    window: int | None,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """``(out [B, N, L, D of values], lse [B, N, L])`` of this rank's queries and all keys."""
    total = Total(q, v)
    gathered = _Gathered(k, v, ranks)
    for piece in pieces(ranks.rank, ranks.size, q.shape[2], causal, balanced, window):
        keys, values = gathered.of(piece)
        queries = q[:, :, piece.queries]
        mask = _mask(piece, q.device)
        total.add(piece.queries, *attend(queries, keys, values, scale, piece.causal, mask))
    gathered.wait()
    return total.rounded(q.dtype), total.lse


def gathered_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    balanced: bool,
    window: int | None,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's q, k and v."""
    wide, shapes = wide_dtype(q.dtype), (k.shape, v.shape)
    dq = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
    gathered = _Gathered(k, v, ranks)
    sums = q.new_zeros(ranks.size, k.numel() + v.numel(), dtype=wide)
    for piece in pieces(ranks.rank, ranks.size, q.shape[2], causal, balanced, window):
        rows, (keys, values) = piece.queries, gathered.of(piece)
        inputs = (grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows])
        mask = _mask(piece, q.device)
        dq_part, *parts = attend_backward(*inputs, scale, piece.causal, mask)
        dq[:, :, rows] += dq_part
        start = 0
        for source, part_keys in piece.keys:
            totals = [total[:, :, part_keys] for total in unpack(sums[source], shapes)]
            end = start + totals[0].shape[2]
            for total, part in zip(totals, parts, strict=True):
                total += part[:, :, start:end]
            start = end
    gathered.wait()
    own = torch.empty_like(sums[0])
    ranks.scatter_sum(sums, own).wait()
    dk, dv = (total.to(q.dtype, copy=True) for total in unpack(own, shapes))
    return dq.to(q.dtype), dk, dv
