"""Attention of some queries to some keys, and the sum of several such blocks.

The softmax over keys that come in blocks is exact with each block's log-sum-exp: with o_b and l_b
of block b, l = log sum_b exp(l_b) and o = sum_b exp(l_b - l) o_b. In backward a block needs the
whole's o and l alone (Dao et al., FlashAttention, 2022; Liu et al., Ring Attention, 2023).

B sequences, N heads, G key and value heads (G divides N), Q queries, S keys, D sizes of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_parallel.torch_internals import (
    efficient_attention,
    efficient_attention_backward,
    flash_attention,
    flash_attention_backward,
)

MAX_FLASH_HEAD = 256


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results are added in."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One block.

    Args:
        q: [B, N, Q, D].
        k, v: [B, G, S, D], [B, G, S, D of values].
        causal: query i sees the keys up to i; Q equals S.
        mask: [Q, S] bool, not together with causal; every query must see a key.

    Returns:
        ``(out [B, N, Q, D of values], lse [B, N, Q])``; lse in float32, in float64 for float64.
    """
    kernel = _kernel(q, v, mask)
    if kernel == "flash":
        return flash_attention(q, k, v, scale, causal, mask)
    if kernel == "efficient":
        heads = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(heads, 1) for t in (k, v))
        return efficient_attention(q, k, v, scale, causal)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))
    for rows, scores, _, values in _plain_scores(q, k, v, scale, causal, mask):
        lse[:, rows] = scores.logsumexp(-1)
        out[:, rows] = (scores - lse[:, rows, :, None]).exp_() @ values
    return out, lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block adds to the gradients of q, k and v.

    Args:
        grad: [B, N, Q, D of values], of out.
        out, lse: of these queries and all keys that they see, in this block and others.
        q, k, v, scale, causal, mask: of :func:`attend`.
    """
    kernel = _kernel(q, v, mask)
    if kernel != "plain":
        grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    if kernel == "flash":
        return flash_attention_backward(grad, q, k, v, out, lse, scale, causal, mask)
    if kernel == "efficient":
        heads = q.shape[1] // k.shape[1]
        wide_k, wide_v = (t.repeat_interleave(heads, 1) for t in (k, v))
        dq, dk, dv = efficient_attention_backward(grad, q, wide_k, wide_v, out, lse, scale, causal)
        return dq, dk.unflatten(1, (-1, heads)).sum(2), dv.unflatten(1, (-1, heads)).sum(2)
    wide = wide_dtype(q.dtype)
    dq, dk, dv = (torch.empty_like(t, dtype=wide) for t in (q, k, v))
    for index, (rows, scores, keys, values) in enumerate(
        _plain_scores(q, k, v, scale, causal, mask)
    ):
        d_out = grad[:, rows].to(wide)
        share = (scores - lse[:, rows, :, None]).exp_()
        dv[:, index] = (share.mT @ d_out).sum(1)
        d_share = d_out @ values.mT - (d_out * out[:, rows]).sum(-1, keepdim=True)
        d_scores = share * d_share * scale
        dq[:, rows] = d_scores @ keys
        dk[:, index] = (d_scores.mT @ q[:, rows].to(wide)).sum(1)
    return dq, dk, dv


def _kernel(q: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """ "flash", "efficient" or "plain": what can do this block."""
    size = q.shape[-1]
    if q.numel() == 0 or v.shape[-1] != size or v.numel() == 0:
        return "plain"
    if q.device.type == "cpu":
        return "flash"
    if q.device.type != "cuda" or mask is not None or size % 8:
        return "plain"
    if q.dtype == torch.float32:
        return "efficient"
    flash = size <= MAX_FLASH_HEAD and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if q.dtype in (torch.bfloat16, torch.float16):
        return "flash" if flash else "efficient"
    return "plain"


def _plain_scores(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Scores [B, N / G, Q, S] of one key head after the other, to need little memory.

    Yields the heads of the queries, their scores, and keys and values [B, 1, S, D].
    """
    wide, heads = wide_dtype(q.dtype), q.shape[1] // k.shape[1]
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    for index in range(k.shape[1]):
        own = slice(index * heads, (index + 1) * heads)
        keys, values = (t[:, index : index + 1].to(wide) for t in (k, v))
        scores = q[:, own].to(wide) @ keys.mT * scale
        if mask is not None:
            scores.masked_fill_(~mask, float("-inf"))
        yield own, scores, keys, values


class Total:
    """Adds up blocks of the attention of [B, N, Q, D] queries.

    Attributes:
        out: [B, N, Q, D of values], lse: [B, N, Q]; both wide.
    """

    def __init__(self, q: Tensor, v: Tensor) -> None:
        wide = wide_dtype(q.dtype)
        self.out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide)
        self.lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide)

    def add(self, queries: slice, out: Tensor, lse: Tensor) -> None:
        """``out`` and ``lse`` of one block, for ``queries``."""
        before, total = self.lse[:, :, queries], self.out[:, :, queries]
        together = torch.logaddexp(before, lse)
        total.mul_((before - together).exp_().unsqueeze_(-1))
        total.addcmul_(out.to(total.dtype), (lse - together).exp_().unsqueeze_(-1))
        before.copy_(together)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """``out`` in ``dtype``, [B, N, Q, D] in the memory order B, Q, N, D of its projection."""
        b, n, q, d = self.out.shape
        return self.out.new_empty(b, q, n, d, dtype=dtype).transpose(1, 2).copy_(self.out)
