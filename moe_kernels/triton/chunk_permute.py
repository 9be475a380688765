"""Reorder contiguous chunks of rows, as after an exchange: [source][expert] to [expert][source].

C chunks, R rows, H hidden size. Chunk ``order[j]`` comes j-th.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._launch import ceil_div, checks_values, next_power_of_2, on_device_of
from moe_kernels.triton._replay import launch
from moe_kernels.triton.permute import copy_tile

BLOCK_C = 128


@triton.jit
def _chunk_bounds_kernel(sizes, order, first, end, shift, C, BLOCK_C: tl.constexpr):
    """``end[j]``: the row where the j-th chunk ends; ``shift[j]``: how far its rows come from."""
    last = tl.zeros((), tl.int64)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        size = tl.maximum(tl.load(sizes + c, mask=c < C, other=0).to(tl.int64), 0)
        tl.store(first + c, last + tl.cumsum(size, 0) - size, mask=c < C)
        last += tl.sum(size, 0)
    tl.debug_barrier()  # other threads wrote what is read now
    last = tl.zeros((), tl.int64)
    for start in range(0, C, BLOCK_C):
        j = start + tl.arange(0, BLOCK_C)
        chunk = tl.load(order + j, mask=j < C, other=-1)
        valid = (chunk >= 0) & (chunk < C)
        size = tl.maximum(tl.load(sizes + chunk, mask=valid, other=0).to(tl.int64), 0)
        ends = last + tl.cumsum(size, 0)
        source = tl.load(first + chunk, mask=valid, other=0)
        tl.store(end + j, ends, mask=j < C)
        tl.store(shift + j, source - (ends - size), mask=j < C)
        last += tl.sum(size, 0)


@triton.jit(do_not_specialize=["R"])
def _chunk_permute_kernel(
    rows, end, shift, out, R, H, C, stride_r, stride_h,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    chunk = tl.zeros((BLOCK_R,), tl.int32)  # how many chunks end at or before the row
    for start in range(0, C, BLOCK_C):
        j = start + tl.arange(0, BLOCK_C)
        ends = tl.load(end + j, mask=j < C, other=R)
        chunk += tl.sum(((ends[None, :] <= row[:, None]) & (j < C)[None, :]).to(tl.int32), 1)
    source = row + tl.load(shift + chunk, mask=chunk < C, other=0)
    valid = (chunk < C) & (source >= 0) & (source < R)
    column = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (column < H)[None, :]
    tile = tl.load(
        rows + source[:, None] * stride_r + column[None, :] * stride_h,
        mask=valid[:, None] & inside,
        other=0.0,
    )
    tl.store(out + row[:, None] * H + column[None, :], tile, mask=(row < R)[:, None] & inside)


def _check(rows: Tensor, sizes: Tensor, order: Tensor) -> None:
    if bool((sizes < 0).any()) or int(sizes.sum()) > rows.shape[0]:
        raise ValueError(
            "chunk_permute: sizes must be non-negative and sum to at most rows.shape[0] = "
            f"{rows.shape[0]}; got {sizes.tolist()}"
        )
    if order.sort().values.tolist() != list(range(order.numel())):
        raise ValueError(
            f"chunk_permute: order must be a permutation of 0..{order.numel() - 1}; "
            f"got {order.tolist()}"
        )


def chunk_permute(rows: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    if checks_values():
        _check(rows, sizes, order)
    (R, H), C = rows.shape, sizes.numel()
    out = rows.new_empty(R, H)
    if out.numel() == 0:
        return out
    first, end, shift = sizes.new_empty(3, C, dtype=torch.int64)
    block_r, block_h = copy_tile(H)
    block_c = min(next_power_of_2(C), BLOCK_C)
    with on_device_of(rows):
        if C:
            launch(
                _chunk_bounds_kernel, (1,),
                sizes.contiguous(), order.contiguous(), first, end, shift, C, BLOCK_C=block_c,
            )  # fmt: skip
        launch(
            _chunk_permute_kernel, (ceil_div(R, block_r), ceil_div(H, block_h)),
            rows, end, shift, out, R, H, C, *rows.stride(),
            BLOCK_C=block_c, BLOCK_R=block_r, BLOCK_H=block_h,
        )  # fmt: skip
    return out
