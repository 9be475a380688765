"""The transport `cuda_ipc` without GPUs: its device code runs on tensors of the CPU.

T tokens, H hidden size, K experts a token, E experts, P ranks, U tokens received, C capacity.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.dispatch import AllToAllDispatcher, Dispatched
from moe_parallel.dispatch.joining import EMULATE_GPUS


def cuda_ipc(experts: int, max_tokens: int = 64, **options: Any) -> AllToAllDispatcher:
    """A dispatcher among all ranks."""
    os.environ[EMULATE_GPUS] = "1"
    return AllToAllDispatcher(
        dist.group.WORLD, experts, transport="cuda_ipc", max_tokens=max_tokens, **options
    )


def counts(tokens: Dispatched, ranks: int) -> tuple[list[int], list[int]]:
    """Rows sent to each rank, and received from each."""
    plan = tokens.handle.plan.tolist()
    return plan[:ranks], plan[ranks : 2 * ranks]


def received(tokens: Dispatched, ranks: int) -> Dispatched:
    """Without the spare rows, which hold zeros and no experts."""
    number = min(sum(counts(tokens, ranks)[1]), len(tokens.x))

    def cut(rows: Tensor, spare: float) -> Tensor:
        assert not (rows[number:] != spare).any(), "a spare row"
        return rows[:number]

    extra = None if tokens.extra is None else cut(tokens.extra, 0)
    return dataclasses.replace(
        tokens,
        x=cut(tokens.x, 0) if tokens.x.element_size() > 1 else tokens.x[:number],
        topk_ids=cut(tokens.topk_ids, -1),
        topk_weights=cut(tokens.topk_weights, 0),
        extra=extra,
    )


def assert_equal(got: Dispatched, expected: Dispatched, ranks: int) -> None:
    """Bit for bit, what a dispatcher of another transport got."""
    mine = received(got, ranks)
    for name in ("x", "topk_ids", "topk_weights"):
        ours, theirs = getattr(mine, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(as_bytes(ours), as_bytes(theirs)), name


def as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8) if rows.numel() else rows.new_empty(rows.shape)
