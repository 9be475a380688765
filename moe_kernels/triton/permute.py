"""Token permutation: rows grouped by expert.

T tokens, K experts a token, R = T * K slots, H hidden size, E experts. A token is read once and
written K times, which is fewer bytes than to read it for each of its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton._fp8 import raw
from moe_kernels.triton._launch import (
    ceil_div,
    next_power_of_2,
    on_device_of,
    pipelines_pointer_loads,
)
from moe_kernels.triton._operands import Source
from moe_kernels.triton._replay import launch

TILE = 4096  # elements a program copies
UNROLLED = tl.constexpr(4)  # rows of a token that are addressed at a time
TAIL, MOST_TAIL = 64, 1024  # steps of a program's tail; programs for the sake of it


@triton.jit
def load_rows_of(slot_to_row, token, k, used, T, top_k):
    """The row of each token's k-th slot, and whether there is one."""
    row = tl.load(slot_to_row + token * top_k + k, mask=(token < T) & (k < top_k), other=-1)
    return row.to(tl.int64), (row >= 0) & (row < used)


@triton.jit
def rows_of_experts(offsets, E, num_rows):
    """How many of the rows are an expert's: within [0, num_rows] whatever the offsets."""
    return tl.minimum(tl.maximum(tl.load(offsets + E), 0), num_rows)


@triton.jit
def tail_of(used, num_rows, BLOCK: tl.constexpr):
    """The rows of no slot that a program writes: the first, and how many times which step on."""
    first = tl.cast(used, tl.int64) + tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    turns = tl.maximum(tl.cdiv(tl.cast(num_rows, tl.int64) - first, step), 0)
    return first, turns.to(tl.int32), step


@triton.jit(do_not_specialize=["num_rows", "T", "E", "top_k"])
def _permute_kernel(
    x, slot_to_row, offsets, out, num_rows, T, H, E, top_k, stride_t, stride_h,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program reads its tokens once and writes them to all their rows."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = rows_of_experts(offsets, E, num_rows)
    inside = (column < H)[None, :]
    tile = tl.load(
        x + token[:, None] * stride_t + column[None, :].to(tl.int64) * stride_h,
        mask=(token < T)[:, None] & inside,
        other=0.0,
    )
    for k in range(0, top_k, UNROLLED):
        for i in tl.static_range(UNROLLED):
            row, valid = load_rows_of(slot_to_row, token, k + i, used, T, top_k)
            cell = out + row[:, None] * H + column[None, :]
            tl.store(cell, tile, mask=valid[:, None] & inside)
    # rows of no slot
    zeros = tl.zeros((BLOCK_T, BLOCK_H), out.dtype.element_ty)
    first, turns, step = tail_of(used, num_rows, BLOCK_T)
    for turn in range(turns):
        row = first + tl.cast(turn, tl.int64) * step + tl.arange(0, BLOCK_T)
        tl.store(
            out + row[:, None] * H + column[None, :],
            zeros,
            mask=(row < num_rows)[:, None] & inside,
        )


def copy_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of the tile a program copies, for rows of ``columns`` elements."""
    block_columns = min(next_power_of_2(columns), 512)
    return TILE // max(block_columns, 32), block_columns


def token_programs(tokens: int, block: int, num_rows: int) -> int:
    """So many that each token has one, and that a long tail of rows of no slot is soon written."""
    return max(ceil_div(tokens, block), min(ceil_div(num_rows, TAIL * block), MOST_TAIL))


def gathered_rows(
    x: Tensor, order: tuple[Tensor, Tensor, Tensor], rows: int, *, by_tma: bool = False
) -> tuple[Tensor, Source | None]:
    """What a GEMM multiplies for ``rows`` rows gathered from ``x [T, H]``.

    ``x`` and the source of its rows; or the rows, gathered, where the GEMM cannot pipeline loads by
    pointer (see :func:`pipelines_pointer_loads`), or has none (``by_tma``), but can load the copy
    by TMA.
    """
    pipelined = pipelines_pointer_loads(x.device) and not by_tma
    if pipelined or x.shape[1] * x.element_size() % 16:
        return x, Source(order[0], order[1].shape[1])
    return permute(x, *order, rows), None


def permute(
    x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, offsets: Tensor, num_rows: int
) -> Tensor:
    H = x.shape[1]
    out = x.new_empty(num_rows, H)
    if out.numel() == 0:
        return out
    if row_to_slot.numel() == 0:
        return out.zero_()
    T, K = slot_to_row.shape
    block_t, block_h = copy_tile(H)
    with on_device_of(x):
        launch(
            _permute_kernel, (token_programs(T, block_t, num_rows), ceil_div(H, block_h)),
            raw(x), slot_to_row, offsets, raw(out), num_rows, T, H, offsets.numel() - 1, K,
            *x.stride(), BLOCK_T=block_t, BLOCK_H=block_h,
            num_warps=8 if x.element_size() == 1 else 4,
        )  # fmt: skip
    return out
